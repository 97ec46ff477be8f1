"""Chapter 08: advantages without a critic.

Where several answers are drawn for one prompt, they can be each other's baseline, and no value has
to be learnt. The three below differ only in what they subtract and divide by. All take rewards
(N, G): N prompts, G answers each, one reward an answer, and return advantages (N, G) to be given to
every token of the answer.

Tested by `pytest tests/test_beyond_ppo.py`.
"""

from torch import Tensor


def reinforce_advantages(rewards: Tensor) -> Tensor:
    """r - mean of the prompt's answers (Williams 1992, with the group's mean as the baseline).

    The baseline contains the answer's own reward, which shrinks every advantage by (G - 1) / G.
    """
    _require_group(rewards, 1)
    return rewards - rewards.mean(dim=1, keepdim=True)


def rloo_advantages(rewards: Tensor) -> Tensor:
    """r - mean of the OTHER answers of the prompt (Ahmadian et al. 2024), unbiased.

    Raises ValueError where G < 2: there is no other answer.
    """
    size = _require_group(rewards, 2)
    others = (rewards.sum(dim=1, keepdim=True) - rewards) / (size - 1)  # (N, G)
    return rewards - others


def grpo_advantages(rewards: Tensor, eps: float = 1e-9) -> Tensor:
    """(r - mean) / (std + eps) within the prompt (Shao et al. 2024, section 4.1.2), unbiased std.

    A prompt whose answers are all equal gives 0: it teaches nothing. One whose answers nearly are
    gets the same weight as any other, which favours prompts that are very easy or very hard.
    Raises ValueError where G < 2: one answer has no spread.
    """
    _require_group(rewards, 2)
    # float32 would leave equal rewards a spread of 1e-8 by rounding, ten times eps.
    exact = rewards.double()
    centred = exact - exact.mean(dim=1, keepdim=True)  # (N, G)
    return (centred / (exact.std(dim=1, keepdim=True) + eps)).to(rewards.dtype)


def _require_group(rewards: Tensor, smallest: int) -> int:
    if rewards.ndim != 2 or rewards.shape[1] < smallest:
        shape = tuple(rewards.shape)
        raise ValueError(f"rewards must be (prompts, at least {smallest} answers), not {shape}")
    return rewards.shape[1]
