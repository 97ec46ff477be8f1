"""The autograder's core: what crosses, what a player is given, and that both sides agree."""

import json
import math
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlhf_course.coursework import source
from rlhf_course.coursework.exercises import EXERCISES, find
from rlhf_course.coursework.expect import call, gradients, raises
from rlhf_course.coursework.mutants import mutants_of
from rlhf_course.coursework.subject import Subject, answer_from
from rlhf_course.coursework.trial import properties
from rlhf_course.errors import ConfigError, DataError, GradingError
from rlhf_course.grading import build, children, command, referee, results, wire
from rlhf_course.grading.children import ForkServer, Patience, Stopped
from rlhf_course.grading.referee import Rules
from rlhf_course.grading.remote import RemoteSubject, told
from rlhf_course.grading.results import SubmissionResult
from rlhf_course.grading.settings import GradeConfig
from rlhf_course.grading.submission import Submission

ROOT = Path(__file__).parents[1]
SEEDS = int(os.environ.get("EXERCISE_SEEDS", "2"))  # 50 take some minutes
WHITEN = find("ppo.whiten")

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="players are forked")


@pytest.fixture(scope="module")
def server():
    with ForkServer(Patience(call=20, exercise=60)) as running:
        yield running


def solved(id: str) -> str:
    """A solution as a student would hand it in."""
    return f"{source.imports([id], also=['torch'])}\n\n{source.solved(id)}"


def graded(server, id: str, text: str, seed: int = 3):
    return referee.grade_exercise(server, find(id), [[text, 3, 1, "05_ppo.ipynb"]], seed)


def subject_of(server, id: str, text: str) -> RemoteSubject:
    return RemoteSubject(server, find(id), [[text, 3, 1, "05_ppo.ipynb"]])


# ------------------------------------------------------------------------------------- what crosses


PLAIN = [
    None, True, 0, -7, 1.5, math.inf, "ü ∂", [], (), {}, [1, (2.0, "x", None)], {"a": [1], 2: (3,)},
    torch.tensor(2.0), torch.arange(6).view(2, 3), torch.tensor([True, False]),
    torch.randn(2, 3, dtype=torch.float64), torch.randn(3, dtype=torch.bfloat16), torch.empty(0, 2),
    torch.randn(4, 3).T, torch.ones(1).expand(5), [torch.zeros(2), {"x": torch.ones(2)}],
]  # fmt: skip


@pytest.mark.parametrize("value", PLAIN, ids=lambda value: type(value).__name__)
def test_what_is_plain_crosses_unchanged(value):
    assert same_tree(wire.decode(wire.encode(value)), value)


def same_tree(a, b) -> bool:
    if isinstance(b, torch.Tensor):
        return isinstance(a, torch.Tensor) and a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(b, dict):
        return a.keys() == b.keys() and all(same_tree(a[k], b[k]) for k in b)
    if isinstance(b, (list, tuple)):
        alike = type(a) is type(b) and len(a) == len(b)
        return alike and all(map(same_tree, a, b))
    return type(a) is type(b) and a == b


def test_nan_and_the_wish_for_a_gradient_cross():
    found = wire.decode(wire.encode([math.nan, torch.tensor([math.nan]).requires_grad_()]))
    assert math.isnan(found[0]) and found[1].isnan().all() and found[1].requires_grad


@pytest.mark.parametrize(
    ("value", "name"),
    [(object(), "object"), ({1}, "set"), (len, "builtin_function_or_method"), (1 << 70, "int"),
     (torch.zeros(1).to_sparse(), "Tensor"), (torch.zeros(1, dtype=torch.cfloat), "Tensor"),
     (torch.nn.Linear(1, 1), "Linear"), (b"x", "bytes")],
)  # fmt: skip
def test_of_what_is_not_plain_only_the_types_name_crosses(value, name):
    found = wire.decode(wire.encode([value]))[0]
    assert type(found).__name__ == name and not isinstance(found, (torch.Tensor, int, bytes))


def test_equal_tensors_that_share_memory_cross():
    x = torch.arange(4.0)
    first, second = wire.decode(wire.encode((x, x[1:])))
    assert torch.equal(first, x) and torch.equal(second, x[1:])


def test_damaged_messages_are_refused_and_nothing_else_happens():
    """Every truncation, and random flips of bits: WireError, or some other plain value."""
    good = wire.encode({"value": [torch.arange(3.0), "text", 1.5]})
    damaged = [good[:n] for n in range(len(good))]
    rng = random.Random(0)
    for _ in range(400):
        flipped = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            flipped[rng.randrange(len(flipped))] ^= 1 << rng.randrange(8)
        damaged.append(bytes(flipped))
    refused = 0
    for data in damaged:
        try:
            wire.decode(data)
        except wire.WireError:
            refused += 1
    assert refused > len(good)
    for text in ('{"tensor": "9"}', '{"tensor": 1}', "[" * 10**5, '{"dict": 3}', "[1]", "{}"):
        with pytest.raises(wire.WireError):
            wire.decode(wire.save({}, {"tree": text}))


def test_a_message_has_a_largest_size_and_a_deadline():
    here, there = os.pipe()
    os.write(there, wire.HEAD.pack(wire.LARGEST + 1))
    with pytest.raises(wire.WireError, match="bytes"):
        wire.receive(here)
    os.write(there, wire.HEAD.pack(8) + b"half")
    began = time.monotonic()
    with pytest.raises(wire.Late):
        wire.receive(here, began + 0.2)
    assert time.monotonic() - began < 2
    os.close(there)
    with pytest.raises(wire.Closed):
        wire.receive(here)
    os.close(here)


# ------------------------------------------------------------------------- the package of a player


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_a_player_has_no_answer_that_earns_its_points(exercise):
    """Its own and all later ones are blank, but for those that are given with this exercise."""
    texts = build.package(exercise)
    for other in EXERCISES:
        found = source.definition(other.id)
        inside = found.answer.strip() in texts[found.module]
        assert inside == (other.id in build.given(exercise)), other.id
    assert exercise.id not in build.given(exercise)
    assert set(EXERCISES[: EXERCISES.index(exercise)]) <= {find(i) for i in build.given(exercise)}
    folders = {name.split(".")[1] for name in texts if name.count(".") > 1}
    assert not folders & {"coursework", "grading"}


def test_what_is_given_early_is_what_solutions_build_on():
    order = [exercise.id for exercise in EXERCISES]
    early = {(e.id, g) for e in EXERCISES for g in build.given(e)
             if order.index(g) > order.index(e.id)}  # fmt: skip
    assert {g for _, g in early} == {"ppo_ptx.masked_moments"}
    assert min(order.index(e) for e, _ in early) == order.index("ppo.whiten")


# ------------------------------------------------------------------------- both sides are the same


def both(server, id: str, text: str):
    """The answer here, and in a player."""
    exercise = find(id)
    return getattr(Subject(exercise, answer_from(exercise, text)), exercise.name), getattr(
        subject_of(server, id, text), exercise.name
    )


def test_values_and_gradients_are_those_of_the_answer_itself(server):
    """Two results, one of them a dictionary, and gradients by two inputs at once."""
    here, there = both(server, "ppo.value_loss", solved("ppo.value_loss"))
    rng = torch.Generator().manual_seed(0)
    args = [torch.randn(3, 4, generator=rng) for _ in range(3)] + [torch.ones(3, 4).bool()]
    (ours, grads), (theirs, same) = (
        gradients(f, args, {"clip": 0.1}, wrt=(0, 2)) for f in (here, there)
    )
    assert torch.equal(ours[0], theirs[0]) and ours[0].requires_grad == theirs[0].requires_grad
    assert ours[1].keys() == theirs[1].keys()
    assert all(
        torch.equal(torch.as_tensor(ours[1][k]), torch.as_tensor(theirs[1][k])) for k in ours[1]
    )
    assert all(torch.equal(a, b) for a, b in zip(grads, same, strict=True))
    assert grads[0].abs().sum() > 0


BENT = """
def whiten(x, mask, shift_mean=True, eps=1e-8, group=None):
    if eps == 1: x.mul_(2)
    if eps == 2: raise KeyError("no such key")
    if eps == 3: raise SystemExit(4)
    if eps == 4: raise type("Own", (ValueError,), {})("odd")
    if eps == 5: raise NotImplementedError
    if eps == 6: return {"a": (x, [mask.sum(), 3]), "b": None}
    if eps == 7: return x.numpy()
    if eps == 8: return torch.rand(2)
    if eps == 9: raise type("ConfigError", (Exception,), {})("a setting")
    if eps == 10: raise type("GradingError", (Exception,), {})("the grader has failed")
    return x * torch.tensor([1.0, 2.0])
"""


def test_whatever_an_answer_does_looks_the_same_from_there(server):
    """Changes in place, errors of every kind, nested results, things that cannot cross."""
    here, there = both(server, "ppo.whiten", "import torch\n" + BENT)
    for eps in (0, 1, 2, 3, 4, 5, 6, 7):
        seen = []
        for function in (here, there):
            args = torch.ones(1, 2), torch.ones(1, 2).bool()
            try:
                said = call(function, args, {"eps": eps})
            except (Exception, SystemExit) as error:  # noqa: BLE001 - any is to be compared
                said = [str(error), getattr(error, "expected", None), getattr(error, "got", None)]
                said = json.loads(json.dumps(said, default=repr))
            seen.append(said if not hasattr(said, "dtype") or eps == 7 else said.tolist())
        if eps == 7:
            assert type(seen[0]).__name__ == type(seen[1]).__name__ == "ndarray"
        elif eps == 6:
            assert same_tree(seen[0], seen[1])
        else:
            assert seen[0] == seen[1], eps
    torch.manual_seed(0)
    assert not torch.equal(here(None, None, eps=8), here(None, None, eps=8))


def test_errors_of_the_package_that_an_exercise_promises_are_known_here_and_no_others(server):
    """An answer that could raise our GradingError would end the grading of others."""
    there = subject_of(server, "ppo.whiten", "import torch\n" + BENT).whiten
    raises(there, (None, None), ConfigError, {"eps": 9})
    with pytest.raises(Exception, match="the grader has failed") as error:
        there(None, None, eps=10)
    assert not isinstance(error.value, GradingError)


def test_random_numbers_begin_anew_with_each_property(server):
    subject = subject_of(server, "ppo.whiten", "import torch\n" + BENT)
    local = Subject(WHITEN, answer_from(WHITEN, "import torch\n" + BENT))
    drawn = []
    for one in (subject, local, subject):
        one.begin(11)
        drawn.append(one.whiten(torch.ones(1), torch.ones(1), eps=8))
    assert torch.equal(drawn[0], drawn[1]) and torch.equal(drawn[0], drawn[2])


def test_an_error_says_where_in_the_students_cell_it_was(server):
    text = "\n\ndef whiten(x, mask):\n    y = x + 1\n    return y['no']\n"
    result = graded(server, "ppo.whiten", text)
    (said, *_) = [p.says for p in result.properties if p.core]
    assert "05_ppo.ipynb cell 3, line 5: return y['no']" in said and said.startswith("It raised ")


def test_no_path_of_the_machine_is_told(server):
    text = "def whiten(x, mask):\n    raise OSError(2, 'gone', '/srv/alice/secret.txt')\n"
    result = graded(server, "ppo.whiten", text)
    assert result.status == results.WRONG and result.score == 0
    assert "alice" not in json.dumps([p.says for p in result.properties])


def test_a_player_that_hangs_or_dies_is_stopped(server):
    with ForkServer(Patience(call=1, exercise=2)) as hasty:
        hasty.end(hasty.fork("player")[0])  # it has started
        for body, says in [
            ("while True: pass", "within 1 s"),
            ("import os; os._exit(0)", "ended its own process"),
            ("import os; os.abort()", "crashed (SIGABRT)"),
            ("import time; time.sleep(0.7)", "longer than 2 s"),
        ]:
            text = f"def whiten(*args, **kwargs):\n    {body}\n"
            began = time.monotonic()
            result = graded(hasty, "ppo.whiten", text)
            assert (result.status, result.score) == (results.STOPPED, 0), body
            assert says in result.says
            assert time.monotonic() - began < 6
            assert len(result.properties) == len(properties(WHITEN))
        assert graded(hasty, "ppo.whiten", solved("ppo.whiten")).score == WHITEN.points


def test_what_a_right_answer_may_do(server, tmp_path):
    """A helper with the name of an exercise that comes later; torch.compile, which has no compiler
    here; a plot that nobody sees; gradients that are switched off for good."""
    right = solved("ppo.whiten")
    helper = "from rlhf_course.ppo_ptx import masked_moments as theirs\n"
    helper += "def masked_moments(x, mask):\n    return theirs(x, mask)[:2]\n"
    own = right.replace("variance, _ = masked_moments(x, mask, group)",
                        "variance = masked_moments(x, mask)")  # fmt: skip
    begin = "    # BEGIN SOLUTION\n"
    plot = "    import matplotlib.pyplot as plt; plt.figure(); plt.close()\n"
    off = "    torch.set_grad_enabled(False)\n"
    for text in (
        f"{own}\n{helper}",
        right.replace("def whiten", "@torch.compile\ndef whiten"),
        right.replace(begin, begin + plot),
        right.replace(begin, begin + off),
    ):
        assert text != right
        result = graded(server, "ppo.whiten", text)
        assert result.score == WHITEN.points, (text, result)


def test_a_helper_whose_definition_fails_is_named(server):
    texts = ["from no_such import helper", "def whiten(*args, **kwargs):\n    return helper(args)"]
    statements = [[text, 3, 1 + i, "x.ipynb"] for i, text in enumerate(texts)]
    said = referee.grade_exercise(server, WHITEN, statements, 3).properties[0].says
    assert "'helper' is missing: its definition fails (x.ipynb cell 3, line 1" in said
    assert "ModuleNotFoundError: No module named 'no_such'" in said


def test_a_division_is_no_path():
    assert told("mean = x/mask.sum/n") == "mean = x/mask.sum/n"
    assert told("in /srv/alice/x.py, '/tmp/y/z'") == "in …, '…'"


@pytest.mark.parametrize("when", ["while it starts", "in a call"])
def test_a_server_that_dies_is_no_fault_of_the_answer(monkeypatch, when):
    """No points are given: the result tells of a failure, and is tried again."""
    begin = RemoteSubject.begin

    def die(subject, seed):
        os.kill(subject._player.server.process.pid, signal.SIGKILL)
        begin(subject, seed)

    files = {"05_ppo.py": solved("ppo.whiten").encode()}
    with ForkServer() as dying:
        if when == "in a call":
            monkeypatch.setattr(RemoteSubject, "begin", die)
        else:
            monkeypatch.setattr(referee, "asked", lambda *_: dying.process.kill() or [WHITEN])
        result = referee.grade(dying, Submission("a", files, ()), Rules(seed=1))
    assert result.failure and {e.status for e in result.exercises} <= {results.ABSENT}


def test_players_have_the_time_that_the_referee_grants():
    with ForkServer(Patience(call=80, exercise=123.5)) as patient:
        text = "def whiten(*args):\n    import resource\n"
        text += "    raise ValueError(resource.getrlimit(resource.RLIMIT_CPU))\n"
        said = graded(patient, "ppo.whiten", text).properties[0].says
    assert "(134, 134)" in said


def test_no_process_outlives_the_server(tmp_path):
    """Even where the referee is killed: the children go with the server, the server with it."""
    script = (
        "import sys, time\n"
        "from rlhf_course.coursework.exercises import find\n"
        "from rlhf_course.grading.children import ForkServer\n"
        "from rlhf_course.grading.remote import RemoteSubject\n"
        "server = ForkServer()\n"
        "text = 'import torch\\ndef whiten(x, mask):\\n    while True: pass'\n"
        "subject = RemoteSubject(server, find('ppo.whiten'), [[text, 1, 1, 'x']])\n"
        "print(server.process.pid, subject._player.pid, server.folder, flush=True)\n"
        "subject.whiten(1, 2)\n"
    )
    running = subprocess.Popen(
        [sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    *pids, folder = running.stdout.readline().split()
    pids = [int(pid) for pid in pids]
    assert len(pids) == 2 and all(alive(pid) for pid in pids) and Path(folder).is_dir()
    running.send_signal(signal.SIGKILL)
    running.wait()
    running.stdout.close()
    until = time.monotonic() + 10
    while any(alive(pid) for pid in pids) and time.monotonic() < until:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in pids)
    assert not Path(folder).exists()


def alive(pid: int) -> bool:
    """True for a process that is there and no zombie."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


# ------------------------------------------------------------------------------------- the points


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_the_solution_earns_everything_and_the_blank_nothing(server, exercise):
    for seed in range(100, 100 + SEEDS):
        right = graded(server, exercise.id, solved(exercise.id), seed)
        wrong = [p.says for p in right.properties if not p.passed]
        assert (right.status, right.score, wrong) == (results.RIGHT, exercise.points, [])
    blank = f"{source.imports([exercise.id], also=['torch'])}\n\n{source.blank(exercise.id)}"
    result = graded(server, exercise.id, blank)
    assert (result.status, result.score, result.mistake) == (results.BLANK, 0, "")


@pytest.mark.parametrize("exercise", EXERCISES, ids=lambda exercise: exercise.id)
def test_every_mutant_loses_points_and_is_told_its_mistake(server, exercise):
    imports = source.imports([exercise.id], also=["torch"])
    for mutant in mutants_of(exercise):
        result = graded(server, exercise.id, f"{imports}\n\n{mutant.source()}", 7)
        assert result.score < exercise.points, mutant.name
        assert result.mistake == mutant.says, mutant.name


def test_core_properties_gate_the_points():
    tests = properties(WHITEN)
    core = {t.__name__ for t in tests if t.property.core}
    everything = {t.__name__: True for t in tests}
    assert referee.points(WHITEN, everything) == WHITEN.points
    for name in core:
        assert referee.points(WHITEN, everything | {name: False}) == 0
    other = next(name for name in everything if name not in core)
    share = (len(tests) - 1) / len(tests)  # all weigh the same
    assert referee.points(WHITEN, everything | {other: False}) == round(WHITEN.points * share, 2)
    assert referee.points(WHITEN, dict.fromkeys(core, True)) > 0
    assert referee.points(WHITEN, {}) == 0


def test_the_committed_chapters_are_blank_and_the_solutions_right(server):
    for folder, status in (("chapters", results.BLANK), ("solutions", results.RIGHT)):
        files = {f.name: f.read_bytes() for f in (ROOT / folder).glob("*.ipynb")}
        result = referee.grade(server, Submission(folder, files, ()), Rules(seed=5))
        assert {e.exercise: e.status for e in result.exercises} == dict.fromkeys(
            (e.id for e in EXERCISES), status
        )
        assert result.problems == () and result.failure == ""
        assert result.max_score == 138
        assert SubmissionResult.from_json(result.to_json()) == result


def test_which_chapters_count(server):
    text = solved("ppo.whiten").encode()
    one = referee.grade(server, Submission("a", {"mine.py": text}, ()), Rules(seed=1))
    assert one.chapters == (5,) and one.score == 3 and one.max_score == 19
    assert {e.status for e in one.exercises} == {results.RIGHT, results.ABSENT}
    named = referee.grade(
        server, Submission("a", {"06_ppo_ptx (1).ipynb": b"x"}, ()), Rules(seed=1)
    )
    assert named.chapters == (6,) and named.score == 0 and "06_ppo_ptx (1)" in named.problems[0]
    told = referee.grade(server, Submission("a", {"mine.py": text}, ()), Rules(1, chapters=(5, 6)))
    assert told.chapters == (5, 6) and told.max_score == 35


def test_the_same_seed_gives_the_same_inputs_and_another_one_others(server):
    """The seed decides on what is asked: an answer that is wrong on few of them shows it."""
    text = solved("ppo.whiten").replace(
        "    # BEGIN SOLUTION", "    if x.sum() % 1 > 0.93: return x\n    # BEGIN SOLUTION"
    )
    seen = [[p.passed for p in graded(server, "ppo.whiten", text, s).properties] for s in range(6)]
    assert seen == [
        [p.passed for p in graded(server, "ppo.whiten", text, s).properties] for s in range(6)
    ]
    assert len({tuple(passed) for passed in seen}) > 1


# ----------------------------------------------------------------------------- the command, pytest


def config(tmp_path: Path, *places: Path, **settings) -> GradeConfig:
    return GradeConfig(submissions=places, out=tmp_path / "grades", jobs=1, **settings)


@pytest.fixture
def klass(tmp_path) -> Path:
    """Three students: right, wrong, and a file that is no notebook."""
    folder = tmp_path / "class"
    for name, text in {
        "ada": solved("ppo.whiten"),
        "bob": f"{source.imports(['ppo.whiten'])}\n{mutants_of(WHITEN)[0].source()}",
        "eve": "this is no Python",
    }.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "05_ppo.py").write_text(text)
    return folder


def test_a_class_is_graded_and_gone_on_with(tmp_path, klass, capsys):
    settings = config(
        tmp_path, klass, format=("markdown", "html", "csv", "junit", "gradescope", "github")
    )
    command.grade(settings)
    out = settings.out
    results = {
        n: SubmissionResult.from_json((out / n / "result.json").read_text())
        for n in ("ada", "bob", "eve")
    }
    assert [results[n].score for n in results] == [3, 0, 0]
    assert len({r.seed for r in results.values()}) == 1 and all(
        r.isolation for r in results.values()
    )
    assert mutants_of(WHITEN)[0].says[:40] in (out / "bob" / "report.md").read_text()
    assert json.loads((out / "ada" / "results.json").read_text())["score"] == 3
    assert len((out / "summary.csv").read_text().splitlines()) == 4
    assert not list(out.rglob(".*"))
    before = {f: f.stat().st_mtime_ns for f in out.rglob("result.json")}
    (klass / "bob" / "05_ppo.py").write_text(solved("ppo.whiten"))
    command.grade(settings)  # only what has changed
    after = {f: f.stat().st_mtime_ns for f in out.rglob("result.json")}
    assert [f.parent.name for f in before if before[f] != after[f]] == ["bob"]
    assert SubmissionResult.from_json((out / "bob" / "result.json").read_text()).score == 3
    assert "2 of 3 are graded already" in capsys.readouterr().out


def test_another_format_is_written_for_what_is_graded_already(tmp_path, klass):
    command.grade(config(tmp_path, klass, format=("csv",)))
    report = tmp_path / "grades" / "ada" / "report.md"
    assert not report.exists()
    command.grade(config(tmp_path, klass, format=("markdown",)))
    assert "3 of 19" in report.read_text()


def test_the_grades_themselves_are_no_student(tmp_path, klass, capsys):
    settings = GradeConfig(submissions=(klass,), out=klass / "grades", jobs=1, format=("csv",))
    for _ in range(2):
        command.grade(settings)
    assert {f.name for f in settings.out.iterdir() if f.is_dir()} == {"ada", "bob", "eve"}
    with pytest.raises(DataError, match="grades go there"):
        command.grade(GradeConfig(submissions=(settings.out,), out=settings.out, jobs=1))


def test_what_looks_like_a_mistake_of_the_instructor_is_told(tmp_path, capsys):
    """The files of a class in one folder are one student's; another course's notebook is none's."""
    folder = tmp_path / "downloads"
    folder.mkdir()
    for name in ("ada_1_05_ppo.py", "bob_2_05_ppo-1.py"):
        (folder / name).write_text(solved("ppo.whiten"))
    (tmp_path / "other.py").write_text("x = 1\n")
    command.grade(config(tmp_path, folder, tmp_path / "other.py", format=("csv",)))
    said = " ".join(capsys.readouterr().out.split())
    assert "graded as one student's, with 2 files of chapter 5" in said
    other = SubmissionResult.from_json((tmp_path / "grades/other/result.json").read_text())
    assert other.problems == (referee.NOTHING,) and other.exercises == ()


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_no_process_outlives_a_command_that_is_stopped(tmp_path, how):
    """With several jobs: neither Ctrl-C waits for what is being graded, nor does a killed command
    leave processes behind."""
    for name in ("ann", "ben"):
        text = "def whiten(*args):\n    import time; time.sleep(50)\n"
        (tmp_path / f"{name}.py").write_text(text)
    running = subprocess.Popen(
        [sys.executable, "-m", "rlhf_course", "grade", *map(str, tmp_path.glob("*.py")),
         "--out", str(tmp_path / "out"), "--jobs", "2", "--seconds-per-call", "60"],
        env=os.environ | {"PYTHONPATH": str(ROOT)}, stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    until = time.monotonic() + 60
    while len(found := below(running.pid)) < 7 and time.monotonic() < until:  # 2 players at work
        time.sleep(0.2)
    running.send_signal(how)
    assert running.wait(15) == (130 if how == signal.SIGINT else -signal.SIGKILL)
    until = time.monotonic() + 10
    while any(map(alive, found)) and time.monotonic() < until:
        time.sleep(0.05)
    assert len(found) >= 7 and not any(map(alive, found))


def below(pid: int) -> list[int]:
    """The processes that a process has started, and theirs."""
    children: dict[int, list[int]] = {}
    for file in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = int(file.read_text().rpartition(")")[2].split()[1])
        except (FileNotFoundError, ProcessLookupError):
            continue
        children.setdefault(parent, []).append(int(file.parent.name))
    found, todo = [], [pid]
    while todo:
        more = children.get(todo.pop(), [])
        found += more
        todo += more
    return found


def test_a_failing_grader_leaves_a_result_that_says_so(tmp_path, klass, monkeypatch):
    monkeypatch.setattr(command, "_in_processes", _broken)
    with pytest.raises(GradingError, match="ada, bob, eve"):
        command.grade(config(tmp_path, klass))
    result = SubmissionResult.from_json((tmp_path / "grades" / "ada" / "result.json").read_text())
    assert "no memory" in result.failure and result.score == 0


def _broken(found, rules, jobs):
    yield from (command.failure(name, rules, "OSError: no memory") for name in found)


def test_a_server_that_cannot_start_is_a_failure_of_the_grader(monkeypatch):
    monkeypatch.setattr(children.sys, "executable", "/bin/false")
    with pytest.raises(GradingError, match="cannot be started"), ForkServer() as server:
        server.fork("player")


def test_what_is_wrong_with_a_command_is_told(tmp_path, klass):
    for settings, words in [
        (config(tmp_path), "what is to be graded"),
        (config(tmp_path, klass, chapters=(10,)), "--chapters 10"),
        (config(tmp_path, klass, seed=-1), "--seed -1"),
        (config(tmp_path, klass, seconds_per_call=0), "--seconds-per-call"),
        (config(tmp_path, klass, bundle="gradescope"), "--bundle"),
        (config(tmp_path, tmp_path / "nobody"), "not there"),
    ]:
        with pytest.raises((DataError, command.ConfigError), match=words):
            command.grade(settings)
    assert not (tmp_path / "grades").exists()
    command.grade(config(tmp_path, klass, seed=4))
    for other in ({"seed": 5}, {"chapters": (5,)}):
        with pytest.raises(command.ConfigError, match="--force"):
            command.grade(config(tmp_path, klass, **{"seed": 4} | other))


def test_pytest_grades_with_the_very_same_tests(tmp_path, klass):
    """Points, sentences, exit code; and other tests are left alone."""
    for name, code, points in (
        ("ada", 1, "3 of 3   ppo.whiten"),
        ("bob", 1, "0 of 3   ppo.whiten"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "tests", "-q", "-p", "no:cacheprovider",
             "--submission", str(klass / name)],
            cwd=ROOT, capture_output=True, text=True, timeout=120,
        )  # fmt: skip
        assert done.returncode == code, done.stdout + done.stderr
        assert points in done.stdout and "of 19  in all" in done.stdout
        assert "No `policy_loss` was found." in done.stdout
        assert str(ROOT) not in done.stdout and "Traceback" not in done.stdout
    assert "another result than expected" in done.stdout and "-1.0" not in done.stdout


def test_stopped_is_not_an_exception_that_a_test_could_swallow():
    assert not issubclass(Stopped, Exception)
