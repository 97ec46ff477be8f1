"""Figures of chapter 7: did it help, and at which price? Every claim is drawn with its spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from rlhf_course.evaluation import ReliabilityBin, wilson_interval
from rlhf_course.plots.style import (
    COLOURS,
    INK,
    RUNS,
    TEXT,
    Rows,
    dress,
    legend,
    percent,
    series,
    smooth,
)

Interval = Callable[[float, int], tuple[float, float]]
ROOT_KL = "√KL to the reference, √nats an answer"


def coverage(intervals: Mapping[str, Interval], count: int, promised: float = 0.95) -> Figure:
    """How often an interval for a share contains the true share, for every true share.

    intervals: name -> function of (share seen, trials); count: trials. Exact: the sum of the
    binomial probabilities of those outcomes whose interval contains the truth.
    """
    figure = Figure(figsize=(8, 3.4), layout="constrained")
    ax = figure.subplots()
    dress(ax, f"Does a {promised:.0%} interval keep its promise? {count} trials",
          "true share", "share of experiments it is right in")  # fmt: skip
    truth = np.linspace(0.005, 0.995, 397)
    wins = np.arange(count + 1)
    log_ways = np.array([_log_binomial(count, k) for k in wins])
    for (name, interval), look in zip(intervals.items(), RUNS, strict=False):
        bounds = np.array([interval(k / count, count) for k in wins])  # (count + 1, 2)
        inside = (bounds[:, :1] <= truth) & (truth <= bounds[:, 1:])  # (count + 1, P)
        logs = log_ways[:, None] + wins[:, None] * np.log(truth)
        chances = np.exp(logs + (count - wins)[:, None] * np.log1p(-truth))
        right = (chances * inside).sum(axis=0)
        ax.plot(truth, right, color=look[0], linestyle=look[1], linewidth=1.4, label=name)
    ax.axhline(promised, color=INK, linewidth=1, linestyle=":", label="promised")
    ax.set_ylim(0.4, 1.01)
    ax.yaxis.set_major_formatter(percent)
    legend(ax, loc="lower center")
    return figure


def _log_binomial(n: int, k: int) -> float:
    from math import lgamma

    return lgamma(n + 1) - lgamma(k + 1) - lgamma(n - k + 1)


def reliability(curves: Mapping[str, Sequence[ReliabilityBin]], notes: Sequence[str]) -> Figure:
    """Predicted against observed shares, one panel a model, Wilson intervals, counts below."""
    figure = Figure(figsize=(max(8, 3.4 * len(curves)), 4.4), layout="constrained")
    panels = figure.subplots(2, max(len(curves), 1), squeeze=False, height_ratios=(4, 1))
    for (above, below), (name, curve), note in zip(panels.T, curves.items(), notes, strict=True):
        dress(above, name, "", "share in which A was preferred")
        dress(below, "", "predicted: σ(reward of A − reward of B)", "pairs")
        above.plot([0, 1], [0, 1], color=INK, linewidth=1, linestyle="--", label="calibrated")
        said, seen = [b.predicted for b in curve], [b.observed for b in curve]
        bounds = np.array([wilson_interval(b.observed, b.count) for b in curve]).T
        error = np.abs(bounds - np.array(seen))  # (2, bins)
        above.errorbar(said, seen, error, fmt="o", color=COLOURS["reward"], markersize=5,
                       capsize=3, label="reward model, 95 %")  # fmt: skip
        above.text(0.97, 0.05, note, transform=above.transAxes, ha="right", fontsize=TEXT + 1)
        below.bar(said, [b.count for b in curve], width=0.07, color=COLOURS["reward"], alpha=0.6)
        for ax in (above, below):
            ax.set_xlim(0, 1)
            ax.xaxis.set_major_formatter(percent)
        above.set_ylim(0, 1)
        above.yaxis.set_major_formatter(percent)
        legend(above, loc="upper left")
    return figure


# ------------------------------------------------------------------------------ over-optimisation


def best_of_n_curves(worlds: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Gain of the best of n in proxy and gold over √KL, one panel a world, bands over prompts.

    worlds: name -> {"n", "kl", "proxy", "gold", "proxy_error", "gold_error", "proxy_slope",
    "gold_slope"}: lists over n (gains over n = 1, standard errors), and the predicted initial
    slopes, gain a √nat, or without them.
    """
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    axes = figure.subplots(1, max(len(worlds), 1), squeeze=False)[0]
    for ax, (name, table) in zip(axes, worlds.items(), strict=True):
        dress(ax, name, "√KL of the best of n, √nats (bound)", "gain over one answer")
        root = np.sqrt(np.asarray(table["kl"], dtype=float))
        tops = []
        for kind in ("proxy", "gold"):
            gain, error = (np.asarray(table[k], dtype=float) for k in (kind, f"{kind}_error"))
            ax.fill_between(root, gain - 2 * error, gain + 2 * error, color=COLOURS[kind],
                            alpha=0.18, linewidth=0)  # fmt: skip
            ax.plot(root, gain, "o-", color=COLOURS[kind], markersize=4, label=kind)
            tops.append((gain + 2 * error).max())
            if f"{kind}_slope" in table:
                ax.plot(root, table[f"{kind}_slope"] * root, ":", color=COLOURS[kind],
                        linewidth=1.2, label=f"{kind}, predicted start")  # fmt: skip
        for n, x in zip(table["n"], root, strict=True):
            ax.annotate(f"n={n}", (x, 0), xytext=(0, -9), textcoords="offset points", ha="center",
                        fontsize=TEXT - 1.5, color=INK)  # fmt: skip
        ax.set_ylim(-0.12 * max(tops), 1.12 * max(tops))
        legend(ax, loc="upper left")
    return figure


def paths(
    runs: Mapping[str, Sequence[Rows]],
    slopes: tuple[float, float] | None = None,
    no_proxy: Sequence[str] = (),
) -> Figure:
    """Proxy and gold over √KL, a line for every seed, one colour and dash for every setting.

    runs: label -> one list of metrics a seed (`kl`, `reward`, `gold`). slopes: the predicted
    initial gains a √nat, of proxy and gold. no_proxy: labels that had no proxy, in gold alone.
    Gains are over the policy PPO began with.
    """
    figure = Figure(figsize=(9, 4), layout="constrained")
    for ax, kind, slope in zip(figure.subplots(1, 2), ("reward", "gold"), slopes or (None, None),
                               strict=True):  # fmt: skip
        title = {"reward": "Proxy: what PPO is given", "gold": "Gold: what it is worth"}[kind]
        dress(ax, title, ROOT_KL, "gain over SFT, reward or utility")
        ax.axhline(0, color=INK, linewidth=1)
        lowest = highest = 0.0
        for (label, seeds), look in zip(runs.items(), RUNS, strict=False):
            if kind == "reward" and label in no_proxy:
                continue
            for i, rows in enumerate(seeds):
                drawn = _path(ax, rows, kind, look, label if i == 0 else None)
                lowest, highest = min(lowest, *drawn), max(highest, *drawn)
        if slope is not None:
            low, high = ax.get_xlim()
            x = np.array([0.0, max(high, 1e-6)])
            ax.plot(x, slope * x, ":", color=INK, linewidth=1.2, label="predicted start: ∝ √KL")
            ax.set_xlim(low, high)
        room = 0.08 * max(highest - lowest, 1e-6)
        ax.set_ylim(lowest - room, highest + room)
        legend(ax)
    return figure


def _path(ax: Axes, rows: Rows, key: str, look: tuple, label: str | None) -> np.ndarray:
    """One smoothed run in the order of time with a marker at its end; returns the gains drawn."""
    kl, value = series(rows, "kl")[1], series(rows, key)[1]
    untouched = value[kl == 0.0]  # the critic's warm-up: the policy still is the reference
    gain = smooth(value - (untouched.mean() if len(untouched) else value[0]), 5)
    root = np.sqrt(np.maximum(smooth(kl, 5), 0))
    colour, style, marker = look
    ax.plot(root, gain, linestyle=style, color=colour, linewidth=1.5, label=label, alpha=0.9)
    ax.plot(root[-1:], gain[-1:], marker, color=colour, markersize=6, markeredgecolor="white")
    return gain


# ------------------------------------------------------------------- better than the demonstrations


def worths(groups: Mapping[str, Sequence[Sequence[float]]], best: float | None = None) -> Figure:
    """How much of a policy's answers is worth at least so much, a line a seed.

    groups: label -> one list of utilities a seed. best: the worth of the best possible answer.
    """
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    ax = figure.subplots()
    dress(ax, "Answers that are worth at least so much", "gold utility of an answer",
          "share of answers")  # fmt: skip
    for (label, seeds), look in zip(groups.items(), RUNS, strict=False):
        for i, gold in enumerate(seeds):
            ordered = np.sort(np.asarray(gold, dtype=float))
            share = 1 - np.arange(len(ordered)) / len(ordered)
            name = f"{label}, mean {np.mean([np.mean(g) for g in seeds]):.2f}"
            ax.step(ordered, share, where="pre", color=look[0], linestyle=look[1], linewidth=1.5,
                    label=name if i == 0 else None)  # fmt: skip
    if best is not None:
        ax.axvline(
            best, color=INK, linewidth=1, linestyle=":", label=f"best possible, mean {best:.2f}"
        )
    ax.yaxis.set_major_formatter(percent)
    ax.set_ylim(0, 1)
    legend(ax, loc="lower left")
    return figure


# ------------------------------------------------------------------------------- healthy and broken

BANDS = {
    "kl": ("KL to the reference", "nats an answer"),
    "reward": ("Proxy reward", "reward an answer"),
    "gold": ("Gold utility (nobody sees it)", "utility an answer"),
    "entropy": ("Entropy of the policy", "nats a token"),
    "length": ("Length", "tokens an answer"),
    "share_malformed": ("Malformed answers", "share of answers"),
}


def healthy_and_broken(
    healthy: Sequence[Rows], broken: Mapping[str, Sequence[Rows]], keys: Sequence[str] = ()
) -> Figure:
    """The band of healthy runs (least to largest over seeds) with broken runs drawn over it.

    healthy: metrics of each seed; broken: label -> metrics of each seed; keys: of BANDS.
    """
    keys = list(keys or BANDS)
    figure = Figure(figsize=(9.5, 2.5 * -(-len(keys) // 3)), layout="constrained")
    axes = figure.subplots(-(-len(keys) // 3), 3, squeeze=False).flatten()
    for ax, key in zip(axes, keys, strict=False):
        dress(ax, BANDS[key][0], "iteration", BANDS[key][1])
        curves = [smooth(series(rows, key)[1], 3) for rows in healthy]
        shortest = min(map(len, curves))
        every = np.array([curve[:shortest] for curve in curves])  # (seeds, iterations)
        ax.fill_between(range(shortest), every.min(0), every.max(0), color=COLOURS["policy"],
                        alpha=0.25, linewidth=0, label="healthy, all seeds")  # fmt: skip
        for (label, seeds), look in zip(broken.items(), RUNS[1:], strict=False):
            for i, rows in enumerate(seeds):
                ax.plot(smooth(series(rows, key)[1], 3), color=look[0], linestyle=look[1],
                        linewidth=1.2, label=label if i == 0 else None)  # fmt: skip
    legend(axes[0])
    for ax in axes[len(keys) :]:
        ax.remove()
    return figure
