"""The figures of the chapters draw what they say: axes named, as many lines as there are runs."""

import math

import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch

from rlhf_course.plots import lessons_gpt, lessons_sft, lessons_tour
from rlhf_course.plots.course_map import PLACES, course_map
from rlhf_course.plots.style import COLOURS


def boxes(figure) -> dict[int, FancyBboxPatch]:
    """Chapter -> its box."""
    return {
        int(patch.get_gid().split()[1]): patch
        for patch in figure.axes[0].patches
        if isinstance(patch, FancyBboxPatch) and patch.get_gid()
    }


@pytest.mark.parametrize("chapter", range(10))
def test_the_map_fills_what_is_built_and_frames_what_is_being_built(chapter):
    found = boxes(course_map(chapter))
    assert list(found) == list(range(1, 10))
    for number, box in found.items():
        colour = to_rgb(COLOURS[PLACES[number].role])
        filled = box.get_facecolor()[:3] == pytest.approx(colour)
        framed = box.get_edgecolor()[:3] == pytest.approx(colour)
        assert filled == (number < chapter)
        assert framed == (number <= chapter)
        assert (box.get_linewidth() > 2) == (number == chapter)


def test_the_map_says_which_chapter_this_is():
    def said(chapter):
        return [text.get_text() for text in course_map(chapter).axes[0].texts]

    assert "this chapter" not in said(0)
    assert said(4).count("this chapter") == 1
    assert {f"{n}  {p.title}" for n, p in PLACES.items()} <= set(said(0))


@pytest.mark.parametrize("chapter", [-1, 10])
def test_the_map_knows_its_edges(chapter):
    with pytest.raises(ValueError, match="the map has 0"):
        course_map(chapter)


# --- the figures of chapters 0 to 2 -----------------------------------------------------------


def eye(n: int) -> list[list[float]]:
    return [[float(i == j) for j in range(n)] for i in range(n)]


LOSSES = [math.exp(-i / 40) for i in range(120)]
ROWS = [{"step": i, "loss": 1 / (i + 1), "eval_accuracy": 0.7, "bayes_closed_book": 0.8,
         "reward": 0.1 * i, "gold": 0.1 * i} for i in range(20)]  # fmt: skip

# figure, axes with a line or picture in each, lines on the first
DRAWN = {
    "attention": (lessons_gpt.attention_weights({"a": eye(3), "b": eye(3)}, list("xyz")), 2, 0),
    "scale": (lessons_gpt.score_scale([2, 4], {"a": [1, 2], "b": [1, 1]}, {"a": [0.1, 0.2]}), 2, 2),
    "draws": (lessons_gpt.distributions(list("xy"), {n: [0.5, 0.5] for n in "abcd"},
                                        {n: [0.5, math.nan] for n in "abcd"}), 4, 1),
    "cache": (lessons_gpt.cache_cost([1, 2], {"a": [1, 2], "b": [1, 1]}, {"a": [1, 2]}), 2, 2),
    "losses": (lessons_gpt.loss_curves({"a": LOSSES, "b": LOSSES[:50]}, levels={"x": 0.5}), 1, 4),
    "gallery": (lessons_gpt.gallery({"a": LOSSES, "b": LOSSES}, LOSSES, {"best": 0.1}), 2, 5),
    "rows": (lessons_sft.rows_in_use({"a": [[0, 0, -1]], "b": [[0, 1, 1]]}), 2, 0),
    "mask": (lessons_sft.packed_mask(eye(3), [0, 1, -1]), 1, 0),
    "lengths": (lessons_sft.answer_lengths({"a": [1, 2, 2], "b": [3, 3]}, 3), 1, 3),
    "who": (lessons_tour.who_occurs_where({"known": {"corpus": 1.0}, "told": {}}), 1, 0),
    "scores": (lessons_tour.scored_answers({"q": {"a": 1.0, "b": -1.0}}, "reward"), 1, 1),
    "words": (lessons_tour.word_shares({"a": {"They": 0.9, "Sorry": 0.1}}), 1, 0),
    "curves": (lessons_tour.learning_curves(dict.fromkeys(
        ("pretrain", "sft", "reward_model", "ppo"), ROWS)), 4, 1),
}  # fmt: skip


@pytest.mark.parametrize("name", DRAWN)
def test_a_lessons_figure_has_its_panels_lines_and_names(name, tmp_path):
    figure, panels, lines = DRAWN[name]
    drawn = [ax for ax in figure.axes if ax.has_data() and ax.get_label() != "<colorbar>"]
    assert len(drawn) == panels
    assert len(drawn[0].lines) == lines
    for ax in drawn:
        assert ax.get_xlabel()
        assert ax.get_ylabel()
    figure.savefig(tmp_path / "figure.png")


def test_every_position_but_the_last_points_to_the_next_label():
    (ax,) = lessons_gpt.shift_by_one(["a", "b", "c"]).axes
    assert len(ax.patches) == 2
    assert [t.get_text() for t in ax.texts].count("b") == 2  # read, and asked for


def test_the_stream_has_two_branches():
    (ax,) = lessons_gpt.residual_stream().axes
    assert [t.get_text() for t in ax.texts].count("+") == 2


def test_only_what_is_learned_is_blue():
    ways = {"one": [-100, 5, 6, -100], "two": [-100, -100, 6, -100]}
    figure = lessons_sft.labelled_tokens(["u", "a", "b", "p"], ways, pads=1)
    fills = [patch.get_facecolor()[:3] for patch in figure.axes[0].patches]
    blue = [fill == pytest.approx(to_rgb(COLOURS["policy"])) for fill in fills]
    assert blue == [False, True, True, False, False, False, True, False]


def test_what_is_in_use_is_counted_and_blocks_do_not_touch():
    figure = lessons_sft.rows_in_use({"x": [[0, 0, -1, -1]]})
    assert "50%" in figure.axes[0].get_title(loc="left")
    mask = [[True, False, False], [False, True, False], [False, True, True]]
    (image,) = lessons_sft.packed_mask(mask, [0, 1, 1]).axes[0].get_images()
    assert image.get_array().tolist() == [[1, 0, 0], [0, 2, 0], [0, 2, 2]]


def test_answer_lengths_are_shares():
    figure = lessons_sft.answer_lengths({"a": [1, 2, 2, 4]}, 4)
    assert figure.axes[0].lines[0].get_ydata().tolist() == [0.25, 0.5, 0.0, 0.25]
