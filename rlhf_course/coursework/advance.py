"""`rlhf-course progress`: which exercises of your notebooks are done.

rlhf-course progress                      chapters/ below this folder
rlhf-course progress my/03_reward_model.ipynb
"""

from __future__ import annotations

from contextlib import redirect_stdout
from io import StringIO
from pathlib import Path

from rich.table import Table

from rlhf_course.coursework import extract
from rlhf_course.coursework.checked import Checked
from rlhf_course.coursework.exercises import EXERCISES, Exercise
from rlhf_course.coursework.settings import ProgressConfig
from rlhf_course.coursework.trial import try_answer
from rlhf_course.errors import DataError
from rlhf_course.progress import console


def states(file: Path) -> dict[str, str]:
    """Exercise id -> "done", "3 of 5", "not written", for the exercises that a notebook defines."""
    statements = extract.statements(extract.cells(file))
    defined = set().union(*(statement.defines for statement in statements))
    found = {}
    with redirect_stdout(StringIO()):  # what an answer prints belongs in its notebook
        for exercise in EXERCISES:
            if exercise.name in defined:
                own = extract.namespace(extract.needed(statements, exercise.name))
                answer = own.get(exercise.name)
                if callable(answer) and answer is not exercise.reference():
                    found[exercise.id] = state(exercise, answer)
    return found


def state(exercise: Exercise, answer) -> str:
    """How far one answer is."""
    result = Checked(exercise, try_answer(exercise, answer), mistake=None)
    if result:
        return "done"
    return "not written" if result.missing else f"{result.right} of {len(result.outcomes)}"


def files(places: tuple[Path, ...]) -> list[Path]:
    """The notebooks that are meant. Raises DataError where there are none."""
    found: list[Path] = []
    for place in places:
        if place.is_dir():
            found += sorted(place.glob("*.ipynb"))
        elif place.exists():
            found.append(place)
        else:
            raise DataError(f"{place}: not there. Name a notebook, or a folder of notebooks.")
    if not found:
        raise DataError(f"{', '.join(map(str, places))}: no notebook there. Name their folder.")
    return found


def progress(config: ProgressConfig) -> None:
    """Print a table of all exercises, and the points that are done."""
    found: dict[str, str] = {}
    for file in files(config.notebooks):
        found |= states(file)
    table = Table("chapter", "exercise", "points", "state")
    done = 0
    for exercise in EXERCISES:
        said = found.get(exercise.id, "no notebook")
        done += exercise.points * (said == "done")
        colour = {"done": "green", "not written": "dim", "no notebook": "dim"}.get(said, "yellow")
        name = f"{exercise.chapter:02d} {exercise.stem}"
        table.add_row(name, exercise.qualname, str(exercise.points), f"[{colour}]{said}[/{colour}]")
    console.print(table)
    total = sum(exercise.points for exercise in EXERCISES)
    console.print(f"{done} of {total} points")
