"""Figures: what is plotted is what was measured, named, and told apart by everyone."""

import ast
import math
import random
from itertools import combinations
from pathlib import Path

import matplotlib
import numpy as np
import pytest
from made_up_runs import RUNS, SHARES, ppo_rows
from matplotlib.colors import to_rgb

from rlhf_course import plots
from rlhf_course.plots import stages, style


def lines_of(ax) -> list[np.ndarray]:
    """Every line as (2, N): x and y."""
    return [np.array(line.get_data(), dtype=float) for line in ax.lines]


def has_line(ax, x, y) -> bool:
    """Whether exactly these points were plotted."""
    wanted = np.array([x, y], dtype=float)
    return any(line.shape == wanted.shape and np.array_equal(line, wanted) for line in lines_of(ax))


def panel(figure, title: str):
    """The axes with this title."""
    (ax,) = [ax for ax in figure.axes if ax.get_title(loc="left") == title]
    return ax


def test_smoothing_is_a_centred_mean_of_what_is_there():
    values = np.array([random.Random(2).random() for _ in range(50)])
    out = plots.smooth(values, 7)
    expected = [values[max(i - 3, 0) : i + 4].mean() for i in range(50)]
    np.testing.assert_allclose(out, expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(plots.smooth(values, 1), values, rtol=0, atol=1e-12)
    assert len(plots.smooth([])) == 0
    spike = plots.smooth(
        np.eye(1, 2000, 1000)[0]
    )  # of 5 % = 100 values no more than 41 are averaged
    assert np.count_nonzero(spike > 1e-9) == 41


@pytest.mark.parametrize("stage", stages.PANELS)
def test_every_metric_of_a_stage_is_drawn_as_it_is(stage):
    rows = RUNS[stage]
    figure = plots.stage_curves(stage, rows)
    drawn = 0
    for spec in stages.PANELS[stage]:
        curves = [c for c in spec.curves if any(c.key in row for row in rows)]
        if not curves:
            continue
        ax = panel(figure, spec.title)
        for curve in curves:
            having = [row for row in rows if curve.key in row]
            x, y = [row["step"] for row in having], [row[curve.key] for row in having]
            assert has_line(ax, x, y), f"{curve.key} is not in the panel {spec.title}"
            smoothed = 2 * len(y) >= len(rows) and curve.key not in stages.SETTINGS
            if np.ptp(y) > 0:  # else both lines are one
                assert has_line(ax, x, plots.smooth(y)) == smoothed, f"{curve.key}: smoothed?"
            drawn += 1
        names = [t.get_text() for t in ax.get_legend().get_texts()] if ax.get_legend() else []
        assert names == ([c.label for c in curves] if len(curves) > 1 else [])
        assert ax.get_xlabel()
        assert ax.get_ylabel()
    assert drawn >= 4
    assert all(ax.get_title(loc="left") for ax in figure.axes)


def test_panels_without_data_are_left_out():
    titles = {ax.get_title(loc="left") for ax in plots.stage_curves("ppo", RUNS["ppo"]).axes}
    fewer = plots.stage_curves("ppo", ppo_rows(ptx=False))
    assert titles - {ax.get_title(loc="left") for ax in fewer.axes} == {"Pretraining loss (ptx)"}
    norms = panel(fewer, "Gradient norms by loss")
    assert norms.get_legend() is None  # PPO's alone is left
    assert plots.stage_curves("sft", []).axes == []


@pytest.mark.parametrize(("norms", "expected"), [([0, 0, 0], "linear"), ([0, 2, 0], "log")])
def test_a_gradient_that_is_zero_all_along_has_no_logarithm(norms, expected, recwarn):
    rows = [{**row, "grad_norm": n} for row, n in zip(RUNS["reward_model"], norms, strict=False)]
    figure = plots.stage_curves("reward_model", rows)
    figure.canvas.draw()
    assert panel(figure, "Gradient norm").get_yscale() == expected
    assert not list(recwarn)


def test_ppo_shows_the_target_and_the_critics_warmup():
    figure = plots.stage_curves("ppo", RUNS["ppo"], kl_target=1.25)
    kl = panel(figure, "KL to the reference")
    assert has_line(kl, [0, 1], [1.25, 1.25])
    for ax in figure.axes:
        (shade,) = ax.patches
        assert (shade.get_x(), shade.get_width()) == (-0.5, 4.0)  # iterations 0 to 3
    low, high = panel(figure, "Explained variance").get_ylim()
    assert (low, high) == (-1, 1.05)  # the first values, down to -3, are cut off and it says so
    assert panel(figure, "KL coefficient β").get_ylim()[0] == 0
    assert panel(figure, "Largest ratio new / old").get_yscale() == "log"


def test_kl_control_shows_band_and_last_twenty():
    rows, target = ppo_rows(60, slope=0.06), 1.5
    figure = plots.kl_control(rows, target, band=0.2)
    above, below = figure.axes
    (band,) = above.patches
    assert band.get_y() == pytest.approx(1.2)
    assert band.get_height() == pytest.approx(0.6)
    kl = [row["kl"] for row in rows]
    assert has_line(above, range(60), kl)
    assert has_line(above, range(60), plots.smooth(kl, 5))
    mean = sum(kl[-20:]) / 20
    ends = [line for line in lines_of(above) if line.shape == (2, 2) and line[0, 0] == 40]
    np.testing.assert_allclose(ends, [[[40, 59], [mean, mean]]], rtol=0, atol=1e-12)
    assert f"{mean:.3g} ({mean / target - 1:+.0%})" in above.get_legend().get_texts()[-1].get_text()
    assert has_line(below, range(60), [row["kl_coef"] for row in rows])


def test_overoptimisation_plots_gains_over_the_root_of_the_kl():
    slow, fast = ppo_rows(), ppo_rows(slope=0.5)
    fast[4]["kl"] = -0.01  # an estimate may fall below 0
    n = [1, 2, 4]
    best = {"n": n, "kl": [math.log(k) - (k - 1) / k for k in n], "gold": [0.5, 0.9, 1.1],
            "proxy": [0.2, 0.8, 1.3]}  # fmt: skip
    figure = plots.overoptimisation({"slow": slow, "fast": fast}, best)
    proxy, gold = figure.axes
    for ax, key in ((proxy, "reward"), (gold, "gold")):
        for rows in (slow, fast):
            start = np.mean([row[key] for row in rows if row["kl"] == 0])
            root = [math.sqrt(max(row["kl"], 0)) for row in rows]
            gain = [row[key] - start for row in rows]
            assert any(
                line.shape == (2, 40) and np.allclose(line, [root, gain], rtol=0, atol=1e-12)
                for line in lines_of(ax)
            )
        assert "√KL" in ax.get_xlabel()
        assert "gain over SFT" in ax.get_ylabel()
    root = np.sqrt(best["kl"])
    assert any(
        np.allclose(line, [root, [0, 0.4, 0.6]]) for line in lines_of(gold) if line.size == 6
    )
    assert any(
        np.allclose(line, [root, [0, 0.6, 1.1]]) for line in lines_of(proxy) if line.size == 6
    )
    labels = [text.get_text() for text in proxy.get_legend().get_texts()]
    assert labels == ["slow", "fast", "best of n = 1 … 4"]
    assert all(np.isfinite(line).all() for ax in figure.axes for line in lines_of(ax))
    colours = {line.get_color() for line in proxy.lines if line.get_label() in ("slow", "fast")}
    assert len(colours) == 2


def test_without_gold_the_proxy_alone_is_drawn_and_without_a_raw_reward_the_score():
    rows = [{k: v for k, v in row.items() if k not in ("gold", "reward")} for row in ppo_rows()]
    proxy, gold = plots.overoptimisation({"run": rows}).axes
    start = np.mean([row["score"] for row in rows if row["kl"] == 0])
    np.testing.assert_allclose(lines_of(proxy)[1][1], [row["score"] - start for row in rows])
    assert len(proxy.lines) == 4  # zero, data, path, end
    assert len(gold.lines) == 1


def test_honesty_bars_are_stacked_shares():
    figure = plots.honesty(SHARES)
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["known", "strangers"]
    order = ["true", "idk", "false", "bad"]
    for ax, group in zip(figure.axes, ("known", "strangers"), strict=True):
        for container, kind in zip(ax.containers, order, strict=True):
            before = order[: order.index(kind)]
            for bar, tables in zip(container, SHARES.values(), strict=True):
                table = tables[group]
                assert bar.get_width() == pytest.approx(table.get(kind, 0.0))
                assert bar.get_x() == pytest.approx(sum(table[b] for b in before))
                assert bar.get_facecolor()[:3] == pytest.approx(to_rgb(style.VERDICTS[kind][1]))
        assert [t.get_text() for t in ax.get_yticklabels()] == ["before", "after"]
    written = {text.get_text() for text in figure.axes[1].texts}
    assert {"70%", "15%", "10%", "88%"} <= written
    assert "5%" not in written  # too narrow to write in


def test_bars_of_perplexity_and_accuracy():
    (ax,) = plots.perplexity_bars({"pretrained": 2.0, "SFT": 2.1, "no ptx": 21.0}, 2.0).axes
    assert [bar.get_width() for bar in ax.patches] == [2.0, 2.1, 21.0]
    assert has_line(ax, [2.1, 2.1], [0, 1])
    assert [text.get_text() for text in ax.texts] == ["2  (×1)", "2.1  (×1.05)", "21  (×10.5)"]
    models = {"eos": {"eval_accuracy": 0.75, "bayes_closed_book": 0.8, "bayes_full": 0.85},
              "mean": {"eval_accuracy": 0.7}}  # fmt: skip
    figure = plots.reward_accuracy(models)
    (ax,) = figure.axes
    assert [bar.get_width() for bar in ax.patches] == [0.75, 0.7]
    assert has_line(ax, [0.8, 0.8], [0, 1])
    assert has_line(ax, [0.85, 0.85], [0, 1])
    assert ax.get_xlabel()
    (ax,) = plots.reward_accuracy({"unmeasured": {}, "eos": models["eos"]}).axes
    assert [bar.get_width() for bar in ax.patches] == [0.75]  # no bar for what was not measured


# Machado, Oliveira and Fernandes 2009, Table 1, severity 1.0: on linear RGB.
BLINDNESS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216],
               [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413],
               [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602],
               [0.004733, 0.691367, 0.303900]],
}  # fmt: skip


SRGB_TO_XYZ = np.array(
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
)


def lab(colour: str, seen: str) -> np.ndarray:
    """A colour as a colour-blind eye sees it, in CIE Lab."""
    rgb = np.array(to_rgb(colour))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    linear = np.clip(np.array(BLINDNESS[seen]) @ linear, 0, 1)
    to_xyz = np.array(
        [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    )
    xyz = to_xyz @ linear / np.array([0.9505, 1.0, 1.089])
    f = np.where(xyz > (6 / 29) ** 3, np.cbrt(xyz), xyz / (3 * (6 / 29) ** 2) + 4 / 29)
    return np.array([116 * f[1] - 16, 500 * (f[0] - f[1]), 200 * (f[1] - f[2])])


@pytest.mark.parametrize("seen", BLINDNESS)
def test_colours_that_meet_in_a_panel_differ_to_the_colour_blind(seen):
    verdicts = {style.VERDICTS[kind][1] for kind in ("true", "idk", "false", "bad")}
    meeting = [*combinations(sorted(verdicts), 2)]
    meeting += [
        tuple(c.colour for c in pair)
        for specs in stages.PANELS.values() for spec in specs if "Kinds" not in spec.title
        for pair in combinations(spec.curves, 2) if "bayes" not in pair[0].key
    ]  # fmt: skip
    for one, other in meeting:
        assert np.linalg.norm(lab(one, seen) - lab(other, seen)) > 15, (one, other)


def test_figures_need_no_backend_and_leave_the_settings_alone(tmp_path):
    for file in Path(plots.__file__).parent.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            assert "pyplot" not in getattr(node, "module", "") or ""
            assert not (isinstance(node, ast.Attribute) and node.attr in ("use", "rcParams"))
    before = dict(matplotlib.rcParams)
    plots.perplexity_bars({"a": 2.0}).savefig(tmp_path / "a.png")
    plots.stage_curves("sft", RUNS["sft"]).savefig(tmp_path / "b.svg")
    assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "a.png").stat().st_size > 1000
