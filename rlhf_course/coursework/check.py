"""The check button: `check(fn)` says what a student's function does right and what it does wrong.

It runs the exercise's tests, the same ones that grade, on the function in this process. The first
property that fails is shown with its input, and where the function behaves exactly like a known
mistake, the mistake is named.
"""

from __future__ import annotations

import os
from typing import Any

from rlhf_course.coursework import presentation
from rlhf_course.coursework.checked import Checked
from rlhf_course.coursework.exercises import find
from rlhf_course.coursework.mutants import recognise
from rlhf_course.coursework.trial import try_answer
from rlhf_course.errors import ConfigError

GRADED = ("autograde", "validate")
"""nbgrader's runs in which a failed check has to fail its cell."""


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
