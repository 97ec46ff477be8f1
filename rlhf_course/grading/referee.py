"""The referee: points and sentences for what players do. It never runs or parses a submission."""

from __future__ import annotations

import atexit
import hashlib
import secrets
import time
from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from itertools import zip_longest

import torch

import rlhf_course
from rlhf_course.coursework import variants
from rlhf_course.coursework.checked import Checked
from rlhf_course.coursework.exercises import EXERCISES, STEMS, Exercise
from rlhf_course.coursework.expect import unwritten
from rlhf_course.coursework.trial import Outcome, properties, run
from rlhf_course.coursework.variants import Variant, VariantSubject
from rlhf_course.errors import GradingError
from rlhf_course.grading import results
from rlhf_course.grading.children import Child, ForkServer, Patience, Stopped
from rlhf_course.grading.reader import unpacked
from rlhf_course.grading.remote import RemoteSubject, told
from rlhf_course.grading.results import ExerciseResult, PropertyResult, SubmissionResult
from rlhf_course.grading.submission import Submission

NOT_TRIED = "Not tried."
NOT_WRITTEN = "Not written yet."
NOTHING = "No exercise of this course is defined in what was handed in."


@dataclass
class Attempt:
    """One exercise's answer in its player, as far as it has come."""

    server: ForkServer
    exercise: Exercise
    seed: int
    variant: Variant | None = None
    status: str = ""
    """BLANK, ABSENT, BROKEN or STOPPED as soon as that is certain."""
    says: str = ""
    subject: RemoteSubject | VariantSubject | None = None
    outcomes: list[Outcome] = field(default_factory=list)

    @property
    def tests(self) -> list[tuple[Callable, bool]]:
        """(test, whether it counts): a property that a variant does not ask for does not."""
        counts = variants.counted(self.exercise, self.variant)
        return list(zip(properties(self.exercise), counts, strict=True))

    def try_property(self, test: Callable) -> Outcome | None:
        """One property's outcome; None when it cannot be tried, for the reason in `says`.

        Raises GradingError when the grader has failed, not the answer.
        """
        if self.status:
            return None
        try:
            outcome = run(test, self.subject, self.seed)
        except Stopped as stopped:
            self.server.check()
            self.status, self.says = results.STOPPED, str(stopped)
            return None
        self.server.check()
        self.outcomes.append(outcome)
        return outcome

    def again(self, seed: int) -> list[Outcome]:
        """All properties' outcomes under another seed; none when it cannot be tried."""
        try:
            return [run(test, self.subject, seed) for test in properties(self.exercise)]
        except Stopped:
            return []

    def end(self) -> None:
        """End the player."""
        if self.subject is not None:
            self.subject.end()


def attempt(
    server: ForkServer, exercise: Exercise, statements: Sequence | None, seed: int,
    variant: Variant | None = None,
) -> Attempt:  # fmt: skip
    """Start a player on the definitions of an answer; None: the submission has none.

    Raises GradingError where no player can be started.
    """
    begun = Attempt(server, exercise, seed, variant)
    if statements is None:
        begun.status = results.ABSENT
        begun.says = f"No `{exercise.name}` was found."
        return begun
    try:
        begun.subject = RemoteSubject(server, exercise, statements)
        if variant is not None:
            begun.subject = VariantSubject(exercise, variant, begun.subject)
    except Stopped as stopped:
        begun.status = results.STOPPED
        begun.says = f"While it was being defined: {stopped}"
    except GradingError:
        raise
    except Exception as error:  # noqa: BLE001 - what the student's own definition raises
        begun.status = results.BROKEN
        where = f" ({error.where})" if getattr(error, "where", "") else ""
        begun.says = f"Its definition fails: {type(error).__name__}: {error}{where}"
    return begun


def judge(begun: Attempt, seconds: float) -> ExerciseResult:
    """Points and sentences, once all properties have been tried."""
    exercise, variant, status, says = begun.exercise, begun.variant, begun.status, begun.says
    pairs = zip_longest(begun.tests, begun.outcomes)  # what was not tried has no outcome
    asked = [(test, outcome) for (test, counts), outcome in pairs if counts]
    if not status:
        status, says = _status([outcome for _, outcome in asked])
    rows = [_property(test, outcome, variant) for test, outcome in asked]
    holds = {test.__name__: row.passed for (test, _), row in zip(asked, rows, strict=True)}
    score = 0.0
    if status in (results.RIGHT, results.WRONG):
        score = points(exercise, holds, variant)
    mistake = None
    if status == results.WRONG and any(outcome.mismatch for _, outcome in asked):
        with suppress(Exception):  # a name for the mistake is a help; values may be of any kind
            mistake = variants.recognise(exercise, variant, begun.outcomes, begun.seed, begun.again)
    return ExerciseResult(
        exercise.id, exercise.chapter, exercise.points, score, status,
        says, mistake.says if mistake else "", tuple(rows), round(seconds, 3),
    )  # fmt: skip


def _status(outcomes: list[Outcome]) -> tuple[str, str]:
    result = Checked(None, outcomes, None)
    if result:
        return results.RIGHT, ""
    if result.missing and not result.right:
        return results.BLANK, NOT_WRITTEN
    return results.WRONG, ""


def _property(test: Callable, outcome: Outcome | None, variant: Variant | None) -> PropertyResult:
    marks, words = test.property, variants.title(test, variant)
    if outcome is None:
        return PropertyResult(words, marks.core, marks.weight, False, NOT_TRIED, 0.0)
    return PropertyResult(
        words, marks.core, marks.weight, outcome.passed, sentence(outcome),
        round(outcome.seconds, 4),
    )  # fmt: skip


def sentence(outcome: Outcome) -> str:
    """What a student may read about a property: what is wrong, without the hidden input, what was
    expected of it, or anything of the machine."""
    if outcome.passed:
        return ""
    if outcome.missing:
        return NOT_WRITTEN
    wrong = outcome.mismatch
    error = wrong.__cause__
    if error is None:
        return told(f"{wrong.what.strip()}.")  # the name of a type may stand in it
    if unwritten(error):
        return NOT_WRITTEN
    where = f" ({error.where})" if getattr(error, "where", "") else ""
    return f"It raised {type(error).__name__}: {error}{where}"


def points(exercise: Exercise, holds: dict[str, bool], variant: Variant | None = None) -> float:
    """An exercise's points, given which of its tests' names hold; one that is missing does not.

    The share is that of the weights of what holds. Without every core property there is nothing.
    """
    counts = variants.counted(exercise, variant)
    pairs = zip(properties(exercise), counts, strict=True)
    tests = [(t.property, holds.get(t.__name__, False)) for t, counts_here in pairs if counts_here]
    if not all(passed for marks, passed in tests if marks.core):
        return 0.0
    earned = sum(marks.weight for marks, passed in tests if passed)
    return round(exercise.points * earned / sum(marks.weight for marks, _ in tests), 2)


# ------------------------------------------------------------------------------ a whole submission


def grade_exercise(
    server: ForkServer, exercise: Exercise, statements: Sequence | None, seed: int,
    variant: Variant | None = None,
) -> ExerciseResult:  # fmt: skip
    """One exercise from its definitions to its points."""
    began = time.perf_counter()
    begun = attempt(server, exercise, statements, seed, variant)
    try:
        for test in properties(exercise):
            if begun.try_property(test) is None:
                break
        return judge(begun, time.perf_counter() - began)
    finally:
        begun.end()


@dataclass(frozen=True)
class Reading:
    """What a submission defines."""

    answers: dict[str, list]
    """Exercise id -> the statements that its answer needs."""
    problems: tuple[str, ...]


def read(server: ForkServer, submission: Submission) -> Reading:
    """Take a submission's files apart, in a confined child of its own."""
    problems = tuple(submission.problems)
    child = Child(server, "reader")
    try:
        found = child.ask({name: _bytes(data) for name, data in submission.files.items()})
        return Reading(unpacked(found), problems + tuple(found["problems"]))
    except Stopped as stopped:
        return Reading({}, (*problems, f"The files cannot be taken apart. {stopped}"))
    finally:
        child.end()


def _bytes(data: bytes) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0).byte()


def asked(submission: Submission, reading: Reading, chapters: Collection[int]) -> list[Exercise]:
    """The exercises that count: of these chapters, or else of those that the submission touches."""
    if not chapters:
        touched = {e.chapter for e in EXERCISES if e.id in reading.answers}
        named = " ".join(submission.files)
        chapters = touched | {n for n, stem in enumerate(STEMS) if f"{n:02d}_{stem}" in named}
    return [exercise for exercise in EXERCISES if exercise.chapter in chapters]


@dataclass(frozen=True)
class Rules:
    """What is graded, and how."""

    seed: int
    """Of the random inputs."""
    chapters: tuple[int, ...] = ()
    """Those that count; none: those that a submission touches."""
    variants: int | None = None
    """The seed of the variants that the students had; None: the exercises as they are."""
    patience: Patience = field(default_factory=Patience)

    def chosen(self, ids: Sequence[str]) -> dict[str, Variant | None]:
        """The variant of each of these exercises; None: as it is."""
        if self.variants is None:
            return dict.fromkeys(ids)
        return variants.choose(self.variants, ids)


def grade(server: ForkServer, submission: Submission, rules: Rules) -> SubmissionResult:
    """Grade one submission. Whatever a submission may be, it raises nothing because of it; what
    goes wrong here becomes the result's `failure`."""
    began, graded, problems, failure = time.perf_counter(), [], tuple(submission.problems), ""
    try:
        reading = read(server, submission)
        problems = reading.problems
        wanted = asked(submission, reading, rules.chapters)
        if submission.files and not wanted:
            problems += (NOTHING,)
        chosen = rules.chosen([exercise.id for exercise in wanted])
        for exercise in wanted:
            statements, variant = reading.answers.get(exercise.id), chosen[exercise.id]
            graded.append(grade_exercise(server, exercise, statements, rules.seed, variant))
    except Exception as error:  # noqa: BLE001 - it is told where the points would be
        failure = f"{type(error).__name__}: {error}"
    return SubmissionResult(
        name=submission.name, files=tuple(submission.files), problems=problems,
        exercises=tuple(graded), seed=rules.seed, variant=rules.variants,
        isolation=tuple(server.isolation), version=rlhf_course.__version__,
        seconds=round(time.perf_counter() - began, 3), failure=failure, digest=digest(submission),
    )  # fmt: skip


def digest(submission: Submission) -> str:
    """SHA-256 of a submission's names and contents."""
    found = hashlib.sha256()
    for name, data in sorted(submission.files.items()):
        found.update(f"{len(data)} {name}\0".encode("utf-8", "surrogateescape") + data)
    return found.hexdigest()


def grade_files(
    name: str, files: dict[str, bytes], chapters: Collection[int] = (), seed: int | None = None,
    variants: int | None = None,
) -> SubmissionResult:  # fmt: skip
    """Grade what some files hold, with this process's own fork server. seed None: a secret one."""
    rules = Rules(fresh_seed() if seed is None else seed, tuple(chapters), variants)
    return grade(_own_server(), Submission(name, files, ()), rules)


@cache
def _own_server() -> ForkServer:
    server = ForkServer()
    atexit.register(server.close)
    return server


def fresh_seed() -> int:
    """A seed that nobody can know beforehand."""
    return secrets.randbelow(1 << 31)
