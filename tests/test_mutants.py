"""The exercises' tests tell right from wrong: the blank fails, the solution passes, every mutant
dies, and each dies in a way of its own, so that its mistake can be named."""

import os

import pytest
import torch

from rlhf_course.coursework.exercises import EXERCISES
from rlhf_course.coursework.mutants import Mutant, mutants_of, recognise
from rlhf_course.coursework.selftest import faults
from rlhf_course.coursework.source import solved
from rlhf_course.coursework.subject import answer_from
from rlhf_course.coursework.trial import properties, try_answer

SEEDS = int(os.environ.get("EXERCISE_SEEDS", "3"))  # 200 take some minutes


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_blank_solution_and_mutants(exercise):
    assert faults(exercise, SEEDS) == []


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_a_mutant_is_told_its_own_mistake(exercise):
    """The last one, for which all others are tried; `faults` tells each from each."""
    mutant = mutants_of(exercise)[-1]
    assert recognise(exercise, try_answer(exercise, mutant.answer())) is mutant


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_every_exercise_has_enough_of_both(exercise):
    tests, mutants = properties(exercise), mutants_of(exercise)
    assert len(tests) >= 4
    assert any(test.property.core for test in tests), "no property gates the others"
    assert len(mutants) >= 4
    assert len({mutant.name for mutant in mutants}) == len(mutants)
    for mutant in mutants:
        assert len(mutant.says) >= 15, f"{mutant.name}: name the mistake in a sentence"
        assert mutant.says.endswith((".", "?", "!")), mutant.name


def test_the_bank_is_large():
    assert sum(len(mutants_of(exercise)) for exercise in EXERCISES) >= 150


def test_an_edit_that_no_longer_fits_is_refused():
    stale = Mutant("reward_model.pairwise_loss", "stale", "…", edits=[("no such text", "x")])
    with pytest.raises(ValueError, match="stands 0 times"):
        stale.source()


def test_other_random_inputs_under_another_seed():
    (exercise,) = (e for e in EXERCISES if e.id == "ppo.whiten")
    seen = []

    def whiten(x, mask, *args, **kwargs):
        seen.append(x.clone())
        return answer(x, mask, *args, **kwargs)

    answer = answer_from(exercise, solved(exercise.id))
    try_answer(exercise, whiten, seed=1)
    once, seen = seen, []
    try_answer(exercise, whiten, seed=1)
    again, seen = seen, []
    try_answer(exercise, whiten, seed=2)
    assert len(once) == len(again) == len(seen) > 3

    def equal(xs, ys):
        return all(torch.equal(x.nan_to_num(), y.nan_to_num()) for x, y in zip(xs, ys, strict=True))

    assert equal(once, again)
    assert not equal(once, seen)
