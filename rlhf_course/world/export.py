"""A world written to disk in the schemas that public data sets use."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf_course.errors import ConfigError
from rlhf_course.world.base import Comparison, World


def export_world(world: World, folder: str | os.PathLike, prompts: int, comparisons: int) -> None:
    """Write a world as JSON lines, with its tokenizer: all of it or nothing.

    corpus.jsonl, corpus_validation.jsonl     {text}
    demonstrations.jsonl                      {prompt, response}
    prompts.jsonl, evaluation_prompts.jsonl   {prompt, group}; the former are for PPO
    comparisons.jsonl                         {prompt, chosen, rejected, responses, finished}
    tokenizer/, world.json                    a Hugging Face fast tokenizer; sizes, an example

    `responses` stand in the labeler's order, best first; `chosen` is the first and `rejected`
    the last that differs from it. They are the world's own answers, since no policy is at hand.

    Args:
        world: any world.
        folder: a new or an empty folder.
        prompts: how many PPO prompts to draw.
        comparisons: how many comparisons to draw; those of a single answer are left out.

    Raises:
        ConfigError: the folder exists and is not empty, or cannot be written.
    """
    folder = Path(folder)
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise ConfigError(f"{folder} exists and is not empty; name another folder, or clear it")
    partial = folder.with_name(f".{folder.name}.partial-{os.getpid()}")
    try:
        partial.mkdir(parents=True)
        for stem, rows in _tables(world, prompts, comparisons).items():
            with open(partial / f"{stem}.jsonl", "w", encoding="utf-8", newline="\n") as file:
                file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        world.tokenizer.save_pretrained(partial / "tokenizer")
        described = json.dumps(world.describe(), indent=2, ensure_ascii=False)
        (partial / "world.json").write_text(described + "\n", encoding="utf-8", newline="\n")
        if folder.exists():
            folder.rmdir()  # empty, as checked; Windows does not rename onto a folder
        os.replace(partial, folder)
    except OSError as error:
        raise ConfigError(f"cannot write the world to {folder}: {error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _tables(world: World, prompts: int, comparisons: int) -> dict[str, Iterable[dict[str, Any]]]:
    """File stem -> rows."""
    test = world.evaluation_prompts()
    return {
        "corpus": ({"text": text} for text in world.documents()),
        "corpus_validation": ({"text": text} for text in world.documents("validation")),
        "demonstrations": (
            {"prompt": d.prompt.text, "response": d.response} for d in world.demonstrations()
        ),
        "prompts": ({"prompt": p.text, "group": p.group} for p in world.prompts("ppo", prompts)),
        "evaluation_prompts": (
            {"prompt": p.text, "group": group} for group, asked in test.items() for p in asked
        ),
        "comparisons": _ranked(world.comparisons(comparisons)),
    }


def _ranked(comparisons: Iterable[Comparison]) -> Iterator[dict[str, Any]]:
    """The best answer against the worst, and the whole order."""
    for c in comparisons:
        rejected = next((r for r in reversed(c.responses) if r != c.responses[0]), None)
        if rejected is None:  # all the same words: nothing to tell apart
            continue
        yield {
            "prompt": c.prompt.text,
            "chosen": c.responses[0],
            "rejected": rejected,
            "responses": list(c.responses),
            "finished": list(c.finished),
        }
