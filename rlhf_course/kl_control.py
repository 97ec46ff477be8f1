"""A KL controller that holds its target: Ziegler's, with a proportional term beside it.

Ziegler's controller (`ppo.AdaptiveKLController`) is an integrator in log β: it adds up past errors.
A policy begins at KL 0, far below any target, so the first thing the integrator does is to lower
the price, for as long as the policy needs to get there. It arrives with a price too low, shoots
past, and the price needs as long to recover.

The classical remedy is a proportional term, which answers the error of this very batch: the price
is low while the KL is far below its target, and rises as the KL approaches, a brake before the
line instead of behind it. Stooke et al. 2020, "Responsive Safety in Reinforcement Learning by PID
Lagrangian Methods", make the same case for constraints in general.
"""

from __future__ import annotations

import math

from rlhf_course.ppo import AdaptiveKLController


class PIKLController(AdaptiveKLController):
    """value = base · exp(gain · e),  e = clip(KL / target - 1, -1, 1).

    `base` is Ziegler's coefficient, updated as he does; `value` is the price to use. A gain of 0 is
    Ziegler's controller.
    """

    def __init__(
        self,
        kl_coef: float,
        target: float,
        horizon: float = 10000,
        floor: float = 0.0,
        gain: float = 1.0,
    ):
        super().__init__(kl_coef, target, horizon, floor)
        self.base, self.gain = kl_coef, gain
        self.value = self._price(-1.0)  # the policy begins at KL 0

    def _price(self, error: float) -> float:
        return max(self.base * math.exp(self.gain * error), self.floor)

    def update(self, kl: float, episodes: int) -> float:
        """The price for the next rollout batch; arguments and errors as in the base class."""
        used, self.value = self.value, self.base
        try:
            self.base = super().update(kl, episodes)
        except ValueError:  # nothing has changed
            self.value = used
            raise
        self.value = self._price(min(max(kl / self.target - 1.0, -1.0), 1.0))
        return self.value

    def state_dict(self) -> dict[str, float]:
        """Price and integrator."""
        return {**super().state_dict(), "base": self.base}

    def load_state_dict(self, state: dict[str, float]) -> None:
        """Put both back."""
        super().load_state_dict(state)
        self.base = state["base"]
