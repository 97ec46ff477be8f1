"""What is taken from students' notebooks, however they look, and which files are read at all."""

import inspect
import json
import os
import subprocess
import sys

import pytest
import torch

from rlhf_course.coursework import extract
from rlhf_course.coursework.cells import cells_of, parse, without_ipython
from rlhf_course.coursework.exercises import EXERCISES
from rlhf_course.coursework.extract import namespace, needed, statements
from rlhf_course.errors import DataError
from rlhf_course.grading import reader, submission


def notebook(*cells, **more) -> bytes:
    """A notebook as bare as can be."""
    made = [{"cell_type": "code", "source": cell} for cell in cells]
    return json.dumps({"cells": made, **more}).encode()


def defined(*cells, name="f", given=()):
    """What a name stands for when only what it needs has been run."""
    return namespace(needed(statements(cells), name, given)).get(name)


def kept(*cells):
    return [s.text for s in statements(cells)]


# -------------------------------------------------------------------------------------- the files


FORMATS = {
    "4, a string": {"cells": [{"cell_type": "code", "source": "x = 1\ny = 2"}]},
    "4, lines": {"cells": [{"cell_type": "code", "source": ["x = 1\n", "y = 2"]}]},
    "by hand, lines without ends": {"cells": [{"cell_type": "code", "source": ["x = 1", "y = 2"]}]},
    "3": {"worksheets": [{"cells": [{"cell_type": "code", "input": ["x = 1\n", "y = 2"]}]}]},
    "Colab": {
        "nbformat": 4,
        "nbformat_minor": 0,
        "metadata": {"colab": {"provenance": []}, "kernelspec": {"name": "python3"}},
        "cells": [{"cell_type": "code", "metadata": {"id": "b"}, "source": ["x = 1\n", "y = 2"]}],
    },
}


@pytest.mark.parametrize("kind", FORMATS)
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16"])
def test_notebooks_of_every_kind(kind, encoding):
    data = json.dumps(FORMATS[kind], ensure_ascii=False).encode(encoding)
    assert cells_of(data, ".ipynb") == ["x = 1\ny = 2"]
    assert cells_of(data, ".IPYNB") == ["x = 1\ny = 2"]


def test_cells_keep_their_numbers():
    cells = ["a = 1", None, 3, {}, {"cell_type": "markdown", "source": "# b = 2"}]
    whole = [{"cell_type": "code", "source": cell} if cell == "a = 1" else cell for cell in cells]
    whole.append({"cell_type": "code", "source": "\n\n@wraps\ndef f(): pass"})
    found = cells_of(json.dumps({"cells": whole}).encode(), ".ipynb")
    assert found == ["a = 1", None, None, None, None, "\n\n@wraps\ndef f(): pass"]
    assert [(s.cell, s.line) for s in statements(found)] == [(1, 1), (6, 3)]


def test_a_renamed_notebook_is_still_one():
    assert cells_of(notebook("x = 1"), ".py") == ["x = 1"]
    assert cells_of(b"{1: 2}\nx = 3", ".py") == ["{1: 2}\nx = 3"]


DEEP = b"[" * 100_000
WRONG = [
    b"",
    b"\0",
    b"[]",
    b"null",
    b"{}",
    b'{"cells": 3}',
    b"\xff\xfe no",
    DEEP,
    b'{"cells": [' + DEEP,
]
WRONG += [b"<html>", b"1" * 5000, b'{"worksheets": []}', b'{"worksheets": [{}]}']


@pytest.mark.parametrize("data", WRONG, ids=range(len(WRONG)))
def test_what_is_no_notebook(data):
    with pytest.raises(DataError, match=r"^not a notebook that can be read \(.+\)\.$"):
        cells_of(data, ".ipynb")


def test_python_files_in_every_encoding():
    for data in ("é = 1".encode(), "é = 1".encode("utf-8-sig"), "é = 1".encode("utf-16")):
        assert cells_of(data, ".py") == ["é = 1"]
    latin = "# -*- coding: latin-1 -*-\né = 1".encode("latin-1")
    assert cells_of(latin, ".py")[0].endswith("é = 1")
    for data in (b"\xe9 = 1", b"# coding: nonsense\nx = 1"):
        with pytest.raises(DataError, match="not a Python file"):
            cells_of(data, ".py")
    assert cells_of(b"x = 1\r\ny = 2\r\n", ".py") == ["x = 1\ny = 2\n"]


@pytest.mark.parametrize(
    ("text", "cells"),
    [
        ("x = 1\n# a\ny = 2", ["x = 1\n# a\ny = 2"]),
        ("# ---\n# jupyter:\n# ---\n\n# %%\nx = 1\n# %% [markdown]\n# y\n# %% a title\nz = 3",
         ["x = 1", None, "z = 3"]),
        ("import a\n#%%\nx = 1", ["import a", "x = 1"]),
        ("#!/usr/bin/env python\n# coding: utf-8\n\n# In[1]:\n\n\nx = 1\n\n# In[ ]:\n\ny = 2",
         ["\n\nx = 1\n", "\ny = 2"]),
        ("# %%\n# %%time\nx = 1", ["# %%time\nx = 1"]),
        ("x = 1\nrate = 3 # %% of it", ["x = 1\nrate = 3 # %% of it"]),
    ],
)  # fmt: skip
def test_python_files_are_cut_into_cells(text, cells):
    assert cells_of(text.encode(), ".py") == cells


def test_a_broken_piece_of_a_file_without_cells_costs_no_others():
    text = "import math\n\n\ndef f():\n    return math.pi\n\n\ndef broken(:\n    pass\n\n\n"
    text += '@g\ndef h():\n    """a"""\n    return (\n'
    (cell,) = cells_of(text.encode(), ".py")
    assert [(s.text.split("\n")[0], s.line) for s in statements([cell])] == [
        ("import math", 1),
        ("def f():", 4),
    ]


# ---------------------------------------------------------------------------------------- IPython


@pytest.mark.parametrize(
    ("cell", "plain"),
    [
        ("%matplotlib inline\nx = 1", "pass\nx = 1"),
        ("if 1:\n    %pip install a\nx = 1", "if 1:\n    pass\nx = 1"),
        ("!pip install a \\\n  'b\nx = 1", "pass\n\nx = 1"),
        ("files = !ls *.py\nx, y = %sx ls", "pass\npass"),
        ("?help\nhelp?\nnp.a??\nx = 1", "pass\npass\npass\nx = 1"),
        ("%%time\nx = 1", "\nx = 1"),
        ("# first\n%%capture out\n%%time\nx = 1", "# first\n\n\nx = 1"),
        ("%%bash\nls\nx=1", "\n\n"),
        ("%%writefile f.py\ndef f(): pass", "\n"),
        ("%%timeit\nx = 1", "\n"),
        ("  x = 1\n  !ls", "x = 1\npass"),
        ('!ls\ns = """\n%not\n!a\n"""\nt = (3\n%2)\nu = 7 \\\n%3\n# "\n!ls',
         'pass\ns = """\n%not\n!a\n"""\nt = (3\n%2)\nu = 7 \\\n%3\n# "\npass'),
        ("!it's (\nx != 1\nx %= 2\nx = '%s' % 3", "pass\nx != 1\nx %= 2\nx = '%s' % 3"),
        ("# a \\\n%ls", "# a \\\npass"),
        ("s = 'it\\'s ('\n%ls", "s = 'it\\'s ('\npass"),
    ],
)  # fmt: skip
def test_lines_of_ipython_are_passed_over(cell, plain):
    assert without_ipython(cell) == plain
    assert parse(cell)[0] == plain
    assert plain.count("\n") == cell.count("\n")


def test_python_that_looks_like_ipython_stays():
    for cell in ('def f():\n    """\n    % of it\n!x\n    """', "x = (3\n  % 2)", "y = 5 \\\n% 3"):
        assert parse(cell)[0] == cell


def test_a_broken_cell_costs_only_what_it_defines():
    cells = ["def f(): return 1", "def f(): return 2\ndef g(:", "def h(): return 3", "x = 'a"]
    found, broken = extract.read([*cells, "a\0b", "(" * 500, "-" * 100_000 + "1", "'\ud800'"])
    assert [s.text for s in found] == ["def f(): return 1", "def h(): return 3"]
    assert [number for number, _ in broken] == [2, 4, 5, 6, 7, 8]
    assert broken[0][1].startswith("line 2: ")
    assert all(reason for _, reason in broken)


# ---------------------------------------------------------------------------- what is a definition


DEFINITIONS = [
    "import math", "from torch import *", "def f(): train()", "async def f(): await g()",
    "class A:\n    x = 3", "@dataclass\nclass A:\n    x: int = 3",
    "X = 3", "X: int = 3", "X = Y = 'a'", "a, (b, *c) = 1, (2, 3)", "X = -1e9", "X = Y + 1",
    "X = float('-inf')", "X = range(len('abc'))", "X = {k: float(k) for k in range(3)}",
    "X = lambda x: train(x)", "f = g", "f = g if X else h", "X = a.b.c", "X = TABLE['a'][0]",
    "X += 1", "X |= {3}", "TABLE[3] = 1", "A.update = f", "X = (n := 10) * 2", "(n := 10)",
    "X = 'a b'.split()", "X = [1, 2].index(2)", "X = f'{float(3):.1f}'", "X = dict.fromkeys('ab')",
]  # fmt: skip
WITH_IMPORTS = [
    "X = torch.tensor([1.0, 2.0])", "X = torch.arange(3).float().mean()", "X = nn.Linear(3, 3)",
    "X = np.zeros(3)", "X = F.relu(torch.ones(3))", "X = math.log(2)", "X = partial(f, a=3)",
    "X = functools.lru_cache(None)(f)", "f = torch.no_grad()(f)", "f = torch.compile(f)",
    "X = sqrt(2)", "X = defaultdict(list)", "Row = namedtuple('Row', 'a b')", "T = TypeVar('T')",
    "X = torch.Generator().manual_seed(0)", "X = logging.getLogger(__name__)",
    "f = my_decorator(f)", "f = my_decorator(3)(f)", "X = build()", "X = Mine()", "X = Mine.make()",
    "X = placement.balanced_chunks([3, 1], 2)", "X = Channel()", "X = zero_bytes(3, 0, 1)",
    "X = mdp.sequence_mask(torch.ones(3), 4)", "X = PPOSettings()", "X = (lambda: 3)()",
]  # fmt: skip
WORK = [
    "print(3)", "f(3)", "check(f)", "'''text'''", "X: int", "for i in range(3): X = i",
    "while True: pass", "del X", "assert X", "raise SystemExit", "return 3", "await f()",
    "X = await build()", "X = lab.train('ppo')", "X = check(f)", "X = lab.model('sft')[0].eval()",
    "X = train()", "X = outer()", "X = input()", "X = open('a').read()", "X = exec('3')",
    "X = cluster.start()", "X = rlhf_course.distributed.run()",
    "X = unknown(3)", "X = unknown.method()", "X = [train() for _ in range(3)]", "X = figures.a(1)",
    "build = build(3)", "X = run_ppo(3)", "X = plt.figure()", "X = {'a': train()}",
    "X = f'{train()}'",
    "with open('a') as X: Y = 3", "if train(): X = 3", "X = rlhf_course.stages.ppo.run()",
    "X = (lambda: train())()", "X = yes and train()", "match X:\n    case 3: Y = 3",
        "X = [print(3)]",
]  # fmt: skip
PREAMBLE = """
import functools, logging, math, rlhf_course
import matplotlib.pyplot as plt, numpy as np, torch, torch.nn.functional as F
from collections import defaultdict, namedtuple
from functools import partial
from math import sqrt
from torch import nn
from typing import TypeVar
from rlhf_course import check, lab, mdp
from rlhf_course.distributed import cluster, placement
from rlhf_course.distributed.weight_sync import Channel
from rlhf_course.planning.memory import zero_bytes
from rlhf_course.plots import lessons_mdp as figures
from rlhf_course.ppo import PPOSettings
from rlhf_course.stages.ppo import run_ppo
def my_decorator(f): return f
def build(x=1): return helper(x)
def helper(x): return x
def train(): return lab.train("ppo")
def outer(): return train()
class Mine:
    pass
"""
GIVEN = len(statements([PREAMBLE]))


@pytest.mark.parametrize("text", DEFINITIONS + WITH_IMPORTS)
def test_definitions_are_kept(text):
    found = statements([PREAMBLE, text])[GIVEN:]
    assert [s.text for s in found] == [text]
    if text in DEFINITIONS:
        assert kept(text) == [text]


@pytest.mark.parametrize("text", WORK)
def test_the_notebooks_work_is_dropped(text):
    assert statements([PREAMBLE, text])[GIVEN:] == []


def test_each_imported_name_stands_by_itself():
    cell = "import a.b, c as d\nfrom e import (f,\n  g as h)\nfrom __future__ import annotations"
    assert kept(cell) == [
        "import a.b", "import c as d", "from e import f", "from e import g as h"
    ]  # fmt: skip
    assert kept("from .. import x\nfrom .a import y") == ["from .. import x", "from .a import y"]
    assert defined("from math import nonsense, pi\ndef f(): return pi")() > 3


def test_blocks_keep_their_definitions_alone():
    cell = (
        "try:\n    import a\nexcept ImportError:\n    print('no',\n          'a')\n    a = None\n"
        "if X:\n    A = 1; print(2); B = 3\n    for i in a: pass\nelif not X:\n    A = 2\nelse:\n"
        "    lab.train()\n    with torch.no_grad():\n        B = 4\n        check(B)\n"
    )
    found = statements(["import torch\n" + cell])
    assert [s.text for s in found[1:]] == [
        "try:\n    import a\nexcept ImportError:\n    pass\n\n    a = None",
        "if X:\n    A = 1; pass; B = 3\n    pass\nelif not X:\n    A = 2\nelse:\n"
        "    pass\n    with torch.no_grad():\n        B = 4\n        pass",
    ]
    assert [(s.line, set(s.binds)) for s in found[1:]] == [(2, {"a"}), (8, {"A", "B"})]
    assert kept("if lab.quick: train()\nif 3:\n    print(3)") == []
    assert kept("if 1:\n    x = 1\nelif train():\n    x = 2") == []
    nested = "if 1:\n\tif train():\n\t\tx = 1\n\tdef f():\n\t\treturn 'ü'"
    assert kept(nested) == ["if 1:\n\tpass\n\n\tdef f():\n\t\treturn 'ü'"]


def test_text_is_as_it_is_written():
    cell = "ü = 'ü'; y = 2 # two\n@wraps(\n  g)\n# why\ndef f(x):\n    # BEGIN\n"
    cell += "    return x  # END\nz = (1,\n  2)"
    assert kept(cell) == [
        "ü = 'ü'", "y = 2",
        "@wraps(\n  g)\n# why\ndef f(x):\n    # BEGIN\n    return x", "z = (1,\n  2)",
    ]  # fmt: skip
    assert [s.line for s in statements([cell])] == [1, 1, 2, 8]


def test_what_a_statement_binds_and_reads():
    cell = (
        "def f(x: T = D) -> R:\n    global count\n    count += step\n    y = x\n"
        "    def g(): return y + deep\n    return [i for i in many if (w := i)] + g()\n"
    )
    (found,) = statements([cell])
    assert found.binds == found.defines == {"f"}
    assert found.reads >= {"T", "D", "R", "count", "step", "deep", "many"}
    assert not found.reads & {"x", "y", "i", "w", "g"}
    (found,) = statements(["class A(B):\n    y = Z\n    def g(self): return y, A"])
    assert (found.binds, found.reads) == ({"A"}, {"B", "Z", "y", "A"})
    (found,) = statements(["A.b.c, D[e] = X, Y"])
    assert (found.binds, found.defines) == ({"A", "D"}, {"A"})
    assert {"A", "D", "e", "X", "Y"} <= found.reads
    (found,) = statements(["x = [(n := i) for i in (1, 2)]"])
    assert found.binds == {"x", "n"}


# ----------------------------------------------------------------------------------- what is needed


@pytest.mark.parametrize(
    "cells",
    [
        ["def f(): return 1", "def f(): return 7"],
        ["def f(): return 7", "f = f(3)", "f = 3", "for f in (1, 2): pass"],
        ["def f(): return 7", "from math import sin as f"],
        ["def h(x): return 7 if x else h(1)", "def my_f(): return h(0)", "f = my_f"],
        ["def f(): return g()", "def g(): return SEVEN", "SEVEN = len('seven77')"],
        ["f = lambda: N", "N = 3", "N = 7"],
        ["def f(): return TABLE[1]", "TABLE = {}", "TABLE[1] = 7", "print(TABLE)"],
        ["count = 6", "def f():\n    global count\n    count += 1\n    return count"],
        ["def twice(g): return lambda: 2 * g()", "@twice\ndef f(): return 3.5"],
        ["def twice(g): return lambda: 2 * g()", "def f(): return 3.5", "f = twice(f)"],
        ["def make(n):\n    def inner(): return n\n    return inner", "f = make(7)"],
        ["import functools", "def g(n): return n", "f = functools.partial(g, 7)"],
        ["from math import *", "def f(): return floor(7.5)"],
        ["try:\n    import nonsense as n\nexcept ImportError:\n    n = 7\n    print(n)",
         "def f(): return n"],
        ["%%time\ndef f():\n    return 7", "%%bash\nf=3"],
        ["class A:\n    def __call__(self): return 7", "f = A()"],
        ["def f(): return 3", "def g(): return 7", "f, x = g, 3"],
        ["def f(): return 7", "mine = f, 3", "def f(): return 8", "f, x = mine"],
        ["def f(): return 7", "mine = {'f': f}", "def f(): return 8", "f = mine['f']"],
        ["def f(x: Missing['a b'] | 'None' = None) -> Nowhere: return 7"],
        ["from __future__ import annotations", "def f(x: int | Missing = 3): return 7"],
        ["from dataclasses import dataclass",
         "@dataclass\nclass A:\n    n: int = 7\ndef f(): return A().n"],
        ["from __future__ import annotations\nfrom dataclasses import dataclass",
         "@dataclass\nclass A:\n    n: Missing = 7\ndef f(): return A().n"],
        ["import torch", "X = torch.tensor([3, 4])", "def f(): return X.sum()"],
        ["if True:\n    def f(): return 7\nelse:\n    def f(): return 8"],
        ["a = (n := 3) + 4", "def f(): return a + n - 3"],
        ["def f(): return 7", "def f(: return 8"],
        ["def g(): raise SystemExit", "x = g()", "def f(): return 7"],
        ["def g(): raise SystemExit", "x = g()", "def f(): return 7 or x"],
        ["from typing import NamedTuple", "class P(NamedTuple):\n    a: int = 7",
         "def f(): return P().a"],
        ["from enum import Enum", "class P(Enum):\n    A = 7", "def f(): return P.A.value"],
        ["class A:\n    pass", "def method(self): return 7", "A.method = method",
         "def f(): return A().method()"],
    ],
)  # fmt: skip
def test_what_a_function_needs_is_enough(cells):
    assert defined(*cells)() == 7


def test_what_a_function_does_not_need_is_not_run():
    cells = ["def g():\n    while True: pass", "x = g()", "def f(): return 1", "y = f() + x"]
    assert [s.text for s in needed(statements(cells), "f")] == ["def f(): return 1"]
    assert needed(statements(cells), "nothing") == []


def test_given_names_are_imported_at_most():
    cells = [
        "from m import gae, x",
        "def gae(): return h()",
        "def h(): pass",
        "def f(): return gae()",
    ]
    found = [s.text for s in needed(statements(cells), "f", given={"gae"})]
    assert found == ["from m import gae", "def f(): return gae()"]


def test_a_class_may_extend_the_one_of_its_name():
    cells = [
        "from rlhf_course.ppo import AdaptiveKLController",
        "class AdaptiveKLController(AdaptiveKLController):\n    def update(self, kl, n): return 7",
        "from rlhf_course.ppo import AdaptiveKLController",  # the next chapter's
    ]
    made = defined(*cells, name="AdaptiveKLController")
    assert made(0.1, 1.0, 100).update(1, 2) == 7


def test_an_error_says_the_line_of_its_cell():
    cells = ["", "\n\ndef f():\n    return 1 / 0"]
    with pytest.raises(ZeroDivisionError) as caught:
        defined(*cells)()
    frame = caught.traceback[-1]
    assert (frame.frame.code.raw.co_filename, frame.lineno + 1) == ("<cell 2>", 4)


def test_the_older_of_two_lives_where_only_the_newer_fails():
    assert defined("X = torch.nonsense", "X = 3", "def f(): return X")() == 3
    assert torch.equal(defined("import torch", "f = torch.eye(2)"), torch.eye(2))


# ------------------------------------------------------------------------------------------- reader


def test_the_solutions_define_the_exercises_of_their_chapter(request):
    folder = request.config.rootpath / "solutions"
    for file in sorted(folder.glob("*.ipynb")):
        found = reader.read({file.name: file.read_bytes()})
        chapter = int(file.name[:2])
        assert found["problems"] == []
        assert found["defines"] == [e.id for e in EXERCISES if e.chapter == chapter]


def test_a_chapters_own_wrong_examples_are_not_the_answer(request):
    for file in sorted((request.config.rootpath / "solutions").glob("*.ipynb"))[1:]:
        cells = cells_of(file.read_bytes(), ".ipynb")
        for exercise in (e for e in EXERCISES if e.chapter == int(file.name[:2])):
            found = namespace(needed(statements(cells), exercise.name))[exercise.name]
            made = inspect.unwrap(getattr(found, exercise.method) if exercise.method else found)
            number = int(made.__code__.co_filename.removeprefix("<cell ").removesuffix(">"))
            assert "# BEGIN SOLUTION" in cells[number - 1], exercise.id


def test_the_reader_says_where_it_found_what():
    files = {
        "a.ipynb": notebook("import torch", "%%time\ndef gae(): return torch, LAMBDA", "LAMBDA = 1")
    }
    assert reader.read(files) == {
        "answers": {
            "mdp.gae": [
                ["import torch", 1, 1, "a.ipynb"],
                ["def gae(): return torch, LAMBDA", 2, 2, "a.ipynb"],
                ["LAMBDA = 1", 3, 1, "a.ipynb"],
            ]
        },
        "problems": [],
        "defines": ["mdp.gae"],
    }


def answer(files, id="mdp.gae"):
    return reader.read(files)["answers"][id][-1][3]


def test_which_of_several_files_answers():
    one, other = notebook("def gae(): return 1"), notebook("def gae(): return 2")
    blank = notebook("def gae():\n    raise NotImplementedError")
    assert answer({"b.ipynb": one, "a.py": b"def gae(): pass"}) == "b.ipynb"
    assert answer({"b.ipynb": one, "c.py": b"def gae(): pass"}) == "c.py"
    assert answer({"a.ipynb": one, "b.ipynb": blank}) == "a.ipynb"
    assert answer({"a.ipynb": blank, "b.ipynb": blank}) == "b.ipynb"
    assert answer({"04_mdp (1).ipynb": one, "08_beyond_ppo.ipynb": other}) == "04_mdp (1).ipynb"
    assert reader.read({"00_tour.ipynb": one})["defines"] == []  # it shows a wrong one
    helper = b"def helper(): return 3"
    found = reader.read({"a.ipynb": notebook("def gae(): return helper()"), "b.py": helper})
    assert [text for text, *_ in found["answers"]["mdp.gae"]] == ["def gae(): return helper()"]


def test_earlier_exercises_are_left_to_the_course_and_later_ones_are_not():
    cell = "def action_mask(): return gae()\ndef gae(): return action_mask(), whiten()\n"
    cell += "def whiten(): 3"
    found = reader.read({"a.ipynb": notebook(cell)})["answers"]
    assert [text[:7] for text, *_ in found["mdp.gae"]] == ["def gae", "def whi"]
    assert [text[:7] for text, *_ in found["mdp.action_mask"]] == ["def act", "def gae", "def whi"]


def test_a_variable_of_an_exercises_name_is_no_answer():
    cells = [
        "pack = 3",
        "from rlhf_course.mdp import gae",
        "whiten = [1, 2]",
        "def g(): pass",
        "generate = g()",
    ]
    assert reader.read({"a.ipynb": notebook(*cells)})["defines"] == []


def test_the_reader_tells_what_it_cannot_read():
    files = {
        "a.ipynb": b"[]",
        "b.ipynb": notebook("x = 1", "def gae(:", "def gae(): pass"),
        "c.py": b"\xff\xff",
        "d.ipynb": notebook(*["("] * 100),
    }
    found = reader.read(files)
    assert found["defines"] == ["mdp.gae"]
    assert found["problems"][0].startswith("a.ipynb: not a notebook that can be read (")
    assert found["problems"][1].startswith("b.ipynb, cell 2: not valid Python")
    assert found["problems"][2].startswith("c.py: not a Python file")
    assert len(found["problems"]) == reader.MOST_PROBLEMS + 1
    assert reader.read({}) == {"answers": {}, "problems": [], "defines": []}


def test_the_reader_bears_what_is_hostile():
    deep = "x = " + "(" * 90 + "1" + ")" * 90
    hostile = {
        "deep.ipynb": notebook(deep, "y = " + "-" * 900 + "1", "z = " + "+".join("1" * 3000),
            "x" + ".a" * 3000),
        "types.ipynb": json.dumps({"cells": [{"cell_type": "code",
            "source": [1, None, ["x"]]}]}).encode(),
        "surrogate.ipynb": b'{"cells": [{"cell_type": "code", "source": "# \\ud800"}]}',
        "good.ipynb": notebook("def gae(): pass"),
        "big.py": b"%x\n" * 50_000,
        "quotes.py": b'"' * 100_000 + b"\n(" * 1000,
    }  # fmt: skip
    found = reader.read(hostile)
    assert found["defines"] == ["mdp.gae"]
    json.dumps(found, ensure_ascii=False).encode()


def test_taking_apart_needs_no_torch():
    code = "import sys; from rlhf_course.coursework import extract; print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# --------------------------------------------------------------------------------------- submission


def test_a_file_and_a_folder(tmp_path):
    (tmp_path / "Ann").mkdir()
    for name in ("04_mdp.ipynb", "03_reward_model (1).ipynb", "b/x.PY", "notes.txt", "test_x.py",
                 "conftest.py", ".hidden.py", ".ipynb_checkpoints/y.ipynb", "venv/z.py",
                 "__MACOSX/._04_mdp.ipynb", "mine/pyvenv.cfg", "mine/lib/a.py"):  # fmt: skip
        file = tmp_path / "Ann" / name
        file.parent.mkdir(exist_ok=True, parents=True)
        file.write_text(name)
    found = submission.find(tmp_path / "Ann")
    assert found.name == "Ann"
    assert list(found.files) == ["03_reward_model (1).ipynb", "04_mdp.ipynb", "b/x.PY"]
    assert found.files["b/x.PY"] == b"b/x.PY"
    assert found.problems == ()
    found = submission.find(tmp_path / "Ann" / "04_mdp.ipynb", name="Bob")
    assert (found.name, found.files) == ("Bob", {"04_mdp.ipynb": b"04_mdp.ipynb"})


def test_the_courses_own_solutions_are_not_the_students(tmp_path):
    for name in ("chapters/a.ipynb", "solutions/a.ipynb", "rlhf_course/mdp.py", "manuscript/a.py"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text("")
    found = submission.find(tmp_path)
    assert list(found.files) == ["chapters/a.ipynb"]
    assert len(found.problems) == 3
    assert submission.expand([tmp_path]) == [tmp_path]


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links, pipes and names of bytes")
def test_links_pipes_and_odd_names(tmp_path):
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "secret.py").write_text("secret")
    inside = tmp_path / "in"
    inside.mkdir()
    (inside / "link.py").symlink_to(outside / "secret.py")
    (inside / "up.py").symlink_to("../outside/secret.py")
    (inside / "dangling.ipynb").symlink_to("nowhere")
    (inside / "loop.py").symlink_to("loop.py")
    (inside / "folder").symlink_to(outside)
    os.mkfifo(inside / "pipe.py")
    (inside / "a.py").mkdir()
    for name in (b"line\n# end.py", b"\xff.py", b"\xfe.py", "\u202e.py".encode(), b"a\\..\\x.py"):
        with open(os.path.join(os.fsencode(inside), name), "wb") as file:
            file.write(name)
    found = submission.find(inside)
    odd = ["a\\..\\x.py", "? (2).py", "? (3).py", "?.py", "line?# end.py"]
    assert sorted(found.files) == sorted(odd)
    assert len(found.problems) == 6
    assert sum("link" in problem for problem in found.problems) == 5
    assert "pipe.py: not read, because it is not a regular file." in found.problems
    assert b"secret" not in b"".join(found.files.values())
    for text in (*found.files, *found.problems):
        assert text.isprintable()
        assert str(tmp_path) not in text
    for path in (inside / "link.py", inside / "folder", inside / "pipe.py"):
        found = submission.find(path)
        assert (found.files, len(found.problems)) == ({}, 1)
    (tmp_path / "class").mkdir()
    (tmp_path / "class" / "eve").symlink_to(outside)
    (eve,) = submission.expand([tmp_path / "class"])
    assert submission.find(eve).files == {}


def test_sizes_and_numbers(tmp_path, monkeypatch):
    with open(tmp_path / "a.ipynb", "wb") as file:
        file.truncate(200 << 20)
    for i in range(submission.MOST_FILES + 5):
        (tmp_path / f"b{i:03}.py").write_text("x = 1")
    found = submission.find(tmp_path)
    assert len(found.files) == submission.MOST_FILES - 1
    assert any("a.ipynb: not read, because it has more than 32 MB" in p for p in found.problems)
    assert any("only the first 100" in problem for problem in found.problems)
    monkeypatch.setattr(submission, "TOTAL_BYTES", 12)
    found = submission.find(tmp_path)
    assert list(found.files) == ["b000.py", "b001.py"]
    monkeypatch.setattr(submission, "MOST_ENTRIES", 3)
    assert any("3 entries" in problem for problem in submission.find(tmp_path).problems)


def test_a_deep_folder_ends(tmp_path):
    deepest = tmp_path
    for _ in range(30):
        deepest /= "d"
    deepest.mkdir(parents=True)
    (deepest / "x.py").write_text("x = 1")
    found = submission.find(tmp_path)
    assert found.files == {}
    assert len(found.problems) == 1


def refused(*args, **more):
    raise PermissionError(13, "Permission denied")


def test_what_the_system_refuses_is_said(tmp_path, monkeypatch):
    (tmp_path / "x.py").write_text("x = 1")
    monkeypatch.setattr(submission.os, "open", refused)
    assert submission.find(tmp_path).problems == (
        "x.py: not read, because the system refuses (Permission denied).",
    )
    monkeypatch.setattr(submission.os, "scandir", refused)
    assert "Permission denied" in submission.find(tmp_path).problems[0]


def test_a_class_is_a_folder_of_folders(tmp_path):
    for name in ("ann/03.ipynb", "bob/a/b/03.ipynb", "cleo/readme.txt", ".git/x.py"):
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text("")
    (tmp_path / "readme.md").write_text("")
    students = submission.expand([tmp_path])
    assert [path.name for path in students] == ["ann", "bob", "cleo"]
    assert list(submission.find(students[1]).files) == ["a/b/03.ipynb"]
    assert submission.find(students[2]).problems == ("There is no notebook and no .py file in it.",)
    assert submission.expand([tmp_path / "ann"]) == [tmp_path / "ann"]
    file = tmp_path / "ann" / "03.ipynb"
    assert submission.expand([file, tmp_path / "ann"]) == [file, tmp_path / "ann"]
    for wrong in (tmp_path / "dan", tmp_path / "readme.md", tmp_path / "cleo"):
        with pytest.raises(DataError, match=wrong.name):
            submission.expand([wrong])
    with pytest.raises(DataError):
        submission.expand([])
    with pytest.raises(DataError):
        submission.find(tmp_path / "dan")


def test_names_are_unlike_and_fit_for_files(tmp_path):
    paths = [tmp_path / name for name in ("a/ann", "b/Ann.ipynb", "c/ann.py", "ann-2", "j. r. doe")]
    assert submission.names(paths) == ["ann", "Ann-2", "ann-3", "ann-2-2", "j. r. doe"]
    for name in ("<script>", "a\nb", "x" * 300, "é" * 100, "..", "=cmd()", "a:b|c", "\udcff"):
        made = submission.name_of(tmp_path / f"{name}.py")
        assert made
        assert not set(made) & set("<>\n:|/=")
        assert len(made.encode()) <= 80


def test_a_file_with_a_mistake_says_where_it_is():
    text = b"def whiten(x, mask):\n    return x\n\ndef gae(\n    return\n\nY = 1\n"
    found = reader.read({"a.py": text})
    assert found["problems"] == [
        "a.py, line 4: not valid Python, so the definition there does not count "
        "('(' was never closed)."
    ]
    assert set(found["answers"]) == {"ppo.whiten"}
    assert reader.read({"a.py": text.replace(b"(\n", b"():\n")})["problems"] == []


def test_a_helper_may_have_the_name_of_an_earlier_chapters_exercise():
    """In a chapter's own file it is the student's; an answer pasted into any other is not taken."""
    text = (
        b"def whiten(x):\n    return x\n\ndef gae(*a):\n    return 1\n\n"
        b"def grpo_advantages(rewards, group):\n    return whiten(gae(rewards))\n"
    )
    for name, taken in (("08_beyond_ppo.py", {"whiten", "gae"}), ("all.py", set())):
        found = reader.read({name: text})["answers"]["beyond_ppo.grpo_advantages"]
        texts = "".join(statement[0] for statement in found)
        assert {each for each in ("whiten", "gae") if f"def {each}" in texts} == taken
    same = text.replace(b"grpo", b"rloo") + b"\ndef dpo_loss(*a):\n    return rloo_advantages(*a)\n"
    found = reader.read({"08_beyond_ppo.py": same})["answers"]
    assert "def dpo_loss" in found["beyond_ppo.dpo_loss"][-1][0]


def test_each_statement_crosses_once():
    text = b"import torch\nT = 3\ndef gae(x):\n    return T\n\ndef whiten(x):\n    return T\n"
    found = reader.read({"a.py": text})
    sent = reader.packed(found)
    assert [s[0] for s in sent["statements"]].count("T = 3") == 1
    assert reader.unpacked(sent) == {
        id: [tuple(s) for s in each] for id, each in found["answers"].items()
    }
