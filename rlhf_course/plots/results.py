"""Figures that compare runs and policies: did it help, what did it cost, was it exploited?"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf_course.plots.style import (
    COLOURS,
    INK,
    LIGHT,
    RUNS,
    TEXT,
    VERDICTS,
    Rows,
    dress,
    from_zero,
    legend,
    percent,
    scale,
    series,
    smooth,
)

Shares = Mapping[str, Mapping[str, float]]
"""Group of prompts -> kind of answer -> share in [0, 1]."""


def kl_control(rows: Rows, target: float, band: float = 0.15) -> Figure:
    """KL (nats a sequence) beside its target ± `band` (a share of it), and its price below.

    rows: a PPO run's metrics, `kl` and `kl_coef`.
    """
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    x = "iteration (one rollout)"
    dress(above, "KL to the reference", x, "nats a sequence")
    dress(below, "Its price, the KL coefficient β", x, "reward a nat")
    above.tick_params(labelbottom=True)
    above.axhspan(target * (1 - band), target * (1 + band), color=COLOURS["policy"], alpha=0.12,
                  linewidth=0, label=f"target ± {band:.0%}")  # fmt: skip
    above.axhline(target, color=INK, linewidth=1, linestyle="--", label=f"target {target:g}")
    steps, kl = series(rows, "kl")
    above.plot(steps, kl, ".", color=COLOURS["policy"], markersize=4, alpha=0.45)
    window = min(5, 1 + len(kl) // 6)
    above.plot(steps, smooth(kl, window), color=COLOURS["policy"], linewidth=1.8,
               label="moving average")  # fmt: skip
    if len(kl):
        mean, last = kl[-20:].mean(), steps[-20:]
        above.plot(last[[0, -1]], [mean, mean], color=COLOURS["gold"], linewidth=3,
                   label=f"last {len(last)}: {mean:.3g} ({mean / target - 1:+.0%})")  # fmt: skip
    from_zero(above)
    legend(above)
    below.plot(*series(rows, "kl_coef"), color=COLOURS["reference"], linewidth=1.8)
    from_zero(below)
    scale(below, "linear")
    below.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    return figure


def overoptimisation(
    runs: Mapping[str, Rows], best_of_n: Mapping[str, Sequence[float]] | None = None
) -> Figure:
    """Proxy (above) and gold (below) over √KL, as gains over the policy PPO began with.

    The axes are those of Gao et al. 2023: near the start a reward grows with √KL. Gains, since
    best-of-n may have been measured on other prompts than the rollouts.

    runs: label -> metrics (`kl`, `reward` or else `score`, `gold`).
    best_of_n: "n", "kl" (nats, log n - (n-1)/n), "gold", "proxy"; lists that begin with n = 1.
    """
    figure = Figure(figsize=(8, 7), layout="constrained")
    axes = dict(zip(("proxy", "gold"), figure.subplots(2, 1, sharex=True), strict=True))
    titles = {"proxy": "Proxy: the reward that PPO is given", "gold": "Gold: what it is worth"}
    units = {"proxy": "gain over SFT, reward-model units", "gold": "gain over SFT, utility"}
    for kind, ax in axes.items():
        dress(ax, titles[kind], "√KL to the reference, √nats a sequence", units[kind])
        ax.tick_params(labelbottom=True)
        ax.axhline(0, color=INK, linewidth=1, zorder=1)
    for i, (label, rows) in enumerate(runs.items()):
        for kind, ax in axes.items():
            proxy = "reward" if any("reward" in row for row in rows) else "score"
            key = proxy if kind == "proxy" else "gold"
            _draw_path(ax, rows, key, label, RUNS[i % len(RUNS)])
    if best_of_n:
        root = np.sqrt(np.maximum(best_of_n["kl"], 0))
        for kind, ax in axes.items():
            gain = np.asarray(best_of_n[kind], dtype=float) - best_of_n[kind][0]
            ax.plot(root, gain, "x", color=INK, markersize=5, linestyle="none", zorder=4,
                    label=f"best of n = {best_of_n['n'][0]} … {best_of_n['n'][-1]}")  # fmt: skip
    legend(axes["proxy"])
    return figure


def _draw_path(ax: Axes, rows: Rows, key: str, label: str, look: tuple) -> None:
    """One run in the order of time: faint points, smoothed path, a marker at its end."""
    both = [row for row in rows if row.get(key) is not None and row.get("kl") is not None]
    if not both:
        return
    kl, value = series(both, "kl")[1], series(both, key)[1]
    untouched = value[kl == 0.0]  # the critic's warm-up: the policy still is the reference
    gain = value - (untouched.mean() if len(untouched) else value[0])
    colour, style, marker = look
    ax.plot(np.sqrt(np.maximum(kl, 0)), gain, ".", color=colour, markersize=3, alpha=0.3)
    window = min(7, 1 + len(kl) // 6)
    root, gain = np.sqrt(np.maximum(smooth(kl, window), 0)), smooth(gain, window)
    ax.plot(root, gain, linestyle=style, color=colour, linewidth=1.8, label=label)
    ax.plot(root[-1:], gain[-1:], marker, color=colour, markersize=7, markeredgecolor="white")


def honesty(shares_by_policy: Mapping[str, Shares]) -> Figure:
    """Stacked bars of the kinds of answer, one panel a group of prompts, one bar a policy."""
    policies = list(shares_by_policy)
    groups = list(dict.fromkeys(g for shares in shares_by_policy.values() for g in shares))
    figure = Figure(figsize=(10, 1.5 + 0.42 * len(policies)), layout="constrained")
    axes = figure.subplots(1, max(len(groups), 1), squeeze=False)[0]
    for ax, group in zip(axes, groups, strict=False):
        dress(ax, group, "share of answers", "")
        left = np.zeros(len(policies))
        for kind, (label, colour, ink) in VERDICTS.items():
            tables = [shares.get(group, {}) for shares in shares_by_policy.values()]
            share = np.array([table.get(kind, 0.0) for table in tables])
            if not any(kind in table for table in tables):
                continue
            ax.barh(policies, share, left=left, color=colour, label=label, height=0.72,
                    edgecolor="white", linewidth=0.8)  # fmt: skip
            for y, (start, width) in enumerate(zip(left, share, strict=True)):
                if width >= 0.06:
                    ax.text(start + width / 2, y, f"{width:.0%}", ha="center", va="center",
                            fontsize=TEXT, color=ink)  # fmt: skip
            left += share
        ax.set_xlim(0, 1)
        ax.invert_yaxis()
        ax.grid(visible=False)
        ax.xaxis.set_major_formatter(percent)
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(
        handles, labels, loc="outside upper center", ncols=4, fontsize=TEXT, frameon=False
    )
    return figure


def perplexity_bars(
    perplexities: Mapping[str, float], pretrained: float | None = None, limit: float = 1.05
) -> Figure:
    """Corpus perplexity of each policy, exp(nats a token); dashed: `limit` × the pretrained one."""
    names, values = list(perplexities), list(perplexities.values())
    notes = [f"{v:.3g}" + (f"  (×{v / pretrained:.3g})" if pretrained else "") for v in values]
    colours = [COLOURS["reference" if n == "pretrained" else "policy"] for n in names]
    figure, ax = _bars(names, values, notes, colours)
    title = "Perplexity of held-out pretraining text"
    if pretrained:
        ax.axvline(pretrained * limit, color=INK, linewidth=1, linestyle="--")
        title += f" (dashed: {limit:g} × pretrained)"
    dress(ax, title, "perplexity, exp(nats a token)", "")
    ax.grid(visible=False, axis="y")
    ax.set_xlim(0, max([*values, 1.0]) * 1.2)
    return figure


def reward_accuracy(models: Mapping[str, Mapping[str, float]]) -> Figure:
    """Held-out accuracy of reward models by name, beside the best possible ones.

    models: name -> {"eval_accuracy", "bayes_closed_book"?, "bayes_full"?}, shares of pairs.
    """
    models = {name: model for name, model in models.items() if "eval_accuracy" in model}
    values = [model["eval_accuracy"] for model in models.values()]
    figure, ax = _bars(list(models), values, [f"{v:.1%}" for v in values], COLOURS["reward"])
    dress(ax, "Accuracy on held-out comparisons", "share of pairs ranked right", "")
    ax.grid(visible=False, axis="y")
    first = next(iter(models.values()), {})
    for key, label, style in (("bayes_closed_book", "best, closed book", "--"),
                              ("bayes_full", "best, knowing all", ":")):  # fmt: skip
        if key in first:
            ax.axvline(first[key], color=INK, linewidth=1.2, linestyle=style,
                       label=f"{label}: {first[key]:.1%}")  # fmt: skip
    ax.set_xlim(0.5, 1)  # 0.5 is a coin
    ax.xaxis.set_major_formatter(percent)
    if ax.lines:
        figure.legend(loc="outside lower center", ncols=2, fontsize=TEXT, frameon=False)
    return figure


def _bars(names, values, notes, colour) -> tuple[Figure, Axes]:
    """Horizontal bars with a note behind each."""
    figure = Figure(figsize=(8, 1.1 + 0.42 * len(names)), layout="constrained")
    ax = figure.subplots()
    bars = ax.barh(names, values, color=colour, height=0.66)
    paper = {"facecolor": "white", "edgecolor": "none", "pad": 1, "alpha": 0.9}  # over the lines
    ax.bar_label(bars, notes, padding=5, fontsize=TEXT, color=INK, bbox=paper, zorder=5)
    ax.invert_yaxis()
    ax.set_axisbelow(True)
    ax.grid(color=LIGHT)
    return figure, ax
