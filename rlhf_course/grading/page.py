"""A student's report as one HTML page; every text in it is escaped by `report.page.element`."""

from __future__ import annotations

from rlhf_course.coursework.exercises import STEMS
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
    points,
    sentences,
    total,
    verdict,
)  # fmt: skip
from rlhf_course.report.page import Html, document, element, join, paragraph, table

STYLE = """
.exercise { border-left: .3rem solid var(--line); padding: .1rem 0 .1rem 1rem; margin: 1.2rem 0;
  break-inside: avoid-page; }
.exercise h3 { margin: .2rem 0; overflow-wrap: anywhere; }
.exercise.good { border-left-color: #00714f; }
.exercise.bad { border-left-color: #b03a00; }
.properties { list-style: none; padding: 0; margin: .5rem 0; }
.properties li { padding: .15rem 0 .15rem 1.6rem; text-indent: -1.6rem; max-width: 46rem; }
.properties li > * { text-indent: 0; }
.properties li > .yes, .properties li > .no { display: inline-block; width: 1.6rem; }
.says { white-space: pre-wrap; overflow-wrap: anywhere; }
.properties .says { margin: .15rem 0 .4rem; padding: .3rem .7rem; border-radius: .4rem;
  background: var(--pale); }
.mistake { background: #fdf0e8; border-radius: .5rem; padding: .5rem .9rem; }
.points td:last-child, .points th:last-child { text-align: left; white-space: normal;
  min-width: 9rem; }
h1, li { overflow-wrap: anywhere; }
"""


def page(result: SubmissionResult) -> str:
    """The report as an HTML document that needs nothing beside it."""
    title = f"{line(result.name)}: {out_of(total(result), result.max_score)}"
    sections = [("points", "Points", _overview(result))]
    if not result.failure:
        for chapter in result.chapters:
            exercises = [_exercise(e) for e in result.exercises if e.chapter == chapter]
            name = f"Chapter {chapter}: {STEMS[chapter]}".replace("_", " ")
            sections.append((f"chapter-{chapter}", name, join(exercises)))
    sections.append(("files", "Files", _files(result)))
    return document(title, f"Graded by rlhf-course {line(result.version)}", sections, STYLE)


def _overview(result: SubmissionResult) -> Html:
    if result.failure:
        return element("p", FAILED, class_="mistake", role="alert")
    rows = [
        (
            element("a", each.exercise, href=f"#{each.exercise}"), each.chapter,
            f"{points(each.score)} of {each.points}", verdict(each),
        )
        for each in result.exercises
    ]  # fmt: skip
    return table(("exercise", "chapter", "points", "how it went"), rows, class_="points")


def _exercise(exercise: ExerciseResult) -> Html:
    good = exercise.score >= exercise.points
    title = f"{exercise.exercise}: {out_of(exercise.score, exercise.points)}"
    parts = [element("h3", title), element("p", opening(exercise), class_="says")]
    if items := [_property(*each) for each in sentences(exercise)]:
        parts.append(element("ul", *items, class_="properties"))
    if exercise.mistake:
        looks = element("b", line(exercise.mistake, LONGEST))
        parts.append(element("p", "It looks like a known mistake: ", looks, class_="mistake"))
    kind = "good" if good else "bad"
    return element("article", *parts, class_=f"exercise {kind}", id=exercise.exercise)


def _property(each: PropertyResult, told: str) -> Html:
    word, sign, class_ = ("holds", HOLDS, "yes") if each.passed else ("does not hold", FAILS, "no")
    spoken = {"aria-label": word}  # a screen reader may not know the sign
    mark = element("span", sign, class_=class_, role="img", **spoken)
    needed = f" ({CORE})" if each.core and not each.passed else ""
    said = element("div", told, class_="says") if told else Html("")
    return element("li", mark, f"{line(each.title)}{needed}", said)


def _files(result: SubmissionResult) -> Html:
    rows = [element("li", "Read: ", element("code", line(name))) for name in result.files]
    rows += [
        element("li", "Problem: ", element("code", line(problem, LONGEST)))
        for problem in result.problems
    ]
    return element("ul", *rows) if rows else paragraph("No file was read.")
