"""The chapters themselves: built from their manuscripts, not stale, and running from top to bottom.

They are executed in quick mode, where models are tiny and hardly trained: it shows that every cell
works, and that every check of a right answer is green.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from filelock import FileLock
from nbformat.v4 import new_code_cell

from rlhf_course.coursework import build, execute, exercises, manuscript, notebook, source

ROOT = Path(__file__).parents[1]
FILES = build.manuscripts(ROOT)
NAMES = [file.stem for file in FILES]
TRACED = "03_reward_model"
every_chapter = pytest.mark.parametrize("file", FILES, ids=NAMES)


def committed(edition: str, stem: str):
    file = build.target(ROOT, edition, stem)
    assert file.exists(), f"{file.name} was never built: make notebooks"
    return nbformat.read(file, as_version=4)


# ------------------------------------------------------------------------ what is in the repository


def test_all_chapters_are_there_and_every_exercise_is_printed_once():
    assert [manuscript.file_name(chapter) for chapter in range(len(exercises.STEMS))] == NAMES
    # In the table's order, too: numbers, and what is given while one is graded, go by it.
    printed = [e.id for file in FILES for e in manuscript.read(file).exercises]
    assert printed == [exercise.id for exercise in exercises.EXERCISES]


@pytest.mark.parametrize("edition", [notebook.CHAPTERS, notebook.SOLUTIONS])
def test_there_is_no_notebook_without_a_manuscript(edition):
    assert {file.stem for file in (ROOT / edition).glob("*.ipynb")} <= set(NAMES)


@every_chapter
def test_the_student_notebook_is_what_its_manuscript_says(file):
    built = notebook.build(manuscript.read(file), notebook.CHAPTERS)
    place = build.target(ROOT, notebook.CHAPTERS, file.stem)
    assert place.exists() and place.read_bytes() == notebook.write(built), "make notebooks"


@every_chapter
def test_the_solution_is_what_its_manuscript_says_and_ran_as_it_stands(file):
    built = notebook.build(manuscript.read(file), notebook.SOLUTIONS)
    executed = committed(notebook.SOLUTIONS, file.stem)
    assert execute.take_outputs(built, executed), "its code has changed since: make notebooks"
    assert notebook.write(built) == notebook.write(executed), (
        "its prose has changed: make notebooks"
    )


@every_chapter
def test_the_executed_solution_is_complete_light_and_clean(file):
    executed = committed(notebook.SOLUTIONS, file.stem)
    code = [cell for cell in executed.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in code] == list(range(1, len(code) + 1))
    assert execute.problems(executed) == []
    assert build.target(ROOT, notebook.SOLUTIONS, file.stem).stat().st_size <= execute.LARGEST
    assert green(executed) == len(manuscript.read(file).exercises)


@every_chapter
def test_links_between_notebooks_lead_somewhere(file):
    stems = {manuscript.file_name(chapter) for chapter in range(len(exercises.STEMS))}
    for edition in (notebook.CHAPTERS, notebook.SOLUTIONS):
        made = notebook.build(manuscript.read(file), edition)
        for cell in made.cells:
            for part in cell.source.split("](")[1:] if cell.cell_type == "markdown" else ():
                target = part.partition(")")[0].partition("#")[0]
                if target.endswith(".ipynb") and "://" not in target:
                    place = (ROOT / edition / target).resolve()
                    assert place.parent.name in (notebook.CHAPTERS, notebook.SOLUTIONS)
                    assert place.stem in stems


@every_chapter
def test_links_to_files_of_the_repository_lead_somewhere(file):
    text = file.read_text(encoding="utf-8")
    paths = [part.partition(")")[0] for part in text.split(notebook.FILE)[1:]]
    assert [path for path in paths if not (ROOT / path.partition("#")[0]).exists()] == []


# ------------------------------------------------------------------------------------- they all run


def green(executed) -> int:
    """How many checks were displayed; each of them must be all right."""
    shown = [cell for cell in executed.cells if cell.id.startswith("check-")]
    for cell in shown:
        text = "".join(str(o.get("data", {}).get("text/plain", "")) for o in cell.outputs)
        assert "✓" in text, f"{cell.source}: {text or cell.outputs}"
        assert "✗" not in text, text
        assert "not written" not in text, text
    return len(shown)


@pytest.fixture(scope="session")
def base_models(tmp_path_factory, worker_id):
    """A folder with the base models of both worlds, made once for all test processes."""
    shared = tmp_path_factory.getbasetemp()
    if worker_id != "master":
        shared = shared.parent
    home, done = shared / "course-home", shared / "course-home-done"
    with FileLock(shared / "course-home.lock"):
        if not done.exists():
            code = "from rlhf_course import lab; lab.ensure('ppo', 'town')"
            subprocess.run([sys.executable, "-c", code], env=quick(home), cwd=ROOT, check=True)
            done.touch()
    return home


def quick(home: Path) -> dict[str, str]:
    return {**os.environ, **build.QUICK, "RLHF_COURSE_HOME": str(home), "OMP_NUM_THREADS": "1"}


@pytest.fixture
def run(base_models, tmp_path):
    """run(notebook): execute it in quick mode, with a copy of the base models to itself."""
    home = tmp_path / "home"
    shutil.copytree(base_models, home)

    def execute_quickly(made) -> None:
        execute.execute(made, quick(home))
        execute.clean(made)
        assert execute.problems(made) == []

    return execute_quickly


@pytest.mark.parametrize("file", [f for f in FILES if f.stem != TRACED], ids=lambda f: f.stem)
def test_the_solution_runs_in_quick_mode(file, run):
    made = notebook.build(manuscript.read(file), notebook.SOLUTIONS)
    run(made)
    assert green(made) == len(manuscript.read(file).exercises)


def typed_in(cell, exercise: exercises.Exercise) -> str:
    """A student's cell with the body written, and a first line that leaves a trace."""
    found = source.definition(exercise.id)
    blank = f"{found.indent}{source.BLANK}"
    assert cell.source.count(blank) == 1
    trace = f"{found.indent}CALLS.append({exercise.name!r})\n"
    return cell.source.replace(blank, trace + found.answer)


def test_a_student_types_the_bodies_in_and_training_uses_them(run):
    """From the committed student notebook of chapter 3; the traces are counted around training."""
    made = committed(notebook.CHAPTERS, TRACED)
    text = manuscript.read(ROOT / "manuscript" / f"{TRACED}.py")
    for exercise in text.exercises:
        (cell,) = [c for c in made.cells if c.id == f"exercise-{exercise.qualname}"]
        cell.source = typed_in(cell, exercise)
    trains = ["lab.train(" in c.source and "own=" in c.source for c in made.cells].index(True)
    made.cells.insert(trains + 1, new_code_cell("print(*sorted(set(CALLS)))"))
    made.cells.insert(trains, new_code_cell("CALLS.clear()"))
    made.cells.insert(1, new_code_cell("CALLS = []"))
    run(made)
    assert green(made) == len(text.exercises)
    used = set(made.cells[trains + 3].outputs[0].text.split())
    assert {"kwise_loss", "last_token_reward", "normalize_rewards"} <= used


def test_a_blank_chapter_is_told_kindly_where_it_stands(run):
    """Up to the first check: no traceback, and the words say what to do."""
    made = committed(notebook.CHAPTERS, TRACED)
    first = [cell.id.startswith("check-") for cell in made.cells].index(True)
    made.cells = made.cells[: first + 1]
    run(made)
    assert "not written yet" in made.cells[-1].outputs[0].data["text/plain"]
