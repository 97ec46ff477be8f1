"""Chapter 6's exercises: the pretraining term, running moments, PopArt, moments over ranks."""

import math

import torch
from drivers_ppo_ptx import deviations, merged, on_two_ranks, rescaled, same_parameters
from torch import tensor

from rlhf_course.coursework.expect import agrees, equal, exercise, raises, same

NAN = float("nan")
DOUBLE = torch.float64


def normal(rng, *shape, dtype=DOUBLE):
    return torch.randn(*shape, generator=rng, dtype=dtype)


def some(rng, *shape, share=0.6):
    """A mask with about this share of True, and at least one."""
    mask = torch.rand(*shape, generator=rng) < share
    mask.view(-1)[0] = True
    return mask


# --------------------------------------------------------------------------------------- ptx_loss

T, F = True, False
NLL = tensor([[2.0, 1.0, 3.0], [4.0, 9.0, 9.0]])
VALID = tensor([[T, T, T], [T, F, F]])


def ptx_by_loops(nll, mask, reduction="token_mean", denominator=None):
    """Sums of valid entries, divided by tokens or by rows that have one."""
    total = torch.zeros((), dtype=DOUBLE)
    tokens = rows = 0
    for row, wanted in zip(nll, mask.tolist(), strict=True):
        rows += any(wanted)
        for x, valid in zip(row, wanted, strict=True):
            if valid:
                total, tokens = total + x, tokens + 1
    count = tokens if reduction == "token_mean" else rows
    return total / (count if denominator is None else denominator)


@exercise("ppo_ptx.ptx_loss", core=True)
def test_token_mean(subject):
    """token_mean: the mean over all valid tokens, whatever row they stand in"""
    same(subject.ptx_loss, (tensor([[1.0, 2.0]]), tensor([[T, T]])), tensor(1.5))
    same(subject.ptx_loss, (NLL, VALID), tensor(2.5))


@exercise("ppo_ptx.ptx_loss", core=True)
def test_seq_sum(subject):
    """seq_sum: the mean over rows of a row's sum"""
    same(subject.ptx_loss, (NLL, VALID, "seq_sum"), tensor(5.0))


@exercise("ppo_ptx.ptx_loss")
def test_ptx_pads(subject):
    """what stands outside the mask changes nothing, NaN included"""
    nll = tensor([[2.0, 1.0, NAN], [4.0, NAN, NAN]])
    mask = tensor([[T, T, F], [T, F, F]])
    agrees(subject.ptx_loss, ptx_by_loops, (nll, mask), wrt=(0,))
    agrees(subject.ptx_loss, ptx_by_loops, (nll, mask, "seq_sum"), wrt=(0,))


@exercise("ppo_ptx.ptx_loss")
def test_ptx_empty_rows(subject):
    """a row without any token does not count"""
    mask = tensor([[T, T, F], [F, F, F]])
    same(subject.ptx_loss, (NLL, mask, "seq_sum"), tensor(3.0))
    same(subject.ptx_loss, (NLL, mask), tensor(1.5))


@exercise("ppo_ptx.ptx_loss")
def test_ptx_denominator(subject):
    """with a denominator the micro-batches of a step add up"""
    same(subject.ptx_loss, (NLL, VALID), tensor(1.0), {"denominator": 10})
    same(subject.ptx_loss, (NLL, VALID, "seq_sum"), tensor(2.0), {"denominator": tensor(5.0)})


@exercise("ppo_ptx.ptx_loss")
def test_ptx_golden(subject, golden):
    """the numbers of the reference"""
    case = golden("G10")
    nll, mask = case.inputs["nll"], case.inputs["mask"].bool()
    same(subject.ptx_loss, (nll, mask), case.expected["ptx_token_mean"])
    same(subject.ptx_loss, (nll, mask, "seq_sum"), case.expected["ptx_seq_sum_mean"])


@exercise("ppo_ptx.ptx_loss")
def test_ptx_gradient(subject, rng):
    """value and gradient on random rows"""
    for shape in ((1, 1), (2, 3), (5, 7)):
        nll, mask = normal(rng, *shape, dtype=torch.float32).abs(), some(rng, *shape)
        for reduction in ("token_mean", "seq_sum"):
            agrees(subject.ptx_loss, ptx_by_loops, (nll, mask, reduction), wrt=(0,))


@exercise("ppo_ptx.ptx_loss")
def test_ptx_unknown_reduction(subject):
    """another reduction is refused"""
    raises(subject.ptx_loss, (NLL, VALID, "mean_of_means"))


# ---------------------------------------------------------------------------------- RunningMoments


def seen(*batches):
    """The count, mean and population variance of everything seen, after each batch."""
    everything, trace = [], []
    for batch in batches:
        everything += batch.tolist()
        mean = math.fsum(everything) / len(everything)
        var = math.fsum((x - mean) ** 2 for x in everything) / len(everything)
        trace.append([float(len(everything)), mean, var])
    return trace


def merges(subject, *batches, rtol=1e-6):
    inputs = {"batches": list(batches)}
    what = "other (count, mean, var) after each batch than those of all that was seen"
    equal(subject.drive(merged, list(batches)), seen(*batches), what, inputs, rtol, 1e-9)


@exercise("ppo_ptx.RunningMoments.update", core=True)
def test_first_batch(subject):
    """after the first batch they are that batch's own"""
    merges(subject, tensor([1.0, 3.0]))


@exercise("ppo_ptx.RunningMoments.update", core=True)
def test_second_batch(subject):
    """after the second they are those of all values together"""
    merges(subject, tensor([0.0, 2.0]), tensor([4.0, 6.0]))


@exercise("ppo_ptx.RunningMoments.update")
def test_unequal_batches(subject):
    """a batch counts by its size"""
    merges(subject, tensor([0.0]), tensor([3.0, 3.0]))
    merges(subject, tensor([0.0, 1.0, 2.0, 5.0]), tensor([10.0]))


@exercise("ppo_ptx.RunningMoments.update")
def test_moments_golden(subject, golden):
    """the numbers of the reference"""
    case = golden("G12")
    batches = [
        torch.cat([torch.as_tensor(part, dtype=DOUBLE) for part in parts])
        for parts in case.inputs["batches"]
    ]
    expected = [[s["count"], s["mean"], s["var_population"]] for s in case.expected["trace"]]
    equal(subject.drive(merged, batches), expected, inputs={"batches": batches})


@exercise("ppo_ptx.RunningMoments.update")
def test_many_batches(subject, rng):
    """many batches of any size, in any order, are as one"""
    x = 3 * normal(rng, 30) - 7
    for sizes in ([30], [1, 29], [13, 1, 16], [1] * 30):
        merges(subject, *x.split(sizes))
    merges(subject, *reversed(x.split([13, 1, 16])))


@exercise("ppo_ptx.RunningMoments.update")
def test_moments_far_from_zero(subject, rng):
    """they keep their digits far from 0"""
    x = normal(rng, 40) + 1e7
    merges(subject, *x.split(10), rtol=1e-5)


@exercise("ppo_ptx.RunningMoments.update")
def test_moments_in_use(subject):
    """a reward is divided by the standard deviation of all that was seen"""
    batches = [tensor([1.0, 2.0], dtype=DOUBLE), tensor([6.0], dtype=DOUBLE)]
    std = math.sqrt(7)  # (4 + 1 + 9) / 2
    expected = (std, tensor([1 / std], dtype=DOUBLE))
    equal(subject.drive(deviations, batches), expected, "another std", {"batches": batches})


# ------------------------------------------------------------------------------------------ PopArt

WEIGHT = tensor([0.4, -0.2], dtype=DOUBLE)
HIDDEN = tensor([[1.0, 0.5], [-0.3, 2.0], [0.0, 1.0]], dtype=DOUBLE)
RETURNS = tensor([[5.0, 1.0], [3.0, 7.0]], dtype=DOUBLE)  # mean 4, population variance 5
ALL = tensor([[T, T], [T, T]])


def popart_inputs(rollouts):
    return {"weight": WEIGHT, "bias": 0.1, "rollouts": rollouts}


@exercise("ppo_ptx.PopArt.update", core=True)
def test_popart_moments(subject):
    """mean and standard deviation become those of the targets"""
    rollouts = [(RETURNS, ALL)]
    out = subject.drive(rescaled, WEIGHT, 0.1, rollouts, HIDDEN)
    expected = {"mean": 4.0, "std": math.sqrt(5)}
    equal(out, expected, "other moments", popart_inputs(rollouts))


@exercise("ppo_ptx.PopArt.update", core=True)
def test_popart_values(subject):
    """what the critic says of any state stays as it was"""
    rollouts = [(RETURNS, ALL)]
    out = subject.drive(rescaled, WEIGHT, 0.1, rollouts, HIDDEN)
    what = "the critic's values have changed"
    equal(out["after"], out["before"], what, popart_inputs(rollouts))


@exercise("ppo_ptx.PopArt.update")
def test_popart_head(subject, golden):
    """the head's weight and bias are rescaled to the reference's numbers"""
    case = golden("G17")
    targets = case.inputs["new_targets"][None]
    rollouts = [(targets, torch.ones_like(targets, dtype=torch.bool))]
    args = case.inputs["w"], case.inputs["b"], rollouts, case.inputs["hidden"]
    out = subject.drive(rescaled, *args)
    expected = {"weight": case.expected["w_new"], "bias": tensor(case.expected["b_new"])}
    inputs = {"weight": case.inputs["w"], "bias": case.inputs["b"], "rollouts": rollouts}
    equal(out, expected, "another head", inputs)


@exercise("ppo_ptx.PopArt.update")
def test_popart_again(subject, rng):
    """a second rollout rescales from the moments that were, not from 0 and 1"""
    by_hand = [(RETURNS, ALL), (10 * RETURNS - 3, ALL), (RETURNS / 4, ALL)]
    drawn = [(3 * normal(rng, 2, 2) + shift, ALL) for shift in (1, -2, 4)]
    for rollouts in (by_hand, drawn):
        out = subject.drive(rescaled, WEIGHT, 0.1, rollouts, HIDDEN)
        targets = torch.stack([targets for targets, _ in rollouts])
        mean, std = targets.mean(), targets.std(correction=0)
        head = {"weight": WEIGHT / std, "bias": (0.1 - mean) / std}
        expected = {"mean": mean, "std": std, **head, "after": out["before"]}
        equal(out, expected, inputs=popart_inputs(rollouts))


@exercise("ppo_ptx.PopArt.update")
def test_popart_pads(subject):
    """targets outside the mask do not count, NaN included"""
    mask = tensor([[T, F], [T, T]])
    targets = torch.where(mask, RETURNS, NAN)
    out = subject.drive(rescaled, WEIGHT, 0.1, [(targets, mask)], HIDDEN)
    expected = {"mean": 5.0, "std": math.sqrt(8 / 3), "after": out["before"]}
    equal(out, expected, inputs=popart_inputs([(targets, mask)]))


@exercise("ppo_ptx.PopArt.update")
def test_popart_equal_targets(subject):
    """equal targets have no spread: the mean moves, the scale stays 1"""
    rollouts = [(torch.full((2, 2), 3.0, dtype=DOUBLE), ALL)]
    out = subject.drive(rescaled, WEIGHT, 0.1, rollouts, HIDDEN)
    expected = {"mean": 3.0, "std": 1.0, "weight": WEIGHT, "bias": tensor(-2.9)}
    equal(out, expected, inputs=popart_inputs(rollouts))


@exercise("ppo_ptx.PopArt.update")
def test_popart_in_place(subject):
    """the head is changed in place: the optimiser keeps the parameters that it knows"""
    kept = subject.drive(same_parameters, WEIGHT, RETURNS, ALL)
    equal(kept, (True, True), "the head's parameters are others, or are not trained any more")


# ---------------------------------------------------------------------------------- masked_moments


def moments_by_loops(x, mask):
    """(mean, population variance, count), all 0 without any valid entry."""
    values = [v for row, m in zip(x, mask, strict=True) for v in row[m].tolist()]
    if not values:
        return [tensor(0.0, dtype=DOUBLE)] * 3
    mean = math.fsum(values) / len(values)
    variance = math.fsum((v - mean) ** 2 for v in values) / len(values)
    return [tensor(v, dtype=DOUBLE) for v in (mean, variance, float(len(values)))]


def over_ranks(subject, first, second, what="not the moments of all ranks together", rtol=1e-6):
    """Both ranks give the moments of everything; each part is (x, mask)."""
    x, mask = ([part[i].reshape(1, -1) for part in (first, second)] for i in (0, 1))
    expected = moments_by_loops(torch.cat(x, dim=1).double(), torch.cat(mask, dim=1))
    inputs = {"x on rank 0": first[0], "mask on rank 0": first[1],
              "x on rank 1": second[0], "mask on rank 1": second[1]}  # fmt: skip
    got = subject.drive(on_two_ranks, first, second)
    equal(got, [expected, expected], what, inputs, rtol, 1e-9)


@exercise("ppo_ptx.masked_moments", core=True)
def test_moments_by_hand(subject):
    """mean, population variance and count of the valid entries"""
    args = (tensor([[1.0, 3.0, 9.0], [5.0, 9.0, 9.0]]), tensor([[T, T, F], [T, F, F]]))
    expected = [tensor(v, dtype=DOUBLE) for v in (3.0, 8 / 3, 3.0)]
    same(subject.masked_moments, args, expected, dtype=DOUBLE)


@exercise("ppo_ptx.masked_moments", core=True)
def test_two_ranks(subject):
    """two ranks: both get the moments of all values together"""
    first = tensor([[1.0, 3.0]]), tensor([[T, T]])
    second = tensor([[5.0, 7.0]]), tensor([[T, T]])
    over_ranks(subject, first, second)


@exercise("ppo_ptx.masked_moments")
def test_ranks_of_unequal_size(subject):
    """ranks with unequal counts and shapes: every value counts the same"""
    first = tensor([[0.0, 2.0, 4.0], [6.0, 9.0, 9.0]]), tensor([[T, T, T], [T, F, F]])
    second = tensor([[10.0]]), tensor([[T]])
    over_ranks(subject, first, second)


@exercise("ppo_ptx.masked_moments")
def test_an_empty_rank_takes_part(subject):
    """a rank without any valid entry calls all the same"""
    first = tensor([[1.0, 5.0]]), tensor([[F, F]])
    second = tensor([[2.0, 4.0]]), tensor([[T, T]])
    over_ranks(subject, first, second)


@exercise("ppo_ptx.masked_moments")
def test_moments_and_pads(subject):
    """what stands outside the mask changes nothing, NaN included"""
    args = (tensor([[1.0, NAN], [3.0, math.inf]]), tensor([[T, F], [T, F]]))
    expected = [tensor(v, dtype=DOUBLE) for v in (2.0, 1.0, 2.0)]
    same(subject.masked_moments, args, expected)


@exercise("ppo_ptx.masked_moments")
def test_one_value_and_none(subject):
    """one value has variance 0, and nothing at all gives 0, 0, 0"""
    zero, one = tensor(0.0, dtype=DOUBLE), tensor(1.0, dtype=DOUBLE)
    same(subject.masked_moments, (tensor([[4.0]]), tensor([[T]])), [4 * one, zero, one])
    same(subject.masked_moments, (tensor([[4.0]]), tensor([[F]])), [zero, zero, zero])


@exercise("ppo_ptx.masked_moments")
def test_variance_far_from_zero(subject):
    """the variance keeps its digits far from 0"""
    x = tensor([[0.0, 1.0, 2.0]], dtype=DOUBLE) + 1e9
    expected = [tensor(v, dtype=DOUBLE) for v in (1e9 + 1, 2 / 3, 3.0)]
    same(subject.masked_moments, (x, tensor([[T, T, T]])), expected)


@exercise("ppo_ptx.masked_moments")
def test_any_moments(subject, rng):
    """any values, alone and over two ranks"""
    for shape in ((1, 1), (3, 4)):
        x, mask = normal(rng, *shape, dtype=torch.float32) + 2, some(rng, *shape)
        same(subject.masked_moments, (x, mask), moments_by_loops(x.double(), mask))
    parts = [(normal(rng, *s) * 3, some(rng, *s)) for s in ((2, 5), (4, 3))]
    over_ranks(subject, *parts)
