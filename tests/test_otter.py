"""The notebooks for otter assign and our plugin, with the real otter-grader where it is installed.

It is not among the packages for developers: `pip install "otter-grader[grading]"` beside them.
"""

import json
import math
import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from nbformat import from_dict

from rlhf_course.coursework import source
from rlhf_course.coursework.exercises import EXERCISES
from rlhf_course.errors import ConfigError
from rlhf_course.grading import handout, otter
from rlhf_course.grading.results import RIGHT, WRONG, ExerciseResult, PropertyResult
from rlhf_course.grading.results import SubmissionResult as Result

ROOT = Path(__file__).parents[1]
STEM = "03_reward_model"
POINTS = {e.qualname: e.points for e in EXERCISES if e.chapter == 3}


def text(cell: dict) -> str:
    return "".join(cell["source"])


# -------------------------------------------------------------------------------- the assignments


@pytest.mark.parametrize("chapter", handout.numbers())
def test_an_assignment_is_the_chapter_between_the_cells_of_otter(chapter):
    plain, made = handout.handout(chapter), otter.assignment(chapter)
    ids = [cell["id"] for cell in made["cells"]]
    assert len(set(ids)) == len(ids)
    assert max(map(len, ids)) <= 64  # nbformat allows no more
    kept = [cell for cell in made["cells"] if not cell["id"].startswith("otter-")]
    assert [cell["id"] for cell in kept] == [cell["id"] for cell in plain["cells"]]
    assert [text(a) for a in kept if not a["id"].startswith("exercise-")] == [
        text(b) for b in plain["cells"] if not b["id"].startswith("exercise-")
    ]
    raw = [text(cell).split("\n")[0] for cell in made["cells"] if cell["cell_type"] == "raw"]
    question = ["# BEGIN QUESTION", "# BEGIN SOLUTION", "# END SOLUTION",
                "# BEGIN TESTS", "# END TESTS", "# END QUESTION"]  # fmt: skip
    assert raw == ["# ASSIGNMENT CONFIG", *question * len(handout.exercises_of(chapter))]


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_the_points_of_an_exercise_are_shared_by_its_properties(exercise):
    shares = otter.shares(exercise)
    assert min(shares) > 0
    assert math.isclose(sum(shares), exercise.points, abs_tol=1e-9)


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_the_marked_solution_is_still_python(exercise):
    marked = otter._with_prompt(source.solved(exercise.id))
    compile(marked, "<cell>", "exec")
    assert marked.count("NO PROMPT") == 1


def test_what_is_written_names_this_very_version(tmp_path):
    otter.write(tmp_path, [3, 5])
    assert sorted(file.name for file in tmp_path.iterdir()) == [STEM, "05_ppo"]
    assert "rlhf-course @ git+https" in (tmp_path / STEM / "requirements.txt").read_text()
    with pytest.raises(ConfigError, match="--chapters 0"):
        otter.write(tmp_path, [0])


# ------------------------------------------------------------------------------------- the plugin


def made_up(scores: dict[str, float]) -> Result:
    rows = []
    for name, score in scores.items():
        held = PropertyResult("is a number", True, 1.0, True, "", 0.1)
        missed = PropertyResult("is right", False, 1.0, score == POINTS[name], "'''\"\\n{x}", 0.1)
        status = RIGHT if missed.passed else WRONG
        rows.append(
            ExerciseResult(
                f"reward_model.{name}", 3, POINTS[name], score, status, "", "", (held, missed), 0.2
            )
        )
    return Result(STEM, (), (), tuple(rows), 7, None, (), "0", 1.0, "")


def test_otter_runs_nothing_but_the_referees_result(monkeypatch):
    seen = []

    def grade(*given):
        seen.append(given)
        return made_up({"kwise_loss": 5.0, "mean_reward": 1.0, "pairwise_loss": 0.0})

    monkeypatch.setattr(otter, "grade_notebook", grade)
    submission = from_dict({"cells": [], "metadata": {"kernelspec": {"name": "evil"}}})
    made = otter.Referee(f"/x/{STEM}.ipynb", {}, {"chapter": 3}).before_execution(submission)
    assert seen == [(STEM, json.dumps(submission), 3)]
    assert made.metadata.kernelspec.name == "python3"
    (cell,) = made.cells
    namespace = {}
    exec(compile(cell.source, "<cell>", "exec"), namespace)
    judge = namespace["referee"]
    for number in (0, 1):
        judge("reward_model.kwise_loss", number)
    judge("reward_model.mean_reward", 0)
    everything = ".* of .* points"
    for name, number, told in [
        ("mean_reward", 1, everything),
        ("pairwise_loss", 0, everything),  # it holds, but without the core there are no points
        ("pairwise_loss", 1, "is right"),
        ("pairwise_loss", 2, "not tried"),
        ("kwise_loss", 2, everything),  # never tried: the answer was stopped before
    ]:
        with pytest.raises(AssertionError, match=f"reward_model.{name}(\n|: ){told}"):
            judge(f"reward_model.{name}", number)
    with pytest.raises(KeyError):
        judge("reward_model.last_token_reward", 0)


# ---------------------------------------------------------------------------------- the real otter


def command(folder: Path, *arguments: str) -> None:
    """otter as it is called in a shell."""
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = {**os.environ, "PATH": path, "PYTHONPATH": str(ROOT), "HOME": str(folder)}
    program = "import sys; from otter.cli import cli; sys.exit(cli())"
    done = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        cwd=folder, env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def assigned(tmp_path_factory):
    if find_spec("otter") is None:
        pytest.skip("otter-grader is not installed")
    folder = otter.write(tmp_path_factory.mktemp("otter"), [3]) / STEM
    command(folder, "assign", f"{STEM}.ipynb", "dist")  # grades the solution too
    return folder


def score(folder: Path, notebook: dict, name: str) -> dict[str, float]:
    """Points of each question, as otter writes them for Gradescope."""
    place = folder / name
    place.mkdir()
    (place / f"{STEM}.ipynb").write_text(json.dumps(notebook), encoding="utf-8")
    (bundle,) = (folder / "dist" / "autograder").glob("*.zip")
    command(place, "run", "-a", str(bundle), "-o", ".", f"{STEM}.ipynb")
    tests = json.loads((place / "results.json").read_text(encoding="utf-8"))["tests"]
    return {test["name"]: test.get("score") for test in tests}


def test_students_get_the_chapter_with_blanks_and_need_no_otter(assigned):
    made = json.loads((assigned / "dist" / "student" / f"{STEM}.ipynb").read_text("utf-8"))
    plain = handout.handout(3)["cells"]
    assert [cell["id"] for cell in made["cells"]] == [cell["id"] for cell in plain]
    for cell, before in zip(made["cells"], plain, strict=True):
        if cell["id"].startswith("exercise-"):
            blank = source.blank(f"reward_model.{cell['id'].removeprefix('exercise-')}")
            marks = (source.BEGIN, source.END)
            assert text(cell).split("\n") == [
                line for line in blank.split("\n") if line.strip() not in marks
            ]
        else:
            assert text(cell) == text(before)
    assert "otter." not in json.dumps([text(cell) for cell in made["cells"]])


def test_otter_reports_the_points_of_the_referee(assigned):
    student = (assigned / "dist" / "student" / f"{STEM}.ipynb").read_text("utf-8")
    found = score(assigned, json.loads(student), "blank")
    assert {name: found[name] for name in POINTS} == dict.fromkeys(POINTS, 0)
    half = json.loads(student)
    for cell in half["cells"]:
        if cell["id"] == "exercise-kwise_loss":
            cell["source"] = source.solved("reward_model.kwise_loss")
        elif cell["id"] == "exercise-mean_reward":  # fools otter's own way of grading
            cell["source"] = "import os\ndef mean_reward(*given):\n    os._exit(0)\nos._exit(0)"
    found = score(assigned, half, "half")
    expected = {name: 5.0 if name == "kwise_loss" else 0.0 for name in POINTS}
    assert {name: found[name] for name in POINTS} == pytest.approx(expected)
