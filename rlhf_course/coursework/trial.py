"""Run an exercise's tests on an answer, in this process.

The tests are the functions of `tests/exercises` that `expect.exercise` has marked. pytest runs them
too; here they are called directly, which takes milliseconds and needs no pytest.
"""

from __future__ import annotations

import importlib.util
import inspect
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch

from rlhf_course.coursework import bank
from rlhf_course.coursework.exercises import Exercise
from rlhf_course.coursework.expect import Mismatch, Property, unwritten
from rlhf_course.coursework.golden import golden
from rlhf_course.coursework.subject import Subject


@dataclass
class Outcome:
    """What came of one property."""

    title: str
    """The property in words: the first line of the test's docstring."""
    property: Property
    mismatch: Mismatch | None
    """What went wrong, or None."""
    missing: bool
    """Not implemented yet."""
    seconds: float

    @property
    def passed(self) -> bool:
        """The answer has this property."""
        return self.mismatch is None and not self.missing


@cache
def load(kind: str, name: str) -> ModuleType:
    """The module `name` of the folder `kind` ("exercises", "mutants") beside the tests."""
    folder = bank.folder() / kind
    spec = importlib.util.spec_from_file_location(f"{kind}_of_{name}", folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    path = list(sys.path)
    if kind == "exercises":
        sys.path.insert(0, str(folder))  # for the drivers beside the tests
    try:
        spec.loader.exec_module(module)
    finally:
        sys.path[:] = path
    return module


def properties(exercise: Exercise) -> list[Callable]:
    """The exercise's tests, core ones first, then in the order of the file."""
    module = load("exercises", f"test_{exercise.file}_exercises")
    found = [
        test for test in vars(module).values()
        if getattr(test, "property", None) and test.property.exercise == exercise.id
    ]  # fmt: skip
    return sorted(found, key=lambda test: not test.property.core)


def title(test: Callable) -> str:
    """The property in the student's words."""
    return (inspect.getdoc(test) or test.__name__).splitlines()[0].rstrip(".")


def generator(test_name: str, seed: int) -> torch.Generator:
    """The random numbers of one test: a function of its name and the seed."""
    return torch.Generator().manual_seed(zlib.crc32(test_name.encode()) * 1000 + seed)


def run(test: Callable, subject: Subject, seed: int = 0) -> Outcome:
    """One property of one answer, with gradients on."""
    fixtures = {"subject": subject, "rng": generator(test.__name__, seed), "golden": golden}
    wanted = {name: fixtures[name] for name in inspect.signature(test).parameters}
    began, mismatch, missing = time.perf_counter(), None, False
    try:
        subject.begin(seed)
        with torch.enable_grad():
            test(**wanted)
    except Mismatch as found:
        mismatch = found
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever an answer may raise
        if unwritten(error):
            missing = True
        else:
            text = f"{type(error).__name__}: {error}"
            mismatch = Mismatch("it raised an error", {}, "a result", text)
            mismatch.__cause__ = error
    return Outcome(title(test), test.property, mismatch, missing, time.perf_counter() - began)


def try_answer(
    exercise: Exercise, answer: Any, seed: int = 0, only: int | None = None
) -> list[Outcome]:
    """All properties of an answer, a function or a class with the method; or the one at `only`."""
    subject, tests = Subject(exercise, answer), properties(exercise)
    state = torch.random.get_rng_state()  # the student's own random numbers stay as they were
    try:
        return [run(test, subject, seed) for test in (tests if only is None else [tests[only]])]
    finally:
        torch.random.set_rng_state(state)
