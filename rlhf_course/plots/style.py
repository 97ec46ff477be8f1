"""How every figure looks: colours, axes, smoothing, captions.

Faint lines are the data, the strong ones over them a centred moving average.
The colours are Okabe and Ito's (and one of Tol's), which the colour-blind can tell apart; where
two lines share a panel, dashes or markers differ too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

Rows = Sequence[Mapping[str, float]]
"""A run's metrics, one mapping a step; see `runs.read_metrics`."""

COLOURS = {
    "policy": "#0072B2", "reference": "#767676", "reward": "#009E73", "critic": "#CC79A7",
    "gold": "#E69F00", "proxy": "#882255",
}  # fmt: skip

BAD = "#D55E00"
"""What was broken, wherever it stands beside what is healthy."""

# Kind of answer -> label, colour, colour of the numbers printed on it; in the order of drawing.
VERDICTS = {
    "true": ("true", "#009E73", "white"),
    "apt": ("apt", "#009E73", "white"),
    "idk": ("“I do not know”", "#56B4E9", "black"),
    "vague": ("vague", "#56B4E9", "black"),
    "false": ("false", "#D55E00", "white"),
    "flawed": ("flawed", "#D55E00", "white"),
    "bad": ("malformed", "#4D4D4D", "white"),
    "malformed": ("malformed", "#4D4D4D", "white"),
}

# Several runs in one panel: colour, dashes, marker of the end.
RUNS = [
    (COLOURS["policy"], "-", "o"), ("#D55E00", "--", "s"), (COLOURS["reward"], "-.", "^"),
    (COLOURS["critic"], (0, (5, 1, 1, 1, 1, 1)), "D"), (COLOURS["reference"], ":", "v"),
]  # fmt: skip

INK, LIGHT = "#222222", "#dddddd"
TEXT = 8.5  # points; titles are a little larger

CAPTIONS = {
    "pretrain": "The loss falls fast, then slowly, and the perplexity of held-out text goes down "
    "with it. Were it to rise while the loss falls, the model would be memorising.",
    "sft": "The loss on held-out answers (points) should follow the loss in training. Exact match "
    "stays well below 100 %, since most prompts have several good answers.",
    "reward_model": "The loss begins at log 2 or above (a coin's) and accuracy climbs towards the "
    "two upper lines, which noise in the labels keeps below 100 %. The margin may grow on when the "
    "accuracy has stopped: the model becomes surer, and its calibration tells whether rightly.",
    "ppo": "Grey: the critic's warm-up, in which the policy stands still. Proxy and gold should "
    "rise together, KL settle at its target, entropy fall but not vanish, the ratio stay within "
    "reach of 1, and the critic explain a growing share of the returns.",
    "kl_control": "The controller raises the price of KL while KL is above its target and lowers "
    "it below. A good one keeps the line in the shaded band once the first rise is over.",
    "overoptimisation": "Above, the reward that PPO is given; below, what the answers are worth. "
    "Both grow at first. Where the upper curve goes on rising and the lower one falls, the policy "
    "has begun to exploit the reward model's errors.",
    "honesty": "Imitation teaches a model to answer whether it knows or not: after SFT it makes "
    "things up about strangers. Rewarded for admitting ignorance, it should learn to say so and "
    "keep what it knows.",
    "quality": "The kinds of answer before and after PPO: the apt ones should grow.",
    "perplexity": "How well each policy still predicts the pretraining text. The pretraining term "
    "(ptx) should keep it left of the dashed line.",
    "reward_accuracy": "Accuracy on held-out pairs, beside the best that noisy labels allow: to "
    "one who knows only the corpus (dashed), and to one who knows everything (dotted).",
}


def smooth(values: Sequence[float] | np.ndarray, window: int | None = None) -> np.ndarray:
    """Centred moving average, (N,) -> (N,) float64; near the ends, of what the window holds.

    window: how many values, made odd; default 5 % of N, at most 41.
    """
    values = np.asarray(values, dtype=float)
    half = (window or min(len(values) // 20, 41)) // 2
    total = np.concatenate([[0.0], np.cumsum(values)])  # (N + 1,)
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def series(rows: Rows, key: str) -> tuple[np.ndarray, np.ndarray]:
    """(steps, values) of the rows that have this metric, (N,) float64 each."""
    having = [(i, row) for i, row in enumerate(rows) if row.get(key) is not None]
    steps = np.array([row.get("step", i) for i, row in having], dtype=float)
    return steps, np.array([row[key] for _, row in having], dtype=float)


def dress(ax: Axes, title: str, x: str, y: str) -> None:
    """Title and axis labels, a light grid, two spines."""
    ax.set_title(title, fontsize=TEXT + 1.5, color=INK, loc="left", fontweight="bold")
    ax.set_xlabel(x, fontsize=TEXT, color=INK)
    ax.set_ylabel(y, fontsize=TEXT, color=INK)
    ax.tick_params(labelsize=TEXT, color=LIGHT, labelcolor=INK)
    ax.grid(color=LIGHT, linewidth=0.6)
    ax.set_axisbelow(True)
    for side, spine in ax.spines.items():
        spine.set(visible=side in ("left", "bottom"), color="#aaaaaa")


def scale(ax: Axes, kind: str) -> None:
    """The y axis: "linear", "percent" (of shares) or "log", with plain numbers at round places."""
    if kind == "percent":
        ax.yaxis.set_major_formatter(percent)
    # No logarithm of what is never positive: the norm of a gradient that is zero all along.
    if kind != "log" or not np.isfinite(ax.yaxis.get_minpos()):
        ax.yaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 2.5, 5, 10]))
        return
    ax.set_yscale("log")
    low, high = ax.get_ylim()
    decades = np.log10(high / low)
    places = (1,) if decades > 2 else (1, 2, 5) if decades > 0.6 else (1, 1.5, 2, 3, 4, 5, 6, 8)
    ax.yaxis.set_major_locator(LogLocator(subs=places, numticks=9))
    ax.yaxis.set_minor_locator(NullLocator())
    ax.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


@FuncFormatter
def percent(share: float, _) -> str:
    """A share as a label: 0.125 -> 12.5%. Nothing above 1, where an axis may leave some room."""
    return f"{100 * share:.4g}%" if share < 1 + 1e-9 else ""


def level(ax: Axes, value: float, label: str, style: str = ":", at: str = "right") -> None:
    """A horizontal line to compare with, named above its left or right end."""
    ax.axhline(value, color=INK, linewidth=1, linestyle=style, zorder=1)
    ax.annotate(
        label, (float(at == "right"), value), xycoords=("axes fraction", "data"),
        xytext=(-2 if at == "right" else 4, 2), textcoords="offset points",
        ha=at, fontsize=TEXT - 1, color=INK,
    )  # fmt: skip


def from_zero(ax: Axes) -> None:
    """A y axis that begins at 0, with a little room above the data."""
    top = ax.dataLim.y1
    ax.set_ylim(0, 1.08 * top if top > 0 else 1.0)


def legend(ax: Axes, **where) -> None:
    """A small one, readable over lines."""
    ax.legend(fontsize=TEXT - 0.5, framealpha=0.8, edgecolor="none", **where)
