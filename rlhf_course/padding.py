"""Ragged rows as one tensor, with few different shapes.

A CPU's bf16 kernels are compiled for each shape that they meet, and kept. Measured on one core
(layers of width 128, 4,000 tokens): 21 ms a step when the shape repeats, 49 ms and 10 MB of memory
more when it is new. So rows are padded to a multiple of 8 tokens: at most 7 columns of waste for
an eighth of the shapes.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

MULTIPLE = 8
CPU_TOKENS = 2048
"""Tokens that a CPU reads at a time where nothing else is said: enough to keep matrix products
busy, few enough that rows are of like length and activations stay near the core."""


def padded_length(longest: int, limit: int | None = None) -> int:
    """`longest` rounded up to a multiple of 8, but not beyond `limit` (a model's context)."""
    length = -(-longest // MULTIPLE) * MULTIPLE
    return length if limit is None else max(min(length, limit), longest)


def rounded_count(count: int) -> int:
    """A number of rows that repeats: rounded up by less than an eighth, to one of 8 numbers from
    one power of two to the next."""
    step = 1 << max(count.bit_length() - 4, 0)
    return -(-count // step) * step


def last_places(rows: int, length: int, device: torch.device) -> Tensor:
    """(rows,) long: where the last column of each row lies, rows (B, T) read as B T places."""
    return torch.arange(length - 1, rows * length, length, device=device)


def pad_rows(rows: list[list[int]], fill: int = 0, limit: int | None = None) -> Tensor:
    """(B, T) long: the rows, filled up on the right; T as `padded_length` says."""
    length = padded_length(max(map(len, rows)), limit)
    return torch.tensor([row + [fill] * (length - len(row)) for row in rows])


def like_lengths(
    lengths: Sequence[int], rows: int | None, device: torch.device, limit: int | None = None
) -> list[list[int]]:
    """Which rows share a pass: those of like length, the longest first, so that little is padded.

    rows: at most so many. None: all at once, except on a CPU, where more than `CPU_TOKENS` are read
    in parts of a power of two of rows. That reads a batch of ragged rows in half the time (32 rows
    of 32 to 400 tokens), and with few different shapes. limit: the model's context.
    """
    order = sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True)

    def room(longest: int) -> int:
        """How many rows of this length a part has."""
        if rows is not None:
            return rows
        if device.type != "cpu":
            return len(order)
        fit = CPU_TOKENS // max(padded_length(longest, limit), 1)
        return 1 << (max(fit, 1).bit_length() - 1)

    if rows is None and len(order) * padded_length(max(lengths, default=0), limit) <= CPU_TOKENS:
        return [list(range(len(order)))] if order else []
    parts, start = [], 0
    while start < len(order):
        parts.append(order[start : start + room(lengths[order[start]])])
        start += len(parts[-1])
    return parts
