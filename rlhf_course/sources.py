"""Where rows come from: a file, a folder of files, or a data set on the Hugging Face hub.

    train.jsonl  train.json  train.csv  train.tsv     each also with .gz behind it
    train.parquet
    folder/                              all such files in it; of a split one, the train part
    openai/gsm8k:main@test               hub name, its configuration, its split (train unless named)
    stanfordnlp/imdb:test                hub name and split

Rows are read one after the other, so that a file may be larger than memory (of a .json that is one
list the text is held, never all of its rows). `data` makes prompts and answers of them.
"""

from __future__ import annotations

import csv
import gzip
import json
import re
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from rlhf_course.errors import DataError

Row = dict[str, Any]

TEXT_SUFFIXES = (".jsonl", ".json", ".csv", ".tsv")
SUFFIXES = (*TEXT_SUFFIXES, *(f"{suffix}.gz" for suffix in TEXT_SUFFIXES), ".parquet")
SPLITS = r"(?:train|validation|valid\d*|dev|test|eval|unsupervised)(?:_(?:prefs|sft|gen))?"
# A file belongs to a split when its name, or that of a folder around it, begins so.
SPLIT = re.compile(rf"({SPLITS})(?![a-zA-Z])")
SPLIT_NAME = re.compile(rf"{SPLITS}(?:\[.*\])?")  # train[:5%] too
HUB_NAME = re.compile(r"(?P<name>[\w.-]+(?:/[\w.-]+)?)(?::(?P<part>[^@]+))?(?:@(?P<split>.+))?")
SPACE = re.compile(r"[ \t\r\n]*")  # what JSON takes for space


class Place(NamedTuple):
    """Where a row stands: "train.jsonl, line 3"."""

    file: str
    unit: str
    number: int

    def __str__(self) -> str:
        return f"{self.file}, {self.unit} {self.number}"


class Hub(NamedTuple):
    """How a data set on the hub is laid out, where that is not the usual way."""

    config: str | None = None
    """Taken where the name gives none."""
    folders: bool = False
    """What the name calls a configuration is a folder of the data set."""
    revision: str | None = None
    """Branch with the files that can be read."""


USUAL = Hub()


class Located(NamedTuple):
    """A row and its place; of a row that cannot be read, what is wrong with it."""

    place: Place
    row: Row
    problem: str = ""


def load_rows(source: str | Path, split: str | None = None) -> list[Row]:
    """Every row of the source as a dictionary, in order; of a split source the train part, unless
    `split` names another.

    Raises DataError for a source that is missing, empty or not readable, naming file and line.
    """
    rows = []
    for place, row, problem in iter_rows(source, [split] if split else ()):
        if problem:
            raise DataError(f"{place}: {problem}")
        rows.append(row)
    return rows


def iter_rows(
    source: str | Path,
    splits: Sequence[str] = (),
    limit: int | None = None,
    hub: Hub = USUAL,
) -> Iterator[Located]:
    """The rows one after the other, the first `limit`, each with its place. A line that is no row
    is yielded with its problem.

    splits: the parts of a split source to look for, the first that is there is taken (else
    "train"). hub: of a hub name. Raises DataError as `load_rows`.
    """
    path = Path(source).expanduser()
    if path.is_dir():
        rows = (row for file in _files(path, splits) for row in _file_rows(file))
    elif path.is_file():
        rows = _file_rows(path)
    elif is_path(str(source)):
        raise DataError(f"{source}: no such file or folder (looked in {Path.cwd()}).")
    else:
        rows = _hub_rows(str(source), splits, limit, hub)
    empty = True
    for row in islice(rows, limit):
        empty = False
        yield row
    if empty:
        raise DataError(f"{source}: no row in it. Give a data set with at least one.")


def is_path(source: str) -> bool:
    """Whether the source can only be meant as a file or folder, there or not."""
    return (
        source.startswith((".", "/", "~"))
        or source.endswith((*SUFFIXES, "/"))
        or "\\" in source
        or re.match(r"[A-Za-z]:/", source) is not None
        or not HUB_NAME.fullmatch(source)
    )


def hub_name(source: str | Path) -> str | None:
    """owner/name where the source is a data set on the hub, else None."""
    there = Path(source).expanduser().exists()
    return None if there or is_path(str(source)) else HUB_NAME.fullmatch(str(source))["name"]


def short_name(source: str | Path) -> str:
    """What a source is called in the name of a folder: hh.jsonl.gz -> hh, owner/set:test -> set,
    owner/set:main@test -> set-main."""
    name = hub_name(source)
    if name is None:
        last = Path(source).expanduser().absolute().name
        suffix = max((s for s in SUFFIXES if last.endswith(s)), key=len, default="")
        return last.removesuffix(suffix) or "data"
    part = HUB_NAME.fullmatch(str(source))["part"]
    config = [] if part is None or SPLIT_NAME.fullmatch(part) else [part]
    return re.sub(r"[^\w.-]", "-", "-".join([name.rpartition("/")[2], *config]))


# --- files -----------------------------------------------------------------------------------


def _files(folder: Path, wanted: Sequence[str]) -> list[Path]:
    """The data files of one split, or all of them where no name mentions a split."""
    files = sorted(f for f in folder.rglob("*") if f.name.endswith(SUFFIXES) and f.is_file())
    if not files:
        raise DataError(f"{folder}: no data file in this folder. Read are {', '.join(SUFFIXES)}.")
    splits: dict[str, list[Path]] = {}
    for file in files:
        parts = reversed(file.relative_to(folder).parts)  # the folder's own name says nothing
        match = next(filter(None, map(SPLIT.match, parts)), None)
        splits.setdefault(match[1] if match else "", []).append(file)
    if set(splits) == {""} and "train" in (wanted or ["train"]):
        return files
    for split in wanted or ["train"]:
        if split in splits:
            return splits[split]
    found = ", ".join(file.relative_to(folder).as_posix() for file in files[:8])
    raise DataError(
        f"{folder}: no file of the {' or '.join(wanted) or 'train'} split. Found: {found}. Name "
        "one file instead of the folder."
    )


def _file_rows(file: Path) -> Iterator[Located]:
    """The rows of one file, whatever its format."""
    if not file.name.endswith(SUFFIXES):
        raise DataError(f"{file}: not a known kind of data file. Read are {', '.join(SUFFIXES)}.")
    kind = file.name.removesuffix(".gz").rpartition(".")[2]
    readers = {"parquet": _parquet_rows, "jsonl": _json_lines, "json": _json_rows,
               "csv": _csv_rows, "tsv": _csv_rows}  # fmt: skip
    try:
        yield from readers[kind](file)
    except UnicodeDecodeError as error:
        raise DataError(f"{file}: not UTF-8 text ({error}). Convert the file.") from error
    except (OSError, EOFError, gzip.zlib.error) as error:
        raise DataError(f"{file}: cannot be read ({error}).") from error


def _open(file: Path, newline: str | None = None):
    opener = gzip.open if file.suffix == ".gz" else open
    # -sig: Windows may put a mark in front
    return opener(file, "rt", encoding="utf-8-sig", newline=newline)


def _json_rows(file: Path) -> Iterator[Located]:
    """One JSON list of rows, or JSON lines, which is told from the first character."""
    with _open(file) as text:
        start = ""
        while block := text.read(4096):
            start = block.lstrip()[:1]
            if start:
                break
    yield from _json_list(file) if start == "[" else _json_lines(file)


def _json_lines(file: Path) -> Iterator[Located]:
    with _open(file) as lines:
        for i, line in enumerate(lines):
            if line.strip():
                place = Place(str(file), "line", i + 1)
                try:
                    yield _row(json.loads(line), place)
                except (json.JSONDecodeError, RecursionError) as error:
                    yield Located(place, {}, f"not valid JSON ({error}).")


def _json_list(file: Path) -> Iterator[Located]:
    """The rows of one list, parsed one by one."""
    with _open(file) as lines:
        text = lines.read()
    decode, end = json.JSONDecoder().raw_decode, len(text.rstrip())
    at, number = SPACE.match(text, text.index("[") + 1).end(), 0
    try:
        while number or text[at : at + 1] != "]":  # only an empty list ends here
            value, at = decode(text, at)
            number += 1
            yield _row(value, Place(str(file), "row", number))
            at = SPACE.match(text, at).end()
            if text[at : at + 1] == "]":
                break
            if text[at : at + 1] != ",":
                raise json.JSONDecodeError("Expecting ',' delimiter", text, at)
            at = SPACE.match(text, at + 1).end()
        if at + 1 != end:
            raise json.JSONDecodeError("Extra data", text, at + 1)
    except (json.JSONDecodeError, RecursionError) as error:
        raise DataError(f"{file}: not valid JSON ({error}).") from error


def _row(value: object, place: Place) -> Located:
    if not isinstance(value, dict):
        return Located(place, {}, 'not a row: every row is an object {"field": value, …}.')
    return Located(place, value)


def _csv_rows(file: Path) -> Iterator[Located]:
    """Rows under a header; every value is a text. Quoted texts may run over several lines."""
    csv.field_size_limit(1 << 30)  # 131,072 characters unless told
    tabs = ".tsv" in file.suffixes
    with _open(file, newline="") as lines:
        cells = csv.reader(lines, delimiter="\t" if tabs else ",", strict=True)
        try:
            header = next(cells, [])
            if len(set(header)) < len(header):
                raise DataError(f"{file}: two columns have one name: {', '.join(header)}.")
            begins = cells.line_num + 1
            for values in cells:
                place, begins = Place(str(file), "line", begins), cells.line_num + 1
                if len(values) == len(header):
                    yield Located(place, dict(zip(header, values, strict=True)))
                elif values:  # an empty line is none
                    found = f"{len(values)} columns where the header has {len(header)}"
                    yield Located(place, {}, f"{found}. Put texts with commas into quotes.")
        except csv.Error as error:
            raise DataError(
                f"{file}, line {cells.line_num}: not readable as CSV ({error})."
            ) from error


def _parquet_rows(file: Path) -> Iterator[Located]:
    import pyarrow.parquet  # comes with datasets; slow to import, and few runs need it

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(file) as content:
            for batch in content.iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    number += 1
                    yield Located(Place(str(file), "row", number), row)
    except pyarrow.ArrowException as error:
        raise DataError(f"{file}: not a readable parquet file ({error}).") from error


# --- the hub ---------------------------------------------------------------------------------


def _hub_rows(source: str, splits: Sequence[str], limit: int | None, hub: Hub) -> Iterator[Located]:
    """With a limit the rows are streamed, so that only as much is fetched as is read."""
    match = HUB_NAME.fullmatch(source)
    part, wanted = match["part"], [match["split"]] if match["split"] else splits or ["train"]
    ways = [(part or hub.config, split) for split in wanted]
    if part and not match["split"]:  # NAME:PART, a configuration or a split
        ways.insert(0 if SPLIT_NAME.fullmatch(part) else len(ways), (hub.config, part))
    streamed = limit is not None and not any("[" in split for _, split in ways)
    more = {"streaming": True} if streamed else {}
    more |= {"revision": hub.revision} if hub.revision else {}
    for config, split in ways:
        folder = {"data_dir": config} if config and hub.folders else {}
        name = None if folder else config
        try:
            import datasets

            rows = datasets.load_dataset(match["name"], name, split=split, **folder, **more)
            break
        except Exception as error:  # the hub client raises errors of many libraries
            if isinstance(error, ValueError) and (config, split) != ways[-1]:
                continue  # no such configuration, or no such split
            raise _unreachable(source, error) from error
    try:  # what is streamed is fetched here
        for i, row in enumerate(rows):
            yield Located(Place(source, "row", i + 1), row)
    except Exception as error:
        raise _unreachable(source, error) from error


def _unreachable(source: str, error: Exception) -> DataError:
    return DataError(
        f"{source}: there is no such file or folder here, and it could not be loaded from the "
        f"Hugging Face hub ({type(error).__name__}: {_first_line(error)}). Check the name, its "
        "configuration and split (NAME:CONFIG@SPLIT or NAME:SPLIT). Without a network (or with "
        "HF_HUB_OFFLINE=1) only data sets in the cache can be named; where the hub is blocked, "
        "set HF_ENDPOINT to a mirror of it."
    )


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "no message")
