"""The figures of chapters 3 and 4 draw what they are given, named and with units."""

import math

import numpy as np
import pytest
from made_up_runs import RUNS as ROWS
from made_up_runs import ppo_rows
from matplotlib.collections import LineCollection

from rlhf_course.plots import lessons_mdp as mdp
from rlhf_course.plots import lessons_reward_model as rm

WORDS = ["Where", "?", "They", "live", "EOS", "pad"]
SCORES = [0.1, 0.2, -1.0, 0.5, 2.0]
KINDS = {"known": {"true": [1.0, 3.0], "idk": [0.0]}, "strangers": {"false": [-2.0, -1.0]}}

FIGURES = {
    "raters": lambda: rm.raters([0.0, 1.0, 2.0], {"a": [1.0, 2.0, 3.0], "b": [5.0, 4.0, 6.0]}),
    "gumbel_duel": lambda: rm.gumbel_duel(2.0, [-1.0, 0.0, 1.0], [0.3, 0.5, 0.7]),
    "pairwise_loss_shape": lambda: rm.pairwise_loss_shape([-1.0, 0.0, 1.0], [1.3, 0.7, 0.3]),
    "kwise_pairs": lambda: rm.kwise_pairs(["best", "middle", "\x0bwo\u4e2drst"]),
    "token_scores": lambda: rm.token_scores(
        {"last": [("true", WORDS[:5], SCORES)], "mean": [("true", WORDS[:5], SCORES)]}, 2
    ),
    "accuracy_by_seed": lambda: rm.accuracy_by_seed({"a": [0.7, 0.72], "b": [0.68]}, 0.8, 0.84),
    "reliability": lambda: rm.reliability({"a": [(0.2, 0.25, 40), (0.8, 0.7, 60)]}),
    "score_distributions": lambda: rm.score_distributions(KINDS),
    "score_over": lambda: rm.score_over([0, 1], {"a": [1.0, 1.0], "b": [1.0, 3.0]}, "t", "pads"),
    "unhealthy_reward_models": lambda: rm.unhealthy_reward_models(
        ROWS["reward_model"], {"broken": ROWS["reward_model"]}
    ),
    "shift_by_one": lambda: mdp.shift_by_one(["They", "EOS"], [0.9, 1.0], [0.0, 0.1]),
    "baseline": lambda: mdp.baseline(np.arange(50.0), np.arange(20.0, 30.0), 25.0),
    "gae_weights": lambda: mdp.gae_weights((0.0, 0.5, 1.0), 6),
    "kl_estimators": lambda: mdp.kl_estimators([0.1, 0.2], {"k1": [0.3, 0.0], "k3": [0.1, 0.3]}),
    "credit": lambda: mdp.credit(["They", "EOS"], [0.5, 1.0], {"λ = 1": [1.0, -0.5]}, 1.5),
    "compare_runs": lambda: mdp.compare_runs({"a": [ppo_rows(), ppo_rows(slope=0.1)]}),
    "gradient_variance": lambda: mdp.gradient_variance(
        {"no baseline": [4.0, 5.0], "V": [1.0, 2.0]}
    ),
    "lambda_tradeoff": lambda: mdp.lambda_tradeoff([0.0, 1.0], [[1.0], [2.0]], [[0.5], [-0.1]]),
    "unhealthy_runs": lambda: mdp.unhealthy_runs(ppo_rows(), {"a": ppo_rows(), "b": ppo_rows()}),
}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("name", FIGURES)
def test_every_panel_is_named_and_measured(name, tmp_path):
    figure = FIGURES[name]()
    figure.savefig(tmp_path / "figure.png", dpi=40)
    assert figure.axes
    assert any(ax.get_title(loc="left") for ax in figure.axes)
    for ax in figure.axes:
        row = [ax, *ax.get_shared_y_axes().get_siblings(ax)]  # the first of them says it for all
        named = [label.get_text() for panel in row for label in panel.get_yticklabels()]
        assert any(panel.get_ylabel() for panel in row) or any(named), "neither unit nor names"


def test_three_pairs_of_three_answers_are_drawn():
    table = FIGURES["kwise_pairs"]().axes[0]
    assert sorted(t.get_text() for t in table.texts if t.get_text()) == [
        "s1 − s2", "s1 − s3", "s2 − s3"
    ]  # fmt: skip


def test_raters_are_told_how_many_pairs_they_order_rightly():
    right = FIGURES["raters"]().axes[1]
    assert [bar.get_width() for bar in right.patches] == pytest.approx([1.0, 2 / 3])


def test_the_reward_is_marked_where_it_is_read():
    last, mean = FIGURES["token_scores"]().axes
    assert [t.get_text() for t in last.texts] == ["reward +2.0"]
    assert [t.get_text() for t in mean.texts] == ["reward +0.5"]  # the mean of -1, 0.5 and 2
    (line,) = [c for c in mean.collections if isinstance(c, LineCollection)]
    assert line.get_segments()[0][:, 1] == pytest.approx([0.5, 0.5])


def test_the_action_axis_is_shifted_by_one():
    figure = mdp.action_axis(WORDS, prompt=2, response=3)
    texts = [t.get_text() for t in figure.axes[0].texts]
    assert texts[:6] == WORDS
    assert sum(text.startswith("a = ") for text in texts) == len(WORDS) - 1
    asked = [text for text in texts if text in ("yes", "–")]
    assert asked == ["–", "yes", "yes", "yes", "–"]
    (score,) = [t for t in figure.axes[0].texts if "score" in t.get_text()]
    assert score.xy[0] == 3  # the action that emitted EOS


@pytest.mark.parametrize("lam", [0.0, 0.3, 0.95, 1.0])
def test_the_weights_of_gae_sum_to_one(lam):
    left, right = mdp.gae_weights((lam,), 7).axes
    assert sum(left.lines[0].get_ydata()) == pytest.approx(1.0)
    assert right.lines[0].get_ydata()[0] == 1.0
    assert right.lines[0].get_ydata()[-1] == pytest.approx(lam**6)


def test_bias_is_drawn_with_two_standard_errors():
    exact, estimate = [0.1, 0.2, 0.3], [0.2, 0.2, 0.5]
    bias = mdp.kl_estimators(exact, {"k1": estimate}).axes[1]
    differences = np.subtract(estimate, exact)
    (bars,) = [c for c in bias.collections if isinstance(c, LineCollection)]
    low, high = bars.get_segments()[0][:, 1]
    assert (low + high) / 2 == pytest.approx(differences.mean())
    assert (high - low) / 2 == pytest.approx(2 * differences.std() / math.sqrt(3))


def test_broken_runs_stand_beside_the_healthy_one():
    healthy, broken = ppo_rows(), ppo_rows(slope=0.3)
    figure = mdp.unhealthy_runs(healthy, {"KL": broken})
    grey, orange = figure.axes[1].lines[:2]
    assert orange.get_ydata()[-1] > 3 * grey.get_ydata()[-1]
