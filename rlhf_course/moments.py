"""Means and variances of masked entries, over the ranks of a data-parallel run, in float64.

Whitening, reward and value normalisation all stand on `masked_moments`.

Tested by `pytest tests/test_ppo.py`.
"""

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_reduce

from rlhf_course.mdp import masked_sum, require_same_shape


def in_float64(x: Tensor) -> Tensor:
    """x in float64 and without gradient; on the CPU where the device has no float64 (Apple's)."""
    return x.detach().to("cpu" if x.device.type == "mps" else x.device).double()


def masked_moments(
    x: Tensor, mask: Tensor, group: ProcessGroup | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """(mean, population variance, count) of the valid entries over all ranks of `group`.

    x float, mask bool, same shape -> three 0-dim float64 tensors, all 0 where nothing is valid.
    group None is this process alone (not torch's "everybody"). Ranks may hold different shapes and
    counts, but all have to call. Two passes, mean first: E[x^2] - E[x]^2 loses its digits when the
    mean is far from 0.
    """
    require_same_shape(mask, x=x)
    x = in_float64(x)
    mask = mask.to(x.device)
    # BEGIN SOLUTION

    def total(values: Tensor) -> Tensor:
        values = masked_sum(values, mask)
        if group is not None:
            all_reduce(values, group=group)  # sums, never means: ranks hold unequal counts
        return values

    count = total(torch.ones_like(x))
    mean = total(x) / count.clamp(min=1)
    variance = total((x - mean).square()) / count.clamp(min=1)
    return mean, variance, count
    # END SOLUTION


@torch.no_grad()
def explained_variance(values: Tensor, returns: Tensor, mask: Tensor) -> Tensor:
    """1 - E[(R - V)^2] / Var[R] over valid entries, 0-dim: 1 is a perfect critic, 0 one that knows
    the mean alone, below 0 worse than that. It is 0 where the returns do not vary."""
    mean, variance, _ = masked_moments(returns, mask)
    error, _, _ = masked_moments((returns - values).square(), mask)
    return torch.where(variance > 1e-16 * mean.square(), 1 - error / variance, 0.0)  # else rounding
