"""otter-grader: notebooks that `otter assign` takes, and a plugin that lets our referee grade.

    rlhf-course grade --bundle otter --out COURSE        writes COURSE/03_reward_model/ and so on
    cd COURSE/03_reward_model
    otter assign 03_reward_model.ipynb dist              dist/student/, dist/autograder/*.zip
    otter run -a dist/autograder/*.zip SUBMISSION.ipynb  one submission, in this environment

otter by itself runs a student's whole notebook without a time limit, in the process that counts the
points, and then unpickles what that process wrote. The plugin hands the notebook to the referee and
gives otter another one to run: a single cell with the referee's result, which the tests read. So
students need no otter either: in their notebooks stands `check(…)`, as in the chapters.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_course.coursework import project
from rlhf_course.coursework.exercises import Exercise
from rlhf_course.coursework.source import BEGIN, BLANK, END
from rlhf_course.files import replacing
from rlhf_course.grading import wording
from rlhf_course.grading.handout import (
    cell_name,
    exercises_of,
    grade_notebook,
    handout,
    numbers,
    stem,
)  # fmt: skip
from rlhf_course.grading.results import SubmissionResult

if TYPE_CHECKING:
    from nbformat import NotebookNode

DIGITS = 6  # of a test's points
CONFIG = """\
# ASSIGNMENT CONFIG
init_cell: false
check_all_cell: false
export_cell: false
requirements: requirements.txt
tests:
    ok_format: false
plugins:
    - rlhf_course.grading.otter.Referee:
        chapter: {chapter}
"""
TEST = '''\
""" # BEGIN TEST CONFIG
points: {points}
""" # END TEST CONFIG
def test_{number}(referee):
    referee("{id}", {number})
'''
PROMPT = ['""" # BEGIN PROMPT', BLANK, '"""; # END PROMPT']
"""otter keeps of these lines the one in the middle, for students."""
RUN = """\
from rlhf_course.grading.otter import Points
referee = Points({result!r})
"""


# -------------------------------------------------------------------------------- the assignments


def write(out: Path, chapters: Iterable[int] = (), root: Path = project.ROOT) -> Path:
    """Write a folder for each chapter, with what `otter assign` takes; returns `out`.

    chapters: by number; all that have exercises when none is named. root: the folder with chapters/
    and solutions/. What else stands in `out` is left alone. Raises ConfigError where there is no
    such chapter.
    """
    made = {stem(chapter): assignment(chapter, root) for chapter in numbers(chapters)}
    for name, notebook in made.items():
        text = json.dumps(notebook, indent=1, ensure_ascii=False, sort_keys=True)
        for file, content in ((f"{name}.ipynb", text), ("requirements.txt", project.requirement())):
            with replacing(out / name / file) as part:
                part.write_text(content + "\n", encoding="utf-8", newline="\n")
    return out


def assignment(chapter: int, root: Path = project.ROOT) -> dict[str, Any]:
    """A chapter's notebook (its JSON) in the format of otter assign."""
    notebook = handout(chapter, root)
    cells = [_raw("otter-config", CONFIG.format(chapter=chapter))]
    begin = {f"header-{cell_name(exercise)}": exercise for exercise in exercises_of(chapter)}
    answer = {f"exercise-{cell_name(exercise)}": exercise for exercise in exercises_of(chapter)}
    end = {f"check-{cell_name(exercise)}": exercise for exercise in exercises_of(chapter)}
    for cell in notebook["cells"]:
        if exercise := begin.get(cell["id"]):
            text = f"# BEGIN QUESTION\nname: {_question(exercise)}\ncheck_cell: false"
            cells += [_raw(f"otter-{cell['id']}", text), cell]
        elif exercise := answer.get(cell["id"]):
            cell["source"] = _with_prompt("".join(cell["source"]))
            cells += [_raw(f"otter-begin-{cell['id']}", "# BEGIN SOLUTION"), cell]
            cells.append(_raw(f"otter-end-{cell['id']}", "# END SOLUTION"))
        elif exercise := end.get(cell["id"]):
            cells += [cell, *_tests(exercise)]
        else:
            cells.append(cell)
    return notebook | {"cells": cells}


def _raw(id: str, text: str) -> dict[str, Any]:
    return {"cell_type": "raw", "id": id, "metadata": {}, "source": text}


def _question(exercise: Exercise) -> str:
    """otter makes a file's name of it."""
    return exercise.qualname.replace(".", "_")


def _with_prompt(text: str) -> str:
    """A solution, marked so that `raise NotImplementedError` takes its place."""
    lines = []
    for line in text.split("\n"):
        indent = line[: len(line) - len(line.lstrip())]
        lines.append(f"{line} NO PROMPT" if line.strip() == BEGIN else line)
        if line.strip() == END:
            lines += [indent + part for part in PROMPT]
    return "\n".join(lines)


def _tests(exercise: Exercise) -> list[dict[str, Any]]:
    """The cells after a check: a test for each property, and the end of the question."""
    name = cell_name(exercise)
    cells = [_raw(f"otter-tests-{name}", "# BEGIN TESTS")]
    for number, points in enumerate(shares(exercise)):
        text = TEST.format(points=points, id=exercise.id, number=number)
        cell = {"cell_type": "code", "id": f"otter-test-{number}-{name}", "metadata": {}}
        cells.append(cell | {"source": text, "outputs": [], "execution_count": None})
    cells.append(_raw(f"otter-tests-end-{name}", "# END TESTS"))
    return [*cells, _raw(f"otter-end-{name}", "# END QUESTION")]


def shares(exercise: Exercise) -> list[float]:
    """The exercise's points, distributed to its properties by their weights."""
    from rlhf_course.coursework.trial import properties

    weights = [test.property.weight for test in properties(exercise)]
    found = [round(exercise.points * weight / sum(weights), DIGITS) for weight in weights]
    return [*found[:-1], round(exercise.points - sum(found[:-1]), DIGITS)]


# ------------------------------------------------------------------------------------ the grading


class Referee:
    """otter's plugin: the referee grades, and otter runs a notebook that holds its result."""

    def __init__(self, submission_path: str | None, submission_metadata: dict, plugin_config: dict):
        self.name = Path(submission_path or "submission").stem
        self.chapter = plugin_config["chapter"]

    def before_execution(self, submission: NotebookNode) -> NotebookNode:
        """The notebook that otter runs in the place of a submission."""
        from nbformat.v4 import new_code_cell, new_notebook

        result = grade_notebook(self.name, json.dumps(submission), self.chapter)
        cell = new_code_cell(RUN.format(result=result.to_json()))
        kernel = {"name": "python3", "display_name": "Python 3", "language": "python"}
        return new_notebook(cells=[cell], metadata={"kernelspec": kernel})


class Points:
    """What otter's tests ask."""

    def __init__(self, result: str):
        """result: the JSON of a SubmissionResult."""
        found = SubmissionResult.from_json(result)
        self.exercises = {each.exercise: each for each in found.exercises}

    def __call__(self, id: str, number: int) -> None:
        """Raises AssertionError, for students to read, unless this property earns its points.

        The first one that does not tells everything about the exercise, the others their title.
        """
        exercise = self.exercises[id]
        rows = exercise.properties
        earned = [each.passed and exercise.score > 0 for each in rows]
        if number < len(rows) and earned[number]:
            return
        if number == (earned.index(False) if False in earned else len(rows)):
            raise AssertionError(f"{id}\n{wording.account(exercise)}")
        raise AssertionError(f"{id}: {rows[number].title if number < len(rows) else 'not tried'}")
