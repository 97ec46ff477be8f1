"""Chapter 6: forgetting, the two gradients, running moments, PopArt, ranks, and the ablation."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
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
    scale,
    series,
    smooth,
)

POLICY, REFERENCE, CRITIC = COLOURS["policy"], COLOURS["reference"], COLOURS["critic"]


def forgetting(
    runs: Mapping[str, Sequence[Rows]], pretrained: float, sft: float | None = None
) -> Figure:
    """Perplexity of pretraining text along PPO, and the reward beside it.

    runs: label -> one list of metrics a seed, with `ptx_loss` in nats a token. pretrained, sft:
    perplexities to compare with.
    """
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    dress(left, "Perplexity of the corpus", "iteration (one rollout)", "exp(nats a token)")
    dress(right, "Reward (proxy)", "iteration (one rollout)", "reward a sequence")
    for (label, seeds), look in zip(runs.items(), RUNS, strict=False):
        for i, rows in enumerate(seeds):
            steps, loss = series(rows, "ptx_loss")
            common = {"linestyle": look[1], "color": look[0], "linewidth": 1.5}
            left.plot(steps, np.exp(loss), label=label if i == 0 else None, **common)
            steps, reward = series(rows, "reward")
            right.plot(steps, smooth(reward, 3), **common)
    scale(left, "log")
    level(left, pretrained, "pretrained", ":")
    if sft is not None:
        level(left, sft, "after SFT", "--")
    legend(left)
    for ax in (left, right):
        ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    return figure


def gradient_balance(per_gamma: Mapping[str, float], ppo: Sequence[float]) -> Figure:
    """‖γ g_ptx‖ over γ for each reduction, beside the range of PPO's gradient norms.

    per_gamma: label -> the norm at γ = 1. ppo: norms seen in a run.
    """
    gammas = np.geomspace(1e-3, 100, 60)
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    ax = figure.subplots()
    dress(ax, "Who pulls harder?", "γ", "norm of the gradient on the policy")
    low, high = min(ppo), max(ppo)
    ax.axhspan(low, high, color=POLICY, alpha=0.18, linewidth=0, label="PPO, in this run")
    middle = math.exp(np.log(np.asarray(ppo)).mean())
    for (label, norm), look in zip(per_gamma.items(), RUNS[1:], strict=False):
        ax.plot(gammas, norm * gammas, linestyle=look[1], color=look[0], linewidth=2, label=label)
        ax.plot(middle / norm, middle, "o", color=look[0])
        ax.annotate(f"{middle / norm:.2g}", (middle / norm, middle), xytext=(5, -11),
                    textcoords="offset points", fontsize=TEXT, color=look[0])  # fmt: skip
    ax.axvline(27.8, color=INK, linewidth=1, linestyle=":")
    ax.annotate("27.8", (27.8, ax.get_ylim()[0]), xytext=(3, 4), textcoords="offset points",
                fontsize=TEXT, color=INK)  # fmt: skip
    ax.set_xscale("log")
    ax.set_yscale("log")
    legend(ax, loc="upper left")
    return figure


def moments_over_time(
    batches: Sequence[float], tracked: Mapping[str, Sequence[tuple[float, float]]]
) -> Figure:
    """Running means and deviations beside the batches' own means.

    batches: each batch's mean. tracked: label -> (mean, std) after each batch.
    """
    figure = Figure(figsize=(9.6, 3.2), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, title in zip(axes, ("Mean so far", "Standard deviation so far"), strict=True):
        dress(ax, title, "batch", "reward")
    axes[0].plot(batches, ".", color=REFERENCE, markersize=4, label="of each batch")
    for (label, values), look in zip(tracked.items(), RUNS, strict=False):
        for column, ax in enumerate(axes):
            ax.plot([pair[column] for pair in values], linestyle=look[1], color=look[0],
                    linewidth=1.8, label=label)  # fmt: skip
    from_zero(axes[1])
    legend(axes[0])
    return figure


def preserved_values(before: Sequence[float], after: Mapping[str, Sequence[float]]) -> Figure:
    """What the critic says of the same states before and after an update of the moments."""
    figure = Figure(figsize=(4.3 * len(after), 3.5), layout="constrained")
    axes = figure.subplots(1, len(after), squeeze=False)[0]
    both = np.concatenate([np.asarray(before), *map(np.asarray, after.values())])
    ends = [both.min() - 0.5, both.max() + 0.5]
    for ax, (title, values) in zip(axes, after.items(), strict=True):
        dress(ax, title, "V before, in the reward's unit", "V after")
        ax.plot(ends, ends, color=INK, linewidth=1, linestyle=":")
        ax.plot(before, values, "o", color=CRITIC, markersize=4)
        ax.set_xlim(ends)
        ax.set_ylim(ends)
    return figure


def sign_flip(ranks: Mapping[str, Sequence[float]]) -> Figure:
    """Advantages of two ranks on one line: with the mean of all, and each with its own."""
    figure = Figure(figsize=(9.2, 3.0), layout="constrained")
    ax = figure.subplots()
    dress(ax, "", "advantage, as GAE gives it", "")
    everything = np.concatenate([np.asarray(v, dtype=float) for v in ranks.values()])
    middle = everything.mean()
    for y, (look, values) in enumerate(zip(RUNS, ranks.values(), strict=False)):
        values = np.asarray(values, dtype=float)
        flipped = (values > middle) != (values > values.mean())
        ax.plot(values[~flipped], np.full((~flipped).sum(), y), "o", color=look[0], markersize=9)
        ax.plot(values[flipped], np.full(flipped.sum(), y), "o", markersize=11, color=BAD,
                markerfacecolor="white", markeredgewidth=2.5)  # fmt: skip
        ax.plot([values.mean()] * 2, [y - 0.3, y + 0.3], color=look[0], linewidth=2, linestyle="--")
        ax.annotate("its own mean", (values.mean(), y + 0.32), fontsize=TEXT, color=look[0],
                    ha="center")  # fmt: skip
    ax.axvline(middle, color=INK, linewidth=1.6)
    ax.annotate("mean of all", (middle, -0.55), xytext=(4, 0), textcoords="offset points",
                fontsize=TEXT, color=INK)  # fmt: skip
    ax.set_yticks(range(len(ranks)), list(ranks), fontsize=TEXT + 1)
    ax.set_ylim(-0.7, len(ranks) - 0.3)
    ax.grid(visible=False, axis="y")
    return figure


def ranks_disagree(measured: Sequence[Mapping[str, float]]) -> Figure:
    """Share of advantages that change sign, and the gradient's cosine, over the answers a rank.

    measured: rows of `two_ranks.measure`: "order", "answers", "flipped", "cosine".
    """
    figure = Figure(figsize=(9.6, 3.5), layout="constrained")
    axes = figure.subplots(1, 2)
    sizes = sorted({int(row["answers"]) for row in measured})
    names = (("flipped", "Advantages that change sign", "share of tokens"),
             ("cosine", "Direction of the gradient", "cosine to the global one"))  # fmt: skip
    for ax, (key, title, unit) in zip(axes, names, strict=True):
        dress(ax, title, "answers a rank", unit)
        for order, look in zip(dict.fromkeys(row["order"] for row in measured), RUNS, strict=False):
            rows = [row for row in measured if row["order"] == order]
            ax.plot([row["answers"] for row in rows], [row[key] for row in rows], look[2],
                    color=look[0], markersize=4.5, alpha=0.55)  # fmt: skip
            means = [np.mean([row[key] for row in rows if row["answers"] == n]) for n in sizes]
            ax.plot(sizes, means, linestyle=look[1], color=look[0], linewidth=1.8, label=order)
        ax.set_xscale("log", base=2)
        ax.set_xticks(sizes, [str(n) for n in sizes])
        ax.minorticks_off()
    scale(axes[0], "percent")
    from_zero(axes[0])
    legend(axes[0])
    axes[1].set_ylim(top=1.02)
    return figure


def ablation(results: Mapping[str, Sequence[Mapping[str, float]]], columns: Mapping[str, str]):
    """One row a switch, one panel a figure: a point a seed, a bar at the mean.

    results: what was switched off -> one mapping a seed. columns: key -> title.
    """
    figure = Figure(figsize=(10, 0.36 * len(results) + 1.2), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True)
    names = list(results)
    for ax, (key, title) in zip(axes, columns.items(), strict=True):
        dress(ax, title, "", "")
        base = [row[key] for row in results[names[0]]]
        ax.axvspan(min(base), max(base), color=POLICY, alpha=0.12, linewidth=0)
        for y, name in enumerate(names):
            values = [row[key] for row in results[name]]
            colour = POLICY if y == 0 else BAD
            ax.plot(values, [y] * len(values), "o", color=colour, markersize=4.5, alpha=0.7)
            ax.plot([np.mean(values)], [y], "|", color=colour, markersize=17, markeredgewidth=2.2)
        ax.grid(visible=False, axis="y")
        if key == "forgetting":
            ax.set_xscale("log")
            ax.set_xticks(ticks := [1, 2, 5, 10, 20], [f"{t}×" for t in ticks])
            ax.minorticks_off()
        ax.xaxis.grid(color=LIGHT)
    axes[0].set_yticks(range(len(names)), names, fontsize=TEXT)
    axes[0].invert_yaxis()
    return figure


def table(results: Mapping[str, Sequence[Mapping[str, float]]], columns: Mapping[str, str]) -> str:
    """The ablation as a Markdown table: mean over the seeds and, behind it, lowest … highest."""
    lines = ["| switched off | " + " | ".join(columns.values()) + " |",
             "|---|" + "---:|" * len(columns)]  # fmt: skip
    for name, rows in results.items():
        cells = []
        for key in columns:
            values = [row[key] for row in rows]
            mean = sum(values) / len(values)
            cells.append(f"**{mean:.2f}** ({min(values):.2f} … {max(values):.2f})")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)
