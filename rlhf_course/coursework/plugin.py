"""pytest's side of the exercises: the `subject`, and the random numbers it is tested with.

pytest tests/exercises                    the package itself
pytest tests/exercises --exercise-seed 7  on other random inputs
"""

from __future__ import annotations

import pytest


def pytest_addoption(parser) -> None:
    """`--exercise-seed N`."""
    group = parser.getgroup("rlhf-course")
    group.addoption("--exercise-seed", type=int, help="seed of the exercises' random inputs [0]")


@pytest.fixture
def subject():
    """The code under test: the package."""
    from rlhf_course.coursework.subject import Subject

    return Subject()


@pytest.fixture
def rng(request):
    """Random numbers: a function of the test's name and of --exercise-seed."""
    from rlhf_course.coursework.trial import generator

    seed = request.config.getoption("--exercise-seed") or 0
    return generator(request.function.__name__, seed)


@pytest.fixture(scope="session")
def golden():
    """golden("G07") -> that GoldenCase."""
    from rlhf_course.coursework.golden import golden

    return golden
