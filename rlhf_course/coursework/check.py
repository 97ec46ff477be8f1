"""The check button: `check(fn)` says what a student's function does right and what it does wrong.

It runs the exercise's tests, the same ones that grade, on the function in this process. The first
property that fails is shown with its input, and where the function behaves exactly like a known
mistake, the mistake is named.
"""

from __future__ import annotations

import os
import traceback
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf_course.coursework import bank, presentation
from rlhf_course.coursework.exercises import Exercise, find
from rlhf_course.coursework.mutants import Mutant, recognise
from rlhf_course.coursework.trial import Outcome, try_answer
from rlhf_course.errors import ConfigError

GRADED = ("autograde", "validate")
"""nbgrader's runs in which a failed check has to fail its cell."""


@dataclass(repr=False)
class Checked:
    """What came of a check; true when everything is right."""

    exercise: Exercise
    outcomes: list[Outcome]
    mistake: Mutant | None
    """The known mistake whose results these are."""

    def __bool__(self) -> bool:
        return all(outcome.passed for outcome in self.outcomes)

    def __repr__(self) -> str:
        right = sum(outcome.passed for outcome in self.outcomes)
        return f"<{self.exercise.name}: {right} of {len(self.outcomes)} right>"

    def _ipython_display_(self) -> None:
        """Nothing: `check` has displayed it."""

    @property
    def missing(self) -> bool:
        """Not written yet."""
        return any(outcome.missing for outcome in self.outcomes)

    @property
    def first(self) -> Outcome | None:
        """The first property that is wrong: the one to look at."""
        return next((o for o in self.outcomes if o.mismatch is not None), None)


def check(answer: Any) -> Checked:
    """Try your answer to an exercise and print what it does right and wrong.

    answer: the function, or the class for a method's exercise; its name tells which exercise it is.
    The result is true when everything is right. Raises ConfigError for what is no exercise, and
    AssertionError for a wrong answer where nbgrader asks.
    """
    name = getattr(answer, "__name__", None)
    if name is None or not callable(answer):
        raise ConfigError(
            f"check takes a function or a class, not {answer!r}: write check(name), without "
            "calling it."
        )
    exercise = find(name)
    if exercise.method and not isinstance(answer, type):
        raise ConfigError(f"hand over the class: check({exercise.name}), not an object of it.")
    outcomes = try_answer(exercise, answer)
    mistake = None
    if any(outcome.mismatch for outcome in outcomes):
        mistake = recognise(exercise, outcomes)
    result = Checked(exercise, outcomes, mistake)
    presentation.show(result)
    if not result and os.environ.get("NBGRADER_EXECUTION") in GRADED:
        raise AssertionError(repr(result))
    return result


def raised_at(outcome: Outcome) -> str:
    """Where in the student's own code an error was raised: "line 7: x = y[0]"; "" if nowhere."""
    error = outcome.mismatch.__cause__ if outcome.mismatch else None
    if error is None:
        return ""
    given = (
        str(bank.folder() / "exercises"),
        str(Path(__file__).parents[1]),
        "site-packages",
        "dist-packages",
    )
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if not any(place in f.filename for place in given)]
    return f"line {own[-1].lineno}: {own[-1].line}" if own else ""
