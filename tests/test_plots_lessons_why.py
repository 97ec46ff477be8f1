"""The figures of chapters 7 and 8: what they draw is what they were given."""

import math

import numpy as np
import pytest

from rlhf_course.evaluation import ReliabilityBin, best_of_n_kl, wilson_interval
from rlhf_course.plots import lessons_behaviour as behaviour
from rlhf_course.plots import lessons_beyond_ppo as beyond
from rlhf_course.plots import lessons_why_rlhf as why


def rows(seed=0, n=24, **more):
    """Metrics of a PPO run as the trainer writes them."""
    return [
        {"step": i, "kl": 0.0 if i < 3 else 0.1 * i, "reward": 0.02 * i + seed,
         "gold": 0.3 + 0.01 * i - seed, "entropy": 0.7, "length": 12.0,
         "share_malformed": 0.1} | more
        for i in range(n)
    ]  # fmt: skip


def drawn(ax):
    """The lines of an axis as (2, N) arrays."""
    return [np.array(line.get_data(), dtype=float) for line in ax.lines]


def labelled(figure):
    """Every axis that is drawn on says what it shows, with units."""
    figure.canvas.draw()  # a figure that cannot be drawn fails here
    return all(ax.get_xlabel() or ax.get_ylabel() for ax in figure.axes)


def test_coverage_is_the_exact_share_of_experiments_that_are_right():
    figure = why.coverage({"Wilson": wilson_interval}, count=10)
    assert labelled(figure)
    line = drawn(figure.axes[0])[0]
    place = int(np.argmin(np.abs(line[0] - 0.3)))
    p = line[0, place]
    right = sum(
        math.comb(10, k) * p**k * (1 - p) ** (10 - k)
        for k in range(11)
        if wilson_interval(k / 10, 10)[0] <= p <= wilson_interval(k / 10, 10)[1]
    )
    assert line[1, place] == pytest.approx(right, abs=1e-9)


def test_reliability_draws_every_bin_of_every_model():
    curve = [ReliabilityBin(0.25, 0.3, 50), ReliabilityBin(0.75, 0.7, 60)]
    figure = why.reliability({"a": curve, "b": curve[:1]}, ["ECE 0.05", "ECE 0.05"])
    assert labelled(figure)
    points = [line for line in drawn(figure.axes[0]) if np.allclose(line[0], [0.25, 0.75])]
    assert any(np.allclose(line[1], [0.3, 0.7]) for line in points)


def test_best_of_n_stands_over_the_root_of_its_kl():
    n = [1, 2, 4]
    table = {
        "n": n, "kl": [best_of_n_kl(k) for k in n], "proxy": [0, 0.4, 0.7], "gold": [0, 0.2, 0.3],
        "proxy_error": [0, 0.1, 0.1], "gold_error": [0, 0.1, 0.1], "gold_slope": 0.5,
    }  # fmt: skip
    figure = why.best_of_n_curves({"town": table})
    assert labelled(figure)
    lines = [line for line in drawn(figure.axes[0]) if line.shape == (2, 3)]
    root = np.sqrt(table["kl"])
    assert any(np.allclose(line, [root, table["gold"]]) for line in lines)
    assert any(np.allclose(line, [root, 0.5 * root]) for line in lines)  # the predicted start


def test_paths_are_gains_and_leave_out_a_proxy_that_is_none():
    runs = {"held": [rows(0), rows(1)], "control": [rows(2)]}
    figure = why.paths(runs, slopes=(1.0, 0.5), no_proxy=["control"])
    assert labelled(figure)
    proxy, gold = figure.axes
    assert len(gold.lines) - len(proxy.lines) == 2  # its path and its end
    starts = [line[1, 0] for line in drawn(gold) if line.shape == (2, 24)]
    assert len(starts) == 3
    assert np.allclose(starts, 0, atol=0.02)  # whatever the gold of SFT was


def test_worths_are_the_shares_above_each_worth():
    figure = why.worths({"SFT": [[3.0, 1.0, 2.0, 0.0]]}, best=2.5)
    assert labelled(figure)
    line = drawn(figure.axes[0])[0]
    assert np.allclose(line, [[0, 1, 2, 3], [1, 0.75, 0.5, 0.25]])


def test_the_healthy_band_spans_the_seeds():
    figure = why.healthy_and_broken([rows(0), rows(1)], {"broken": [rows(0, 30)]}, ["kl", "reward"])
    assert labelled(figure)
    kl, reward = figure.axes
    band = reward.collections[0].get_paths()[0].vertices
    assert band[:, 1].max() - band[:, 1].min() >= 1  # the seeds differ by 1
    assert max(len(line[0]) for line in drawn(kl)) == 30


def test_acceptance_and_phrasing_draw_every_form_and_seed():
    forms = {"The {n} was {a}.": [0.0, 0.0], "Such a {a} {n}.": [2.0, 3.0]}
    figure = behaviour.acceptance(forms, forms, {**forms, "Such a {a} {n}.": []})
    assert labelled(figure)
    points = {"SFT": [{"gold": 0.1, "entropy": 1.4, "kl": 0.0}] * 3,
              "PPO": [{"gold": 1.1, "entropy": 1.0, "kl": 3.5}]}  # fmt: skip
    figure = behaviour.phrasing(points, {"all alike": 2.0})
    assert labelled(figure)
    points = [line for line in drawn(figure.axes[0]) if line.shape == (2, 3)]
    assert np.allclose(points, [[[0.1] * 3, [1.4] * 3]])


def test_kinds_of_answer_add_up_and_show_the_seeds():
    shares = {"true": 0.6, "idk": 0.1, "false": 0.3, "bad": 0.0}
    other = {"true": 0.4, "idk": 0.3, "false": 0.3, "bad": 0.0}
    table = {"SFT": {"known": [shares]}, "PPO": {"known": [shares, other]}}
    figure = behaviour.kinds_of_answer(table, {"known": "Known"})
    assert labelled(figure)
    ax = figure.axes[0]
    assert sum(bar.get_width() for bar in ax.patches) == pytest.approx(2)  # two bars of 100 %
    assert any(np.allclose(line[0], [0.6, 0.4]) for line in drawn(ax) if line.shape == (2, 2))


def test_knowing_draws_one_panel_a_policy():
    unsure = {"known": [0.1, 0.2], "strangers": [3.0, 3.1]}
    admits = {"SFT": {"known": [0.1, 0.1], "strangers": [0.1, 0.2]},
              "PPO": {"known": [0.0, 0.0], "strangers": [0.9, 1.0]}}  # fmt: skip
    figure = behaviour.knowing(unsure, admits)
    assert labelled(figure)
    pairs = [line for line in drawn(figure.axes[1]) if line.shape == (2, 2)]
    assert any(np.allclose(line, [[3.0, 3.1], [0.9, 1.0]]) for line in pairs)


def test_tilted_bars_are_distributions():
    figure = beyond.tilted([0.5, 0.3, 0.2], [0.0, 1.0, -1.0], [1.0, 0.5])
    assert labelled(figure)
    heights = [bar.get_height() for bar in figure.axes[0].patches]
    assert np.allclose([sum(heights[i : i + 3]) for i in (0, 3, 6)], 1)
    assert heights[4] / heights[3] == pytest.approx(0.3 / 0.5 * math.e)  # β = 1


def test_dpo_weight_is_half_of_beta_where_the_policy_does_not_know():
    figure = beyond.dpo_weight([0.5])
    assert labelled(figure)
    line = drawn(figure.axes[0])[0]
    assert line[1, 120] == pytest.approx(0.25)


def test_baselines_and_difficulty_draw_what_they_are_given():
    assert labelled(beyond.baselines([2, 4], {"none": [9.0, 9.0], "leave one out": [1.0, 0.5]}))
    figure = beyond.difficulty({"RLOO": ([0.2, 0.5], [0.3, 0.5]), "GRPO": ([0.2, 0.5], [0.8, 1])})
    assert labelled(figure)
    assert np.allclose(drawn(figure.axes[0])[1], [[0.2, 0.5], [0.8, 1.0]])
    assert np.allclose(drawn(figure.axes[0])[0], [[0.2, 0.5], [0.6, 1.0]])  # of its own peak


def test_the_race_ends_at_the_runs_seconds_and_skips_rows_without_gold():
    dpo = [{"step": i, "loss": 0.6} | ({"kl": 0.1 * i, "gold": 0.1 * i} if i % 5 == 4 else {})
           for i in range(20)]  # fmt: skip
    figure = beyond.race({"PPO": [(rows(), 30.0), (rows(1), 40.0)], "DPO": [(dpo, 7.0)]})
    assert labelled(figure)
    ends = sorted(line[0, 0] for line in drawn(figure.axes[2]) if line.shape == (2, 1))
    assert ends == pytest.approx([7.0, 30.0, 40.0])


def test_ends_and_dpo_curves_can_be_drawn():
    end = {"gold": 1.0, "kl": 3.0, "seconds": 9.0}
    assert labelled(beyond.ends({"PPO": [end, end], "DPO": [end]}))
    run = [{"step": i, "logratio_chosen": 0.1 * i, "logratio_rejected": -0.3 * i}
           | ({"kl": 1.0, "gold": 0.5} if i % 4 == 3 else {}) for i in range(12)]  # fmt: skip
    figure = beyond.dpo_curves({"β = 0.1": run})
    assert labelled(figure)
    assert any(line.shape == (2, 12) for line in drawn(figure.axes[0]))
