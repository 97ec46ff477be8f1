"""The machine's own limit: how many operations a second its matrix product does."""

from __future__ import annotations

from collections.abc import Callable

import torch

from peers.cases import Case

SIZE, TIMES = 2048, 8


def matmul(case: Case, turn: Callable[..., None]) -> None:
    """Products of square matrices in the dtype of the case."""
    dtype = getattr(torch, case.dtype)
    a, b = (torch.randn(SIZE, SIZE).to(dtype) for _ in range(2))
    turn()
    while True:
        for _ in range(TIMES):
            a @ b
        turn(operations=2 * SIZE**3 * TIMES)


def training_operations(case: Case) -> int:
    """Of a forward and backward pass, for each token: 6 for every parameter (Kaplan et al. 2020,
    section 2.1), positions aside."""
    return 6 * (case.shape.numbers - case.shape.context * case.shape.width)


def done_operations(case: Case) -> float:
    """The same for what is done: the head, and what stands behind attention in the last block
    (9 D squared of its 12), are multiplied with the tokens of the answers alone."""
    shape, lengths = case.shape, case.lengths(case.rows * case.updates)
    asked = sum(a for _, a in lengths) / sum(p + a for p, a in lengths)
    left_out = (1 - asked) * 9 * shape.width**2
    return 6 * (shape.matrices - left_out + asked * shape.vocabulary * shape.width)
