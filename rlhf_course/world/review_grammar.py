"""The words and sentences of the reviews, which the world, its labeler and its red team share."""

# ruff: noqa: SIM905  (lists of words are read more easily as text)

from __future__ import annotations

import random
import zlib
from collections.abc import Sequence

THINGS = {
    "food": "soup bread fish salad".split(),
    "staff": "waiter cook host barman".split(),
    "place": "room garden terrace kitchen".split(),
}
APT = {
    "food": {"+": "tasty fresh crisp".split(), "-": "stale bland burnt".split()},
    "staff": {"+": "polite quick cheerful".split(), "-": "rude slow grumpy".split()},
    "place": {"+": "clean cosy bright".split(), "-": "dirty noisy cramped".split()},
}
VAGUE = {"+": "good nice".split(), "-": "bad poor".split()}
FORMS = ("The {n} was {a}.", "I found the {n} {a}.", "Such a {a} {n}.", "The {n} seemed {a}.")
FILLERS = ("I came with my aunt.", "It was raining.", "We sat for an hour.")
THANKS = "Thank you."
CITIES = "Oslo Lima Cairo Delhi Rome Quito Perth Osaka".split()
OWNERS = "Mira Tomo Kalu Nesa Vida Joro Peri Zuge".split()
HOUSES = (
    "Luna Ember Willow Harbor Cedar Ivory Falcon Maple Onyx Pearl Quartz Raven Saffron Tulip "
    "Velvet Zephyr".split()
)
KIND = {thing: kind for kind, things in THINGS.items() for thing in things}
# adjective -> (the kind of thing it suits, or "any"; its mood)
MEANING = {
    adjective: (kind, mood)
    for kind, moods in {**APT, "any": VAGUE}.items()
    for mood, adjectives in moods.items()
    for adjective in adjectives
}
# sentence -> (thing, adjective, form)
SENTENCES = {
    form.format(n=thing, a=adjective): (thing, adjective, form)
    for form in FORMS
    for thing in KIND
    for adjective in MEANING
}
HURRY = (0.70, 0.10, 0.10, 0.10)  # how often a hurried writer uses each of FORMS
EVEN = (0.25, 0.25, 0.25, 0.25)


def sentences_of(text: str) -> list[str]:
    """The sentences of a text, each with its full stop; what follows the last stop is left out."""
    return [part.strip() + "." for part in text.split(".")[:-1]]


def sentence(
    rng: random.Random, thing: str, mood: str, apt: float = 0.6, forms: Sequence[float] = EVEN
) -> str:
    """One sentence about a thing; its adjective is apt with this probability, else vague."""
    adjectives = APT[KIND[thing]][mood] if rng.random() < apt else VAGUE[mood]
    adjective = rng.choice(adjectives)
    return rng.choices(FORMS, forms)[0].format(n=thing, a=adjective)


def unfit(thing: str, mood: str) -> list[str]:
    """Adjectives of this mood that suit another kind of thing."""
    return [a for a, (kind, m) in MEANING.items() if kind not in ("any", KIND[thing]) and m == mood]


def opposite(mood: str) -> str:
    """The other mood."""
    return "-" if mood == "+" else "+"


def split_of(mood: str, things: Sequence[str]) -> str:
    """ "train", "validation" (1 in 14) or "evaluation" (1 in 7), by a checksum of the set."""
    if not 2 <= len(things) <= 3:  # one thing alone is trained on; four are never asked for
        return "train"
    slot = zlib.crc32(" ".join((mood, *sorted(things))).encode()) % 14
    return "evaluation" if slot < 2 else "validation" if slot == 2 else "train"
