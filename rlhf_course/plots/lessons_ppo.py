"""Chapter 5: the surrogate and its bound, clipping, whitening, controllers, unhealthy runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from matplotlib.axes import Axes
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
    legend,
    level,
    scale,
    series,
    smooth,
)

POLICY, REFERENCE, CRITIC = COLOURS["policy"], COLOURS["reference"], COLOURS["critic"]
GOOD = COLOURS["reward"]

Loss = Callable[..., tuple[torch.Tensor, dict]]
"""`ppo.policy_loss` or `ppo.value_loss`, the package's or a student's."""


# --------------------------------------------------------------------- the surrogate and its bound


def two_step_task(steps: np.ndarray) -> dict[str, np.ndarray]:
    """Exact returns, surrogates and bounds of a task of two binary actions, along one direction.

    steps (N,): how far all logits have moved from the old policy -> name -> (N,). The first action
    chooses the state in which the second is taken, so the surrogate, which keeps the old states,
    misses what the new ones are worth.
    """

    def chances(step):
        move = np.array([1.0, 0.8, 1.0]) * np.asarray(step)[..., None]  # (N, 3)
        return 1 / (1 + np.exp(-(np.array([-1.2, 0.2, 0.5]) + move)))  # first; second after 0, 1

    worth = np.array([[0.2, 1.5], [3.0, 0.0]])  # of the leaves: [first, second]
    old, new = chances(0.0), chances(steps)
    value = (1 - old[1:]) * worth[:, 0] + old[1:] * worth[:, 1]  # (2,): after the first action
    start = (1 - old[0]) * value[0] + old[0] * value[1]
    first = np.stack([1 - new[:, 0], new[:, 0]], axis=1)  # (N, 2)
    second = np.stack([1 - new[:, 1:], new[:, 1:]], axis=2)  # (N, 2, 2)
    gain = (second * (worth - value[:, None])).sum(axis=2)  # (N, 2): E over the second's A
    old_first = np.array([1 - old[0], old[0]])
    surrogate = start + first @ (value - start) + gain @ old_first
    true = start + first @ (value - start) + (first * gain).sum(axis=1)
    largest = max(np.abs(value - start).max(), np.abs(worth - value[:, None]).max())
    variation = np.abs(new - old).max(axis=1)  # total variation of a coin: |p' - p|
    clip = _clipped(first / old_first, value - start) @ old_first
    old_second = np.stack([1 - old[1:], old[1:]], axis=1)  # (2, 2)
    terms = _clipped(second / old_second, worth - value[:, None]) * old_second
    return {
        "true": true, "surrogate": surrogate,
        "bound": surrogate - 4 * largest * variation**2,  # 2 T (T - 1) α² max|A| with T = 2
        "clipped": start + clip + terms.sum(axis=2) @ old_first,
    }  # fmt: skip


def _clipped(ratio: np.ndarray, advantage: np.ndarray, clip: float = 0.2) -> np.ndarray:
    return np.minimum(ratio * advantage, ratio.clip(1 - clip, 1 + clip) * advantage)


def surrogate_bound() -> Figure:
    """True return, surrogate, its lower bound and the clipped surrogate over the step's length."""
    steps = np.linspace(-1.0, 3.0, 400)
    curves = two_step_task(steps)
    figure = Figure(figsize=(8.4, 3.8), layout="constrained")
    ax = figure.subplots()
    dress(ax, "A task of two actions, computed exactly", "step along one direction, logits",
          "expected reward of an episode")  # fmt: skip
    looks = {
        "true": ("true return J", INK, "-", 2.4), "surrogate": ("surrogate L", GOOD, "--", 2.0),
        "bound": ("lower bound on J", REFERENCE, ":", 2.0),
        "clipped": ("clipped surrogate, ε = 0.2", POLICY, "-.", 2.0),
    }  # fmt: skip
    for name, (label, colour, style, width) in looks.items():
        ax.plot(steps, curves[name], style, color=colour, linewidth=width, label=label)
    for name in ("true", "surrogate", "bound", "clipped"):
        if name != "surrogate":  # it has no top: that is its fault
            top = int(curves[name].argmax())
            ax.plot(steps[top], curves[name][top], "o", color=looks[name][1], markersize=6)
    ax.axvline(0, color=LIGHT, linewidth=1.2, zorder=0)
    ax.set_ylim(curves["true"].min() - 0.05, curves["surrogate"].max() + 0.05)
    legend(ax, loc="lower left")
    return figure


# ------------------------------------------------------------------------------------- clipping


def _terms(policy_loss: Loss, ratio: torch.Tensor, advantage: float, dual: float | None):
    """(objective, its derivative by log π) of single tokens with these ratios, (N,) each."""
    logprobs = ratio.log()[:, None].requires_grad_(True)
    constant = torch.full_like(logprobs, advantage)
    zeros, mask = torch.zeros_like(constant), torch.ones_like(constant, dtype=torch.bool)
    loss, _ = policy_loss(logprobs, zeros, constant, mask, dual_clip=dual, denominator=1.0)
    (gradient,) = torch.autograd.grad(-loss, logprobs)
    values = [
        -policy_loss(lp[None], z[None], a[None], m[None], dual_clip=dual, denominator=1.0)[0].item()
        for lp, z, a, m in zip(logprobs.detach(), zeros, constant, mask, strict=True)
    ]
    return np.array(values), gradient[:, 0].numpy()


def clipped_objective(policy_loss: Loss, dual_clip: float = 3.0) -> Figure:
    """What a token adds to the objective, and its gradient, over the ratio; A = 1 and A = -1."""
    ratio = torch.linspace(0.02, 4.0, 200)
    figure = Figure(figsize=(9.4, 5.2), layout="constrained")
    for column, advantage in enumerate((1.0, -1.0)):
        above, below = (figure.add_subplot(2, 2, 1 + column + 2 * row) for row in (0, 1))
        dress(above, f"A = {advantage:+g}: the token's term", "ratio ρ = new / old", "objective")
        dress(below, "… and its gradient", "ratio ρ = new / old", "d objective / d log π")
        plain = advantage * ratio.numpy()
        above.plot(ratio, plain, ":", color=REFERENCE, label="ρA, without a clip")
        below.plot(ratio, plain, ":", color=REFERENCE)
        choices = [("min(ρA, clip(ρ)A)", None, POLICY, "-")]
        if advantage < 0:
            choices.append((f"with dual clip c = {dual_clip:g}", dual_clip, BAD, "--"))
        for label, dual, colour, style in choices:
            value, gradient = _terms(policy_loss, ratio, advantage, dual)
            above.plot(ratio, value, style, color=colour, linewidth=2, label=label)
            below.plot(ratio, gradient, style, color=colour, linewidth=2)
        for ax in (above, below):
            ax.axvspan(0.8, 1.2, color=POLICY, alpha=0.1, linewidth=0)
            ax.axvline(1, color=INK, linewidth=0.8)
        legend(above)
    return figure


def repeated_updates(losses: Mapping[str, Loss], epochs: int = 60, lr: float = 0.3) -> Figure:
    """Two tokens of probability 0.3, one praised and one blamed: many updates on one sample."""
    figure = Figure(figsize=(9.4, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, advantage in zip(axes, (1.0, -1.0), strict=True):
        dress(ax, f"A = {advantage:+g}", "updates on the same sample", "probability of the token")
        for (label, loss), look in zip(losses.items(), RUNS, strict=False):
            ax.plot(_train_on_one(loss, advantage, epochs, lr), look[1], color=look[0],
                    linewidth=2, label=label)  # fmt: skip
        for bound in (0.8, 1.2):
            ax.axhline(0.3 * bound, color=INK, linewidth=0.8, linestyle=":")
        ax.set_ylim(0, 1)
    legend(axes[0])
    return figure


def _train_on_one(loss: Loss, advantage: float, epochs: int, lr: float) -> list[float]:
    logits = torch.log(torch.tensor([0.3, 0.35, 0.35])).requires_grad_(True)
    one, mask = torch.full((1, 1), advantage), torch.ones(1, 1, dtype=torch.bool)
    old, seen = logits.log_softmax(0)[0].detach().view(1, 1), []
    for _ in range(epochs):
        new = logits.log_softmax(0)[0].view(1, 1)
        seen.append(new.exp().item())
        (gradient,) = torch.autograd.grad(loss(new, old, one, mask)[0], logits)
        with torch.no_grad():
            logits -= lr * gradient
    return seen


# ----------------------------------------------------------------------- whitening and the critic


def whitening(rows: Mapping[str, Sequence[float]], names: Sequence[str]) -> Figure:
    """Advantages of a few answers' tokens, side by side for several ways of normalising.

    rows: title -> for each answer a list of token advantages. names: of the answers.
    """
    figure = Figure(figsize=(10, 3.1), layout="constrained")
    axes = figure.subplots(1, len(rows), squeeze=False)[0]
    colours = (GOOD, POLICY, BAD)
    for ax, (title, answers) in zip(axes, rows.items(), strict=True):
        dress(ax, title, "token", "advantage")
        start = 0
        for name, values, colour in zip(names, answers, colours, strict=False):
            at = np.arange(start, start + len(values))
            ax.bar(at, values, color=colour, label=name, width=0.8)
            start += len(values) + 1
        ax.axhline(0, color=INK, linewidth=0.8)
        ax.set_xticks([])
    legend(axes[0])
    return figure


def clipped_value(value_loss: Loss, old: float = 0.0, clip: float = 0.2) -> Figure:
    """The critic's loss and its gradient over V, for a near and for a far target."""
    values = torch.linspace(-1.0, 1.6, 261)
    figure = Figure(figsize=(9.4, 3.4), layout="constrained")
    axes = figure.subplots(1, 2)
    for ax, target in zip(axes, (0.1, 1.0), strict=True):
        dress(ax, f"V_old = {old:g}, target R = {target:g}", "V, in the reward's unit",
              "loss of the token, reward²")  # fmt: skip
        for label, limit, colour, style in (("without clip", None, REFERENCE, ":"),
                                            (f"clip {clip:g}", clip, CRITIC, "-")):  # fmt: skip
            ax.plot(values, [_value_term(value_loss, v, old, target, limit) for v in values],
                    style, color=colour, linewidth=2, label=label)  # fmt: skip
        ax.axvspan(old - clip, old + clip, color=CRITIC, alpha=0.1, linewidth=0)
        ax.axvline(target, color=INK, linewidth=0.8, linestyle="--")
    legend(axes[0])
    return figure


def _value_term(loss: Loss, value: torch.Tensor, old: float, target: float, clip) -> float:
    one = torch.ones(1, 1)
    return loss(value.view(1, 1), old * one, target * one, one > 0, clip)[0].item()


# -------------------------------------------------------------------------------- the controllers


def simulated_kl(
    controller,
    appetite: float = 0.3,
    speed: float = 0.1,
    iterations: int = 120,
    episodes: int = 256,
    seed: int = 0,
) -> tuple[np.ndarray, np.ndarray]:
    """(KL, price) of a simulated policy, (iterations,) each.

    Its KL moves towards appetite / price by `speed` of the way in each iteration, which is what a
    policy does that gains `appetite` of reward for the first nat; measured with 5 % of noise.
    """  # fmt: skip
    noise, kl, seen, prices = np.random.default_rng(seed), 0.0, [], []
    for _ in range(iterations):
        seen.append(kl)
        prices.append(controller.value)
        controller.update(max(kl * (1 + 0.05 * noise.standard_normal()), 0.0), episodes)
        kl += speed * (min(appetite / max(prices[-1], 1e-9), 30.0) - kl)
    return np.array(seen), np.array(prices)


def step_responses(controllers: Mapping[str, object], target: float, **plant) -> Figure:
    """KL and price of simulated policies under several controllers."""
    figure = Figure(figsize=(9.4, 5.0), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    dress(above, "KL of a simulated policy", "", "nats a sequence")
    dress(below, "Its price β", "iteration (one rollout of 256 episodes)", "reward a nat")
    above.axhspan(0.85 * target, 1.15 * target, color=POLICY, alpha=0.12, linewidth=0)
    level(above, target, "target ± 15 %", "--")
    for (label, controller), look in zip(controllers.items(), RUNS, strict=False):
        kl, price = simulated_kl(controller, **plant)
        above.plot(kl, linestyle=look[1], color=look[0], linewidth=1.8, label=label)
        below.plot(price, linestyle=look[1], color=look[0], linewidth=1.8)
    scale(below, "log")
    legend(above)
    return figure


# -------------------------------------------------------------------------- runs and their bands

PANELS = {
    "reward": ("Reward (proxy)", "reward a sequence", COLOURS["proxy"]),
    "gold": ("Gold", "utility a sequence", COLOURS["gold"]),
    "kl": ("KL to the reference", "nats a sequence", POLICY),
    "kl_coef": ("Price β", "reward a nat", REFERENCE),
    "entropy": ("Entropy", "nats a token", POLICY),
    "clipfrac": ("Clip fraction", "share of tokens", POLICY),
    "ratio_max": ("Largest ratio", "new / old", POLICY),
    "ptx_loss": ("Pretraining loss", "nats a token", REFERENCE),
    "kl_k3": ("KL from the old policy", "nats a token", POLICY),
    "value_loss": ("Value loss", "reward²", CRITIC),
    "explained_variance": ("Explained variance", "share", CRITIC),
    "length": ("Length", "tokens an answer", POLICY),
    "share_idk": ("“I do not know”", "share of answers", GOOD),
    "share_true": ("True answers", "share of answers", GOOD),
}  # fmt: skip
"""Metric -> title, unit and colour of its panel."""


def bands(
    runs: Sequence[Rows], keys: Sequence[str], yours: Rows | None = None, target=None
) -> Figure:
    """Several runs' metrics as a band from the lowest to the highest, one panel a metric.

    yours: a run drawn as a line over the band. target: of the KL, nats a sequence.
    """
    columns = 3
    lines = -(-len(keys) // columns)
    figure = Figure(figsize=(10, 2.5 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False).flatten()
    for ax in axes[len(keys) :]:
        ax.remove()
    for ax, key in zip(axes, keys, strict=False):
        _band(ax, runs, key)
        if yours is not None:
            steps, values = series(yours, key)
            ax.plot(steps, values, color=PANELS[key][2], linewidth=1.7)
        if key == "kl" and target is not None:
            level(ax, target, "target", "--", "left")
    return figure


def _band(ax: Axes, runs: Sequence[Rows], key: str) -> None:
    title, unit, _ = PANELS[key]
    dress(ax, title, "iteration (one rollout)", unit)
    curves = [smooth(series(rows, key)[1], 3) for rows in runs]
    steps = series(runs[0], key)[0]
    length = min(map(len, curves))
    low, high = (f([curve[:length] for curve in curves], axis=0) for f in (np.min, np.max))
    ax.fill_between(steps[:length], low, high, color="#9a9a9a", alpha=0.45, linewidth=0)
    ax.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    if key == "explained_variance":
        ax.set_ylim(max(-1.5, ax.get_ylim()[0]), 1.05)


def gallery(healthy: Sequence[Rows], broken: Mapping[str, tuple[Rows, Sequence[str]]]) -> Figure:
    """Broken runs, a column each: reward, and the curves that give the fault away.

    broken: what was broken -> (its metrics, the metrics to draw below). Grey: healthy runs.
    """
    lines = max(len(keys) for _, keys in broken.values())
    figure = Figure(figsize=(3.35 * len(broken), 2.25 * lines + 0.3), layout="constrained")
    axes = figure.subplots(lines, len(broken), squeeze=False)
    for column, (name, (rows, keys)) in enumerate(broken.items()):
        for line, key in enumerate(keys):
            ax = axes[line][column]
            _band(ax, healthy, key)
            steps, values = series(rows, key)
            ax.plot(steps, values, color=BAD, linewidth=1.6)
            if key == "explained_variance":
                ax.set_ylim(-1.5, 1.05)
            head = f"{name}\n" if line == 0 else ""
            ax.set_title(head + PANELS[key][0], fontsize=TEXT + 0.5, color=INK, loc="left")
        for line in range(len(keys), lines):
            axes[line][column].remove()
    return figure
