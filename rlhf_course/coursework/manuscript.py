"""A chapter's manuscript, read: prose, code, and the places where exercises stand.

`manuscript/NN_stem.py` is a jupytext percent file. One kind of cell is a directive: its comments
are the hints, a ladder of which each begins with "hint:".

    # %% exercise reward_model.pairwise_loss
    # hint: Which of the two differences is positive when the model is right?
    # hint: `F.logsigmoid` does not overflow.
"""

from __future__ import annotations

import ast
from dataclasses import dataclass
from pathlib import Path

from rlhf_course.coursework import exercises
from rlhf_course.errors import ConfigError

HINT = "hint:"
LONGEST_CELL, WIDEST_LINE = 20, 88  # of code that is not an exercise


@dataclass(frozen=True)
class Cell:
    """A markdown or code cell as the author wrote it."""

    kind: str
    source: str
    tags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Directive:
    """The place of an exercise."""

    exercise: exercises.Exercise
    number: str
    """Chapter and place in it: "3.2"."""
    hints: tuple[str, ...]


@dataclass(frozen=True)
class Manuscript:
    """One chapter."""

    chapter: int
    stem: str
    """File name without its ending: "03_reward_model"."""
    parts: tuple[Cell | Directive, ...]

    @property
    def exercises(self) -> list[exercises.Exercise]:
        """The exercises, in the order of the text."""
        return [part.exercise for part in self.parts if isinstance(part, Directive)]


def file_name(chapter: int) -> str:
    """A chapter's file name without its ending."""
    return f"{chapter:02d}_{exercises.STEMS[chapter]}"


def read(file: Path) -> Manuscript:
    """Read a manuscript. Raises ConfigError naming the cell that is wrong."""
    import jupytext

    chapter = _chapter(file)
    parts: list[Cell | Directive] = []
    for cell in jupytext.read(file, fmt="py:percent").cells:
        title = cell.metadata.get("title", "")
        where = f"{file.name}, the cell {(title or cell.source.partition(chr(10))[0])!r}"
        if title.split()[:1] == ["exercise"]:
            count = sum(isinstance(part, Directive) for part in parts)
            parts.append(_directive(title, cell.source, chapter, count + 1, where))
        elif title:
            raise ConfigError(f"{where}: a title may only be 'exercise ID'.")
        elif cell.source.strip():
            parts.append(Cell(cell.cell_type, cell.source, tuple(cell.metadata.get("tags", ()))))
            _check(parts[-1], where)
    _check_opening(parts, chapter, file)
    ids = [part.exercise.id for part in parts if isinstance(part, Directive)]
    if len(set(ids)) < len(ids):
        raise ConfigError(f"{file.name}: an exercise stands there twice, among {', '.join(ids)}.")
    return Manuscript(chapter, file.stem, tuple(parts))


def _chapter(file: Path) -> int:
    for chapter in range(len(exercises.STEMS)):
        if file.stem == file_name(chapter):
            return chapter
    raise ConfigError(f"{file}: no chapter of this name; they are {', '.join(exercises.STEMS)}.")


def _directive(title: str, source: str, chapter: int, count: int, where: str) -> Directive:
    try:
        exercise = exercises.find(title.partition(" ")[2].strip())
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from None
    if exercise.chapter != chapter:
        raise ConfigError(f"{where}: {exercise.id} belongs to chapter {exercise.chapter}.")
    hints: list[list[str]] = []
    for line in source.splitlines():
        if not line.startswith("#"):
            raise ConfigError(f"{where}: {line!r} is not a comment; only hints may stand there.")
        text = line[1:].removeprefix(" ")
        if text.startswith(HINT):
            hints.append([text.removeprefix(HINT).lstrip()])
        elif hints:
            hints[-1].append(text)
        elif text.strip():
            raise ConfigError(f"{where}: {text!r} stands before the first '# {HINT} …'.")
    texts = tuple("\n".join(lines).strip() for lines in hints)
    if not all(texts) or not 2 <= len(texts) <= 3:
        raise ConfigError(f"{where}: two or three hints are needed, none of them empty.")
    return Directive(exercise, f"{chapter}.{count}", texts)


def _check(cell: Cell, where: str) -> None:
    """Code must parse, and be short enough to be read at a glance."""
    if cell.kind == "markdown":
        return
    if cell.kind != "code":
        raise ConfigError(f"{where}: a cell is prose, [markdown], or code, not {cell.kind}.")
    lines = cell.source.splitlines()
    if len(lines) > LONGEST_CELL or max(map(len, lines)) > WIDEST_LINE:
        raise ConfigError(
            f"{where}: {len(lines)} lines, the widest of {max(map(len, lines))} characters; "
            f"at most {LONGEST_CELL} and {WIDEST_LINE}. Cut the cell, or move code to a module."
        )
    try:
        ast.parse(cell.source)
    except SyntaxError as error:
        raise ConfigError(f"{where}: {error}") from error


def _check_opening(parts: list, chapter: int, file: Path) -> None:
    opening = f"# Chapter {chapter}: "
    first = parts[0] if parts else None
    if not isinstance(first, Cell) or not first.source.startswith(opening):
        raise ConfigError(f"{file.name}: the first cell must be markdown and begin {opening!r}.")
