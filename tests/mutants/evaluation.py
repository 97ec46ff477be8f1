"""Wrong answers to chapter 7's exercises, each with the sentence that names its mistake."""

from rlhf_course.coursework.mutants import Mutant


def mutants(exercise, *rows):
    """Mutants of one exercise, from (name, says, edits or body)."""
    made = []
    for name, says, change in rows:
        kind = "body" if isinstance(change, str) else "edits"
        made.append(Mutant(exercise, name, says=says, **{kind: change}))
    return made


RATE = "rate = (wins + 0.5 * ties) / len(a)"
BOUNDS = "low, high = wilson_interval(rate, len(a), confidence)"

WIN_RATE = mutants(
    "evaluation.win_rate",
    (
        "ties lost",
        "You count a tie as a loss. It counts half.",
        [(RATE, "rate = wins / len(a)")],
    ),
    (
        "ties won",
        "You count a tie as a win. It counts half.",
        [(RATE, "rate = (wins + ties) / len(a)")],
    ),
    (
        "ties left out",
        "You leave the tied prompts out. They count half a win each, among all prompts.",
        [(RATE, "rate = wins / max(wins + losses, 1)")],
    ),
    (
        "sides swapped",
        "That is B's win rate. A wins where its answer is worth more.",
        [("(a > b, a == b, a < b)", "(a < b, a == b, a > b)")],
    ),
    (
        "fixed confidence",
        "Your interval has 95 % whatever is asked for: hand `confidence` on.",
        [("len(a), confidence)", "len(a))")],
    ),
    (
        "ties out of the interval",
        "Your interval counts only the decided prompts as trials. All of them are.",
        [(BOUNDS, "low, high = wilson_interval(rate, max(wins + losses, 1), confidence)")],
    ),
    (
        "interval of the wins",
        "Your interval is about the share of wins. It is to be about the rate, ties counted half.",
        [(BOUNDS, "low, high = wilson_interval(wins / len(a), len(a), confidence)")],
    ),
    (
        "normal approximation",
        "Your interval is rate ± z √(rate (1 - rate) / n), which is wrong for few prompts and for "
        "rates near 0 or 1. Wilson's is asked for.",
        [
            (
                BOUNDS,
                "import math\n    from statistics import NormalDist\n\n"
                "    z = NormalDist().inv_cdf((1 + confidence) / 2)\n"
                "    spread = z * math.sqrt(rate * (1 - rate) / len(a))\n"
                "    low, high = max(rate - spread, 0.0), min(rate + spread, 1.0)",
            )
        ],
    ),
    (
        "close is a tie",
        "You call answers of nearly equal worth a tie. Only equal ones are.",
        [
            (
                "(a > b, a == b, a < b)",
                "(a.float() > b.float(), a.float() == b.float(), a.float() < b.float())",
            )
        ],
    ),
    (
        "counts in another order",
        "wins, ties and losses come back in another order than the docstring's.",
        [("rate, low, high, wins, ties, losses", "rate, low, high, wins, losses, ties")],
    ),
)

SUM = "return sum(b.count / total * abs(b.observed - b.predicted) for b in curve)"

CALIBRATION = mutants(
    "evaluation.expected_calibration_error",
    (
        "bins alike",
        "You give all bins the same weight. A bin weighs by its share of the predictions.",
        [(SUM, "return sum(abs(b.observed - b.predicted) for b in curve) / len(curve)")],
    ),
    (
        "divided by the bins",
        "You divide by the number of bins, the empty ones included. Weigh by the predictions.",
        [(SUM, "return sum(abs(b.observed - b.predicted) for b in curve) / bins")],
    ),
    (
        "signed",
        "You add up signed differences: being too sure here makes up for being too unsure there. "
        "Take the distance in each bin.",
        [("abs(b.observed - b.predicted)", "(b.predicted - b.observed)")],
    ),
    (
        "sign at the end",
        "You compare the means of everything, or take the absolute value last: being too sure "
        "here makes up for being too unsure there. The distance is taken in each bin.",
        [(SUM, "return abs(sum(b.count / total * (b.observed - b.predicted) for b in curve))")],
    ),
    (
        "squared",
        "You square the differences. Their absolute value is asked for.",
        [("abs(b.observed - b.predicted)", "(b.observed - b.predicted) ** 2")],
    ),
    (
        "largest",
        "You return the largest difference of any bin. The mean over the predictions is asked for.",
        [(SUM, "return max(abs(b.observed - b.predicted) for b in curve)")],
    ),
    (
        "bins ignored",
        "You always use ten bins: hand `bins` on.",
        [("outcomes, bins)", "outcomes)")],
    ),
    (
        "no bins",
        "You compare every prediction with its own outcome. What is compared are a bin's means.",
        """
        import torch

        p, y = (torch.as_tensor(x, dtype=torch.float64) for x in (probabilities, outcomes))
        return (p - y).abs().mean().item()
        """,
    ),
    (
        "weights not shares",
        "You weigh by the counts and forget to divide by the number of predictions.",
        [("b.count / total *", "b.count *")],
    ),
)

CHOSEN = "chosen = (share[not_above] - share[below]) / (not_above - below)"

BEST_OF_N = mutants(
    "evaluation.best_of_n",
    (
        "with replacement",
        "You draw with replacement: (b/N)ⁿ instead of C(b, n) / C(N, n). The n answers of a "
        "subset are different ones.",
        [("math.comb(k, n) / math.comb(N, n)", "(k / N) ** n")],
    ),
    (
        "first of the tied",
        "Of answers that the proxy cannot tell apart you always take the same one. Each is chosen "
        "equally often.",
        """
        N = proxy.shape[1]
        share = [math.comb(k, n) / math.comb(N, n) for k in range(N + 1)]
        share = torch.tensor(share, dtype=torch.float64)
        order = proxy.detach().argsort(dim=1, stable=True)
        sorted_gold = gold.detach().double().gather(1, order)
        return (sorted_gold * (share[1:] - share[:-1])).sum(dim=1).mean()
        """,
    ),
    (
        "ties counted twice",
        "Each answer of a tied group gets the chance of the whole group. Divide it among them.",
        [(CHOSEN, "chosen = share[not_above] - share[below]")],
    ),
    (
        "proxy returned",
        "You return the proxy's reward of the chosen answer. The gold one is asked for: that is "
        "what choosing by the proxy is worth.",
        [("(chosen * gold)", "(chosen * proxy.double())")],
    ),
    (
        "chosen by gold",
        "You choose by the gold reward. Only the proxy is known when an answer is chosen.",
        [
            (
                "ordered = proxy.sort(dim=1).values",
                "proxy = gold\n    ordered = proxy.sort(dim=1).values",
            ),
        ],
    ),
    (
        "worst of n",
        "You choose the answer that the proxy likes least.",
        [("proxy, gold = proxy.detach()", "proxy, gold = -proxy.detach()")],
    ),
    (
        "one drawing",
        "You take the first n answers. The mean over all subsets of n is asked for.",
        """
        first = proxy[:, :n].argmax(dim=1, keepdim=True)
        return gold.double().gather(1, first).mean()
        """,
    ),
    (
        "sum over prompts",
        "You add the prompts up. Their mean is asked for.",
        [(".sum(dim=1).mean()", ".sum()")],
    ),
    (
        "prompts pooled",
        "You let all prompts' answers compete with each other. Each prompt chooses among its own.",
        [
            (
                "N = proxy.shape[1]",
                "N = proxy.numel()\n    proxy, gold = proxy.view(1, -1), gold.view(1, -1)",
            ),
        ],
    ),
    (
        "one subset too few",
        "You count the subsets of n - 1 answers. A subset has n members, the chosen one included.",
        [("math.comb(k, n) / math.comb(N, n)", "math.comb(k, n - 1) / math.comb(N, n - 1)")],
    ),
    (
        "factorials as floats",
        "Factorials as floats are infinite from 171! on. `math.comb` counts with whole numbers.",
        [
            (
                "share = [math.comb(k, n) / math.comb(N, n) for k in range(N + 1)]",
                "def factorial(k):\n"
                "        return torch.arange(1, k + 1, dtype=torch.float64).prod()\n\n"
                "    whole = factorial(N) / factorial(n) / factorial(N - n)\n"
                "    share = [\n"
                "        (factorial(k) / factorial(n) / factorial(k - n) / whole).item()\n"
                "        if k >= n else 0.0\n"
                "        for k in range(N + 1)\n"
                "    ]",
            )
        ],
    ),
)

MUTANTS = [*WIN_RATE, *CALIBRATION, *BEST_OF_N]
