"""Drivers of chapter 5's exercises: what cannot cross to the code under test is made here.

The two models are as small as models can be, so that a wrong update can be read: the policy is a
table of bigrams over three tokens, the critic a worth for each of them.
"""

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from rlhf_course.mdp import action_mask
from rlhf_course.rollout import PPOSettings, Rollout

VOCABULARY, LENGTH = 3, 5
PROMPTS, ANSWERS = [2, 1, 2], [2, 4, 1]
NAN = float("nan")


def prices(namespace, kl_coef, target, horizon, floor, batches):
    """Update a controller with (kl, episodes) of each batch: ([returned], [its value])."""
    controller = namespace.AdaptiveKLController(kl_coef, target, horizon, floor)
    returned, values = [], []
    for kl, episodes in batches:
        returned.append(controller.update(kl, episodes))
        values.append(controller.value)
    return returned, values


class Bigrams(nn.Module):
    """A language model: the next token's logits are a row of a table, (3, 3)."""

    vocab_size = VOCABULARY

    def __init__(self, table: torch.Tensor):
        super().__init__()
        self.table = nn.Parameter(table)

    def hidden_states(self, tokens, attend=None, positions=None, places=None):
        hidden = F.one_hot(tokens, VOCABULARY).to(self.table.dtype)
        return hidden if places is None else hidden.flatten(0, 1)[places]

    def unembed(self, hidden):
        return hidden @ self.table

    def forward(self, tokens):
        return self.unembed(self.hidden_states(tokens))


class Worths(nn.Module):
    """A critic: a text is worth what its last token is, (3,)."""

    def __init__(self, worth: torch.Tensor):
        super().__init__()
        self.worth = nn.Parameter(worth)

    def token_scores(self, tokens, asked=None):
        return self.worth[tokens]


def world(seed: int) -> tuple[Bigrams, Worths, Rollout]:
    """A policy, a critic and three answers, some updates old."""
    rng = torch.Generator().manual_seed(seed)
    policy = Bigrams(torch.randn(VOCABULARY, VOCABULARY, generator=rng))
    critic = Worths(torch.randn(VOCABULARY, generator=rng))
    tokens = torch.randint(VOCABULARY, (len(PROMPTS), LENGTH), generator=rng)
    mask = action_mask(torch.tensor(PROMPTS), torch.tensor(ANSWERS), LENGTH)
    with torch.no_grad():
        now = policy(tokens).log_softmax(-1)[:, :-1].gather(-1, tokens[:, 1:, None])[..., 0]
    drawn = [torch.randn(mask.shape, generator=rng) for _ in range(4)]
    before, advantages, values, returns = (torch.where(mask, x, 0.0) for x in drawn)
    rollout = Rollout(tokens, mask, now + 0.3 * before, advantages, values, returns, mask)
    return policy, critic, rollout


def update(namespace, seed, settings, steps=1, dirty=False, more=0.0, unit=1.0, spoil=""):
    """`ppo_step` with plain gradient descent at a rate of 1 -> what it subtracted, and its stats.

    dirty: gradients are left from before. more: is added to the policy's gradient by
    `more_policy_gradient`. unit: values are divided by it for the critic. spoil: the name of a
    part of the rollout, one action of which becomes NaN.
    """
    policy, critic, rollout = world(seed)
    if spoil:
        part = getattr(rollout, spoil).clone()
        part[1, 2] = NAN
        rollout = replace(rollout, **{spoil: part})
    table, worth = policy.table.detach().clone(), critic.worth.detach().clone()
    if dirty:
        policy.table.grad = torch.full_like(policy.table, 3.0)
        critic.worth.grad = torch.full_like(critic.worth, 3.0)

    def add():
        policy.table.grad += more
        return {"more_loss": 2.5}

    optimizers = [torch.optim.SGD(model.parameters(), lr=1.0) for model in (policy, critic)]
    options = {"more_policy_gradient": add if more else None}
    options["normalize"] = None if unit == 1.0 else (lambda x: x / unit)
    stats, raised = {}, "nothing"
    try:
        for _ in range(steps):
            stats = namespace.ppo_step(
                policy, critic, rollout, *optimizers,
                PPOSettings(**{"max_grad_norm": 1e9, **settings}), **options,
            )  # fmt: skip
    except NotImplementedError:
        raise
    except Exception as error:
        if not spoil:
            raise
        raised = type(error).__name__
    moved = {"policy": table - policy.table.detach(), "critic": worth - critic.worth.detach()}
    return {**moved, "stats": stats, "raised": raised}
