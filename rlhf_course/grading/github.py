"""A result as what GitHub Classroom's reporter reads: JSON in base64.

The fields are those that the actions of classroom-resources write (autograding-python-grader,
autograding-command-grader) and that classroom-resources/autograding-grading-reporter adds up: the
points are the sum of the tests' `score`, out of `max_score`. The reporter gets it in an environment
variable and prints the messages to the job's log.
"""

from __future__ import annotations

import base64
import json
from typing import Any

from rlhf_course.grading.results import ExerciseResult, SubmissionResult
from rlhf_course.grading.wording import FAILED, account, plain

LARGEST = 100_000
"""Characters of the payload: Linux takes no environment variable of more than 131,071 bytes."""


def payload(result: SubmissionResult) -> str:
    """The base64 of the result; the longer its messages, the more of each is cut."""
    longest = 4000
    while True:
        text = json.dumps(content(result, longest), ensure_ascii=False)
        encoded = base64.b64encode(text.encode("utf-8")).decode("ascii")
        if len(encoded) <= LARGEST or longest < 50:
            return encoded
        longest //= 2


def content(result: SubmissionResult, longest: int = 4000) -> dict[str, Any]:
    """The same, readable. longest: characters of one message."""
    tests = [_test(exercise, longest) for exercise in result.exercises]
    status = "pass" if all(test["status"] == "pass" for test in tests) else "fail"
    if result.failure or not tests:
        said = FAILED if result.failure else "The submission holds no exercise of this course."
        tests = [_entry("grading", "error" if result.failure else "fail", 0.0, said, 0.0)]
        status = tests[0]["status"]
    return {
        "version": 1,
        "status": status,
        "max_score": result.max_score,
        "tests": tests,
    }


def _test(exercise: ExerciseResult, longest: int) -> dict[str, Any]:
    status = "pass" if exercise.score >= exercise.points else "fail"
    said = silent(plain(account(exercise), longest))
    return _entry(exercise.exercise, status, exercise.score, said, exercise.seconds)


def _entry(name: str, status: str, score: float, message: str, seconds: float) -> dict[str, Any]:
    return {
        "name": name, "status": status, "score": float(score), "message": message,
        "test_code": f"rlhf-course grade: {name}", "filename": "", "line_no": 0,
        "duration": round(1000 * float(seconds)),
    }  # fmt: skip


def silent(text: str) -> str:
    """The text with nothing in it that the runner would obey when it reads the log: it takes
    "::name::" at the start of a line, and "##[name]" anywhere, for a command."""
    return text.replace("::", ":\N{ZERO WIDTH SPACE}:").replace("##[", "##\N{ZERO WIDTH SPACE}[")
