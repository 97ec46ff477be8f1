"""A result as Gradescope's results.json.

Fields, types and their meaning: Gradescope's "Autograder Specifications" (the pages of
gradescope-autograders, and `gradescope/autograder_samples`); gradescope-utils' JSONTestRunner
writes the same ones. Every text is of the format "text", which Gradescope shows as it is.
"""

from __future__ import annotations

from typing import Any

from rlhf_course.coursework.exercises import EXERCISES
from rlhf_course.grading.results import ExerciseResult, SubmissionResult
from rlhf_course.grading.wording import FAILED, LONGEST, account, line, out_of, total

VISIBLE = "visible"
"""The others that Gradescope knows: "hidden", "after_due_date", "after_published"."""


def results_json(
    result: SubmissionResult, visibility: str = VISIBLE, leaderboard: bool = False
) -> dict[str, Any]:
    """What results.json holds: one test an exercise, with its points and what to read about it.

    Standard output stays with the instructors. Where the grader failed there are no tests, the
    score is 0, and the output says so. leaderboard: show the points there under chosen names.
    """
    found: dict[str, Any] = {
        "score": float(total(result)),
        "execution_time": round(float(result.seconds), 2),
        "output": _output(result),
        "output_format": "text",
        "test_output_format": "text",
        "test_name_format": "text",
        "visibility": visibility,
        "stdout_visibility": "hidden",
        "extra_data": {
            "version": line(result.version),
            "seed": result.seed,
            "variant": result.variant,
            "isolation": [line(layer) for layer in result.isolation],
        },
        "tests": [] if result.failure else [_test(e, visibility) for e in result.exercises],
    }
    if leaderboard and not result.failure:
        found["leaderboard"] = [{"name": "points", "value": result.score, "order": "desc"}]
    return found


def _output(result: SubmissionResult) -> str:
    if result.failure:
        return FAILED
    lines = [f"{out_of(result.score, result.max_score)}."]
    if result.files:
        lines.append("Read: " + ", ".join(line(name) for name in result.files))
    lines += [f"Problem: {line(problem, LONGEST)}" for problem in result.problems]
    return "\n".join(lines)


def _test(exercise: ExerciseResult, visibility: str) -> dict[str, Any]:
    return {
        "name": exercise.exercise,
        "number": _number(exercise),
        "score": float(exercise.score),
        "max_score": float(exercise.points),
        "status": "passed" if exercise.score >= exercise.points else "failed",
        "output": account(exercise),
        "output_format": "text",
        "tags": [f"chapter {exercise.chapter}", exercise.status],
        "visibility": visibility,
        "extra_data": {"seconds": round(float(exercise.seconds), 2)},
    }


def _number(exercise: ExerciseResult) -> str:
    """ "5.2": the second exercise of chapter 5, whatever else was graded."""
    ids = [each.id for each in EXERCISES if each.chapter == exercise.chapter]
    return f"{exercise.chapter}.{ids.index(exercise.exercise) + 1}"
