"""The figures of chapters 5 and 6 say what their captions promise."""

import numpy as np
import pytest

from rlhf_course.plots import lessons_ppo as ppo_figures
from rlhf_course.plots import lessons_ppo_ptx as ptx_figures
from rlhf_course.ppo import AdaptiveKLController, FixedKLController, policy_loss, value_loss


def rows(count: int = 12, shift: float = 0.0) -> list[dict]:
    keys = [*ppo_figures.PANELS, "reward"]
    return [{"step": i, **dict.fromkeys(keys, 0.1 * i + shift + 0.5)} for i in range(count)]


def labelled(figure) -> None:
    """Every panel has a title or axis labels; the figure can be drawn."""
    figure.canvas.draw()
    for ax in figure.axes:
        assert ax.get_xlabel() or ax.get_ylabel() or ax.get_title(loc="left")


def test_surrogate_touches_the_true_return_where_the_batch_was_sampled():
    steps = np.array([-1e-4, 0.0, 1e-4, 2.0])
    curves = ppo_figures.two_step_task(steps)
    at_old = [curves[name][1] for name in ("true", "surrogate", "bound", "clipped")]
    assert np.ptp(at_old) < 1e-12
    slopes = [(curves[n][2] - curves[n][0]) / 2e-4 for n in ("true", "surrogate", "clipped")]
    assert np.ptp(slopes) < 1e-6
    assert curves["surrogate"][3] > curves["true"][3]


def test_the_bound_is_below_the_true_return_everywhere():
    curves = ppo_figures.two_step_task(np.linspace(-4, 6, 500))
    assert (curves["bound"] <= curves["true"] + 1e-12).all()
    assert (curves["clipped"] <= curves["surrogate"] + 1e-12).all()


def test_terms_are_those_of_the_loss():
    import torch

    ratio = torch.tensor([0.5, 1.0, 1.5, 3.5])
    value, slope = ppo_figures._terms(policy_loss, ratio, 1.0, None)
    assert value == pytest.approx([0.5, 1.0, 1.2, 1.2], rel=1e-5)
    assert slope == pytest.approx([0.5, 1.0, 0.0, 0.0], rel=1e-5)
    value, slope = ppo_figures._terms(policy_loss, ratio, -1.0, 3.0)
    assert value == pytest.approx([-0.8, -1.0, -1.5, -3.0], rel=1e-5)
    assert slope == pytest.approx([0.0, -1.0, -1.5, 0.0], rel=1e-5)


@pytest.mark.parametrize(
    ("horizon", "swings"), [(640, True), (20480, False)], ids=["short", "four times slower"]
)
def test_a_controller_swings_where_its_theory_says(horizon, swings):
    # s = 0.1, n = 256: calm from a horizon of 4 n / s = 10240 on. Near the target, without noise.
    controller = AdaptiveKLController(0.22, 1.5, horizon)
    kl, seen = 0.3 / 0.22, []
    for _ in range(2000):
        seen.append(kl)
        price = controller.value
        controller.update(kl, 256)
        kl += 0.1 * (0.3 / price - kl)
    assert (max(seen) > 1.5 * 1.001) == swings
    assert seen[-1] == pytest.approx(1.5, rel=0.02)


def test_figures_of_chapter_5_are_drawn_and_labelled():
    labelled(ppo_figures.surrogate_bound())
    labelled(ppo_figures.clipped_objective(policy_loss))
    labelled(ppo_figures.repeated_updates({"yours": policy_loss}))
    labelled(ppo_figures.whitening({"raw": [[1.0, 2.0], [0.0, -1.0]]}, ("good", "bad")))
    labelled(ppo_figures.clipped_value(value_loss))
    controllers = {"fixed": FixedKLController(0.1), "H": AdaptiveKLController(0.5, 1.5, 640)}
    labelled(ppo_figures.step_responses(controllers, 1.5))
    labelled(ppo_figures.bands([rows(), rows(10, 1.0)], ["reward", "kl"], rows(), target=1.0))
    broken = {"one": (rows(8), ("reward", "kl")), "two": (rows(9), ("gold",))}
    figure = ppo_figures.gallery([rows(), rows(shift=0.2)], broken)
    labelled(figure)
    assert len(figure.axes) == 3


def test_figures_of_chapter_6_are_drawn_and_labelled():
    runs = {"on": [rows(), rows()], "off": [rows(shift=1.0)]}
    labelled(ptx_figures.forgetting(runs, 2.0, 11.0))
    labelled(ptx_figures.gradient_balance({"token mean": 9.0, "sum": 423.0}, [0.5, 2.0]))
    labelled(ptx_figures.moments_over_time([0.0, 1.0], {"running": [(0.0, 1.0), (0.5, 1.1)]}))
    labelled(ptx_figures.preserved_values([0.0, 1.0], {"alone": [2.0, 3.0], "PopArt": [0.0, 1.0]}))
    labelled(ptx_figures.sign_flip({"rank 0": [4, 3, 2, 1], "rank 1": [0, -1, -2, -3]}))
    measured = [
        {"order": order, "answers": n, "flipped": 0.1, "cosine": 0.9}
        for order in ("shuffled", "sorted") for n in (2, 4)
    ]  # fmt: skip
    labelled(ptx_figures.ranks_disagree(measured))


def test_ablation_shows_mean_and_spread():
    columns = {"gold": "gold", "forgetting": "perplexity / pretrained"}
    results = {
        "everything on": [{"gold": 1.0, "forgetting": 1.0}, {"gold": 2.0, "forgetting": 1.1}],
        "no ptx": [{"gold": 1.0, "forgetting": 9.0}, {"gold": 1.2, "forgetting": 11.0}],
    }
    labelled(ptx_figures.ablation(results, columns))
    table = ptx_figures.table(results, columns).splitlines()
    assert table[2] == "| everything on | **1.50** (1.00 … 2.00) | **1.05** (1.00 … 1.10) |"
    assert table[3] == "| no ptx | **1.10** (1.00 … 1.20) | **10.00** (9.00 … 11.00) |"
