"""Chapter 06: PPO-ptx, and the normalisation of rewards and values.

PPO forgets: what the reward does not ask for, it gives away. InstructGPT (Ouyang et al. 2022,
Eq. 2) adds the pretraining objective to keep it:

    objective = E[ r(x, y) - beta log pi(y|x) / pi_sft(y|x) ] + gamma E_pretrain[ log pi(x) ]

The paper leaves open whether log pi(x) is a document's sum or its mean over tokens, and how the PPO
term is scaled beside it, so its gamma = 27.8 means little by itself: on a token mean it weighs 2048
times less than on the sum over 2048 tokens. Here the reduction is named, and the two gradients'
norms are worth logging; begin where they are alike.

The rest makes PPO's settings independent of the reward's scale: `RunningMoments` divides rewards by
their standard deviation so far, `PopArt` does the same for the critic's targets without changing
what the critic says.

Tested by `pytest tests/test_ppo_ptx.py`.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rlhf_course.mdp import chunked_logprobs, masked_sum, require_same_shape, token_mean
from rlhf_course.moments import masked_moments
from rlhf_course.ppo import ppo_step
from rlhf_course.rollout import PPOSettings, Rollout
from rlhf_course.vocabulary import rows_at_a_time


def ptx_loss(
    nll: Tensor,
    mask: Tensor,
    reduction: str = "token_mean",
    denominator: float | Tensor | None = None,
) -> Tensor:
    """The pretraining term -E[log pi(x)], to be multiplied by gamma and minimised.

    nll (B, T): -log pi of each token of the pretraining rows, nats; mask (B, T) bool -> 0-dim.
    "token_mean" is the mean over tokens; "seq_sum" the mean over rows of a row's sum, InstructGPT's
    Eq. 2 read literally, where a row without any token does not count. `denominator` counts tokens
    for the first and rows for the second, over the whole optimizer step; None: those given here.
    Raises ValueError for another reduction.
    """
    require_same_shape(mask, nll=nll)
    # BEGIN SOLUTION
    if reduction == "token_mean":
        return token_mean(nll, mask, denominator)
    if reduction == "seq_sum":
        return token_mean(masked_sum(nll, mask, dim=1), mask.any(dim=1), denominator)
    # END SOLUTION
    raise ValueError(f"reduction must be 'token_mean' or 'seq_sum', not {reduction!r}")


# ----------------------------------------------------------------------------- moments over time


def _spread(variance: float, mean: float) -> float:
    """The standard deviation to divide by: sqrt(variance), but 1 where nothing varies yet.

    Rounding leaves a constant 0.1 with a deviation of 1e-17; dividing by that would make 1e16 of
    it. A spread below 1e-8 of the mean is below float32's resolution, so it is none.
    """
    deviation = math.sqrt(variance)
    return deviation if deviation > 1e-8 * abs(mean) else 1.0


class RunningMoments:
    """`count`, `mean` and population variance `var` of all that was seen, on all ranks, in float64.

    Update with a batch's rewards first, then normalise that batch. Empty at first: mean 0, std 1.
    """

    def __init__(self):
        self.count, self.mean, self.var = 0, 0.0, 0.0

    @property
    def std(self) -> float:
        """Unbiased standard deviation (n - 1); 1.0 until two different values were seen."""
        if self.count < 2:
            return 1.0
        return _spread(self.var * self.count / (self.count - 1), self.mean)

    def update(self, x: Tensor, group: ProcessGroup | None = None) -> None:
        """Merge a batch (Chan et al. 1979): exact, whatever the batches' sizes and their order.

        x (B,) float, this rank's part, possibly empty; every rank of `group` has to call. Raises
        ValueError, and stays as it was, where x holds NaN or Inf on any rank.
        """
        everything = torch.ones_like(x, dtype=torch.bool)
        mean, variance, count = (m.item() for m in masked_moments(x, everything, group))
        if not math.isfinite(mean):
            raise ValueError("NaN or Inf among the values; the moments were left as they were")
        if count == 0:
            return
        # BEGIN SOLUTION
        # The old moments and the batch's are mixed with the weights 1 - share and share. A
        # mixture's variance is the mean of the variances plus the variance of the means.
        share = self._share(int(count))
        delta = mean - self.mean
        self.mean += share * delta
        self.var += share * (variance - self.var + (1 - share) * delta**2)
        # END SOLUTION

    def _share(self, count: int) -> float:
        """The weight of a new batch of `count` values beside all that came before it."""
        self.count += count
        return count / self.count

    def normalize(self, x: Tensor, shift_mean: bool = False) -> Tensor:
        """x / std, or (x - mean) / std. The mean stays by default: whitening the advantages takes
        it out anyway, and a reward keeps its sign."""
        return (x - self.mean) / self.std if shift_mean else x / self.std

    def state_dict(self) -> dict[str, float]:
        return {"count": self.count, "mean": self.mean, "var": self.var}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.count, self.mean, self.var = state["count"], state["mean"], state["var"]


class EMAMoments(RunningMoments):
    """Moments that forget: a batch weighs `decay` times as much as the one after it.

    For rewards that drift as the policy learns. The weights are corrected for the empty start as in
    Adam, so after the first batch the mean is that batch's mean.
    """

    def __init__(self, decay: float):
        if not 0 < decay < 1:
            raise ValueError(f"decay must lie between 0 and 1, not {decay}")
        super().__init__()
        self.decay, self.weight = decay, 0.0

    @property
    def std(self) -> float:
        """Population standard deviation; 1.0 until two different values were seen."""
        return _spread(self.var, self.mean)

    def _share(self, count: int) -> float:
        self.count += count
        self.weight = self.decay * self.weight + (1 - self.decay)  # sum of the weights so far
        return (1 - self.decay) / self.weight

    def state_dict(self) -> dict[str, float]:
        return {**super().state_dict(), "weight": self.weight}

    def load_state_dict(self, state: dict[str, float]) -> None:
        super().load_state_dict(state)
        self.weight = state["weight"]


# ------------------------------------------------------------------------- the critic's targets


class PopArt:
    """Train the critic on normalised returns without moving what it says (van Hasselt et al. 2016).

    The head predicts (R - mean) / std, so its targets have one scale whatever the reward's. When
    the moments move, the head's weights move the other way:

        w <- w * std / std',   b <- (std * b + mean - mean') / std'

    and `denormalize(head(h))` is unchanged. Plain normalisation would change the value of every
    state at each update, and the advantages with it. Adam's moments for the head are not rescaled;
    they catch up in a few steps.

    head: nn.Linear(D, 1) with a bias, changed in place by `update`.
    decay: None for the moments of all targets so far, else those of `EMAMoments`.
    """

    def __init__(self, head: nn.Linear, decay: float | None = None):
        if head.out_features != 1 or head.bias is None:
            raise ValueError("PopArt needs a head of nn.Linear(width, 1) with a bias")
        self.head = head
        self.moments = RunningMoments() if decay is None else EMAMoments(decay)

    @property
    def mean(self) -> float:
        """What a normalised target of 0 stands for."""
        return self.moments.mean

    @property
    def std(self) -> float:
        """Population standard deviation: the targets seen have variance 1 once normalised."""
        return _spread(self.moments.var, self.moments.mean)

    @torch.no_grad()
    def update(self, targets: Tensor, mask: Tensor, group: ProcessGroup | None = None) -> None:
        """Take in a rollout's returns (B, T-1), of all ranks, and rescale the head to match."""
        require_same_shape(mask, targets=targets)
        # BEGIN SOLUTION
        mean, std = self.mean, self.std
        self.moments.update(targets[mask], group)
        bias = self.head.bias.item()
        self.head.weight.mul_(std / self.std)
        self.head.bias.fill_((std * bias + mean - self.mean) / self.std)
        # END SOLUTION

    def normalize(self, x: Tensor) -> Tensor:
        """Returns or values -> the head's scale."""
        return (x - self.mean) / self.std

    def denormalize(self, x: Tensor) -> Tensor:
        """The head's output -> values in the reward's scale, for GAE."""
        return x * self.std + self.mean

    def state_dict(self) -> dict[str, float]:
        """The moments; the head is saved with its model."""
        return self.moments.state_dict()

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.moments.load_state_dict(state)


# ------------------------------------------------------------------------------------- one update


@dataclass
class PTXSettings:
    """How the pretraining gradient is mixed in."""

    coef: float = 0.1
    """gamma: weight of the pretraining loss beside PPO's."""
    reduction: str = "token_mean"
    """"token_mean" or "seq_sum"; see `ptx_loss`."""


def ptx_terms(
    policy: nn.Module, rows: Tensor, settings: PTXSettings, denominator: float | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Gamma times the pretraining loss, 0-dim, and that loss for the log. rows: (B, T) long, corpus
    tokens; denominator: see `ptx_loss`."""
    hidden = policy.hidden_states(rows)[:, :-1].flatten(0, 1)  # (B (T-1), D)
    size = rows_at_a_time(policy.vocab_size, 4096)
    logprobs, _ = chunked_logprobs(hidden, policy.unembed, rows[:, 1:].flatten(), chunk_size=size)
    nll = -logprobs.view(len(rows), -1)  # (B, T-1)
    everything = torch.ones_like(nll, dtype=torch.bool)
    loss = ptx_loss(nll, everything, settings.reduction, denominator)
    return settings.coef * loss, {"ptx_loss": loss.detach()}


def ptx_backward(policy: nn.Module, rows: Tensor, settings: PTXSettings) -> dict[str, float]:
    """Add gamma times the gradient of the pretraining loss. rows: (B, T) long, corpus tokens."""
    loss, stats = ptx_terms(policy, rows, settings)
    loss.backward()
    return {name: value.item() for name, value in stats.items()}


def pretraining_gradient(
    policy: nn.Module, rows: Tensor | None, settings: PTXSettings, measure: bool = False
) -> Callable[[], dict[str, float]] | None:
    """What an update is to call after its own backward pass, so that gamma times the pretraining
    gradient joins the same buffers; None where there are no rows.

    measure: also return both gradients' norms before clipping (`grad_norm_ppo`, `grad_norm_ptx`,
    gamma included), at the price of a copy of the gradients.
    """
    if rows is None:
        return None

    def add() -> dict[str, float]:
        parameters = [p for p in policy.parameters() if p.grad is not None]
        before = [p.grad.clone() for p in parameters] if measure else []
        stats = ptx_backward(policy, rows, settings)
        if measure:
            stats["grad_norm_ppo"] = float(nn.utils.get_total_norm(before))
            # One difference at a time: all of them would be the model once more.
            norm = torch.linalg.vector_norm
            added = [norm(p.grad - b) for p, b in zip(parameters, before, strict=True)]
            stats["grad_norm_ptx"] = float(norm(torch.stack(added)))
        return stats

    return add


def ppo_ptx_step(
    policy: nn.Module,
    critic: nn.Module,
    batch: Rollout,
    rows: Tensor | None,
    policy_optimizer: torch.optim.Optimizer,
    critic_optimizer: torch.optim.Optimizer,
    settings: PPOSettings,
    ptx: PTXSettings,
    normalize: Callable | None = None,
    measure: bool = False,
) -> dict[str, float]:
    """`ppo_step` with the pretraining gradient accumulated into the same buffers.

    As in InstructGPT, App. C.4: both gradients are computed one after the other, the second is
    multiplied by gamma, and one optimiser step is made. rows: (B, T) corpus tokens; None: PPO.
    measure: see `pretraining_gradient`.
    """
    more = pretraining_gradient(policy, rows, ptx, measure)
    return ppo_step(
        policy, critic, batch, policy_optimizer, critic_optimizer, settings, more, normalize
    )
