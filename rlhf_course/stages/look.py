"""`rlhf-course data`: what a data set is, and what each stage could learn from it. Trains nothing.

rlhf-course data harmless.jsonl.gz
rlhf-course data stanfordnlp/imdb:test --rows 1000 --tokenizer gpt2 --json
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

from rlhf_course import recipes
from rlhf_course.data import Documents, read
from rlhf_course.data_report import DataReport
from rlhf_course.errors import ConfigError, DataError
from rlhf_course.progress import console
from rlhf_course.reader import Reading, parse_columns
from rlhf_course.stages.viewing_settings import DataConfig

# What is read -> who learns from it.
STAGES = {"documents": "pretrain", "dialogues": "sft", "comparisons": "reward-model, dpo",
          "prompts": "ppo"}  # fmt: skip
EXAMPLES, SHOWN = 3, 400  # rows, and characters of each text in them


def look(config: DataConfig) -> dict:
    """Read the set once for each kind of learning; print what was found and return it.

    Raises DataError when no stage can learn from it, or it cannot be read at all.
    """
    reading = Reading(
        config.columns, config.recipe, config.bad_rows, config.duplicates, config.rows,
        config.rejected, config.seed,
    )  # fmt: skip
    if not config.source:
        raise ConfigError("rlhf-course data: name a file, a folder, or a data set on the hub.")
    if config.columns:  # a wrong map is wrong for every kind
        named = None if config.recipe in (None, "none") else recipes.find(config.recipe)
        parse_columns(config.columns, named)
    tokenizer = None
    if config.tokenizer:
        from rlhf_course import checkpoints
        from rlhf_course.huggingface import load_tokenizer

        tokenizer = load_tokenizer(checkpoints.resolve(config.tokenizer), config.tokenizer)
    kinds, errors, examples = {}, {}, {}
    for kind in STAGES:
        try:
            items, report = _read(config.source, kind, reading)
        except DataError as error:
            errors[kind] = str(error)
            continue
        measure(report, kind, items, tokenizer)
        kinds[kind] = report
        examples[kind] = [_shown(kind, item) for item in _first(items)]
    if not kinds:
        raise DataError(errors["prompts"])
    richest = next(kind for kind in ("comparisons", "dialogues", *STAGES) if kind in kinds)
    examples = examples[richest]
    found = {
        "source": str(config.source),
        "stages": {STAGES[kind]: report.as_dict() for kind, report in kinds.items()},
        "not_for": {STAGES[kind]: told for kind, told in errors.items()},
        "examples": examples,
    }
    if config.json:
        print(json.dumps(found, indent=2, ensure_ascii=False))
    else:
        _print(kinds, errors, examples)
    return found


def _read(source: str, kind: str, reading: Reading):
    """(items, report). To look is no reason to stop at the first bad row."""
    reading = replace(reading, bad_rows=reading.bad_rows or "drop")
    if kind == "documents":
        documents = Documents(source, reading)
        return documents, documents.report
    done = read(source, kind, reading)
    return done.items, done.report


def _first(items) -> list:
    return [item for item, _ in zip(items, range(EXAMPLES), strict=False)]


def measure(report: DataReport, kind: str, items, tokenizer) -> None:
    """Lengths of prompts and answers into the report: tokens, or words without a tokenizer."""
    report.unit = "tokens" if tokenizer else "words"

    def length(text: str) -> int:
        if tokenizer is None:
            return len(text.split())
        return len(tokenizer(text, add_special_tokens=False)["input_ids"])

    for item in items:
        if kind == "documents":
            report.answer_tokens.append(length(item))
            continue
        turns = [item[0]] if isinstance(item[0], str) else [turn["content"] for turn in item[0]]
        report.prompt_tokens.append(sum(map(length, turns)))
        if kind == "dialogues":
            report.answer_tokens.append(length(item.response))
        elif kind == "comparisons":
            report.answer_tokens.extend(map(length, item.responses))


def _shown(kind: str, item) -> dict:
    """An item with its texts shortened."""
    if kind == "documents":
        return {"kind": kind, "text": _cut(item)}
    prompt = item.prompt
    shown = _cut(prompt) if isinstance(prompt, str) else [
        {"role": turn["role"], "content": _cut(turn["content"])} for turn in prompt
    ]  # fmt: skip
    if kind == "prompts":
        return {"kind": kind, "prompt": shown}
    if kind == "dialogues":
        return {"kind": kind, "prompt": shown, "response": _cut(item.response)}
    return {"kind": kind, "prompt": shown, "responses": [_cut(text) for text in item.responses]}


def _cut(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]} … ({len(text)} characters)"


def _print(kinds: dict[str, DataReport], errors: dict[str, str], examples: list[dict]) -> None:
    for kind, report in kinds.items():
        console.print(f"[bold]{STAGES[kind]}[/bold] ({kind})", soft_wrap=True)
        for line in report.lines():
            console.print(line, soft_wrap=True, markup=False)
    for kind, told in errors.items():
        console.print(f"[bold]not for {STAGES[kind]}[/bold]", soft_wrap=True)
        console.print(f"  {told}", soft_wrap=True, markup=False)
    for example in examples:
        console.print(f"[bold]example[/bold] of {example.pop('kind')}")
        for name, value in example.items():
            console.print(f"  {name}: {json.dumps(value, ensure_ascii=False)}", soft_wrap=True,
                          markup=False)  # fmt: skip


def data(config: DataConfig) -> Path | None:
    """The command."""
    look(config)
    return None
