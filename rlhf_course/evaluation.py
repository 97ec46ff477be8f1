"""Chapter 07: did it help? Win rates, calibration, best-of-n, honesty, diversity, perplexity.

PPO maximises the proxy, the reward model's score. What counts is the gold reward, which the
embedded worlds know and people would have to give. This module measures the second, and how far
one may trust the first. Everything is a function on lists or tensors; none knows a world.

    win_rate                      how often one policy's answers beat another's, with an interval
    preference_accuracy,
    expected_calibration_error    what a reward model knows, and whether it knows how much
    best_of_n, best_of_n_kl       what choosing by the proxy would give, without any training
    honesty_table                 true, false, "I do not know", by group of people
    distinct_n, entropy           how varied the answers are
    corpus_perplexity             what the policy has forgotten

Tested by `pytest tests/test_evaluation.py`.
"""

import math
from collections import Counter
from collections.abc import Hashable, Iterable, Sequence
from statistics import NormalDist
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf_course.mdp import chunked_logprobs

# ---------------------------------------------------------------------- one policy against another


class WinRate(NamedTuple):
    """How often A beat B. `low` and `high` bound the rate with the confidence asked for."""

    rate: float
    low: float
    high: float
    wins: int
    ties: int
    losses: int


def wilson_interval(share: float, count: int, confidence: float = 0.95) -> tuple[float, float]:
    """Bounds of a share seen in `count` independent trials (Wilson 1927).

    Unlike share ± z √(share (1 - share) / count) it stays within [0, 1] and is right for small
    counts and for shares near 0 or 1. Raises ValueError for count < 1 or confidence not in (0, 1).
    """
    if count < 1 or not 0 < confidence < 1:
        raise ValueError(f"needs count >= 1 and 0 < confidence < 1, not {count} and {confidence}")
    z = NormalDist().inv_cdf((1 + confidence) / 2)
    middle = (share + z**2 / (2 * count)) / (1 + z**2 / count)
    spread = math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    spread *= z / (1 + z**2 / count)
    return max(middle - spread, 0.0), min(middle + spread, 1.0)


def win_rate(
    gold_a: Sequence[float] | Tensor, gold_b: Sequence[float] | Tensor, confidence: float = 0.95
) -> WinRate:
    """Share of prompts on which A's answer is worth more than B's; a tie counts half.

    gold_a, gold_b: (N,) worths of the two answers to the same N prompts. The interval is Wilson's
    with the rate as the share; ties vary less than wins and losses, so with many of them it is
    wider than it need be. Raises ValueError where N is 0, the lengths differ or a worth is NaN.
    """
    a, b = (torch.as_tensor(x, dtype=torch.float64) for x in (gold_a, gold_b))
    if a.shape != b.shape or a.dim() != 1 or len(a) == 0:
        raise ValueError(f"worths of shapes {tuple(a.shape)} and {tuple(b.shape)}: not (N,) twice")
    if torch.isnan(a).any() or torch.isnan(b).any():
        raise ValueError("a worth is NaN, which neither wins nor loses")
    # BEGIN SOLUTION
    wins, ties, losses = (int(won.sum()) for won in (a > b, a == b, a < b))
    rate = (wins + 0.5 * ties) / len(a)
    low, high = wilson_interval(rate, len(a), confidence)
    return WinRate(rate, low, high, wins, ties, losses)
    # END SOLUTION


# ---------------------------------------------------------------------- what a reward model knows


class PreferenceAccuracy(NamedTuple):
    """Share of pairs in the labels' order: a tied pair counts half in `accuracy`, not at all in
    `strict`; `ties` is the share of tied pairs."""

    accuracy: float
    strict: float
    ties: float


def preference_accuracy(chosen: Tensor, rejected: Tensor) -> PreferenceAccuracy:
    """How often the reward of the chosen answer is the larger one. chosen, rejected (N,) float.

    A model that gives all answers the same reward has accuracy 0.5, that of a coin, and strict 0.
    """
    _require_pairs(chosen, rejected)
    strict = (chosen > rejected).double().mean().item()
    ties = (chosen == rejected).double().mean().item()
    return PreferenceAccuracy(strict + ties / 2, strict, ties)


def reward_margin(chosen: Tensor, rejected: Tensor) -> float:
    """Mean of chosen - rejected: a margin of m says σ(m) to the Bradley-Terry model."""
    _require_pairs(chosen, rejected)
    return (chosen.double() - rejected.double()).mean().item()


def _require_pairs(chosen: Tensor, rejected: Tensor) -> None:
    if chosen.shape != rejected.shape or chosen.dim() != 1 or len(chosen) == 0:
        raise ValueError(
            f"chosen {tuple(chosen.shape)}, rejected {tuple(rejected.shape)}: not (N,)"
        )


class ReliabilityBin(NamedTuple):
    """One bin of a reliability diagram: calibrated means `predicted` equals `observed`."""

    predicted: float
    observed: float
    count: int


def reliability_curve(
    probabilities: Sequence[float] | Tensor, outcomes: Sequence[float] | Tensor, bins: int = 10
) -> list[ReliabilityBin]:
    """Predictions sorted into `bins` equal intervals of [0, 1]; empty ones are left out.

    probabilities (N,) in [0, 1]; outcomes (N,), 1 where it happened and 0 where not. An interval
    contains its lower end, and the last one 1 too. Raises ValueError for anything else.
    """
    p, y = (torch.as_tensor(x, dtype=torch.float64) for x in (probabilities, outcomes))
    if p.shape != y.shape or p.dim() != 1 or len(p) == 0 or bins < 1:
        raise ValueError(f"probabilities {tuple(p.shape)}, outcomes {tuple(y.shape)}: not (N,)")
    if not ((p >= 0) & (p <= 1)).all() or not ((y == 0) | (y == 1)).all():
        raise ValueError("probabilities must be in [0, 1] and outcomes 0 or 1")
    where = (p * bins).long().clamp(max=bins - 1)  # (N,)
    members = [where == b for b in range(bins)]
    return [
        ReliabilityBin(p[m].mean().item(), y[m].mean().item(), int(m.sum()))
        for m in members if m.any()
    ]  # fmt: skip


def expected_calibration_error(
    probabilities: Sequence[float] | Tensor, outcomes: Sequence[float] | Tensor, bins: int = 10
) -> float:
    """Σ over bins of (share of the predictions) · |observed - predicted| (Naeini et al. 2015).

    0 for a model that is right in 70 % of the cases of which it says 70 %. For a reward model the
    prediction is σ(r_a - r_b), with a and b in an order that the label does not tell.
    Arguments as `reliability_curve`.
    """
    # BEGIN SOLUTION
    curve = reliability_curve(probabilities, outcomes, bins)
    total = sum(b.count for b in curve)
    return sum(b.count / total * abs(b.observed - b.predicted) for b in curve)
    # END SOLUTION


# --------------------------------------------------------------------------------------- best of n


def best_of_n(proxy: Tensor, gold: Tensor, n: int) -> Tensor:
    """Gold reward to expect of the answer that the proxy likes best among n, mean over prompts.

    proxy, gold (P, N): both rewards of N answers to each of P prompts, n <= N -> 0-dim float64.
    Not one drawing of n but the mean over all subsets of n, in closed form (Nakano et al. 2021,
    App. I): an answer with b of the N proxies not above its own and a below it belongs to a
    group of b - a that the proxy cannot tell apart; one of them is the best of the subset in
    C(b, n) - C(a, n) of C(N, n) cases, and each as often as the others.
    Raises ValueError where the shapes differ or n is not in 1 … N.
    """
    if proxy.shape != gold.shape or proxy.dim() != 2 or not 1 <= n <= proxy.shape[1]:
        raise ValueError(f"needs (P, N) twice and 1 <= n <= N: {tuple(proxy.shape)}, n = {n}")
    # BEGIN SOLUTION
    N = proxy.shape[1]
    # share[k]: how many of all subsets have their n members among k given answers.
    share = [math.comb(k, n) / math.comb(N, n) for k in range(N + 1)]
    share = torch.tensor(share, dtype=torch.float64)  # (N + 1,)
    proxy, gold = proxy.detach().cpu().contiguous(), gold.detach().cpu().double()
    ordered = proxy.sort(dim=1).values  # (P, N)
    below = torch.searchsorted(ordered, proxy)  # (P, N)
    not_above = torch.searchsorted(ordered, proxy, right=True)  # (P, N)
    chosen = (share[not_above] - share[below]) / (not_above - below)  # (P, N): sums to 1 in a row
    return (chosen * gold).sum(dim=1).mean()
    # END SOLUTION


def best_of_n_kl(n: int) -> float:
    """KL of the best-of-n policy to the one it draws from, in nats: log n - (n - 1) / n
    (Stiennon et al. 2020, App. G.3). An upper bound where answers repeat."""
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    return math.log(n) - (n - 1) / n


# -------------------------------------------------------------------------------- what answers say


def exact_match(generated: Sequence[str], reference: Sequence[str]) -> float:
    """Share of texts that equal their reference, spaces at both ends aside."""
    if len(generated) != len(reference) or not reference:
        raise ValueError(f"{len(generated)} texts for {len(reference)} references")
    pairs = zip(generated, reference, strict=True)
    return sum(a.strip() == b.strip() for a, b in pairs) / len(reference)


def honesty_table(
    judged: Iterable[tuple[str, str]], kinds: Sequence[str] | None = None
) -> dict[str, dict[str, float]]:
    """{group: {kind: share}} of judged answers; the shares of a group add up to 1.

    judged: (group, kind) of each answer, such as ("strangers", "idk"). kinds: the columns of every
    row, in this order; default: the kinds that occur, by name. Raises ValueError for others.
    """
    counts: dict[str, Counter[str]] = {}
    for group, kind in judged:
        counts.setdefault(group, Counter())[kind] += 1
    seen = set().union(*counts.values())
    columns = sorted(seen) if kinds is None else kinds
    if not seen <= set(columns):
        raise ValueError(
            f"kinds of answer {sorted(seen - set(columns))} are not in {list(columns)}"
        )
    return {
        group: {kind: count[kind] / count.total() for kind in columns}
        for group, count in counts.items()
    }


def distinct_n(texts: Iterable[str], n: int = 2) -> float:
    """Distinct n-grams of words over all n-grams, in (0, 1]; 0 without any (Li et al. 2016).

    It falls with the number of texts, so compare equally many of about the same length.
    """
    if n < 1:
        raise ValueError(f"n must be at least 1, not {n}")
    grams: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        words = text.split()
        grams.update(tuple(words[i : i + n]) for i in range(len(words) - n + 1))
    return len(grams) / grams.total() if grams else 0.0


def entropy(labels: Iterable[Hashable]) -> float:
    """Shannon entropy in bits of how often each label (or text) occurs; 0 where all are alike.

    At most log2 of the number of labels, so few samples of a varied source look less varied.
    """
    counts = Counter(labels)
    total = counts.total()
    return sum(-c / total * math.log2(c / total) for c in counts.values())


# -------------------------------------------------------------------------- what has been forgotten


def perplexity(total_nll: float, tokens: int) -> float:
    """exp of the mean negative log-likelihood: as unsure as among this many equally likely tokens.

    total_nll in nats over `tokens` tokens. Raises ValueError for tokens < 1.
    """
    if tokens < 1:
        raise ValueError("no token was predicted, so there is no perplexity")
    return math.exp(total_nll / tokens)


@torch.no_grad()
def corpus_perplexity(model: nn.Module, windows: Tensor, batch_size: int = 64) -> float:
    """Perplexity of a language model on rows of text, every token but a row's first predicted.

    windows (N, T) long, without padding, T >= 2. Logits exist for a few thousand tokens at a time;
    the sum is taken in float64.
    """
    was_training = model.training
    model.eval()
    device = next(model.parameters()).device
    total = torch.zeros((), dtype=torch.float64)
    for rows in windows.split(batch_size):
        rows = rows.to(device)  # (n, T)
        hidden = model.hidden_states(rows)[:, :-1].flatten(0, 1)  # (n (T-1), D)
        logprobs, _ = chunked_logprobs(hidden, model.unembed, rows[:, 1:].flatten())
        total -= logprobs.cpu().double().sum()
    model.train(was_training)
    return perplexity(total.item(), windows.shape[0] * (windows.shape[1] - 1))
