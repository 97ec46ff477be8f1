"""Mutants: plausible wrong answers, each with the sentence that names its mistake.

They prove that the tests can tell right from wrong, and they let `check` say more than "wrong": an
answer that fails in exactly the way a mutant fails has, most likely, made its mistake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from rlhf_course.coursework.exercises import Exercise, find
from rlhf_course.coursework.source import definition, edited
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

    def source(self, variant: Any = None) -> str:
        """The wrong answer as a student would hand it in. Raises ValueError when an edit does not
        fit the solution, that of a variant where one is given, any more."""
        whole = definition(self.exercise, variant)
        if self.body is not None:
            return whole.with_answer(self.body)
        whose = f"{self.exercise}, mutant {self.name!r}"
        return whole.with_answer(edited(whole.answer, self.edits, whose))

    def answer(self) -> Any:
        """The wrong function, or class."""
        return answer_from(find(self.exercise), self.source())


def mutants_of(exercise: Exercise) -> list[Mutant]:
    """The exercise's mutants."""
    bank = load("mutants", exercise.file).MUTANTS
    return [mutant for mutant in bank if mutant.exercise == exercise.id]


def recognise(
    exercise: Exercise,
    outcomes: list[Outcome],
    seed: int = 0,
    suspects: Iterable[tuple[Mutant, Callable[[], Any]]] | None = None,
    again: Callable[[int], list[Outcome]] | None = None,
) -> Mutant | None:
    """The known mistake that an answer's failures look like, or None.

    Best is one that fails in exactly the same way, with the same wrong values. Else the answer may
    have a second mistake: then the first failure and at least half of the mutant's must be alike.

    suspects: mutants, each with what makes its answer; by default all of the exercise's.
    again: tries the answer under another seed, for the case that several mutants fail like it.
    """
    first = next((i for i, outcome in enumerate(outcomes) if not outcome.passed), None)
    if first is None:
        return None
    twins, best, most = [], None, 0.0
    if suspects is None:
        suspects = [(mutant, mutant.answer) for mutant in mutants_of(exercise)]
    for mutant, make in suspects:
        answer = make()
        # Alike in the first failure, or not at all: most mutants need no more than this one test.
        (seen,) = try_answer(exercise, answer, seed, only=first)
        if seen.passed or not _same_failure(outcomes[first], seen):
            continue
        theirs = try_answer(exercise, answer, seed)
        if alike(outcomes, theirs):
            twins.append((mutant, answer))
            continue
        failed = [i for i, outcome in enumerate(theirs) if not outcome.passed]
        share = sum(_same_failure(outcomes[i], theirs[i]) for i in failed) / len(failed)
        if share >= 0.5 and share > most:
            best, most = mutant, share
    for other in range(seed + 1, seed + 5) if again is not None else ():
        if len(twins) < 2:
            break
        anew = again(other)
        told = [t for t in twins if alike(anew, try_answer(exercise, t[1], other))]
        twins = told or twins
    return twins[0][0] if twins else best


def alike(ours: list[Outcome], theirs: list[Outcome]) -> bool:
    """True when both pass and fail the same properties, and fail with the same values."""
    return len(ours) == len(theirs) and all(
        a.passed == b.passed and a.missing == b.missing and _same_failure(a, b)
        for a, b in zip(ours, theirs, strict=True)
    )


def _same_failure(a: Outcome, b: Outcome) -> bool:
    if a.mismatch is None or b.mismatch is None:
        return a.mismatch is b.mismatch
    if a.mismatch.what != b.mismatch.what:
        return False
    # The inputs, too: the other one may have gone wrong somewhere else, with an equal result.
    pairs = zip(a.mismatch.inputs.values(), b.mismatch.inputs.values(), strict=False)
    return _same_value(a.mismatch.got, b.mismatch.got) and all(_same_value(*p) for p in pairs)


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
    if a is None or isinstance(a, torch.dtype):
        return a is b
    return type(a).__name__ == type(b).__name__  # objects that nothing more is known of
