"""Mutants: plausible wrong answers, each with the sentence that names its mistake.

They prove that the tests can tell right from wrong, and they let `check` say more than "wrong": an
answer that fails in exactly the way a mutant fails has, most likely, made its mistake.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_course.coursework.exercises import Exercise, find
from rlhf_course.coursework.source import definition
from rlhf_course.coursework.subject import answer_from
from rlhf_course.coursework.trial import Outcome, load, try_answer


@dataclass(frozen=True)
class Mutant:
    """A wrong answer, written as changes to the right one.

    edits: (old, new) replaces text between the markers; each `old` must occur there exactly once.
    body: or a whole new text between the markers, dedented.
    """

    exercise: str
    name: str
    says: str
    edits: Sequence[tuple[str, str]] = ()
    body: str | None = None

    def source(self) -> str:
        """The wrong answer as a student would hand it in. Raises ValueError when an edit does not
        fit the solution any more."""
        whole = definition(self.exercise)
        if self.body is not None:
            return whole.with_answer(self.body)
        text = whole.answer
        for old, new in self.edits:
            if text.count(old) != 1:
                raise ValueError(
                    f"{self.exercise}, mutant {self.name!r}: {old!r} stands {text.count(old)} "
                    "times in the solution, not once. Fit the edit to the solution."
                )
            text = text.replace(old, new)
        return whole.with_answer(text)

    def answer(self) -> Any:
        """The wrong function, or class."""
        return answer_from(find(self.exercise), self.source())


def mutants_of(exercise: Exercise) -> list[Mutant]:
    """The exercise's mutants."""
    bank = load("mutants", exercise.module).MUTANTS
    return [mutant for mutant in bank if mutant.exercise == exercise.id]


def recognise(exercise: Exercise, outcomes: list[Outcome], seed: int = 0) -> Mutant | None:
    """The known mistake that an answer's failures look like, or None.

    Best is one that fails in exactly the same way, with the same wrong values. Else the answer may
    have a second mistake: then the first failure and at least half of the mutant's must be alike.
    """
    first = next((i for i, outcome in enumerate(outcomes) if not outcome.passed), None)
    if first is None:
        return None
    best, most = None, 0.0
    for mutant in mutants_of(exercise):
        answer = mutant.answer()
        # Alike in the first failure, or not at all: most mutants need no more than this one test.
        (seen,) = try_answer(exercise, answer, seed, only=first)
        if seen.passed or not _same_failure(outcomes[first], seen):
            continue
        theirs = try_answer(exercise, answer, seed)
        if alike(outcomes, theirs):
            return mutant
        failed = [i for i, outcome in enumerate(theirs) if not outcome.passed]
        share = sum(_same_failure(outcomes[i], theirs[i]) for i in failed) / len(failed)
        if share >= 0.5 and share > most:
            best, most = mutant, share
    return best


def alike(ours: list[Outcome], theirs: list[Outcome]) -> bool:
    """True when both pass and fail the same properties, and fail with the same values."""
    return all(
        a.passed == b.passed and a.missing == b.missing and _same_failure(a, b)
        for a, b in zip(ours, theirs, strict=True)
    )


def _same_failure(a: Outcome, b: Outcome) -> bool:
    if a.mismatch is None or b.mismatch is None:
        return a.mismatch is b.mismatch
    if a.mismatch.what != b.mismatch.what:
        return False
    return _same_value(a.mismatch.got, b.mismatch.got)


def _same_value(a, b) -> bool:
    """Equal numbers, rounding aside; of errors' texts only the kind counts."""
    if isinstance(a, (torch.Tensor, float, int)) and isinstance(b, (torch.Tensor, float, int)):
        a, b = (torch.as_tensor(x).detach().double() for x in (a, b))
        return a.shape == b.shape and torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True)
    if isinstance(a, str) and isinstance(b, str):
        return a.partition(":")[0] == b.partition(":")[0]
    if isinstance(a, dict) and isinstance(b, dict):
        return a.keys() == b.keys() and all(_same_value(a[k], b[k]) for k in a)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same_value, a, b))
    return type(a) is type(b) and repr(a) == repr(b)
