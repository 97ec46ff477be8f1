"""The pages in docs/: their commands exist, links lead somewhere, figures are those of the code."""

import inspect
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import tyro
from test_cli import NOT_OURS, flags
from test_repository import make

from rlhf_course import cli
from rlhf_course.coursework import manuscript, variants
from rlhf_course.coursework.build import BuildConfig
from rlhf_course.coursework.exercises import EXERCISES, STEMS
from rlhf_course.coursework.mutants import mutants_of
from rlhf_course.coursework.trial import properties
from rlhf_course.grading import sandbox, submission
from rlhf_course.grading.children import Patience
from rlhf_course.grading.results import STATUSES
from rlhf_course.grading.settings import GradeConfig

ROOT = Path(__file__).parents[1]
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {page.name: page.read_text(encoding="utf-8") for page in PAGES}
GUIDE, TUTOR = TEXTS["instructors.md"], TEXTS["ai-tutor.md"]
FENCE = re.compile(r"^(`{3,})(\w*)\n(.*?)^\1$", re.M | re.S)
MANUSCRIPTS = [manuscript.read(file) for file in sorted((ROOT / "manuscript").glob("[0-9]*.py"))]
ON_PAGES = [pytest.param(text, id=name) for name, text in TEXTS.items()]


def words(page: str) -> str:
    """A page's text in one line."""
    return " ".join(page.split())


def commands(text: str) -> list[list[str]]:
    """The lines of a page's shell blocks, as a shell takes them apart."""
    lines = [line for _, kind, code in FENCE.findall(text) if kind == "bash"
             for line in code.replace("\\\n", " ").splitlines()]  # fmt: skip
    return [found for line in lines if (found := shlex.split(line, comments=True))]


def calls(*program: str) -> list[list[str]]:
    """What every page gives to this program."""
    found = [each for text in TEXTS.values() for each in commands(text)]
    size = len(program)
    return [each[size:] for each in found if tuple(each[:size]) == program]


# --- commands ------------------------------------------------------------------------------------


def test_the_commands_of_the_course_are_understood():
    found = [cli.parse(arguments) for arguments in calls("rlhf-course")]
    assert len([each for each in found if isinstance(each, GradeConfig)]) >= 10
    bundles = {each.bundle for each in found if isinstance(each, GradeConfig)}
    assert bundles >= {"gradescope", "github", "nbgrader", "otter"}
    for text in TEXTS.values():
        for name in re.findall(r"rlhf-course ([a-z][a-z-]+)", text):
            assert name in cli.COMMANDS


def scale_it_up(file: Path) -> str:
    """The last section but the questions of a manuscript, as Markdown."""
    prose = "\n".join(line.removeprefix("#").removeprefix(" ") for line in
                      file.read_text(encoding="utf-8").splitlines())  # fmt: skip
    (found,) = re.findall(r"^## (?:\d\. )?Scale it up\n(.*?)^## ", prose, re.M | re.S)
    return found


SCALED = [pytest.param(scale_it_up(f), id=f.stem)
          for f in sorted((ROOT / "manuscript").glob("[0-9]*.py"))]  # fmt: skip


@pytest.mark.parametrize("text", SCALED)
def test_the_commands_that_scale_a_chapter_up_are_understood(text):
    asked = [each for each in commands(text) if each[0] == "rlhf-course"]
    assert len(asked) >= 2
    assert all(cli.parse(arguments) for _, *arguments in asked)


@pytest.mark.parametrize("text", SCALED)
def test_what_to_expect_is_measured_or_estimated(text):
    """A measured figure has its machine and its date."""
    rows = [line for line in text.splitlines() if line.startswith("| ") and "expect" not in line]
    if "| | expect | |" in text:  # chapter 9 compares two machines instead
        assert len(rows) >= 4
        for row in rows:
            marked = re.search(r"\*(measured|estimated)\*", row) or r"\ln V" in row
            assert marked, row
    for place in re.findall(r"[^|\n]*\*measured\*[^|\n]*", text):
        if place.strip() != "*measured*":  # the name of a row in chapter 9's table
            assert re.search(r"\*measured\* 20\d\d-\d\d-\d\d", place) and "cores" in place, place
    assert "*measured*" in text and "*estimated*" in text


def test_the_builder_is_called_with_what_it_knows():
    found = [tyro.cli(BuildConfig, args=arguments)
             for arguments in calls("python", "-m", "rlhf_course.coursework.build")]  # fmt: skip
    assert found and all(each.variants is not None and each.out for each in found)


def test_pytest_is_called_with_what_it_knows():
    found = calls("python", "-m", "pytest")
    assert len(found) >= 3
    command = [sys.executable, "-m", "pytest", "--help"]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    known = {plain(flag) for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]+", told)}
    for arguments in found:
        assert (ROOT / arguments[0]).exists()
        assert {plain(each) for each in arguments if each.startswith("--")} <= known


def plain(flag: str) -> str:
    """pytest takes --junitxml for --junit-xml."""
    return flag.replace("-", "")


def test_make_knows_its_targets():
    found = calls("make")
    assert found
    for arguments in found:
        assert make(*arguments)


@pytest.mark.parametrize("text", ON_PAGES)
def test_every_flag_exists(text):
    for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text):
        assert flag in flags() | NOT_OURS, flag


# --- links and files -----------------------------------------------------------------------------


def anchor(heading: str) -> str:
    """GitHub's name for a heading."""
    kept = "".join(c for c in heading.lower() if c.isalnum() or c in " -_")
    return kept.strip().replace(" ", "-")


def headings(page: Path) -> set[str]:
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    return {anchor(line.lstrip("#")) for line in text.splitlines() if re.match(r"#+ ", line)}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page):
    text = FENCE.sub("", page.read_text(encoding="utf-8"))
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if target.startswith("https://"):
            continue
        place, _, part = target.partition("#")
        file = page.parent / place if place else page
        assert file.exists(), target
        assert not part or part in headings(file), target


@pytest.mark.parametrize("text", ON_PAGES)
def test_files_that_are_named_exist(text):
    for name in re.findall(r"\b(?:chapters|solutions|tests|manuscript)/[\w/.]+", text):
        if not re.search(rf"(?:term|dist|template)/{name}", text):
            assert (ROOT / name.rstrip(".")).exists(), name


@pytest.mark.parametrize("text", ON_PAGES)
def test_lines_are_not_too_wide(text):
    assert not [line for line in text.splitlines() if len(line) > 130]


def test_the_two_pages_name_each_other():
    assert "(ai-tutor.md)" in GUIDE
    assert "(instructors.md" in TUTOR


# --- figures -------------------------------------------------------------------------------------


def table(first: str) -> list[list[str]]:
    """The rows of the guide's table whose head begins with these words, cell by cell."""
    lines = GUIDE.splitlines()
    (start,) = [i for i, line in enumerate(lines) if line.startswith(f"| {first} |")]
    rows = []
    for line in lines[start + 2 :]:
        if not line.startswith("|"):
            break
        rows.append([cell.strip() for cell in line.strip("|").split("|")])
    return rows


def of_chapter(number: int) -> list:
    return [exercise for exercise in EXERCISES if exercise.chapter == number]


def sums(exercises) -> tuple[int, int]:
    """(points, minutes)"""
    found = list(exercises)
    return sum(e.points for e in found), sum(e.minutes for e in found)


def test_the_table_of_the_chapters():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    seconds = dict(re.findall(r"^\| (\d\d) \|.*\| (\d+) s \|$", readme, re.M))
    *rows, last = table("chapter | exercises | points")
    expected = []
    for number, stem in enumerate(STEMS):
        found = of_chapter(number)
        name = f"{number:02d}"
        expected.append([f"{name} {stem}", len(found), *sums(found), seconds[name]])
    assert rows == [list(map(str, row)) for row in expected]
    assert last[1:] == [str(sum(int(row[i]) for row in rows)) for i in range(1, 5)]


def test_the_weeks_hold_every_exercise_once_with_its_points_and_minutes():
    named = []
    by_name = {exercise.qualname: exercise for exercise in EXERCISES}
    rows = table("week")
    assert [int(row[0]) for row in rows] == list(range(1, 13))
    for _, chapter, exercises, points, minutes, _ in rows:
        found = [by_name[name] for name in re.findall(r"`([^`]+)`", exercises)]
        assert {exercise.chapter for exercise in found} <= {int(chapter)}
        assert (int(points), int(minutes)) == sums(found)
        named += found
    assert len(named) == len(EXERCISES)
    assert set(named) == set(EXERCISES)


def test_the_days_end_where_they_say():
    left = [exercise for read in MANUSCRIPTS for exercise in read.exercises]
    for _, chapter, points, minutes in table("day"):
        number = int(re.findall(r"\d\d", chapter)[-1])
        upto = re.search(r"up to `(\w+)`", chapter)
        last = [e for e in of_chapter(number) if not upto or e.qualname == upto[1]]
        end = max(left.index(exercise) for exercise in last if exercise in left) + 1
        done, left = left[:end], left[end:]
        assert {exercise.chapter for exercise in done} == {number}
        assert (int(points), int(minutes)) == sums(done)
    assert not left


def test_what_the_guide_says_about_points():
    tests = {exercise: properties(exercise) for exercise in EXERCISES}
    every = [test for found in tests.values() for test in found]
    points = sum(exercise.points for exercise in EXERCISES)
    counts = f"{len(EXERCISES)} exercises with {points} points and {len(every)} properties"
    assert counts in words(GUIDE)
    cores = {sum(test.property.core for test in found) for found in tests.values()}
    assert (min(cores), max(cores)) == (1, 3)
    weights = [test.property.weight for test in every if test.property.weight != 1]
    assert weights == [0.5, 0.5]
    assert [row[0] for row in table("status")] == [f"`{status}`" for status in STATUSES]
    assert sum(len(mutants_of(exercise)) for exercise in EXERCISES) > 600
    assert "one of more than 600 known mistakes" in words(GUIDE)


def test_what_a_table_of_the_public_inputs_could_earn():
    """An upper bound: every property that draws nothing from the seed, where those are the core."""
    fresh, most, whole, every = 0, 0.0, [], 0
    for exercise in EXERCISES:
        tests = properties(exercise)
        draws = {test: "rng" in inspect.signature(test).parameters for test in tests}
        fresh, every = fresh + sum(draws.values()), every + len(tests)
        if not any(draws[test] for test in tests if test.property.core):
            fixed = sum(test.property.weight for test in tests if not draws[test])
            most += exercise.points * fixed / sum(test.property.weight for test in tests)
        whole += [] if any(draws.values()) else [exercise.qualname]
    said = words(GUIDE)
    total = sum(exercise.points for exercise in EXERCISES)
    assert f"{fresh} of the {every} properties draw fresh inputs" in said
    assert f"at most {round(most)} of the {total} points" in said
    assert whole == [] and "in no exercise all of them" in said


def test_the_limits():
    found = {row[0]: row[1] for row in table("what | how much")}
    limits, patience = sandbox.Limits(), Patience()
    assert found["one call of a student's function"] == f"{patience.call:g} s"
    assert found["all calls of one exercise"] == f"{patience.exercise:g} s"
    assert GradeConfig().seconds_per_call == patience.call
    assert GradeConfig().seconds_per_exercise == patience.exercise
    processor = "processor time of one exercise, all threads together"
    assert found[processor] == f"{limits.cpu_seconds} s"
    memory = "memory of a player, beyond what torch itself has mapped"
    assert found[memory] == f"{limits.memory >> 30} GB"
    assert found["open files; threads"] == f"{limits.open_files}; {limits.threads}"
    sizes = submission.MOST_FILES, submission.FILE_BYTES >> 20, submission.TOTAL_BYTES >> 20
    expected = "{}, each up to {} MB, together up to {} MB".format(*sizes)
    assert found["files of a submission"] == expected


def test_the_variants():
    rows = table("exercise | versions")
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    groups: dict[str, int] = {}
    for exercise in EXERCISES:
        if several := variants.variants_of(exercise.id):
            groups[several[0].group] = len(several)
            named.remove(exercise.name)
    assert not named
    combinations = 1
    for size in groups.values():
        combinations *= size
    assert f"That makes {combinations} combinations" in words(GUIDE)
    assert len(groups) == len(rows)


def test_the_shares_of_the_rubric_are_a_whole():
    assert sum(int(row[1].removesuffix(" %")) for row in table("part")) == 100
    asked = set(re.findall(r"^- \*\*(\d\d)\*\* ", GUIDE, re.M))
    assert asked == {f"{number:02d}" for number in range(1, len(STEMS))}


def test_the_tutor_knows_the_graded_exercises():
    for number in range(1, len(STEMS)):
        names = ", ".join(exercise.qualname for exercise in of_chapter(number))
        assert f"chapter {number}: {names}\n" in TUTOR


def test_the_ladder_has_as_many_rungs_as_the_tutor_says():
    for read in MANUSCRIPTS:
        for part in read.parts:
            if isinstance(part, manuscript.Directive):
                assert len(part.hints) in (2, 3), part.exercise.id
    assert "two or three folded hints" in words(TUTOR)
