"""A manuscript made into a notebook: for students with blanks, or with the solutions.

Nothing here depends on the clock, the machine or chance. A cell's id is made of its own text (an
exercise's of its name), so that an edit in one place leaves the ids of all other cells alone.
"""

from __future__ import annotations

import hashlib
import textwrap
from collections import Counter
from collections.abc import Mapping
from typing import TYPE_CHECKING

from rlhf_course.coursework import execute, exercises, project, source
from rlhf_course.coursework.manuscript import Directive, Manuscript, file_name

if TYPE_CHECKING:
    from nbformat import NotebookNode

    from rlhf_course.coursework.variant_forms import Variant

CHAPTERS, SOLUTIONS = "chapters", "solutions"
"""The two editions, which are the names of their folders too."""

BOOT = """\
# Installs the course where it is missing, as in Colab; anywhere else it does nothing.
from importlib.util import find_spec

DRIVE = False  # In Colab: True keeps what you train in your Google Drive, for the next session.

if find_spec("rlhf_course") is None:
    %pip install --quiet --no-deps "{requirement}"

from rlhf_course.coursework import boot

boot.start(drive=DRIVE)

from rlhf_course import check, lab
"""
BADGE = f"[![Open in Colab]({project.COLAB}/assets/colab-badge.svg)]"
HEADING = "\n## "
"""The boot cell stands before the opening's last one."""
FILE = "](repository:"
"""In prose, `[text](repository:rlhf_course/ppo.py)` links to a file of the repository."""
GIVEN = """\
{story}
from rlhf_course.coursework import variants

{name} = variants.usual_form({name}, "{variant}")
"""
ALWAYS = ("math", "torch", "torch.nn.functional as F")
"""Imported beside what the solutions need: another right answer may need them."""
METADATA = {
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
    "language_info": {"file_extension": ".py", "mimetype": "text/x-python", "name": "python"},
}


def build(
    manuscript: Manuscript, edition: str, chosen: Mapping[str, Variant | None] | None = None
) -> NotebookNode:
    """The notebook of one edition, not executed.

    chosen: exercise id -> the variant to be printed in its place (`variants.choose`).
    """
    import nbformat

    chosen = {e.id: (chosen or {}).get(e.id) for e in manuscript.exercises}
    opening, *rest = manuscript.parts
    first, heading, second = opening.source.rpartition(HEADING)
    published = not any(chosen.values())
    cells = [_opening(manuscript, first or second, edition, published), _boot()]
    if manuscript.exercises:
        lines = source.imports(list(chosen), ALWAYS, chosen)
        cells.append(_code(f"# What the exercises of this chapter are made of.\n{lines}"))
    if heading:  # so that no heading is torn from what stands under it
        cells.append(_markdown(heading + second))
    for part in rest:
        if isinstance(part, Directive):
            cells += _exercise(manuscript, part, edition, chosen[part.exercise.id])
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
    return _code(BOOT.format(requirement=project.requirement()), id=execute.BOOT)


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


def _opening(manuscript: Manuscript, text: str, edition: str, published: bool) -> NotebookNode:
    """The first cell, with the ways out of the notebook below its title.

    A chapter with variants is not published: Colab has another one, and students have no solutions.
    """
    title, _, rest = text.partition("\n")
    chapter, ways = manuscript.chapter, []
    if published:
        ways.append(f"{BADGE}({project.colab(f'{edition}/{manuscript.stem}.ipynb')})")
    if chapter > 0:
        ways.append(f"← {_link(chapter - 1, edition)}")
    if chapter + 1 < len(exercises.STEMS):
        ways.append(f"{_link(chapter + 1, edition)} →")
    if published or edition == SOLUTIONS:
        label = "with solutions" if edition == CHAPTERS else "without solutions"
        ways.append(f"[this chapter {label}]({_other(manuscript, edition)})")
    return _markdown(f"{title}\n\n{' · '.join(ways)}\n\n{rest.strip()}", id="opening")


def _other(manuscript: Manuscript, edition: str) -> str:
    """The way to the same notebook in the other edition."""
    return f"../{SOLUTIONS if edition == CHAPTERS else CHAPTERS}/{manuscript.stem}.ipynb"


# ------------------------------------------------------------------------------------ exercises


def _exercise(
    manuscript: Manuscript, part: Directive, edition: str, variant: Variant | None
) -> list[NotebookNode]:
    """Header, function, check, and hints with the link to the other edition.

    Behind a variant stands what makes its function the one that the rest of the chapter calls.
    """
    exercise = part.exercise
    written = source.blank if edition == CHAPTERS else source.solved
    name = exercise.qualname.replace(".", "-")
    other = variant is not None and not variant.usual
    asked = f', variant="{variant.name}"' if other else ""
    cells = [
        _markdown(_header(part, variant), id=f"header-{name}"),
        _code(
            written(exercise.id, variant),
            id=f"exercise-{name}",
            nbgrader=_nbgrader(name, solution=True),
        ),
        _code(
            f"check({exercise.name}{asked})",
            id=f"check-{name}",
            nbgrader=_nbgrader(f"check-{name}", points=exercise.points),
        ),
        _markdown(_hints(manuscript, part, edition, variant), id=f"hints-{name}"),
    ]
    if other:
        story = f"Given. From here on `{exercise.name}` {variant.after}."
        story = textwrap.fill(story, source.WIDTH, initial_indent="# ", subsequent_indent="# ")
        text = GIVEN.format(story=story, name=exercise.name, variant=variant.name)
        cells.append(_code(text, id=f"given-{name}"))
    return cells


def _heading(part: Directive) -> str:
    return f"Exercise {part.number}: {part.exercise.qualname}"


def _header(part: Directive, variant: Variant | None) -> str:
    exercise = part.exercise
    points = "1 point" if exercise.points == 1 else f"{exercise.points} points"
    asked = f"\n\n**In this version:** {variant.says}" if variant else ""
    return (
        f"### {_heading(part)}\n\n"
        f"difficulty {dots(exercise.difficulty)} · importance {dots(exercise.importance)} · "
        f"about {exercise.minutes} minutes · {points}{asked}"
    )


def dots(level: int) -> str:
    """3 -> ●●●○○"""
    return "●" * level + "○" * (5 - level)


def _hints(manuscript: Manuscript, part: Directive, edition: str, variant: Variant | None) -> str:
    """Each hint folded; Markdown within HTML needs the empty lines."""
    folded = [
        f"<details><summary>Hint {count}</summary>\n\n{hint}\n\n</details>"
        for count, hint in enumerate((variant and variant.hints) or part.hints, 1)
    ]
    if variant and edition == CHAPTERS:
        return "\n\n".join(folded)
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
