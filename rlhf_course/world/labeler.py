"""The labeler's noise: how an order arises from utilities."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence


def plackett_luce(utilities: Sequence[float], gain: float, rng: random.Random) -> list[int]:
    """Draw an order, best first, from the Plackett-Luce distribution with scores gain * utility.

    Sorting by score plus standard Gumbel noise is such a draw (Yellott 1977), and any two
    items alone are then in Bradley-Terry order: P(i before j) = sigmoid(gain * (u_i - u_j)).

    Args:
        utilities: K numbers.
        gain: how sharply the labeler sees; 0 is a coin, large is the true order.
        rng: the source of noise; takes K draws.

    Returns:
        The K indices, best first.
    """
    # 1 - random() lies in (0, 1], and -log of it in [0, 37): the tiny number keeps log defined.
    noise = [-math.log(-math.log(1.0 - rng.random()) + 1e-300) for _ in utilities]
    keys = [gain * u + g for u, g in zip(utilities, noise, strict=True)]
    return sorted(range(len(keys)), key=lambda i: -keys[i])


def sigmoid(x: float) -> float:
    """1 / (1 + exp(-x)) without overflow."""
    return 1.0 / (1.0 + math.exp(-x)) if x >= 0 else 1.0 - 1.0 / (1.0 + math.exp(x))
