"""The exercises' source: where it is cut, what a blank leaves, which imports a cell needs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_course.coursework import source
from rlhf_course.coursework.exercises import EXERCISES, Exercise, find
from rlhf_course.errors import ConfigError

IDS = [exercise.id for exercise in EXERCISES]
ROOT = Path(__file__).parents[1]


def run(*cells: str) -> dict:
    """The namespace after these cells, as a notebook would have it."""
    namespace = {"__name__": "__main__"}
    for cell in cells:
        exec(compile(cell, "<cell>", "exec"), namespace)
    return namespace


@pytest.mark.parametrize("id", IDS)
def test_a_cell_runs_after_its_imports_and_defines_the_exercise(id):
    name = find(id).name
    for cell in (source.solved(id), source.blank(id)):
        namespace = run(source.imports([id]), cell)
        assert namespace[name].__module__ == "__main__"
    assert source.free_names(source.solved(id)) <= set(namespace)


@pytest.mark.parametrize("id", IDS)
def test_a_blank_differs_from_the_solution_in_what_stands_between_the_markers(id):
    solved, blank = source.solved(id).split("\n"), source.blank(id).split("\n")
    found = source.definition(id)
    head, tail = found.head.split("\n"), found.tail.split("\n")
    assert solved[: len(head)] == blank[: len(head)] == head
    assert solved[-len(tail) :] == blank[-len(tail) :] == tail
    assert blank[len(head) : -len(tail)] == [found.indent + "raise NotImplementedError"]
    assert found.answer.strip()
    assert "NotImplementedError" not in found.answer
    assert head[-1].strip() == "# BEGIN SOLUTION"
    assert tail[0].strip() == "# END SOLUTION"
    assert ast.get_docstring(ast.parse(source.blank(id)).body[0]), "a student reads a docstring"


@pytest.mark.parametrize("id", IDS)
def test_a_solution_is_the_text_of_the_package_letter_for_letter(id):
    text = "\n".join(source.module(source.definition(id).module).lines)
    lines = source.solved(id).split("\n")
    if source.definition(id).exercise.method:
        assert lines[0].startswith("class ")
        lines = lines[3:]  # the class, its docstring and an empty line are printed around it
    assert "\n".join(lines) in text


def test_a_decorator_belongs_to_the_function():
    assert source.solved("ppo_ptx.PopArt.update").split("\n")[3] == "    @torch.no_grad()"
    assert source.definition("gpt.sample_token").module == "rlhf_course.sampling"
    assert source.definition("ppo_ptx.masked_moments").module == "rlhf_course.moments"


def test_a_method_is_a_subclass_with_that_method_alone():
    (cell,) = ast.parse(source.solved("gpt.Block.forward")).body
    assert ast.unparse(cell.bases[0]) == "gpt.Block"
    assert [n.name for n in cell.body if isinstance(n, ast.FunctionDef)] == ["forward"]
    made = run(source.imports(["gpt.Block.forward"]), source.solved("gpt.Block.forward"))["Block"]
    from rlhf_course import gpt

    assert issubclass(made, gpt.Block)


def test_free_names_are_those_a_cell_reads_and_does_not_define():
    code = """
@decorated
def f(a: Kind, b=DEFAULT) -> Result:
    c: Local = a + [x for x in b if outer(x)]
    def inner():
        return c, global_one, print(a)
    lam = lambda y: y + other
    try:
        import os
    except Wrong as error:
        raise error from None
    return inner, os.path, f

class C(Base):
    size = 3
    def method(self):
        return super().method() + C.size
"""
    expected = "decorated Kind DEFAULT Result Local outer global_one other Wrong Base"
    assert source.free_names(code) == set(expected.split())


def test_imports_are_those_of_the_module_and_leave_out_what_the_student_wrote_before():
    alone = source.imports(["mdp.gae", "mdp.token_rewards"])
    assert "import torch\n" in alone
    assert "from torch import Tensor" in alone
    own = source.imports(["ppo_ptx.masked_moments", "ppo_ptx.RunningMoments.update"])
    assert "masked_moments" not in own
    assert "from rlhf_course import ppo_ptx" in own
    later = source.imports(["ppo_ptx.RunningMoments.update", "ppo_ptx.masked_moments"])
    assert "masked_moments" in later.split("from rlhf_course.moments import ")[1]
    assert source.imports([]) == ""


def test_the_import_lines_are_sorted_as_ruff_sorts_them(tmp_path):
    chapters = {exercise.chapter for exercise in EXERCISES}
    for chapter in chapters:
        lines = source.imports([e.id for e in EXERCISES if e.chapter == chapter])
        (tmp_path / f"chapter_{chapter}.py").write_text(lines + "\n", encoding="utf-8")
        assert max(map(len, lines.split("\n"))) <= source.WIDTH
    command = [sys.executable, "-m", "ruff", "check", "--isolated", "--select", "I,F811"]
    first_party = ["--config", "lint.isort.known-first-party=['rlhf_course']"]
    split = ["--config", "lint.isort.split-on-trailing-comma=false"]
    # Members that fill several lines are filled here and one a line there; only their order counts.
    wide = ["--line-length", "320"]
    for file in tmp_path.iterdir():
        joined = file.read_text().replace("(\n    ", "").replace(",\n)", "")
        file.write_text(joined.replace(",\n    ", ", "), encoding="utf-8")
    done = subprocess.run([*command, *first_party, *split, *wide, str(tmp_path)], cwd=ROOT)
    assert done.returncode == 0


@pytest.fixture
def package(tmp_path, monkeypatch):
    """write(text): a module `mdp` of its own in the place of the package's."""
    monkeypatch.setattr(source, "ROOT", tmp_path)
    source.module.cache_clear()

    def write(text: str) -> None:
        (tmp_path / "mdp.py").write_text(text, encoding="utf-8")

    yield write
    source.module.cache_clear()


GAE = "def gae(x):\n    # BEGIN SOLUTION\n    return x\n    # END SOLUTION\n\n\ny = 3\n"


def test_the_made_up_module_is_read(package):
    package(GAE)
    assert source.solved("mdp.gae") == GAE.split("\n\n\n")[0]
    assert source.definition("mdp.gae").with_answer("    a = 1\n    return a") == GAE.split(
        "\n\n\n"
    )[0].replace("return x", "a = 1\n    return a")


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (GAE.replace("# BEGIN SOLUTION", "pass"), "mdp.gae in rlhf_course.mdp: needs one pair"),
        (GAE.replace("    # END SOLUTION\n", ""), "needs one pair"),
        (GAE.replace("    # END SOLUTION", "        # END SOLUTION"), "at one depth"),
        (GAE.replace("# END SOLUTION", "# END SOLUTION\n    # END SOLUTION"), "needs one pair"),
        (GAE.replace("# BEGIN SOLUTION", "'# BEGIN SOLUTION'"), "needs one pair"),
        (GAE.replace("gae", "other"), "defines no function or class gae"),
        (GAE.replace("return x", "return unknown"), "unknown is used in a solution"),
    ],
)
def test_a_source_that_cannot_be_cut_is_an_error_that_says_where(package, text, says):
    package(text)
    with pytest.raises(ConfigError, match=says):
        source.imports(["mdp.gae"])


@pytest.mark.parametrize(
    ("id", "module", "qualname", "file"),
    [
        ("ppo.whiten", "ppo", "whiten", "ppo"),
        ("gpt.Block.forward", "gpt", "Block.forward", "gpt"),
        ("distributed.placement.place", "distributed.placement", "place", "distributed_placement"),
        ("a.b.Kind.method", "a.b", "Kind.method", "a_b"),
    ],
)
def test_an_id_is_a_module_and_a_name_in_it(id, module, qualname, file):
    exercise = Exercise(id, 1, 1, 1, 1, 1)
    assert (exercise.module, exercise.qualname, exercise.file) == (module, qualname, file)
    assert exercise.name == qualname.split(".")[0]
    assert (exercise.method or "") == qualname.partition(".")[2]


def test_an_unknown_exercise_is_named():
    with pytest.raises(ConfigError, match="not an exercise"):
        source.solved("mdp.gay")
