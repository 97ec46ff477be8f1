"""Chapter 08: what came after PPO. No critic, and in the end no reward model.

Where several answers are drawn for one prompt, they can be each other's baseline, and no value has
to be learnt: REINFORCE, RLOO and GRPO differ only in what they subtract and divide by. They take
rewards (N, G): N prompts, G answers each, one reward an answer, and return advantages (N, G) to be
given to every token of the answer. REINFORCE++ needs no second answer: its baseline is the batch.
All go into the clipped loss of chapter 05 in the place of GAE's advantages.

DPO samples nothing. It turns the objective around: the policy that is best for a reward says which
reward that was, so the policy itself can be trained on the comparisons as a reward model is.

Tested by `pytest tests/test_beyond_ppo.py`.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.functional import logsigmoid

from rlhf_course.errors import check_finite
from rlhf_course.mdp import token_rewards
from rlhf_course.ppo import policy_backward, whiten
from rlhf_course.rollout import PPOSettings, Rollout

# ------------------------------------------------------------------- advantages without a critic


def reinforce_advantages(rewards: Tensor) -> Tensor:
    """r - mean of the prompt's answers (Williams 1992, with the group's mean as the baseline).

    The baseline contains the answer's own reward, which shrinks every advantage by (G - 1) / G.
    """
    _require_group(rewards, 1)
    return rewards - rewards.mean(dim=1, keepdim=True)


def rloo_advantages(rewards: Tensor) -> Tensor:
    """r - mean of the OTHER answers of the prompt (Ahmadian et al. 2024), unbiased.

    rewards (N, G): G answers to each of N prompts -> (N, G). The reward is the score minus
    kl_coef times the answer's KL. Raises ValueError where G < 2: there is no other answer.
    """
    size = _require_group(rewards, 2)
    # BEGIN SOLUTION
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (size - 1)  # (N, G)
    return rewards - others
    # END SOLUTION


def grpo_advantages(rewards: Tensor, eps: float = 1e-9) -> Tensor:
    """(r - mean) / (std + eps) within the prompt (Shao et al. 2024, section 4.1.2), unbiased std.

    rewards (N, G): G answers to each of N prompts -> (N, G). A prompt whose answers are all equal
    gives 0: it teaches nothing (in float32 rounding alone would leave it a spread of ten times eps:
    float64 is wanted inside, the rewards' dtype outside). One whose answers nearly are equal gets
    the same weight as any other, which favours prompts that are very easy or very hard. The reward
    is the score alone: GRPO has the KL in its loss. ValueError where G < 2: no spread.
    """
    _require_group(rewards, 2)
    # BEGIN SOLUTION
    exact = rewards.double()
    centred = exact - exact.mean(dim=1, keepdim=True)  # (N, G)
    return (centred / (exact.std(dim=1, keepdim=True) + eps)).to(rewards.dtype)
    # END SOLUTION


@torch.no_grad()
def reinforce_plus_plus_advantages(
    scores: Tensor,
    kl: Tensor,
    mask: Tensor,
    kl_coef: float,
    eps: float = 1e-8,
    group: ProcessGroup | None = None,
) -> Tensor:
    """REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): what is still to come, whitened over all.

        A_t = score - kl_coef * sum_{i >= t} KL_i,      then (A - mean) / sqrt(var + eps)

    scores (B,), kl (B, T-1) in nats (k1), mask (B, T-1) bool -> (B, T-1), 0 outside the mask. The
    sum runs over the row's valid actions from t on: what was paid before t cannot be changed any
    more. Mean and (population) variance are those of all valid entries of the whole batch, over all
    ranks of `group`. It is GAE's advantage at gamma = lambda = 1 with a critic that says 0.
    """
    # BEGIN SOLUTION
    rewards = token_rewards(scores, kl, mask, kl_coef)  # (B, T-1), 0 outside the mask
    to_come = rewards.flip(1).cumsum(dim=1).flip(1)  # (B, T-1)
    return whiten(to_come, mask, eps=eps, group=group)
    # END SOLUTION


def _require_group(rewards: Tensor, smallest: int) -> int:
    if rewards.ndim != 2 or rewards.shape[1] < smallest:
        shape = tuple(rewards.shape)
        raise ValueError(f"rewards must be (prompts, at least {smallest} answers), not {shape}")
    return rewards.shape[1]


def policy_step(
    policy: nn.Module,
    batch: Rollout,
    optimizer: torch.optim.Optimizer,
    settings: PPOSettings,
    more_policy_gradient: Callable[[], dict[str, float]] | None = None,
) -> dict[str, float]:
    """`ppo.ppo_step` without a critic: one update of the policy, diagnostics as floats.

    Raises TrainingError, before anything is updated, when a loss or a gradient is not finite.
    """
    optimizer.zero_grad(set_to_none=True)
    stats = policy_backward(policy, batch, settings)
    if more_policy_gradient is not None:
        stats.update(more_policy_gradient())
    norm = nn.utils.clip_grad_norm_(policy.parameters(), settings.max_grad_norm)
    stats["policy_grad_norm"] = float(norm)
    check_finite(stats, "policy update")
    optimizer.step()
    return stats


# ------------------------------------------------------------------------- no reward model either


def dpo_loss(
    logprobs_chosen: Tensor,
    logprobs_rejected: Tensor,
    ref_logprobs_chosen: Tensor,
    ref_logprobs_rejected: Tensor,
    beta: float = 0.1,
    denominator: float | Tensor | None = None,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Direct preference optimisation (Rafailov et al. 2023, Eq. 7), to be minimised:

        r = beta (log pi(y|x) - log pi_ref(y|x)),   L = -(1/N) sum log sigma(r_chosen - r_rejected)

    All four tensors (N,): log-probabilities of N pairs' whole answers, summed over their tokens;
    the reference's are held constant. r is the implicit reward, up to a term of the prompt alone.
    `denominator` counts pairs over the whole optimizer step; None: those given here.
    Returns (0-dim loss, stats); stats, detached, divided by the same denominator: `reward_chosen`
    and `reward_rejected` (mean r), `margin` (mean of their difference), `accuracy` (share of pairs
    with r_chosen > r_rejected, a tie counts half). Raises ValueError where the shapes differ.
    """
    four = logprobs_chosen, logprobs_rejected, ref_logprobs_chosen, ref_logprobs_rejected
    if logprobs_chosen.dim() != 1 or len({x.shape for x in four}) > 1:
        raise ValueError(f"log-probs of shapes {[tuple(x.shape) for x in four]}: not (N,) each")
    # BEGIN SOLUTION
    count = len(logprobs_chosen) if denominator is None else denominator
    chosen = beta * (logprobs_chosen - ref_logprobs_chosen.detach())  # (N,)
    rejected = beta * (logprobs_rejected - ref_logprobs_rejected.detach())  # (N,)
    margin = chosen - rejected
    # logsigmoid, because log(sigmoid(-200)) is -inf.
    loss = -logsigmoid(margin).sum() / count
    won = (margin > 0).to(margin.dtype) + (margin == 0).to(margin.dtype) / 2
    each = {
        "reward_chosen": chosen, "reward_rejected": rejected, "margin": margin, "accuracy": won,
    }  # fmt: skip
    return loss, {name: x.detach().sum() / count for name, x in each.items()}
    # END SOLUTION
