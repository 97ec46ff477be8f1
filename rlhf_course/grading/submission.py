"""The files of a submission, as bytes: what is graded, found on disk and never looked into.

This runs in the referee, on folders that strangers packed. Only regular files that lie in the
folder itself are opened, links are not followed, and nothing is read that is too large.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path

from rlhf_course.errors import DataError

SUFFIXES = (".ipynb", ".py")
MOST_FILES = 100
MOST_ENTRIES = 20_000
"""Of all kinds: somebody may have packed a whole disk."""
DEEPEST = 12
FILE_BYTES = 32 << 20
TOTAL_BYTES = 60 << 20  # below what crosses to the reader in one message
MOST_PROBLEMS = 50

OUT_FILES = {"grading.json", "summary.csv", "junit.xml"}
"""Beside the students' folders; no student can be called so."""
PASSED_OVER = {"__pycache__", "__MACOSX", "node_modules", "site-packages", "venv", "env"}
COURSE = {"rlhf_course", "solutions", "manuscript", "tests", "benchmarks", "examples", "docs"}
"""Beside `rlhf_course` these are the course's own: somebody handed in the whole repository."""


@dataclass(frozen=True)
class Submission:
    """What one student handed in."""

    name: str
    """Of the file, without its ending, or of the folder; fit to be a file's name."""
    files: dict[str, bytes]
    """By the names below the folder, with "/", all of them printable."""
    problems: tuple[str, ...]
    """A sentence for everything that was not read and might have been meant to be."""


def expand(paths: Iterable[Path]) -> list[Path]:
    """The submissions that are meant: each file, each folder with files of its own, and for a
    folder that holds nothing but folders, as of a class, each of those.

    Raises DataError for a path that is not there, and for one that holds nothing to grade.
    """
    found: list[Path] = []
    for path in map(Path, paths):
        if not os.path.lexists(path):
            raise DataError(f"{path}: not there. Name notebooks, .py files or folders of them.")
        if path.is_symlink() or not path.is_dir():
            if not path.is_symlink() and path.suffix.lower() not in SUFFIXES:
                raise DataError(
                    f"{path}: neither a notebook nor a .py file. Name one, or a folder."
                )
            found.append(path)
            continue
        try:
            entries = sorted(os.scandir(path), key=lambda entry: entry.name)
        except OSError as error:
            raise DataError(f"{path}: cannot be read ({error.strerror}).") from None
        folders = [Path(e.path) for e in entries if _is_student(e)]
        own = any(_is_meant(e.name) and not e.is_dir() for e in entries)
        if own or {"chapters", "rlhf_course"} & {folder.name for folder in folders}:
            found.append(path)
        elif folders:
            found += folders
        else:
            raise DataError(f"{path}: nothing to grade in it. Name a folder of notebooks.")
    if not found:
        raise DataError("nothing to grade. Name notebooks, .py files or folders of them.")
    return found


def _is_student(entry: os.DirEntry) -> bool:
    """True for a folder of a class; a link is one, too, so that its owner learns of it."""
    hidden = entry.name.startswith(".") or entry.name in PASSED_OVER
    return not hidden and (entry.is_dir(follow_symlinks=False) or entry.is_symlink())


def names(paths: Sequence[Path]) -> list[str]:
    """A name for each submission: no two are alike, whatever the case of their letters."""
    taken = set(OUT_FILES)
    out = []
    for path in paths:
        plain = name = name_of(path)
        number = 2
        while name.casefold() in taken:
            name, number = f"{plain}-{number}", number + 1
        taken.add(name.casefold())
        out.append(name)
    return out


def name_of(path: Path) -> str:
    """What a submission is called: fit for a file's name on every system."""
    absolute = Path(os.path.abspath(path))  # of ".", too
    named = absolute.stem if absolute.suffix.lower() in SUFFIXES else absolute.name
    kept = "".join(c if c.isalnum() or c in "-_.+@ ()" else "_" for c in _printable(named))
    return kept.strip(". ").encode()[:80].decode(errors="ignore") or "submission"


def find(path: Path, name: str = "") -> Submission:
    """Read a submission: a .ipynb or .py file, or a folder of them, however deep.

    name: what to call it, if not by its path (`names`). What must not or cannot be read is a
    problem of the submission. Raises DataError where there is nothing at this path at all.
    """
    if not os.path.lexists(path):
        raise DataError(f"{path}: not there. Name a notebook, a .py file or a folder of them.")
    reading = _Reading()
    called = _printable(path.name) or "submission"
    if path.is_symlink():
        reading.refuse(called, "it is a link, which is not followed")
    elif path.is_dir():
        for relative, file in reading.listed(path):
            reading.take(relative, file)
    elif path.suffix.lower() in SUFFIXES:
        reading.take(called, path)
    else:
        reading.refuse(called, "it is neither a notebook nor a .py file")
    if not reading.files and not reading.problems:
        reading.problems.append("There is no notebook and no .py file in it.")
    return Submission(name or name_of(path), reading.files, tuple(reading.problems[:MOST_PROBLEMS]))


@dataclass
class _Reading:
    """A submission while it is read."""

    files: dict[str, bytes] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    total: int = 0

    def refuse(self, name: str, reason: str) -> None:
        self.problems.append(f"{name}: not read, because {reason}.")

    def listed(self, top: Path) -> list[tuple[str, Path]]:
        """The files of a folder that may be read, in the order of their printable names."""
        found: list[tuple[str, Path]] = []
        todo: list[tuple[Path, str, int]] = [(top, "", 0)]
        left = MOST_ENTRIES
        while todo and left > 0:
            folder, prefix, depth = todo.pop()
            try:
                with os.scandir(folder) as entries:
                    inside = list(islice(entries, left))
            except OSError as error:
                self.refuse(prefix or "the folder", _reason(error))
                continue
            left -= len(inside)
            for name, entry in self._meant(inside, prefix):
                if not entry.is_dir(follow_symlinks=False):
                    found.append((name, Path(entry.path)))
                elif depth < DEEPEST:
                    todo.append((Path(entry.path), f"{name}/", depth + 1))
                else:
                    self.refuse(f"{name}/", "it lies too deep")
        if left <= 0:
            self.problems.append(f"Of more than {MOST_ENTRIES} entries the rest was not read.")
        found.sort(key=lambda item: (item[0], os.fsencode(item[1])))
        if len(found) > MOST_FILES:
            self.problems.append(f"Of {len(found)} files only the first {MOST_FILES} were read.")
        return found[:MOST_FILES]

    def _meant(self, entries: list[os.DirEntry], prefix: str) -> Iterator[tuple[str, os.DirEntry]]:
        """The folders to look into and the files to read among a folder's entries."""
        held = {entry.name for entry in entries}
        left_out = COURSE if "rlhf_course" in held else set()
        if "pyvenv.cfg" in held:  # a virtual environment under any name
            return
        for entry in entries:
            name = prefix + _printable(entry.name)
            if entry.name.startswith(".") or entry.name in PASSED_OVER:
                continue
            if entry.is_symlink():
                self.refuse(name, "it is a link, which is not followed")
            elif not entry.is_dir(follow_symlinks=False):
                if _is_meant(entry.name):
                    yield name, entry
            elif entry.name in left_out:
                self.refuse(f"{name}/", "it is the course's own folder")
            else:
                yield name, entry

    def take(self, name: str, file: Path) -> None:
        """Read one file, or say why not."""
        try:
            data = _regular_bytes(file, TOTAL_BYTES - self.total)
        except OSError as error:
            self.refuse(name, _reason(error))
            return
        except ValueError as error:
            self.refuse(name, str(error))
            return
        self.total += len(data)
        stem, dot, suffix = name.rpartition(".")
        number = 2
        while name in self.files:  # two names that differ in what cannot be printed
            name, number = f"{stem} ({number}){dot}{suffix}", number + 1
        self.files[name] = data


def _regular_bytes(file: Path, left: int) -> bytes:
    """The content of a regular file. Raises OSError, and ValueError with the reason in words.

    left: how much all files together may still have. A file is asked what it is before it is
    opened, lest a pipe be, and again afterwards.
    """
    _require_regular(os.lstat(file), left)
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    handle = os.open(file, flags | getattr(os, "O_BINARY", 0))
    with open(handle, "rb") as opened:
        found = os.fstat(handle)
        _require_regular(found, left)
        return opened.read(found.st_size)  # no more, should it grow


def _require_regular(found: os.stat_result, left: int) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise ValueError("it is not a regular file")
    if found.st_size > FILE_BYTES:
        raise ValueError(f"it has more than {FILE_BYTES >> 20} MB")
    if found.st_size > left:
        raise ValueError(f"all files together may have {TOTAL_BYTES >> 20} MB")


def _is_meant(name: str) -> bool:
    """True for a file that may hold answers, by its name; tests do not."""
    name = name.lower()
    tests = name == "conftest.py" or (name.endswith(".py") and name.startswith("test_"))
    return name.endswith(SUFFIXES) and not name.startswith(".") and not tests


def _reason(error: OSError) -> str:
    return f"the system refuses ({error.strerror})"


def _printable(name: str) -> str:
    """A name with "?" for what cannot be printed: line ends, wrong bytes, marks that turn text."""
    return "".join(c if c.isprintable() else "?" for c in name)
