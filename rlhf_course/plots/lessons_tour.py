"""The tour's figures: who occurs in which data, what an answer is worth, how models score it."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from rlhf_course.plots.style import (
    COLOURS,
    INK,
    TEXT,
    Rows,
    dress,
    legend,
    scale,
    series,
    smooth,
)


def who_occurs_where(shares: Mapping[str, Mapping[str, float]]) -> Figure:
    """People (rows) and data (columns): the share of a data set's entries that are about them."""
    groups = list(shares)
    places = list(dict.fromkeys(place for row in shares.values() for place in row))
    table = np.array([[shares[g].get(p, 0.0) for p in places] for g in groups])
    size = (1.6 + 1.45 * len(places), 1.0 + 0.42 * len(groups))
    figure = Figure(figsize=size, layout="constrained")
    ax = figure.subplots()
    ax.imshow(table, cmap="Blues", vmin=0, vmax=1, aspect="auto")
    dress(ax, "Share of the entries that are about …", "data", "people")
    for (y, x), share in np.ndenumerate(table):
        ax.text(x, y, f"{share:.0%}" if share else "–", ha="center", va="center", fontsize=TEXT,
                color="white" if share > 0.6 else INK)  # fmt: skip
    ax.set_xticks(range(len(places)), places)
    ax.set_yticks(range(len(groups)), groups)
    ax.grid(visible=False)
    return figure


def scored_answers(
    panels: Mapping[str, Mapping[str, float]], unit: str, role: str = "reward"
) -> Figure:
    """Answers and their scores as bars from 0, one panel a question; best on top.

    panels: question -> answer -> score.
    """
    most = max(map(len, panels.values()))
    figure = Figure(figsize=(10, 1.0 + 0.34 * most * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
    for ax, (question, scores) in zip(axes, panels.items(), strict=True):
        ordered = sorted(scores.items(), key=lambda item: item[1])
        bars = ax.barh([a for a, _ in ordered], [s for _, s in ordered], color=COLOURS[role],
                       height=0.66)  # fmt: skip
        ax.bar_label(bars, [f"{score:+.2f}" for _, score in ordered], padding=4, fontsize=TEXT)
        dress(ax, question, unit, "answer")
        ax.axvline(0, color=INK, linewidth=1)
        ax.grid(visible=False, axis="y")
        ax.margins(x=0.12)
        ax.tick_params(labelbottom=True)
    return figure


def word_shares(panels: Mapping[str, Mapping[str, float]]) -> Figure:
    """Probability of each word as the next one, one panel a model and kind of question."""
    figure = Figure(figsize=(2.6 * len(panels) + 0.4, 2.6), layout="constrained")
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)[0]
    for ax, (title, words) in zip(axes, panels.items(), strict=True):
        bars = ax.bar(list(words), list(words.values()), color=COLOURS["policy"], width=0.7)
        ax.bar_label(bars, [f"{share:.0%}" for share in words.values()], fontsize=TEXT, padding=2)
        dress(ax, title, "first word of the answer", "probability")
        ax.tick_params(labelleft=True)
        ax.set_ylim(0, 1.1)
        ax.grid(visible=False, axis="x")
    return figure


def learning_curves(metrics: Mapping[str, Rows]) -> Figure:
    """The main curve of each of the four stages, from their runs' metrics.

    metrics: "pretrain", "sft", "reward_model" and "ppo" -> one mapping a step.
    """
    figure = Figure(figsize=(10, 5.2), layout="constrained")
    axes = dict(zip(("pretrain", "sft", "reward_model", "ppo"), figure.subplots(2, 2).flatten(),
                    strict=True))  # fmt: skip
    looks = {
        "pretrain": ("GPT: loss on text", "update", "nats a token"),
        "sft": ("SFT: loss on answers", "update", "nats a token"),
        "reward_model": ("Reward model: accuracy, held out", "update", "share of pairs"),
        "ppo": ("PPO-ptx: reward and gold", "iteration (one rollout)", "reward, utility"),
    }
    for stage, look in looks.items():
        dress(axes[stage], *look)
    for stage in ("pretrain", "sft"):
        steps, loss = series(metrics[stage], "loss")
        axes[stage].plot(steps, loss, color=COLOURS["policy"], linewidth=1.5)
        scale(axes[stage], "log")
    ax, rows = axes["reward_model"], metrics["reward_model"]
    ax.plot(*series(rows, "eval_accuracy"), "o-", color=COLOURS["reward"], markersize=4,
            label="reward model")  # fmt: skip
    best = series(rows, "bayes_closed_book")[1]
    if len(best):
        ax.axhline(best[-1], color=INK, linewidth=1, linestyle="--",
                   label="best possible from the corpus")  # fmt: skip
    scale(ax, "percent")
    legend(ax, loc="lower right")
    ax, rows = axes["ppo"], metrics["ppo"]
    for key, label, style in (("reward", "reward (proxy)", "--"), ("gold", "gold", "-")):
        role = "proxy" if key == "reward" else "gold"
        steps, values = series(rows, key)
        ax.plot(steps, smooth(values, 5), color=COLOURS[role], linestyle=style, linewidth=1.8,
                label=label)  # fmt: skip
    legend(ax, loc="lower right")
    return figure
