"""The proportional-integral KL controller, on a simulated policy and in its details."""

import random

import pytest

from rlhf_course.kl_control import PIKLController
from rlhf_course.ppo import AdaptiveKLController

TARGET, EPISODES, HORIZON = 1.5, 256, 1280


def simulated_kl(controller, appetite: float, speed: float, iterations: int = 80) -> list[float]:
    """A policy whose KL moves towards appetite / price by `speed` of the way an iteration.

    That is what a policy does which gains `appetite` of reward for the first nat and pays
    `price` for each; measured with 5 % of noise.
    """
    rng, kl, seen = random.Random(0), 0.0, []
    for _ in range(iterations):
        seen.append(kl)
        controller.update(max(kl * (1 + rng.gauss(0, 0.05)), 0.0), EPISODES)
        kl += speed * (min(appetite / controller.value, 30.0) - kl)
    return seen


@pytest.mark.parametrize("appetite", [0.1, 0.2, 0.6])
@pytest.mark.parametrize("speed", [0.03, 0.06, 0.12])
def test_overshoots_less_arrives_earlier_and_holds_the_target(appetite, speed):
    ziegler = simulated_kl(AdaptiveKLController(0.3, TARGET, HORIZON), appetite, speed)
    ours = simulated_kl(PIKLController(0.3, TARGET, HORIZON), appetite, speed)

    def arrives(kls):
        return next(i for i, kl in enumerate(kls) if kl > 0.8 * TARGET)

    assert max(ours) < max(ziegler) - 0.02 * TARGET
    assert arrives(ours) < arrives(ziegler)
    assert abs(sum(ours[-20:]) / 20 / TARGET - 1) < 0.15


def test_gain_zero_is_ziegler():
    ours, ziegler = PIKLController(0.3, 1.5, 1280, gain=0), AdaptiveKLController(0.3, 1.5, 1280)
    for kl in (0.0, 0.4, 3.0, 1.5, 1.6):
        assert ours.update(kl, 256) == ziegler.update(kl, 256)


def test_price_by_hand():
    controller = PIKLController(0.2, target=2.0, horizon=1000, gain=1.0)
    assert controller.value == pytest.approx(0.2 / 2.718281828459045, rel=1e-12)
    # KL 2.2 is 10 % above: base 0.2 (1 + 0.1 * 100 / 1000) = 0.202, price 0.202 e^0.1
    assert controller.update(2.2, 100) == pytest.approx(0.202 * 1.1051709180756477, rel=1e-9)
    # KL 9: the integrator sees 20 %, the proportional term 100 %
    assert controller.update(9.0, 100) == pytest.approx(0.202 * 1.02 * 2.718281828459045, rel=1e-9)


def test_floor_state_and_refusal():
    controller = PIKLController(0.1, 2.0, 1000, floor=0.09)
    assert controller.value == 0.09 and controller.update(0.0, 100) == 0.09
    before = controller.state_dict()
    with pytest.raises(ValueError, match="nan"):
        controller.update(float("nan"), 100)
    assert controller.state_dict() == before
    twin = PIKLController(0.5, 2.0, 1000, floor=0.09)
    twin.load_state_dict(before)
    assert twin.update(3.0, 100) == controller.update(3.0, 100)
