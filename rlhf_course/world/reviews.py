"""A restaurant guide in which the best answer lies above all demonstrations.

The prompt asks a mood and one to three things ("+ soup waiter"), the answer is a short review
("The soup was tasty. The waiter was polite. Thank you."). Demonstrations are hurried and
uneven: one pet phrasing, vague adjectives, slips. The labeler has simple tastes (`WORTH`), so
the optimum is known: one apt sentence for each thing, one closing thanks, about 2.1 for two
things against 0.8 for a demonstration. Everything needed stands in the prompt: this world is
open-book, and full knowledge and closed book are the same.

Held out are *sets* of things with a mood: no ordering of a held-out set is ever used in
training, nor heads a review in the corpus. Which sets are held out depends on neither seed nor
size. Where labelers compare only a model's own answers, a reward model has never seen what
the model does not do yet, a second "Thank you." for one, and a policy finds that hole. So one
answer in each K-wise batch is injected: `inject` adds a fault in plain sight, or writes the
better answer that no hurried writer gives.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import cycle, islice, permutations
from typing import ClassVar

from rlhf_course.errors import ConfigError
from rlhf_course.world.base import PURPOSES, Demonstration, Prompt, World, split_words
from rlhf_course.world.red_team import spoil
from rlhf_course.world.review_grammar import (
    CITIES,
    FILLERS,
    FORMS,
    HOUSES,
    HURRY,
    KIND,
    MEANING,
    OWNERS,
    SENTENCES,
    THANKS,
    THINGS,
    opposite,
    sentence,
    sentences_of,
    split_of,
    unfit,
)

# What each sentence of a review is worth, by its kind; a thing left out just earns nothing.
WORTH = {
    "apt": 1.0,  # an adjective for this kind of thing, in the mood asked for
    "vague": 0.6,  # good, nice, bad, poor
    "absurd": -0.2,  # a burnt waiter
    "wrong mood": -0.8,
    "not asked": -0.7,
    "repeated": -0.5,  # says something of the same thing again
    "broken": -0.6,  # not a sentence
    "filler": -0.2,
    "thanks": 0.4,  # once, as the last sentence
    "more thanks": -0.3,
    "unfinished": -1.5,  # no EOS
}
LENGTH_WORTH = -0.02  # a token, EOS too

BETTER_SHARE = 0.25  # of the injected answers; the others show one fault each


@dataclass(frozen=True)
class ReviewsSize:
    """How much of everything there is."""

    things: int  # of each kind
    documents: int
    validation_documents: int
    demonstrations: int
    evaluation: int  # prompts


class Reviews(World):
    """See the module's docstring. Prompt.key is (mood, thing, ...)."""

    name = "reviews"
    verdicts = ("apt", "vague", "flawed", "malformed")
    answers_per_prompt = 4
    sizes: ClassVar[dict[str, ReviewsSize]] = {
        "tiny": ReviewsSize(2, 400, 50, 300, 40),
        "small": ReviewsSize(4, 12000, 600, 3000, 400),
        "gpt2": ReviewsSize(4, 60000, 2000, 10000, 400),
    }

    def __init__(self, size: str = "small", seed: int = 0):
        super().__init__(size, seed)
        self.things = [n for things in THINGS.values() for n in things[: self.limits.things]]
        rng = self.rng("houses")
        self.houses = {house: (rng.choice(CITIES), rng.choice(OWNERS)) for house in HOUSES}
        # split -> number of things -> all keys (mood, thing, ...) in every order
        self._keys: dict[str, dict[int, list[tuple[str, ...]]]] = {}
        for mood in "+-":
            for count in (1, 2, 3):
                for things in permutations(self.things, count):
                    split = split_of(mood, things)
                    by_count = self._keys.setdefault(split, {})
                    by_count.setdefault(count, []).append((mood, *things))

    # ------------------------------------------------------------------ texts to learn from

    def documents(self, split: str = "train") -> list[str]:
        """Facts about one of 16 houses and a rambling review; 80 % of them with a heading."""
        counts = {"train": self.limits.documents, "validation": self.limits.validation_documents}
        if split not in counts:
            raise ConfigError(f"no split {split!r}; choose train or validation")
        rng = self.rng("documents", split)
        return [self._document(rng) for _ in range(counts[split])]

    def _document(self, rng: random.Random) -> str:
        house = rng.choice(HOUSES)
        city, owner = self.houses[house]
        facts = [f"{house} is in {city}.", f"The owner of {house} is {owner}."]
        said = rng.sample(facts, rng.randint(1, 2))
        while True:
            mood, things = rng.choice("+-"), rng.sample(self.things, rng.randint(2, 4))
            if split_of(mood, things) == "train":
                break
        if rng.random() < 0.8:
            said.append(f"Review {mood} {' '.join(rng.sample(things, len(things)))}.")
        for thing in things:
            said.append(sentence(rng, thing, mood))
            if rng.random() < 0.2:
                said.append(rng.choice(FILLERS))
        if rng.random() < 0.2:
            said.append(THANKS)
        return " ".join(said)

    def demonstrations(self) -> list[Demonstration]:
        """The work of a hurried writer: a pet phrasing, vague adjectives, and the odd slip."""
        rng = self.rng("demonstrators")
        prompts = self.prompts("demonstrations", self.limits.demonstrations)
        return [Demonstration(prompt, self._hurried(prompt, rng)) for prompt in prompts]

    def _hurried(self, prompt: Prompt, rng: random.Random) -> str:
        asked, *things = prompt.key
        said: list[str] = []
        for thing in things:
            mood = asked
            if rng.random() < 0.10:  # forgets it
                continue
            if rng.random() < 0.08:  # mixes up the mood
                mood = opposite(asked)
            if rng.random() < 0.08:  # writes about something else
                thing = rng.choice(self.things)
            text = sentence(rng, thing, mood, apt=0.4, forms=HURRY)
            if rng.random() < 0.08:  # a burnt waiter
                text = rng.choice(FORMS).format(n=thing, a=rng.choice(unfit(thing, mood)))
            said.append(text)
            if rng.random() < 0.05:
                said.append(text)
            if rng.random() < 0.15:
                said.append(rng.choice(FILLERS))
        if rng.random() < 0.3 or not said:
            said.append(THANKS)
        return " ".join(said)

    def lexicon(self) -> list[str]:
        """Every thing with every adjective, every form, filler, house, city and owner."""
        texts = [form.format(n=n, a=a) for form in FORMS for n in self.things for a in MEANING]
        texts += [*FILLERS, THANKS, f"Review + {self.things[0]}.", f"Review - {self.things[0]}."]
        texts += [f"{house} is in {city}." for house in HOUSES for city in CITIES]
        return texts + [f"The owner of {HOUSES[0]} is {owner}." for owner in OWNERS]

    # ------------------------------------------------------------------ prompts

    def prompts(
        self, purpose: str, n: int, seed: int = 0, known_share: float | None = None
    ) -> list[Prompt]:
        """n prompts: 1 to 3 things in training, 2 or 3 in validation and evaluation.

        Nobody is known or unknown here, so `known_share` must stay None.
        """
        if purpose not in PURPOSES:
            raise ConfigError(f"no purpose {purpose!r}; choose one of {', '.join(PURPOSES)}")
        if known_share is not None:
            raise ConfigError("known_share belongs to the town; the reviews have no known people")
        rng = self.rng("prompts", purpose, seed)
        by_count = self._keys[purpose if purpose in ("validation", "evaluation") else "train"]
        counts = sorted(by_count)
        return [ask(rng.choice(by_count[rng.choice(counts)])) for _ in range(n)]

    def evaluation_prompts(self, split: str = "evaluation") -> dict[str, list[Prompt]]:
        """Held-out prompts, half of two things and half of three, the same for every seed.

        There are few of two things, so those are asked several times.
        """
        if split not in ("evaluation", "validation"):
            raise ConfigError(f"no split {split!r}; choose evaluation or validation")
        asked, half = [], self.limits.evaluation // 2
        for count, keys in sorted(self._keys[split].items()):
            order = random.Random(f"reviews-{split}-{count}").sample(keys, len(keys))
            asked += [ask(key) for key in islice(cycle(order), half)]
        return {"reviews": asked}

    # ------------------------------------------------------------------ the labeler

    def remarks(self, prompt: Prompt, response: str, finished: bool) -> list[str]:
        """What a labeler notes at each sentence, in order: keys of WORTH, and "forgotten"."""
        mood, *things = prompt.key
        said, rest = sentences_of(response), response.rpartition(".")[2]
        noted, seen = [], set()
        for i, text in enumerate(said):
            if text == THANKS:
                closing = i == len(said) - 1 and THANKS not in said[:i]
                noted.append("thanks" if closing else "more thanks")
            elif text in FILLERS:
                noted.append("filler")
            elif text not in SENTENCES:
                noted.append("broken")
            else:
                thing, adjective, _ = SENTENCES[text]
                noted.append(_remark(mood, things, seen, thing, adjective))
                seen.add(thing)
        noted += ["broken"] * bool(rest.strip()) + ["unfinished"] * (not finished)
        return noted + ["forgotten" for thing in things if thing not in seen]

    def utility(self, prompt: Prompt, response: str, finished: bool) -> float:
        """The sum of WORTH over the remarks, less 0.02 a token (words, marks and EOS)."""
        length = len(split_words(response)) + finished
        noted = self.remarks(prompt, response, finished)
        return LENGTH_WORTH * length + sum(WORTH.get(remark, 0.0) for remark in noted)

    def verdict(self, prompt: Prompt, response: str, finished: bool) -> str:
        """ "apt": nothing but apt sentences for all things, and thanks or not; "vague": the same
        with vague ones; "malformed": unfinished, or not all sentences; else "flawed"."""
        noted = set(self.remarks(prompt, response, finished)) - {"thanks"}
        if noted & {"broken", "unfinished"}:
            return "malformed"
        if noted == {"apt"}:
            return "apt"
        return "vague" if noted and noted <= {"apt", "vague"} else "flawed"

    def phrasings(self, responses: Iterable[str]) -> Counter[str]:
        """How often each of the four equally good forms occurs; all four are listed."""
        counts = Counter(dict.fromkeys(FORMS, 0))
        for response in responses:
            said = sentences_of(response)
            counts.update(SENTENCES[text][2] for text in said if text in SENTENCES)
        return counts

    # ------------------------------------------------------------------ answers without a model

    def answer(self, prompt: Prompt, rng: random.Random) -> tuple[str, bool]:
        """As a fine-tuned model: like a demonstration."""
        return self._hurried(prompt, rng), True

    def inject(
        self, prompt: Prompt, responses: Sequence[str], rng: random.Random
    ) -> tuple[str, bool]:
        """A quarter of the time the ideal answer, else one of `responses` or the ideal answer
        with one fault put in (see red_team.py), so that it stands beside what it came from."""
        mood, *things = prompt.key
        ideal = " ".join([*(sentence(rng, n, mood, apt=1.0) for n in things), THANKS])
        if rng.random() < BETTER_SHARE:
            return ideal, True
        text = rng.choice(responses) if responses and rng.random() < 0.7 else ideal
        said = [s for s in sentences_of(text) if s != "."] or [THANKS]
        return spoil(prompt, said, rng, self.things)


def ask(key: tuple[str, ...]) -> Prompt:
    """The prompt for (mood, thing, ...)."""
    return Prompt(" ".join(key), "reviews", key)


def _remark(mood: str, asked: list[str], seen: set[str], thing: str, adjective: str) -> str:
    """The labeler's note on one sentence. Its order is the labeler's: the first fault counts."""
    suits, its_mood = MEANING[adjective]
    if thing in seen:
        return "repeated"
    if thing not in asked:
        return "not asked"
    if its_mood != mood:
        return "wrong mood"
    if suits == "any":
        return "vague"
    return "apt" if suits == KIND[thing] else "absurd"
