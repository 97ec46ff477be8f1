"""From the trainer's shards to the rollout engines' weights.

Under ZeRO-3 no rank holds a whole parameter, and a rollout engine wants whole ones, under Hugging
Face's names. So every rank takes part in gathering each parameter, one after the other (never the
whole model at once), and one rank sends it on.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from math import prod
from typing import Protocol

import torch
from torch import Tensor
from torch.distributed import ProcessGroup, all_gather


def gather_zero3_parameters(
    shard: Tensor, shape: tuple[int, ...], group: ProcessGroup | None = None
) -> Tensor:
    """The whole parameter, from the shard of it that each rank of `group` holds.

    ZeRO-3 (Rajbhandari et al. 2020, section 5.3) lays a parameter out flat, fills it up with
    padding to a multiple of the number of ranks, and gives each rank one piece of equal length, in
    the order of the ranks. shard (n,): this rank's piece, any dtype -> a new tensor of `shape`,
    same dtype, without the padding and without gradient. Every rank has to call, in the same order
    of parameters: a rank that stays away leaves all others waiting. group None is this process
    alone. Raises ValueError where the pieces together are too short for `shape`.
    """
    # BEGIN SOLUTION
    shard = shard.detach().contiguous()
    pieces = [shard.clone()]
    if group is not None:
        pieces = [torch.empty_like(shard) for _ in range(group.size())]
        all_gather(pieces, shard, group=group)
    flat, count = torch.cat(pieces), prod(shape)
    if len(flat) < count:
        raise ValueError(f"{len(flat)} numbers on all ranks do not fill the shape {shape}")
    return flat[:count].view(shape)  # (n * ranks,) -> shape
    # END SOLUTION


class Channel(Protocol):
    """How whole tensors get from the leading rank to every rollout engine."""

    def begin(self, version: int) -> None:
        """Tell the engines that new weights are coming. Until `finish` they refuse to answer."""

    def send(self, name: str, tensor: Tensor) -> None:
        """One whole parameter. It is freed after this call, so a channel that sends later copies
        it."""

    def finish(self, version: int) -> None:
        """Wait until every engine has all weights, has emptied its prefix cache, whose keys and
        values the old weights computed, and calls its weights `version`."""


def sync_weights(
    parameters: Iterable[tuple[str, Callable[[], Tensor]]], version: int, channel: Channel | None
) -> int:
    """Send every parameter through the channel; returns how many there were.

    parameters: (Hugging Face's name, function that gathers the whole tensor, on all ranks together)
    in one order on all ranks. channel: gets begin(version), send(name, tensor) for each, and
    finish(version); None on every rank but the leading one; those others gather too, and drop what
    they get. One tensor is alive at a time. Where anything fails, `finish` is
    not reached, and the engines go on refusing: half of the new weights is no model at all.
    """
    # BEGIN SOLUTION
    count = 0
    if channel is not None:
        channel.begin(version)
    for name, gather in parameters:
        tensor = gather()  # every rank, or those that came wait for ever
        if channel is not None:
            channel.send(name, tensor)
        del tensor  # before the next one is there
        count += 1
    if channel is not None:
        channel.finish(version)
    return count
    # END SOLUTION
