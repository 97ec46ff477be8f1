"""Variants of an exercise for graded use: another one a term, from the same source.

    chosen = choose(7, ids)                       id -> Variant, or None where there is none
    source.blank(id, chosen[id])                  what students get
    adapted(exercise, chosen[id], answer)         their answer, as the exercise's tests know it

The tests are those of the exercise as it is (`variant_forms`); a property that never calls the
answer through the variant's form says nothing about it, and does not count.
"""

from __future__ import annotations

import hashlib
import inspect
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from typing import Any

import torch

from rlhf_course.coursework import exercises, mutants, source, trial
from rlhf_course.coursework.exercises import Exercise
from rlhf_course.coursework.expect import Mismatch, changed
from rlhf_course.coursework.mutants import Mutant
from rlhf_course.coursework.subject import Subject, answer_from
from rlhf_course.coursework.trial import Outcome
from rlhf_course.coursework.variant_forms import Variant
from rlhf_course.coursework.variant_texts import VARIANTS
from rlhf_course.errors import ConfigError


def variants_of(id: str) -> list[Variant]:
    """The variants of an exercise; most have none."""
    return [variant for variant in VARIANTS if variant.exercise == id]


def choose(seed: int, ids: Iterable[str]) -> dict[str, Variant | None]:
    """Which variant of each exercise is asked for: a function of the seed.

    What is drawn for one exercise does not depend on which others are named. Those that share a
    question (padding) are given the same answer to it.
    """
    chosen: dict[str, Variant | None] = {}
    for id in ids:
        several = variants_of(id)
        chosen[id] = several[_drawn(seed, several[0].group) % len(several)] if several else None
    return chosen


def _drawn(seed: int, group: str) -> int:
    """A large number that is the same on every machine and in every version of Python."""
    return int.from_bytes(hashlib.sha256(f"{seed} {group}".encode()).digest()[:8], "big")


def find(id: str, name: str) -> Variant:
    """The variant of this name. Raises ConfigError listing those there are."""
    several = variants_of(id)
    for variant in several:
        if variant.name == name:
            return variant
    there = ", ".join(repr(variant.name) for variant in several) or "none"
    raise ConfigError(f"{id} has no variant {name!r}. There are: {there}.")


@cache
def solution(variant: Variant) -> Callable:
    """The right answer to a variant."""
    text = source.solved(variant.exercise, variant)
    return answer_from(exercises.find(variant.exercise), text)


def usual_form(answer: Callable, name: str) -> Callable:
    """A variant's answer as a function of the exercise's usual form, for the rest of a chapter.

    name: the variant's. Handed over once more (a cell is run again), it comes back as it is.
    """
    if own(answer) is not answer:
        return answer
    exercise = exercises.find(answer.__name__)
    made = find(exercise.id, name).form.adapt(answer, exercise.reference())
    made.adapted_from = answer
    return made


def own(answer: Callable) -> Callable:
    """What the student has written, where `usual_form` has made something else of it."""
    return getattr(answer, "adapted_from", answer)


# -------------------------------------------------------------------------------------- testing


class Watched:
    """A variant's answer that remembers how it was called, and does not let it change its inputs.

    The tests compare their own inputs; those that a form has made are compared here.
    """

    def __init__(self, answer: Callable, names: Iterable[str]):
        self.answer, self.names = answer, list(names)
        self.calls = 0
        self.seen: dict[str, Any] = {}
        """The last call's arguments."""

    def __call__(self, *args):
        self.calls += 1
        before = [a.detach().clone() if isinstance(a, torch.Tensor) else a for a in args]
        self.seen = dict(zip(self.names, before, strict=False))
        result = self.answer(*args)
        for name, old, new in zip(self.names, before, args, strict=False):
            if changed(old, new):
                raise Mismatch(f"it changed its input {name} in place", self.seen, old, new)
        return result


def adapted(exercise: Exercise, variant: Variant | None, answer: Callable) -> Callable:
    """An answer as the exercise's tests know it: that of a variant takes the usual arguments.

    The calls that a variant does not ask for are answered by the package's own function.
    """
    if variant is None or variant.usual:
        return answer
    watched = Watched(answer, inspect.signature(solution(variant)).parameters)
    made = variant.form.adapt(watched, exercise.reference())
    made.watched = watched
    return made


class VariantSubject:
    """What an exercise's tests see of an answer to a variant, which `behind` it holds.

    behind: a `Subject` with the answer as the student wrote it, here or in another process.
    """

    def __init__(self, exercise: Exercise, variant: Variant | None, behind: Any):
        self.exercise, self.behind = exercise, behind
        self.function = adapted(exercise, variant, getattr(behind, exercise.name))

    def __getattr__(self, name: str) -> Any:
        return self.function if name == self.exercise.name else getattr(self.behind, name)


@cache
def counted(exercise: Exercise, variant: Variant | None) -> tuple[bool, ...]:
    """Which of the exercise's properties count, in the order of `trial.properties`.

    Observed, not declared: those that call the variant's solution.
    """
    tests = trial.properties(exercise)
    if variant is None or variant.usual:
        return (True,) * len(tests)
    found = []
    for test in tests:
        subject = VariantSubject(exercise, variant, Subject(exercise, solution(variant)))
        _undisturbed(test, subject, seed=0)
        found.append(subject.function.watched.calls > 0)
    return tuple(found)


def _undisturbed(test: Callable, subject: Any, seed: int) -> Outcome:
    """`trial.run` that leaves the random numbers of this process as they were."""
    with torch.random.fork_rng(devices=[]):
        return trial.run(test, subject, seed)


def title(test: Callable, variant: Variant | None) -> str:
    """What a property demands, in the student's words."""
    own = variant.titles.get(test.__name__) if variant else None
    return own or trial.title(test)


def try_variant(
    exercise: Exercise, variant: Variant | None, answer: Callable, seed: int = 0
) -> tuple[list[Outcome], list[Outcome]]:
    """(every outcome as the tests see it, those that count as a student of the variant sees them).

    The first is what `mutants.recognise` compares; the second has the variant's titles, and the
    arguments and values of its calls.
    """
    every, shown = [], []
    counts = counted(exercise, variant)
    for test, counts_here in zip(trial.properties(exercise), counts, strict=True):
        subject = VariantSubject(exercise, variant, Subject(exercise, answer))
        outcome = _undisturbed(test, subject, seed)
        every.append(outcome)
        if counts_here:
            shown.append(_as_asked(outcome, title(test, variant), variant, subject.function))
    return every, shown


def _as_asked(outcome: Outcome, words: str, variant: Variant | None, function: Callable) -> Outcome:
    watched, found = getattr(function, "watched", None), outcome.mismatch
    if watched is None or found is None or not watched.calls:
        return replace(outcome, title=words)
    call = None if found.inputs is watched.seen else _usual_call(function, found.inputs)
    expected, got = found.expected, found.got
    if call is not None:
        expected, got = (variant.form.forth(value, call) for value in (expected, got))
    told = Mismatch(found.what, watched.seen, expected, got)
    told.__cause__ = found.__cause__
    return replace(outcome, title=words, mismatch=told)


def _usual_call(function: Callable, inputs: dict) -> dict | None:
    """The inputs that a mismatch tells, where they are those of a call."""
    try:
        return dict(inspect.signature(function).bind(**inputs).arguments)
    except TypeError:
        return None


# ------------------------------------------------------------------------------- known mistakes


def mistakes_of(variant: Variant) -> list[Mutant]:
    """The mutants of the exercise, in this variant's words, and those of the variant's own."""
    exercise = exercises.find(variant.exercise)
    told = [replace(mutant, says=variant.sentences.get(mutant.name, mutant.says))
            for mutant in mutants.mutants_of(exercise)]  # fmt: skip
    for name, says, change in variant.mistakes:
        body, edits = (change, ()) if isinstance(change, str) else (None, change)
        told.append(Mutant(exercise.id, name, says, edits, body))
    return told


def mistaken(variant: Variant, mutant: Mutant) -> Callable:
    """A mutant's answer to a variant.

    The variant's solution with the mutant's edits where they fit; else the mutant's own function,
    called through the variant's form.
    """
    exercise = exercises.find(variant.exercise)
    own = mutant.name in {name for name, *_ in variant.mistakes}
    if own or (mutant.body is None and not variant.usual):
        try:
            return answer_from(exercise, mutant.source(variant))
        except ValueError:
            if own:
                raise
    return variant.form.narrow(mutant.answer(), solution(variant))


def recognise(
    exercise: Exercise,
    variant: Variant | None,
    outcomes: list[Outcome],
    seed: int = 0,
    again: Callable[[int], list[Outcome]] | None = None,
) -> Mutant | None:
    """`mutants.recognise` for an answer to a variant. outcomes, and what `again` returns: of all
    properties, as the tests see them (the first of `try_variant`'s two lists)."""
    if variant is None:
        return mutants.recognise(exercise, outcomes, seed, again=again)

    def maker(mutant: Mutant) -> Callable[[], Callable]:
        return lambda: adapted(exercise, variant, mistaken(variant, mutant))

    suspects = [(mutant, maker(mutant)) for mutant in mistakes_of(variant)]
    return mutants.recognise(exercise, outcomes, seed, suspects, again)
