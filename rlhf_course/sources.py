"""Where rows come from: a file, a folder of files, or a data set on the Hugging Face hub.

    train.jsonl   train.jsonl.gz   train.json   train.parquet
    folder/                              all such files in it; of a split one, the train part
    openai/gsm8k:main@test               hub name, its configuration, its split (train unless named)

`data` makes prompts and answers of the rows.
"""

from __future__ import annotations

import gzip
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rlhf_course.errors import DataError

Row = dict[str, Any]

SUFFIXES = (".jsonl", ".jsonl.gz", ".json", ".parquet")
# A file belongs to a split when its name, or that of a folder around it, begins so.
SPLIT = re.compile(r"(train|validation|valid|dev|test)(?![a-zA-Z])")
HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<config>[^@]+))?(?:@(?P<split>.+))?")


def load_rows(source: str | Path, split: str | None = None) -> list[Row]:
    """Every row of the source as a dictionary, in order; of a split source the train part, unless
    `split` names another.

    Raises DataError for a source that is missing, empty or not readable, naming file and line.
    """
    return [row for _, row in located_rows(source, split)]


def located_rows(source: str | Path, split: str | None = None) -> list[tuple[str, Row]]:
    """As `load_rows`, each row with its place ("train.jsonl, line 3"), for messages about it."""
    path = Path(source).expanduser()
    if path.is_dir():
        rows = [row for file in _files(path, split) for row in _file_rows(file)]
    elif path.is_file():
        rows = list(_file_rows(path))
    elif _looks_like_a_path(str(source)):
        raise DataError(f"{source}: no such file or folder (looked in {Path.cwd()}).")
    else:
        rows = _hub_rows(str(source), split)
    if not rows:
        raise DataError(f"{source}: no row in it. Give a data set with at least one.")
    return rows


def _looks_like_a_path(source: str) -> bool:
    return (
        source.startswith((".", "/", "~"))
        or source.endswith((*SUFFIXES, "/"))
        or "\\" in source
        or not HUB_NAME.fullmatch(source)
    )


def _files(folder: Path, split: str | None) -> list[Path]:
    """The data files of one split, or all of them where no name mentions a split."""
    files = sorted(f for f in folder.rglob("*") if f.name.endswith(SUFFIXES) and f.is_file())
    if not files:
        raise DataError(f"{folder}: no data file in this folder. Read are {', '.join(SUFFIXES)}.")
    splits: dict[str, list[Path]] = {}
    for file in files:
        parts = reversed(file.relative_to(folder).parts)  # the folder's own name says nothing
        match = next(filter(None, map(SPLIT.match, parts)), None)
        splits.setdefault(match[1] if match else "", []).append(file)
    if split is None and set(splits) == {""}:
        return files
    if (split or "train") not in splits:
        found = ", ".join(file.relative_to(folder).as_posix() for file in files[:8])
        raise DataError(
            f"{folder}: no file of the {split or 'train'} split. Found: {found}. Name one file "
            "instead of the folder."
        )
    return splits[split or "train"]


def _file_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """(place, row) of one file, whatever its format."""
    if not file.name.endswith(SUFFIXES):
        raise DataError(f"{file}: not a known kind of data file. Read are {', '.join(SUFFIXES)}.")
    try:
        if file.suffix == ".parquet":
            yield from _parquet_rows(file)
        else:
            yield from _json_rows(file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error}). Convert the file.") from error
    except (OSError, EOFError) as error:
        raise DataError(f"{file}: cannot be read ({error}).") from error


def _json_rows(file: Path) -> Iterator[tuple[str, Row]]:
    """JSON lines, or one JSON list of rows, which is told from its first character."""
    opener = gzip.open if file.suffix == ".gz" else open
    with opener(file, "rt", encoding="utf-8-sig") as lines:  # -sig: Windows may put a mark in front
        if file.suffix == ".json":
            text = lines.read()
            if text.lstrip().startswith("["):
                for i, row in enumerate(_json(text, str(file))):
                    yield _row(row, f"{file}, row {i + 1}")
                return
            lines = text.split("\n")
        for i, line in enumerate(lines):
            if line.strip():
                where = f"{file}, line {i + 1}"
                yield _row(_json(line, where), where)


def _json(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise DataError(f"{where}: not valid JSON ({error}).") from error


def _row(value: object, where: str) -> tuple[str, Row]:
    if not isinstance(value, dict):
        raise DataError(f'{where}: not a row: every row is an object {{"field": value, …}}.')
    return where, value


def _parquet_rows(file: Path) -> Iterator[tuple[str, Row]]:
    import pyarrow.parquet  # comes with datasets; slow to import, and few runs need it

    try:
        rows = pyarrow.parquet.read_table(file).to_pylist()
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: not a readable parquet file ({error}).") from error
    for i, row in enumerate(rows):
        yield f"{file}, row {i + 1}", row


def _hub_rows(source: str, split: str | None) -> list[tuple[str, Row]]:
    match = HUB_NAME.fullmatch(source)
    split = split or match["split"] or "train"
    try:
        import datasets

        rows = datasets.load_dataset(match["name"], match["config"], split=split)
    except Exception as error:  # the hub client raises errors of many libraries
        raise DataError(
            f"{source}: there is no such file or folder here, and it could not be loaded from the "
            f"Hugging Face hub ({type(error).__name__}: {_first_line(error)}). Check the name, its "
            "configuration and split (NAME:CONFIG@SPLIT). Without a network (or with "
            "HF_HUB_OFFLINE=1) only data sets in the cache can be named; for a mirror of the hub "
            "set HF_ENDPOINT."
        ) from error
    return [(f"{source}, row {i + 1}", row) for i, row in enumerate(rows)]


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")
