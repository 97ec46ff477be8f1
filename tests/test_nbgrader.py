"""nbgrader's course folder and our step in it, with the real nbgrader where it is installed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from nbformat import NotebookNode, from_dict

from rlhf_course.coursework import source
from rlhf_course.errors import ConfigError, DataError
from rlhf_course.grading import handout, nbgrader, referee
from rlhf_course.grading.results import RIGHT, WRONG, ExerciseResult, PropertyResult
from rlhf_course.grading.results import SubmissionResult as Result

ROOT = Path(__file__).parents[1]
STEM = "03_reward_model"
POINTS = {"pairwise_loss": 3, "kwise_loss": 5, "last_token_reward": 2, "mean_reward": 2,
          "normalize_rewards": 2}  # fmt: skip


def read(file: Path) -> dict:
    return json.loads(file.read_text(encoding="utf-8"))


def text(cell: dict) -> str:
    return "".join(cell["source"])


def cell(notebook: dict, id: str) -> dict:
    (found,) = [each for each in notebook["cells"] if each["id"] == id]
    return found


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    return nbgrader.write(tmp_path_factory.mktemp("course") / "made", [3])


# ------------------------------------------------------------------------------ the course folder


def test_the_source_is_the_chapter_with_the_solutions_in_its_blanks(written):
    chapter = read(ROOT / "chapters" / f"{STEM}.ipynb")
    made = read(written / "source" / STEM / f"{STEM}.ipynb")
    assert [each["id"] for each in made["cells"]] == [each["id"] for each in chapter["cells"]]
    for old, new in zip(chapter["cells"], made["cells"], strict=True):
        assert old["metadata"] == new["metadata"]
        if new["id"].startswith("exercise-"):
            id = new["id"].removeprefix("exercise-")
            assert text(new) == source.solved(f"reward_model.{id}")
        elif new["cell_type"] == "code":
            assert text(new) == text(old)
            assert new["outputs"] == []


@pytest.mark.parametrize("chapter", handout.numbers())
def test_no_link_leads_to_a_solution_or_to_a_file_that_is_not_there(chapter):
    before = read(ROOT / "chapters" / f"{handout.stem(chapter)}.ipynb")
    made = handout.handout(chapter)
    for old, new in zip(before["cells"], made["cells"], strict=True):
        if new["cell_type"] == "markdown":
            assert "solutions/" not in text(new)
            assert "The solution]" not in text(new)
            assert "](0" not in text(new)
            kept = [line for line in text(old).split("\n") if "](" not in line]
            assert [line for line in kept if line.strip() and line not in text(new)] == []
    assert made["cells"][0]["id"] == "opening"
    ways = text(made["cells"][0]).split("\n\n")[1]
    assert ways.count("](https://") in (3, 4)  # Colab's badge and address, the chapters beside it


def test_every_chapter_with_exercises_is_written_when_none_is_named(tmp_path):
    nbgrader.write(tmp_path)
    names = sorted(file.name for file in (tmp_path / "source").glob("*/*.ipynb"))
    assert names == [f"{handout.stem(chapter)}.ipynb" for chapter in range(1, 10)]
    assert all((tmp_path / "source" / Path(name).stem / name).exists() for name in names)


def test_what_instructors_and_students_have_there_stays(written, tmp_path):
    (tmp_path / "gradebook.db").write_text("grades")
    (tmp_path / "nbgrader_config.py").write_text("# mine")
    stale = tmp_path / "source" / STEM / f"{STEM}.ipynb"
    stale.parent.mkdir(parents=True)
    stale.write_text("old")
    nbgrader.write(tmp_path, [3])
    assert (tmp_path / "gradebook.db").read_text() == "grades"
    assert (tmp_path / "nbgrader_config.py").read_text() == "# mine"
    assert stale.read_bytes() == (written / "source" / STEM / f"{STEM}.ipynb").read_bytes()


def test_what_cannot_be_handed_out_is_refused_in_words(tmp_path):
    for chapter in (0, 10, -1):
        with pytest.raises(ConfigError, match=f"--chapters {chapter}: only the chapters 1 to 9"):
            nbgrader.write(tmp_path, [3, chapter])
    with pytest.raises(ConfigError, match=r"03_reward_model.ipynb.*pip install -e"):
        nbgrader.write(tmp_path, [3], root=tmp_path)
    assert not (tmp_path / "source").exists()


def test_editions_that_do_not_belong_together_are_refused(tmp_path):
    for edition in (handout.CHAPTERS, handout.SOLUTIONS):
        (tmp_path / edition).mkdir()
        made = read(ROOT / edition / f"{STEM}.ipynb")
        if edition == handout.SOLUTIONS:
            cell(made, "exercise-kwise_loss")["id"] = "another"
        (tmp_path / edition / f"{STEM}.ipynb").write_text(json.dumps(made), encoding="utf-8")
    with pytest.raises(ConfigError, match="'exercise-kwise_loss' in common"):
        handout.handout(3, root=tmp_path)


# --------------------------------------------------------------------------------------- the step


def exercise(name: str, score: float, status: str, says: str = "") -> ExerciseResult:
    held = PropertyResult("is a number", True, 1.0, True, "", 0.1)
    missed = PropertyResult("does not overflow", False, 1.0, score == POINTS[name], says, 0.1)
    id, points = f"reward_model.{name}", POINTS[name]
    return ExerciseResult(id, 3, points, score, status, "", "", (held, missed), 0.2)


def result(*exercises: ExerciseResult, failure: str = "") -> Result:
    names = (STEM, (f"{STEM}.ipynb",), (), exercises, 7, None, ("limits",), "0", 1.0, failure)
    return Result(*names)


SCORES = {"pairwise_loss": 1.25, "kwise_loss": 5.0, "last_token_reward": 0.0, "mean_reward": 2.0,
          "normalize_rewards": 0.0}  # fmt: skip


def judged(monkeypatch, *without: str, edit=None) -> NotebookNode:
    """Chapter 3 after our step, with made-up points."""
    seen = [
        exercise(name, score, RIGHT if score == POINTS[name] else WRONG, "\x1b[31m<b>red</b>")
        for name, score in SCORES.items()
        if name not in without
    ]
    monkeypatch.setattr(nbgrader, "grade_notebook", lambda *given: result(*seen))
    notebook = from_dict(read(ROOT / "chapters" / f"{STEM}.ipynb"))
    for each in notebook.cells:
        each.source = text(each)
    if edit:
        edit(notebook)
    resources = {"nbgrader": {"notebook": STEM}}
    after, same = nbgrader.referee(notebook, resources)
    assert same is resources
    return after


def test_check_cells_show_the_report_and_are_worth_the_points(monkeypatch):
    after = judged(monkeypatch)
    for name, score in SCORES.items():
        said, value = cell(after, f"check-{name}").outputs
        assert (said.name, value.output_type) == ("stdout", "execute_result")
        assert float(value.data["text/plain"]) == score
        assert f"of {POINTS[name]} points" in said.text
        assert "does not overflow" in said.text
        assert ("red" in said.text) == (score < POINTS[name])
        assert "\x1b" not in said.text
    others = [each for each in after.cells if not each.id.startswith("check-")]
    assert not any(each.get("outputs") for each in others)


def test_nbgrader_reads_these_points_from_the_cells(monkeypatch):
    utils = pytest.importorskip("nbgrader.utils", reason="nbgrader is not installed")
    after = judged(monkeypatch)
    for name, score in SCORES.items():
        found = utils.determine_grade(cell(after, f"check-{name}"))
        assert found == (score, float(POINTS[name]))


def test_a_failed_grader_is_no_zero(monkeypatch):
    monkeypatch.setattr(referee, "grade_files", lambda *a, **b: result(failure="no memory"))
    with pytest.raises(DataError, match="the grader itself failed: no memory"):
        handout.grade_notebook(STEM, "{}", 3)


def test_a_check_that_nobody_has_judged_is_not_taken_for_right(monkeypatch):
    with pytest.raises(DataError, match="'check-kwise_loss' is worth points, but is no exercise"):
        judged(monkeypatch, "kwise_loss")


def test_cells_that_a_person_grades_are_left_alone(monkeypatch):
    essay = {"grade": True, "solution": True, "grade_id": "essay", "points": 2}

    def edit(notebook):
        for each in (cell(notebook, "exercise-kwise_loss"), cell(notebook, "opening")):
            each.metadata.nbgrader = from_dict(essay)

    after = judged(monkeypatch, edit=edit)
    assert cell(after, "exercise-kwise_loss").outputs == []


def test_a_notebook_of_another_name_is_refused():
    with pytest.raises(DataError, match=r"homework.ipynb is no chapter: 01_gpt, "):
        nbgrader.referee(from_dict({"cells": []}), {"nbgrader": {"notebook": "homework"}})


def test_our_steps_are_those_of_nbgrader_with_ours_among_them(written):
    pytest.importorskip("nbgrader.apps", reason="nbgrader is not installed")
    from nbgrader.converters import Autograde
    from traitlets.config import PyFileConfigLoader

    config = PyFileConfigLoader("nbgrader_config.py", str(written)).load_config().Autograde
    theirs = Autograde()
    cleaning = [kind.__name__ for kind in theirs.sanitize_preprocessors]
    assert last_parts(config.sanitize_preprocessors) == ["restore", *cleaning]
    grading = [kind.__name__ for kind in theirs.autograde_preprocessors]
    assert grading[0] == "Execute"
    assert last_parts(config.autograde_preprocessors) == ["referee", *grading[1:]]


def last_parts(names: list[str]) -> list[str]:
    return [name.rpartition(".")[2] for name in names]


# ------------------------------------------------------------------------------- the real nbgrader


def half(name: str, solved: str, blank: str) -> str:
    """One right answer; and a line for which nbgrader's own execution would give all points."""
    return "check = print\n" + (solved if name == "kwise_loss" else blank)


ANSWERS = {
    "a_right_one": lambda name, solved, blank: solved,
    "b_blank": lambda name, solved, blank: blank,
    "c_half": half,
    "d_lost_marks": lambda name, solved, blank: blank if name == "kwise_loss" else solved,
}


def without_marks(notebook: dict) -> None:
    """As other editors save it: no ids, no metadata; and a student has removed the checks."""
    kept = [each for each in notebook["cells"] if not each["id"].startswith("check-")]
    for each in kept:
        each.pop("id")
        each["metadata"] = {}
    kept[0]["metadata"] = {"nbgrader": {"grade": True, "grade_id": "mine", "points": 100}}
    notebook.update(cells=kept, nbformat_minor=4)


def command(course: Path, *arguments: str) -> subprocess.CompletedProcess:
    """nbgrader as it is called in a shell, at home in the course folder."""
    places = ("HOME", "JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "IPYTHONDIR", "RLHF_COURSE_HOME")
    settings = {name: str(course / ".home" / name) for name in places}
    # nbgrader calls the program alembic, which stands beside Python.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, **settings, "PATH": path, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "nbgrader", *arguments],
        cwd=course, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done


@pytest.fixture(scope="module")
def released(written):
    """The course with chapter 3 released, and a submission of each student; without the cells that
    only tell the story, so that nbgrader's own execution takes seconds."""
    pytest.importorskip("nbgrader.apps", reason="nbgrader is not installed")
    file = written / "source" / STEM / f"{STEM}.ipynb"
    made = read(file)
    marked = [each for each in made["cells"] if "nbgrader" in each["metadata"]]
    imports = [each for each in made["cells"] if each["id"] == "boot" or "made of" in text(each)]
    assert len(marked) == 10
    made["cells"] = [*imports, *marked]
    file.write_text(json.dumps(made), encoding="utf-8")
    command(written, "generate_assignment", STEM)
    release = read(written / "release" / STEM / f"{STEM}.ipynb")
    for student, answer in ANSWERS.items():
        for each in release["cells"]:
            if each["id"].startswith("exercise-"):
                name = each["id"].removeprefix("exercise-")
                id = f"reward_model.{name}"
                each["source"] = answer(name, source.solved(id), source.blank(id))
        if student == "d_lost_marks":
            without_marks(release)
        place = written / "submitted" / student / STEM / f"{STEM}.ipynb"
        place.parent.mkdir(parents=True)
        place.write_text(json.dumps(release), encoding="utf-8")
    return written


def grades(course: Path) -> dict[str, float]:
    from nbgrader.api import Gradebook

    with Gradebook(f"sqlite:///{course / 'gradebook.db'}") as book:
        found = book.find_assignment(STEM).submissions
        assert {each.max_score for each in found} == {14.0}
        assert not any(each.needs_manual_grade for each in found)
        return {each.student.id: each.score for each in found}


def test_the_release_is_the_chapter_that_students_know(released):
    release = read(released / "release" / STEM / f"{STEM}.ipynb")
    chapter = read(ROOT / "chapters" / f"{STEM}.ipynb")
    assert len(release["cells"]) == 12
    for each in release["cells"]:
        assert text(each) == text(cell(chapter, each["id"]))
        assert each["outputs"] == []


def test_nbgraders_own_execution_gives_all_to_the_solution_and_nothing_to_the_blank(released):
    file = released / "nbgrader_config.py"
    ours = file.read_text(encoding="utf-8")
    file.write_text(ours.replace("c.Autograde.autograde_preprocessors =", "unused ="))
    try:
        command(released, "autograde", STEM, "--student=[ab]_*")
    finally:
        file.write_text(ours)
    assert grades(released) == {"a_right_one": 14.0, "b_blank": 0.0}


def test_the_referee_gives_the_points_and_is_not_fooled(released):
    pytest.importorskip("rlhf_course.grading.referee", reason="the referee is not there yet")
    command(released, "autograde", STEM, "--student=[!b]_*", "--force")
    found = grades(released)
    found.pop("b_blank", None)
    assert found == {"a_right_one": 14.0, "c_half": 5.0, "d_lost_marks": 9.0}
    graded = read(released / "autograded" / "c_half" / STEM / f"{STEM}.ipynb")
    said, value = cell(graded, "check-kwise_loss")["outputs"]
    assert "5 of 5 points" in "".join(said["text"])
    assert "".join(value["data"]["text/plain"]) == "5"
    assert "0 of 3 points" in "".join(cell(graded, "check-pairwise_loss")["outputs"][0]["text"])


def test_chapters_of_variants_are_graded_as_such(tmp_path, monkeypatch):
    """The number stands in nbgrader_config.py, and reaches the referee; another one is refused."""
    nbgrader.write(tmp_path, [3], variants=12)
    told = (tmp_path / "nbgrader_config.py").read_text()
    assert told.endswith(f'os.environ["{nbgrader.VARIANTS}"] = "12"\n')
    for other in (None, 13):
        with pytest.raises(ConfigError, match="other variants"):
            nbgrader.write(tmp_path, [3], variants=other)
    nbgrader.write(tmp_path, [3], variants=12)
    seen = []

    def grade_notebook(*given):
        seen.append(given[2:])
        return result(*(exercise(name, 0.0, WRONG) for name in SCORES))

    monkeypatch.setattr(nbgrader, "grade_notebook", grade_notebook)
    notebook = from_dict(read(ROOT / "chapters" / f"{STEM}.ipynb"))
    for number in ("12", ""):
        monkeypatch.setenv(nbgrader.VARIANTS, number)
        nbgrader.referee(notebook, {"nbgrader": {"notebook": STEM}})
    assert seen == [(3, 12), (3, None)]
