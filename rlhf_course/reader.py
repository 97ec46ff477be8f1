"""One pass over a data set: columns renamed, the recipe found, bad rows raised or counted."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

from rlhf_course import recipes, schemas
from rlhf_course.data_report import DataReport
from rlhf_course.errors import ConfigError, DataError
from rlhf_course.schemas import BadRow, PromptRow
from rlhf_course.sources import USUAL, Place, Row, hub_name, iter_rows

# What is learned -> the splits that are looked for.
SPLITS = {
    "documents": ("train",),
    "dialogues": ("train", "train_sft"),
    "comparisons": ("train", "train_prefs"),
    "prompts": ("train", "train_prefs", "train_sft"),
}
MADE = "no comparisons in it: each answer is set against another row's (--rejected shuffled)"


@dataclass(frozen=True)
class Reading:
    """How a data set is to be read; what is None is as the recipe says, else as it says here."""

    columns: str | None = None
    """ "prompt=question,response=answer", ours=theirs: these columns are read, no others."""
    recipe: str | None = None
    """Name of a recipe, "none", or None: by the set's name on the hub or the first row's fields."""
    bad_rows: str | None = None
    """ "stop" (the default) at a row that cannot be used, or "drop" and count it."""
    duplicates: str = "keep"
    """ "drop" all but the first of equal rows, and every row of comparisons that contradict each
    other: the same answers to one prompt in another order."""
    rows: int | None = None
    """Read the first so many rows only."""
    rejected: str | None = None
    """ "shuffled": comparisons of a set that has none; see `recipes.shuffled_pairs`."""
    seed: int = 0
    """Seed of what is drawn."""


AS_IT_IS = Reading()


class Reader:
    """One pass over a source: every row parsed, bad ones raised or counted."""

    def __init__(self, source: str | Path, kind: str, reading: Reading):
        self.source, self.kind, self.reading = source, kind, reading
        named = None if reading.recipe in (None, "none") else recipes.find(reading.recipe)
        by_name = reading.recipe is None and not reading.columns
        self.recipe = named or (recipes.of_hub(hub_name(source)) if by_name else None)
        self._recognise = by_name and self.recipe is None
        self.columns = parse_columns(reading.columns, self.recipe) if reading.columns else None
        self.report = DataReport(str(source), kind)
        self._bad: list[str] = []
        self._good = 0

    @property
    def bad_rows(self) -> str:
        """ "stop" or "drop"."""
        return self.reading.bad_rows or (self.recipe.bad_rows if self.recipe else "stop")

    def items(self) -> Iterator[tuple[Place, Any]]:
        """(place, item) of every good row. Raises DataError at a bad one, or when all are bad."""
        for place, item in self._parsed():
            if isinstance(item, BadRow):
                self._refuse(place, item)
            else:
                self._good += 1
                yield place, item
        if not self._good:
            raise DataError(
                f"{self.source}: all {self.report.read} rows are unusable. The first: "
                f"{self._bad[0]}"
            )
        self._tell()

    def _tell(self) -> None:
        if self.recipe:
            self.report.recipe = self.recipe.name
            # Who has the same fields need not have the same data: the licence is by name alone.
            self.report.licence = None if self._recognise else self.recipe.licence
        asked = {"columns": self.reading.columns, "rows": self.reading.rows,
                 "bad_rows": self.bad_rows, "duplicates": self.reading.duplicates,
                 "rejected": self.reading.rejected}  # fmt: skip
        self.report.policies |= {key: value for key, value in asked.items() if value is not None}

    def _refuse(self, place: Place, bad: BadRow) -> None:
        told = f"{place}: {bad}"
        if self.bad_rows == "stop":
            hint = (
                "" if bad.reason == "unknown fields" else " --bad-rows drop leaves such rows out."
            )
            raise DataError(told + hint) from None
        if not self._bad:
            self._bad.append(told)
        self.report.dropped.add(bad.reason, place, str(bad))

    def _parsed(self) -> Iterator[tuple[Place, Any]]:
        rows = self._rows()
        first = next(rows, None)  # by then the recipe is known
        if first is None:
            return
        rows = chain([first], rows)
        if made := self._made(first[1]):
            yield from made(rows, self.reading.seed)
            return
        parse = self._parser()
        for place, row in rows:
            try:
                yield place, parse(row)
            except BadRow as bad:
                if self.kind == "comparisons" and bad.reason == "unknown fields":
                    self._without_comparisons(place, row)
                yield place, bad

    def _rows(self) -> Iterator[tuple[Place, Row]]:
        """The rows that can be read, columns renamed."""
        wanted = SPLITS[self.kind]
        if self.recipe and self.kind in self.recipe.splits:
            wanted = (self.recipe.splits[self.kind], *wanted)
        layout = self.recipe.layout if self.recipe else USUAL
        begun = False
        for place, row, problem in iter_rows(self.source, wanted, self.reading.rows, layout):
            self.report.read += 1
            if problem:
                self._refuse(place, BadRow("not readable", problem))
                continue
            if not begun:
                begun = True
                self._begin(place, row)
            if self.columns:
                try:
                    row = Mapped(row, self.columns)
                except BadRow as bad:
                    self._refuse(place, bad)
                    continue
            names = (*schemas.FIELDS, *(self.recipe.fields if self.recipe else ()))
            known = ", ".join(name for name in dict.fromkeys(names) if name in row)
            self.report.fields.add(known or "none that is known", place)
            yield place, row

    def _begin(self, place: Place, row: Row) -> None:
        if self._recognise and not (self.kind == "documents" and "text" in row):
            self.recipe = recipes.of_row(row)
            if self.recipe:
                self.report.notes.append(
                    f"recognised by its fields as {self.recipe.name}: {self.recipe.about} "
                    "(--recipe none reads it without)"
                )
        for ours, theirs in (self.columns or {}).items():
            if not found(row, theirs):
                raise DataError(
                    f"{place}: --columns {ours}={theirs}: there is no column {theirs!r}. Found: "
                    f"{schemas.names_of(row)}."
                )

    def _parser(self) -> Callable[[Row], Any]:
        parsers = self.recipe or schemas
        if self.kind == "prompts":
            return lambda row: PromptRow(parsers.prompt(row), getattr(row, "whole", row))
        names = {"documents": "document", "dialogues": "dialogue", "comparisons": "preference"}
        return getattr(parsers, names[self.kind])

    def _made(self, row: Row):
        """What makes comparisons of many rows, where the set has none."""
        if self.kind != "comparisons":
            return None
        parse = (self.recipe or schemas).dialogue
        if self.reading.rejected == "shuffled":
            self.report.notes.append(MADE)
            return lambda rows, seed: recipes.shuffled_pairs(parse, rows, seed)
        if self.recipe and self.recipe.pairs:
            self.report.notes.append(f"comparisons are made: {self.recipe.about}")
            return self.recipe.pairs
        return None

    def _without_comparisons(self, place: Place, row: Row) -> None:
        """Say it in one sentence where a set has answers, but nothing they are compared with."""
        if "chosen" in row or "rejected" in row:
            return
        try:
            (self.recipe or schemas).dialogue(row)
        except BadRow:
            return
        raise DataError(
            f"{place}: one answer and nothing that it is compared with: found are "
            f"{schemas.names_of(row)}, needed chosen and rejected, or responses. Give "
            "comparisons; or --rejected shuffled, which sets each answer against another row's; or "
            "leave the reward model out: `ppo` takes a function with --reward."
        )


class Mapped(dict):
    """A row under our names; `whole` is the row as it was."""

    def __init__(self, row: Row, columns: dict[str, str]):
        super().__init__()
        self.whole = row
        for ours, theirs in columns.items():
            if not found(row, theirs):
                told = f"there is no column {theirs!r}. Found: {schemas.names_of(row)}."
                raise BadRow("missing column", told)
            self[ours] = _walk(row, theirs)


def parse_columns(text: str, recipe: recipes.Recipe | None = None) -> dict[str, str]:
    """ "prompt=question,response=answer" -> {"prompt": "question", "response": "answer"}.

    theirs may be a path into an object, "info.post". Raises ConfigError for anything else, and for
    names that no schema has.
    """
    known = recipe.fields if recipe else schemas.FIELDS
    out = {}
    for part in text.split(","):
        ours, _, theirs = (word.strip() for word in part.partition("="))
        if ours not in known or ours in out:
            raise ConfigError(
                f"--columns {text}: {ours!r} is no field of ours, or stands there twice. Write "
                f"ours=theirs,ours=theirs; ours are {', '.join(known)}."
            )
        out[ours] = theirs or ours
    return out


def found(row: Row, path: str) -> bool:
    """Whether the row has this column, or this path into an object."""
    try:
        _walk(row, path)
    except (KeyError, TypeError):
        return False
    return True


def _walk(row: Row, path: str) -> object:
    if path in row or "." not in path:
        return row[path]
    first, _, rest = path.partition(".")
    return _walk(row[first], rest)
