"""Faults that a red team puts into reviews, one at a time and in plain sight.

A reward model learns from the answers it is shown, and a policy under optimisation looks for
those it was not shown. A trial without these faults ended in "Thank you. Thank you. Thank you."
Each function takes the prompt, the sentences said, a generator and all things there are,
and returns (text, finished).
"""

from __future__ import annotations

import random
from collections.abc import Sequence

from rlhf_course.world.base import Prompt, join_words, split_words
from rlhf_course.world.review_grammar import (
    FILLERS,
    FORMS,
    SENTENCES,
    THANKS,
    opposite,
    sentence,
    unfit,
)


def spoil(
    prompt: Prompt, said: Sequence[str], rng: random.Random, things: Sequence[str]
) -> tuple[str, bool]:
    """Put one fault, chosen at random from FAULTS, into a review of at least one sentence."""
    return rng.choice(FAULTS)(prompt, list(said), rng, things)


def thanks_again(prompt, said, rng, things):
    """Thanks twice or more, mostly at the end."""
    more = [THANKS] * (rng.randint(1, 3) + (THANKS not in said))
    at = len(said) if rng.random() < 0.7 else rng.randrange(len(said) + 1)
    return " ".join([*said[:at], *more, *said[at:]]), True


def repeats(prompt, said, rng, things):
    """Once or more, word for word or in other words about the same thing."""
    again = rng.choice([s for s in said if s in SENTENCES] or said)
    at = said.index(again) + 1 if rng.random() < 0.5 else len(said)
    if again in SENTENCES and rng.random() < 0.5:
        again = sentence(rng, SENTENCES[again][0], prompt.key[0])
    times = rng.choice((1, 1, 2))
    return " ".join([*said[:at], *[again] * times, *said[at:]]), True


def rambles(prompt, said, rng, things):
    """One to three fillers."""
    fillers, at = rng.choices(FILLERS, k=rng.randint(1, 3)), rng.randrange(len(said) + 1)
    return " ".join([*said[:at], *fillers, *said[at:]]), True


def wrong_mood(prompt, said, rng, things):
    """One of the things in the other mood."""
    mood, *asked = prompt.key
    thing = rng.choice(asked)
    wrong = sentence(rng, thing, opposite(mood))
    about = [i for i, s in enumerate(said) if s in SENTENCES and SENTENCES[s][0] == thing]
    if not about:
        return " ".join([wrong, *said]), True
    i = rng.choice(about)
    return " ".join([*said[:i], wrong, *said[i + 1 :]]), True


def not_asked(prompt, said, rng, things):
    """Something else as well."""
    other = sentence(rng, rng.choice([n for n in things if n not in prompt.key]), prompt.key[0])
    at = rng.randrange(len(said) + 1)
    return " ".join([*said[:at], other, *said[at:]]), True


def absurd(prompt, said, rng, things):
    """A burnt waiter, in place of a sentence about the same thing where there is one."""
    mood, *asked = prompt.key
    i = rng.choice([i for i, s in enumerate(said) if s in SENTENCES] or [len(said) - 1])
    thing = SENTENCES[said[i]][0] if said[i] in SENTENCES else rng.choice(asked)
    burnt = rng.choice(FORMS).format(n=thing, a=rng.choice(unfit(thing, mood)))
    return " ".join([*said[:i], burnt, *said[i + 1 :]]), True


def forgets(prompt, said, rng, things):
    """One sentence less; of a single sentence only thanks are left."""
    i = rng.randrange(len(said))
    return " ".join([*said[:i], *said[i + 1 :]] or [THANKS]), True


def scrambles(prompt, said, rng, things):
    """The words of one sentence in another order, if it has two that differ."""
    i = rng.randrange(len(said))
    words = split_words(said[i])[:-1]
    mixed = rng.sample(words, len(words))
    while mixed == words and len(set(words)) > 1:
        rng.shuffle(mixed)
    return " ".join([*said[:i], join_words(mixed) + ".", *said[i + 1 :]]), True


def stutters(prompt, said, rng, things):
    """A word over and over: where policies without a KL penalty end."""
    i = rng.randrange(len(said))
    words = split_words(said[i])
    at = rng.randrange(len(words) - 1)
    words[at:at] = [words[at]] * rng.randint(1, 3)
    return " ".join([*said[:i], join_words(words), *said[i + 1 :]]), True


def cut_off(prompt, said, rng, things):
    """Stops anywhere, with an EOS or without."""
    words = split_words(" ".join(said))
    return join_words(words[: rng.randint(1, len(words) - 1)]), rng.random() < 0.5


# Twice as likely: the two that a reward model of earlier trials was blind or half blind to.
FAULTS = (
    *(thanks_again, repeats) * 2,
    rambles, wrong_mood, not_asked, absurd, forgets, scrambles, stutters, cut_off,
)  # fmt: skip
