"""The map of the course: which chapter builds what, and on what it stands.

One figure that grows from chapter to chapter: what is built is filled, what is being built is
framed, what comes later is faint.
"""

from __future__ import annotations

from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch

from rlhf_course.plots.style import COLOURS, INK, TEXT

WIDTH, HEIGHT = 1.5, 0.86  # of a box, in units of the map
FAINT = "#8c8c8c"  # still legible on white


@dataclass(frozen=True)
class Place:
    """A chapter on the map: where its box stands, what it builds, and the colour of its role."""

    chapter: int
    title: str
    builds: str
    x: float
    y: float
    role: str


PLACES = {
    place.chapter: place
    for place in [
        Place(1, "GPT", "a language model\nof the corpus", 0.0, 1.0, "reference"),
        Place(2, "SFT", "answers like the\ndemonstrations", 2.1, 1.0, "reference"),
        Place(3, "Reward model", "scores answers\nas people rank them", 4.2, 2.0, "reward"),
        Place(4, "MDP", "credit for\nevery token", 4.2, 0.0, "critic"),
        Place(5, "PPO", "improves the policy,\nnear the reference", 6.7, 1.0, "policy"),
        Place(6, "PPO-ptx", "… and forgets\nnothing", 8.75, 1.0, "policy"),
        Place(7, "Why RLHF", "did it help,\nand when not?", 10.85, 2.0, "gold"),
        Place(8, "Beyond PPO", "DPO, RLOO, GRPO,\nREINFORCE++", 10.85, 0.0, "proxy"),
        Place(9, "Distributed", "Ray, vLLM, ZeRO-3:\nthe same, larger", 12.95, 1.0, "policy"),
    ]
}

# From chapter, to chapter, what is handed over.
ARROWS = [
    (1, 2, ""), (2, 3, ""), (2, 4, ""), (2, 5, "policy, reference"), (3, 5, "reward"),
    (4, 5, "advantages"), (5, 6, ""), (6, 7, ""), (6, 8, ""), (6, 9, ""),
]  # fmt: skip


def course_map(chapter: int) -> Figure:
    """The map as it stands when `chapter` (0 … 9) begins.

    Chapters before it are filled, its own box is framed, later ones are faint. In chapter 0, the
    tour, nothing is built yet. Raises ValueError for a chapter that the map does not have.
    """
    if not 0 <= chapter <= max(PLACES):
        raise ValueError(f"chapter {chapter}: the map has 0 (the tour) to {max(PLACES)}")
    figure = Figure(figsize=(12.8, 3.1), layout="constrained")
    ax = figure.subplots()
    for source, target, text in ARROWS:
        _arrow(ax, PLACES[source], PLACES[target], text, chapter)
    for place in PLACES.values():
        _box(ax, place, chapter)
    ax.set_xlim(-0.1, max(p.x for p in PLACES.values()) + WIDTH + 0.1)
    ax.set_ylim(-0.2, 2 + HEIGHT + 0.3)
    ax.set_axis_off()
    return figure


def _box(ax: Axes, place: Place, chapter: int) -> None:
    """One chapter: filled when done, framed when it is this one, faint when it comes later."""
    colour = COLOURS[place.role]
    done, here = place.chapter < chapter, place.chapter == chapter
    ax.add_patch(
        FancyBboxPatch(
            (place.x, place.y), WIDTH, HEIGHT, boxstyle="round,pad=0.02,rounding_size=0.1",
            facecolor=colour if done else "white", edgecolor=colour if done or here else "#cccccc",
            linewidth=3.5 if here else 1.2, zorder=2, gid=f"chapter {place.chapter}",
        )
    )  # fmt: skip
    # Black on the light fills: white on orange or pink is hard to read.
    on_fill = "black" if place.role in ("gold", "critic") else "white"
    ink = on_fill if done else INK if here else FAINT
    middle = place.x + WIDTH / 2
    ax.text(middle, place.y + 0.66, f"{place.chapter}  {place.title}", color=ink, ha="center",
            va="center", fontsize=TEXT + 1.5, fontweight="bold", zorder=3)  # fmt: skip
    ax.text(middle, place.y + 0.27, place.builds, color=ink, ha="center", va="center",
            fontsize=TEXT - 0.5, linespacing=1.15, zorder=3)  # fmt: skip
    if here:
        ax.text(middle, place.y + HEIGHT + 0.08, "this chapter", color=colour, ha="center",
                va="bottom", fontsize=TEXT, fontweight="bold", zorder=3)  # fmt: skip


def _arrow(ax: Axes, source: Place, target: Place, text: str, chapter: int) -> None:
    """What one chapter hands to another; faint until both are reached."""
    start = (source.x + WIDTH + 0.04, source.y + HEIGHT / 2)
    end = (target.x - 0.04, target.y + HEIGHT / 2)
    colour = INK if max(source.chapter, target.chapter) <= chapter else "#cccccc"
    ax.add_patch(
        FancyArrowPatch(start, end, arrowstyle="-|>", mutation_scale=10, color=colour,
                        linewidth=1.2, zorder=1)
    )  # fmt: skip
    if text:
        ax.text((start[0] + end[0]) / 2, (start[1] + end[1]) / 2, text, ha="center", va="center",
                fontsize=TEXT - 1, color=INK if colour == INK else FAINT, zorder=1,
                bbox={"facecolor": "white", "edgecolor": "none", "pad": 1})  # fmt: skip
