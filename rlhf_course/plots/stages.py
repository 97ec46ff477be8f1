"""The curves of one training stage, a grid of small panels."""

from __future__ import annotations

import math
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from rlhf_course.plots.style import (
    COLOURS,
    INK,
    LIGHT,
    VERDICTS,
    Rows,
    dress,
    from_zero,
    legend,
    level,
    scale,
    series,
    smooth,
)


@dataclass(frozen=True)
class Curve:
    """One metric of a panel."""

    key: str
    label: str
    colour: str
    style: str = "-"


@dataclass(frozen=True)
class Panel:
    """One small plot, whose curves share a unit. `level`: a horizontal line and its name."""

    title: str
    unit: str
    curves: tuple[Curve, ...]
    scale: str = "linear"
    limits: tuple[float | None, float] | None = None
    from_zero: bool = False
    level: tuple[float, str] | None = None


SETTINGS = {"lr", "kl_coef"}  # not measured, hence without noise: drawn as they are

POLICY, CRITIC, REWARD = COLOURS["policy"], COLOURS["critic"], COLOURS["reward"]
REFERENCE = COLOURS["reference"]


def _one(title: str, unit: str, key: str, colour: str, *rest, **options) -> Panel:
    return Panel(title, unit, (Curve(key, "", colour),), *rest, **options)


def _optimizer(colour: str) -> tuple[Panel, Panel]:
    return (
        _one("Gradient norm", "norm before clipping", "grad_norm", colour, "log"),
        _one("Learning rate", "size of a step", "lr", colour, from_zero=True),
    )


KINDS = tuple(Curve(f"share_{k}", label, colour) for k, (label, colour, _) in VERDICTS.items())

PANELS: dict[str, tuple[Panel, ...]] = {
    "pretrain": (
        _one("Loss, training", "nats a token", "loss", POLICY, "log"),
        _one("Perplexity, held out", "exp(nats a token)", "validation_perplexity", POLICY),
        *_optimizer(POLICY),
    ),
    "sft": (
        Panel("Loss on answers", "nats a token",
              (Curve("loss", "training", POLICY), Curve("eval_loss", "held out", INK, "--")),
              "log"),
        _one("Exact match, held out", "share of greedy answers", "eval_exact_match", POLICY,
             "percent", from_zero=True),
        *_optimizer(POLICY),
    ),
    "reward_model": (
        _one("Loss, training", "nats a pair", "loss", REWARD, "log",
             level=(math.log(2), "a coin: log 2")),
        Panel("Accuracy, held out", "share of pairs",
              (Curve("bayes_full", "best, knowing all", INK, ":"),
               Curve("bayes_closed_book", "best, closed book", INK, "--"),
               Curve("eval_accuracy", "reward model", REWARD)), "percent", (0.5, 1)),
        _one("Margin, held out", "reward of better − worse", "eval_margin", REWARD),
        _one("Calibration error, held out", "|confidence − accuracy|", "eval_calibration_error",
             REWARD, "percent", from_zero=True),
        *_optimizer(REWARD),
    ),
    "dpo": (
        _one("Loss, training", "nats a pair", "loss", POLICY,
             level=(math.log(2), "the reference: log 2")),
        Panel("Accuracy of the implicit reward", "share of pairs",
              (Curve("accuracy", "training", POLICY),
               Curve("eval_accuracy", "held out", INK, "--")), "percent", (0, 1)),
        Panel("Implicit reward β log π / π_ref", "reward a sequence",
              (Curve("reward_chosen", "chosen", REWARD),
               Curve("reward_rejected", "rejected", COLOURS["proxy"], "--"))),
        _one("KL to the reference", "nats a sequence", "kl", POLICY, from_zero=True),
        _one("Gold reward of its answers", "utility a sequence", "gold", COLOURS["gold"]),
        Panel("Kinds of answer", "share of answers", KINDS, "percent", (0, 1)),
        _one("Length", "tokens an answer", "length", POLICY),
        _one("Answers that end (EOS)", "share of answers", "eos_rate", POLICY, "percent",
             (None, 1.005)),
        *_optimizer(POLICY),
    ),
    "ppo": (
        Panel("Reward", "reward a sequence",
              (Curve("reward", "proxy (reward)", COLOURS["proxy"], "--"),
               Curve("score", "with EOS penalty", "#999999", ":"),
               Curve("gold", "gold (utility)", COLOURS["gold"]))),
        _one("KL to the reference", "nats a sequence", "kl", POLICY),
        _one("KL coefficient β", "reward a nat", "kl_coef", REFERENCE, from_zero=True),
        Panel("Kinds of answer", "share of answers", KINDS, "percent", (0, 1)),
        _one("Length", "tokens an answer", "length", POLICY),
        _one("Answers that end (EOS)", "share of answers", "eos_rate", POLICY, "percent",
             (None, 1.005)),
        _one("Entropy of the policy", "nats a token", "entropy", POLICY, from_zero=True),
        _one("Clip fraction", "share of tokens", "clipfrac", POLICY, "percent",
             from_zero=True),
        _one("Largest ratio new / old", "ratio", "ratio_max", POLICY, "log",
             level=(1.0, "no change")),
        Panel("KL from the old policy", "nats a token",
              (Curve("kl_k1", "k1", REFERENCE, "--"), Curve("kl_k3", "k3", POLICY))),
        _one("KL in the loss", "nats a token", "kl_loss", REFERENCE),
        _one("Value loss", "reward²", "value_loss", CRITIC, "log"),
        _one("Explained variance", "share of the returns'", "explained_variance", CRITIC,
             limits=(-1, 1.05), level=(0.0, "0: a constant; below −1: cut off")),
        Panel("Gradient norms by network", "norm before clipping",
              (Curve("policy_grad_norm", "policy", POLICY),
               Curve("value_grad_norm", "critic", CRITIC, "--")), "log"),
        Panel("Gradient norms by loss", "norm on the policy",
              (Curve("grad_norm_ppo", "PPO", POLICY),
               Curve("grad_norm_ptx", "γ ptx", REFERENCE, "--")), "log"),
        _one("Pretraining loss (ptx)", "nats a token", "ptx_loss", REFERENCE),
    ),
}  # fmt: skip


def stage_curves(stage: str, rows: Rows, kl_target: float | None = None) -> Figure:
    """A grid of everything that a stage logged.

    stage: pretrain, sft, reward_model, ppo or dpo. rows: its metrics; panels without any are left
    out.
    kl_target: nats a sequence, drawn into PPO's KL panel.
    """
    logged = {key for row in rows for key in row}
    panels = [p for p in PANELS[stage] if any(c.key in logged for c in p.curves)]
    columns = 3 if stage in ("ppo", "dpo") else 2
    lines = max(-(-len(panels) // columns), 1)
    figure = Figure(figsize=(10, (2.5 if columns == 3 else 2.9) * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax in axes[len(panels) :]:
        ax.remove()
    for ax, panel in zip(axes, panels, strict=False):
        _draw_panel(ax, panel, rows, "iteration (one rollout)" if stage == "ppo" else "update")
        if stage == "ppo":
            _shade_warmup(ax, rows)
        if panel.title == "KL to the reference" and kl_target is not None:
            level(ax, kl_target, "target", "--", "left")
    return figure


def _draw_panel(ax: Axes, panel: Panel, rows: Rows, x: str) -> None:
    dress(ax, panel.title, x, panel.unit)
    drawn = [curve for curve in panel.curves if len(series(rows, curve.key)[0])]
    for curve in drawn:
        _draw_curve(ax, rows, curve)
    if panel.level is not None:
        level(ax, *panel.level)
    first, last = rows[0].get("step", 0), rows[-1].get("step", len(rows) - 1)
    room = 0.03 * max(last - first, 1)
    ax.set_xlim(first - room, last + room)  # the same for every panel, however sparse
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    scale(ax, panel.scale)
    if panel.limits is not None:
        ax.set_ylim(*panel.limits)
    if panel.from_zero:
        from_zero(ax)
    if len(drawn) > 1:
        legend(ax)


def _draw_curve(ax: Axes, rows: Rows, curve: Curve) -> None:
    """Data and moving average; a metric measured only now and then as points, joined."""
    steps, values = series(rows, curve.key)
    if 2 * len(values) < len(rows):
        ax.plot(steps, values, linestyle=curve.style, color=curve.colour, marker="o",
                markersize=3.5, linewidth=1.4, label=curve.label)  # fmt: skip
        return
    alpha = 0.3 if len(values) < 400 else 0.18  # many points cover one another
    ax.plot(steps, values, color=curve.colour, linewidth=0.8, alpha=alpha)
    values = values if curve.key in SETTINGS else smooth(values)
    ax.plot(steps, values, linestyle=curve.style, color=curve.colour, linewidth=1.8,
            label=curve.label)  # fmt: skip


def _shade_warmup(ax: Axes, rows: Rows) -> None:
    """Grey behind the iterations in which the critic alone was trained."""
    warm = [row.get("step", i) for i, row in enumerate(rows) if "policy_loss" not in row]
    if warm and len(warm) < len(rows):
        ax.axvspan(min(warm) - 0.5, max(warm) + 0.5, color=LIGHT, alpha=0.5, linewidth=0, zorder=0)
