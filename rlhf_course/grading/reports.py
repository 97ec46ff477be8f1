"""Reports: for a student in Markdown and HTML, for an instructor as a table and as CSV.

A student reads points, properties and sentences; never an input, an expected value, a seed, or
anything of the grader's own. What the student wrote is shown, but never as markup.
"""

from __future__ import annotations

import csv as comma_separated
import io
import re
from collections.abc import Sequence

from rich.box import SIMPLE_HEAD
from rich.table import Table
from rich.text import Text

from rlhf_course.coursework.exercises import EXERCISES, STEMS
from rlhf_course.grading.results import ExerciseResult, PropertyResult, SubmissionResult
from rlhf_course.grading.wording import (
    CORE,
    FAILED,
    FAILS,
    HOLDS,
    LONGEST,
    line,
    opening,
    out_of,
    plain,
    points,
    sentences,
    total,
    verdict,
)  # fmt: skip

# ---------------------------------------------------------------------------------------- Markdown


def prose(text: str) -> str:
    """Words of ours, inside a line, as Markdown that means nothing but these words.

    The second rule is for what GitHub turns into links by itself.
    """
    text = re.sub(r"([\\`*_{}\[\]<>#&|~!@$])", r"\\\1", line(text, LONGEST))
    return re.sub(r"(?i)(?<=www)\.|:(?=//)", r"\\\g<0>", text)


def code(text: str, indent: str = "") -> str:
    """Words of a student's as Markdown: a code span, or a block where there are several lines.

    Within code nothing is markup, not even a bare address; the fence is longer than any inside.
    """
    text = plain(text).strip()
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    if "\n" in text:
        fence = "`" * max(3, longest + 1)
        return "\n".join(indent + part for part in [fence + "text", *text.split("\n"), fence])
    fence = "`" * (longest + 1)
    pad = " " if text.startswith("`") or text.endswith("`") else ""
    return f"{indent}{fence}{pad}{text}{pad}{fence}" if text else f"{indent}(nothing)"


def markdown(result: SubmissionResult) -> str:
    """What a student reads, as Markdown (CommonMark and GitHub's tables)."""
    parts = [f"# {code(line(result.name))}: {out_of(total(result), result.max_score)}"]
    if result.failure:
        parts.append(f"**{prose(FAILED)}**")
    parts.append(_files(result))
    if not result.failure:
        parts.append(_overview(result))
        for chapter in result.chapters:
            parts.append(f"## Chapter {chapter}: {STEMS[chapter]}".replace("_", " "))
            parts += [_exercise(each) for each in result.exercises if each.chapter == chapter]
    parts.append(f"Graded by rlhf-course {prose(result.version)}.")
    return "\n\n".join(part for part in parts if part) + "\n"


def _files(result: SubmissionResult) -> str:
    rows = [f"- Read: {code(line(name))}" for name in result.files]
    rows += [f"- Problem: {code(line(problem, LONGEST))}" for problem in result.problems]
    return "\n".join(rows)


def _overview(result: SubmissionResult) -> str:
    rows = ["| chapter | exercise | points | |", "| ---: | :--- | ---: | :--- |"]
    for each in result.exercises:
        score = f"{points(each.score)} of {each.points}"
        rows.append(f"| {each.chapter} | `{each.exercise}` | {score} | {verdict(each)} |")
    return "\n".join(rows)


def _exercise(exercise: ExerciseResult) -> str:
    parts = [f"### `{exercise.exercise}`: {out_of(exercise.score, exercise.points)}"]
    own = opening(exercise)
    parts.append(code(own) if exercise.says else own)
    parts.append("\n".join(_property(*each) for each in sentences(exercise)))
    if exercise.mistake:
        parts.append(f"It looks like a known mistake: **{prose(exercise.mistake)}**")
    return "\n\n".join(part for part in parts if part)


def _property(each: PropertyResult, told: str) -> str:
    needed = f" ({CORE})" if each.core and not each.passed else ""
    head = f"- {HOLDS if each.passed else FAILS} {prose(each.title)}{needed}"
    return f"{head}\n\n{code(told, '  ')}\n" if told else head


# ------------------------------------------------------------------------------------------- pages


def html(result: SubmissionResult) -> str:
    """What a student reads, as one HTML file that needs nothing beside it."""
    from rlhf_course.grading.page import page  # it imports matplotlib, which no other report needs

    return page(result)


# --------------------------------------------------------------------------- for the instructor


def by_chapter(result: SubmissionResult) -> dict[int, tuple[float, int]]:
    """Chapter -> (points earned, points there are)."""
    found: dict[int, tuple[float, int]] = {}
    for each in result.exercises:
        score, most = found.get(each.chapter, (0.0, 0))
        found[each.chapter] = (round(score + each.score, 2), most + each.points)
    return found


def summary_table(results: Sequence[SubmissionResult]) -> Table:
    """One row a student, one column a chapter, for the terminal; eight chapters fit 80 columns."""
    most = {
        chapter: there for result in results for chapter, (_, there) in by_chapter(result).items()
    }
    table = Table(title="Points by chapter", box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column("student", overflow="fold")
    for chapter in sorted(most):
        table.add_column(f"{chapter}\n/{most[chapter]}", justify="right", no_wrap=True)
    table.add_column("total", justify="right", no_wrap=True)
    for result in results:
        scores = {} if result.failure else by_chapter(result)
        cells = [_score(*scores[key]) if key in scores else Text("–") for key in sorted(most)]
        whole = f"{points(result.score)} of {points(result.max_score)}"
        last = Text("not graded", style="red") if result.failure else Text(whole)
        table.add_row(Text(line(result.name, 60)), *cells, last)  # Text: no markup is read in it
    failures = [f"{line(r.name, 60)}: {line(r.failure)}" for r in results if r.failure]
    table.caption = Text("\n".join(failures), style="red") if failures else None
    return table


def _score(score: float, most: float) -> Text:
    return Text(points(score), style="green" if score >= most else "" if score else "red")


def csv(results: Sequence[SubmissionResult]) -> str:
    """One row a student: total, chapters, exercises with their status, and how it was graded.

    What does not count for a student is empty. Text that a spreadsheet would take for a formula
    gets an apostrophe in front.
    """
    seen = {each.exercise for result in results for each in result.exercises}
    exercises = [exercise.id for exercise in EXERCISES if exercise.id in seen]
    chapters = sorted({chapter for result in results for chapter in result.chapters})
    head = ["student", "score", "max_score"]
    head += [f"chapter {chapter}" for chapter in chapters]
    head += [column for id in exercises for column in (id, f"{id} status")]
    head += ["problems", "failure", "seconds", "seed", "variant", "version", "isolation"]
    stream = io.StringIO()
    writer = comma_separated.writer(stream, lineterminator="\n")
    writer.writerow(head)
    for result in results:
        row = [result.name, "" if result.failure else result.score, result.max_score]
        scores = by_chapter(result)
        row += [scores[chapter][0] if chapter in scores else "" for chapter in chapters]
        found = {each.exercise: (each.score, each.status) for each in result.exercises}
        row += [cell for id in exercises for cell in found.get(id, ("", ""))]
        row += ["; ".join(result.problems), result.failure, round(result.seconds, 1)]
        row += [result.seed, "" if result.variant is None else result.variant, result.version]
        row.append(", ".join(result.isolation))
        writer.writerow([_cell(value) for value in row])
    return stream.getvalue()


def _cell(value: object) -> object:
    if not isinstance(value, str):
        return value
    text = line(value, LONGEST)
    return "'" + text if text[:1] in ("=", "+", "-", "@") else text
