"""Chapter 1's figures: attention, the shift by one, sampling, the cache, curves good and bad."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.ticker import MaxNLocator

from rlhf_course.plots.style import (
    BAD,
    COLOURS,
    INK,
    RUNS,
    TEXT,
    dress,
    from_zero,
    legend,
    level,
    scale,
    smooth,
)


def attention_weights(
    weights: Mapping[str, Sequence[Sequence[float]]], tokens: Sequence[str]
) -> Figure:
    """Who looks at whom: one square a panel, rows ask, columns are looked at; shares of a row.

    weights: title -> (T, T); tokens: the T words on both axes.
    """
    figure = Figure(figsize=(0.6 + 3.9 * len(weights), 3.9), layout="constrained")
    axes = figure.subplots(1, len(weights), squeeze=False)[0]
    for ax, (title, matrix) in zip(axes, weights.items(), strict=True):
        dress(ax, title, "looked at (key)", "looks (query)")
        image = ax.imshow(np.asarray(matrix, dtype=float), cmap="Blues", vmin=0, vmax=1)
        ax.set_xticks(range(len(tokens)), tokens, rotation=60, ha="right")
        ax.set_yticks(range(len(tokens)), tokens)
        ax.grid(visible=False)
    bar = figure.colorbar(image, ax=list(axes), shrink=0.8)
    bar.set_label("weight (each row sums to 1)", fontsize=TEXT, color=INK)
    bar.ax.tick_params(labelsize=TEXT)
    return figure


def score_scale(
    widths: Sequence[int],
    spread: Mapping[str, Sequence[float]],
    largest: Mapping[str, Sequence[float]],
) -> Figure:
    """What √d does: spread of the scores (left) and the largest softmax weight (right), over d."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    dress(left, "Spread of the scores", "width of a head d, dimensions", "standard deviation")
    dress(right, "Largest of the weights", "width of a head d, dimensions", "mean over queries")
    for ax, table in ((left, spread), (right, largest)):
        _draw_all(ax, widths, table)
        ax.set_xscale("log", base=2)
        ax.set_xticks(widths, [str(width) for width in widths])
    return figure


def _draw_all(ax: Axes, x: Sequence[float], table: Mapping[str, Sequence[float]]) -> None:
    """A named line with markers for each row of the table, from zero on."""
    for (label, values), (colour, style, marker) in zip(table.items(), RUNS, strict=False):
        ax.plot(x, values, marker, linestyle=style, color=colour, markersize=4, label=label)
    from_zero(ax)
    legend(ax)


def shift_by_one(tokens: Sequence[str]) -> Figure:
    """Which position is asked for which token: an arrow from every position to its label."""
    figure = Figure(figsize=(1.15 * len(tokens) + 1.4, 2.3), layout="constrained")
    ax = figure.subplots()
    last = len(tokens) - 1
    for t, token in enumerate(tokens):
        for y, colour in ((1, COLOURS["reference"]), (0, COLOURS["policy"])):
            asked = y == 1 or t > 0
            ax.text(t, y, token, ha="center", va="center", fontsize=TEXT + 1,
                    color="white" if asked else COLOURS["reference"],
                    bbox={"boxstyle": "round,pad=0.35", "edgecolor": "none",
                          "facecolor": colour if asked else "#eeeeee"})  # fmt: skip
        if t < last:
            ax.add_patch(FancyArrowPatch((t, 0.76), (t + 1, 0.24), arrowstyle="-|>",
                                         mutation_scale=12, color=INK, linewidth=1))  # fmt: skip
        ax.text(t, 1.42, f"t = {t}", ha="center", fontsize=TEXT, color=INK)
    ax.text(-0.75, 1, "read at t", ha="right", va="center", fontsize=TEXT, color=INK)
    ax.text(-0.75, 0, "label", ha="right", va="center", fontsize=TEXT, color=INK)
    ax.set_xlim(-1.6, last + 0.6)
    ax.set_ylim(-0.4, 1.65)
    ax.set_axis_off()
    return figure


def residual_stream() -> Figure:
    """A pre-norm block: the stream runs through, two branches read from it and add to it."""
    figure = Figure(figsize=(9, 2.5), layout="constrained")
    ax = figure.subplots()
    ax.plot([0, 10], [0, 0], color=COLOURS["policy"], linewidth=4, solid_capstyle="butt")
    for start, name in ((1.0, "attention"), (5.5, "MLP")):
        for x, label in ((start + 0.55, "layer\nnorm"), (start + 1.95, name)):
            ax.add_patch(FancyBboxPatch((x, 0.75), 1.0, 0.6, boxstyle="round,pad=0.03",
                                        facecolor="white", edgecolor=INK))  # fmt: skip
            ax.text(x + 0.5, 1.05, label, ha="center", va="center", fontsize=TEXT, color=INK)
        for points in (
            ((start, 0), (start, 1.05), (start + 0.5, 1.05)),
            ((start + 1.6, 1.05), (start + 1.9, 1.05)),
            ((start + 3.0, 1.05), (start + 3.5, 1.05), (start + 3.5, 0.13)),
        ):
            ax.plot(*zip(*points[:-1], strict=True), color=INK, linewidth=1.2)
            ax.add_patch(FancyArrowPatch(points[-2], points[-1], arrowstyle="-|>", color=INK,
                                         mutation_scale=11, shrinkA=0, shrinkB=0))  # fmt: skip
        ax.plot(start + 3.5, 0, "o", color="white", markeredgecolor=COLOURS["policy"],
                markersize=13, markeredgewidth=2, zorder=3)  # fmt: skip
        ax.text(start + 3.5, -0.01, "+", ha="center", va="center", fontsize=12, zorder=4)
    ax.text(0, -0.35, "residual stream x, (B, T, D)", fontsize=TEXT, color=COLOURS["policy"])
    ax.text(10, -0.35, "to the next block", ha="right", fontsize=TEXT, color=COLOURS["policy"])
    ax.set_xlim(-0.1, 10.1)
    ax.set_ylim(-0.6, 1.6)
    ax.set_axis_off()
    return figure


def distributions(
    tokens: Sequence[str],
    drawn: Mapping[str, Sequence[float]],
    returned: Mapping[str, Sequence[float]],
) -> Figure:
    """Share of each token among the draws (bars) and the probability that was returned (dots).

    One panel a way of sampling; NaN in `returned`: a token that was never drawn.
    """
    columns = min(len(drawn), 3)
    rows = -(-len(drawn) // columns)
    figure = Figure(figsize=(3.4 * columns, 2.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, sharey=True, squeeze=False).flatten()
    at = np.arange(len(tokens))
    for ax, (title, shares) in zip(axes, drawn.items(), strict=False):
        dress(ax, title, "next token", "share, probability")
        ax.bar(at, shares, color=COLOURS["policy"], width=0.7, label="drawn")
        ax.plot(at, returned[title], "o", color=COLOURS["gold"], markersize=5, markeredgecolor=INK,
                markeredgewidth=0.5, label="returned log-prob, exp")  # fmt: skip
        ax.set_xticks(at, tokens, rotation=60, ha="right")
        ax.grid(visible=False, axis="x")
        ax.tick_params(labelleft=True)
    for ax in axes[len(drawn) :]:
        ax.set_axis_off()
    legend(axes[0])
    return figure


def cache_cost(
    lengths: Sequence[int],
    work: Mapping[str, Sequence[float]],
    seconds: Mapping[str, Sequence[float]],
) -> Figure:
    """Positions computed (left) and time (right) over the number of new tokens, by method."""
    figure = Figure(figsize=(9, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    dress(left, "Work", "new tokens an answer", "positions computed an answer")
    dress(right, "Time", "new tokens an answer", "seconds for all answers")
    for ax, table in ((left, work), (right, seconds)):
        _draw_all(ax, lengths, table)
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def loss_curves(
    runs: Mapping[str, Sequence[float]],
    title: str = "Loss, training",
    levels: Mapping[str, float] | None = None,
    unit: str = "nats a token",
) -> Figure:
    """Losses over updates on a logarithmic axis, with named levels to compare them with."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    ax = figure.subplots()
    dress(ax, title, "update", unit)
    for (label, values), (colour, style, _) in zip(runs.items(), RUNS, strict=False):
        _draw_loss(ax, values, label, colour, style)
    seen = [v for values in runs.values() for v in values] + list((levels or {}).values())
    ax.set_ylim(0.8 * min(seen), 1.1 * max(seen))
    scale(ax, "log")
    for name, value in (levels or {}).items():
        level(ax, value, name, "--")
    legend(ax, loc="best")
    return figure


def _draw_loss(ax: Axes, values: Sequence[float], label: str, colour: str, style) -> None:
    """The data faintly, their moving average over them."""
    if len(values) > 60:
        ax.plot(values, color=colour, linewidth=0.8, alpha=0.3)
        values = smooth(values, 7)
    ax.plot(values, color=colour, linestyle=style, linewidth=1.8, label=label)


def gallery(
    runs: Mapping[str, Sequence[float]],
    healthy: Sequence[float],
    levels: Mapping[str, float],
    unit: str = "nats a token",
) -> Figure:
    """One panel for each thing that was broken, the healthy run grey in all of them."""
    figure = Figure(figsize=(3.4 * len(runs), 3.0), layout="constrained")
    axes = figure.subplots(1, len(runs), squeeze=False)[0]
    for ax, (label, values) in zip(axes, runs.items(), strict=True):
        dress(ax, label, "update", unit)
        _draw_loss(ax, healthy, "healthy", COLOURS["reference"], "-")
        _draw_loss(ax, values, "broken", BAD, "-")
        low, high = min([*values, *levels.values()]), max([*values, *levels.values()])
        ax.set_ylim(0.8 * low, 1.3 * high)
        scale(ax, "log")
        for name, value in levels.items():
            level(ax, value, name, "--")
    legend(axes[0], loc="best")
    return figure
