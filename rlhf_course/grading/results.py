"""What came of grading: the records that every report and every export is made of."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

from rlhf_course.errors import DataError

RIGHT, WRONG, BLANK, ABSENT, BROKEN, STOPPED = (
    "right", "wrong", "blank", "absent", "broken", "stopped",
)  # fmt: skip
STATUSES = {
    RIGHT: "every property holds",
    WRONG: "some property does not hold",
    BLANK: "`raise NotImplementedError` still stands there",
    ABSENT: "the submission defines no such function",
    BROKEN: "the definition itself fails",
    STOPPED: "it hung, crashed or ended its process",
}


@dataclass(frozen=True)
class PropertyResult:
    """One property of one exercise."""

    title: str
    """The property in words."""
    core: bool
    """Without it the exercise earns nothing."""
    weight: float
    passed: bool
    says: str
    """What went wrong, for the student; "" where it passed."""
    seconds: float


@dataclass(frozen=True)
class ExerciseResult:
    """One exercise of one submission."""

    exercise: str
    """Its id: "ppo.whiten"."""
    chapter: int
    points: int
    score: float
    """0 … points, rounded to two digits."""
    status: str
    """One of STATUSES."""
    says: str
    """A sentence, unless the status is right or wrong."""
    mistake: str
    """The sentence of the known mistake that the answer behaves like, or ""."""
    properties: tuple[PropertyResult, ...]
    seconds: float


@dataclass(frozen=True)
class SubmissionResult:
    """Everything about one submission."""

    name: str
    """The student's: file stem or folder name."""
    files: tuple[str, ...]
    """What was read, relative to the submission."""
    problems: tuple[str, ...]
    """Files that were left out, and why."""
    exercises: tuple[ExerciseResult, ...]
    """Of the chapters that count, in the course's order."""
    seed: int
    """Of the random inputs: the same seed gives the same ones again."""
    variant: int | None
    """The seed of the variants that were asked for; None: the exercises as they are."""
    isolation: tuple[str, ...]
    """The layers of protection that this machine allowed."""
    version: str
    """Of this package."""
    seconds: float
    failure: str
    """ "", or what went wrong in the grader itself: then the score says nothing."""
    digest: str = ""
    """SHA-256 of the files' names and contents."""

    @property
    def score(self) -> float:
        """The points earned."""
        return round(sum(exercise.score for exercise in self.exercises), 2)

    @property
    def max_score(self) -> float:
        """The points that could be earned in the chapters that count."""
        return float(sum(exercise.points for exercise in self.exercises))

    @property
    def chapters(self) -> tuple[int, ...]:
        """The chapters that count."""
        return tuple(sorted({exercise.chapter for exercise in self.exercises}))

    def to_json(self) -> str:
        """Everything, as text; `from_json` reads it."""
        shown = asdict(self) | {"score": self.score, "max_score": self.max_score}
        return json.dumps(shown, indent=2, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> SubmissionResult:
        """Read what `to_json` wrote. Raises DataError for anything else."""
        try:
            fields = json.loads(text)
            del fields["score"], fields["max_score"]
            exercises = tuple(_exercise(found) for found in fields.pop("exercises"))
            lists = {key: tuple(fields.pop(key)) for key in ("files", "problems", "isolation")}
            return cls(exercises=exercises, **lists, **fields)
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"not a result of rlhf-course grade: {error!r}. Grade again.") from None


def _exercise(fields: dict) -> ExerciseResult:
    found = tuple(PropertyResult(**each) for each in fields.pop("properties"))
    return ExerciseResult(properties=found, **fields)
