"""What reports and exports say, in words that are safe to show anywhere.

A file's name, an error's text and whatever else a student chose may hold anything: control
characters that a terminal or a database chokes on, marks that turn the writing around, a megabyte
of it. `plain` takes that away; each format escapes the rest in its own way.
"""

from __future__ import annotations

import unicodedata

from rlhf_course.grading.results import (
    ABSENT,
    BLANK,
    BROKEN,
    RIGHT,
    STATUSES,
    WRONG,
    ExerciseResult,
    PropertyResult,
    SubmissionResult,
)

LONGEST = 2000
"""Characters of one text that a student sees."""
FAILED = (
    "The grader itself failed; nothing is known about this submission, and 0 points is not a "
    "judgement of it. Tell your instructor."
)
"""What a student reads instead of the reason, which is for the instructor."""
CORE = "needed for any points"
HOLDS, FAILS = "✓", "✗"


def plain(text: str, longest: int = LONGEST) -> str:
    """The text without what does not print, and no longer than this; its lines end in a newline."""
    text = str(text)[: longest + 1].replace("\r\n", "\n").replace("\t", "    ")
    text = "".join(map(_printed, text))
    return text if len(text) <= longest else text[:longest] + " …"


def _printed(letter: str) -> str:
    if letter == "\n" or unicodedata.category(letter) in ("Zl", "Zp"):
        return "\n"
    # Control, format (right-to-left marks), surrogate, private, unassigned.
    return "\N{REPLACEMENT CHARACTER}" if unicodedata.category(letter)[0] == "C" else letter


def line(text: str, longest: int = 200) -> str:
    """The same in one line."""
    return " ".join(plain(text, longest).split())


def points(score: float) -> str:
    """2.0 -> "2", 2.5 -> "2.5"."""
    return f"{score:.2f}".rstrip("0").rstrip(".")


def out_of(score: float, points_at_most: float) -> str:
    """ "2.5 of 3 points"."""
    return f"{points(score)} of {points(points_at_most)} points"


def total(result: SubmissionResult) -> float:
    """The points that a submission gets: none where the grader failed."""
    return 0.0 if result.failure else result.score


def verdict(exercise: ExerciseResult) -> str:
    """How an exercise went, in a few words that are all ours."""
    if exercise.status not in (RIGHT, WRONG):
        return STATUSES[exercise.status].replace("`", "")
    good, every = sum(each.passed for each in exercise.properties), len(exercise.properties)
    if good == every:
        return STATUSES[RIGHT]
    if not good:
        return f"none of the {every} properties holds"
    first = f"{good} of {every} properties hold"
    if all(each.passed for each in exercise.properties if each.core):
        return first
    return f"{first}, but one does not that is {CORE}"


def opening(exercise: ExerciseResult) -> str:
    """The first sentence about an exercise; where there is one of its own, that is it."""
    told = exercise.says if exercise.status not in (RIGHT, WRONG) else ""
    return plain(told) or f"{verdict(exercise).capitalize()}."


def sentences(exercise: ExerciseResult) -> list[tuple[PropertyResult, str]]:
    """Each property and what is said of it: what has just been said is not said again.

    None where there was nothing to try.
    """
    if exercise.status in (BLANK, ABSENT, BROKEN):
        return []
    found, last = [], opening(exercise)
    for each in exercise.properties:
        told = "" if each.passed else plain(each.says).strip()
        found.append((each, told if told != last else ""))
        last = told or last
    return found


def account(exercise: ExerciseResult) -> str:
    """Everything about an exercise as plain lines, for where there is no markup."""
    lines = [f"{out_of(exercise.score, exercise.points)}.", opening(exercise)]
    for each, told in sentences(exercise):
        needed = f" ({CORE})" if each.core and not each.passed else ""
        lines.append(f"{HOLDS if each.passed else FAILS} {line(each.title)}{needed}")
        lines += ["    " + part for part in told.splitlines()]
    if exercise.mistake:
        lines.append(f"It looks like a known mistake: {line(exercise.mistake, LONGEST)}")
    return "\n".join(lines)
