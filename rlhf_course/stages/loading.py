"""A stage's --data: read as its flags say, told on the console, and reported beside the run."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rlhf_course.data import Documents, Read, read, split_rows
from rlhf_course.data_report import DataReport
from rlhf_course.progress import console
from rlhf_course.reader import Reading
from rlhf_course.stages.fitting import Fitter, TokenTable


def reading_of(config) -> Reading:
    """How the flags ask for a data set to be read."""
    return Reading(
        config.columns, config.recipe, config.bad_rows, config.duplicates, config.rows,
        getattr(config, "rejected", None), config.seed,
    )  # fmt: skip


def read_data(config, kind: str) -> Read:
    """The items of --data, of one kind (see `data.read`). Raises DataError."""
    return read(config.data, kind, reading_of(config))


def too_long(config, data: Read) -> str:
    """ "stop", "drop" or "cut": --too-long, else what the recipe says, else "stop"."""
    policy = config.too_long or (data.recipe.too_long if data.recipe else "stop")
    data.report.policies["too_long"] = policy
    return policy


def bad_rows(config, data: Read) -> str:
    """ "stop" or "drop", likewise."""
    return config.bad_rows or (data.recipe.bad_rows if data.recipe else "stop")


def split_table(
    config, data: Read, fitter: Fitter, kept: dict[int, int]
) -> tuple[TokenTable, TokenTable, list[int], list[int]]:
    """(held-out table, training table, the items' numbers in the one and in the other).

    The split is made over all rows that were read: how many of them fit does not move the others.
    """
    parts = [
        [i for i in part if i in kept]
        for part in split_rows(range(len(data.items)), config.validation, config.seed)
    ]
    held, train = (fitter.table.take([kept[i] for i in part]) for part in parts)
    data.report.held_out = len(held)
    return held, train, *parts


def read_text(config) -> tuple[Documents, Sequence[int], Sequence[int]]:
    """(the documents of --data, the numbers of those held out, of the others)."""
    documents = Documents(config.data, reading_of(config))
    held, train = split_rows(range(len(documents)), 0.1, config.seed)
    documents.report.held_out = len(held)
    return documents, held, train


def tell(report: DataReport) -> None:
    """The report's lines on the console."""
    for line in report.lines():
        console.print(line, soft_wrap=True, markup=False)


def write_report(report: DataReport | None, folder: Path) -> None:
    """`data.json` in the folder of a run that learned from a data set."""
    if report is not None:
        report.write(folder)
