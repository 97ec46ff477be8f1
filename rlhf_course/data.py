"""Real data sets: rows from a file, a folder or the hub, in the usual schemas, into one schema.

    read_dialogues("train.jsonl")                               what SFT learns from
    read_comparisons("Anthropic/hh-rlhf")                       what a reward model learns from
    read_prompts("openai/gsm8k:main@test")                      what PPO answers
    read_documents("corpus.parquet")                            what a GPT is pretrained on

A source is a file, a folder, or the name of a data set on the Hugging Face hub: see `sources`.

A prompt is a text, or a list of messages {"role", "content"} where there is more than one turn
before the answer. Every row is checked when it is read, and what is wrong with it is raised as a
DataError that names file, line and field; with `skip_bad` such rows are left out, counted and told.
"""

from __future__ import annotations

import random
import re
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, TypeVar

from rlhf_course.errors import ConfigError, DataError
from rlhf_course.sources import Row, located_rows

Messages = list[dict[str, str]]
Prompt = str | Messages
Item = TypeVar("Item")


# Schemas in which a row holds two texts; the names are those in which data sets are published.
TEXT_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
)
ROLES = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")


class Dialogue(NamedTuple):
    """A prompt and the answer to imitate. Of several turns the last is the answer."""

    prompt: Prompt
    response: str

    def texts(self) -> list[str]:
        """Every text in it, to train a tokenizer on."""
        turns = self.prompt if isinstance(self.prompt, list) else [{"content": self.prompt}]
        return [*(turn["content"] for turn in turns), self.response]


class Preference(NamedTuple):
    """A prompt and two or more answers, the best first."""

    prompt: Prompt
    responses: tuple[str, ...]


class PromptRow(NamedTuple):
    """A prompt, and its row as it stood in the data set, for a reward function to look into."""

    prompt: Prompt
    row: Row


class _BadRow(Exception):
    """What is wrong with a row; `_read` adds where it stands."""


# --- the readers -----------------------------------------------------------------------------


def read_dialogues(source: str | Path, skip_bad: bool = False) -> list[Dialogue]:
    """Prompts with answers: `messages`, `prompt`/`response` (or `completion`), `question`/`answer`,
    `instruction`/`input`/`output`, or the `chosen` text of comparisons.

    Raises DataError for an unreadable source, an unknown schema, an empty prompt or answer.
    """
    return _read(source, _dialogue, skip_bad)


def read_comparisons(source: str | Path, skip_bad: bool = False) -> list[Preference]:
    """Ranked answers: `prompt`/`chosen`/`rejected` (texts or messages); `chosen`/`rejected` that
    both hold the whole dialogue (messages, or the text of hh-rlhf); `prompt`/`responses`, best
    first.

    Raises DataError as `read_dialogues` does, and when two answers are the same or when the two
    dialogues of a row do not share their prompt.
    """
    return _read(source, _preference, skip_bad)


def read_prompts(source: str | Path, skip_bad: bool = False) -> list[PromptRow]:
    """Prompts to be answered, each with its whole row. The schemas are those of `read_dialogues`,
    and a `prompt`, `question` or `instruction` may stand alone. Raises DataError likewise."""
    return _read(source, lambda row: PromptRow(_prompt(row), row), skip_bad)


def read_documents(source: str | Path, skip_bad: bool = False) -> list[str]:
    """The `text` of every row. Raises DataError when it is missing, not a text, or empty."""
    return _read(source, _document, skip_bad)


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


def _read(source: str | Path, parse: Callable[[Row], Item], skip_bad: bool) -> list[Item]:
    """Every row parsed; a bad one raises DataError with its place, or is skipped and counted."""
    items, bad = [], []
    for where, row in located_rows(source):
        try:
            items.append(parse(row))
        except _BadRow as error:
            if not skip_bad:
                raise DataError(f"{where}: {error}") from None
            bad.append(f"{where}: {error}")
    if bad and not items:
        raise DataError(f"{source}: all {len(bad)} rows are unusable. The first: {bad[0]}")
    if bad:
        share = f"{len(bad)} of {len(bad) + len(items)} rows"
        warnings.warn(f"{source}: left out {share}. The first: {bad[0]}", stacklevel=3)
    return items


# --- rows to prompts and answers -------------------------------------------------------------


def _document(row: Row) -> str:
    if "text" not in row:
        raise _BadRow(_missing(row, "text"))
    return _text(row["text"], "text")


def _dialogue(row: Row) -> Dialogue:
    if "messages" in row:
        return Dialogue(*_split_answer(_messages(row["messages"], "messages"), "messages"))
    for prompt_field, answer_field in TEXT_PAIRS:
        if prompt_field in row and answer_field in row:
            return Dialogue(_prompt(row), _answer(row[answer_field], answer_field))
    if "chosen" in row:
        return Dialogue(*_side(row, "chosen"))
    pairs = ", ".join(f"{a}/{b}" for a, b in TEXT_PAIRS)
    raise _BadRow(_missing(row, f"messages, {pairs}, or chosen"))


def _preference(row: Row) -> Preference:
    if "responses" in row:
        prompt, answers = _prompt(row), row["responses"]
        if not isinstance(answers, list) or len(answers) < 2:
            raise _BadRow(f'"responses" holds {_kind(answers)}, not two or more answers.')
        answers = tuple(_answer(a, f"responses[{i}]") for i, a in enumerate(answers))
    elif "chosen" in row and "rejected" in row:
        (prompt, best), (other, worst) = _side(row, "chosen"), _side(row, "rejected")
        if prompt != other:
            raise _BadRow(
                '"chosen" and "rejected" answer different prompts: only their last turn may '
                f"differ. They end {_short(prompt)} and {_short(other)}. Mend or remove the row."
            )
        answers = (best, worst)
    else:
        raise _BadRow(_missing(row, "chosen and rejected (with or without prompt), or responses"))
    if len(set(answers)) < len(answers):
        raise _BadRow(
            f"two of the compared answers are the same ({_short(answers[0])} …), so there is "
            "nothing to learn from them. Remove the row."
        )
    return Preference(prompt, answers)


def _prompt(row: Row) -> Prompt:
    for field in ("prompt", "question"):
        if field in row:
            return _conversation(row[field], field)
    if "instruction" in row:  # Alpaca's: the input, where there is one, follows the instruction
        extra = row.get("input") or ""
        instruction = _text(row["instruction"], "instruction")
        return f"{instruction}\n\n{_text(extra, 'input')}" if extra else instruction
    if "messages" in row:
        turns = _messages(row["messages"], "messages")
        return _conversation(turns[:-1] if turns[-1]["role"] == "assistant" else turns, "messages")
    if "chosen" in row:
        return _side(row, "chosen")[0]
    raise _BadRow(_missing(row, "prompt, question, instruction, messages or chosen"))


def _side(row: Row, field: str) -> tuple[Prompt, str]:
    """(prompt, answer) of "chosen" or "rejected", which may hold the whole dialogue."""
    value = row[field]
    if isinstance(value, list) and len(value) > 1:
        return _split_answer(_messages(value, field), field)
    if "prompt" in row:
        return _conversation(row["prompt"], "prompt"), _answer(value, field)
    return _split_answer(_transcript(_text(value, field), field), field)


def _transcript(text: str, field: str) -> Messages:
    r"""The turns of hh-rlhf's "\n\nHuman: … \n\nAssistant: …" (Bai et al. 2022)."""
    before, *turns = TURN.split(text)
    if before.strip() or not turns:
        raise _BadRow(
            f'there is no "prompt", and "{field}" is not a dialogue of the form '
            r'"\n\nHuman: … \n\nAssistant: …" either. Add a prompt field.'
        )
    return [
        {"role": ROLES[speaker], "content": words.strip()}
        for speaker, words in zip(turns[::2], turns[1::2], strict=True)
    ]


def _split_answer(turns: Messages, field: str) -> tuple[Prompt, str]:
    """(everything before the last turn, the last turn), which must be the assistant's."""
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        roles = ", ".join(turn["role"] for turn in turns)
        raise _BadRow(
            f'"{field}" must end with an answer by the assistant; its turns are: {roles}.'
        )
    return _conversation(turns[:-1], field), _text(turns[-1]["content"], field)


def _conversation(value: object, field: str) -> Prompt:
    """A prompt; a single user turn becomes its text, so that both forms are one."""
    if not isinstance(value, list):
        return _text(value, field)
    turns = _messages(value, field)
    _text(turns[-1]["content"], field)
    alone = len(turns) == 1 and turns[0]["role"] == "user"
    return turns[0]["content"] if alone else turns


def _answer(value: object, field: str) -> str:
    if not isinstance(value, list):
        return _text(value, field)
    turns = _messages(value, field)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise _BadRow(f'"{field}" must hold one message by the assistant.')
    return _text(turns[0]["content"], field)


def _messages(value: object, field: str) -> Messages:
    if not isinstance(value, list) or not value:
        raise _BadRow(f'"{field}" holds {_kind(value)}, not a list of messages.')
    for i, turn in enumerate(value):
        keys = ("role", "content")
        if not isinstance(turn, dict) or not all(isinstance(turn.get(k), str) for k in keys):
            raise _BadRow(
                f'"{field}", message {i + 1}, is {_short(turn)}: it needs the texts "role" and '
                '"content".'
            )
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def _text(value: object, field: str) -> str:
    if not isinstance(value, str):
        raise _BadRow(f'"{field}" holds {_kind(value)}, {_short(value)}, where a text is needed.')
    if not value.strip():
        raise _BadRow(f'"{field}" is empty. Fill it in or remove the row.')
    return value


def _missing(row: Row, expected: str) -> str:
    found = ", ".join(row) or "none"
    return f"no known set of fields. Found: {found}. Needed: {expected}. Rename the fields."


def _kind(value: object) -> str:
    names = {str: "a text", list: f"a list of {len(value) if isinstance(value, list) else 0}"}
    names |= {dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    return "nothing (null)" if value is None else names.get(type(value), type(value).__name__)


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"… {text[-58:]}"
