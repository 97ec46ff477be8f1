"""Wrong answers to chapter 6's exercises, each with the sentence that names its mistake."""

from rlhf_course.coursework.mutants import Mutant


def mutants(exercise, *rows):
    """Mutants of one exercise, from (name, says, edits or body)."""
    made = []
    for name, says, change in rows:
        kind = "body" if isinstance(change, str) else "edits"
        made.append(Mutant(exercise, name, says=says, **{kind: change}))
    return made


def ptx(token_mean, seq_sum):
    """The body of `ptx_loss` with other formulas."""
    return f"""
        if reduction == "token_mean":
            return {token_mean}
        if reduction == "seq_sum":
            return {seq_sum}
    """


TOKEN_MEAN = "token_mean(nll, mask, denominator)"
SEQ_SUM = "token_mean(masked_sum(nll, mask, dim=1), mask.any(dim=1), denominator)"
NAIVE = "import torch\nnll = torch.where(mask, nll, 0.0)\n"

PTX_LOSS = mutants(
    "ppo_ptx.ptx_loss",
    (
        "pads in the mean",
        "You divide by all entries, pads included. Only the valid tokens count.",
        ptx(
            "masked_sum(nll, mask) / (mask.numel() if denominator is None else denominator)",
            SEQ_SUM,
        ),
    ),
    (
        "mask as a factor",
        "You multiply by the mask. Where a pad holds NaN that gives NaN * 0 = NaN: choose the "
        "entries instead of scaling them.",
        ptx(
            "(nll * mask).sum() / (mask.sum() if denominator is None else denominator)",
            "(nll * mask).sum() / (mask.any(dim=1).sum() if denominator is None else denominator)",
        ),
    ),
    (
        "mean of row means",
        "Your token mean is a mean of the rows' means: a token in a short row weighs more than "
        "one in a long row.",
        ptx(
            "token_mean(masked_sum(nll, mask, dim=1) / mask.sum(dim=1).clamp(min=1),"
            " mask.any(dim=1), None) if denominator is None else " + TOKEN_MEAN,
            SEQ_SUM,
        ),
    ),
    (
        "sum of the rows",
        "Your seq_sum adds the rows up. It is the mean over rows of a row's sum.",
        ptx(TOKEN_MEAN, "masked_sum(nll, mask) / (1 if denominator is None else denominator)"),
    ),
    (
        "sums divided by tokens",
        "Your seq_sum divides by the number of tokens, which makes it the token mean.",
        ptx(TOKEN_MEAN, TOKEN_MEAN),
    ),
    (
        "reductions swapped",
        "The two reductions are the wrong way round.",
        ptx(SEQ_SUM, TOKEN_MEAN),
    ),
    (
        "denominator ignored",
        "You always divide by this batch's own count. A given denominator replaces it, so that "
        "micro-batches add up.",
        ptx("token_mean(nll, mask)", "token_mean(masked_sum(nll, mask, dim=1), mask.any(dim=1))"),
    ),
    (
        "sign",
        "The sign is wrong: nll is -log π already, and the term is minimised.",
        ptx("-" + TOKEN_MEAN, "-" + SEQ_SUM),
    ),
    (
        "detached",
        "No gradient comes through your loss, so the policy would learn nothing from it.",
        ptx("token_mean(nll.detach(), mask, denominator)", SEQ_SUM.replace("nll", "nll.detach()")),
    ),
    (
        "empty rows counted",
        "Your seq_sum divides by all rows. A row without any token does not count.",
        ptx(
            TOKEN_MEAN, "masked_sum(nll, mask) / (len(nll) if denominator is None else denominator)"
        ),
    ),
)

RUNNING = mutants(
    "ppo_ptx.RunningMoments.update",
    (
        "equal weights",
        "You give the new batch the weight of everything before it. It weighs by its size.",
        [("share = self._share(int(count))", "share = self._share(int(count)) and 0.5")],
    ),
    (
        "no spread between batches",
        "You average the variances. Two batches around different means are spread wider than "
        "either: the difference of the means is missing.",
        [(" + (1 - share) * delta**2", "")],
    ),
    (
        "spread too wide",
        "The squared difference of the means comes in with too much weight: it is share times "
        "(1 - share).",
        [("(1 - share) * delta**2", "delta**2")],
    ),
    (
        "difference taken too late",
        "You take the difference to the mean that you have just moved. Take it to the old one.",
        [
            ("delta = mean - self.mean\n", "old = self.mean\n"),
            (
                "self.mean += share * delta",
                "self.mean += share * (mean - old)\n        delta = mean - self.mean",
            ),
        ],
    ),
    (
        "only the last batch",
        "You put the new batch's moments in the place of the old ones instead of merging them.",
        [("share = self._share(int(count))", "share = self._share(int(count)) and 1.0")],
    ),
    (
        "weights swapped",
        "The weights are the wrong way round: share belongs to the new batch.",
        [
            (
                "share = self._share(int(count))",
                "share = self._share(int(count))\n        share = 1 - share if share < 1 else 1",
            ),
        ],
    ),
    (
        "Bessel",
        "You divide the batch's variance by n - 1. All variances here are the population's; `std` "
        "does that correction once, at the end.",
        [("variance - self.var", "variance * count / max(count - 1, 1) - self.var")],
    ),
    (
        "share of the past",
        "You divide the batch's size by the count before it. Divide by the count with it.",
        [
            (
                "share = self._share(int(count))",
                "before = self.count\n        self._share(int(count))\n"
                "        share = count / before if before else 1.0",
            )
        ],
    ),
    (
        "deviations averaged",
        "You average standard deviations. Variances can be averaged, their roots cannot.",
        [
            (
                "self.var += share * (variance - self.var + (1 - share) * delta**2)",
                "root = (1 - share) * self.var**0.5 + share * variance**0.5\n"
                "        self.var = root**2 + share * (1 - share) * delta**2",
            ),
        ],
    ),
    (
        "count forgotten",
        "You do not count the new values, so every batch is taken for the first.",
        [
            (
                "share = self._share(int(count))",
                "share = count / (self.count + count)\n        self.count = int(count)",
            )
        ],
    ),
)

POPART = mutants(
    "ppo_ptx.PopArt.update",
    (
        "head untouched",
        "The moments change and the head stays as it is: the critic's values jump. Either you do "
        "not rescale it, or you read the old moments after the update.",
        "self.moments.update(targets[mask], group)",
    ),
    (
        "scale inverted",
        "The weight is scaled the wrong way: a larger std needs smaller weights.",
        [("self.head.weight.mul_(std / self.std)", "self.head.weight.mul_(self.std / std)")],
    ),
    (
        "weight forgotten",
        "You adapt the bias alone. The weight has to be rescaled too.",
        [("self.head.weight.mul_(std / self.std)", "pass")],
    ),
    (
        "bias forgotten",
        "You adapt the weight alone. The bias has to be rescaled and moved too.",
        [("self.head.bias.fill_((std * bias + mean - self.mean) / self.std)", "pass")],
    ),
    (
        "bias not moved",
        "The bias is rescaled but not moved by the difference of the means.",
        [("(std * bias + mean - self.mean) / self.std", "std * bias / self.std")],
    ),
    (
        "bias not scaled",
        "The old bias is a normalised number: multiply it by the old std before you move it.",
        [("std * bias + mean", "bias + mean")],
    ),
    (
        "moved the wrong way",
        "The bias is moved the wrong way: when the mean rises, the normalised value falls.",
        [("mean - self.mean", "self.mean - mean")],
    ),
    (
        "old std lost",
        "You read the old std after the update, when it is the new one already.",
        [
            ("mean, std = self.mean, self.std", "mean = self.mean"),
            ("bias = self.head.bias.item()", "std, bias = self.std, self.head.bias.item()"),
        ],
    ),
    (
        "from 0 and 1",
        "You rescale as if the head had never been normalised. After the first rollout its mean "
        "and std are no longer 0 and 1.",
        [("mean, std = self.mean, self.std", "mean, std = 0.0, 1.0")],
    ),
    (
        "pads counted",
        "You take in targets outside the mask. They belong to nobody.",
        [("targets[mask]", "targets.nan_to_num().flatten()")],
    ),
    (
        "new parameters",
        "You give the head new parameters. The optimiser goes on with the old ones, which nobody "
        "uses any more: change them in place.",
        [
            (
                "self.head.weight.mul_(std / self.std)",
                "self.head.weight = type(self.head.weight)(self.head.weight * std / self.std)",
            )
        ],
    ),
)

MOMENTS = mutants(
    "ppo_ptx.masked_moments",
    (
        "group ignored",
        "Every rank gives the moments of its own values. The sums have to be added up over the "
        "ranks of `group`.",
        [("if group is not None:", "if False:")],
    ),
    (
        "mean of the ranks' means",
        "You average the ranks' means. Ranks hold unequal counts: add up sums and counts, and "
        "divide once.",
        [
            (
                "mean = total(x) / count.clamp(min=1)",
                "own = masked_sum(x, mask) / mask.sum().clamp(min=1)\n"
                "    ranks = torch.ones((), dtype=x.dtype)\n"
                "    if group is not None:\n"
                "        all_reduce(own, group=group)\n"
                "        all_reduce(ranks, group=group)\n"
                "    mean = own / ranks",
            ),
        ],
    ),
    (
        "spread around the own mean",
        "Each rank measures the spread around its own mean. It is the spread around the mean of "
        "all that counts.",
        [("(x - mean).square()", "(x - masked_sum(x, mask) / mask.sum().clamp(min=1)).square()")],
    ),
    (
        "counts of one rank",
        "The sums are added up over the ranks, but you divide them by your own count.",
        [("count = total(torch.ones_like(x))", "count = mask.sum().double()")],
    ),
    (
        "empty rank leaves",
        "A rank without values returns early. The others wait for it: all ranks must call "
        "all_reduce equally often.",
        [
            (
                "def total(",
                "if not mask.any():\n        return (torch.zeros((), dtype=x.dtype),) * 3\n\n"
                "    def total(",
            )
        ],
    ),
    (
        "one pass",
        "E[x²] - E[x]² loses its digits when the mean is far from 0. Take the mean first.",
        [
            (
                "total((x - mean).square()) / count.clamp(min=1)",
                "total(x.square()) / count.clamp(min=1) - mean.square()",
            )
        ],
    ),
    (
        "Bessel",
        "You divide by n - 1. The population's variance is meant, which is defined for n = 1.",
        [
            (
                "variance = total((x - mean).square()) / count.clamp(min=1)",
                "variance = total((x - mean).square()) / (count - 1).clamp(min=1)",
            )
        ],
    ),
    (
        "mask as a factor",
        "You multiply by the mask, and NaN * 0 is NaN. Choose the entries (`masked_sum`).",
        [("values = masked_sum(values, mask)", "values = (values * mask).sum()")],
    ),
    (
        "pads counted",
        "You divide by the number of all entries, pads included.",
        [
            (
                "count = total(torch.ones_like(x))",
                "count = total(torch.ones_like(x)) * 0 + x.numel()",
            )
        ],
    ),
    (
        "division by 0",
        "Where nothing is valid you divide 0 by 0. The moments are 0 there.",
        [
            ("mean = total(x) / count.clamp(min=1)", "mean = total(x) / count"),
            (
                "variance = total((x - mean).square()) / count.clamp(min=1)",
                "variance = total((x - mean).square()) / count",
            ),
        ],
    ),
    (
        "standard deviation",
        "You return the standard deviation. The variance is asked for.",
        [("return mean, variance, count", "return mean, variance.sqrt(), count")],
    ),
)

MUTANTS = [*PTX_LOSS, *RUNNING, *POPART, *MOMENTS]
