"""A chapter as other graders want it: one notebook that holds the text, the solution and the marks.

nbgrader and otter both print the students' notebook from one with the solutions. It is put together
here from the two editions that the repository carries, chapters/ and solutions/. What comes back
goes to our referee: both would run it in the process that gives the points.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_course.coursework import project
from rlhf_course.coursework.exercises import EXERCISES, STEMS, Exercise
from rlhf_course.errors import ConfigError, DataError

if TYPE_CHECKING:
    from rlhf_course.grading.results import SubmissionResult

CHAPTERS, SOLUTIONS = "chapters", "solutions"
GIVEAWAYS = (r"\s*· \[this chapter with solutions\]\([^)]*\)", r"\s*\[The solution\]\([^)]*\)$")
"""The links to the other edition: none of them belongs in what is handed out for points."""
NEIGHBOUR = re.compile(r"\]\((\d\d_\w+\.ipynb)\)")


def numbers(chapters: Iterable[int] = ()) -> tuple[int, ...]:
    """The chapters to hand out, in order: those named, or all that have exercises.

    Raises ConfigError for a chapter that is none, or has nothing to be graded.
    """
    graded = sorted({exercise.chapter for exercise in EXERCISES})
    chosen = sorted(set(chapters)) or graded
    if wrong := [chapter for chapter in chosen if chapter not in graded]:
        raise ConfigError(
            f"--chapters {' '.join(map(str, wrong))}: only the chapters {graded[0]} to "
            f"{graded[-1]} have exercises."
        )
    return tuple(chosen)


def stem(chapter: int) -> str:
    """The chapter's file name without its ending: "03_reward_model"."""
    return f"{chapter:02d}_{STEMS[chapter]}"


def exercises_of(chapter: int) -> list[Exercise]:
    """The chapter's exercises in the course's order."""
    return [exercise for exercise in EXERCISES if exercise.chapter == chapter]


def cell_name(exercise: Exercise) -> str:
    """What stands for the exercise in the ids of its cells: "AdaptiveKLController-update"."""
    return exercise.qualname.replace(".", "-")


def handout(chapter: int, root: Path = project.ROOT) -> dict[str, Any]:
    """The chapter's notebook (its JSON) with the solutions, without outputs and giveaways.

    root: the folder with chapters/ and solutions/. Raises ConfigError where one is missing or they
    do not belong together.
    """
    made = _read(root / CHAPTERS / f"{stem(chapter)}.ipynb")
    solved = _read(root / SOLUTIONS / f"{stem(chapter)}.ipynb")
    answers = {cell.get("id"): cell["source"] for cell in solved["cells"]}
    for exercise in exercises_of(chapter):
        id = f"exercise-{cell_name(exercise)}"
        found = [cell for cell in made["cells"] if cell.get("id") == id]
        if len(found) != 1 or id not in answers:
            raise ConfigError(
                f"{root}: {stem(chapter)}.ipynb of {CHAPTERS}/ and {SOLUTIONS}/ have no cell "
                f"{id!r} in common. Build both again with `make notebooks`."
            )
        found[0]["source"] = answers[id]
    for cell in made["cells"]:
        if cell["cell_type"] == "markdown":
            cell["source"] = _links("".join(cell["source"]))
    return made


def _read(file: Path) -> dict[str, Any]:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{file}: {error}. Chapters and solutions are those of a clone of "
            f"{project.repository()}: install the course from there with `pip install -e .`."
        ) from None


def _links(text: str) -> str:
    """A cell's prose without giveaways; other chapters are those on the web."""
    for pattern in GIVEAWAYS:
        text = re.sub(pattern, "", text)
    return NEIGHBOUR.sub(lambda link: f"]({project.file(f'{CHAPTERS}/{link[1]}')})", text)


def grade_notebook(
    name: str, text: str, chapter: int, variants: int | None = None
) -> SubmissionResult:
    """What the referee says about one notebook, given as the text of its file.

    variants: the number that its exercises' variants were printed with. Raises DataError where the
    grader itself failed: then nobody knows the points.
    """
    from rlhf_course.grading.referee import grade_files

    files = {f"{name}.ipynb": text.encode("utf-8")}
    result = grade_files(name, files, chapters=(chapter,), variants=variants)
    if result.failure:
        raise DataError(f"{name}: the grader itself failed: {result.failure}")
    return result
