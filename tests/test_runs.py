"""Run folders: exact resume, checkpoints, Ctrl-C, full disks, and what is refused.

A toy loop stands for a stage; tests/test_resume.py kills the real ones.
"""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf_course import files, runs
from rlhf_course.errors import CheckpointError, ConfigError, Interrupted
from rlhf_course.files import read_json, replacing, write_json
from rlhf_course.ppo import AdaptiveKLController
from rlhf_course.ppo_ptx import RunningMoments
from rlhf_course.progress import Bar
from rlhf_course.runs import KEEP, Run, State, read_metrics
from rlhf_course.training import make_optimizer, torch_generator

TOTAL, EVERY = 13, 3
CONFIG = {"lr": 0.01, "betas": (0.9, 0.95), "data": None}


class Toy(nn.Module):
    """A tied weight, a buffer that training changes, and parameters of every rank."""

    def __init__(self, width=8):
        super().__init__()
        self.embedding = nn.Embedding(11, width)
        self.head = nn.Linear(width, 11)
        self.head.weight = self.embedding.weight
        self.norm = nn.BatchNorm1d(width, momentum=0.1)

    def forward(self, x):
        return self.head(self.norm(self.embedding(x)))


def toy_state(width=8):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        policy, critic = Toy(width), nn.Linear(4, 1)
    optimizers = {
        "policy": make_optimizer(policy, 0.01, weight_decay=0.1),
        "critic": torch.optim.SGD(critic.parameters(), 0.1, momentum=0.9),
    }
    counters = {"kl": AdaptiveKLController(0.1, 2.0, 100), "rewards": RunningMoments()}
    return State({"policy": policy, "critic": critic}, optimizers, counters)


def update(state, step):
    """One step of training in which everything of the state moves."""
    generator = torch_generator(0, "toy", step)
    x, y = torch.randint(11, (2, 32), generator=generator)
    policy, critic = state.modules["policy"], state.modules["critic"]
    loss = nn.functional.cross_entropy(policy(x), y)
    loss = loss + critic(torch.randn(32, 4, generator=generator)).square().mean()
    for optimizer in state.optimizers.values():
        optimizer.zero_grad()
    loss.backward()
    for optimizer in state.optimizers.values():
        optimizer.step()
    state.counters["kl"].update(loss.item(), 16)
    state.counters["rewards"].update(torch.rand(16, generator=generator))
    kl_coef, std = state.counters["kl"].value, state.counters["rewards"].std
    return {"loss": loss.item(), "kl_coef": kl_coef, "std": std}


def nothing(step):
    pass


def train(out, before_log=nothing, after_log=nothing, at_export=lambda: None, **options):
    """The toy stage; `before_log` and `after_log` are called in every step."""
    state = options.pop("state", None) or toy_state()
    run = Run(out, CONFIG, TOTAL, "toy", checkpoint_every=EVERY, **options)
    with run:
        for step in run.steps(state):
            metrics = update(state, step)
            before_log(step)
            run.log(step, metrics, {"seconds": time.perf_counter()})
            after_log(step)

        def export(folder):
            save_file(state.modules["critic"].state_dict(), folder / "model.safetensors")
            at_export()

        run.finish(export, {"kl_coef": state.counters["kl"].value})
    return state


def metrics_of(state):
    return {name: counter.state_dict() for name, counter in state.counters.items()}


def assert_same_run(out, state, expected_out, expected):
    """Weights, optimisers, counters and metrics, bit for bit."""
    ours, theirs = state.tensors(), expected.tensors()
    assert ours.keys() == theirs.keys()
    for name, tensor in theirs.items():
        assert torch.equal(ours[name], tensor), name
        assert ours[name].dtype == tensor.dtype
    assert metrics_of(state) == metrics_of(expected)
    for name in ("metrics.jsonl", "done.json", "config.json", "model/model.safetensors"):
        assert (out / name).read_bytes() == (expected_out / name).read_bytes(), name
    assert len((out / "timing.jsonl").read_text().splitlines()) == TOTAL
    assert not leftovers(out.parent)


def leftovers(folder):
    return [path for path in folder.rglob(".*") if files.LEFTOVER.fullmatch(path.name)]


def checkpoints(out):
    return sorted(path.name for path in (out / "checkpoints").iterdir())


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """(folder, final state) of a run that nothing disturbed."""
    out = tmp_path_factory.mktemp("whole") / "run"
    return out, train(out)


class Boom(Exception):
    """Whatever may go wrong in a stage."""


def at(step, action):
    """A hook that acts in one step, once."""

    def hook(now):
        if now == step:
            action()

    return hook


def boom():
    raise Boom


# ------------------------------------------------------------------------------- a run by itself


def test_a_run_leaves_what_its_docstring_says(whole):
    out, _ = whole
    assert {p.name for p in out.iterdir()} == {
        "config.json", "metrics.jsonl", "timing.jsonl", "tensorboard", "checkpoints", "model",
        "done.json",
    }  # fmt: skip
    assert read_json(out / "config.json") == {"lr": 0.01, "betas": [0.9, 0.95], "data": None}
    rows = read_metrics(out)
    assert [row["step"] for row in rows] == list(range(TOTAL))
    assert set(rows[0]) == {"step", "loss", "kl_coef", "std"}
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert read_json(out / "done.json") == {"kl_coef": rows[-1]["kl_coef"]}
    assert sum(p.stat().st_size for p in (out / "tensorboard").iterdir()) > 100


def test_the_newest_checkpoints_are_kept(whole):
    assert KEEP == 2
    assert checkpoints(whole[0]) == ["step-000012", "step-000013"]


def test_a_finished_run_says_so(whole, tmp_path):
    out, _ = whole
    run = Run(out, CONFIG, TOTAL, "toy")
    assert run.finished
    assert run.model_dir == out / "model"
    assert not Run(tmp_path / "new", CONFIG, TOTAL, "toy").finished
    assert not (tmp_path / "new").exists()
    assert not Run(out, CONFIG, TOTAL, "toy", overwrite=True).finished
    with Run(tmp_path / "new", CONFIG, TOTAL, "toy", overwrite=True) as run:
        run.finish()
        assert run.finished


def test_the_state_has_every_tensor_once():
    state = toy_state()
    update(state, 0)
    names = set(state.tensors())
    assert {"module/policy/embedding.weight", "module/policy/norm.running_mean"} <= names
    assert "module/policy/head.weight" not in names  # it is the embedding
    assert {"optimizer/policy/0/exp_avg", "optimizer/policy/0/step"} <= names
    assert {"optimizer/critic/0/momentum_buffer"} <= names


# ---------------------------------------------------------------------------------- exact resume


@pytest.mark.parametrize("step", [0, 1, 2, 3, 7, 11, 12])
@pytest.mark.parametrize("moment", ["before_log", "after_log"])
def test_after_an_error_it_goes_on_as_if_there_had_been_none(whole, tmp_path, step, moment):
    out, seen = tmp_path / "run", []
    with pytest.raises(Boom):
        train(out, **{moment: at(step, boom)})
    assert out.exists() == (step > 0 or moment == "after_log")
    state = train(out, before_log=seen.append)
    assert seen == list(range(step // EVERY * EVERY, TOTAL))
    assert_same_run(out, state, *whole)


def test_after_many_errors_too(whole, tmp_path):
    out = tmp_path / "run"
    for step in (1, 4, 4, 8, 10, 12):
        with pytest.raises(Boom):
            train(out, after_log=at(step, boom))
    with pytest.raises(Boom):
        train(out, at_export=boom)
    assert not (out / "model").exists()
    assert not (out / "done.json").exists()
    assert not leftovers(tmp_path)
    assert_same_run(out, train(out), *whole)


def run_apart(out, action):
    """The toy stage in a process of its own, which `action` (source) ends in step 7."""
    paths = [str(Path(__file__).parent), *sys.path]
    code = (
        f"import sys, os, signal, time; sys.path[:0] = {paths!r}\n"
        "import torch; torch.set_num_threads(1)\n"
        "import test_runs as t\n"
        "from rlhf_course.errors import Interrupted\n"
        f"def action(): {action}\n"
        "try: t.train(t.Path(sys.argv[1]), before_log=t.at(7, action))\n"
        "except Interrupted as stopped: print(stopped); sys.exit(130)\n"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code, str(out)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        text=True,
    )  # fmt: skip


def until(condition):
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.005)


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL")
def test_a_killed_process_goes_on_in_another(whole, tmp_path):
    out = tmp_path / "run"
    process = run_apart(out, "os.kill(os.getpid(), signal.SIGKILL)")
    _, told = process.communicate(timeout=300)
    assert process.returncode == -signal.SIGKILL, told
    assert len(read_metrics(out)) == 7
    assert checkpoints(out) == ["step-000003", "step-000006"]
    assert_same_run(out, train(out), *whole)


@pytest.mark.skipif(sys.platform == "win32", reason="signals are sent otherwise")
def test_ctrl_c_from_outside_ends_the_step_and_writes_a_checkpoint(whole, tmp_path):
    out, there = tmp_path / "run", tmp_path / "there"
    process = run_apart(out, f"open({str(there)!r}, 'w').close(); time.sleep(1.0)")
    until(lambda: there.exists() or process.poll() is not None)
    process.send_signal(signal.SIGINT)
    said, told = process.communicate(timeout=300)
    assert process.returncode == 130, told
    assert f"stopped after step 8 of {TOTAL}" in said
    assert checkpoints(out)[-1] == "step-000008"
    seen = []
    assert_same_run(out, train(out, before_log=seen.append), *whole)
    assert seen == list(range(8, TOTAL))


def press_ctrl_c():
    signal.raise_signal(signal.SIGINT)


def test_ctrl_c_is_heeded_at_the_end_of_the_step(whole, tmp_path):
    out, before = tmp_path / "run", signal.getsignal(signal.SIGINT)
    with pytest.raises(Interrupted, match="toy: stopped after step 5 of 13"):
        train(out, before_log=at(4, press_ctrl_c))
    assert signal.getsignal(signal.SIGINT) is before
    assert len(read_metrics(out)) == 5
    assert_same_run(out, train(out), *whole)


def test_ctrl_c_twice_is_heeded_at_once(tmp_path):
    def twice():
        press_ctrl_c()
        press_ctrl_c()

    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "run", before_log=at(4, twice))
    assert checkpoints(tmp_path / "run") == ["step-000003"]


def test_ctrl_c_in_the_last_step_or_behind_it_stops_what_would_follow(whole, tmp_path):
    out = tmp_path / "last"
    with pytest.raises(Interrupted, match="step 13 of 13"):
        train(out, before_log=at(TOTAL - 1, press_ctrl_c))
    assert not (out / "done.json").exists()
    assert_same_run(out, train(out), *whole)
    out = tmp_path / "behind"
    with pytest.raises(Interrupted, match="complete"):
        train(out, at_export=press_ctrl_c)
    assert Run(out, CONFIG, TOTAL, "toy").finished


def test_ctrl_c_before_anything_was_logged_keeps_its_checkpoint(tmp_path):
    with (
        pytest.raises(Interrupted),
        Run(tmp_path / "run", CONFIG, TOTAL, "toy") as run,
    ):
        for _ in run.steps(toy_state()):
            press_ctrl_c()
    assert checkpoints(tmp_path / "run") == ["step-000001"]


def test_outside_the_main_thread_there_is_no_handler_and_no_harm(whole, tmp_path):
    out, states = tmp_path / "run", []
    thread = threading.Thread(target=lambda: states.append(train(out)))
    thread.start()
    thread.join()
    assert_same_run(out, states[0], *whole)


def test_what_a_killed_writer_left_is_cleared_away(whole, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Boom):
        train(out, before_log=at(7, boom))
    folders = [out / "checkpoints" / ".step-000009.part-77", out / ".model.part-3",
               out / ".model.old-3", tmp_path / ".run.old-12"]  # fmt: skip
    for folder in folders:
        (folder / "deep").mkdir(parents=True)
        (folder / "deep" / "tensors.safetensors").write_bytes(b"half")
    (out / ".done.json.part-77").write_text("{")
    (out / ".notes").write_text("mine")
    (tmp_path / ".walk.old-12").mkdir()  # of another run
    assert len(leftovers(tmp_path)) == 6
    train(out)
    assert leftovers(tmp_path) == [tmp_path / ".walk.old-12"]
    assert (out / ".notes").read_text() == "mine"
    (tmp_path / ".walk.old-12").rmdir()
    assert read_metrics(out) == read_metrics(whole[0])


def test_a_folder_with_nothing_but_leftovers_is_taken(whole, tmp_path):
    out = tmp_path / "run"
    out.mkdir()
    (out / ".config.json.part-5").write_text("{")  # killed in its first write
    assert_same_run(out, train(out), *whole)


def test_the_millionth_step_is_newer_than_the_one_before(whole, tmp_path):
    out = tmp_path / "run"
    train(out, state=toy_state())
    newest = out / "checkpoints" / "step-000013"
    for step in (999_999, 1_000_000):
        folder = out / "checkpoints" / f"step-{step}"
        folder.mkdir()
        (folder / "tensors.safetensors").write_bytes((newest / "tensors.safetensors").read_bytes())
        content = read_json(newest / "state.json") | {"step": step}
        (folder / "state.json").write_text(json.dumps(content))
    with Run(out, CONFIG, 1_000_000, "toy") as run:
        assert list(run.steps(toy_state())) == []


# ---------------------------------------------------------------------------------- what is refused


def content(folder):
    return {p.relative_to(folder): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def test_another_configuration_is_named_and_nothing_is_touched(whole):
    out, _ = whole
    before = content(out)
    other = {**CONFIG, "lr": 0.02, "seed": 1}
    with pytest.raises(ConfigError, match=r"lr: 0\.01 there, 0\.02 now; seed: None there, 1 now"):
        Run(out, other, TOTAL, "toy")
    assert content(out) == before


def test_a_folder_that_is_no_run_is_refused_even_to_overwrite(tmp_path):
    (tmp_path / "thesis.txt").write_text("years of work")
    for overwrite in (False, True):
        with pytest.raises(ConfigError, match="not empty, and not a run folder"):
            Run(tmp_path, CONFIG, TOTAL, "toy", overwrite)
    assert content(tmp_path) == {Path("thesis.txt"): b"years of work"}


def test_overwrite_begins_anew(whole, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Boom):
        train(out, after_log=at(8, boom))
    write_json(out / "config.json", {"lr": 5})
    (out / "extra.txt").write_text("of the old run")
    before = content(out)
    Run(out, CONFIG, TOTAL, "toy", overwrite=True)  # opened, but not entered
    assert content(out) == before
    seen = []
    assert_same_run(out, train(out, before_log=seen.append, overwrite=True), *whole)
    assert seen == list(range(TOTAL))
    assert not (out / "extra.txt").exists()


def test_a_run_that_fails_before_its_first_step_leaves_nothing(tmp_path):
    with pytest.raises(Boom), Run(tmp_path / "run", CONFIG, TOTAL, "toy"):
        raise Boom
    assert not list(tmp_path.iterdir())


def test_a_run_that_was_begun_before_stays_when_it_fails_at_once(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Boom):
        train(out, after_log=at(1, boom))  # before the first checkpoint
    before = content(out)
    with pytest.raises(Boom), Run(out, CONFIG, TOTAL, "toy"):
        raise Boom
    assert content(out) == before


@pytest.mark.parametrize("change", ["shape", "missing", "more"])
def test_a_checkpoint_of_other_tensors_is_refused(tmp_path, change):
    out = tmp_path / "run"
    with pytest.raises(Boom):
        train(out, after_log=at(4, boom))
    state = toy_state(width=6) if change == "shape" else toy_state()
    if change == "missing":
        del state.modules["critic"]
        name = "critic/bias"
    elif change == "more":
        state.modules["second"] = nn.Linear(1, 1)
        name = "second/bias"
    else:
        name = "policy/embedding.weight"
    before = {key: tensor.clone() for key, tensor in state.tensors().items()}
    with pytest.raises(CheckpointError, match=f"not those of this run's models: module/{name}"):
        train(out, state=state)
    for key, tensor in state.tensors().items():
        assert torch.equal(tensor, before[key])


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_can_be_used(whole, tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Boom):
        train(out, after_log=at(7, boom))
    newest = out / "checkpoints" / "step-000006"
    data = (newest / "tensors.safetensors").read_bytes()
    (newest / "tensors.safetensors").write_bytes(data[:-9])
    with pytest.raises(CheckpointError, match=f"{newest}: damaged"):
        train(out)
    (newest / "tensors.safetensors").unlink()
    with pytest.raises(CheckpointError, match=f"{newest}: damaged"):
        train(out)
    (newest / "state.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"state\.json: cannot be read"):
        train(out)
    files.remove(newest)
    seen = []
    assert_same_run(out, train(out, before_log=seen.append), *whole)
    assert seen[0] == 3


def test_metrics_that_were_cut_are_noticed(tmp_path):
    out = tmp_path / "run"
    with pytest.raises(Boom):
        train(out, after_log=at(7, boom))
    text = (out / "metrics.jsonl").read_text()
    (out / "metrics.jsonl").write_text(text[:20])
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl: shorter than"):
        train(out)
    assert (out / "metrics.jsonl").read_text() == text[:20]


# ------------------------------------------------------------------------- disks and permissions


FULL = OSError(errno.ENOSPC, "No space left on device")


def raising(error):
    def function(*args, **kwargs):
        raise error

    return function


@pytest.mark.parametrize("error", [FULL, "safetensors"])
def test_a_full_disk_at_a_checkpoint_leaves_the_one_before(whole, tmp_path, monkeypatch, error):
    from safetensors import SafetensorError

    if error == "safetensors":
        error = SafetensorError("I/O error: No space left on device (os error 28)")
    out, save = tmp_path / "run", runs.save_file

    def full(step):
        monkeypatch.setattr(runs, "save_file", raising(error))

    with pytest.raises(CheckpointError, match=r"cannot write .*step-000006: .*No space left"):
        train(out, before_log=at(5, lambda: full(5)))
    assert checkpoints(out) == ["step-000003"]
    assert not leftovers(tmp_path)
    monkeypatch.setattr(runs, "save_file", save)
    assert_same_run(out, train(out), *whole)


@pytest.mark.parametrize("handle", ["_metrics", "_timing", "_tracker"])
def test_a_full_disk_while_logging(whole, tmp_path, monkeypatch, handle):
    out, log = tmp_path / "run", Run.log

    class Full:
        """A file on a disk that has just filled up."""

        write = flush = close = log = raising(FULL)

    def log_on_full_disk(self, step, *rest):
        if step == 4:
            getattr(self, handle).close()
            setattr(self, handle, Full())
        log(self, step, *rest)

    monkeypatch.setattr(Run, "log", log_on_full_disk)
    with pytest.raises(CheckpointError, match=r"cannot write .*metrics\.jsonl: No space left"):
        train(out)
    monkeypatch.setattr(Run, "log", log)
    assert_same_run(out, train(out), *whole)


@pytest.mark.skipif(sys.platform == "win32", reason="no limits")
def test_a_file_that_the_system_does_not_let_grow(tmp_path):
    """The real error of safetensors, and of Python, by a limit on the size of files."""
    import resource

    old = {"a": torch.ones(10)}
    for name in ("a.safetensors", "b.json"):
        with replacing(tmp_path / name) as part:
            save_file(old, part) if "safe" in name else part.write_text("old")
    before, limits = content(tmp_path), resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, limits[1]))
    try:
        with (
            pytest.raises(CheckpointError, match=r"cannot write .*a\.safetensors: .*too large"),
            replacing(tmp_path / "a.safetensors") as part,
        ):
            save_file({"a": torch.ones(10_000)}, part)
        with (
            pytest.raises(CheckpointError, match=r"cannot write .*b\.json: File too large"),
            replacing(tmp_path / "b.json") as part,
        ):
            part.write_text("new" * 10_000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert content(tmp_path) == before


@pytest.mark.parametrize("below", ["run", "deep/run"])
def test_a_folder_below_a_file_cannot_be_made(tmp_path, below):
    (tmp_path / "file").write_text("mine")
    out = tmp_path / "file" / below
    with pytest.raises(CheckpointError, match=f"cannot write {out}"):
        Run(out, CONFIG, TOTAL, "toy")
    with pytest.raises(CheckpointError, match="cannot write"):
        write_json(out / "config.json", {})
    assert content(tmp_path) == {Path("file"): b"mine"}


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(CheckpointError, match="cannot write"):
        Run(tmp_path / "file", CONFIG, TOTAL, "toy", overwrite=True)
    assert content(tmp_path) == {Path("file"): b"mine"}


@pytest.mark.skipif(
    sys.platform == "win32" or os.geteuid() == 0, reason="permissions do not bind this user"
)
def test_a_folder_without_permission(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(CheckpointError, match="cannot write"):
        Run(tmp_path / "run", CONFIG, TOTAL, "toy")
    tmp_path.chmod(0o700)


# ------------------------------------------------------------------------------------- replacing


def test_a_file_is_replaced_when_the_block_has_succeeded(tmp_path):
    file = tmp_path / "new" / "folder" / "file"
    for text in ("one", "two"):
        with replacing(file) as part:
            part.write_text(text)
            assert part.parent == file.parent
            assert not file.exists() if text == "one" else file.read_text() == "one"
    assert content(tmp_path) == {Path("new/folder/file"): b"two"}


def test_a_folder_is_replaced_whole(tmp_path):
    folder = tmp_path / "model"
    for name in ("one", "two"):
        with replacing(folder) as part:
            part.mkdir()
            (part / name).write_text(name)
    assert content(tmp_path) == {Path("model/two"): b"two"}
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("error", [Boom(), KeyboardInterrupt(), FULL])
@pytest.mark.parametrize("kind", ["file", "folder"])
@pytest.mark.parametrize("old", [True, False])
def test_whatever_is_raised_inside_the_old_one_stays(tmp_path, error, kind, old):
    path = tmp_path / "it"

    def write(where, text):
        if kind == "folder":
            where.mkdir()
            where = where / "inner"
        where.write_text(text)

    if old:
        write(path, "old")
    before = content(tmp_path)
    expected = CheckpointError if error is FULL else type(error)
    with pytest.raises(expected), replacing(path) as part:
        write(part, "half")
        raise error
    assert content(tmp_path) == before
    assert not leftovers(tmp_path)
    assert path.exists() == old


def test_a_rename_that_fails_puts_the_old_folder_back(tmp_path, monkeypatch):
    folder, rename = tmp_path / "model", os.rename
    folder.mkdir()
    (folder / "one").write_text("old")

    def fail(source, target):
        if ".part-" in str(source):
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(CheckpointError, match="Input/output error"), replacing(folder) as part:
        part.mkdir()
    assert content(tmp_path) == {Path("model/one"): b"old"}
    assert not leftovers(tmp_path)


def test_an_old_folder_that_cannot_be_put_back_is_not_thrown_away(tmp_path, monkeypatch):
    folder, rename = tmp_path / "model", os.rename
    folder.mkdir()
    (folder / "one").write_text("old")

    def fail(source, target):
        if target == folder:
            raise OSError(errno.EIO, "Input/output error")
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(CheckpointError, match="Input/output error"), replacing(folder) as part:
        part.mkdir()
    assert list(content(tmp_path).values()) == [b"old"]


def test_what_a_process_of_the_same_number_left_is_no_hindrance(tmp_path):
    folder = tmp_path / "model"
    left = tmp_path / f".model.part-{os.getpid()}"
    left.mkdir()
    (left / "rest").write_text("half")
    with replacing(folder) as part:
        part.mkdir()
        (part / "new").write_text("whole")
    assert content(tmp_path) == {Path("model/new"): b"whole"}


def test_json_is_read_as_it_was_written_and_damage_is_named(tmp_path):
    file = tmp_path / "a.json"
    write_json(file, {"b": [1, None, "é"], "a": 0.1})
    assert read_json(file) == {"b": [1, None, "é"], "a": 0.1}
    assert file.read_text().index('"a"') < file.read_text().index('"b"')
    file.write_text('{"a": ')
    for damaged in (file, tmp_path / "missing.json"):
        with pytest.raises(CheckpointError, match=f"{damaged}: cannot be read"):
            read_json(damaged)


def test_checkpoint_files_hold_the_state(whole):
    out, state = whole
    saved = load_file(out / "checkpoints" / "step-000013" / "tensors.safetensors")
    assert saved.keys() == state.tensors().keys()
    for name, tensor in state.tensors().items():
        assert torch.equal(saved[name], tensor)
    read = read_json(out / "checkpoints" / "step-000013" / "state.json")
    assert read["step"] == 13
    assert read["counters"] == metrics_of(state)
    assert read["metrics_bytes"] == (out / "metrics.jsonl").stat().st_size


# --------------------------------------------------------------------------------------- progress


def test_progress_in_a_log_is_sparse_lines(capsys, monkeypatch):
    now = [100.0]
    monkeypatch.setattr("rlhf_course.progress.time.monotonic", lambda: now[0])
    bar = Bar("toy", 40)
    bar.start(10)
    for done in range(11, 41):
        now[0] += 2.0
        bar.show({"loss": 1.23456, "a": 1, "b": 2, "c": 3, "d": 4, "e": 5})
        bar.advance(done)
    bar.close()
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "toy: going on at step 10 of 40"
    assert lines[1].startswith("toy 18/40  16 s, 44 s to go  loss 1.23  a 1  b 2  c 3  d 4")
    assert " e " not in lines[1]
    assert lines[-1].startswith("toy 40/40  60 s, 0 s to go")
    assert len(lines) == 1 + 30 // 8 + 1
