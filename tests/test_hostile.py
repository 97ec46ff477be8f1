"""Hostile and broken submissions through the real referee: each gets the points that it deserves,
within its time; nothing of it stays, nobody else is touched, and its feedback gives nothing away.
"""

import json
import os
import re
import struct
import subprocess
import sys
import tempfile
import time
from functools import cache
from pathlib import Path

import pytest
import torch

if not hasattr(os, "fork"):
    pytest.skip("players are forked", allow_module_level=True)

from hostile.bank import EXERCISE, FILE, FULL, MARK, SLEEP, SOLUTION, Hostile, bank

from rlhf_course.coursework import trial
from rlhf_course.coursework.subject import answer_from
from rlhf_course.grading import referee, reports, submission, wire
from rlhf_course.grading.children import ForkServer, Patience
from rlhf_course.grading.referee import Rules
from rlhf_course.grading.results import RIGHT, SubmissionResult

ROOT = Path(__file__).parents[1]
USUAL = Patience(call=20, exercise=60)
SHORT = Patience(call=1, exercise=3)
SLACK = 15.0
"""Seconds beside the referee's patience, on a busy machine."""
RULES = Rules(seed=11, chapters=(EXERCISE.chapter,))
BANK = bank()
MACHINE = [str(ROOT), sys.prefix, sys.base_prefix, tempfile.gettempdir() + "/", "site-packages/"]
MACHINE += ["/proc/", "Traceback", 'File "', "rlhf_course/grading", "forkserver.py"]


@pytest.fixture(scope="module")
def server():
    with ForkServer(USUAL) as running:
        yield running


@pytest.fixture(scope="module")
def caged(server) -> bool:
    """Whether this system grants the layers that keep a player from files and processes."""
    grade_right(server)
    layers = " ".join(server.isolation)
    return "Landlock" in layers and "seccomp" in layers


def grade_right(server) -> float:
    """The points of a right answer."""
    server.patience = USUAL
    statements = [[SOLUTION, 1, 1, FILE]]
    return referee.grade_exercise(server, EXERCISE, statements, seed=12).score


def written(hostile: Hostile, folder: Path) -> Path:
    """The submission on disk."""
    place = folder / (hostile.folder or hostile.name)
    place.mkdir(parents=True)
    for name, content in hostile.files.items():
        file = place / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(content.encode() if isinstance(content, str) else content)
    if hostile.make is not None:
        hostile.make(place)
    return place


# ------------------------------------------------------------------------------- what stays behind


def folders() -> list[Path]:
    """Wherever an attack can be expected to have written."""
    places = [tempfile.gettempdir(), "/tmp", "/var/tmp", "/dev/shm", "/run", "/root", "/home", "/"]
    places += [os.getcwd(), Path.home(), ROOT, *sys.path, Path(torch.__file__).parent]
    return [place for place in map(Path, dict.fromkeys(map(str, places))) if place.is_dir()]


def files_left() -> list[str]:
    found = []
    for place in folders():
        try:
            found += [str(place / name) for name in os.listdir(place) if name.startswith(MARK)]
        except PermissionError:
            continue
    return found


def processes() -> list[tuple[int, int, str]]:
    """(number, its parent's, name and command) of every process, and of its threads."""
    done = subprocess.run(
        ["ps", "-axo", "pid=,ppid=,comm=,args="], capture_output=True, text=True, errors="replace"
    )
    rows = [line.split(None, 2) for line in done.stdout.splitlines()]
    return [(int(pid), int(parent), *rest[:1]) for pid, parent, *rest in rows if rest]


def processes_left(server) -> list[str]:
    """The fork server's children, and whatever bears the mark of an attack."""
    left = []
    for _, parent, text in processes():
        if parent == server.process.pid or text.startswith(MARK) or SLEEP in text:
            left.append(text[:200])
    return left


# --------------------------------------------------------------------------------- what it may read


@cache
def secrets() -> frozenset[str]:
    """Numbers of several digits that the hidden tests expect, as they would be printed."""
    wrong = answer_from(EXERCISE, "def pairwise_loss(*a, **k):\n    return torch.tensor(12345.0)\n")
    outcomes = trial.try_answer(EXERCISE, wrong, seed=RULES.seed)
    wanted = [str(o.mismatch.expected) for o in outcomes if o.mismatch]
    return frozenset(re.findall(r"\d+\.\d{4,}", " ".join(wanted)))


def sentences(result: SubmissionResult) -> list[str]:
    """All that a student may read, but for what is known of the tests beforehand."""
    said = [result.failure, *result.problems]
    for exercise in result.exercises:
        said += [exercise.says, exercise.mistake, *(p.says for p in exercise.properties)]
    return said


def assert_discreet(result: SubmissionResult) -> None:
    """No path, no trace of the referee and no expected value; fit to be written to a file."""
    said = sentences(result)
    assert max(map(len, said)) < 1500
    for text in said:
        assert not [word for word in MACHINE if word in text], text
        assert not [number for number in secrets() if number[:6] in text], text
    shown = [result.to_json(), reports.markdown(result), reports.html(result)]
    shown.append(reports.csv([result]))
    for text in shown:
        assert len(text.encode()) < 200_000
        assert not [word for word in MACHINE[:2] if word in text]


def test_the_secrets_are_known_to_this_test():
    assert "0.6931" in {number[:6] for number in secrets()} and len(secrets()) >= 5


# ------------------------------------------------------------------------------------- the bank


def test_the_bank_is_as_large_as_promised():
    names = [hostile.name for hostile in BANK]
    assert len(names) == len(set(names)) >= 45
    assert all(hostile.tries for hostile in BANK)


@pytest.mark.parametrize("hostile", BANK, ids=lambda hostile: hostile.name)
def test_a_hostile_submission(server, caged, tmp_path, hostile):
    if hostile.caged and not caged:
        pytest.skip("this system does not grant Landlock and seccomp")
    found = submission.find(written(hostile, tmp_path))
    mine = os.getpid()
    server.patience = SHORT if hostile.hangs else USUAL
    began = time.monotonic()
    result = referee.grade(server, found, RULES)
    took = time.monotonic() - began

    assert result.failure == ""
    (answered,) = [e for e in result.exercises if e.exercise == EXERCISE.id]
    seen = f"{answered.status}: {answered.says} {[p.says for p in answered.properties]}"
    assert answered.score == hostile.score, seen
    assert result.score == hostile.score, "it earned points elsewhere"
    if hostile.status:
        assert answered.status == hostile.status, seen
    assert took < SLACK + (SHORT.exercise if hostile.hangs else 0), seen

    assert processes_left(server) == []
    assert files_left() == []
    assert list(Path(server.folder).glob("player-*")) == []
    assert os.getpid() == mine and server.process.poll() is None
    assert_discreet(result)
    assert grade_right(server) == FULL


def test_what_torch_and_python_are_here_is_as_before(server):
    """The attacks that patch things have patched nothing of ours."""
    assert not torch.equal(torch.zeros(1), torch.ones(1))
    assert torch.get_default_dtype() == torch.float32 and torch.is_grad_enabled()
    assert not isinstance(1, str) and len([]) == 0
    assert server.isolation and all(len(layer) < 100 for layer in server.isolation)


def message(tree: str, **tensors) -> bytes:
    """The bytes of a message that `encode` would not have made."""
    head = json.dumps({"__metadata__": {"tree": tree}, **tensors}).encode()
    return struct.pack("<Q", len(head)) + head + bytes(64)


MANY = ",".join(['{"other": "x"}'] * 300_000)
TENSOR = '{"tensor": "0", "grad": true}'


@pytest.mark.parametrize(
    ("tree", "dtype", "shape"),
    [(f'{{"list": [{MANY}]}}', "U8", [64]), ("9" * 30, "U8", [64]), (TENSOR, "C64", [8]),
     (TENSOR, "F8_E4M3", [64]), (TENSOR, "U64", [8]), (TENSOR, "F32", [0, 1 << 40, 1 << 40])],
    ids=["wide", "large_int", "complex", "eighth", "unsigned", "shape"],
)  # fmt: skip
def test_a_message_that_no_player_writes_by_itself(tree, dtype, shape):
    """It is refused before anything is made of it, whatever it would be compared with."""
    size = 0 if 0 in shape else 64
    data = message(tree, **{"0": {"dtype": dtype, "shape": shape, "data_offsets": [0, size]}})
    with pytest.raises(wire.WireError):
        wire.decode(data[: len(data) - 64 + size])


def test_the_same_message_of_what_may_cross():
    whole = {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}
    assert torch.equal(wire.decode(message(TENSOR, **{"0": whole})), torch.zeros(16))


# ---------------------------------------------------------------------------- beside right ones


BESIDE = (
    "endless_loop", "os_exit", "all_memory", "many_threads", "fork_bomb", "bad_text", "odd_folder",
    "garbage", "long_error", "conftest",
)  # fmt: skip


def test_many_side_by_side(caged, tmp_path):
    """`grade --jobs 2`: the right ones between the hostile ones get their points, in time."""
    by_name = {hostile.name: hostile for hostile in BANK if caged or not hostile.caged}
    chosen = [by_name[name] for name in BESIDE if name in by_name]
    for number, hostile in enumerate(chosen):
        written(hostile, tmp_path / "class")
        right = tmp_path / "class" / f"right-{number}"
        right.mkdir()
        (right / FILE).write_text(SOLUTION, encoding="utf-8")
    command = [sys.executable, "-m", "rlhf_course", "grade", "class", "--out", "out", "--jobs", "2"]
    command += ["--chapters", "3", "--seconds-per-call", "5", "--seconds-per-exercise", "6"]
    command += ["--format", "markdown", "html", "csv", "junit", "gradescope", "github"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "PYTHONUTF8": "1"}
    began = time.monotonic()
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8",
        timeout=300,
    )  # fmt: skip
    took = time.monotonic() - began
    assert done.returncode == 0, done.stdout + done.stderr
    found = {}
    for file in (tmp_path / "out").glob("*/result.json"):
        result = SubmissionResult.from_json(file.read_text(encoding="utf-8"))
        found[result.name] = result
    assert len(found) == 2 * len(chosen)
    for number in range(len(chosen)):
        right = found[f"right-{number}"]
        answered = {e.exercise: e.status for e in right.exercises}
        assert right.score == FULL and answered[EXERCISE.id] == RIGHT
    wrong = [result for name, result in found.items() if not name.startswith("right-")]
    assert sum(result.score for result in wrong) == sum(h.score for h in chosen)
    hanging = sum(hostile.hangs for hostile in chosen)
    assert took < 60 + 6 * hanging
    assert not [text for *_, text in processes() if text.startswith(MARK) or SLEEP in text]
    assert files_left() == []
    assert sorted(p.name for p in tmp_path.iterdir()) == ["class", "out"]


# ---------------------------------------------------------------------------------- under pytest


def under_pytest(place: Path, folder: Path) -> subprocess.CompletedProcess:
    """`pytest tests --submission PLACE`."""
    command = [sys.executable, "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider",
               "--submission", str(place), "--junitxml", str(folder / "junit.xml")]  # fmt: skip
    environment = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    return subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, encoding="utf-8",
        errors="replace", timeout=200,
    )  # fmt: skip


@pytest.mark.parametrize(("name", "points"), [("conftest", 0), ("shadowing_modules", FULL)])
def test_under_pytest(tmp_path, name, points):
    """Its conftest.py, settings, plugins and modules are files like others: pytest reads none."""
    (hostile,) = [hostile for hostile in BANK if hostile.name == name]
    done = under_pytest(written(hostile, tmp_path), tmp_path)
    assert done.returncode == 1, done.stdout + done.stderr  # 1: tests failed; the rest is absent
    total = re.search(r"([\d.]+) of +([\d.]+) +in all", done.stdout)
    assert total and float(total[1]) == points and float(total[2]) == 14, done.stdout
    assert (tmp_path / "junit.xml").stat().st_size > 0
    assert not [word for word in ("Traceback", "INTERNALERROR") if word in done.stdout]
    assert files_left() == []
