"""A command for another library, and the folder that holds it with its data."""

from __future__ import annotations

import json
import shlex
import textwrap
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_course.schemas import Prompt


def messages(prompt: Prompt) -> list[dict[str, str]]:
    """A prompt as a list of messages."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt


def answer(text: str) -> list[dict[str, str]]:
    """An answer as a list of one message."""
    return [{"role": "assistant", "content": text}]


@dataclass
class Command:
    """One call of another library's program.

    program: its first words; options: the words behind, one or more together on a line; notes:
    what has no counterpart there, or another meaning; files: further files by name, with their
    content.
    """

    program: list[str]
    options: list[list[str]] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    files: dict[str, str] = field(default_factory=dict)

    @property
    def words(self) -> list[str]:
        """The whole call, as a program receives it."""
        return [*self.program, *(word for option in self.options for word in option)]

    def script(self, title: str) -> str:
        """The call as a shell script, with the notes above it."""
        end = "What has no counterpart, or another meaning:" if self.notes else ""
        lines = ["#!/usr/bin/env bash", f"# {title} {end}".rstrip()]
        for note in self.notes:
            lines += textwrap.wrap(note, 96, initial_indent="# - ", subsequent_indent="#   ")
        lines += ["set -eu", 'cd "$(dirname "$0")"', ""]
        rows = [shlex.join(self.program), *(f"  {shlex.join(option)}" for option in self.options)]
        return "\n".join(lines) + "\n" + " \\\n".join(rows) + "\n"


def flags(prefix: str = "--", **values: Any) -> list[list[str]]:
    """A flag and its value for every value; None is left out, True is a flag alone, a tuple words.

    Two underscores in a name become a dot.
    """
    out = []
    for name, value in values.items():
        word = prefix + name.replace("__", ".")
        if value is None or value is False:
            continue
        if value is True:
            out.append([word])
        else:
            several = value if isinstance(value, tuple) else (value,)
            out.append([word, *map(str, several)])
    return out


def write_json_lines(file: Path, rows: Iterable[dict]) -> None:
    """One JSON object a line."""
    with open(file, "w", encoding="utf-8", newline="\n") as lines:
        lines.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def write_parquet(file: Path, rows: list[dict]) -> None:
    """A parquet file with the rows' fields as columns."""
    import pyarrow
    import pyarrow.parquet

    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), file)
