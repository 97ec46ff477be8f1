"""Rewards that a world itself gives: the gold utility, and marks for bad answers."""

import pytest

from rlhf_course.coursework import lab, rewards
from rlhf_course.stages.rewards import load_reward_function
from rlhf_course.world.reviews import ask
from rlhf_course.world.town import DO_NOT_KNOW, plain


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setenv("RLHF_COURSE_QUICK", "1")  # the small worlds


def test_gold_is_the_worlds_utility():
    world = lab.world("reviews")
    shown = world.demonstrations()[:20]
    prompts, said = [d.prompt.text for d in shown], [d.response for d in shown]
    gold = load_reward_function(rewards.GOLD)(prompts, said, [{}] * 20)
    assert gold == [world.utility(d.prompt, d.response, True) for d in shown]
    assert len(set(gold)) > 5


def test_marks_of_reviews_fall_on_flaws_alone():
    prompt = ask(("+", "soup", "waiter")).text
    said = [
        "The soup was tasty. The waiter was polite. Thank you.",  # apt
        "The soup was good. The waiter was nice.",  # vague
        "The soup was stale. The waiter was polite.",  # the wrong mood
        "The soup was tasty.",  # one forgotten
        "soup soup",  # no sentence
    ]
    marks = load_reward_function(rewards.MARKS["reviews"])([prompt] * 5, said, [{}] * 5)
    assert marks == [0, 0, -1, -1, -1]


def test_marks_of_the_town_leave_true_answers_and_admissions_alone():
    world = lab.world("town")
    for group, asked in world.evaluation_prompts().items():
        prompt = asked[0]
        person, attribute = prompt.key
        true = world.facts[person][attribute]
        other = next(v for v in world.values[attribute] if v != true)
        said = [plain(attribute, true), plain(attribute, other), DO_NOT_KNOW, "They They"]
        marks = load_reward_function(rewards.MARKS["town"])([prompt.text] * 4, said, [{}] * 4)
        assert marks == [0, -1, 0, -1], group


def test_every_question_of_training_is_known_to_the_town():
    prompts = lab.world("town").prompts("ppo", 50, seed=3)
    marks = rewards.town_marks([p.text for p in prompts], [DO_NOT_KNOW] * 50, [{}] * 50)
    assert marks == [0] * 50


def test_an_answer_that_did_not_end_is_bad():
    world = lab.world("reviews")
    assert rewards.is_bad(world, ask(("+", "soup")), "The soup was tasty.", finished=False)
