"""A manuscript made into a notebook: for students with blanks, or with the solutions.

Nothing here depends on the clock, the machine or chance. A cell's id is made of its own text (an
exercise's of its name), so that an edit in one place leaves the ids of all other cells alone.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from typing import TYPE_CHECKING

from rlhf_course.coursework import exercises, project, source
from rlhf_course.coursework.manuscript import Directive, Manuscript, file_name

if TYPE_CHECKING:
    from nbformat import NotebookNode

CHAPTERS, SOLUTIONS = "chapters", "solutions"
"""The two editions, which are the names of their folders too."""

BOOT = """\
# Installs the course where it is missing, as in Colab; anywhere else it does nothing.
from importlib.util import find_spec

if find_spec("rlhf_course") is None:
    %pip install --quiet "{requirement}"

from rlhf_course import check, lab
"""
BADGE = f"[![Open in Colab]({project.COLAB}/assets/colab-badge.svg)]"
HEADING = "\n## "
"""The boot cell stands before the opening's last one."""
FILE = "](repository:"
"""In prose, `[text](repository:rlhf_course/ppo.py)` links to a file of the repository."""
ALWAYS = ("math", "torch", "torch.nn.functional as F")
"""Imported beside what the solutions need: another right answer may need them."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}


def build(manuscript: Manuscript, edition: str) -> NotebookNode:
    """The notebook of one edition, not executed."""
    import nbformat

    opening, *rest = manuscript.parts
    first, heading, second = opening.source.rpartition(HEADING)
    cells = [_opening(manuscript, first or second, edition), _boot()]
    if manuscript.exercises:
        lines = source.imports([exercise.id for exercise in manuscript.exercises], ALWAYS)
        cells.append(_code(f"# What the exercises of this chapter are made of.\n{lines}"))
    if heading:  # so that no heading is torn from what stands under it
        cells.append(_markdown(heading + second))
    for part in rest:
        if isinstance(part, Directive):
            cells += _exercise(manuscript, part, edition)
        elif part.kind == "code":
            cells.append(_code(part.source, tags=part.tags))
        else:
            cells.append(_markdown(part.source, tags=part.tags))
    if manuscript.chapter + 1 < len(exercises.STEMS):
        cells.append(_markdown(f"Next: {_link(manuscript.chapter + 1, edition)}"))
    _tell_twins_apart(cells)
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=METADATA)
    notebook.nbformat_minor = 5
    nbformat.validate(notebook)
    return notebook


def write(notebook: NotebookNode) -> bytes:
    """The notebook as the bytes of its file, the same on every machine."""
    import nbformat

    return (nbformat.writes(notebook).rstrip("\n") + "\n").encode("utf-8")


# ---------------------------------------------------------------------------------------- cells


def _markdown(text: str, id: str = "", tags: tuple[str, ...] = ()) -> NotebookNode:
    from nbformat.v4 import new_markdown_cell

    metadata = {"tags": list(tags)} if tags else {}
    text = text.strip("\n").replace(FILE, f"]({project.file('')}")
    return new_markdown_cell(text, id=id or _id("markdown", text), metadata=metadata)


def _code(text: str, id: str = "", tags: tuple[str, ...] = (), **metadata) -> NotebookNode:
    from nbformat.v4 import new_code_cell

    if tags:
        metadata["tags"] = list(tags)
    text = text.strip("\n")
    return new_code_cell(text, id=id or _id("code", text), metadata=metadata)


def _boot() -> NotebookNode:
    return _code(BOOT.format(requirement=project.requirement()), id="boot")


def _id(kind: str, text: str) -> str:
    return hashlib.sha256(f"{kind}\n{text}".encode()).hexdigest()[:12]


def _tell_twins_apart(cells: list[NotebookNode]) -> None:
    """A text that comes again has the same id; the second one is numbered."""
    seen: Counter[str] = Counter()
    for cell in cells:
        seen[cell.id] += 1
        if seen[cell.id] > 1:
            cell.id = f"{cell.id}-{seen[cell.id]}"


def _link(chapter: int, edition: str, folder: str = "") -> str:
    return f"[Chapter {chapter}: {exercises.STEMS[chapter]}]({folder}{file_name(chapter)}.ipynb)"


def _opening(manuscript: Manuscript, text: str, edition: str) -> NotebookNode:
    """The first cell, with the ways out of the notebook below its title."""
    title, _, rest = text.partition("\n")
    chapter, ways = manuscript.chapter, []
    ways.append(f"{BADGE}({project.colab(f'{edition}/{manuscript.stem}.ipynb')})")
    if chapter > 0:
        ways.append(f"← {_link(chapter - 1, edition)}")
    if chapter + 1 < len(exercises.STEMS):
        ways.append(f"{_link(chapter + 1, edition)} →")
    label = "with solutions" if edition == CHAPTERS else "without solutions"
    ways.append(f"[this chapter {label}]({_other(manuscript, edition)})")
    return _markdown(f"{title}\n\n{' · '.join(ways)}\n\n{rest.strip()}", id="opening")


def _other(manuscript: Manuscript, edition: str) -> str:
    """The way to the same notebook in the other edition."""
    return f"../{SOLUTIONS if edition == CHAPTERS else CHAPTERS}/{manuscript.stem}.ipynb"


# ------------------------------------------------------------------------------------ exercises


def _exercise(manuscript: Manuscript, part: Directive, edition: str) -> list[NotebookNode]:
    """Header, function, check, and hints with the link to the other edition."""
    exercise = part.exercise
    text = source.blank(exercise.id) if edition == CHAPTERS else source.solved(exercise.id)
    name = exercise.qualname.replace(".", "-")
    return [
        _markdown(_header(part), id=f"header-{name}"),
        _code(text, id=f"exercise-{name}", nbgrader=_nbgrader(name, solution=True)),
        _code(
            f"check({exercise.name})",
            id=f"check-{name}",
            nbgrader=_nbgrader(f"check-{name}", points=exercise.points),
        ),
        _markdown(_hints(manuscript, part, edition), id=f"hints-{name}"),
    ]


def _heading(part: Directive) -> str:
    return f"Exercise {part.number}: {part.exercise.qualname}"


def _header(part: Directive) -> str:
    exercise = part.exercise
    points = "1 point" if exercise.points == 1 else f"{exercise.points} points"
    return (
        f"### {_heading(part)}\n\n"
        f"difficulty {dots(exercise.difficulty)} · importance {dots(exercise.importance)} · "
        f"about {exercise.minutes} minutes · {points}"
    )


def dots(level: int) -> str:
    """3 -> ●●●○○"""
    return "●" * level + "○" * (5 - level)


def _hints(manuscript: Manuscript, part: Directive, edition: str) -> str:
    """Each hint folded; Markdown within HTML needs the empty lines."""
    folded = [
        f"<details><summary>Hint {count}</summary>\n\n{hint}\n\n</details>"
        for count, hint in enumerate(part.hints, 1)
    ]
    label = "The solution" if edition == CHAPTERS else "The exercise, to be solved"
    place = f"{_other(manuscript, edition)}#{_heading(part).replace(' ', '-')}"
    return "\n\n".join([*folded, f"[{label}]({place})"])


def _nbgrader(id: str, solution: bool = False, points: int | None = None) -> dict:
    """What nbgrader needs to know: an answer to be written, or a locked test worth points."""
    entry = {
        "grade": not solution,
        "grade_id": id,
        "locked": not solution,
        "schema_version": 3,
        "solution": solution,
        "task": False,
    }
    return entry | ({} if points is None else {"points": points})
