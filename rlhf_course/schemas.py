"""Rows in the usual schemas, into one: a prompt, answers to it, or a text.

A parser takes a row, a dictionary as it stood in the file, and returns one item of learning. What
is wrong with a row it raises as a BadRow, which names the field; `data` adds where the row stands.
"""

from __future__ import annotations

import math
import re
from typing import NamedTuple

from rlhf_course.sources import Row

Messages = list[dict[str, str]]
Prompt = str | Messages

# Schemas in which a row holds two texts; the names are those in which data sets are published.
TEXT_PAIRS = (
    ("prompt", "response"),
    ("prompt", "completion"),
    ("question", "answer"),
    ("instruction", "output"),
)
FIELDS = (
    "messages", "prompt", "question", "instruction", "input", "response", "completion", "answer",
    "output", "chosen", "rejected", "responses", "ranks", "scores", "text",
)  # fmt: skip
"""Every field that is looked at."""
ROLES = {"Human": "user", "Assistant": "assistant"}
TURN = re.compile(r"(?:^|\n\n)(Human|Assistant):")
NOTHING = re.compile(r"[\s\0\u200b\ufeff]*")  # NUL, zero-width space and byte-order mark too
SURROGATE = re.compile(r"[\ud800-\udfff]")


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


class BadRow(Exception):
    """What is wrong with a row: `reason` in a few words, under which it is counted, and in full."""

    def __init__(self, reason: str, told: str):
        super().__init__(told)
        self.reason = reason


# --- the parsers -----------------------------------------------------------------------------


def document(row: Row) -> str:
    """The `text`."""
    if "text" not in row:
        raise missing(row, "text")
    return text_of(row["text"], "text")


def dialogue(row: Row) -> Dialogue:
    """`messages`, one of TEXT_PAIRS, or the `chosen` side of a comparison."""
    if "messages" in row:
        return Dialogue(*split_answer(messages_of(row["messages"], "messages"), "messages"))
    for prompt_field, answer_field in TEXT_PAIRS:
        if prompt_field in row and answer_field in row:
            return Dialogue(prompt(row), answer_of(row[answer_field], answer_field))
    if "chosen" in row:
        return Dialogue(*_side(row, "chosen"))
    if "responses" in row:
        ranked = preference(row)
        return Dialogue(ranked.prompt, ranked.responses[0])
    pairs = ", ".join(f"{a}/{b}" for a, b in TEXT_PAIRS)
    raise missing(row, f"messages, {pairs}, or chosen")


def preference(row: Row) -> Preference:
    """`chosen` and `rejected` (with or without `prompt`), or `responses`, best first or ordered by
    `ranks` (1 is best) or `scores` (the higher the better)."""
    if "responses" in row:
        start, answers = prompt(row), row["responses"]
        if not isinstance(answers, list) or len(answers) < 2:
            told = f'"responses" holds {_kind(answers)}, not two or more answers.'
            raise BadRow("fewer than two answers", told)
        found = [answer_of(a, f"responses[{i}]") for i, a in enumerate(answers)]
        answers = tuple(found[i] for i in _order(row, len(found)))
    elif "chosen" in row and "rejected" in row:
        (start, best), (other, worst) = _side(row, "chosen"), _side(row, "rejected")
        require_one_prompt(start, other)
        answers = (best, worst)
    else:
        raise missing(row, "chosen and rejected (with or without prompt), or responses")
    require_different(answers)
    return Preference(start, answers)


def prompt(row: Row) -> Prompt:
    """`prompt`, `question` or `instruction`, or what stands before the answer of a dialogue."""
    for field in ("prompt", "question"):
        if field in row:
            return conversation(row[field], field)
    if "instruction" in row:  # Alpaca's: the input, where there is one, follows the instruction
        extra = row.get("input") or ""
        instruction = text_of(row["instruction"], "instruction")
        return f"{instruction}\n\n{text_of(extra, 'input')}" if extra else instruction
    if "messages" in row:
        turns = messages_of(row["messages"], "messages")
        return conversation(turns[:-1] if turns[-1]["role"] == "assistant" else turns, "messages")
    if "chosen" in row:
        return _side(row, "chosen")[0]
    raise missing(row, "prompt, question, instruction, messages or chosen")


# --- what the parsers, and those of the recipes, are made of ---------------------------------


def require_one_prompt(one: Prompt, other: Prompt) -> None:
    """Raise BadRow unless both sides of a comparison answer the same prompt."""
    if one != other:
        raise BadRow(
            "different prompts",
            '"chosen" and "rejected" answer different prompts: only their last turn may '
            f"differ. They end {short(one)} and {short(other)}. Mend or remove the row.",
        )


def require_different(answers: tuple[str, ...]) -> None:
    """Raise BadRow when two of the compared answers are the same."""
    if len(set(answers)) < len(answers):
        raise BadRow(
            "identical answers",
            f"two of the compared answers are the same ({short(answers[0])} …), so there is "
            "nothing to learn from them. Remove the row.",
        )


def _order(row: Row, count: int) -> list[int]:
    """The answers' numbers, the best first. Equal ranks or scores are an error: neither is better,
    and a list of answers has no place for that."""
    field = next((name for name in ("ranks", "scores") if name in row), None)
    if field is None:
        return list(range(count))
    values = row[field]
    numbers = isinstance(values, list) and all(
        isinstance(v, int | float) and not isinstance(v, bool) and math.isfinite(v) for v in values
    )
    if not numbers or len(values) != count:
        told = f'"{field}" holds {short(values)}: it needs {count} numbers, one for each answer.'
        raise BadRow("ranks or scores do not fit", told)
    if len(set(values)) < count:
        told = f'two answers have one value in "{field}" ({short(values)}), so neither is better.'
        raise BadRow("tied answers", f"{told} Leave one of them out.")
    return sorted(range(count), key=values.__getitem__, reverse=field == "scores")


def _side(row: Row, field: str) -> tuple[Prompt, str]:
    """(prompt, answer) of "chosen" or "rejected", which may hold the whole dialogue."""
    value = row[field]
    if isinstance(value, list) and len(value) > 1:
        return split_answer(messages_of(value, field), field)
    if "prompt" in row:
        return conversation(row["prompt"], "prompt"), answer_of(value, field)
    return split_answer(transcript(text_of(value, field), field), field)


def transcript(text: str, field: str) -> Messages:
    r"""The turns of hh-rlhf's "\n\nHuman: … \n\nAssistant: …" (Bai et al. 2022).

    Turns of one speaker in a row become one, since few chat templates take them: their texts are
    joined by an empty line.
    """
    before, *turns = TURN.split(text)
    if before.strip() or not turns:
        raise BadRow(
            "no transcript",
            f'there is no "prompt", and "{field}" is not a dialogue of the form '
            r'"\n\nHuman: … \n\nAssistant: …" either. Add a prompt field.',
        )
    out: Messages = []
    for speaker, words in zip(turns[::2], turns[1::2], strict=True):
        said = words.strip()
        if out and out[-1]["role"] == ROLES[speaker]:
            out[-1]["content"] = "\n\n".join(filter(None, (out[-1]["content"], said)))
        else:
            out.append({"role": ROLES[speaker], "content": said})
    return out


def split_answer(turns: Messages, field: str) -> tuple[Prompt, str]:
    """(everything before the last turn, the last turn), which must be the assistant's."""
    if len(turns) < 2 or turns[-1]["role"] != "assistant":
        roles = [turn["role"] for turn in turns]
        told = ", ".join(roles if len(roles) < 8 else ["…", *roles[-6:]])
        raise BadRow(
            "no answer at the end",
            f'"{field}" must end with an answer by the assistant; its turns are: {told}.',
        )
    return conversation(turns[:-1], field), text_of(turns[-1]["content"], field)


def conversation(value: object, field: str) -> Prompt:
    """A prompt; a single user turn becomes its text, so that both forms are one."""
    if not isinstance(value, list):
        return text_of(value, field)
    turns = messages_of(value, field)
    text_of(turns[-1]["content"], field)
    alone = len(turns) == 1 and turns[0]["role"] == "user"
    return turns[0]["content"] if alone else turns


def answer_of(value: object, field: str) -> str:
    """A text, or a list of one message by the assistant."""
    if not isinstance(value, list):
        return text_of(value, field)
    turns = messages_of(value, field)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise BadRow("wrong type", f'"{field}" must hold one message by the assistant.')
    return text_of(turns[0]["content"], field)


def messages_of(value: object, field: str) -> Messages:
    """A list of messages, role and content alone."""
    if not isinstance(value, list) or not value:
        raise BadRow("wrong type", f'"{field}" holds {_kind(value)}, not a list of messages.')
    for i, turn in enumerate(value):
        keys = ("role", "content")
        if not isinstance(turn, dict) or not all(isinstance(turn.get(k), str) for k in keys):
            raise BadRow(
                "wrong type",
                f'"{field}", message {i + 1}, is {short(turn)}: it needs the texts "role" and '
                '"content".',
            )
        _require_unicode(turn["content"], field)
    return [{"role": turn["role"], "content": turn["content"]} for turn in value]


def text_of(value: object, field: str) -> str:
    """A text that has something in it and that a tokenizer can read."""
    if not isinstance(value, str):
        told = f'"{field}" holds {_kind(value)}, {short(value)}, where a text is needed.'
        raise BadRow("wrong type", told)
    if NOTHING.fullmatch(value):
        raise BadRow("empty text", f'"{field}" is empty. Fill it in or remove the row.')
    _require_unicode(value, field)
    return value


def _require_unicode(text: str, field: str) -> None:
    if not text.isascii() and (found := SURROGATE.search(text)):
        raise BadRow(
            "half a character",
            f'"{field}" holds half a character (the lone surrogate U+{ord(found[0]):04X} at '
            f"{found.start()}), which cannot be written as UTF-8. Mend or remove the row.",
        )


def missing(row: Row, expected: str) -> BadRow:
    """The error of a row whose fields make no known schema."""
    found = names_of(row)
    told = f"no known set of fields. Found: {found}. Needed: {expected}. Rename the fields, or say "
    return BadRow("unknown fields", told + "which are which with --columns prompt=…,response=….")


def names_of(row: Row) -> str:
    """The row's fields, for a message."""
    names = ", ".join(str(name)[:60] for name in row)
    return (names if len(names) <= 600 else f"{names[:600]} …") or "none"


def _kind(value: object) -> str:
    names = {str: "a text", list: f"a list of {len(value) if isinstance(value, list) else 0}"}
    names |= {dict: "an object", bool: "true or false", int: "a number", float: "a number"}
    return "nothing (null)" if value is None else names.get(type(value), type(value).__name__)


def short(value: object) -> str:
    """The end of a value, as it is shown in a message; of a long text not all is copied."""
    if isinstance(value, str):
        value = value[-80:]
    elif isinstance(value, list):
        value = value[-1:] if value and isinstance(value[-1], dict) else value[-20:]
        value = [{k: str(v)[-80:] for k, v in v.items()} if isinstance(v, dict) else v
                 for v in value]  # fmt: skip
    elif isinstance(value, dict):
        value = {k: str(v)[-80:] for k, v in list(value.items())[:8]}
    text = repr(value)
    return text if len(text) <= 60 else f"… {text[-58:]}"
