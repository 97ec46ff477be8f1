"""Real data sets: rows from a file, a folder or the hub, in the usual schemas, into one schema.

    read_dialogues("train.jsonl")                               what SFT learns from
    read_comparisons("Anthropic/hh-rlhf")                       what a reward model learns from
    read_prompts("openai/gsm8k:main@test")                      what PPO answers
    read_documents("corpus.parquet")                            what a GPT is pretrained on

A source is a file, a folder, or the name of a data set on the Hugging Face hub: see `sources`; the
schemas are in `schemas`, the sets that are known by name in `recipes`.

A prompt is a text, or a list of messages {"role", "content"} where there is more than one turn
before the answer. Every row is checked when it is read, and what is wrong with it is raised as a
DataError that names file, line and field, or the row is left out and counted: see `Reading`.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from rlhf_course.data_report import DataReport
from rlhf_course.duplicates import Twins
from rlhf_course.errors import ConfigError, DataError
from rlhf_course.reader import AS_IT_IS, Reader, Reading
from rlhf_course.recipes import Recipe
from rlhf_course.schemas import Dialogue, Preference, PromptRow
from rlhf_course.sources import Place

Item = TypeVar("Item")


@dataclass
class Read:
    """The items of a data set, where each stood, and what came of the others."""

    items: list
    places: list[Place]
    report: DataReport
    recipe: Recipe | None = None


# --- the readers -----------------------------------------------------------------------------


def read_dialogues(source: str | Path, reading: Reading = AS_IT_IS) -> list[Dialogue]:
    """Prompts with answers: `messages`, `prompt`/`response` (or `completion`), `question`/`answer`,
    `instruction`/`input`/`output`, or the `chosen` text of comparisons.

    Raises DataError for an unreadable source, an unknown schema, an empty prompt or answer.
    """
    return read(source, "dialogues", reading).items


def read_comparisons(source: str | Path, reading: Reading = AS_IT_IS) -> list[Preference]:
    """Ranked answers: `prompt`/`chosen`/`rejected` (texts or messages); `chosen`/`rejected` that
    both hold the whole dialogue (messages, or the text of hh-rlhf); `prompt`/`responses`, best
    first, or with `ranks` or `scores`.

    Raises DataError as `read_dialogues` does, and when two answers are the same or when the two
    dialogues of a row do not share their prompt.
    """
    return read(source, "comparisons", reading).items


def read_prompts(source: str | Path, reading: Reading = AS_IT_IS) -> list[PromptRow]:
    """Prompts to be answered, each with its whole row. The schemas are those of `read_dialogues`,
    and a `prompt`, `question` or `instruction` may stand alone. Raises DataError likewise."""
    return read(source, "prompts", reading).items


def read_documents(source: str | Path, reading: Reading = AS_IT_IS) -> list[str]:
    """The `text` of every row. Raises DataError when it is missing, not a text, or empty."""
    return list(Documents(source, reading))


def read(source: str | Path, kind: str, reading: Reading = AS_IT_IS) -> Read:
    """All items of one kind ("dialogues", "comparisons", "prompts") with their places and the
    report. Raises DataError."""
    reader = Reader(source, kind, reading)
    twins = Twins(kind)
    items, places = [], []
    for place, item in reader.items():
        items.append(item)
        places.append(place)
        twins.add(place, item)
    left_out = twins.finish(reader.report, places, reading.duplicates)
    if left_out:
        items = [item for i, item in enumerate(items) if i not in left_out]
        places = [place for i, place in enumerate(places) if i not in left_out]
    if not items:
        raise DataError(f"{source}: every comparison contradicts another one. Nothing is left.")
    reader.report.used = len(items)
    return Read(items, places, reader.report, reader.recipe)


class Documents:
    """The texts of a source, read anew each time they are gone through: never all in memory."""

    def __init__(self, source: str | Path, reading: Reading = AS_IT_IS):
        self.source, self.reading = source, reading
        reader, twins = Reader(source, "documents", reading), Twins("documents")
        self._count = 0
        for place, text in reader.items():
            twins.add(place, text)
            self._count += 1
        self._left_out = twins.finish(reader.report, None, reading.duplicates)
        self.report = reader.report
        self.report.used = len(self)

    def __len__(self) -> int:
        return self._count - len(self._left_out)

    def __iter__(self) -> Iterator[str]:
        texts = Reader(self.source, "documents", self.reading).items()
        return (text for i, (_, text) in enumerate(texts) if i not in self._left_out)

    def part(self, numbers: Iterable[int]) -> Iterable[str]:
        """The texts of these numbers, in order; may be gone through again and again."""
        return _Part(self, frozenset(numbers))


@dataclass(frozen=True)
class _Part:
    documents: Documents
    numbers: frozenset[int]

    def __iter__(self) -> Iterator[str]:
        return (text for i, text in enumerate(self.documents) if i in self.numbers)


def split_rows(rows: Sequence[Item], fraction: float, seed: int) -> tuple[list[Item], list[Item]]:
    """(held out, the rest): `fraction` of the rows drawn by the seed, each part in its old order.

    Raises ConfigError unless 0 <= fraction < 1, DataError when a part that was asked for is empty.
    """
    if not 0 <= fraction < 1:
        raise ConfigError(f"held-out fraction {fraction}: give a number from 0 to below 1.")
    count = round(fraction * len(rows))
    if count == len(rows) or (count == 0 and fraction > 0):
        raise DataError(
            f"{len(rows)} rows are too few to hold out {fraction:g} of them: one part would be "
            "empty. Give more rows or another fraction."
        )
    held = set(random.Random(seed).sample(range(len(rows)), count))
    return (
        [row for i, row in enumerate(rows) if i in held],
        [row for i, row in enumerate(rows) if i not in held],
    )
