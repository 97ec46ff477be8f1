"""What came of a check."""

from __future__ import annotations

import traceback
from dataclasses import dataclass
from pathlib import Path

from rlhf_course.coursework import bank
from rlhf_course.coursework.exercises import Exercise
from rlhf_course.coursework.mutants import Mutant
from rlhf_course.coursework.trial import Outcome


@dataclass(repr=False)
class Checked:
    """What came of a check; true when everything is right."""

    exercise: Exercise
    outcomes: list[Outcome]
    mistake: Mutant | None
    """The known mistake whose results these are."""

    def __bool__(self) -> bool:
        return all(outcome.passed for outcome in self.outcomes)

    @property
    def right(self) -> int:
        """How many properties hold."""
        return sum(outcome.passed for outcome in self.outcomes)

    def __repr__(self) -> str:
        return f"<{self.exercise.name}: {self.right} of {len(self.outcomes)} right>"

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
