"""Rewards that a world itself gives: for experiments in which no reward model stands between.

    lab.train_many({"gold": {"world": "reviews", "reward": rewards.GOLD}})

A world's trainer scores by the name of a function (`--reward`), so these are functions of prompts
and answers as texts; which prompt of the world a text was is looked up here.
"""

from __future__ import annotations

from functools import lru_cache

from rlhf_course.coursework import lab
from rlhf_course.world import Prompt, World
from rlhf_course.world.reviews import ask
from rlhf_course.world.town import QUESTIONS, question

GOLD = f"{__name__}:reviews_gold"
MARKS = {world: f"{__name__}:{world}_marks" for world in ("reviews", "town")}


def reviews_gold(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """The gold utility of reviews: a reward model without errors. A missing EOS is not seen here;
    the trainer's penalty for it stands."""
    world = lab.world("reviews")
    said = zip(prompts, responses, strict=True)
    return [world.utility(ask(tuple(p.split())), r, True) for p, r in said]


def reviews_marks(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """Negative feedback alone: −1 for a review with a flaw, 0 for any other, vague or apt."""
    world = lab.world("reviews")
    said = zip(prompts, responses, strict=True)
    return [-float(is_bad(world, ask(tuple(p.split())), r)) for p, r in said]


def town_marks(prompts: list[str], responses: list[str], rows: list[dict]) -> list[float]:
    """Negative feedback alone: −1 for an answer that is false or malformed, 0 for any other."""
    world, asked = lab.world("town"), _questions()
    said = zip(prompts, responses, strict=True)
    return [-float(is_bad(world, asked[p], r)) for p, r in said]


def is_bad(world: World, prompt: Prompt, response: str, finished: bool = True) -> bool:
    """Whether an answer is marked down: false, flawed or malformed."""
    return world.verdict(prompt, response, finished) in ("false", "bad", "flawed", "malformed")


@lru_cache(maxsize=1)
def _questions() -> dict[str, Prompt]:
    """Every question that can be asked in the town, by its text."""
    world = lab.world("town")
    return {
        (asked := question(person, attribute, form, group)).text: asked
        for group, people in world.people.items()
        for person in people
        for attribute in world.attributes
        for form in QUESTIONS[attribute]
    }
