"""What PPO holds constant while it updates: a batch of answers, and the settings of the update."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_course.mdp import chunked_logprobs
from rlhf_course.padding import like_lengths, padded_length
from rlhf_course.vocabulary import rows_at_a_time


@dataclass
class Rollout:
    """Answers, and what is held constant about them while the policy is updated."""

    tokens: Tensor
    """(B, T) long: prompt and answer, right-padded."""
    mask: Tensor
    """(B, T-1) bool: the actions."""
    logprobs: Tensor
    """(B, T-1): of the policy that answered, at the rollout's temperature."""
    advantages: Tensor
    """(B, T-1)."""
    values: Tensor
    """(B, T-1): the critic's before the update."""
    returns: Tensor
    """(B, T-1): the critic's targets."""
    value_mask: Tensor
    """(B, T-1) bool: where the critic is trained: every action, or only the first (one value a
    sequence)."""
    ref_logprobs: Tensor | None = None
    """(B, T-1): the reference's, where the KL is a term of the loss (`kl_loss_coef`)."""
    weights: Tensor | None = None
    """(B, T-1): constants that multiply each token's term of the policy's loss, where another
    engine sampled the answers (`mdp.importance_weights`)."""

    def __len__(self) -> int:
        return len(self.tokens)

    def select(self, rows: Tensor) -> Rollout:
        """These rows as a new rollout; columns in which all of them are padded are cut off, up to
        a width that repeats (see `padding`)."""
        last = int(self.mask[rows].any(dim=0).nonzero().max()) + 1  # actions, of last + 1 tokens
        width = padded_length(last + 1, self.tokens.shape[1])
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        parts = {name: x[rows, : width - 1] for name, x in held.items() if x is not None}
        parts["tokens"] = self.tokens[rows, :width]
        return Rollout(**parts)

    def to(self, device: torch.device) -> Rollout:
        """The same on another device."""
        held = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rollout(**{name: x.to(device) for name, x in held.items() if x is not None})

    def micro_batches(self, size: int | None) -> Iterator[Rollout]:
        """Slices of at most `size` rows, in order. None: all; on a CPU see `like_lengths`."""
        device, limit = self.tokens.device, self.tokens.shape[1]
        if size is not None or device.type != "cpu":  # a GPU would wait for the lengths
            parts = torch.arange(len(self)).split(size or len(self))
        else:
            places = torch.arange(2, limit + 1, device=device)  # of the actions' tokens, from 1
            lengths = (places * self.mask).amax(dim=1)  # (B,)
            parts = map(torch.tensor, like_lengths(lengths.tolist(), None, device, limit))
        for rows in parts:
            yield self.select(rows)


@dataclass
class PPOSettings:
    """How one update is made."""

    clip_low: float = 0.2
    """The ratio may fall to 1 - clip_low."""
    clip_high: float = 0.2
    """The ratio may rise to 1 + clip_high."""
    dual_clip: float | None = None
    """Bound of the loss for A < 0, in multiples of A (Ye et al. 2020 use 3); None: none."""
    value_clip: float | None = 0.2
    """Range of the critic around its value at the rollout; None: no clipping."""
    sequence_ratio: bool = False
    """One ratio for the whole answer instead of one a token."""
    entropy_coef: float = 0.0
    """Weight of the mean token entropy, added to the objective."""
    temperature: float = 1.0
    """Divides the logits, as it did when the answers were sampled."""
    max_grad_norm: float = 1.0
    """Gradients longer than this are shortened to it."""
    micro_batch_size: int | None = None
    """Rows a forward pass; changes memory, not the result."""
    kl_loss_coef: float = 0.0
    """Weight of the mean k3 to the reference, a term of the loss as in GRPO (Shao et al. 2024,
    Eq. 3 and 4); 0: none, as where the reward holds the KL."""


def action_logprobs(
    model: nn.Module, tokens: Tensor, mask: Tensor, temperature: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability and entropy of each action, in nats: two (B, T-1), 0 outside the mask.

    tokens (B, T) long, mask (B, T-1) bool. Logits are computed at the actions alone: the prompt's
    and the pads' would be most of the work and are not needed.
    """
    places = F.pad(mask, (0, 1)).flatten().nonzero()[:, 0]  # (N,): N actions of all rows
    hidden = model.hidden_states(tokens, places=places)  # (N, D)
    chosen, entropy = chunked_logprobs(
        hidden, model.unembed, tokens.flatten()[places + 1], temperature,
        rows_at_a_time(model.vocab_size, 4096),
    )  # fmt: skip
    zeros = torch.zeros(mask.shape, dtype=chosen.dtype, device=mask.device)
    return zeros.masked_scatter(mask, chosen), zeros.masked_scatter(mask, entropy)


def action_values(critic: nn.Module, tokens: Tensor, mask: Tensor) -> Tensor:
    """The critic's value before each action, (B, T-1) float, 0 outside the mask.

    tokens (B, T) long, mask (B, T-1) bool: V(s_t) is what it says at token t, having read up to it.
    """
    return critic.token_scores(tokens, asked=F.pad(mask, (0, 1)))[:, :-1]
