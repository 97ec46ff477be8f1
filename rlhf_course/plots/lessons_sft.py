"""Chapter 2's figures: labels on a dialogue, packed rows and their mask, answers that never end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from rlhf_course.plots.style import COLOURS, INK, LIGHT, RUNS, TEXT, dress, legend, percent

READ, ASKED, PAD = "#d9d9d9", COLOURS["policy"], "white"
SEGMENTS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00")


def labelled_tokens(
    tokens: Sequence[str], labels: Mapping[str, Sequence[int]], pads: int = 0, ignore: int = -100
) -> Figure:
    """A dialogue's tokens, one row a way of labelling: blue is learned, grey is only read.

    labels: name of the row -> a label for each token. The last `pads` tokens are pads.
    """
    height = 0.62 * len(labels)
    figure = Figure(figsize=(0.6 * len(tokens) + 1.4, height + 0.8), layout="constrained")
    ax = figure.subplots()
    for y, row in enumerate(labels.values()):
        for x, (token, label) in enumerate(zip(tokens, row, strict=True)):
            pad, asked = x >= len(tokens) - pads, label != ignore
            fill = ASKED if asked else PAD if pad else READ
            ax.add_patch(Rectangle((x - 0.47, y - 0.36), 0.94, 0.72, facecolor=fill,
                                   edgecolor="#999999", linewidth=0.8,
                                   linestyle="--" if pad else "-"))  # fmt: skip
            ax.text(x, y, token, ha="center", va="center", fontsize=TEXT - 1,
                    color="white" if asked else INK)  # fmt: skip
    ax.set_yticks(range(len(labels)), list(labels), fontsize=TEXT)
    ax.set_xticks(range(len(tokens)))
    dress(ax, "", "position t", "")
    ax.grid(visible=False)
    ax.set_xlim(-0.6, len(tokens) - 0.4)
    ax.set_ylim(len(labels) - 0.5, -0.5)
    marks = [Patch(facecolor=READ, edgecolor="#999999", label="read (label -100)"),
             Patch(facecolor=ASKED, label="learned"),
             Patch(facecolor=PAD, edgecolor="#999999", linestyle="--", label="pad")]  # fmt: skip
    figure.legend(handles=marks, loc="outside upper right", ncols=3, fontsize=TEXT, frameon=False)
    return figure


def rows_in_use(batches: Mapping[str, Sequence[Sequence[int]]]) -> Figure:
    """Which cells of a batch hold which dialogue: one panel a layout, white is padding.

    batches: title -> (rows, T) segments, -1 on pads.
    """
    tables = {title: np.asarray(segments) for title, segments in batches.items()}
    figure = Figure(figsize=(4.7 * len(tables), 3.2), layout="constrained")
    axes = figure.subplots(1, len(tables), squeeze=False)[0]
    for ax, (title, segments) in zip(axes, tables.items(), strict=True):
        used = (segments >= 0).mean()
        dress(ax, f"{title}: {used:.0%} in use", "position in the row, tokens", "row of the batch")
        shown = np.where(segments >= 0, segments % len(SEGMENTS), len(SEGMENTS))
        ax.imshow(shown, cmap=ListedColormap([*SEGMENTS, "white"]), vmin=0, vmax=len(SEGMENTS),
                  aspect="auto", interpolation="nearest")  # fmt: skip
        for row in range(1, len(segments)):
            ax.axhline(row - 0.5, color="white", linewidth=1.5)
        ax.grid(visible=False)
        ax.set_yticks(range(len(segments)) if len(segments) <= 12 else [0, len(segments) - 1])
    return figure


def packed_mask(mask: Sequence[Sequence[bool]], segments: Sequence[int]) -> Figure:
    """Who may look at whom in one packed row: blocks on the diagonal, a colour a dialogue.

    mask: (T, T) bool, [query, key]; segments: (T,), -1 on pads.
    """
    allowed, segments = np.asarray(mask, dtype=bool), np.asarray(segments)
    colour = np.where(segments >= 0, segments % len(SEGMENTS) + 1, 0)
    shown = np.where(allowed, np.where(segments >= 0, colour, len(SEGMENTS) + 1)[:, None], 0)
    figure = Figure(figsize=(4.6, 4.4), layout="constrained")
    ax = figure.subplots()
    dress(ax, "May look (coloured)", "looked at (key), position", "looks (query), position")
    ax.imshow(shown, cmap=ListedColormap(["white", *SEGMENTS, LIGHT]), vmin=0,
              vmax=len(SEGMENTS) + 1, interpolation="nearest")  # fmt: skip
    ax.grid(visible=False)
    return figure


def answer_lengths(lengths: Mapping[str, Sequence[int]], limit: int) -> Figure:
    """Share of answers of each length, one line a model; at `limit` they were cut off."""
    figure = Figure(figsize=(8, 3.2), layout="constrained")
    ax = figure.subplots()
    dress(ax, "Length of the answers", "tokens an answer, EOS included", "share of answers")
    at = np.arange(1, limit + 1)
    for (label, values), (colour, style, marker) in zip(lengths.items(), RUNS, strict=False):
        share = np.bincount(np.asarray(values), minlength=limit + 1)[1 : limit + 1] / len(values)
        ax.plot(at, share, marker, linestyle=style, color=colour, markersize=4, label=label)
    ax.axvline(limit, color=INK, linewidth=1, linestyle="--")
    ax.annotate("cut off here", (limit, 0.5), xytext=(-4, 0), textcoords="offset points",
                ha="right", va="center", fontsize=TEXT, color=INK)  # fmt: skip
    ax.set_ylim(-0.02, 1.05)
    ax.yaxis.set_major_formatter(percent)
    legend(ax, loc="upper center")
    return figure
