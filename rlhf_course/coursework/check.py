"""The check button: `check(fn)` says what a student's function does right and what it does wrong.

It runs the exercise's tests, the same ones that grade, on the function in this process. The first
property that fails is shown with its input, and where the function behaves exactly like a known
mistake, the mistake is named.
"""

from __future__ import annotations

import os
import sys
from contextlib import redirect_stderr
from typing import Any

from rlhf_course.coursework import presentation, variants
from rlhf_course.coursework.checked import Checked
from rlhf_course.coursework.exercises import find
from rlhf_course.errors import ConfigError

GRADED = ("autograde", "validate")
"""nbgrader's runs in which a failed check has to fail its cell."""


def check(answer: Any, variant: str | None = None) -> Checked:
    """Try your answer to an exercise and print what it does right and wrong.

    answer: the function, or the class for a method's exercise; its name tells which exercise it is.
    variant: which variant of the exercise was asked for; a graded chapter's check says so.
    The result is true when everything is right. Raises ConfigError for what is no exercise or
    variant, and AssertionError for a wrong answer where nbgrader asks.
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
    chosen = None if variant is None else variants.find(exercise.id, variant)
    tried = answer if chosen is None else variants.own(answer)
    graded = os.environ.get("NBGRADER_EXECUTION") in GRADED
    # To nbgrader whatever is written to stderr, a warning, too, is a failed test.
    with redirect_stderr(sys.stdout if graded else sys.stderr):
        every, asked = variants.try_variant(exercise, chosen, tried)
    mistake = None
    if any(outcome.mismatch for outcome in every):
        mistake = variants.recognise(exercise, chosen, every)
    result = Checked(exercise, asked, mistake)
    presentation.show(result)
    if not result and graded:
        raise AssertionError(repr(result))
    return result
