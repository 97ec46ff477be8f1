"""Figures of chapter 7 about how a policy answers: its phrasing, its honesty."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from rlhf_course.plots.style import (
    COLOURS,
    INK,
    LIGHT,
    RUNS,
    TEXT,
    VERDICTS,
    dress,
    legend,
    percent,
)  # fmt: skip

# ---------------------------------------------------------------------------------------- diversity


def acceptance(
    cost: Mapping[str, Sequence[float]],
    reward: Mapping[str, Sequence[float]],
    gold: Mapping[str, Sequence[float]],
) -> Figure:
    """Several phrasings of one thing: SFT's loss, the reward, and how well the policy does each.

    Each maps a phrasing to numbers: nats and reward a sentence of the same perfect answers, less
    those of the first phrasing (drawn with their standard deviation), and gold of the policy's own
    answers (drawn with the 95 % interval of its mean).
    """
    figure = Figure(figsize=(9.5, 2.9), layout="constrained")
    panels = (
        (
            cost,
            "What SFT's loss says",
            "nats a sentence, over the pet form",
            COLOURS["reference"],
            False,
        ),
        (
            reward,
            "What the reward says",
            "reward a sentence, over the pet form",
            COLOURS["reward"],
            False,
        ),
        (gold, "How well SFT does it", "gold of its own reviews", COLOURS["gold"], True),
    )
    for ax, (table, title, unit, colour, of_mean) in zip(
        figure.subplots(1, 3), panels, strict=True
    ):
        dress(ax, title, unit, "")
        values = [np.asarray(v, dtype=float) for v in table.values()]
        mean = [v.mean() if len(v) else np.nan for v in values]
        spread = [v.std() if len(v) else np.nan for v in values]
        if of_mean:
            spread = [1.96 * s / max(len(v), 1) ** 0.5 for s, v in zip(spread, values, strict=True)]
        labels = [name.format(n="…", a="…").replace("….", "…") for name in table]
        ax.errorbar(mean, range(len(mean)), xerr=spread, fmt="o", color=colour, capsize=3)
        ax.set_yticks(range(len(mean)), labels if ax.get_subplotspec().is_first_col() else [])
        ax.axvline(0, color=INK, linewidth=0.8)
        ax.invert_yaxis()
    return figure


def phrasing(
    runs: Mapping[str, Sequence[Mapping[str, float]]], levels: Mapping[str, float]
) -> Figure:
    """Entropy of the phrasing against gold, a point for every seed of every setting.

    runs: label -> one {"gold", "entropy", "kl"} a seed; levels: name -> entropy of a reference.
    """
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    ax = figure.subplots()
    dress(ax, "Do equally good phrasings survive?", "gold utility, mean",
          "entropy of the phrasing, bits")  # fmt: skip
    for name, bits in levels.items():
        ax.axhline(bits, color=INK, linewidth=1, linestyle=":")
        ax.annotate(name, (0, bits), xycoords=("axes fraction", "data"), xytext=(3, 2),
                    textcoords="offset points", fontsize=TEXT - 0.5, color=INK)  # fmt: skip
    palette = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#767676", "#E69F00", "#56B4E9"]
    for i, (label, seeds) in enumerate(runs.items()):
        gold, bits = [s["gold"] for s in seeds], [s["entropy"] for s in seeds]
        kl = np.mean([s["kl"] for s in seeds])
        ax.plot(gold, bits, "osD^vPX"[i % 7], color=palette[i % 7], markersize=7, alpha=0.85,
                markeredgecolor="white", label=f"{label} (KL {kl:.1f})")  # fmt: skip
        if len(seeds) > 1:
            ax.plot([np.mean(gold)] * 2, [min(bits), max(bits)], color=palette[i % 7], linewidth=1)
    ax.set_ylim(0, 2.15)
    ax.legend(fontsize=TEXT - 0.5, framealpha=0.8, edgecolor="none", loc="upper left",
              bbox_to_anchor=(1.01, 1))  # fmt: skip
    return figure


# ---------------------------------------------------------------------- negative feedback, honesty


def kinds_of_answer(
    table: Mapping[str, Mapping[str, Sequence[Mapping[str, float]]]], titles: Mapping[str, str]
) -> Figure:
    """Shares of the kinds of answer: one panel a group, bars the mean, dots the seeds.

    table: policy -> group -> one {kind: share} a seed; titles: group -> title of its panel.
    """
    figure = Figure(figsize=(9, 1.5 + 0.5 * len(table)), layout="constrained")
    axes = figure.subplots(1, len(titles), squeeze=False)[0]
    for ax, (group, title) in zip(axes, titles.items(), strict=True):
        dress(ax, title, "share of answers", "")
        left = np.zeros(len(table))
        for kind, (label, colour, ink) in VERDICTS.items():
            seeds = [[s[kind] for s in groups[group] if kind in s] for groups in table.values()]
            if not any(seeds):
                continue
            mean = np.array([np.mean(s) if s else 0.0 for s in seeds])
            ax.barh(list(table), mean, left=left, color=colour, label=label, height=0.7,
                    edgecolor="white", linewidth=0.8)  # fmt: skip
            for y, (start, width, each) in enumerate(zip(left, mean, seeds, strict=True)):
                if width >= 0.08:
                    ax.text(start + width / 2, y - 0.08, f"{width:.0%}", ha="center", va="center",
                            fontsize=TEXT, color=ink)  # fmt: skip
                    if len(each) > 1:  # where this bar would end by each seed
                        ax.plot(start + np.array(each), [y + 0.24] * len(each), "|", color=INK,
                                markersize=6)  # fmt: skip
            left += mean
        ax.set_xlim(0, 1)
        ax.invert_yaxis()
        ax.grid(visible=False)
        ax.xaxis.set_major_formatter(percent)
    for ax in axes[1:]:
        ax.set_yticklabels([])
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper center", ncols=4, fontsize=TEXT,
                  frameon=False)  # fmt: skip
    return figure


def knowing(
    unsure: Mapping[str, Sequence[float]],
    admits: Mapping[str, Mapping[str, Sequence[float]]],
) -> Figure:
    """Chance of "I do not know" against how unsure SFT is of the fact, before and after.

    unsure: group -> entropy of SFT's answer in bits, one a question;
    admits: policy -> group -> the chance of admitting ignorance at the same questions.
    """
    figure = Figure(figsize=(9, 3.8), layout="constrained")
    axes = figure.subplots(1, max(len(admits), 1), sharey=True, squeeze=False)[0]
    for ax, (policy, chances) in zip(axes, admits.items(), strict=True):
        dress(
            ax, policy, "how unsure SFT is of the fact: entropy, bits", "chance of “I do not know”"
        )
        for (group, bits), look in zip(unsure.items(), RUNS, strict=False):
            ax.plot(bits, chances[group], look[2], color=look[0], markersize=3.5, alpha=0.4,
                    markeredgewidth=0, label=group)  # fmt: skip
        ax.set_ylim(-0.02, 1.02)
        ax.yaxis.set_major_formatter(percent)
        ax.grid(color=LIGHT)
        legend(ax, loc="center")
    return figure
