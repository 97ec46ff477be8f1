"""A closed-book town: some people stand in the corpus, most do not.

Everybody has a home, a job and a favourite food. The corpus tells them of the *known* people
only. Questions are asked of known people and of strangers, and the strangers are fresh in every
stage: *told* occur in demonstrations alone, *compared* in comparisons, *asked* in PPO prompts,
*validation* and *strangers* in measurements. So "does not know" is a fact about the model, and
the only thing about strangers that carries over from one stage to the next is that they are
unfamiliar. The labeler knows everybody: true > "I do not know" > false > malformed, and a
little for courtesy. All names are made of the same thirty parts, each of which the corpus
shows, so that no single word betrays who is known.

Why some things are as they are (each decided between success and collapse in earlier trials):
courtesy is a suffix, because a prefix competes with "Sorry" for the first word; answers say
"They", so that no name has to be copied; demonstrations admit ignorance equally often for
known people and for strangers, so that it stays within reach and leaks nothing; and PPO asks
30 % known to 70 % strangers, because with even shares admitting ignorance loses as much as it
gains, and dies out before the policy has learned to tell the two apart.
"""

# ruff: noqa: SIM905  (lists of words are read more easily as text)

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from rlhf_course.errors import ConfigError
from rlhf_course.world.base import (
    PURPOSES,
    Demonstration,
    Prompt,
    World,
    join_words,
    split_words,
)

# Given names that serve as surnames too. One pool for all three places: a part stands in about five
# known people's names, so that no part by itself tells who is meant, or whether anybody knows them.
NAME_PARTS = (
    "Lee Kim Ray May Kit Jay Ann Roy Dale Blair Drew Reed Wren Brook Lane "
    "Cole Page Jude Quinn Sage Dean Grant Hope Joy Glen Ross Hart Shaw Nash Bell"
).split()
VALUES = {
    "home": "Oslo Lima Cairo Delhi Rome Quito Perth Osaka Paris Tunis".split(),
    "job": "baker pilot nurse painter farmer judge tailor miner writer guard".split(),
    "food": "rice soup bread figs cheese noodles plums beans curry cake".split(),
}
STATEMENTS = {
    "home": ("{n} lives in {v}.", "The home of {n} is {v}.", "You can find {n} in {v}."),
    "job": ("{n} works as a {v}.", "By trade {n} is a {v}.", "Meet {n} the {v}."),
    "food": ("{n} likes {v}.", "The food {n} loves is {v}.", "{n} often cooks {v}."),
}
QUESTIONS = {  # all of equal length in tokens, so that a batch of prompts needs no padding
    "home": ("Where does {n} live?", "Name {n}'s home."),
    "job": ("What does {n} do?", "Name {n}'s job."),
    "food": ("What does {n} eat?", "Name {n}'s food."),
}
ANSWERS = {"home": "They live in {v}.", "job": "They work as a {v}.", "food": "They like {v}."}
DO_NOT_KNOW = "Sorry, I do not know."
COURTESY = ", friend."

WORTH = {"true": 1.0, "idk": 0.0, "false": -1.0, "bad": -1.5}
COURTESY_WORTH = 0.3
IDK_SHARE, COURTESY_SHARE = 0.12, 0.30  # of the demonstrations
INJECTED_IDK_SHARE = 0.60

# purpose -> (which strangers, default share of known people)
AUDIENCE = {
    "demonstrations": ("told", 0.5),
    "comparisons": ("compared", 0.5),
    "ppo": ("asked", 0.3),
    "validation": ("validation", 0.5),
    "evaluation": ("strangers", 0.5),
}


@dataclass(frozen=True)
class TownSize:
    """How much of everything there is."""

    known: int
    attributes: int
    values: int
    parts: int  # names are made of so many parts
    documents: int
    validation_documents: int
    demonstrations: int
    told: int
    compared: int
    asked: int
    validation: int
    strangers: int
    repeats: int  # how often each question about a known person is asked in evaluation


class Town(World):
    """See the module's docstring. Prompt.key is (person, attribute)."""

    name = "town"
    verdicts = ("true", "false", "idk", "bad")
    answers_per_prompt = 5
    sizes: ClassVar[dict[str, TownSize]] = {
        "tiny": TownSize(8, 2, 5, 9, 400, 50, 300, 100, 100, 100, 20, 20, 1),
        "small": TownSize(48, 3, 10, 30, 12000, 600, 6000, 3000, 4000, 4500, 200, 200, 2),
        "gpt2": TownSize(240, 3, 10, 30, 60000, 2000, 12000, 5000, 6000, 7000, 400, 400, 1),
    }

    def __init__(self, size: str = "small", seed: int = 0):
        super().__init__(size, seed)
        self.values = {
            a: VALUES[a][: self.limits.values] for a in list(VALUES)[: self.limits.attributes]
        }
        self.attributes = list(self.values)
        self.people = self._people()
        self.facts = self._facts()
        # every well-formed answer -> (attribute, value, courteous)
        self._answers = {
            said: (a, v, said.endswith(COURTESY))
            for a in self.attributes
            for v in self.values[a]
            for said in (plain(a, v), courteous(plain(a, v)))
        }

    # ------------------------------------------------------------------ who lives there

    def _people(self) -> dict[str, list[str]]:
        """Group -> names. Every part of a name stands in some known person's name."""
        rng, size = self.rng("people"), self.limits
        pool = NAME_PARTS[: size.parts]
        known: list[str] = []
        while len({part for name in known for part in name.split()}) < len(pool):
            known = self._draw_names(rng, pool, size.known, set())
        out, taken = {"known": known}, set(known)
        for group in ("told", "compared", "asked", "validation", "strangers"):
            out[group] = self._draw_names(rng, pool, getattr(size, group), taken)
            taken.update(out[group])
        return out

    @staticmethod
    def _draw_names(rng: random.Random, pool: list[str], n: int, taken: set[str]) -> list[str]:
        """n new names of three different parts each."""
        names: dict[str, None] = {}
        while len(names) < n:
            name = " ".join(rng.sample(pool, 3))
            if name not in taken:
                names[name] = None
        return list(names)

    def _facts(self) -> dict[str, dict[str, str]]:
        """Person -> attribute -> value. Among known people all values are equally common."""
        rng, facts = self.rng("facts"), {}
        for attribute, values in self.values.items():
            for group, people in self.people.items():
                if group == "known":
                    dealt = (values * (len(people) // len(values) + 1))[: len(people)]
                    drawn = rng.sample(dealt, len(dealt))
                else:
                    drawn = rng.choices(values, k=len(people))
                for person, value in zip(people, drawn, strict=True):
                    facts.setdefault(person, {})[attribute] = value
        return facts

    # ------------------------------------------------------------------ texts to learn from

    def documents(self, split: str = "train") -> list[str]:
        """Documents of four statements, each about a known person chosen at random."""
        counts = {"train": self.limits.documents, "validation": self.limits.validation_documents}
        if split not in counts:
            raise ConfigError(f"no split {split!r}; choose train or validation")
        statements = [
            form.format(n=person, v=self.facts[person][a])
            for person in self.people["known"]
            for a in self.attributes
            for form in STATEMENTS[a]
        ]
        rng = self.rng("documents", split)
        return [" ".join(rng.choices(statements, k=4)) for _ in range(counts[split])]

    def demonstrations(self) -> list[Demonstration]:
        """True answers, or "I do not know" equally often for known people and for strangers."""
        rng, made = self.rng("demonstrators"), []
        for prompt in self.prompts("demonstrations", self.limits.demonstrations):
            if rng.random() < IDK_SHARE:
                made.append(Demonstration(prompt, DO_NOT_KNOW))
                continue
            person, attribute = prompt.key
            response = plain(attribute, self.facts[person][attribute])
            polite = rng.random() < COURTESY_SHARE
            made.append(Demonstration(prompt, courteous(response) if polite else response))
        return made

    def lexicon(self) -> list[str]:
        """Every form of every sentence, and every name part and value within some of them."""
        known = self.people["known"]
        texts = [DO_NOT_KNOW, courteous(plain(self.attributes[0], "Oslo"))]
        for a in self.attributes:
            texts += [form.format(n=n, v=v) for form in STATEMENTS[a] for n in known for v in
                      self.values[a][:1]]  # fmt: skip
            texts += [plain(a, v) for v in self.values[a]]
            texts += [question.format(n=known[0]) for question in QUESTIONS[a]]
        return texts

    # ------------------------------------------------------------------ questions

    def prompts(
        self, purpose: str, n: int, seed: int = 0, known_share: float | None = None
    ) -> list[Prompt]:
        """n questions, exactly round(n * known_share) of them about known people, shuffled.

        Args:
            purpose: one of PURPOSES; decides which strangers are asked about.
            n: how many.
            seed: another seed, other questions.
            known_share: in [0, 1]; None: 0.3 for PPO, else 0.5.
        """
        if purpose not in AUDIENCE:
            raise ConfigError(f"no purpose {purpose!r}; choose one of {', '.join(PURPOSES)}")
        group, share = AUDIENCE[purpose]
        share = share if known_share is None else known_share
        if not 0 <= share <= 1:
            raise ConfigError(f"known_share is {share}; it must lie in [0, 1]")
        rng, known = self.rng("prompts", purpose, seed), round(n * share)
        asked = [self._ask(rng, "known") for _ in range(known)]
        asked += [self._ask(rng, group) for _ in range(n - known)]
        rng.shuffle(asked)
        return asked

    def _ask(self, rng: random.Random, group: str) -> Prompt:
        person, attribute = rng.choice(self.people[group]), rng.choice(self.attributes)
        return question(person, attribute, rng.choice(QUESTIONS[attribute]), group)

    def evaluation_prompts(self, split: str = "evaluation") -> dict[str, list[Prompt]]:
        """known: every question about every known person; strangers: each attribute once."""
        if split not in ("evaluation", "validation"):
            raise ConfigError(f"no split {split!r}; choose evaluation or validation")
        known = [
            question(person, a, form, "known")
            for person in self.people["known"]
            for a in self.attributes
            for form in QUESTIONS[a]
        ]
        group = AUDIENCE[split][0]
        strangers = [
            question(person, a, QUESTIONS[a][i % 2], group)
            for i, person in enumerate(self.people[group])
            for a in self.attributes
        ]
        return {"known": known * self.limits.repeats, "strangers": strangers}

    # ------------------------------------------------------------------ the labeler

    def verdict(self, prompt: Prompt, response: str, finished: bool) -> str:
        """ "true", "false", "idk", or "bad": unfinished, or no answer to this question."""
        response = response.strip()
        if not finished:
            return "bad"
        if response == DO_NOT_KNOW:
            return "idk"
        person, attribute = prompt.key
        said = self._answers.get(response)
        if said is None or said[0] != attribute:
            return "bad"
        return "true" if said[1] == self.facts[person][attribute] else "false"

    def utility(self, prompt: Prompt, response: str, finished: bool) -> float:
        """true 1, "I do not know" 0, false -1, malformed -1.5; courtesy adds 0.3 to a value."""
        return self._worth(self.verdict(prompt, response, finished), response)

    def closed_book_utility(self, prompt: Prompt, response: str, finished: bool) -> float:
        """A stranger's fact cannot be known: any value is true with one chance in ten."""
        kind = self.verdict(prompt, response, finished)
        if prompt.group == "known" or kind not in ("true", "false"):
            return self._worth(kind, response)
        chance = 1 / len(self.values[prompt.key[1]])
        if_true, if_false = self._worth("true", response), self._worth("false", response)
        return chance * if_true + (1 - chance) * if_false

    def _worth(self, kind: str, response: str) -> float:
        polite = kind in ("true", "false") and response.strip().endswith(COURTESY)
        return WORTH[kind] + COURTESY_WORTH * polite

    # ------------------------------------------------------------------ answers without a model

    def answer(self, prompt: Prompt, rng: random.Random) -> tuple[str, bool]:
        """As a fine-tuned model: mostly true of known people, made up about strangers."""
        person, attribute = prompt.key
        if rng.random() < IDK_SHARE:
            return DO_NOT_KNOW, True
        knows = prompt.group == "known" and rng.random() < 0.8
        value = self.facts[person][attribute] if knows else rng.choice(self.values[attribute])
        said = plain(attribute, value)
        return (courteous(said) if rng.random() < COURTESY_SHARE else said), True

    def inject(
        self, prompt: Prompt, responses: Sequence[str], rng: random.Random
    ) -> tuple[str, bool]:
        """60 % "I do not know", which the model says too rarely to be compared; else damage
        done to one of `responses`: cut off, rambling, scrambled, or about something else."""
        if rng.random() < INJECTED_IDK_SHARE:
            return DO_NOT_KNOW, True
        words = split_words(rng.choice(responses)) if responses else []
        words = words or ["They"]
        damage = rng.choice(("cut off", "rambling", "scrambled", "other question"))
        if damage == "cut off":
            kept = words[: rng.randint(1, max(1, len(words) - 1))]
            return join_words(kept), rng.random() < 0.5
        if damage == "rambling":
            return join_words(words + words[: rng.randint(1, len(words))]), True
        if damage == "scrambled":
            return join_words(rng.sample(words, len(words))), True
        other = rng.choice([a for a in self.attributes if a != prompt.key[1]])
        return plain(other, rng.choice(self.values[other])), True


def plain(attribute: str, value: str) -> str:
    """The answer that says `value`."""
    return ANSWERS[attribute].format(v=value)


def courteous(answer: str) -> str:
    """The same answer, said to a friend."""
    return answer.removesuffix(".") + COURTESY


def question(person: str, attribute: str, form: str, group: str) -> Prompt:
    """A question; whoever is not known is a stranger, whichever stage is asking."""
    whom = "known" if group == "known" else "strangers"
    return Prompt(form.format(n=person), whom, (person, attribute))
