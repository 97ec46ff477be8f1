"""pytest as the autograder: the exercises' tests, on a submission instead of on the package.

pytest tests --submission 03_reward_model.ipynb
pytest tests --submission folder/of/chapters --junitxml grades.xml

Only the exercises' tests are run, of the chapters that the submission touches. They run in this
process, the submission in players, and a failure says what the student may read.
"""

from __future__ import annotations

from collections import Counter
from itertools import chain
from pathlib import Path

import pytest

from rlhf_course.coursework.exercises import find
from rlhf_course.errors import GradingError

MARK = "rlhf_course"
"""Under this name a report carries what the points are counted from."""


def pytest_addoption(parser) -> None:
    """`--submission PATH`."""
    group = parser.getgroup("rlhf-course")
    group.addoption("--submission", type=Path, help="a notebook, a .py file, or a folder of them")
    group.addoption("--variants", type=int, help="the number its chapters were printed with")


def pytest_configure(config) -> None:
    """Grade, where a submission is named; otherwise this plugin does nothing."""
    path = config.getoption("--submission")
    if path is None:
        return
    from rlhf_course.errors import CourseError
    from rlhf_course.grading.referee import fresh_seed

    if config.getoption("exercise_seed") is None:
        config.option.exercise_seed = fresh_seed()  # workers of xdist are given the same
    try:
        config.pluginmanager.register(_submitted(config), "submitted")
    except CourseError as error:
        raise pytest.UsageError(str(error)) from None


def _submitted(config) -> Submitted:
    get = config.getoption
    return Submitted(get("--submission"), get("exercise_seed"), get("--variants"))


class Submitted:
    """One session's submission, and its players."""

    def __init__(self, path: Path, seed: int, variants: int | None):
        from rlhf_course.grading import children, referee, submission

        self.referee, self.seed = referee, seed
        self.submission = submission.find(path)
        self.server = children.ForkServer()
        try:
            self.reading = referee.read(self.server, self.submission)
        except BaseException:
            self.server.close()
            raise
        asked = [e.id for e in referee.asked(self.submission, self.reading, ())]
        self.chosen = referee.Rules(seed, variants=variants).chosen(asked)
        self.attempts: dict[str, referee.Attempt] = {}
        self.left: Counter = Counter()

    def pytest_report_header(self) -> list[str]:
        """What is graded, and how it could be repeated."""
        header = [f"submission: {self.submission.name}, --exercise-seed {self.seed}"]
        return header + [f"problem: {text}" for text in self.reading.problems]

    def pytest_ignore_collect(self, collection_path: Path) -> bool | None:
        """Of all files of tests only those of the exercises are imported."""
        from rlhf_course.coursework import bank

        exercises = bank.folder() / "exercises"
        outside = collection_path.suffix == ".py" and collection_path.parent != exercises
        return True if outside else None

    def pytest_collection_modifyitems(self, config, items: list) -> None:
        """Only the chapters that count, and of a variant only what it asks for."""
        kept = [item for item in items if self._counts(item)]
        config.hook.pytest_deselected(items=[item for item in items if item not in set(kept)])
        items[:] = kept
        self.left.update(map(_exercise, kept))

    def _counts(self, item) -> bool:
        from rlhf_course.coursework import trial, variants

        id = _exercise(item)
        if id not in self.chosen:
            return False
        counts = variants.counted(find(id), self.chosen[id])
        names = [test.__name__ for test in trial.properties(find(id))]
        return counts[names.index(item.function.__name__)]

    @pytest.hookimpl(tryfirst=True)
    def pytest_pyfunc_call(self, pyfuncitem) -> bool:
        """Run the test as the referee does, on the player of its exercise."""
        id = _exercise(pyfuncitem)
        try:
            if id not in self.attempts:
                self.attempts[id] = self.referee.attempt(
                    self.server, find(id), self.reading.answers.get(id), self.seed, self.chosen[id]
                )
            attempt = self.attempts[id]
            outcome = attempt.try_property(pyfuncitem.function)
        except GradingError as error:  # no fault of the answer, and no other test can be run
            pytest.exit(f"the grader itself failed: {error}", pytest.ExitCode.INTERNAL_ERROR)
        self.left[id] -= 1
        if not self.left[id]:
            attempt.end()
        found = [id, bool(outcome and outcome.passed), attempt.status]
        pyfuncitem.user_properties.append((MARK, found))
        if outcome is None:
            pytest.fail(attempt.says, pytrace=False)
        if not outcome.passed:
            pytest.fail(self.referee.sentence(outcome), pytrace=False)
        return True

    def pytest_terminal_summary(self, terminalreporter) -> None:
        """The points."""
        terminalreporter.section(f"points of {self.submission.name}")
        holds: dict[str, dict[str, bool]] = {}
        ended: dict[str, str] = {}
        for report in chain.from_iterable(terminalreporter.stats.values()):
            for name, found in getattr(report, "user_properties", []):
                if name == MARK and report.when == "call":
                    id, passed, status = found
                    holds.setdefault(id, {})[report.nodeid.rpartition("::")[2]] = passed
                    ended[id] = ended.get(id, "") or status
        total = most = 0.0
        for id, found in holds.items():
            exercise = find(id)
            score = self.referee.points(exercise, found, self.chosen[id])
            score = 0.0 if ended[id] else score
            total, most = total + score, most + exercise.points
            terminalreporter.write_line(f"{score:5g} of {exercise.points:<3} {id}")
        terminalreporter.write_line(f"{total:5g} of {most:<3g} in all")

    def pytest_unconfigure(self) -> None:
        """No player is left behind."""
        for attempt in self.attempts.values():
            attempt.end()
        self.server.close()


def _exercise(item) -> str | None:
    """The id of the exercise whose property a test is."""
    found = getattr(getattr(item, "function", None), "property", None)
    return found.exercise if found else None
