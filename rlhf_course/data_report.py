"""What came of a data set: how many rows were read, which were left out and why, how long they are.

The console shows a few lines, `data.json` beside the run holds all of it.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf_course.files import write_json
from rlhf_course.sources import Place

FIRST = 8  # places that are named


@dataclass
class Count:
    """How many rows, and where the first of them stand."""

    count: int = 0
    first: list[str] = field(default_factory=list)
    told: str = ""
    """The message about the first of them."""

    def add(self, place: Place | str, told: str = "") -> None:
        """One more row."""
        self.count += 1
        if len(self.first) < FIRST:
            self.first.append(str(place))
        self.told = self.told or told

    def places(self, source: str) -> str:
        """The first places in one line; the source itself is not said again."""
        names = [name.removeprefix(f"{source}, ") for name in self.first]
        more = ", …" if self.count > len(names) else ""
        return ", ".join(names) + more


class Counts(dict[str, Count]):
    """Counts by their reason."""

    def add(self, reason: str, place: Place | str, told: str = "") -> None:
        """One more row for this reason."""
        self.setdefault(reason, Count()).add(place, told)

    def total(self) -> int:
        """Rows for all reasons together."""
        return sum(count.count for count in self.values())


def quantile(lengths: Sequence[int], share: float) -> int:
    """The smallest of the lengths that holds this share of them."""
    ordered = sorted(lengths)
    return ordered[max(math.ceil(share * len(ordered)), 1) - 1]


@dataclass
class DataReport:
    """All that is known of one reading of a data set."""

    source: str
    kind: str
    """dialogues, comparisons, prompts or documents."""
    recipe: str | None = None
    licence: str | None = None
    policies: dict[str, Any] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    read: int = 0
    used: int = 0
    fields: Counts = field(default_factory=Counts)
    """Sets of known fields that rows have: more than one in a file of mixed schemas."""
    dropped: Counts = field(default_factory=Counts)
    changed: Counts = field(default_factory=Counts)
    duplicates: Count = field(default_factory=Count)
    contradictory: Count = field(default_factory=Count)
    prompt_tokens: array = field(default_factory=lambda: array("q"))
    answer_tokens: array = field(default_factory=lambda: array("q"))
    unit: str = "tokens"
    """What the lengths count."""
    context: int | None = None
    held_out: int | None = None

    def lengths(self) -> dict[str, dict[str, int]]:
        """Minimum, median, 95 % and maximum of the tokens of prompts and answers, before any row
        was dropped or cut for its length."""
        out = {}
        for name, values in (("prompt", self.prompt_tokens), ("answer", self.answer_tokens)):
            if values:
                shares = {"min": 0.0, "median": 0.5, "p95": 0.95, "max": 1.0}
                out[name] = {key: quantile(values, share) for key, share in shares.items()}
        return out

    def as_dict(self) -> dict[str, Any]:
        """Plain JSON."""
        counts = {name: {key: {"count": c.count, "first": c.first, "told": c.told}
                         for key, c in getattr(self, name).items()}
                  for name in ("dropped", "changed", "fields")}  # fmt: skip
        pairs = {name: {"count": c.count, "first": c.first}
                 for name, c in (("duplicates", self.duplicates),
                                 ("contradictory", self.contradictory))}  # fmt: skip
        plain = ("source", "kind", "recipe", "licence", "policies", "notes", "read", "used",
                 "context", "held_out", "unit")  # fmt: skip
        own = {name: getattr(self, name) for name in plain}
        return own | counts | pairs | {"lengths": self.lengths()}

    def lines(self) -> list[str]:
        """For the console; the first line is the sum."""
        licence = f" ({self.licence})" if self.licence else ""
        recipe = f", recipe {self.recipe}{licence}" if self.recipe else ""
        held = f", {self.held_out} of them held out" if self.held_out is not None else ""
        out = [f"{self.source}{recipe}: {self.read} rows read, {self.used} used{held}"]
        out += [f"  {note}" for note in self.notes]
        if len(self.fields) > 1:
            sets = [f"{name} ({c.count}, first {c.places(self.source).split(', ')[0]})"
                    for name, c in self.fields.items()]  # fmt: skip
            out.append(f"  rows of different fields: {'; '.join(sets)}")
        out += [f"  left out {c.count}: {reason} ({c.places(self.source)})"
                for reason, c in self.dropped.items()]  # fmt: skip
        out += [f"  changed {c.count}: {reason} ({c.places(self.source)})"
                for reason, c in self.changed.items()]  # fmt: skip
        kept = "" if "duplicates" in self.dropped else ", kept"
        if self.duplicates.count and kept:
            out.append(f"  duplicates {self.duplicates.count}{kept} "
                       f"({self.duplicates.places(self.source)})")  # fmt: skip
        if self.contradictory.count and "contradictory comparisons" not in self.dropped:
            out.append(f"  contradictory comparisons {self.contradictory.count}, kept "
                       f"({self.contradictory.places(self.source)})")  # fmt: skip
        for name, n in self.lengths().items():
            out.append(f"  {self.unit} of {name}s: {n['min']} to {n['max']}, "
                       f"median {n['median']}, 95 % up to {n['p95']}")  # fmt: skip
        return out

    def write(self, folder: Path) -> None:
        """Write `data.json` into the folder of a run."""
        write_json(folder / "data.json", self.as_dict())
