"""The builder, on a made-up chapter: cells, ids, nbgrader's marks, execution, what is refused."""

import base64
import copy
import os
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbformat.v4 import new_code_cell, new_notebook, new_output

import rlhf_course
from rlhf_course.coursework import build, execute, manuscript, notebook, project, references, source
from rlhf_course.errors import ConfigError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

ROOT = Path(__file__).parents[1]
STEM = "03_reward_model"
EXERCISES = ["reward_model.pairwise_loss", "reward_model.mean_reward"]
TEXT = r"""
# %% [markdown]
# # Chapter 3: The reward model
#
# What people prefer, $\sigma(r_a - r_b)$.

# %%
from rlhf_course.mdp import masked_mean

scale = 2

# %% exercise reward_model.pairwise_loss
# hint: Which difference is large
# when the model is right?
# hint: `F.logsigmoid`

# %%
print("the same cell twice")

# %% [markdown]
# A paragraph in between.

# %%
print("the same cell twice")

# %% exercise reward_model.mean_reward
# hint: One.
# hint: Two.
# hint: Three, with $x^2$.
"""


@pytest.fixture
def course(tmp_path):
    """A folder with one manuscript; `course(old, new)` edits it and returns its file."""
    file = tmp_path / "manuscript" / f"{STEM}.py"
    file.parent.mkdir()
    file.write_text(TEXT, encoding="utf-8")

    def edit(old: str = "", new: str = "") -> Path:
        text = file.read_text(encoding="utf-8")
        assert old in text
        file.write_text(text.replace(old, new, 1), encoding="utf-8")
        return file

    return edit


def built(file: Path, edition: str = notebook.CHAPTERS):
    return notebook.build(manuscript.read(file), edition)


def cell(made, id: str):
    (found,) = [c for c in made.cells if c.id == id]
    return found


# ---------------------------------------------------------------------------------------- cells


def test_a_chapter_opens_with_its_title_the_ways_out_and_the_boot_cell(course):
    made = built(course())
    title, ways, prose = made.cells[0].source.split("\n\n")
    assert title == "# Chapter 3: The reward model"
    assert prose.startswith("What people prefer, $\\sigma(")
    links = re.findall(r"\]\(([^)]*)\)", ways)
    assert f"../solutions/{STEM}.ipynb" in links
    assert {"02_sft.ipynb", "04_mdp.ipynb"} <= set(links)
    assert made.cells[1].id == "boot"
    assert made.cells[-1].source == "Next: [Chapter 4: mdp](04_mdp.ipynb)"


def test_the_boot_cell_tears_no_heading_from_its_text(course):
    course("$.\n", "$.\n#\n# ## You will learn\n#\n# - this\n#\n# ## Where we are\n#\n# Here.\n")
    made = built(course())
    assert made.cells[0].source.endswith("$.\n\n## You will learn\n\n- this")
    assert made.cells[1].id == "boot"
    assert made.cells[2].source.startswith("# What the exercises")
    assert made.cells[3].source == "## Where we are\n\nHere."


def test_the_exercises_imports_come_first_and_let_both_editions_run(course):
    for edition in (notebook.CHAPTERS, notebook.SOLUTIONS):
        made = built(course(), edition)
        code = [c.source for c in made.cells if c.cell_type == "code" and "check(" not in c.source]
        namespace = {}
        for text in [c for c in code if "%pip" not in c]:  # all but the first cell
            exec(compile(text, "<cell>", "exec"), namespace)
        assert {"pairwise_loss", "mean_reward", "torch", "F", "math"} <= set(namespace)


@pytest.mark.parametrize("edition", [notebook.CHAPTERS, notebook.SOLUTIONS])
def test_an_exercise_is_header_function_check_and_hints(course, edition):
    made = built(course(), edition)
    ids = [c.id for c in made.cells]
    first = ids.index("header-mean_reward")
    parts = ["header", "exercise", "check", "hints"]
    assert ids[first : first + 4] == [f"{part}-mean_reward" for part in parts]
    header, function, check, hints = made.cells[first : first + 4]
    assert header.source.split("\n\n") == [
        "### Exercise 3.2: mean_reward",
        "difficulty ●●○○○ · importance ●●●○○ · about 10 minutes · 2 points",
    ]
    text = source.blank if edition == notebook.CHAPTERS else source.solved
    assert function.source == text("reward_model.mean_reward")
    assert check.source == "check(mean_reward)"
    assert hints.source.count("<details><summary>Hint") == 3
    assert "\n\nThree, with $x^2$.\n\n</details>" in hints.source
    other = notebook.SOLUTIONS if edition == notebook.CHAPTERS else notebook.CHAPTERS
    assert hints.source.endswith(f"(../{other}/{STEM}.ipynb#Exercise-3.2:-mean_reward)")


def test_a_hint_may_have_several_lines(course):
    hints = cell(built(course()), "hints-pairwise_loss").source
    assert "\n\nWhich difference is large\nwhen the model is right?\n\n" in hints


def test_no_solution_stands_in_a_chapter(course):
    text = "\n".join(c.source for c in built(course()).cells)
    for id in EXERCISES:
        answer = source.definition(id).answer
        assert answer not in text
        assert answer in "\n".join(c.source for c in built(course(), notebook.SOLUTIONS).cells)


def test_a_method_is_checked_by_its_class(course):
    text = course().read_text(encoding="utf-8").replace("The reward model", "PPO")
    text = text.replace("Chapter 3", "Chapter 5")
    text = text.replace("reward_model.pairwise_loss", "ppo.AdaptiveKLController.update")
    text = text.replace("reward_model.mean_reward", "ppo.whiten")
    file = course().with_name("05_ppo.py")
    file.write_text(text, encoding="utf-8")
    made = built(file)
    name = "AdaptiveKLController-update"
    assert cell(made, f"check-{name}").source == "check(AdaptiveKLController)"
    class_line = "class AdaptiveKLController(ppo.AdaptiveKLController):\n"
    assert cell(made, f"exercise-{name}").source.startswith(class_line)
    assert cell(made, f"header-{name}").source.startswith(
        "### Exercise 5.1: AdaptiveKLController.update\n"
    )


def test_cells_carry_the_marks_of_nbgrader(course):
    made = built(course())
    marks = {c.id: c.metadata.nbgrader for c in made.cells if "nbgrader" in c.metadata}
    assert len(marks) == 2 * len(EXERCISES)
    assert len({mark.grade_id for mark in marks.values()}) == len(marks)
    keys = {"grade", "grade_id", "locked", "schema_version", "solution", "task"}
    answer, test = marks["exercise-pairwise_loss"], marks["check-pairwise_loss"]
    assert set(answer) == keys  # an autograded answer has no points of its own
    assert (answer.grade, answer.locked, answer.solution, answer.task) == (0, 0, 1, 0)
    assert set(test) == keys | {"points"}
    assert (test.grade, test.locked, test.solution, test.task) == (1, 1, 0, 0)
    assert test.points == 3
    assert answer.schema_version == test.schema_version == 3


# ------------------------------------------------------------------- the same text, the same bytes


def test_ids_are_valid_unique_and_stay_under_an_edit_elsewhere(course):
    before = built(course())
    nbformat.validate(before)
    ids = [c.id for c in before.cells]
    assert len(set(ids)) == len(ids)
    course(
        "A paragraph in between.", "Another text.\n#\n# %%\nprint(scale)\n\n# %% [markdown]\n# x"
    )
    course("scale = 2", "scale = 3")
    after = built(course())
    kept = [id for id in ids if id in {c.id for c in after.cells}]
    assert len(after.cells) == len(ids) + 2
    assert len(kept) == len(ids) - 2  # the two cells that were edited
    assert all(cell(before, id).source == cell(after, id).source for id in kept)


def test_an_edited_exercise_keeps_its_ids(course):
    ids = {c.id for c in built(course()).cells}
    course("hint: `F.logsigmoid`", "hint: another")
    assert {c.id for c in built(course()).cells} == ids


def test_the_bytes_do_not_depend_on_the_process(course):
    code = (
        "import sys; from pathlib import Path; from rlhf_course.coursework import *;"
        "from rlhf_course.coursework import manuscript, notebook;"
        "text = manuscript.read(Path(sys.argv[1]));"
        "print(notebook.write(notebook.build(text, 'solutions')).hex())"
    )
    seen = set()
    for seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", code, str(course())]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        seen.add(done.stdout.strip())
    assert seen == {notebook.write(built(course(), notebook.SOLUTIONS)).hex()}


def test_student_notebooks_have_no_outputs_and_fixed_metadata(course):
    made = built(course())
    assert made.metadata == notebook.METADATA
    assert (made.nbformat, made.nbformat_minor) == (4, 5)
    for code in [c for c in made.cells if c.cell_type == "code"]:
        assert (code.outputs, code.execution_count) == ([], None)


# ---------------------------------------------------------------------- the address and the version


def test_address_and_version_come_from_where_they_are_written_once(course, monkeypatch):
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    address = table["urls"]["Repository"]
    assert project.repository() == address
    pinned = f'"rlhf-course @ git+{address}@v{rlhf_course.__version__}"'
    made = built(course())
    assert pinned in made.cells[1].source
    slug = address.removeprefix("https://github.com/")
    opened = f"/github/{slug}/blob/v{rlhf_course.__version__}/chapters/{STEM}.ipynb)"
    assert opened in made.cells[0].source
    monkeypatch.setattr(project, "repository", lambda: "https://github.com/some/where")
    monkeypatch.setattr(rlhf_course, "__version__", "7.8.9")
    text = "\n".join(c.source for c in built(course()).cells)
    assert address not in text
    assert "git+https://github.com/some/where@v7.8.9" in text
    assert "/github/some/where/blob/v7.8.9/" in text


def test_prose_may_link_to_a_file_of_the_repository(course):
    course("A paragraph in between.", "See [it](repository:rlhf_course/ppo.py).")
    text = "\n".join(c.source for c in built(course()).cells)
    address = f"{project.repository()}/blob/v{rlhf_course.__version__}/rlhf_course/ppo.py"
    assert f"See [it]({address})." in text


def test_the_address_stands_in_no_other_source(course):
    address = project.repository()
    files = [*(ROOT / "rlhf_course").rglob("*.py"), *(ROOT / "manuscript").glob("*.py")]
    found = [f.name for f in files if address in f.read_text(encoding="utf-8")]
    assert not found, "in prose write [text](repository:path/of/file)"


def test_an_installed_package_has_the_address_in_its_metadata(tmp_path, monkeypatch):
    class Metadata:
        @staticmethod
        def get_all(key):
            return ["Home, https://a.b", "Repository, https://github.com/x/y/"]

    monkeypatch.setattr(project, "ROOT", tmp_path)
    monkeypatch.setattr(project.metadata, "metadata", lambda name: Metadata)
    project.repository.cache_clear()
    try:
        assert project.repository() == "https://github.com/x/y"
    finally:
        project.repository.cache_clear()


# --------------------------------------------------------------------------- manuscripts, misspelt


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("# # Chapter 3: The", "# # Chapter 4: The", "must be markdown and begin '# Chapter 3: '"),
        ("reward_model.mean_reward", "reward_model.mean", "not an exercise"),
        ("reward_model.mean_reward", "mdp.gae", "mdp.gae belongs to chapter 4"),
        ("reward_model.mean_reward", "reward_model.pairwise_loss", "stands there twice"),
        ("exercise reward_model.mean_reward", "aufgabe", "a title may only be"),
        ("# hint: One.\n# hint: Two.\n", "", "two or three hints"),
        ("# hint: Three, with $x^2$.", "# hint: Three\n# hint: Four", "two or three hints"),
        ("# hint: One.", "# hint:", "none of them empty"),
        ("exercise reward_model.mean_reward", "exercise", "'' is not an exercise"),
        ("# %%\nfrom rlhf_course.mdp", "# %% [raw]\n# from", "not raw"),
        ("# hint: One.", "x = 1", "'x = 1' is not a comment"),
        ("# hint: One.", "# Look here\n# hint: One.", "before the first"),
        ("scale = 2", "scale = (2", "was never closed"),
        ("scale = 2", "scale = 2  # " + 80 * "x", "the widest of 93 characters"),
        ("scale = 2", "scale = 2\n" * 20, "22 lines"),
    ],
)
def test_a_wrong_manuscript_is_refused_with_the_cell_named(course, old, new, says):
    with pytest.raises(ConfigError, match=re.escape(says)) as raised:
        built(course(old, new))
    assert str(raised.value).startswith(f"{STEM}.py")


def test_a_file_that_is_no_chapter_is_refused(course):
    other = course().with_name("03_reward.py")
    other.write_text(TEXT, encoding="utf-8")
    with pytest.raises(ConfigError, match="no chapter of this name"):
        manuscript.read(other)


# ------------------------------------------------------------------------------------- incremental


@pytest.fixture
def runs(monkeypatch):
    """Execution by a stand-in; the list counts its runs."""
    count = []

    def stand_in(made, environment=None):
        count.append(environment)
        made.metadata.language_info.version = "1.2.3"  # as a kernel does
        for number, code in enumerate([c for c in made.cells if c.cell_type == "code"], 1):
            code.execution_count = number
            code.outputs = [new_output("stream", name="stdout", text=f"run {len(count)}\n")]

    monkeypatch.setattr(execute, "execute", stand_in)
    return count


def make(course, capsys, **settings) -> tuple[str, str, bytes]:
    """(what was said about the chapter, about the solution, the solution's bytes)"""
    root = course().parents[1]
    assert build.build(build.BuildConfig(root=root, **settings))
    lines = [line.partition(": ")[2] for line in capsys.readouterr().out.splitlines()]
    file = root / "solutions" / f"{STEM}.ipynb"
    return lines[0], lines[1], file.read_bytes() if file.exists() else b""


def test_only_what_has_changed_is_executed(course, capsys, runs, monkeypatch):
    assert make(course, capsys, execute=False) == ("written", "out of date", b"")
    chapter, done, first = make(course, capsys)
    assert chapter == "unchanged"
    assert done.startswith("executed in 0 s, 0.0")
    assert make(course, capsys) == ("unchanged", "unchanged", first)
    assert len(runs) == 1

    course("A paragraph in between.", "Other words.")
    chapter, done, second = make(course, capsys)
    assert (chapter, done, len(runs)) == ("written", "refreshed", 1)
    assert b"Other words." in second
    assert second.count(b"run 1") == first.count(b"run 1") > 5

    course("scale = 2", "scale = 3")
    chapter, done, third = make(course, capsys)
    assert (chapter, done[:8], len(runs)) == ("written", "executed", 2)
    assert b"run 1" not in third

    monkeypatch.setattr(rlhf_course, "__version__", "9.9.9")
    chapter, done, fourth = make(course, capsys)
    assert (chapter, done, len(runs)) == ("written", "refreshed", 2)
    assert b"@v9.9.9" in fourth

    assert make(course, capsys, force=True)[1].startswith("executed")
    assert len(runs) == 3


def test_quick_mode_executes_and_writes_nothing(course, capsys, runs):
    _, _, before = make(course, capsys)
    _, done, after = make(course, capsys, quick=True)
    assert done.startswith("executed")
    assert runs == [None, {"RLHF_COURSE_QUICK": "1"}]
    assert before == after


def test_a_solution_is_stale_when_a_function_that_it_names_has_changed(tmp_path, monkeypatch):
    (tmp_path / "mdp.py").write_text(
        "from rlhf_course.base import h\n\ndef f(): return 1\n\nK = 2\n"
    )
    (tmp_path / "base.py").write_text("def h(): return 4\n")
    monkeypatch.setattr(source, "ROOT", tmp_path)

    def stamp(**edits):
        for name, (old, new) in edits.items():
            file = tmp_path / f"{name}.py"
            assert old in file.read_text()
            file.write_text(file.read_text().replace(old, new))
        source.module.cache_clear()
        cells = ["from rlhf_course.mdp import f, h\nf()", "from rlhf_course import mdp\nmdp.K"]
        return execute.fingerprint(new_notebook(cells=[new_code_cell(text) for text in cells]))

    try:
        seen = [stamp(), stamp(mdp=("return 1", "return 3"))]
        seen += [stamp(mdp=("K = 2", "K = 5")), stamp(base=("return 4", "return 6"))]
        assert len(set(seen)) == 4
        assert stamp(mdp=("\n\ndef", "\n\nunused = 1\n\ndef")) == seen[-1]
    finally:
        source.module.cache_clear()


def test_references_are_names_imported_and_attributes_of_modules():
    cells = ["from rlhf_course.mdp import masked_mean as m", "from rlhf_course import ppo, lab"]
    texts = references.texts([*cells, "ppo.whiten(x)\nlab.show(f)\nother.gae"])
    assert [text.partition("\n")[0] for text in texts] == [
        "rlhf_course.mdp.masked_mean", "rlhf_course.ppo.whiten",
    ]  # fmt: skip
    assert "def masked_mean(" in texts[0]


# --------------------------------------------------------------------------------------- execution

PNG = base64.b64encode(b"not looked at").decode()


def picture(alt: str | None):
    metadata = {"image/png": {"alt": alt}} if alt is not None else {}
    return new_output("display_data", {"image/png": PNG, "text/plain": "x"}, metadata=metadata)


def stream(name: str, text: str):
    return new_output("stream", name=name, text=text)


@pytest.mark.parametrize(
    ("output", "says"),
    [
        (new_output("error", ename="ValueError", evalue="no"), "ValueError: no"),
        (stream("stdout", "saved to /home/" + "me/run"), "names a place on this machine"),
        (stream("stdout", f"in {Path.home()}/.cache"), "names a place on this machine"),
        (new_output("execute_result", {"text/html": "<b>'/tmp/" + "x1/y'</b>"}), "text/html"),
        (stream("stderr", "warning\n" * 11), "11 lines of stderr"),
        (stream("stdout", "a line\n" * 41), "41 lines of stdout"),
        (new_output("execute_result", {"text/plain": "<F at 0x7f00aa11>"}), "an object's address"),
        (picture(None), "without alt text"),
        (picture(""), "without alt text"),
        (new_output("display_data", {"text/html": "<p><img src='x'></p>"}), "without alt text"),
        (stream("stdout", "x" * 1_500_000), "1.50 MB, at most 1.5"),
    ],
)
def test_outputs_that_must_not_be_published_are_refused(output, says):
    made = new_notebook(cells=[new_code_cell("x", outputs=[output])])
    with pytest.raises(ConfigError, match=re.escape(says)):
        build.finish(made, STEM)


def test_good_outputs_are_kept_and_traces_of_the_run_are_not():
    widget = {"application/vnd.jupyter.widget-view+json": {"model_id": "1"}, "text/plain": "HBox()"}
    good = [
        picture("a curve that falls"),
        stream("stdout", "1/2 and/or a/b https://x.y/home/page 3/tmp/4"),
        stream("stderr", "one line\n"),
    ]
    outputs = [*copy.deepcopy(good), new_output("display_data", widget)]
    code = new_code_cell("x", outputs=outputs, metadata={"execution": {"iopub": "2026-01-01"}})
    made = new_notebook(cells=[code], metadata={"widgets": {}, "language_info": {"name": "x"}})
    written = nbformat.reads(build.finish(made, STEM).decode(), as_version=4)
    assert written.cells[0].outputs == good
    assert "execution" not in written.cells[0].metadata
    assert set(written.metadata) == {"kernelspec", "language_info", "rlhf_course"}


def test_a_notebook_is_executed_in_this_python_with_figures(tmp_path):
    code = [
        "import sys\nprint(sys.executable == EXPECTED)".replace("EXPECTED", repr(sys.executable)),
        "import os\nprint(os.listdir(), os.environ['RLHF_COURSE_QUICK'])",
        "import rlhf_course\nimport matplotlib.pyplot as plt\nfrom rlhf_course import lab\n"
        "figure, axes = plt.subplots()\naxes.plot([1, 2])\nlab.show(figure, alt='a line')",
        "1 + 1",
    ]
    made = new_notebook(cells=[new_code_cell(text) for text in code])
    execute.execute(made, build.QUICK)
    execute.clean(made)
    assert made.cells[0].outputs[0].text == "True\n"
    assert made.cells[1].outputs[0].text == "[] 1\n"
    assert [a for o in made.cells[2].outputs for a in execute.alternatives(o)] == ["a line"]
    assert made.cells[3].outputs[0].data["text/plain"] == "2"
    assert execute.problems(made) == []
    assert all("execution" not in c.metadata for c in made.cells)


def test_a_cell_that_fails_stops_the_build(course, capsys):
    made = new_notebook(cells=[new_code_cell("x = 1"), new_code_cell("x / 0")])
    with pytest.raises(ConfigError, match=r"(?s)a cell failed.*x / 0.*ZeroDivisionError"):
        execute.execute(made)


def test_a_cell_that_hangs_and_a_kernel_that_dies_are_told(monkeypatch):
    monkeypatch.setattr(execute, "PATIENCE", 2)
    for code, says in (("import time\ntime.sleep(60)", "timed out"), ("exit", "died")):
        text = "import os\nos._exit(3)" if code == "exit" else code
        with pytest.raises(ConfigError, match=f"(?s)a cell failed.*{says}"):
            execute.execute(new_notebook(cells=[new_code_cell(text)]))


def test_a_failed_notebook_is_told_and_the_next_one_is_built(course, capsys, monkeypatch):
    def fail(made, environment=None):
        raise ConfigError("a cell failed.\nZeroDivisionError")

    monkeypatch.setattr(execute, "execute", fail)
    root = course().parents[1]
    monkeypatch.setattr(sys, "argv", ["build", "--root", str(root)])
    assert build.main() == 1
    assert "ZeroDivisionError" in capsys.readouterr().out
    assert not (root / "solutions").exists()
    (root / "manuscript" / "02_sft.py").write_text("# %% [markdown]\n# no title\n")
    assert build.main() == 1
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "chapters/02_sft: FAILED"
    assert f"chapters/{STEM}: unchanged" in lines
    monkeypatch.setattr(sys, "argv", ["build", "4", "--root", str(root)])
    assert build.main() == 2
    assert "there are only" in capsys.readouterr().err
