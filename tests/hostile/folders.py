"""Submissions whose files are the attack: their names, what they are, and what they hold."""

import json
import os
import socket
from pathlib import Path

from hostile.bank import FILE, FULL, HEAD, MODULES, SOLUTION, WRONG, Hostile

BAD = f"{MODULES}\n{HEAD}    {WRONG}\n"
PASSING = (
    "import pytest\n\n"
    "@pytest.hookimpl(tryfirst=True)\ndef pytest_pyfunc_call(pyfuncitem):\n    return True\n\n"
    "def pytest_runtest_makereport(item, call):\n    call.excinfo = None\n"
)
CRASHING = "import os\nos._exit(0)\nraise SystemExit\n"
NOTEBOOK = "03_reward_model.ipynb"


def notebook(*cells, **more) -> str:
    """The text of a notebook with these code cells."""
    listed = [{"cell_type": "code", "metadata": {}, "source": cell} for cell in cells]
    return json.dumps({"cells": listed, "metadata": {}, "nbformat": 4, "nbformat_minor": 5} | more)


def links(folder: Path) -> None:
    """Links to what lies elsewhere, and to themselves."""
    solutions = Path(__file__).parents[2] / "solutions" / NOTEBOOK
    for name, target in {
        "03_reward_model_a.ipynb": solutions, "solutions": solutions.parent, "etc": "/etc",
        "03_reward_model_b.py": "/etc/passwd", "loop": folder, "03_reward_model_c.py": "/dev/zero",
        "03_reward_model_d.py": f"../../../../../../../../..{solutions}", "self.py": "self.py",
    }.items():  # fmt: skip
        (folder / name).symlink_to(target)


def pipes(folder: Path) -> None:
    """What blocks whoever opens it."""
    os.mkfifo(folder / NOTEBOOK)
    here = os.getcwd()
    os.chdir(folder)  # a socket's path must be short
    try:
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind("03_reward_model_b.py")
    finally:
        os.chdir(here)


def large(folder: Path) -> None:
    """A notebook of 200 MB, which takes no room on the disk."""
    with open(folder / NOTEBOOK, "wb") as file:
        file.truncate(200 << 20)


def odd_names(folder: Path) -> None:
    """Names that a file system permits."""
    for name in ("..\\..\\x.py", "a\n# heading.py", "\u202egnp.py", "<img src=x onerror=a()>.py",
                 "=cmd|calc.py", "[a](javascript:1).py", b"\xff\xfe.py", "x" * 240 + ".py",
                 "[bold red].py", "`code`.py", "-rf.py", "%s%n.py"):  # fmt: skip
        path = os.path.join(os.fsencode(folder), name if isinstance(name, bytes) else name.encode())
        with open(path, "w", encoding="utf-8") as file:
            file.write(")( not Python")


FILES = [
    Hostile("conftest", "brings pytest's settings and plugins",
            {FILE: BAD, "conftest.py": PASSING, "plugin.py": PASSING,
             "pytest.ini": "[pytest]\naddopts = -p plugin --co\n", "tox.ini": "[pytest]\n",
             "setup.cfg": "[tool:pytest]\naddopts = -p plugin\n", "test_03.py": PASSING,
             "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '-p plugin'\n"}),
    Hostile("shadowing_modules", "brings files called like modules",
            {FILE: SOLUTION, **dict.fromkeys(
                ("torch.py", "json.py", "os.py", "sitecustomize.py", "usercustomize.py",
                 "rlhf_course.py", "safetensors.py", "__init__.py", "conftest.py",
                 "numpy/__init__.py", "encodings/__init__.py"), CRASHING)},
            score=FULL, status="right"),
    Hostile("its_own_course", "brings a course of its own, which agrees with everything",
            {FILE: BAD, "rlhf_course/coursework/expect.py": "def same(*a, **k): pass\n",
             "rlhf_course/reward_model.py": SOLUTION, "tests/exercises/test_x.py": PASSING}),
    Hostile("links", "brings links to the solutions and elsewhere", {FILE: BAD}, make=links),
    Hostile("pipes", "brings pipes and sockets for files", {FILE: SOLUTION}, make=pipes,
            score=FULL, status="right"),
    Hostile("large_notebook", "brings a notebook of 200 MB", {FILE: SOLUTION}, make=large,
            score=FULL, status="right"),
    Hostile("odd_names", "gives its files odd names", {FILE: SOLUTION}, make=odd_names,
            score=FULL, status="right"),
    Hostile("odd_folder", "is called like a file of the grader's", {FILE: BAD},
            folder="grading.json"),
    Hostile("garbage", "brings bytes for notebooks",
            {NOTEBOOK: bytes(range(256)) * 400, "b.ipynb": b"", "c.ipynb": b"[]", "d.ipynb": b"nul",
             "e.ipynb": b'{"cells": 7}', "f.ipynb": b'{"cells": [7, null, {"cell_type": "code"}]}',
             "g.py": b"\x00\xff\xfe", "h.ipynb": b"\xef\xbb\xbf{}"}),
    Hostile("garbage_beside_an_answer", "brings bytes for notebooks beside an answer",
            {NOTEBOOK: notebook(SOLUTION), "a.ipynb": bytes(range(256)), "b.py": b"\x00def"},
            score=FULL, status="right"),
    Hostile("deep_notebook", "brings lists in lists, a hundred thousand deep",
            {NOTEBOOK: b'{"cells": ' + b"[" * 100_000 + b"]" * 100_000 + b"}", FILE: SOLUTION},
            score=FULL, status="right"),
    Hostile("deep_cell", "brings a cell of a hundred thousand brackets",
            {NOTEBOOK: notebook("(" * 100_000 + ")" * 100_000, "x = " + "-" * 100_000 + "1",
                                "x = " + "1 + " * 50_000 + "1", SOLUTION)},
            score=FULL, status="right"),
    Hostile("long_cell", "brings a cell of 3 MB",
            {NOTEBOOK: notebook("x = '" + "a" * 3_000_000 + "'", SOLUTION)},
            score=FULL, status="right"),
    Hostile("many_cells", "brings ten thousand cells",
            {NOTEBOOK: notebook(*["x = 1"] * 10_000, SOLUTION)}, score=FULL, status="right"),
    Hostile("syntax_error", "brings a cell that is no Python",
            {NOTEBOOK: notebook("def pairwise_loss(:", "%%bash\ntouch x\n", "!touch x\n",
                                SOLUTION, "get_ipython().system('touch hostile')")},
            score=FULL, status="right"),
    Hostile("top_level_calls", "ends, trains and deletes at the top of a cell",
            {NOTEBOOK: notebook("import os, sys\nos._exit(0)\nsys.exit()\nwhile True: pass\n",
                                SOLUTION, "raise SystemExit\nos.system('touch hostile')")},
            score=FULL, status="right"),
    Hostile("last_wins", "answers twice, and wrongly at last",
            {NOTEBOOK: notebook(SOLUTION, BAD)}, status="wrong"),
    Hostile("last_wins_rightly", "answers twice, and rightly at last",
            {NOTEBOOK: notebook(BAD, SOLUTION)}, score=FULL, status="right"),
    Hostile("without_metadata", "is a notebook that has nothing but cells",
            {NOTEBOOK: json.dumps({"cells": [{"cell_type": "code",
                                              "source": SOLUTION.splitlines(True)}]})},
            score=FULL, status="right"),
    Hostile("lookalike", "is called so in letters that only look alike",
            {FILE: SOLUTION.replace("pairwise_loss", "p\u0430irwise_loss")}, status="absent"),
    Hostile("wide_letters", "is called so in letters that Python takes for the same",
            {FILE: SOLUTION.replace("def pairwise_loss", "def \uff50airwise_loss")},
            score=FULL, status="right"),
    Hostile("turned_text", "turns the reader's eyes with marks of direction",
            {FILE: SOLUTION.replace("    # BEGIN", "    # \u202e\u2066 }}{{\n    # BEGIN")},
            score=FULL, status="right"),
    Hostile("other_encoding", "is written in another encoding",
            {FILE: "# -*- coding: latin-1 -*-\n# \xe4\n".encode("latin-1") + SOLUTION.replace(
                "\u03c3", "s").encode("latin-1", "replace")}, score=FULL, status="right"),
    Hostile("empty", "holds nothing", {}, status="absent"),
]  # fmt: skip

SUBMISSIONS = FILES
