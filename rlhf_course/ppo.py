"""Chapter 05: proximal policy optimisation.

An answer's advantages say which tokens did better than expected. PPO makes those likelier and the
others less so, several times on the same answers, and stops each token once it has moved by the
clip range. A critic learns what to expect; a controller holds the KL to the reference.

All here are pure functions on (B, T-1), the action axis of chapter 04, or controllers of a few
floats. A loss takes `denominator`, the valid tokens of the whole optimizer step: how the batch was
cut up changes nothing (see `mdp.token_mean`). What it holds constant, it detaches itself.

Tested by `pytest tests/test_ppo.py`.
"""

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup

from rlhf_course.errors import check_finite
from rlhf_course.mdp import MAX_LOG_RATIO, kl_estimate, masked_sum, require_same_shape, token_mean
from rlhf_course.moments import explained_variance, in_float64, masked_moments
from rlhf_course.rollout import PPOSettings, Rollout, action_logprobs, action_values


def whiten(
    x: Tensor,
    mask: Tensor,
    shift_mean: bool = True,
    eps: float = 1e-8,
    group: ProcessGroup | None = None,
) -> Tensor:
    """(x - mean) / sqrt(var + eps), with the moments of all valid entries of all ranks.

    x (B, T-1) float, mask (B, T-1) bool -> (B, T-1), 0 outside the mask, no gradient. Call it once
    for a rollout batch, not for each row or micro-batch: what is normalised away there is the very
    difference between good and bad answers. The variance is the population's, defined for n = 1.
    shift_mean=False adds the mean back (for rewards, whose sign must survive).
    """
    # BEGIN SOLUTION
    mean, variance, _ = masked_moments(x, mask, group)
    whitened = (in_float64(x) - mean) * torch.rsqrt(variance + eps)
    if not shift_mean:
        whitened = whitened + mean
    return torch.where(mask, whitened.to(x.dtype).to(x.device), 0.0)
    # END SOLUTION


# ------------------------------------------------------------------------------------------- losses


def policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    dual_clip: float | None = None,
    weights: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The clipped surrogate (Schulman et al. 2017, Eq. 7), to be minimised:

        rho = pi_new / pi_old,   L = -(1/N) sum min(rho A, clip(rho, 1 - clip_low, 1 + clip_high) A)

    All tensors (B, T-1), mask bool -> (0-dim loss, stats). The minimum is pessimistic: a token may
    always be pulled back, but gains nothing by moving on beyond the clip. What that leaves open is
    A < 0 with a large rho; `dual_clip` c > 1 bounds it by c A (Ye et al. 2020).
    `weights` (B, T-1), constants, multiply each token's term (`mdp.importance_weights`). Log-ratios
    are held within +-MAX_LOG_RATIO, so that no ratio becomes inf.

    stats, detached: `clipfrac` (share of tokens the clip changed), `kl_k1` and `kl_k3` (estimates
    of KL(old || new), nats per token), `ratio_mean`, `ratio_max`. Divided by the same denominator,
    they add up over micro-batches as the loss does; `ratio_max` is combined by max.
    """
    require_same_shape(mask, logprobs=logprobs, old_logprobs=old_logprobs, advantages=advantages)
    old_logprobs, advantages = old_logprobs.detach(), advantages.detach()
    # The statistics below read your `log_ratio`, `ratio`, `unclipped` (rho A) and `clipped`.
    # BEGIN SOLUTION
    # Masked and clamped before the exponential: inf has the gradient NaN, even multiplied by 0.
    log_ratio = torch.where(mask, logprobs - old_logprobs, 0.0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantages
    objective = torch.minimum(unclipped, clipped)
    if dual_clip is not None:
        bounded = torch.maximum(objective, dual_clip * advantages)
        objective = torch.where(advantages < 0, bounded, objective)
    if weights is not None:
        require_same_shape(mask, weights=weights)
        objective = objective * weights.detach()
    loss = -token_mean(objective, mask, denominator)
    # END SOLUTION

    with torch.no_grad():
        still = torch.zeros_like(log_ratio)
        each = {
            "clipfrac": (clipped < unclipped).to(ratio.dtype),
            "kl_k1": kl_estimate(still, log_ratio, "k1"),  # log pi_old - log pi_new = 0 - log rho
            "kl_k3": kl_estimate(still, log_ratio, "k3"),
            "ratio_mean": ratio,
        }
        stats = {name: token_mean(x, mask, denominator) for name, x in each.items()}
        stats["ratio_max"] = torch.where(mask, ratio, 0.0).max()
    return loss, stats


def sequence_policy_loss(
    logprobs: Tensor,
    old_logprobs: Tensor,
    advantages: Tensor,
    mask: Tensor,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same surrogate where the whole answer is one action: rho = exp(sum of log-ratios).

    logprobs, old_logprobs (B, T-1), advantages (B,), mask (B, T-1) bool -> (0-dim loss, stats).
    Clipped once an answer, so one token that moved far stops its whole answer. `denominator` counts
    sequences; the stats are those of `policy_loss`, per sequence.
    """
    require_same_shape(mask, logprobs=logprobs, old_logprobs=old_logprobs)
    log_ratio = masked_sum(logprobs - old_logprobs.detach(), mask, dim=1)  # (B,)
    start, answers = torch.zeros_like(log_ratio), mask.any(dim=1)  # (B,), (B,)
    clips = clip_low, clip_high
    return policy_loss(log_ratio, start, advantages, answers, *clips, denominator=denominator)


def value_loss(
    values: Tensor,
    old_values: Tensor,
    returns: Tensor,
    mask: Tensor,
    clip: float | None = 0.2,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The critic's loss, clipped around its value at the rollout (Ziegler et al. 2019's code):

        L = 0.5 (1/N) sum max((V - R)^2, (V_old + clip(V - V_old, -clip, clip) - R)^2)

    All tensors (B, T-1), or (B,) for one value a sequence; mask bool -> (0-dim loss, stats).
    clip None is the plain squared error. stats, detached: `clipfrac`, `error` (mean squared, adds
    up over micro-batches like the loss), `explained_variance` (of this batch alone).
    """
    require_same_shape(mask, values=values, old_values=old_values, returns=returns)
    moved = (values - old_values).detach().abs() > (math.inf if clip is None else clip)
    # The statistics below read your `error` (V - R)^2 and `worst`, the larger of the two squares.
    # BEGIN SOLUTION
    # Pads become 0 before they are squared: the gradient of NaN^2 is NaN even where it is not used.
    values, old_values, returns = (
        torch.where(mask, x, 0.0) for x in (values, old_values.detach(), returns.detach())
    )
    worst = error = (values - returns).square()
    if clip is not None:
        near = old_values + (values - old_values).clamp(-clip, clip)
        worst = torch.maximum(error, (near - returns).square())
    loss = 0.5 * token_mean(worst, mask, denominator)
    # END SOLUTION

    with torch.no_grad():
        stats = {
            # `moved`, since rounding makes V_old + (V - V_old) another number than V.
            "clipfrac": token_mean((moved & (worst > error)).to(error.dtype), mask, denominator),
            "error": token_mean(error, mask, denominator),
            "explained_variance": explained_variance(values, returns, mask),
        }
    return loss, stats


# ------------------------------------------------------------------------------ the price of KL


class FixedKLController:
    """A KL coefficient that never changes, with the interface of `AdaptiveKLController`."""

    def __init__(self, kl_coef: float):
        self.value = kl_coef

    def update(self, kl: float, episodes: int) -> float:
        return self.value

    def state_dict(self) -> dict[str, float]:
        return {"value": self.value}

    def load_state_dict(self, state: dict[str, float]) -> None:
        self.value = state["value"]


class AdaptiveKLController(FixedKLController):
    """Raise the KL's price while the policy is too far from the reference, lower it while too near.

    Ziegler et al. 2019, section 2.2: e = clip(KL / target - 1, -0.2, 0.2), then
    value <- value * (1 + e * episodes / horizon). `target` is in nats per SEQUENCE: 6 nats an
    answer are not 6 nats a token. `horizon` is in episodes; the paper's K_beta = 0.1 is batches of
    1024 at a horizon of 10000. `floor` bounds the price from below: after a long time under target
    it would need as long to come back (0 is Ziegler's form exactly).
    """

    def __init__(self, kl_coef: float, target: float, horizon: float = 10000, floor: float = 0.0):
        if kl_coef <= 0 or target <= 0 or horizon <= 0:
            raise ValueError("kl_coef, target and horizon must be positive")
        super().__init__(kl_coef)
        self.target, self.horizon, self.floor = target, horizon, floor

    def update(self, kl: float, episodes: int) -> float:
        """The price for the next rollout batch. Call once a batch, after its rewards were computed.

        kl: mean over the batch of the KL summed over each sequence (k1, nats); episodes: the number
        of sequences over all ranks. Raises ValueError where kl is not finite, or where a batch is
        so large beside the horizon that the price could turn negative.
        """
        if not math.isfinite(kl):
            raise ValueError(f"the KL is {kl}: the coefficient stays at {self.value}")
        if 0.2 * episodes >= self.horizon:
            raise ValueError(f"horizon {self.horizon} is too short for {episodes} episodes a batch")
        # BEGIN SOLUTION
        # Clipped before it is scaled: one wild batch counts no more than one that is 20 % off.
        error = min(max(float(kl) / self.target - 1, -0.2), 0.2)
        self.value = max(self.value * (1 + error * episodes / self.horizon), self.floor)
        return self.value
        # END SOLUTION


# ------------------------------------------------------------------------------------- one update


def policy_terms(
    policy: nn.Module, part: Rollout, settings: PPOSettings, tokens: Tensor, answers: Tensor
) -> tuple[Tensor, dict[str, Tensor]]:
    """A micro-batch's share of the policy's loss, 0-dim, and of the diagnostics, detached.

    tokens, answers: how many the whole update has; see `mdp.token_mean`.
    """
    logprobs, entropy = action_logprobs(policy, part.tokens, part.mask, settings.temperature)
    clips = {"clip_low": settings.clip_low, "clip_high": settings.clip_high}
    if settings.sequence_ratio:
        shared = part.advantages.gather(1, part.mask.int().argmax(dim=1, keepdim=True))[:, 0]
        loss, stats = sequence_policy_loss(
            logprobs, part.logprobs, shared, part.mask, **clips, denominator=answers
        )
    else:
        clips |= {"dual_clip": settings.dual_clip, "weights": part.weights}
        loss, stats = policy_loss(
            logprobs, part.logprobs, part.advantages, part.mask, **clips, denominator=tokens
        )
    mean_entropy = token_mean(entropy, part.mask, tokens)
    stats = {"policy_loss": loss.detach(), "entropy": mean_entropy.detach(), **stats}
    log_ratio = (logprobs.detach() - part.logprobs).abs()
    stats["log_ratio_max"] = torch.where(part.mask, log_ratio, 0.0).max()
    if settings.kl_loss_coef:
        kl = token_mean(kl_estimate(logprobs, part.ref_logprobs, "k3"), part.mask, tokens)
        loss, stats["kl_loss"] = loss + settings.kl_loss_coef * kl, kl.detach()
    # Without a bonus the entropy is only reported, not differentiated.
    return loss - settings.entropy_coef * mean_entropy if settings.entropy_coef else loss, stats


def critic_terms(
    critic: nn.Module,
    part: Rollout,
    settings: PPOSettings,
    count: Tensor,
    normalize: Callable | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """The same for the critic. normalize: PopArt's; count: values that the update trains."""
    normalize = normalize or (lambda x: x)
    loss, stats = value_loss(
        action_values(critic, part.tokens, part.value_mask), normalize(part.values),
        normalize(part.returns), part.value_mask, settings.value_clip, count,
    )  # fmt: skip
    return loss, {"value_loss": loss.detach(), "value_clipfrac": stats["clipfrac"]}


def add_up(parts: list[dict[str, Tensor]]) -> dict[str, float]:
    """The micro-batches' diagnostics, 0-dim each, as those of the update: the largest of "…_max",
    the sum of the others. Read all at once, since a GPU has to finish its work for that."""
    columns: dict[str, list[Tensor]] = {}
    for stats in parts:
        for name, value in stats.items():
            columns.setdefault(name, []).append(value)
    numbers = iter(torch.stack([x for xs in columns.values() for x in xs]).tolist())
    read = {name: [next(numbers) for _ in xs] for name, xs in columns.items()}
    return {name: max(xs) if name.endswith("_max") else sum(xs) for name, xs in read.items()}


def policy_backward(policy: nn.Module, batch: Rollout, settings: PPOSettings) -> dict[str, float]:
    """Add the gradient of the policy's loss over `batch`, micro-batch by micro-batch."""
    tokens, answers = batch.mask.sum(), batch.mask.any(dim=1).sum()
    parts = []
    for part in batch.micro_batches(settings.micro_batch_size):
        loss, stats = policy_terms(policy, part, settings, tokens, answers)
        loss.backward()
        parts.append(stats)
    return add_up(parts)


def critic_backward(
    critic: nn.Module, batch: Rollout, settings: PPOSettings, normalize: Callable | None = None
) -> dict[str, float]:
    """Add the gradient of the critic's loss."""
    count, parts = batch.value_mask.sum(), []
    for part in batch.micro_batches(settings.micro_batch_size):
        loss, stats = critic_terms(critic, part, settings, count, normalize)
        loss.backward()
        parts.append(stats)
    return add_up(parts)


def ppo_step(
    policy: nn.Module,
    critic: nn.Module,
    batch: Rollout,
    policy_optimizer: torch.optim.Optimizer,
    critic_optimizer: torch.optim.Optimizer,
    settings: PPOSettings,
    more_policy_gradient: Callable[[], dict[str, float]] | None = None,
    normalize: Callable | None = None,
) -> dict[str, float]:
    """One update of policy and critic on a minibatch; returns the diagnostics as floats.

    Old gradients are dropped, new ones longer than `settings.max_grad_norm` shortened to it, each
    model's by itself; their lengths before that join the diagnostics of the backward passes as
    `policy_grad_norm` and `value_grad_norm`. more_policy_gradient: called after PPO's backward pass
    to add to the same gradients (PPO-ptx does); its returned terms join the diagnostics too.
    Raises TrainingError, before anything is updated, when a loss or a gradient is not finite.
    """
    # BEGIN SOLUTION
    policy_optimizer.zero_grad(set_to_none=True)
    critic_optimizer.zero_grad(set_to_none=True)
    stats = policy_backward(policy, batch, settings)
    if more_policy_gradient is not None:
        stats.update(more_policy_gradient())
    stats.update(critic_backward(critic, batch, settings, normalize))
    clip = nn.utils.clip_grad_norm_
    stats["policy_grad_norm"] = float(clip(policy.parameters(), settings.max_grad_norm))
    stats["value_grad_norm"] = float(clip(critic.parameters(), settings.max_grad_norm))
    check_finite(stats, "PPO update")
    policy_optimizer.step()
    critic_optimizer.step()
    return stats
    # END SOLUTION
