"""Wrong answers to chapter 8's exercises, each with the sentence that names its mistake."""

from rlhf_course.coursework.mutants import Mutant


def mutants(exercise, *rows):
    """Mutants of one exercise, from (name, says, edits or body)."""
    made = []
    for name, says, change in rows:
        kind = "body" if isinstance(change, str) else "edits"
        made.append(Mutant(exercise, name, says=says, **{kind: change}))
    return made


DPO = mutants(
    "beyond_ppo.dpo_loss",
    (
        "sign",
        "The rejected answer is pushed up: check which reward is subtracted from which.",
        [("margin = chosen - rejected", "margin = rejected - chosen")],
    ),
    (
        "no reference",
        "The reference is missing. The reward is the log-ratio to it, or the policy could make "
        "all answers unlikely.",
        [
            (" - ref_logprobs_chosen.detach()", ""),
            (" - ref_logprobs_rejected.detach()", ""),
        ],
    ),
    (
        "reference added",
        "The reference's log-probabilities are added. The log of a ratio is a difference.",
        [
            ("- ref_logprobs_chosen.detach()", "+ ref_logprobs_chosen.detach()"),
            ("- ref_logprobs_rejected.detach()", "+ ref_logprobs_rejected.detach()"),
        ],
    ),
    (
        "references swapped",
        "The chosen answer is compared with the reference's rejected one, and the other way round.",
        [
            ("- ref_logprobs_chosen.detach()", "- ref_logprobs_rejected.detach() "),
            (
                "(logprobs_rejected - ref_logprobs_rejected.detach())",
                "(logprobs_rejected - ref_logprobs_chosen.detach())",
            ),
        ],
    ),
    (
        "beta outside",
        "beta stands outside of the sigmoid. It belongs inside: it scales the rewards.",
        [
            ("chosen = beta * (logprobs_chosen", "chosen = (logprobs_chosen"),
            ("rejected = beta * (logprobs_rejected", "rejected = (logprobs_rejected"),
            ("-logsigmoid(margin).sum()", "-beta * logsigmoid(margin).sum()"),
        ],
    ),
    (
        "beta forgotten",
        "beta is missing from the rewards.",
        [
            ("chosen = beta * (logprobs_chosen", "chosen = (logprobs_chosen"),
            ("rejected = beta * (logprobs_rejected", "rejected = (logprobs_rejected"),
        ],
    ),
    (
        "reference learns",
        "The reference gets a gradient. It is held constant: detach it.",
        [
            ("ref_logprobs_chosen.detach()", "ref_logprobs_chosen"),
            ("ref_logprobs_rejected.detach()", "ref_logprobs_rejected"),
        ],
    ),
    (
        "detached",
        "No gradient reaches the policy.",
        [("logsigmoid(margin)", "logsigmoid(margin.detach())")],
    ),
    (
        "log of sigmoid",
        "log(sigmoid(x)) is -inf for a pair that is far off. `logsigmoid` is not.",
        [("logsigmoid(margin)", "margin.sigmoid().log()")],
    ),
    (
        "sum",
        "You add the pairs up. The mean over them is asked for.",
        [
            (
                "count = len(logprobs_chosen) if denominator is None else denominator",
                "count = 1 if denominator is None else denominator",
            )
        ],
    ),
    (
        "denominator ignored",
        "You always divide by the pairs given. A denominator takes the place of their number.",
        [
            (
                "count = len(logprobs_chosen) if denominator is None else denominator",
                "count = len(logprobs_chosen)",
            )
        ],
    ),
    (
        "ties lost",
        "A tied pair counts as lost in your accuracy. It counts half.",
        [(" + (margin == 0).to(margin.dtype) / 2", "")],
    ),
    (
        "stats attached",
        "Your statistics carry the gradient's graph with them. Detach them.",
        [("x.detach().sum()", "x.sum()")],
    ),
    (
        "rewards without beta",
        "The implicit rewards that you report lack beta.",
        [
            ('"reward_chosen": chosen', '"reward_chosen": chosen / beta'),
            ('"reward_rejected": rejected', '"reward_rejected": rejected / beta'),
        ],
    ),
)

OTHERS = "others = (rewards.sum(dim=1, keepdim=True) - rewards) / (size - 1)"

RLOO = mutants(
    "beyond_ppo.rloo_advantages",
    (
        "own reward included",
        "Your baseline contains the answer's own reward. It is the mean of the others alone.",
        [(OTHERS, "others = rewards.mean(dim=1, keepdim=True)")],
    ),
    (
        "divided by all",
        "You divide the others' sum by G. There are G - 1 of them.",
        [("/ (size - 1)", "/ size")],
    ),
    (
        "sum of the others",
        "You subtract the others' sum. Their mean is the baseline.",
        [(" / (size - 1)", "")],
    ),
    (
        "sign",
        "The sign is wrong: an answer better than the others gets a positive advantage.",
        [("return rewards - others", "return others - rewards")],
    ),
    (
        "across prompts",
        "Your baseline mixes the prompts. Only answers to the same prompt are compared.",
        [
            (
                OTHERS,
                "others = (rewards.sum(dim=0, keepdim=True) - rewards) / max(len(rewards) - 1, 1)",
            )
        ],
    ),
    (
        "the whole batch",
        "Your baseline is the mean of all other answers of the batch. It is that of the prompt.",
        [(OTHERS, "others = (rewards.sum() - rewards) / (rewards.numel() - 1)")],
    ),
    (
        "divided by the spread",
        "You divide by the standard deviation. RLOO does not: it keeps the reward's scale.",
        [
            (
                "return rewards - others",
                "return (rewards - others) / (rewards.std(dim=1, keepdim=True) + 1e-9)",
            )
        ],
    ),
    (
        "best of the others",
        "Your baseline is the best of the others. It is their mean.",
        """
        columns = []
        for g in range(size):
            rest = [i for i in range(size) if i != g]
            columns.append(rewards[:, g] - rewards[:, rest].amax(dim=1))
        return columns[0].new_zeros(()) + __import__("torch").stack(columns, dim=1)
        """,
    ),
)

EXACT = "exact = rewards.double()"
GRPO_RETURN = "return (centred / (exact.std(dim=1, keepdim=True) + eps)).to(rewards.dtype)"

GRPO = mutants(
    "beyond_ppo.grpo_advantages",
    (
        "population",
        "You divide by n. GRPO's standard deviation divides by n - 1.",
        [("exact.std(dim=1, keepdim=True)", "exact.std(dim=1, keepdim=True, correction=0)")],
    ),
    (
        "no spread",
        "The division by the standard deviation is missing.",
        [(GRPO_RETURN, "return centred.to(rewards.dtype)")],
    ),
    (
        "variance",
        "You divide by the variance. Its root is asked for.",
        [("exact.std(dim=1, keepdim=True)", "exact.var(dim=1, keepdim=True)")],
    ),
    (
        "spread of the batch",
        "You divide by the spread of the whole batch. Every prompt has its own.",
        [("exact.std(dim=1, keepdim=True)", "exact.std()")],
    ),
    (
        "mean of the batch",
        "You subtract the mean of the whole batch. Every prompt has its own.",
        [("exact.mean(dim=1, keepdim=True)", "exact.mean()")],
    ),
    (
        "across prompts",
        "You normalise each column, over the prompts. The answers to one prompt are the group.",
        [
            ("exact.mean(dim=1, keepdim=True)", "exact.mean(dim=0, keepdim=True)"),
            (
                "exact.std(dim=1, keepdim=True)",
                "exact.std(dim=0, keepdim=True, correction=min(1, len(exact) - 1))",
            ),
        ],
    ),
    (
        "no eps",
        "Equal rewards have spread 0: without eps that is 0 / 0.",
        [(" + eps)", ")")],
    ),
    (
        "eps in the root",
        "You add eps to the variance. It is added to the standard deviation.",
        [
            (
                "(exact.std(dim=1, keepdim=True) + eps)",
                "(exact.var(dim=1, keepdim=True) + eps).sqrt()",
            )
        ],
    ),
    (
        "without the own reward",
        "You subtract the mean of the others. GRPO's mean is that of the whole group.",
        [
            (
                "centred = exact - exact.mean(dim=1, keepdim=True)",
                "size = exact.shape[1]\n    centred = (exact - exact.mean(dim=1, keepdim=True))\n"
                "    centred = centred * size / (size - 1)",
            )
        ],
    ),
    (
        "sign",
        "The sign is wrong: an answer better than the mean gets a positive advantage.",
        [
            (
                "centred = exact - exact.mean(dim=1, keepdim=True)",
                "centred = exact.mean(dim=1, keepdim=True) - exact",
            )
        ],
    ),
    (
        "float64 returned",
        "The advantages come back as float64. They keep the rewards' dtype.",
        [(".to(rewards.dtype)", "")],
    ),
    (
        "rounding divided by rounding",
        "In float32 equal rewards have a spread of 1e-8 by rounding, and rounding divided by "
        "rounding is about 1. Compute in float64.",
        [(EXACT, "exact = rewards")],
    ),
)

TO_COME = "to_come = rewards.flip(1).cumsum(dim=1).flip(1)"
WHITEN = "return whiten(to_come, mask, eps=eps, group=group)"

PLUS_PLUS = mutants(
    "beyond_ppo.reinforce_plus_plus_advantages",
    (
        "what was paid before",
        "You add up from the front: a token pays for what came before it, which it cannot change.",
        [(TO_COME, "to_come = rewards.cumsum(dim=1)")],
    ),
    (
        "everybody pays for all",
        "Every token pays for the whole answer's KL. What was paid before it is past.",
        [(TO_COME, "to_come = rewards.sum(dim=1, keepdim=True).expand_as(rewards)")],
    ),
    (
        "only its own",
        "Every token gets its own reward alone. What is still to come belongs to it too.",
        [(TO_COME, "to_come = rewards")],
    ),
    (
        "its own KL forgotten",
        "A token does not pay for its own KL, only for that of the tokens behind it.",
        [(TO_COME, TO_COME + "\n    to_come = to_come + kl_coef * kl")],
    ),
    (
        "KL rewarded",
        "The sign of the KL is wrong: it is a price.",
        [("mask, kl_coef)", "mask, -kl_coef)")],
    ),
    (
        "price ignored",
        "You ignore kl_coef.",
        [("mask, kl_coef)", "mask, 1.0)")],
    ),
    (
        "not whitened",
        "The advantages are not whitened.",
        [(WHITEN, "return to_come * mask")],
    ),
    (
        "mean kept",
        "You divide by the spread but keep the mean. Both belong to whitening here.",
        [(WHITEN, "return whiten(to_come, mask, shift_mean=False, eps=eps, group=group)")],
    ),
    (
        "whitened row by row",
        "You whiten every answer by itself: what is normalised away is the difference between "
        "good and bad answers.",
        [
            (
                WHITEN,
                "rows = [whiten(to_come[b : b + 1], mask[b : b + 1], eps=eps)"
                " for b in range(len(mask))]\n    return torch.cat(rows)",
            )
        ],
    ),
    (
        "pads in the mean",
        "Pads count as zeros in your mean and spread. Whiten with the mask.",
        [(WHITEN, "return whiten(to_come, torch.ones_like(mask), eps=eps, group=group) * mask")],
    ),
    (
        "Bessel",
        "You divide by n - 1. The population's variance is meant.",
        [
            (
                WHITEN,
                WHITEN.replace("eps=eps", "eps=eps")
                + " * ((mask.sum() - 1).clamp(min=1) / mask.sum()).sqrt()",
            )
        ],
    ),
    (
        "answers alike",
        "You take the mean over answers. Every token counts, so a long answer weighs more.",
        """
        rewards = token_rewards(scores, kl, mask, kl_coef)
        to_come = rewards.flip(1).cumsum(dim=1).flip(1)
        means = torch.where(mask, to_come, 0.0).sum(dim=1) / mask.sum(dim=1)
        centred = torch.where(mask, to_come - means.mean(), 0.0)
        spread = (centred.square().sum() / mask.sum() + eps).sqrt()
        return centred / spread
        """,
    ),
    (
        "eps ignored",
        "You ignore eps.",
        [("eps=eps, ", "")],
    ),
)

MUTANTS = [*DPO, *RLOO, *GRPO, *PLUS_PLUS]
