"""The figures of chapter 3: preferences, their loss, and what a reward model has learned."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
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
    VERDICTS,
    Rows,
    dress,
    legend,
    level,
    percent,
    scale,
    series,
    smooth,
)

REWARD, PROXY, REFERENCE = COLOURS["reward"], COLOURS["proxy"], COLOURS["reference"]


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))


# ------------------------------------------------------------------------------------ the theory


def raters(worths: Sequence[float], scores: Mapping[str, Sequence[float]]) -> Figure:
    """Two panels: the scores that raters give, and the share of pairs each orders as the worths do.

    worths: (N,) true worth of each answer. scores: rater -> (N,) the scores they wrote down.
    """
    worths = np.asarray(worths, dtype=float)
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    dress(left, "Scores: everyone has a scale of their own", "true worth of the answer",
          "score written down")  # fmt: skip
    dress(right, "Comparisons: all say the same", "share of pairs in the true order", "")
    for (name, given), (colour, _, marker) in zip(scores.items(), RUNS, strict=False):
        given = np.asarray(given, dtype=float)
        left.plot(worths, given, marker, color=colour, markersize=5, alpha=0.8, label=name)
        i, j = np.triu_indices(len(worths), 1)
        clear = worths[i] != worths[j]
        same = np.sign(worths[i] - worths[j]) == np.sign(given[i] - given[j])
        share = same[clear].mean()
        right.barh([name], [share], color=colour, height=0.6)
        right.text(share - 0.02, name, f"{share:.0%}", ha="right", va="center", color="white",
                   fontsize=TEXT)  # fmt: skip
    legend(left)
    right.set_xlim(0, 1)
    right.invert_yaxis()
    right.grid(visible=False, axis="y")
    right.xaxis.set_major_formatter(percent)
    return figure


def gumbel_duel(difference: float, gaps: Sequence[float], shares: Sequence[float]) -> Figure:
    """Two noisy worths (left), and how often the better one wins over the gap (right).

    difference: gap in worth of the two densities drawn. gaps, shares: (N,) what was counted.
    """
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    left, right = figure.subplots(1, 2)
    dress(left, "What the labeler feels: worth + Gumbel noise", "felt worth", "density")
    x = np.linspace(-2.5, 7, 400)
    for worth, name, colour, dash in (
        (0.0, "worse answer, worth 0", BAD, "--"),
        (difference, f"better answer, worth {difference:g}", REWARD, "-"),
    ):
        density = np.exp(-(x - worth) - np.exp(-(x - worth)))
        left.plot(x, density, dash, color=colour, label=name)
        left.fill_between(x, density, color=colour, alpha=0.15, linewidth=0)
        left.axvline(worth, color=colour, linestyle=":", linewidth=1)
    legend(left)
    dress(right, "How often it is preferred", "difference of worth Δ", "share of duels")
    line = np.linspace(min(gaps), max(gaps), 200)
    right.plot(line, _sigmoid(line), color=INK, linewidth=1.6, label="σ(Δ)")
    right.plot(gaps, shares, "o", color=REWARD, markersize=5, label="counted")
    right.yaxis.set_major_formatter(percent)
    legend(right)
    return figure


def pairwise_loss_shape(differences: Sequence[float], losses: Sequence[float]) -> Figure:
    """-log σ over the difference of rewards (left, as computed) and the size of its gradient."""
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    left, right = figure.subplots(1, 2)
    x = np.asarray(differences, dtype=float)
    dress(left, "The loss of one pair", "reward of better − worse, Δ", "nats")
    left.plot(x, losses, color=REWARD, linewidth=2)
    left.plot(x, np.maximum(-x, 0), ":", color=INK, linewidth=1.2, label="−Δ, where the pair is "
              "ranked wrongly")  # fmt: skip
    level(left, float(np.log(2)), "a coin: log 2", "--")
    legend(left)
    dress(right, "How hard it pulls", "reward of better − worse, Δ", "|gradient|, 1 / reward")
    right.plot(x, _sigmoid(-x), color=REWARD, linewidth=2)
    right.annotate("ranked wrongly:\nfull pull", (x.min(), 0.97), xytext=(4, -6), va="top",
                   textcoords="offset points", fontsize=TEXT)  # fmt: skip
    right.annotate("ranked rightly\nand surely: nearly none", (x.max(), 0.03), xytext=(-4, 14),
                   textcoords="offset points", fontsize=TEXT, ha="right")  # fmt: skip
    return figure


def kwise_pairs(answers: Sequence[str]) -> Figure:
    """The K(K-1)/2 pairs of one ranked prompt as a table, and what reading them costs.

    answers: K short texts, best first.
    """
    size = len(answers)
    figure = Figure(figsize=(10, 3.6), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    for i in range(size):
        for j in range(size):
            colour, text = ("white", "") if i == j else (LIGHT, "")
            if i < j:
                colour, text = REWARD, f"s{i + 1} − s{j + 1}"
            left.fill_between([j - 0.47, j + 0.47], i - 0.47, i + 0.47, color=colour, alpha=0.85,
                              linewidth=0)  # fmt: skip
            left.text(j, i, text, ha="center", va="center", fontsize=TEXT, color="white")
    dress(left, "One batch element: all pairs of one prompt", "worse answer j",
          "better answer i")  # fmt: skip
    left.set_xticks(range(size), [f"{i + 1}" for i in range(size)])
    told = [a.encode("ascii", "replace").decode() for a in answers]  # fonts lack odd characters
    told = ["".join(c for c in a if c.isprintable()) for a in told]
    left.set_yticks(range(size), [f"{i + 1}  {a}" for i, a in enumerate(told)])
    left.set_xlim(-0.5, size - 0.5)
    left.set_ylim(size - 0.5, -0.5)
    left.grid(visible=False)
    k = np.arange(2, 10)
    dress(right, "Answers read for all pairs", "answers to a prompt, K", "forward passes a prompt")
    right.plot(k, k * (k - 1), "s--", color=BAD, markersize=4, label="pair by pair: K (K − 1)")
    right.plot(k, k, "o-", color=REWARD, markersize=4, label="K-wise: K")
    right.set_ylim(0)
    legend(right)
    return figure


# ------------------------------------------------------------------------- what was measured of it


def token_scores(readings: Mapping[str, Sequence[tuple[str, Sequence[str], Sequence[float]]]],
                 prompt_length: int) -> Figure:  # fmt: skip
    """What each model says at each token: one row an answer, one column a model.

    readings: model ("last: …" or "mean: …") -> [(kind of answer, T tokens, T scores), …]; where the
    name begins with "mean" the mean of the answer's tokens is drawn, else the last one is marked.
    """
    rows = max(len(r) for r in readings.values())
    figure = Figure(figsize=(10, 2.1 * rows + 0.3), layout="constrained")
    axes = figure.subplots(rows, len(readings), squeeze=False, sharey="col")
    for column, (model, answers) in enumerate(readings.items()):
        for ax, (kind, tokens, scores) in zip(axes[:, column], answers, strict=True):
            label, colour, _ = VERDICTS[kind]
            dress(ax, f"{model} · {label}", "", "score at token")
            x = np.arange(len(tokens))
            ax.axvspan(-0.5, prompt_length - 0.5, color=LIGHT, alpha=0.5, linewidth=0)
            ax.plot(x[:prompt_length], scores[:prompt_length], ".-", color="#aaaaaa", linewidth=1)
            ax.plot(x[prompt_length - 1 :], scores[prompt_length - 1 :], ".-", color=colour)
            if model.startswith("mean"):
                mean = float(np.mean(scores[prompt_length:]))
                ax.hlines(mean, prompt_length - 0.4, len(tokens) - 0.6, color=INK, linewidth=2,
                          linestyle="--")  # fmt: skip
                at, reward, side = prompt_length - 0.4, mean, "left"
            else:
                ax.plot(x[-1:], scores[-1:], "o", color=INK, markersize=8, fillstyle="none")
                at, reward, side = len(tokens) - 1, float(scores[-1]), "right"
            ax.annotate(f"reward {reward:+.1f}", (at, reward), xytext=(0, 6), ha=side, color=INK,
                        textcoords="offset points", fontsize=TEXT - 0.5)  # fmt: skip
            ax.set_xticks(x, tokens, rotation=60, ha="right", rotation_mode="anchor")
            ax.tick_params(axis="x", labelsize=TEXT - 1.5)
            ax.set_xlim(-0.5, len(tokens) - 0.3)
    return figure


def accuracy_by_seed(
    accuracies: Mapping[str, Sequence[float]], closed_book: float, full: float
) -> Figure:
    """Held-out accuracy: a dot a seed, a bar at their mean, beside what is possible at best."""
    figure = Figure(figsize=(8, 1.5 + 0.5 * len(accuracies)), layout="constrained")
    ax = figure.subplots()
    dress(ax, "Accuracy on held-out comparisons", "share of pairs ranked as the labeler did", "")
    for row, (values, (colour, _, marker)) in enumerate(
        zip(accuracies.values(), RUNS * len(accuracies), strict=False)
    ):
        ax.plot(values, [row] * len(values), marker, color=colour, markersize=7, alpha=0.75,
                markeredgecolor="white")  # fmt: skip
        mean = float(np.mean(values))
        ax.plot([mean, mean], [row - 0.28, row + 0.28], color=INK, linewidth=2)
        ax.annotate(f"{mean:.1%}", (mean, row - 0.3), ha="center", va="bottom", fontsize=TEXT)
    ax.set_yticks(range(len(accuracies)), list(accuracies))
    ax.set_ylim(len(accuracies) - 0.4, -0.75)
    for value, name, dash in ((closed_book, "best, closed book", "--"),
                              (full, "best, knowing all", ":")):  # fmt: skip
        ax.axvline(value, color=INK, linewidth=1.2, linestyle=dash, label=f"{name}: {value:.1%}")
    low = min(min(values) for values in accuracies.values())
    ax.set_xlim(min(low - 0.02, 0.66), full + 0.015)
    ax.grid(visible=False, axis="y")
    ax.xaxis.set_major_formatter(percent)
    figure.legend(loc="outside lower center", ncols=2, fontsize=TEXT, frameon=False)
    return figure


def reliability(curves: Mapping[str, Sequence[tuple[float, float, int]]]) -> Figure:
    """Said against seen: model -> [(predicted, observed, count), …], bins of predictions."""
    figure = Figure(figsize=(8, 3.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(3, 2))
    dress(left, "Calibration", "predicted: σ(r_a − r_b)", "observed: share in which a won")
    left.plot([0, 1], [0, 1], ":", color=INK, linewidth=1.2, label="calibrated")
    dress(right, "How often it says so", "predicted: σ(r_a − r_b)", "share of pairs")
    for (name, bins), (colour, dash, marker) in zip(curves.items(), RUNS, strict=False):
        predicted, observed, count = (
            np.array(column, dtype=float) for column in zip(*bins, strict=True)
        )
        error = np.sqrt(np.maximum(observed * (1 - observed), 0.25 / count) / count)
        left.errorbar(predicted, observed, 2 * error, color=colour, linestyle=dash, marker=marker,
                      markersize=4.5, linewidth=1.4, capsize=2, label=name)  # fmt: skip
        right.plot(predicted, count / count.sum(), linestyle=dash, marker=marker, color=colour,
                   markersize=4.5, linewidth=1.4)  # fmt: skip
    for ax in (left, right):
        ax.xaxis.set_major_formatter(percent)
        ax.yaxis.set_major_formatter(percent)
    left.set_xlim(0, 1)
    left.set_ylim(0, 1)
    right.set_ylim(0)
    legend(left)
    return figure


def score_distributions(scores: Mapping[str, Mapping[str, Sequence[float]]]) -> Figure:
    """Rewards by kind of answer, a panel for each group of people: a dot an answer, bar the mean.

    scores: group -> kind of answer (as in VERDICTS) -> (N,) rewards.
    """
    figure = Figure(figsize=(10, 3.4), layout="constrained")
    axes = figure.subplots(1, len(scores), sharex=True, sharey=True, squeeze=False)[0]
    kinds = [k for k in VERDICTS if any(len(kind.get(k, ())) for kind in scores.values())]
    spread = np.random.default_rng(0)
    for ax, (group, by_kind) in zip(axes, scores.items(), strict=True):
        dress(ax, group, "reward of the model", "")
        for row, kind in enumerate(kinds):
            values = np.asarray(by_kind.get(kind, ()), dtype=float)
            if not len(values):
                continue
            shown = values[:: max(len(values) // 300, 1)]
            ax.plot(shown, row + spread.uniform(-0.3, 0.3, len(shown)), ".", markersize=3,
                    color=VERDICTS[kind][1], alpha=0.5)  # fmt: skip
            ax.plot([values.mean()] * 2, [row - 0.36, row + 0.36], color=INK, linewidth=2)
            ax.annotate(f"{values.mean():+.1f}", (values.mean(), row - 0.37), ha="center",
                        va="bottom", fontsize=TEXT - 0.5)  # fmt: skip
        ax.set_yticks(range(len(kinds)), [VERDICTS[k][0] for k in kinds])
        ax.axvline(0, color=INK, linewidth=0.8, linestyle=":")
        ax.grid(visible=False, axis="y")
    axes[0].set_ylim(len(kinds) - 0.4, -0.8)
    return figure


def score_over(xs: Sequence[float], lines: Mapping[str, Sequence[float]], title: str, x: str,
               y: str = "reward of the same answer") -> Figure:  # fmt: skip
    """How a model's reward changes with something that should not matter, or not so much."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    ax = figure.subplots()
    dress(ax, title, x, y)
    for (name, values), (colour, dash, marker) in zip(lines.items(), RUNS, strict=False):
        ax.plot(xs, values, marker=marker, linestyle=dash, color=colour, markersize=4.5, label=name)
    ax.xaxis.set_major_locator(MaxNLocator(9, integer=True))
    scale(ax, "linear")
    legend(ax)
    return figure


def unhealthy_reward_models(healthy: Rows, broken: Mapping[str, Rows]) -> Figure:
    """The training loss of each broken run over a healthy one's, with its held-out accuracy.

    Rows are metrics of the stage: `loss` at every step, `eval_accuracy` at least at the last.
    """
    columns = 2 if len(broken) > 1 else 1
    lines = -(-len(broken) // columns)
    figure = Figure(figsize=(10, 2.6 * lines), layout="constrained")
    axes = figure.subplots(lines, columns, squeeze=False, sharex=True).flatten()
    for ax in axes[len(broken) :]:
        ax.remove()
    for ax, (name, rows) in zip(axes, broken.items(), strict=False):
        dress(ax, name, "update", "loss, nats a pair")
        _loss(ax, healthy, REFERENCE, "healthy", _accuracy(healthy))
        _loss(ax, rows, BAD, "broken", _accuracy(rows))
        level(ax, float(np.log(2)), "a coin: log 2", "--")
        low, high = ax.get_ylim()
        ax.set_ylim(min(low, 0.3), min(max(high, 0.9), 2.0))
        legend(ax, loc="lower left")
    return figure


def _accuracy(rows: Rows) -> float:
    return series(rows, "eval_accuracy")[1][-1]


def _loss(ax: Axes, rows: Rows, colour: str, name: str, accuracy: float) -> None:
    steps, values = series(rows, "loss")
    ax.plot(steps, values, color=colour, linewidth=0.8, alpha=0.35)
    ax.plot(steps, smooth(values, 9), color=colour, linewidth=1.8,
            label=f"{name}: held-out accuracy {accuracy:.1%}")  # fmt: skip
