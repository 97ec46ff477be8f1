"""The figures of chapter 4: actions, baselines, KL estimators, credit, and gradients' variance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch
from matplotlib.ticker import MaxNLocator

from rlhf_course.plots.style import (
    BAD,
    COLOURS,
    INK,
    LIGHT,
    RUNS,
    TEXT,
    Rows,
    dress,
    from_zero,
    legend,
    level,
    percent,
    scale,
    series,
    smooth,
)

POLICY, REFERENCE, CRITIC = COLOURS["policy"], COLOURS["reference"], COLOURS["critic"]
REWARD = COLOURS["reward"]


# ------------------------------------------------------------------------------------ the theory


def action_axis(words: Sequence[str], prompt: int, response: int) -> Figure:
    """The action axis under the token axis: position a predicts token a + 1.

    words: T tokens as text, pads included; prompt, response: their lengths in tokens.
    """
    length = len(words)
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    ax = figure.subplots()
    for i, word in enumerate(words):
        kind = "prompt" if i < prompt else "answer" if i < prompt + response else "pad"
        colour = {"prompt": LIGHT, "answer": POLICY, "pad": "white"}[kind]
        _cell(ax, i, 2, word, colour, "white" if kind == "answer" else INK)
    for a in range(length - 1):
        acts = prompt - 1 <= a < prompt + response - 1
        _cell(ax, a, 0.6, f"a = {a}", CRITIC if acts else "white", "black" if acts else "#999999")
        _cell(ax, a, -0.2, "yes" if acts else "–", "white", INK if acts else "#999999", 0)
        if acts:
            ax.add_patch(
                FancyArrowPatch((a, 1.02), (a + 1, 1.58), arrowstyle="-|>", mutation_scale=11,
                                color=INK, linewidth=1.1)
            )  # fmt: skip
    for y, name in ((2, "token"), (0.6, "action"), (-0.2, "mask")):
        ax.text(-0.75, y, name, ha="right", va="center", fontsize=TEXT + 0.5, color=INK,
                fontweight="bold")  # fmt: skip
    last = prompt + response - 2
    ax.annotate("the score\ngoes here", (last, -0.2), xytext=(0, -14), ha="center", va="top",
                textcoords="offset points", fontsize=TEXT - 0.5, color=REWARD)  # fmt: skip
    ax.set_xlim(-1.7, length - 0.4)
    ax.set_ylim(-1.1, 2.6)
    ax.set_axis_off()
    return figure


def _cell(ax: Axes, x: float, y: float, text: str, colour: str, ink: str, edge: float = 0.8):
    box = {"facecolor": colour, "edgecolor": "#aaaaaa" if edge else "none", "linewidth": edge,
           "boxstyle": "round,pad=0.35"}  # fmt: skip
    ax.text(x, y, text, ha="center", va="center", fontsize=TEXT, color=ink, bbox=box)


def shift_by_one(
    words: Sequence[str], shifted: Sequence[float], unshifted: Sequence[float]
) -> Figure:
    """The probability that each token of an answer gets, with the shift and without it."""
    figure = Figure(figsize=(10, 2.9), layout="constrained")
    ax = figure.subplots()
    x = np.arange(len(words))
    dress(ax, "What the policy gave to the tokens it wrote", "token of the answer", "probability")
    ax.bar(x - 0.2, shifted, 0.38, color=POLICY, label="read one position before: its probability")
    ax.bar(x + 0.2, unshifted, 0.38, color=BAD, hatch="//", edgecolor="white",
           label="read at the token itself: something else")  # fmt: skip
    ax.set_xticks(x, words)
    ax.set_ylim(0, 1.28)
    ax.set_yticks([0, 0.25, 0.5, 0.75, 1])
    ax.yaxis.set_major_formatter(percent)
    ax.grid(visible=False, axis="x")
    legend(ax, loc="upper center", ncols=2)
    return figure


def baseline(without: Sequence[float], with_one: Sequence[float], truth: float) -> Figure:
    """Histograms of gradient estimates, without a baseline and with one, and the true gradient."""
    figure = Figure(figsize=(8, 3), layout="constrained")
    ax = figure.subplots()
    dress(ax, "Estimates of one and the same gradient", "estimate from one minibatch",
          "how often")  # fmt: skip
    low, high = np.percentile(without, [0.2, 99.8])
    bins = np.linspace(low, high, 41)
    ax.hist(without, bins, color=BAD, alpha=0.45, label="without a baseline")
    ax.hist(with_one, bins, color=CRITIC, alpha=0.75, label="with the mean reward as baseline")
    ax.axvline(truth, color=INK, linewidth=1.5, linestyle="--", label="the true gradient")
    legend(ax)
    return figure


def gae_weights(lams: Sequence[float], steps: int = 8) -> Figure:
    """How GAE mixes n-step estimates (left), and what each TD error counts (right), γ = 1.

    steps: actions that are left; the estimate that runs to the end takes all that remains.
    """
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    n = np.arange(1, steps + 1)
    dress(left, "Weight of the n-step estimate", f"n (the episode ends after {steps})", "weight")
    dress(right, "Weight of the TD error l steps ahead", "l", "λ^l")
    for lam, (colour, dash, marker) in zip(lams, RUNS, strict=False):
        weight = (1 - lam) * lam ** (n - 1.0)
        weight[-1] = lam ** (steps - 1.0)
        look = {"color": colour, "linestyle": dash, "marker": marker, "markersize": 4.5}
        left.plot(n, weight, **look, label=f"λ = {lam:g}")
        right.plot(n - 1, np.float_power(lam, n - 1), **look)
    for ax in (left, right):
        ax.set_ylim(-0.04, 1.06)
        ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    legend(left)
    return figure


# ------------------------------------------------------------------------- what was measured of it


def kl_estimators(exact: Sequence[float], estimates: Mapping[str, Sequence[float]]) -> Figure:
    """k1, k2, k3 as functions (left), and their bias and spread on real tokens.

    exact: (N,) the exact KL at each visited state, nats; estimates: kind -> (N,) of the same.
    """
    exact = np.asarray(exact, dtype=float)
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    shape, bias, spread = figure.subplots(1, 3)
    d = np.linspace(-2.2, 2.2, 200)
    curves = {"k1": d, "k2": d**2 / 2, "k3": np.exp(-d) - 1 + d}
    dress(shape, "The three estimators", "d = log π − log ref, nats", "nats")
    dress(bias, "Bias: mean − exact KL", "estimator", "nats a token")
    dress(spread, "Spread of a single token", "estimator", "standard deviation, nats")
    for row, ((kind, values), (colour, dash, marker)) in enumerate(
        zip(estimates.items(), RUNS, strict=False)
    ):
        values = np.asarray(values, dtype=float)
        shape.plot(d, curves[kind], color=colour, linestyle=dash, linewidth=1.8, label=kind)
        error = (values - exact).std() / np.sqrt(len(values))
        bias.errorbar([row], [(values - exact).mean()], 2 * error, color=colour, marker=marker,
                      markersize=7, capsize=5, linewidth=1.6)  # fmt: skip
        spread.bar([row], [values.std()], color=colour, width=0.6)
        spread.annotate(f"{values.std():.2f}", (row, values.std()), ha="center", va="bottom",
                        fontsize=TEXT)  # fmt: skip
    bias.axhline(0, color=INK, linewidth=1)
    for ax in (bias, spread):
        ax.set_xticks(range(len(estimates)), list(estimates))
        ax.set_xlim(-0.6, len(estimates) - 0.4)
        ax.grid(visible=False, axis="x")
    spread.set_ylim(top=1.12 * spread.get_ylim()[1])
    shape.axhline(0, color=INK, linewidth=0.8)
    legend(shape)
    return figure


def credit(words: Sequence[str], values: Sequence[float], strips: Mapping[str, Sequence[float]],
           final: float) -> Figure:  # fmt: skip
    """What the critic expects along an answer (above), and the advantage of each token (below).

    words: R tokens; values: (R,) V before each of them; strips: name -> (R,) advantages; final:
    the answer's score, drawn behind the last value.
    """
    size = len(words)
    figure = Figure(figsize=(10, 1.9 + 0.55 * len(strips)), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(1.6, 0.62 * len(strips)))
    dress(above, "What the critic expects before each token", "", "V, reward")
    above.step(
        [*range(size), size], [*values, values[-1]], where="mid", color=CRITIC, linewidth=1.8
    )
    above.plot([size - 0.5], [final], "D", color=REWARD, markersize=7)
    above.annotate(f"score {final:+.1f}", (size - 0.5, final), xytext=(-8, 0), ha="right",
                   va="center", textcoords="offset points", fontsize=TEXT)  # fmt: skip
    above.margins(y=0.2)
    table = np.array(list(strips.values()), dtype=float)
    most = np.abs(table).max() or 1.0
    below.imshow(table, cmap="RdBu", vmin=-most, vmax=most, aspect="auto", alpha=0.85)
    for (row, column), value in np.ndenumerate(table):
        below.text(column, row, f"{value:+.2f}", ha="center", va="center", fontsize=TEXT,
                   color="white" if abs(value) > 0.6 * most else INK)  # fmt: skip
    dress(below, "Advantage of each token, reward", "token", "")
    below.grid(visible=False)
    below.set_xticks(range(size), words)
    below.set_yticks(range(len(strips)), list(strips))
    below.set_xlim(-0.5, size - 0.4)
    return figure


PANELS = (
    ("gold", "Gold: what answers are worth", "utility"),
    ("reward", "Reward of the model", "reward"),
    ("kl", "KL to the reference", "nats a sequence"),
    ("explained_variance", "Explained variance of the critic", "share of the returns'"),
)


def compare_runs(runs: Mapping[str, Sequence[Rows]], panels=PANELS) -> Figure:
    """Several settings, each over several seeds: faint lines the seeds, strong ones their mean."""
    figure = Figure(figsize=(10, 2.7 * -(-len(panels) // 2)), layout="constrained")
    axes = figure.subplots(-(-len(panels) // 2), 2, squeeze=False).flatten()
    for ax, (key, title, unit) in zip(axes, panels, strict=False):
        dress(ax, title, "iteration (one rollout)", unit)
        for (name, seeds), (colour, dash, _) in zip(runs.items(), RUNS, strict=False):
            curves = [series(rows, key) for rows in seeds]
            for steps, values in curves:
                ax.plot(steps, smooth(values, 3), color=colour, linewidth=0.8, alpha=0.45)
            mean = np.mean([values for _, values in curves], axis=0)
            ax.plot(curves[0][0], smooth(mean, 3), linestyle=dash, color=colour, linewidth=2,
                    label=f"{name}, mean of {len(curves)}")  # fmt: skip
        if key == "explained_variance":
            ax.set_ylim(-0.3, 1.05)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
        scale(ax, "linear")
    for ax in axes[len(panels) :]:
        ax.remove()
    legend(axes[0])
    return figure


def gradient_variance(variances: Mapping[str, Sequence[float]]) -> Figure:
    """The trace of the covariance of each estimator's gradient: a dot a fold, a bar at the mean.

    A faint line joins the dots of one fold, which are measured on the same answers.
    """
    names = list(variances)
    figure = Figure(figsize=(8.6, 1.2 + 0.42 * len(names)), layout="constrained")
    ax = figure.subplots()
    dress(
        ax, "Variance of the gradient of one minibatch", "trace of the covariance (log scale)", ""
    )
    for fold in zip(*variances.values(), strict=True):
        ax.plot(fold, range(len(names)), color=LIGHT, linewidth=1.2, zorder=1)
    for row, (name, folds) in enumerate(variances.items()):
        colour = REFERENCE if "no baseline" in name else BAD if "sequence" in name else POLICY
        mean = float(np.mean(folds))
        ax.plot(folds, [row] * len(folds), "o", color=colour, markersize=6, alpha=0.8)
        ax.plot([mean, mean], [row - 0.3, row + 0.3], color=INK, linewidth=2)
        ax.annotate(f"mean {mean:.3g}", (max(folds), row), xytext=(8, 0), va="center",
                    textcoords="offset points", fontsize=TEXT)  # fmt: skip
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.set_xscale("log")
    low, high = ax.get_xlim()
    ax.set_xlim(low, 1.8 * high)
    ax.grid(visible=False, axis="y")
    return figure


def lambda_tradeoff(
    lams: Sequence[float], variances: Sequence[Sequence[float]], biases: Sequence[Sequence[float]]
) -> Figure:
    """Variance (left) and squared bias (right) of the gradient over λ: a dot a fold, line the mean.

    biases: relative to the squared length of the gradient at λ = 1.
    """
    figure = Figure(figsize=(10, 3.1), layout="constrained")
    left, right = figure.subplots(1, 2)
    dress(left, "Variance falls with smaller λ", "λ", "trace of the covariance (log)")
    dress(right, "… and bias grows", "λ", "|bias|² / |gradient at λ = 1|²")
    for ax, folds, colour in ((left, variances, POLICY), (right, biases, BAD)):
        for lam, values in zip(lams, folds, strict=True):
            ax.plot([lam] * len(values), values, "o", color=colour, markersize=4, alpha=0.6)
        ax.plot(lams, [np.mean(v) for v in folds], color=colour, linewidth=1.8)
    left.set_yscale("log")
    from_zero(right)
    right.set_ylim(min(0.0, min(map(min, biases))) * 1.1)
    right.axhline(0, color=INK, linewidth=0.8)
    return figure


BROKEN = (("reward", "Reward", "reward"), ("kl", "KL", "nats a sequence"),
          ("length", "Length", "tokens"))  # fmt: skip


def unhealthy_runs(healthy: Rows, broken: Mapping[str, Rows], panels=BROKEN) -> Figure:
    """A column for each broken run, a row for each metric; grey is the healthy run."""
    figure = Figure(figsize=(11, 1.9 * len(panels) + 0.4), layout="constrained")
    axes = figure.subplots(len(panels), len(broken), squeeze=False, sharex=True)
    for column, (name, rows) in enumerate(broken.items()):
        for row, (key, title, unit) in enumerate(panels):
            ax = axes[row, column]
            dress(ax, name if row == 0 else "", "iteration" if row == len(panels) - 1 else "",
                  f"{title}, {unit}" if column == 0 else "")  # fmt: skip
            for metrics, colour, label in ((healthy, "#999999", "healthy"), (rows, BAD, "broken")):
                steps, values = series(metrics, key)
                ax.plot(steps, smooth(values, 3), color=colour, linewidth=1.8, label=label)
            if key == "kl":
                level(ax, 0.0, "", "-")
            ax.xaxis.set_major_locator(MaxNLocator(4, integer=True))
    legend(axes[0, 0])
    return figure
