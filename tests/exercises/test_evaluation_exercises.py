"""Chapter 7's exercises: win rates, calibration, best of n."""

import itertools
import math
from statistics import NormalDist

import torch
from torch import tensor

from rlhf_course.coursework.expect import exercise, same

DOUBLE = torch.float64


def normal(rng, *shape):
    return torch.randn(*shape, generator=rng, dtype=DOUBLE)


# ---------------------------------------------------------------------------------------- win_rate


def rate(out):
    return float(out[0])


def bounds(out):
    return [float(out[1]), float(out[2])]


def counts(out):
    return [int(n) for n in out[3:6]]


def wilson(share, count, confidence=0.95):
    """The two p at which |share - p| = z √(p (1 - p) / count): the roots of a parabola."""
    z2 = NormalDist().inv_cdf((1 + confidence) / 2) ** 2
    a, b, c = 1 + z2 / count, -(2 * share + z2 / count), share**2
    root = math.sqrt(max(b * b - 4 * a * c, 0.0))
    return [max((-b - root) / (2 * a), 0.0), min((-b + root) / (2 * a), 1.0)]


GOLD_A, GOLD_B = tensor([1.0, 2.0, 3.0, 0.5, 0.0]), tensor([0.0, 2.0, 4.0, 0.25, -1.0])


@exercise("evaluation.win_rate", core=True)
def test_wins_alone(subject):
    """the rate is the share of prompts on which A is worth more"""
    same(subject.win_rate, ([1.0, 2.0, 0.0, 5.0], [0.0, 1.0, 1.0, 4.0]), 0.75, pick=rate)


@exercise("evaluation.win_rate", core=True)
def test_a_tie_counts_half(subject):
    """a tie counts half"""
    same(subject.win_rate, ([1.0, 2.0], [1.0, 2.0]), 0.5, pick=rate)
    same(subject.win_rate, (GOLD_A, GOLD_B), 0.7, pick=rate)


@exercise("evaluation.win_rate")
def test_counts(subject):
    """wins, ties and losses are counted"""
    a, b = [1.0, 2.0, 3.0, 0.5, 0.0, 0.0], [0.0, 2.0, 4.0, 0.25, -1.0, 1.0]
    same(subject.win_rate, (a, b), [3, 1, 2], pick=counts)


@exercise("evaluation.win_rate")
def test_interval(subject):
    """low and high are Wilson's, with the rate as the share of all prompts"""
    same(subject.win_rate, (GOLD_A, GOLD_B), wilson(0.7, 5), pick=bounds)
    same(subject.win_rate, ([1.0], [0.0]), wilson(1.0, 1), pick=bounds)


@exercise("evaluation.win_rate")
def test_confidence(subject):
    """less confidence gives a narrower interval"""
    same(subject.win_rate, (GOLD_A, GOLD_B, 0.5), wilson(0.7, 5, 0.5), pick=bounds)


@exercise("evaluation.win_rate")
def test_small_differences_win(subject):
    """a difference that float32 would not see is no tie"""
    same(subject.win_rate, ([1.0 + 1e-9], [1.0]), [1, 0, 0], pick=counts)
    same(subject.win_rate, ([-math.inf, 1.0], [0.0, math.inf]), [0, 0, 2], pick=counts)


@exercise("evaluation.win_rate")
def test_any_win_rate(subject, rng):
    """any worths, and the other way round"""
    for n in (1, 7, 60):
        a, b = (normal(rng, n).round(decimals=0) for _ in range(2))
        pairs = list(zip(a.tolist(), b.tolist(), strict=True))
        won, lost = sum(x > y for x, y in pairs), sum(x < y for x, y in pairs)
        share = (won + (n - won - lost) / 2) / n
        for args, expected in (((a, b), share), ((b.tolist(), a.tolist()), 1 - share)):
            same(subject.win_rate, args, expected, pick=rate)
            same(subject.win_rate, args, wilson(expected, n), pick=bounds)
        same(subject.win_rate, (a, b), [won, n - won - lost, lost], pick=counts)


# --------------------------------------------------------------------- expected_calibration_error


def calibration_by_loops(p, y, bins=10):
    """Bin by bin: its share of the predictions times |how often it happened - what was said|."""
    total = 0.0
    for b in range(bins):
        inside = [
            (said, happened) for said, happened in zip(p.tolist(), y.tolist(), strict=True)
            if b <= said * bins < b + 1 or (said == 1 and b == bins - 1)
        ]  # fmt: skip
        if inside:
            said, happened = (sum(column) / len(inside) for column in zip(*inside, strict=True))
            total += len(inside) / len(p) * abs(happened - said)
    return total


@exercise("evaluation.expected_calibration_error", core=True)
def test_one_bin(subject):
    """one bin: how far what was said is from what happened"""
    args = ([0.75, 0.75, 0.75, 0.75], [1, 0, 0, 0])
    same(subject.expected_calibration_error, args, 0.5)


@exercise("evaluation.expected_calibration_error", core=True)
def test_calibrated(subject):
    """what is right as often as it says has error 0"""
    args = ([0.75] * 4 + [0.25] * 4, [1, 1, 1, 0, 0, 0, 0, 1])
    same(subject.expected_calibration_error, args, 0.0)


@exercise("evaluation.expected_calibration_error", core=True)
def test_bins_weigh_by_their_size(subject):
    """a bin weighs by the share of the predictions in it"""
    args = ([0.75, 0.25, 0.25, 0.25], [0, 0, 0, 0])  # 1/4 of 0.75 and 3/4 of 0.25
    same(subject.expected_calibration_error, args, 0.375)


@exercise("evaluation.expected_calibration_error")
def test_bins_do_not_make_up_for_each_other(subject):
    """too sure in one bin and too unsure in another do not cancel"""
    args = ([0.75, 0.75, 0.25, 0.25], [0, 0, 1, 1])
    same(subject.expected_calibration_error, args, 0.75)


@exercise("evaluation.expected_calibration_error")
def test_errors_within_a_bin_cancel(subject):
    """within a bin they do: only its means are compared"""
    args = ([0.62, 0.68], [0, 1])  # mean 0.65, happened 0.5
    same(subject.expected_calibration_error, args, 0.15)


@exercise("evaluation.expected_calibration_error")
def test_number_of_bins(subject):
    """the number of bins is the one asked for"""
    args = ([0.05, 0.45, 0.55, 0.95], [1, 1, 0, 0])
    same(subject.expected_calibration_error, (*args, 1), 0.0)
    same(subject.expected_calibration_error, (*args, 2), 0.75)


@exercise("evaluation.expected_calibration_error")
def test_the_ends_of_the_scale(subject):
    """0 and 1 are predictions like others"""
    same(subject.expected_calibration_error, ([0.0, 1.0, 1.0, 1.0], [0, 1, 1, 0]), 0.25)


@exercise("evaluation.expected_calibration_error")
def test_any_calibration(subject, rng):
    """any predictions, as lists or tensors"""
    for n, bins in ((1, 10), (30, 10), (200, 7)):
        p = (torch.randint(0, 99, (n,), generator=rng, dtype=DOUBLE) + 0.5) / 99  # on no edge
        y = (torch.rand(n, generator=rng, dtype=DOUBLE) < p).double()
        expected = calibration_by_loops(p, y, bins)
        same(subject.expected_calibration_error, (p, y, bins), expected)
        same(subject.expected_calibration_error, (p.tolist(), y.tolist(), bins), expected)


# --------------------------------------------------------------------------------------- best_of_n


def best_by_enumeration(proxy, gold, n):
    """Every subset of n answers: the gold reward of its best by proxy, ties shared."""
    total = 0.0
    for proxies, golds in zip(proxy.tolist(), gold.tolist(), strict=True):
        subsets = list(itertools.combinations(range(len(proxies)), n))
        for subset in subsets:
            top = max(proxies[i] for i in subset)
            best = [golds[i] for i in subset if proxies[i] == top]
            total += sum(best) / len(best) / len(subsets)
    return tensor(total / len(proxy), dtype=DOUBLE)


PROXY, GOLD = tensor([[3.0, 1.0, 2.0]]), tensor([[10.0, 40.0, 70.0]])


@exercise("evaluation.best_of_n", core=True)
def test_best_of_one(subject):
    """the best of one is any of them: the mean of the gold rewards"""
    same(subject.best_of_n, (PROXY, GOLD, 1), tensor(40.0, dtype=DOUBLE), dtype=DOUBLE)


@exercise("evaluation.best_of_n", core=True)
def test_best_of_all(subject):
    """the best of all is the proxy's favourite, with its gold reward"""
    same(subject.best_of_n, (PROXY, GOLD, 3), tensor(10.0, dtype=DOUBLE))


@exercise("evaluation.best_of_n", core=True)
def test_best_of_two(subject):
    """the best of two of three: the favourite twice, the second once, in three subsets"""
    same(subject.best_of_n, (PROXY, GOLD, 2), tensor(30.0, dtype=DOUBLE))  # (10 + 10 + 70) / 3


@exercise("evaluation.best_of_n")
def test_ties(subject):
    """answers that the proxy cannot tell apart are chosen equally often"""
    proxy, gold = tensor([[1.0, 1.0, 0.0]]), tensor([[10.0, 40.0, 70.0]])
    same(subject.best_of_n, (proxy, gold, 3), tensor(25.0, dtype=DOUBLE))
    same(subject.best_of_n, (proxy, gold, 2), tensor(25.0, dtype=DOUBLE))
    same(subject.best_of_n, (proxy, gold, 1), tensor(40.0, dtype=DOUBLE))
    same(subject.best_of_n, (0 * proxy, gold, 2), tensor(40.0, dtype=DOUBLE))


@exercise("evaluation.best_of_n")
def test_every_prompt_by_itself(subject):
    """every prompt chooses among its own answers; then the mean over prompts"""
    proxy = tensor([[9.0, 8.0], [1.0, 2.0]])
    gold = tensor([[1.0, 2.0], [3.0, 6.0]])
    same(subject.best_of_n, (proxy, gold, 2), tensor(3.5, dtype=DOUBLE))


@exercise("evaluation.best_of_n")
def test_only_the_proxys_order_counts(subject, rng):
    """only the proxy's order counts, not how large its rewards are"""
    proxy, gold = normal(rng, 3, 6), normal(rng, 3, 6)
    expected = best_by_enumeration(proxy, gold, 3)
    same(subject.best_of_n, (proxy, gold, 3), expected)
    same(subject.best_of_n, (1000 * proxy - 7, gold, 3), expected)
    same(subject.best_of_n, (proxy.float(), gold.float(), 3), expected)


@exercise("evaluation.best_of_n")
def test_every_n(subject, rng):
    """every n, against an enumeration of all subsets, with and without ties"""
    for step in (1.0, 1e-9):
        proxy = (normal(rng, 2, 7) / step).round() * step
        gold = normal(rng, 2, 7)
        for n in range(1, 8):
            same(subject.best_of_n, (proxy, gold, n), best_by_enumeration(proxy, gold, n))


@exercise("evaluation.best_of_n")
def test_many_answers(subject, rng):
    """hundreds of answers: the numbers of subsets are too large for a float"""
    proxy, gold = normal(rng, 1, 300), normal(rng, 1, 300)
    order = proxy[0].argsort(descending=True)
    best, second = gold[0, order[0]], gold[0, order[1]]
    expected = best * 299 / 300 + second / 300  # one subset of 299 in 300 lacks the favourite
    same(subject.best_of_n, (proxy, gold, 299), expected)
