"""Figures of chapter 8: what DPO and the critic-free estimators do, and the race against PPO."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

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

METHODS = {
    "PPO": ("#0072B2", "-", "o"), "RLOO": ("#009E73", "--", "^"), "GRPO": ("#D55E00", "-.", "s"),
    "REINFORCE++": ("#CC79A7", (0, (5, 1, 1, 1)), "D"), "DPO": ("#767676", ":", "v"),
}  # fmt: skip
"""A method's colour, dashes and marker, the same in all figures of the chapter."""


def tilted(reference: Sequence[float], reward: Sequence[float], betas: Sequence[float]) -> Figure:
    """The optimum of the KL-regularised objective over a few answers, for several prices β.

    reference: probabilities of the answers; reward: one number each.
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    ax = figure.subplots()
    dress(ax, "The best policy tilts the reference by exp(reward / β)", "answer, and its reward",
          "probability")  # fmt: skip
    p, r = np.asarray(reference, dtype=float), np.asarray(reward, dtype=float)
    at, width = np.arange(len(p)), 0.8 / (len(betas) + 1)
    ax.bar(at - 0.4 + width / 2, p, width, color=COLOURS["reference"], label="reference")
    for i, beta in enumerate(betas, 1):
        best = p * np.exp((r - r.max()) / beta)
        best /= best.sum()
        kl = (best * np.log(best / p)).sum()
        ax.bar(at - 0.4 + (i + 0.5) * width, best, width, color=COLOURS["policy"],
               alpha=0.3 + 0.7 * i / len(betas),
               label=f"β = {beta:g}: KL {kl:.2f} nats")  # fmt: skip
    ax.set_xticks(at, [f"{'ABCDEFGH'[i]}: {x:+g}" for i, x in enumerate(r)])
    ax.yaxis.set_major_formatter(percent)
    legend(ax)
    return figure


def dpo_weight(betas: Sequence[float], limit: float = 12.0) -> Figure:
    """How much a pair still pulls, σ(−margin), against what the policy already says of it."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    ax = figure.subplots()
    dress(ax, "A pair's weight in DPO's gradient",
          "log-ratio of the chosen less that of the rejected answer, nats",
          "weight β σ(−β · difference)")  # fmt: skip
    x = np.linspace(-limit, limit, 241)
    for beta, look in zip(betas, RUNS, strict=False):
        ax.plot(x, beta / (1 + np.exp(beta * x)), color=look[0], linestyle=look[1],
                label=f"β = {beta:g}")  # fmt: skip
    ax.axvline(0, color=INK, linewidth=1, linestyle=":")
    ax.annotate("order right →", (0, 1), xycoords=("data", "axes fraction"), xytext=(6, -12),
                textcoords="offset points", fontsize=TEXT)  # fmt: skip
    legend(ax, loc="center right")
    return figure


def baselines(sizes: Sequence[int], variances: Mapping[str, Sequence[float]]) -> Figure:
    """Variance of a gradient estimate against the answers a prompt, one line a baseline."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    ax = figure.subplots()
    dress(ax, "Variance of the gradient from equally many answers", "G: answers a prompt",
          "variance of the gradient")  # fmt: skip
    for (name, values), look in zip(variances.items(), RUNS, strict=False):
        ax.plot(sizes, values, look[2], color=look[0], linestyle=look[1], label=name, markersize=5)
    ax.set_xscale("log", base=2)
    ax.set_xticks(sizes, [str(size) for size in sizes])
    ax.set_yscale("log")
    legend(ax)
    return figure


def difficulty(weights: Mapping[str, tuple[Sequence[float], Sequence[float]]]) -> Figure:
    """How much prompts weigh by their difficulty: mean |advantage| as a share of its largest.

    weights: method -> (shares of right answers, mean absolute advantage).
    """
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    ax = figure.subplots()
    dress(ax, "Which prompts does the gradient listen to?",
          "chance that an answer to the prompt is right", "mean |advantage| / peak")  # fmt: skip
    for name, (share, size) in weights.items():
        colour, style, _ = METHODS[name]
        size = np.asarray(size, dtype=float)
        ax.plot(share, size / size.max(), color=colour, linestyle=style, linewidth=1.8, label=name)
    ax.xaxis.set_major_formatter(percent)
    ax.set_ylim(bottom=0)
    legend(ax, loc="lower center")
    return figure


# ---------------------------------------------------------------------------------------- the race


def race(runs: Mapping[str, Sequence[tuple[Rows, float]]], budget: str = "iterations") -> Figure:
    """Gold over √KL, over the run's progress, and over seconds; a line for every seed.

    runs: method -> one (metrics, seconds) a seed. Rows without `gold` are left out. The seconds of
    a run are spread evenly over its steps.
    """
    figure = Figure(figsize=(10, 3.8), layout="constrained")
    panels = figure.subplots(1, 3, sharey=True)
    titles = (
        ("What a nat buys", "√KL to the reference, √nats an answer"),
        ("What an answer buys", f"share of the run's {budget}"),
        ("What a second buys", "seconds of training"),
    )
    for ax, (title, unit) in zip(panels, titles, strict=True):
        dress(ax, title, unit, "gold utility" if ax is panels[0] else "")
    for method, seeds in runs.items():
        colour, style, marker = METHODS[method]
        for i, (rows, seconds) in enumerate(seeds):
            kept = [row for row in rows if "gold" in row]
            gold, kl = (smooth(series(kept, key)[1], 3) for key in ("gold", "kl"))
            done = (np.array([row.get("step", n) for n, row in enumerate(kept)]) + 1) / len(rows)
            places = (np.sqrt(np.maximum(kl, 0)), done, done * seconds)
            for ax, x in zip(panels, places, strict=True):
                ax.plot(x, gold, color=colour, linestyle=style, linewidth=1.3, alpha=0.85,
                        label=method if i == 0 else None)  # fmt: skip
                ax.plot(x[-1:], gold[-1:], marker, color=colour, markersize=6,
                        markeredgecolor="white")  # fmt: skip
    panels[1].xaxis.set_major_formatter(percent)
    legend(panels[2], loc="lower right")
    return figure


def ends(results: Mapping[str, Sequence[Mapping[str, float]]]) -> Figure:
    """Where every method ends: gold on held-out prompts, KL and seconds, a dot a seed."""
    figure = Figure(figsize=(10, 0.9 + 0.42 * len(results)), layout="constrained")
    panels = (
        ("gold", "Gold, held-out prompts", "utility an answer"),
        ("kl", "KL to the reference", "nats an answer"),
        ("seconds", "Training", "seconds"),
    )
    for ax, (key, title, unit) in zip(figure.subplots(1, 3, sharey=True), panels, strict=True):
        dress(ax, title, unit, "")
        for y, (method, seeds) in enumerate(results.items()):
            values = [seed[key] for seed in seeds]
            colour, _, marker = METHODS.get(method, (INK, "-", "o"))
            ax.barh(y, np.mean(values), color=colour, alpha=0.35, height=0.6)
            ax.plot(values, [y] * len(values), marker, color=colour, markersize=6)
        ax.set_yticks(range(len(results)), list(results))
        ax.grid(visible=False, axis="y")
    figure.axes[0].invert_yaxis()
    return figure


def dpo_curves(runs: Mapping[str, Rows]) -> Figure:
    """What DPO's loss sees, and what it does not: implicit rewards, KL, gold, one line a run."""
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, middle, right = figure.subplots(1, 3)
    dress(left, "Log-ratio to the reference", "update", "nats an answer")
    dress(middle, "KL of its own answers", "update", "nats an answer")
    dress(right, "Gold of its own answers", "update", "utility an answer")
    for (label, rows), look in zip(runs.items(), RUNS, strict=False):
        for key, style in (("chosen", "-"), ("rejected", ":")):
            steps, value = series(rows, f"logratio_{key}")
            left.plot(steps, smooth(value, 9), style, color=look[0], linewidth=1.5,
                      label=f"{key}, {label}")  # fmt: skip
        for ax, key in ((middle, "kl"), (right, "gold")):
            ax.plot(*series(rows, key), look[2], linestyle=look[1], color=look[0], markersize=5,
                    label=label)  # fmt: skip
    left.axhline(0, color=INK, linewidth=0.8)
    legend(left)
    legend(right)
    return figure
