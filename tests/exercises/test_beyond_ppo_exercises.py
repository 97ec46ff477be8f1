"""Chapter 8's exercises: DPO's loss, and advantages without a critic."""

import math

import torch
from torch import tensor

from rlhf_course.coursework.expect import agrees, equal, exercise, expect, gradients, same

NAN = float("nan")
DOUBLE = torch.float64
T, F = True, False


def normal(rng, *shape, scale=1.0, dtype=torch.float32):
    return (scale * torch.randn(*shape, generator=rng, dtype=DOUBLE)).to(dtype)


# ---------------------------------------------------------------------------------------- dpo_loss


def loss_of(out):
    return out[0]


def stats_of(out):
    return out[1]


def dpo_by_loops(chosen, rejected, ref_chosen, ref_rejected, beta=0.1, denominator=None):
    """log(1 + exp(-margin)), pair by pair."""
    total = torch.zeros((), dtype=DOUBLE)
    for w, l, rw, rl in zip(chosen, rejected, ref_chosen, ref_rejected, strict=True):  # noqa: E741
        margin = beta * ((w - l) - (rw.detach() - rl.detach()))
        total = total + torch.log1p(torch.exp(-margin))
    return total / (len(chosen) if denominator is None else denominator)


def four(rng, n, scale=3.0):
    """Log-probabilities of n pairs, around -10: policy's and reference's."""
    return tuple(normal(rng, n, scale=scale) - 10 for _ in range(4))


# Log-ratios ln 4 and 0: at beta = 0.5 the margin is ln 2, and sigma of it 2/3.
LN4 = math.log(4)
PAIR = tensor([-1.0]), tensor([-2.0]), tensor([-1.0 - LN4]), tensor([-2.0])


@exercise("beyond_ppo.dpo_loss", core=True)
def test_at_the_reference(subject):
    """while policy and reference are one, every pair costs log 2"""
    args = (tensor([-1.0]), tensor([-5.0]), tensor([-1.0]), tensor([-5.0]))
    same(subject.dpo_loss, args, tensor(math.log(2)), pick=loss_of)


@exercise("beyond_ppo.dpo_loss", core=True)
def test_one_pair(subject):
    """one pair: -log sigma of beta times the difference of the log-ratios"""
    same(subject.dpo_loss, PAIR, tensor(math.log(1.5)), {"beta": 0.5}, pick=loss_of)
    same(subject.dpo_loss, PAIR, tensor(math.log(1 + 4**-0.1)), pick=loss_of)


@exercise("beyond_ppo.dpo_loss")
def test_mean_over_pairs(subject):
    """the mean over pairs; a denominator takes the place of their number"""
    pairs = tuple(torch.cat([x, torch.zeros(1)]) for x in PAIR)
    both = math.log(1.5) + math.log(2)
    same(subject.dpo_loss, pairs, tensor(both / 2), {"beta": 0.5}, pick=loss_of)
    whole = {"beta": 0.5, "denominator": 8}
    same(subject.dpo_loss, pairs, tensor(both / 8), whole, pick=loss_of)


@exercise("beyond_ppo.dpo_loss")
def test_dpo_stats(subject):
    """the implicit rewards, their margin, and how often it is positive"""
    expected = {"reward_chosen": tensor(math.log(2)), "reward_rejected": tensor(0.0),
                "margin": tensor(math.log(2)), "accuracy": tensor(1.0)}  # fmt: skip
    same(subject.dpo_loss, PAIR, expected, {"beta": 0.5}, pick=stats_of)
    chosen = tensor([-1.0, -2.0, -3.0, -4.0])
    rejected = tensor([-2.0, -2.0, -2.0, -2.0])  # won, tied, lost, lost
    zero = torch.zeros(4)
    expected = {"reward_chosen": tensor(-2.5), "reward_rejected": tensor(-2.0),
                "margin": tensor(-0.5), "accuracy": tensor(0.375)}  # fmt: skip
    same(subject.dpo_loss, (chosen, rejected, zero, zero), expected, {"beta": 1.0}, pick=stats_of)


@exercise("beyond_ppo.dpo_loss")
def test_dpo_stats_add_up(subject):
    """the statistics are divided by the same denominator, and are detached"""
    expected = {"reward_chosen": tensor(math.log(2) / 4), "reward_rejected": tensor(0.0),
                "margin": tensor(math.log(2) / 4), "accuracy": tensor(0.25)}  # fmt: skip
    same(subject.dpo_loss, PAIR, expected, {"beta": 0.5, "denominator": 4}, pick=stats_of)
    leaves = [x.clone().requires_grad_() for x in PAIR]
    attached = [name for name, x in subject.dpo_loss(*leaves)[1].items() if x.requires_grad]
    expect(not attached, "a statistic carries a gradient", {}, "none", attached)


@exercise("beyond_ppo.dpo_loss")
def test_the_reference_is_constant(subject):
    """the reference gets no gradient, the policy does"""
    agrees(subject.dpo_loss, dpo_by_loops, PAIR, wrt=(0, 1), pick=loss_of)
    _, found = gradients(subject.dpo_loss, PAIR, wrt=(2, 3), pick=loss_of)
    zero = [torch.zeros(1), torch.zeros(1)]
    equal(found, zero, "the reference's log-probs got a gradient")


@exercise("beyond_ppo.dpo_loss")
def test_dpo_on_any_pairs(subject, rng):
    """value and gradient on any pairs"""
    for n in (1, 2, 9):
        for beta in (0.1, 1.0):
            args = (*four(rng, n), beta)
            agrees(subject.dpo_loss, dpo_by_loops, args, wrt=(0, 1), pick=loss_of)


@exercise("beyond_ppo.dpo_loss")
def test_dpo_far_away(subject):
    """a pair that is far off costs much, but never infinity"""
    args = (tensor([-1000.0, 1000.0]), torch.zeros(2), torch.zeros(2), torch.zeros(2))
    same(subject.dpo_loss, args, tensor(500.0), {"beta": 1.0}, pick=loss_of)
    _, (grad,) = gradients(subject.dpo_loss, args, {"beta": 1.0}, pick=loss_of)
    expect(torch.isfinite(grad).all(), "the gradient is not finite", {}, "finite", grad)
    expect(float(grad[0]) != 0, "the pair that is wrong teaches nothing", {}, "a gradient", grad)


# ----------------------------------------------------------------------------- rloo_advantages


def rloo_by_loops(rewards):
    """Each reward minus the mean of the others in its row."""
    out = torch.zeros(rewards.shape, dtype=DOUBLE)
    for n, row in enumerate(rewards.tolist()):
        for g, reward in enumerate(row):
            others = row[:g] + row[g + 1 :]
            out[n, g] = reward - math.fsum(others) / len(others)
    return out


@exercise("beyond_ppo.rloo_advantages", core=True)
def test_rloo_of_two(subject):
    """of two answers each is the other's baseline"""
    same(subject.rloo_advantages, (tensor([[1.0, 4.0]]),), tensor([[-3.0, 3.0]]))


@exercise("beyond_ppo.rloo_advantages", core=True)
def test_rloo_of_three(subject):
    """the baseline is the mean of the others, the own reward is not in it"""
    same(subject.rloo_advantages, (tensor([[1.0, 2.0, 6.0]]),), tensor([[-3.0, -1.5, 4.5]]))


@exercise("beyond_ppo.rloo_advantages")
def test_rloo_prompts(subject):
    """every prompt has its own baseline"""
    rewards = tensor([[1.0, 4.0], [10.0, 10.0], [-5.0, -7.0]])
    same(subject.rloo_advantages, (rewards,), tensor([[-3.0, 3.0], [0.0, 0.0], [2.0, -2.0]]))


@exercise("beyond_ppo.rloo_advantages")
def test_rloo_golden(subject, golden):
    """the numbers of the reference"""
    case = golden("G12")
    same(subject.rloo_advantages, (case.inputs["groups"],), case.expected["rloo"])


@exercise("beyond_ppo.rloo_advantages")
def test_rloo_scale(subject):
    """not divided by anything: rewards ten times as large give advantages ten times as large"""
    same(subject.rloo_advantages, (tensor([[10.0, 20.0, 60.0]]),), tensor([[-30.0, -15.0, 45.0]]))


@exercise("beyond_ppo.rloo_advantages")
def test_any_rloo(subject, rng):
    """any prompts and groups"""
    for shape in ((1, 2), (3, 4), (5, 8)):
        rewards = normal(rng, *shape, scale=2.0) + 1
        same(subject.rloo_advantages, (rewards,), rloo_by_loops(rewards).float(), atol=1e-5)


# ----------------------------------------------------------------------------- grpo_advantages


def grpo_by_loops(rewards, eps=1e-9):
    """(r - mean) / (std + eps) of its row, with n - 1 in the variance."""
    out = torch.zeros(rewards.shape, dtype=DOUBLE)
    for n, row in enumerate(rewards.tolist()):
        mean = math.fsum(row) / len(row)
        variance = math.fsum((r - mean) ** 2 for r in row) / (len(row) - 1)
        for g, reward in enumerate(row):
            out[n, g] = (reward - mean) / (math.sqrt(variance) + eps)
    return out


HALF = math.sqrt(0.5)


@exercise("beyond_ppo.grpo_advantages", core=True)
def test_grpo_of_two(subject):
    """of two answers the better one gets √½, however much better it is"""
    same(subject.grpo_advantages, (tensor([[1.0, 4.0]]),), tensor([[-HALF, HALF]]))
    same(subject.grpo_advantages, (tensor([[1.0, 400.0]]),), tensor([[-HALF, HALF]]))


@exercise("beyond_ppo.grpo_advantages", core=True)
def test_grpo_of_three(subject):
    """reward minus the group's mean, over its unbiased standard deviation"""
    root = math.sqrt(7)  # (4 + 1 + 9) / 2
    expected = tensor([[-2 / root, -1 / root, 3 / root]])
    same(subject.grpo_advantages, (tensor([[1.0, 2.0, 6.0]]),), expected)


@exercise("beyond_ppo.grpo_advantages")
def test_grpo_prompts(subject):
    """every prompt has its own mean and its own spread"""
    rewards = tensor([[1.0, 4.0], [100.0, 300.0], [-5.0, -7.0]])
    expected = tensor([[-HALF, HALF], [-HALF, HALF], [HALF, -HALF]])
    same(subject.grpo_advantages, (rewards,), expected)


@exercise("beyond_ppo.grpo_advantages")
def test_equal_rewards(subject):
    """a prompt whose answers are all equal teaches nothing: 0, not NaN and not rounding"""
    same(subject.grpo_advantages, (tensor([[2.0, 2.0]]),), torch.zeros(1, 2))
    rewards = tensor([[0.1], [1 / 3], [-7.7]]).expand(3, 7).contiguous()
    same(subject.grpo_advantages, (rewards,), torch.zeros(3, 7), atol=1e-3)


@exercise("beyond_ppo.grpo_advantages")
def test_grpo_golden(subject, golden):
    """the numbers of the reference"""
    case = golden("G12")
    expected = case.expected["group_norm_unbiased"]
    same(subject.grpo_advantages, (case.inputs["groups"],), expected)


@exercise("beyond_ppo.grpo_advantages")
def test_grpo_eps(subject):
    """eps is added to the standard deviation"""
    expected = tensor([[-1.5 / (1 + math.sqrt(4.5)), 1.5 / (1 + math.sqrt(4.5))]])
    same(subject.grpo_advantages, (tensor([[1.0, 4.0]]),), expected, {"eps": 1.0})


@exercise("beyond_ppo.grpo_advantages")
def test_any_grpo(subject, rng):
    """any prompts and groups; float32 stays float32"""
    for shape in ((1, 2), (3, 4), (5, 8)):
        rewards = normal(rng, *shape, scale=2.0) + 1
        expected = grpo_by_loops(rewards).float()
        same(subject.grpo_advantages, (rewards,), expected, dtype=torch.float32, atol=1e-4)


# ----------------------------------------------------------------- reinforce_plus_plus_advantages


def plus_plus_by_loops(scores, kl, mask, kl_coef, eps=1e-8):
    """score - kl_coef * (KL from here on), whitened over all valid entries."""
    raw = torch.zeros(kl.shape, dtype=DOUBLE)
    for b, t in mask.nonzero().tolist():
        rest = math.fsum(kl[b, i].item() for i in range(t, kl.shape[1]) if mask[b, i])
        raw[b, t] = scores[b].item() - kl_coef * rest
    valid = raw[mask].tolist()
    mean = math.fsum(valid) / len(valid)
    variance = math.fsum((v - mean) ** 2 for v in valid) / len(valid)
    return torch.where(mask, (raw - mean) / math.sqrt(variance + eps), 0.0)


def rollout(rng, b, t):
    """Scores (b,), kl (b, t) with NaN outside the mask, mask: one run of actions a row."""
    mask = torch.zeros(b, t, dtype=torch.bool)
    for row in mask:
        first = int(torch.randint(0, t, (1,), generator=rng))
        last = int(torch.randint(first, t, (1,), generator=rng))
        row[first : last + 1] = True
    return normal(rng, b), torch.where(mask, normal(rng, b, t), NAN), mask


@exercise("beyond_ppo.reinforce_plus_plus_advantages", core=True)
def test_without_kl(subject):
    """without a price on KL the scores are whitened, the same at every token of an answer"""
    scores, mask = tensor([1.0, 3.0]), tensor([[T, T], [T, T]])
    expected = tensor([[-1.0, -1.0], [1.0, 1.0]])
    args = (scores, torch.ones(2, 2), mask, 0.0)
    same(subject.reinforce_plus_plus_advantages, args, expected)


@exercise("beyond_ppo.reinforce_plus_plus_advantages", core=True)
def test_only_what_is_still_to_come(subject):
    """a token pays for its own KL and for that of those behind it"""
    args = (tensor([1.0]), tensor([[1.0, 3.0, 2.0]]), tensor([[T, T, T]]), 0.5)
    raw = tensor([1 - 3.0, 1 - 2.5, 1 - 1.0])  # 6, 5 and 2 nats are still to come
    expected = (raw - raw.mean()) / raw.std(correction=0)
    same(subject.reinforce_plus_plus_advantages, args, expected[None])


@exercise("beyond_ppo.reinforce_plus_plus_advantages")
def test_plus_plus_pads(subject):
    """prompt and pads count nowhere, NaN included, and get 0"""
    scores = tensor([1.0, 3.0])
    kl = tensor([[NAN, 1.0, NAN], [NAN, 1.0, 1.0]])
    mask = tensor([[F, T, F], [F, T, T]])
    args = (scores, kl, mask, 1.0)  # 0, then 1 and 2
    step = math.sqrt(1.5)
    expected = tensor([[0.0, -step, 0.0], [0.0, 0.0, step]])
    same(subject.reinforce_plus_plus_advantages, args, expected)


@exercise("beyond_ppo.reinforce_plus_plus_advantages")
def test_one_mean_for_the_batch(subject):
    """mean and spread are those of all tokens of the batch, so a long answer weighs more"""
    scores, mask = tensor([1.0, 5.0]), tensor([[T, T, T], [T, F, F]])
    expected = tensor([[-1.0, -1.0, -1.0], [3.0, 0.0, 0.0]]) / math.sqrt(3)
    args = (scores, torch.zeros(2, 3), mask, 0.1)
    same(subject.reinforce_plus_plus_advantages, args, expected)


@exercise("beyond_ppo.reinforce_plus_plus_advantages")
def test_equal_tokens(subject):
    """where all is equal nothing is learnt: 0, and no division by 0"""
    args = (tensor([2.0, 2.0]), torch.zeros(2, 2), tensor([[T, T], [T, F]]), 0.3)
    same(subject.reinforce_plus_plus_advantages, args, torch.zeros(2, 2), atol=1e-3)


@exercise("beyond_ppo.reinforce_plus_plus_advantages")
def test_plus_plus_eps(subject):
    """eps is added to the variance"""
    args = (tensor([1.0, 3.0]), torch.zeros(2, 1), tensor([[T], [T]]), 0.0)
    expected = tensor([[-0.5], [0.5]])
    same(subject.reinforce_plus_plus_advantages, args, expected, {"eps": 3.0})


@exercise("beyond_ppo.reinforce_plus_plus_advantages")
def test_any_plus_plus(subject, rng):
    """any batch of answers"""
    for b, t in ((2, 3), (4, 6), (8, 5)):
        scores, kl, mask = rollout(rng, b, t)
        for kl_coef in (0.05, 1.0):
            expected = plus_plus_by_loops(scores, kl, mask, kl_coef).float()
            args = (scores, kl, mask, kl_coef)
            same(subject.reinforce_plus_plus_advantages, args, expected, rtol=1e-3, atol=1e-4)
