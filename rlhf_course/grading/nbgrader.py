"""nbgrader: a course folder of the chapters, and a step that lets our referee give the points.

    rlhf-course grade --bundle nbgrader --out COURSE     writes source/ and nbgrader_config.py
    cd COURSE
    nbgrader generate_assignment 03_reward_model         source/ -> release/, without solutions
    nbgrader autograde 03_reward_model                   submitted/ -> autograded/, gradebook.db
    nbgrader generate_feedback 03_reward_model           what students read

nbgrader by itself runs a student's whole notebook beside the gradebook and believes what a check
cell shows, so that `check = print` in a cell above earns all points. `referee` takes the place of
that step: nothing is executed there, the answers go to the confined players of this package, and
what the check cells show is made of their result.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_course.coursework import project
from rlhf_course.coursework.exercises import find
from rlhf_course.errors import ConfigError, DataError
from rlhf_course.files import replacing
from rlhf_course.grading import wording
from rlhf_course.grading.handout import cell_name, grade_notebook, handout, numbers, stem

if TYPE_CHECKING:
    from collections.abc import Iterable

    from nbformat import NotebookNode

    from rlhf_course.grading.results import ExerciseResult

CONFIG = '''\
"""nbgrader's settings for this course; all of them: nbgrader.readthedocs.io."""

import os

c = get_config()  # noqa: F821
c.CourseDirectory.course_id = "rlhf-course"

# The two comments stay in the students' notebooks, around the place of the answer.
c.ClearSolutions.code_stub = {
    "python": "# BEGIN SOLUTION\\nraise NotImplementedError\\n# END SOLUTION"
}
# A check cell that was deleted, or lost its marks in another editor, comes back at the end.
c.Autograde.sanitize_preprocessors = [
    "rlhf_course.grading.nbgrader.restore",
    "nbgrader.preprocessors.ClearOutput",
    "nbgrader.preprocessors.DeduplicateIds",
    "nbgrader.preprocessors.OverwriteKernelspec",
    "nbgrader.preprocessors.OverwriteCells",
    "nbgrader.preprocessors.CheckCellMetadata",
]

# The referee of the course grades in the place of nbgrader's own Execute: answers are found by the
# function's name, run apart from this process and the gradebook, and get partial points.
c.Autograde.autograde_preprocessors = [
    "rlhf_course.grading.nbgrader.referee",
    "nbgrader.preprocessors.IgnorePattern",
    "nbconvert.preprocessors.ClearMetadataPreprocessor",
    "nbgrader.preprocessors.LimitOutput",
    "nbgrader.preprocessors.SaveAutoGrades",
    "nbgrader.preprocessors.AssignLatePenalties",
    "nbgrader.preprocessors.CheckCellMetadata",
]

# Only for nbgrader's own Execute, that is without this second list: then the whole chapter is run,
# in a process that can do whatever you can, and an answer earns all of its points or none.
os.environ.setdefault("RLHF_COURSE_QUICK", "1")
c.Execute.timeout = 300

# The number that these chapters' variants were printed with; nothing: as they are published.
'''
VARIANTS = "RLHF_COURSE_VARIANTS"
MARK = {"grade": True, "locked": True, "solution": False, "task": False, "schema_version": 3}
"""What nbgrader knows about a check cell, beside its name and points."""


# ------------------------------------------------------------------------------ the course folder


def write(
    out: Path,
    chapters: Iterable[int] = (),
    root: Path = project.ROOT,
    variants: int | None = None,
) -> Path:
    """Write nbgrader's course folder; returns it.

    chapters: by number; all that have exercises when none is named. root: the folder with chapters/
    and solutions/. variants: the number these were printed with. What else stands in `out`, the
    gradebook and submissions, is left alone, and so is a nbgrader_config.py that is there. Raises
    ConfigError where there is no such chapter, or that file is for other variants.
    """
    config = out / "nbgrader_config.py"
    line = f'os.environ["{VARIANTS}"] = "{"" if variants is None else variants}"\n'
    known = config.read_text(encoding="utf-8") if config.exists() else line
    if line not in known and (VARIANTS in known or variants is not None):
        raise ConfigError(f"{config} is for other variants. Write to another folder, or add {line}")
    made = {stem(chapter): handout(chapter, root) for chapter in numbers(chapters)}
    for name, notebook in made.items():
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
        _put(out / "source" / name / f"{name}.ipynb", text + "\n")
    if not config.exists():
        _put(config, CONFIG + line)
    return out


def _put(file: Path, text: str) -> None:
    with replacing(file) as part:
        part.write_text(text, encoding="utf-8", newline="\n")


# ------------------------------------------------------------------------------------- the steps


def restore(notebook: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
    """nbgrader's step that gives back the check cells which a submission has lost, at its end.

    Some editors keep no metadata, and a cell without its mark is worth nothing. (What nbgrader
    offers, OverwriteCells.add_missing_cells, needs the marks of the answers.) Marks that the
    assignment does not have, which nbgrader would stop at, are taken away.
    """
    from nbformat.v4 import new_code_cell

    sources, checks = _assigned(**resources["nbgrader"])
    for cell in notebook.cells:
        mark = cell.metadata.get("nbgrader")
        name = mark.get("grade_id") if isinstance(mark, dict) else None
        checks.pop(name, None)
        if name not in sources:
            cell.metadata.pop("nbgrader", None)
    for name, points in checks.items():
        cell = new_code_cell(sources[name])
        cell.metadata["nbgrader"] = type(cell)(MARK | {"grade_id": name, "points": points})
        if (notebook.nbformat, notebook.nbformat_minor) < (4, 5):
            del cell["id"]
        notebook.cells.append(cell)
    return notebook, resources


def _assigned(
    notebook: str, assignment: str, db_url: str, **others
) -> tuple[dict[str, str], dict[str, float]]:
    """From the gradebook: the text of every marked cell, and the points of every check cell."""
    from nbgrader.api import Gradebook

    with Gradebook(db_url) as book:
        known = book.find_notebook(notebook, assignment)
        cells = {cell.name: cell for cell in known.source_cells}
        points = {cell.name: cell.max_score for cell in known.grade_cells}
        checks = {name: worth for name, worth in points.items() if cells[name].locked}
        return {name: cell.source for name, cell in cells.items()}, checks


def referee(notebook: NotebookNode, resources: dict) -> tuple[NotebookNode, dict]:
    """nbgrader's step (a preprocessor of nbconvert) that grades a chapter with our referee.

    Each check cell gets what a student may read as its output, and the points as its value, which
    is where nbgrader looks for them. Raises DataError where the points would not be the student's:
    the grader failed, or a cell that is worth points is no check of this course.
    """
    name = resources["nbgrader"]["notebook"]
    chapter = _chapter(name)
    number = os.environ.get(VARIANTS)
    result = grade_notebook(name, json.dumps(notebook), chapter, int(number) if number else None)
    found = {f"check-{cell_name(find(each.exercise))}": each for each in result.exercises}
    for cell in notebook.cells:
        entry = cell.metadata.get("nbgrader", {})
        if cell.cell_type != "code" or not entry.get("grade") or entry.get("solution"):
            continue
        if entry["grade_id"] not in found:
            # nbgrader would read a cell without output as right.
            raise DataError(
                f"{name}: the cell {entry['grade_id']!r} is worth points, but is no exercise of "
                "this course. Mark it as manually graded, or take the list of "
                "autograde_preprocessors out of nbgrader_config.py."
            )
        cell.outputs = _outputs(found[entry["grade_id"]], type(cell))
    return notebook, resources


def _chapter(name: str) -> int:
    for chapter in numbers():
        if name == stem(chapter):
            return chapter
    raise DataError(f"{name}.ipynb is no chapter: {', '.join(stem(c) for c in numbers())}.")


def _outputs(result: ExerciseResult, kind: type) -> list:
    """The report, and the points as the value of the cell; kind: the class of nbformat's nodes."""
    said = {"output_type": "stream", "name": "stdout", "text": wording.account(result) + "\n"}
    points = {"text/plain": wording.points(result.score)}
    value = {"output_type": "execute_result", "execution_count": None, "metadata": kind()}
    return [kind(said), kind(value | {"data": kind(points)})]
