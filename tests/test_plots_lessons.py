"""The figures of the chapters draw what they say: axes named, as many lines as there are runs."""

import pytest
from matplotlib.colors import to_rgb
from matplotlib.patches import FancyBboxPatch

from rlhf_course.plots.course_map import PLACES, course_map
from rlhf_course.plots.style import COLOURS


def boxes(figure) -> dict[int, FancyBboxPatch]:
    """Chapter -> its box."""
    return {
        int(patch.get_gid().split()[1]): patch
        for patch in figure.axes[0].patches
        if isinstance(patch, FancyBboxPatch) and patch.get_gid()
    }


@pytest.mark.parametrize("chapter", range(9))
def test_the_map_fills_what_is_built_and_frames_what_is_being_built(chapter):
    found = boxes(course_map(chapter))
    assert list(found) == list(range(1, 9))
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


@pytest.mark.parametrize("chapter", [-1, 9])
def test_the_map_knows_its_edges(chapter):
    with pytest.raises(ValueError, match="the map has 0"):
        course_map(chapter)
