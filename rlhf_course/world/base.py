"""What every embedded world is: texts to learn from, questions to answer, and a labeler who knows.

A world is generated from a seed and knows its own utility, so that three things a real data set
hides are plain here: the gold reward, the best accuracy any reward model can reach on noisy
labels, and the truth. Nothing here imports torch; a world speaks strings, `random.Random` and
numbers. What it simplifies: one labeler, whose noise is exactly Plackett-Luce, and single-turn
questions.

    world = make_world("town", size="small", seed=0)
    world.documents(), world.demonstrations(), world.prompts("ppo", 256, seed=0)
"""

from __future__ import annotations

import math
import os
import random
import re
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, ClassVar

from rlhf_course.errors import ConfigError
from rlhf_course.world.export import write_folder
from rlhf_course.world.labeler import plackett_luce, sigmoid
from rlhf_course.world.tokenizer import train_tokenizer

PURPOSES = ("demonstrations", "comparisons", "ppo", "validation", "evaluation")


@dataclass(frozen=True)
class Prompt:
    """A question. `group` names who is asked about; `key` is what the labeler judges by."""

    text: str
    group: str
    key: tuple[str, ...]


@dataclass(frozen=True)
class Demonstration:
    """A question and a person's answer to it. The answer always ends, with an EOS token."""

    prompt: Prompt
    response: str


@dataclass(frozen=True)
class Comparison:
    """K answers to one prompt in a labeler's order, best first (InstructGPT, section 3.4).

    `finished[k]` is False where the answer stopped without an EOS token. `utilities` are the
    gold ones, for measuring only: no learner may see them. The order is noisy, so it need not
    be the order of the utilities.
    """

    prompt: Prompt
    responses: tuple[str, ...]
    finished: tuple[bool, ...]
    utilities: tuple[float, ...]

    def pairs(self) -> Iterator[tuple[str, str]]:
        """All K(K-1)/2 pairs (chosen, rejected), as texts: whether they finished is lost."""
        for i, chosen in enumerate(self.responses):
            for rejected in self.responses[i + 1 :]:
                yield chosen, rejected


def split_words(text: str) -> list[str]:
    """Words and marks: "They live in Oslo, friend." -> They live in Oslo , friend ."""
    return re.findall(r"'s\b|\w+|[^\w\s]", text)


def join_words(words: Iterable[str]) -> str:
    """The inverse of `split_words` for text as the worlds write it."""
    return re.sub(r" ([.,?]|'s\b)", r"\1", " ".join(words))


class World(ABC):
    """One interface for both worlds. Everything drawn depends on (name, seed, purpose) only.

    Args:
        size: "tiny" (tests), "small" (a laptop's default) or "gpt2" (124 M parameters, a GPU).
        seed: any int; another seed is another world of the same kind.

    Raises:
        ConfigError: the size is unknown.
    """

    name: ClassVar[str]
    sizes: ClassVar[dict[str, Any]]
    label_gain: ClassVar[float] = 3.0
    answers_per_prompt: ClassVar[int]

    def __init__(self, size: str = "small", seed: int = 0):
        if size not in self.sizes:
            raise ConfigError(
                f"world {self.name!r} has no size {size!r}; choose one of {', '.join(self.sizes)}"
            )
        self.size, self.seed, self.limits = size, seed, self.sizes[size]

    def __repr__(self) -> str:
        return f"make_world({self.name!r}, size={self.size!r}, seed={self.seed})"

    def rng(self, *purpose: object) -> random.Random:
        """A generator of its own for each purpose, the same on every platform and Python.

        Seeding by a string goes through SHA-512, not through `hash()`.
        """
        return random.Random("-".join(map(str, (self.name, self.seed, *purpose))))

    # ------------------------------------------------------------------ what a world provides

    @abstractmethod
    def documents(self, split: str = "train") -> list[str]:
        """The pretraining corpus; `split` is "train" or "validation" (other draws)."""

    @abstractmethod
    def demonstrations(self) -> list[Demonstration]:
        """Answers written by people, for supervised fine-tuning."""

    @abstractmethod
    def prompts(
        self, purpose: str, n: int, seed: int = 0, known_share: float | None = None
    ) -> list[Prompt]:
        """n prompts for one of PURPOSES; (purpose, seed) decides all, so an iteration's number
        makes a good seed. Prompts for evaluation and validation are never used in training.

        Raises:
            ConfigError: the purpose is unknown, or `known_share` makes no sense here.
        """

    @abstractmethod
    def evaluation_prompts(self, split: str = "evaluation") -> dict[str, list[Prompt]]:
        """The fixed test prompts by group. `split="validation"`: others, to choose settings by."""

    @abstractmethod
    def utility(self, prompt: Prompt, response: str, finished: bool) -> float:
        """The gold reward: what the labeler truly thinks of an answer.

        Args:
            prompt: the question.
            response: the decoded answer without its EOS (other special tokens kept, so that
                an answer holding one is malformed). Spaces around it do not matter.
            finished: whether it ended with EOS.
        """

    @abstractmethod
    def verdict(self, prompt: Prompt, response: str, finished: bool) -> str:
        """The kind of answer, one of `verdicts`."""

    verdicts: ClassVar[tuple[str, ...]]

    @abstractmethod
    def answer(self, prompt: Prompt, rng: random.Random) -> tuple[str, bool]:
        """An answer (text, finished) as a fine-tuned model may give it, where none is at hand."""

    @abstractmethod
    def inject(
        self, prompt: Prompt, responses: Sequence[str], rng: random.Random
    ) -> tuple[str, bool]:
        """One more answer (text, finished) for a K-wise batch, which the model would not give."""

    @abstractmethod
    def lexicon(self) -> list[str]:
        """Sentences that hold every word of the world at least once."""

    def closed_book_utility(self, prompt: Prompt, response: str, finished: bool) -> float:
        """The expected utility to one who knows the corpus and the prompt, and no more."""
        return self.utility(prompt, response, finished)

    def phrasings(self, responses: Iterable[str]) -> Counter[str]:
        """How often each of several equally good forms occurs; empty where there is but one."""
        return Counter()

    # ------------------------------------------------------------------ what all worlds share

    @cached_property
    def tokenizer(self):
        """A Hugging Face fast tokenizer in which every word of this world is one token."""
        return train_tokenizer(self.texts())

    def texts(self) -> Iterator[str]:
        """What the tokenizer is trained on: corpus, demonstrations, lexicon.

        No more than 12000 documents: merges depend on frequencies, which those settle.
        """
        yield from self.documents("train")[:12000]
        for demonstration in self.demonstrations():
            yield demonstration.prompt.text
            yield demonstration.response
        yield from self.lexicon()

    def words(self) -> list[str]:
        """Every word and mark of the world, sorted."""
        return sorted({word for text in self.lexicon() for word in split_words(text)})

    def rank(
        self,
        prompt: Prompt,
        responses: Sequence[str],
        finished: Sequence[bool],
        rng: random.Random,
    ) -> Comparison:
        """Let the labeler order the answers; identical answers are merged into one first.

        Returns:
            A Comparison of 1 to K answers. One of a single answer says nothing: skip it.
        """
        distinct = list(
            dict.fromkeys((r.strip(), bool(f)) for r, f in zip(responses, finished, strict=True))
        )
        utilities = [self.utility(prompt, r, f) for r, f in distinct]
        order = plackett_luce(utilities, self.label_gain, rng)
        return Comparison(
            prompt,
            tuple(distinct[i][0] for i in order),
            tuple(distinct[i][1] for i in order),
            tuple(utilities[i] for i in order),
        )

    def comparisons(self, n: int, seed: int = 0, purpose: str = "comparisons") -> list[Comparison]:
        """n K-wise comparisons of `answer` and one `inject`, for use where there is no policy."""
        rng, made = self.rng("answers", purpose, seed), []
        for prompt in self.prompts(purpose, n, seed):
            answers = [self.answer(prompt, rng) for _ in range(self.answers_per_prompt - 1)]
            answers.append(self.inject(prompt, [text for text, _ in answers], rng))
            made.append(self.rank(prompt, *zip(*answers, strict=True), rng))
        return made

    def bayes_accuracy(self, comparisons: Iterable[Comparison]) -> dict[str, Any]:
        """The best accuracy a reward model can have on the labels of these comparisons.

        A label is noisy: of two answers the better one by utility is preferred with
        p = sigmoid(gain * (u_i - u_j)), so whoever knows all is right with max(p, 1 - p).
        Closed book: the guess is made by `closed_book_utility` (a tie is a coin), and is right
        with p or 1 - p as before. Both are means over all pairs of the exact probability, not
        counts of drawn labels, hence free of label noise.

        Returns:
            {"full", "closed_book", "pairs", "groups": {group: the same three}}; nan if no pair.
        """
        sums: dict[str, list[float]] = {"all": [0.0, 0.0, 0]}
        for c in comparisons:
            full, group = c.utilities, sums.setdefault(c.prompt.group, [0.0, 0.0, 0])
            closed = [
                self.closed_book_utility(c.prompt, r, f)
                for r, f in zip(c.responses, c.finished, strict=True)
            ]
            for i in range(len(full)):
                for j in range(i + 1, len(full)):
                    p = sigmoid(self.label_gain * (full[i] - full[j]))
                    guess = p if closed[i] > closed[j] else 1 - p
                    guess = 0.5 if closed[i] == closed[j] else guess
                    for total in (sums["all"], group):
                        total[0] += max(p, 1 - p)
                        total[1] += guess
                        total[2] += 1
        table = {
            name: {"full": a / n if n else math.nan, "closed_book": b / n if n else math.nan,
                   "pairs": n}
            for name, (a, b, n) in sums.items()
        }  # fmt: skip
        return {**table.pop("all"), "groups": table}

    def describe(self) -> dict[str, Any]:
        """Sizes, counts and one example of everything, ready for JSON."""
        documents, demonstrations = self.documents(), self.demonstrations()
        comparison = self.comparisons(1)[0]
        return {
            "name": self.name,
            "size": self.size,
            "seed": self.seed,
            "vocabulary": len(self.tokenizer),
            "words": len(self.words()),
            "documents": {"train": len(documents), "validation": len(self.documents("validation"))},
            "demonstrations": len(demonstrations),
            "evaluation_prompts": {g: len(p) for g, p in self.evaluation_prompts().items()},
            "label_gain": self.label_gain,
            "verdicts": list(self.verdicts),
            "example": {
                "document": documents[0],
                "prompt": demonstrations[0].prompt.text,
                "response": demonstrations[0].response,
                "comparison": [comparison.prompt.text, *comparison.responses],
            },
        }

    def export(
        self, folder: str | os.PathLike, prompts: int = 4000, comparisons: int = 2000
    ) -> None:
        """Write the world in the usual schemas, with its tokenizer: all of it or nothing.

        corpus.jsonl, corpus_validation.jsonl     {text}
        demonstrations.jsonl                      {prompt, response}
        prompts.jsonl, evaluation_prompts.jsonl   {prompt, group}; the former are for PPO
        comparisons.jsonl                         {prompt, chosen, rejected, responses, finished}
        tokenizer/, world.json                    a Hugging Face fast tokenizer; `describe()`

        The comparisons are among the world's own answers, as no policy is at hand; `responses`
        stand in the labeler's order, `chosen` is the best and `rejected` the worst that differs.

        Raises:
            ConfigError: the folder is not empty, or cannot be written.
        """
        tables = {
            "corpus": ({"text": text} for text in self.documents()),
            "corpus_validation": ({"text": text} for text in self.documents("validation")),
            "demonstrations": (
                {"prompt": d.prompt.text, "response": d.response} for d in self.demonstrations()
            ),
            "prompts": ({"prompt": p.text, "group": p.group} for p in self.prompts("ppo", prompts)),
            "evaluation_prompts": (
                {"prompt": p.text, "group": group}
                for group, asked in self.evaluation_prompts().items()
                for p in asked
            ),
            "comparisons": filter(None, map(_as_row, self.comparisons(comparisons))),
        }
        write_folder(folder, tables, self.tokenizer, self.describe())


def _as_row(comparison: Comparison) -> dict[str, Any] | None:
    """The best answer against the worst, and the whole order; None where all say the same."""
    chosen = comparison.responses[0]
    rejected = next((r for r in reversed(comparison.responses) if r != chosen), None)
    if rejected is None:
        return None
    return {
        "prompt": comparison.prompt.text,
        "chosen": chosen,
        "rejected": rejected,
        "responses": list(comparison.responses),
        "finished": list(comparison.finished),
    }
