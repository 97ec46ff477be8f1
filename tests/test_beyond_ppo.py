"""Chapter 08: advantages without a critic, a policy's update without one, and DPO."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from ranks import on_two_ranks
from tiny_models import VOCABULARY, tiny
from torch.autograd import gradcheck

from rlhf_course import beyond_ppo, mdp, ppo
from rlhf_course.errors import TrainingError
from rlhf_course.reward_model import ScalarModel, pairwise_loss
from rlhf_course.rollout import PPOSettings, Rollout, action_logprobs

ALL = [
    beyond_ppo.reinforce_advantages,
    beyond_ppo.rloo_advantages,
    beyond_ppo.grpo_advantages,
]


@pytest.fixture
def rewards():
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(1), dtype=torch.float64)


def close(actual, expected, tol=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol)


def test_g12_group_advantages(golden):
    case = golden("G12")
    groups = case.inputs["groups"]
    case.matches(beyond_ppo.grpo_advantages(groups), case.expected["group_norm_unbiased"])
    case.matches(beyond_ppo.rloo_advantages(groups), case.expected["rloo"])
    case.matches(beyond_ppo.reinforce_advantages(groups), case.expected["reinforce_baseline"])
    case.differs(beyond_ppo.rloo_advantages(groups), case.expected["reinforce_baseline"])
    population = groups - groups.mean(1, keepdim=True)
    population[0] /= groups[0].std(correction=0)
    case.differs(beyond_ppo.grpo_advantages(groups), population)


def test_advantages_against_loops(rewards):
    for n, row in enumerate(rewards.numpy()):
        for g, reward in enumerate(row):
            others = np.delete(row, g)
            close(beyond_ppo.reinforce_advantages(rewards)[n, g], reward - row.mean())
            close(beyond_ppo.rloo_advantages(rewards)[n, g], reward - others.mean())
            expected = (reward - row.mean()) / (row.std(ddof=1) + 1e-9)
            close(beyond_ppo.grpo_advantages(rewards)[n, g], expected)


@pytest.mark.parametrize("estimate", ALL)
def test_what_all_of_them_keep(estimate, rewards):
    before = rewards.clone()
    advantages = estimate(rewards)
    assert torch.equal(rewards, before)
    close(advantages.sum(dim=1), torch.zeros(4))
    close(estimate(rewards + 100), advantages, 1e-10)  # a prompt's own level says nothing
    order = torch.tensor([2, 0, 4, 1, 3])
    close(estimate(rewards[:, order]), advantages[:, order])
    scale = 1 if estimate is beyond_ppo.grpo_advantages else 7
    close(estimate(7 * rewards), scale * advantages, 1e-7)
    single = estimate(rewards.float())
    assert single.dtype == torch.float32
    close(single, advantages, 1e-5)


@pytest.mark.parametrize("estimate", ALL)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_rewards_teach_nothing(estimate, dtype):
    """Rounding must not be divided by rounding: in float32 that would give advantages near 1."""
    for size in (2, 3, 7, 10):
        rewards = torch.tensor([[0.1], [1 / 3], [-7.7]], dtype=dtype).expand(3, size)
        close(estimate(rewards), torch.zeros(3, size), 1e-5)


def test_rloo_is_unbiased_by_enumeration():
    """Over every pair of answers of a policy with three: the mean gradient is that of E[r]. With
    the group's mean as the baseline it is half of it, (G - 1) / G."""
    theta = torch.tensor([0.3, -0.5, 1.1], dtype=torch.float64, requires_grad=True)
    reward = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64)
    logp = theta.log_softmax(-1)
    (true_grad,) = torch.autograd.grad((logp.exp() * reward).sum(), theta, retain_graph=True)

    def expected_gradient(estimate):
        objective = 0.0
        for pair in map(list, itertools.product(range(3), repeat=2)):
            probability = logp[pair].sum().exp().detach()
            advantages = estimate(reward[pair][None])[0]
            objective = objective + probability * (advantages * logp[pair]).mean()
        return torch.autograd.grad(objective, theta, retain_graph=True)[0]

    close(expected_gradient(beyond_ppo.rloo_advantages), true_grad)
    close(expected_gradient(beyond_ppo.reinforce_advantages), true_grad / 2)


def test_groups_that_are_too_small_are_refused():
    one = torch.ones(3, 1)
    close(beyond_ppo.reinforce_advantages(one), torch.zeros(3, 1))
    for estimate in ALL[1:]:
        with pytest.raises(ValueError, match="at least 2"):
            estimate(one)
    for estimate in ALL:
        with pytest.raises(ValueError, match="rewards must be"):
            estimate(torch.ones(3))


# --------------------------------------------------------------------------------- REINFORCE++


@pytest.fixture
def answers():
    """scores (3,), kl (3, 6) with NaN outside the mask, mask: 4, 1 and 3 actions."""
    generator = torch.Generator().manual_seed(2)
    starts, lengths = torch.tensor([1, 3, 2]), torch.tensor([4, 1, 3])
    mask = mdp.action_mask(starts, lengths, 7)
    kl = torch.randn(3, 6, generator=generator, dtype=torch.float64)
    scores = torch.randn(3, generator=generator, dtype=torch.float64)
    return scores, kl.where(mask, torch.nan), mask


def to_come(scores, kl, mask, kl_coef):
    """score - kl_coef * (the KL from here on), by loops."""
    out = torch.zeros_like(kl)
    for b, t in mask.nonzero().tolist():
        rest = sum(kl[b, i].item() for i in range(t, kl.shape[1]) if mask[b, i])
        out[b, t] = scores[b].item() - kl_coef * rest
    return out


def test_reinforce_plus_plus_against_loops(answers):
    scores, kl, mask = answers
    raw = to_come(scores, kl, mask, 0.3)
    valid = raw[mask].numpy()
    expected = (raw - valid.mean()) / math.sqrt(valid.var() + 1e-8)
    advantages = beyond_ppo.reinforce_plus_plus_advantages(scores, kl, mask, 0.3)
    close(advantages, torch.where(mask, expected, 0.0))
    assert (advantages[~mask] == 0).all()
    single = beyond_ppo.reinforce_plus_plus_advantages(scores.float(), kl.float(), mask, 0.3)
    assert single.dtype == torch.float32
    close(single, advantages, 1e-5)


def test_reinforce_plus_plus_is_gae_with_a_critic_that_says_0(answers):
    scores, kl, mask = answers
    rewards = mdp.token_rewards(scores, kl, mask, 0.3)
    advantages, _ = mdp.gae(rewards, torch.zeros_like(rewards), mask, 1.0, 1.0)
    close(
        beyond_ppo.reinforce_plus_plus_advantages(scores, kl, mask, 0.3),
        ppo.whiten(advantages, mask),
    )


def test_equal_scores_without_kl_teach_nothing(answers):
    _, kl, mask = answers
    for dtype in (torch.float32, torch.float64):
        scores, kl = torch.full((3,), 0.1, dtype=dtype), kl.to(dtype)
        close(beyond_ppo.reinforce_plus_plus_advantages(scores, kl, mask, 0.0), 0 * mask, 1e-5)


def on_this_rank(rank, group, scores, kl, mask):
    rows = slice(0, 1) if rank == 0 else slice(1, 3)
    part = scores[rows], kl[rows], mask[rows]
    return beyond_ppo.reinforce_plus_plus_advantages(*part, 0.3, group=group)


def test_reinforce_plus_plus_over_two_ranks(answers, tmp_path):
    scores, kl, mask = answers
    whole = beyond_ppo.reinforce_plus_plus_advantages(scores, kl, mask, 0.3)
    close(torch.cat(on_two_ranks(on_this_rank, tmp_path, scores, kl, mask)), whole)


# ------------------------------------------------------------------------------------------- DPO


def four(n, seed=0, scale=3.0):
    generator = torch.Generator().manual_seed(seed)
    return [
        -10 + scale * torch.randn(n, generator=generator, dtype=torch.float64) for _ in range(4)
    ]


def test_dpo_by_hand():
    """Log-ratios ln 4 and ln 1: at beta = 0.5 the margin is ln 2, so sigma is 2/3."""
    chosen, rejected = torch.tensor([-1.0, -7.0]), torch.tensor([-2.0, -3.0])
    ref = chosen - math.log(4), rejected.clone()
    loss, stats = beyond_ppo.dpo_loss(chosen, rejected, *ref, beta=0.5)
    close(loss, math.log(1.5), 1e-6)
    close(stats["margin"], math.log(2), 1e-6)
    close(stats["reward_chosen"], math.log(2), 1e-6)
    close(stats["reward_rejected"], 0.0, 1e-6)
    assert stats["accuracy"] == 1
    same, tied = beyond_ppo.dpo_loss(chosen, rejected, chosen, rejected)
    close(same, math.log(2), 1e-6)
    assert tied["accuracy"] == 0.5


def test_dpo_against_loops_and_finite_differences():
    logprobs = four(7)
    for beta in (0.1, 1.0):
        loss, stats = beyond_ppo.dpo_loss(*logprobs, beta=beta)
        win, lose, ref_win, ref_lose = (x.numpy() for x in logprobs)
        margins = beta * ((win - ref_win) - (lose - ref_lose))
        close(loss, np.log1p(np.exp(-margins)).mean())
        close(stats["margin"], margins.mean())
        close(stats["accuracy"], (margins > 0).mean())
        chosen, rejected = (x.clone().requires_grad_() for x in logprobs[:2])
        reference = logprobs[2:]
        assert gradcheck(
            lambda a, b, beta=beta, ref=reference: beyond_ppo.dpo_loss(a, b, *ref, beta)[0],
            (chosen, rejected),
        )
        loss, _ = beyond_ppo.dpo_loss(chosen, rejected, *reference, beta)
        up, down = torch.autograd.grad(loss, (chosen, rejected))
        weight = beta / (1 + np.exp(margins)) / 7  # Eq. 8: the surer of the wrong, the stronger
        close(up, -weight)
        close(down, weight)


def test_dpo_holds_the_reference_constant_and_its_stats_detached():
    parts = [x.requires_grad_() for x in four(5)]
    loss, stats = beyond_ppo.dpo_loss(*parts)
    loss.backward()
    assert [x.grad is not None for x in parts] == [True, True, False, False]
    assert not any(x.requires_grad for x in stats.values())


def test_dpo_micro_batches_add_up():
    parts = four(9, seed=1)
    whole, stats = beyond_ppo.dpo_loss(*parts)
    cut = [
        beyond_ppo.dpo_loss(*(x[rows] for x in parts), denominator=9)
        for rows in torch.arange(9).split([1, 5, 3])
    ]
    close(sum(loss for loss, _ in cut), whole)
    for name, value in stats.items():
        close(sum(s[name] for _, s in cut), value)


def test_dpo_stays_finite_and_is_the_reward_models_loss():
    far = torch.tensor([-1000.0, 1000.0], dtype=torch.float64, requires_grad=True)
    zero = torch.zeros(2, dtype=torch.float64)
    loss, _ = beyond_ppo.dpo_loss(far, zero, zero, zero, beta=1.0)
    close(loss.detach(), 500.0)
    loss.backward()
    close(far.grad, [-0.5, 0.0])
    logprobs = four(6, seed=3)
    win, lose, ref_win, ref_lose = logprobs
    as_reward_model = pairwise_loss(0.2 * (win - ref_win), 0.2 * (lose - ref_lose))
    close(beyond_ppo.dpo_loss(*logprobs, beta=0.2)[0], as_reward_model)


def test_dpo_refuses_shapes_that_would_broadcast():
    good = torch.zeros(3)
    for wrong in (torch.zeros(1), torch.zeros(3, 1), torch.zeros(())):
        with pytest.raises(ValueError, match="log-probs of shapes"):
            beyond_ppo.dpo_loss(good, good, good, wrong)
    with pytest.raises(ValueError, match="log-probs of shapes"):
        beyond_ppo.dpo_loss(*[torch.zeros(2, 2)] * 4)


# ----------------------------------------------------------------------- one update, no critic


@pytest.fixture
def rollout():
    """Answers of made-up tokens, with the policy's and a reference's log-probabilities."""
    generator = torch.Generator().manual_seed(5)
    tokens = torch.randint(VOCABULARY, (5, 12), generator=generator)
    mask = mdp.action_mask(torch.tensor([3, 2, 5, 1, 4]), torch.tensor([9, 4, 1, 6, 3]), 12)
    with torch.no_grad():
        logprobs, _ = action_logprobs(tiny("gpt", seed=1), tokens, mask)
        reference, _ = action_logprobs(tiny("gpt", seed=2), tokens, mask)
    advantages = torch.randn(mask.shape, generator=generator) * mask
    nothing = torch.zeros_like(logprobs)
    return Rollout(tokens, mask, logprobs, advantages, nothing, nothing, mask, reference)


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def after_a_step(rollout, settings, more=None):
    policy = tiny("gpt", seed=1)
    start = parameters(policy)
    optimizer = torch.optim.SGD(policy.parameters(), lr=1.0)
    stats = beyond_ppo.policy_step(policy, rollout, optimizer, settings, more)
    return start - parameters(policy), stats


FREE = PPOSettings(max_grad_norm=1e9)


def test_the_policy_moves_as_in_ppo(rollout):
    """Without a critic the policy's half of `ppo_step` is left, bit for bit."""
    policy, critic = tiny("gpt", seed=1), ScalarModel.from_language_model(tiny("gpt", seed=3))
    start = parameters(policy)
    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for model in (policy, critic)]
    theirs = ppo.ppo_step(policy, critic, rollout, *optimizers, FREE)
    moved, stats = after_a_step(rollout, FREE)
    assert torch.equal(moved, start - parameters(policy))
    assert stats == {name: theirs[name] for name in stats}
    assert "value_loss" not in stats
    shortened, _ = after_a_step(rollout, PPOSettings(max_grad_norm=0.1))
    assert shortened.norm() == pytest.approx(0.1, rel=1e-3)


def test_the_kl_term_of_grpo_is_the_mean_of_k3(rollout):
    """Its gradient is that of beta * mean(exp(-d) - 1 + d), d = log pi - log ref, over actions."""
    beta = 0.7
    plain, _ = after_a_step(rollout, FREE)
    moved, stats = after_a_step(rollout, PPOSettings(max_grad_norm=1e9, kl_loss_coef=beta))
    policy = tiny("gpt", seed=1)
    logprobs, _ = action_logprobs(policy, rollout.tokens, rollout.mask)
    d = (logprobs - rollout.ref_logprobs)[rollout.mask]
    k3 = (torch.exp(-d) - 1 + d).mean()
    assert stats["kl_loss"] == pytest.approx(k3.item(), rel=1e-5)
    grads = torch.autograd.grad(beta * k3, list(policy.parameters()), allow_unused=True)
    zipped = zip(grads, policy.parameters(), strict=True)
    expected = torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zipped])
    assert (moved - plain - expected).norm() < 1e-4 * expected.norm()
    assert expected.norm() > 0.01
    parts, cut = after_a_step(
        rollout, PPOSettings(max_grad_norm=1e9, kl_loss_coef=beta, micro_batch_size=2)
    )
    assert (parts - moved).norm() < 1e-5 * moved.norm()
    assert cut["kl_loss"] == pytest.approx(stats["kl_loss"], rel=1e-5)
    soiled = copy.copy(rollout)  # what stands on the prompt and on the pads changes nothing
    soiled.ref_logprobs = rollout.ref_logprobs.where(rollout.mask, torch.nan)
    again, _ = after_a_step(soiled, PPOSettings(max_grad_norm=1e9, kl_loss_coef=beta))
    assert torch.equal(again, moved)


def test_a_policy_that_would_become_nan_is_left_as_it_was(rollout):
    broken = copy.copy(rollout)
    broken.advantages = rollout.advantages.clone()
    broken.advantages[rollout.mask.nonzero()[0].tolist()[0], 2] = torch.inf
    policy = tiny("gpt", seed=1)
    start = parameters(policy)
    with pytest.raises(TrainingError):
        beyond_ppo.policy_step(
            policy, broken, torch.optim.SGD(policy.parameters(), lr=1.0), PPOSettings()
        )
    assert torch.equal(parameters(policy), start)
    _, stats = after_a_step(rollout, FREE, lambda: {"more": 3.0})
    assert stats["more"] == 3.0
