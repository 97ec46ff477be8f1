"""What a submission answers: for each exercise the statements that define it.

Runs in a confined process of its own, on bytes that a stranger wrote. It parses them and runs
nothing. What it returns is plain lists and strings, which the players run and the referee only
passes on.
"""

from __future__ import annotations

import ast
from collections.abc import Mapping
from pathlib import PurePosixPath

from rlhf_course.coursework.cells import UNPARSED, cells_of, fault
from rlhf_course.coursework.exercises import EXERCISES, STEMS, Exercise
from rlhf_course.coursework.extract import Statement, needed
from rlhf_course.coursework.extract import read as definitions_of
from rlhf_course.errors import DataError
from rlhf_course.grading import wire

MOST_PROBLEMS = 30
LONGEST_PROBLEM = 300

Written = list[tuple[str, list[Statement]]]  # file name, its statements


def read(files: Mapping[str, bytes]) -> dict[str, object]:
    """{"answers": exercise id -> [[text, cell, line, file], …], "problems": [sentence, …],
    "defines": [exercise id, …]} of the files of one submission, by their names below its folder.

    An exercise is answered by one file, and takes its helpers from there. Of several files it is
    the last, in the order of their names, of the best kind: one that does not leave it blank comes
    before one that does, and then one that bears the name of the exercise's chapter. Names of
    exercises that come before it in the course are left to the course; but what a chapter's file
    defines under the name of an earlier chapter's exercise is a helper. The tour answers nothing:
    it shows a wrong function under an exercise's name.
    """
    problems: list[str] = []
    written: Written = []
    for name in sorted(files):
        try:
            suffix = PurePosixPath(name).suffix
            statements, broken = definitions_of(cells_of(files[name], suffix))
            wrong = fault(files[name], suffix)
        except DataError as error:
            problems.append(f"{name}: {error}")
            continue
        except UNPARSED:
            problems.append(f"{name}: cannot be read: it is nested too deeply, or too large.")
            continue
        if not _bears(name, 0):
            written.append((name, statements))
        if wrong is not None:
            problems.append(
                f"{name}, line {wrong.lineno}: not valid Python, so the definition there does not "
                f"count ({wrong.msg})."
            )
        problems += [
            f"{name}, cell {cell}: not valid Python, so nothing in it counts ({reason})."
            for cell, reason in broken
        ]
    answers = {}
    for i, exercise in enumerate(EXERCISES):
        found = _answered_by(exercise, written)
        if found is not None:
            file, statements = found
            helpers = {name for s in statements for name in s.defines}
            given = {
                earlier.name for earlier in EXERCISES[:i]
                if not (_bears(file, exercise.chapter) and earlier.chapter < exercise.chapter
                        and earlier.name in helpers)
            }  # fmt: skip
            chosen = needed(statements, exercise.name, given - {exercise.name})
            answers[exercise.id] = [[s.text, s.cell, s.line, file] for s in chosen]
    return {"answers": answers, "problems": _short(problems), "defines": list(answers)}


def _answered_by(exercise: Exercise, written: Written) -> tuple[str, list[Statement]] | None:
    """The file, and its statements, in which an exercise is answered."""
    best, rank = None, (False, False)
    for file, statements in written:
        defining = [s for s in statements if exercise.name in s.defines]
        if defining:
            own = (not _is_blank(defining[-1].text), _bears(file, exercise.chapter))
            if best is None or own >= rank:
                best, rank = (file, statements), own
    return best


def _bears(file: str, chapter: int) -> bool:
    """True where a file's name holds that of a chapter: "ann_03_reward_model (1).ipynb"."""
    return f"{chapter:02d}_{STEMS[chapter]}" in PurePosixPath(file).name


def _is_blank(text: str) -> bool:
    """True where `raise NotImplementedError` still stands, as in the chapters handed out."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Raise) and node.exc is not None:
            raised = node.exc.func if isinstance(node.exc, ast.Call) else node.exc
            if isinstance(raised, ast.Name) and raised.id == "NotImplementedError":
                return True
    return False


def serve(fd: int) -> None:
    """Be a reader: the files come as tensors of bytes, and what they define goes back."""
    files = wire.decode(wire.receive(fd))
    found = read({name: data.numpy().tobytes() for name, data in files.items()})
    wire.send(fd, wire.encode(packed(found)))


def packed(found: dict) -> dict:
    """`read`'s result with each statement once, however many exercises need it."""
    places: dict[tuple, int] = {}
    for statements in found["answers"].values():
        for statement in statements:
            places.setdefault(tuple(statement), len(places))
    answers = {id: [places[tuple(s)] for s in each] for id, each in found["answers"].items()}
    return {"statements": [*places], "answers": answers, "problems": found["problems"]}


def unpacked(found: dict) -> dict[str, list]:
    """Exercise id -> its statements, of what `packed` made. Raises IndexError, KeyError, TypeError
    for anything else."""
    statements = found["statements"]
    return {id: [statements[i] for i in each] for id, each in found["answers"].items()}


def _short(problems: list[str]) -> list[str]:
    """No more and no longer sentences than anyone reads, in characters that can be encoded."""
    shown = [problem[:LONGEST_PROBLEM] for problem in problems[:MOST_PROBLEMS]]
    if len(problems) > len(shown):
        shown.append(f"… and {len(problems) - len(shown)} problems more.")
    return [problem.encode("utf-8", "replace").decode() for problem in shown]
