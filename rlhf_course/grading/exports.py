"""Results as JUnit XML, which Jenkins, GitLab and most other servers show.

Elements and attributes are those of the xunit plugin's junit-10.xsd (jenkinsci/xunit-plugin), the
schema that pytest checks its own `--junitxml` against.
"""

from __future__ import annotations

from collections.abc import Sequence
from xml.etree import ElementTree
from xml.etree.ElementTree import Element, SubElement

from rlhf_course.grading.results import RIGHT, WRONG, ExerciseResult, SubmissionResult
from rlhf_course.grading.wording import LONGEST, line, plain, points, sentences, total

TRIED = "the answer can be tried"
"""The test case of an exercise that is blank, absent, broken or stopped."""


def junit(results: Sequence[SubmissionResult]) -> str:
    """One suite a submission, one test case a property; an error where the grader failed."""
    root = Element("testsuites", name="rlhf-course grade")
    for result in results:
        root.append(_suite(result))
    for key in ("tests", "failures", "errors"):
        root.set(key, str(sum(int(suite.get(key)) for suite in root)))
    root.set("time", f"{sum(result.seconds for result in results):.3f}")
    ElementTree.indent(root)
    text = ElementTree.tostring(root, encoding="unicode")
    return f'<?xml version="1.0" encoding="utf-8"?>\n{text}\n'


def _suite(result: SubmissionResult) -> Element:
    suite = Element("testsuite", name=line(result.name))
    known = SubElement(suite, "properties")
    facts = {
        "score": points(total(result)), "max_score": points(result.max_score),
        "seed": result.seed, "variant": "" if result.variant is None else result.variant,
        "version": result.version, "isolation": ", ".join(result.isolation),
    }  # fmt: skip
    facts |= {f"problem {i + 1}": problem for i, problem in enumerate(result.problems)}
    for name, value in facts.items():
        SubElement(known, "property", name=name, value=line(str(value), LONGEST))
    if result.failure:
        case = _case(suite, line(result.name), "the grader", result.seconds)
        SubElement(case, "error", type="grader", message=line(result.failure, LONGEST))
    else:
        for exercise in result.exercises:
            _cases(suite, f"{_dotless(result.name)}.{exercise.exercise}", exercise)
    suite.set("tests", str(len(suite.findall("testcase"))))
    suite.set("failures", str(len(suite.findall("testcase/failure"))))
    suite.set("errors", str(len(suite.findall("testcase/error"))))
    suite.set("skipped", "0")
    suite.set("time", f"{result.seconds:.3f}")
    return suite


def _cases(suite: Element, classname: str, exercise: ExerciseResult) -> None:
    if exercise.status not in (RIGHT, WRONG):
        case = _case(suite, classname, TRIED, 0.0)
        _failure(case, exercise.status, exercise.says)
    for each, _ in sentences(exercise):
        case = _case(suite, classname, line(each.title), each.seconds)
        if not each.passed:
            _failure(case, "core" if each.core else "property", each.says, exercise.mistake)


def _case(suite: Element, classname: str, name: str, seconds: float) -> Element:
    return SubElement(suite, "testcase", classname=classname, name=name, time=f"{seconds:.3f}")


def _failure(case: Element, type_: str, says: str, mistake: str = "") -> None:
    found = SubElement(case, "failure", type=type_, message=line(says))
    looks = f"\nIt looks like a known mistake: {line(mistake, LONGEST)}" if mistake else ""
    found.text = plain(says) + looks


def _dotless(name: str) -> str:
    """A student's name as one part of a class name: servers split class names at dots."""
    return line(name).replace(".", "_")
