"""Chapter 08: advantages without a critic."""

import itertools

import numpy as np
import pytest
import torch

from rlhf_course import beyond_ppo

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
