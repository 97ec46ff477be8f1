"""Killed anywhere and started again, a run ends bit for bit as one that was never killed.

Real processes are killed: a server that has imported everything forks them (an import of torch each
time would take minutes in all), one is started as `python -m rlhf_course`. Each runs the stages one
after the other; started again with the same commands it goes on where the last was killed.
"""

import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from rlhf_course import cli

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no SIGKILL, no fork")

COMMON = ["--size", "tiny", "--threads", "1", "--checkpoint-every", "2"]
STAGES = {
    "pretrain": ["pretrain", "--steps", "30", "--batch", "4", "--window", "32"],
    "sft": ["sft", "--steps", "8", "--batch", "4", "--eval-every", "4"],
    "comparisons": ["comparisons", "--prompts", "12", "--heldout", "12"],
    "reward_model": ["reward-model", "--steps", "6", "--batch", "4"],
    "ppo": ["ppo", "--iterations", "5", "--critic-warmup", "2", "--batch", "8", "--minibatch", "4",
            "--reward-norm", "running", "--value-norm", "popart", "--kl-horizon", "20"],
}  # fmt: skip
# What must not differ in a single byte.
RESULTS = ("metrics.jsonl", "done.json", "model/model.safetensors", "model/config.json",
           "comparisons.jsonl", "heldout.jsonl")  # fmt: skip


def command(stage: str, folder: Path) -> list[str]:
    return [*STAGES[stage], *COMMON, "--out", str(folder / stage)]


def run_stages(folder: Path, trap: str | None = None) -> None:
    """What a forked process does: every stage, by the command line's own entry."""
    from rlhf_course.stages import comparisons

    torch.set_num_threads(1)
    comparisons.CHUNK = 4  # prompts: six parts instead of one
    folder.mkdir(exist_ok=True)
    sys.stdout = sys.stderr = open(folder / "log.txt", "a")  # noqa: SIM115
    if trap:
        TRAPS[trap]()
    for stage in STAGES:
        code = cli.main(command(stage, folder))
        if code:
            sys.exit(code)


# --- places to be killed at: each replaces a function by one that kills its own process -----------


def die(*args, **kwargs) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def at_call(number: int, function, then=die):
    """`function`, but its call number `number` (from 1) dies instead."""
    calls = 0

    def counted(*args, **kwargs):
        nonlocal calls
        calls += 1
        return then(*args, **kwargs) if calls == number else function(*args, **kwargs)

    return counted


def in_a_line_of_metrics():
    from rlhf_course import runs

    def half_a_line(self, step, metrics, timing=None):
        self._metrics.write('{"step": 3, "lo')
        self._metrics.flush()
        die()

    runs.Run.log = at_call(4, runs.Run.log, half_a_line)


def in_the_tensors_of_a_checkpoint():
    from rlhf_course import runs

    save = runs.save_file

    def half_a_file(tensors, path):
        save(tensors, path)
        os.truncate(path, path.stat().st_size // 2)
        die()

    runs.save_file = at_call(2, save, half_a_file)


def before_the_state_of_a_checkpoint():
    from rlhf_course import runs

    save = runs.save_file
    runs.save_file = at_call(2, save, lambda tensors, path: (save(tensors, path), die()))


def before_a_rename_to(name: str):
    def trap():
        rename = os.replace

        def dying(source, target):
            die() if Path(target).name.startswith(name) else rename(source, target)

        os.replace = dying

    return trap


def before_old_checkpoints_go():
    from rlhf_course import runs

    remove = runs.remove
    runs.remove = lambda path: die() if path.name.startswith("step-") else remove(path)


def in_the_model():
    from rlhf_course import checkpoints

    save = checkpoints.save_file

    def half_a_file(tensors, path, metadata):
        save(tensors, path, metadata)
        os.truncate(path, path.stat().st_size // 2)
        die()

    checkpoints.save_file = half_a_file


def in_a_rollout():
    from rlhf_course import sampling
    from rlhf_course.stages import ppo

    def trapped(*args):  # PPO begins: its second rollout, third token
        sampling.sample_token = at_call(15, sampling.sample_token)
        return identity(*args)

    identity, ppo.identity = ppo.identity, trapped


def in_an_update():
    """Between the policy's optimiser step and the critic's."""
    from rlhf_course.stages import ppo

    make, made = ppo.make_optimizer, []

    def make_trapped(*args, **kwargs):
        made.append(make(*args, **kwargs))
        if len(made) == 2:  # the critic's
            made[1].step = at_call(11, made[1].step)
        return made[-1]

    ppo.make_optimizer = make_trapped


TRAPS = {
    "a line of metrics": in_a_line_of_metrics,
    "the tensors of a checkpoint": in_the_tensors_of_a_checkpoint,
    "before the state of a checkpoint": before_the_state_of_a_checkpoint,
    "before a checkpoint has its name": before_a_rename_to("step-"),
    "before old checkpoints go": before_old_checkpoints_go,
    "the model": in_the_model,
    "before the model has its name": before_a_rename_to("model"),
    "before done.json": before_a_rename_to("done.json"),
    "before a part of the comparisons": before_a_rename_to("heldout-0000.jsonl"),
    "between comparisons and heldout": before_a_rename_to("heldout.jsonl"),
    "a rollout": in_a_rollout,
    "an update": in_an_update,
}


# --- the processes -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def fork():
    """fork(folder, trap=None) -> a process that runs every stage in this folder."""
    context = multiprocessing.get_context("forkserver")
    slow = ["rlhf_course.plots", "torch.utils.tensorboard",
            "transformers.models.auto.tokenization_auto",
            "transformers.tokenization_utils_tokenizers", "tokenizers", "jinja2"]  # fmt: skip
    context.set_forkserver_preload([f"rlhf_course.stages.{stage}" for stage in STAGES] + slow)

    def start(folder: Path, trap: str | None = None):
        process = context.Process(target=run_stages, args=(folder, trap))
        process.start()
        return process

    return start


@pytest.fixture(scope="module")
def undisturbed(fork, tmp_path_factory) -> Path:
    """The runs of a process that nobody killed."""
    folder = tmp_path_factory.mktemp("undisturbed")
    finish(fork(folder), folder)
    return folder


def finish(process, folder: Path) -> None:
    process.join(timeout=300)
    assert process.exitcode == 0, (folder / "log.txt").read_text()


def steps(run: Path) -> int:
    """Steps logged so far by one stage."""
    file = run / "metrics.jsonl"
    return file.read_bytes().count(b"\n") if file.exists() else 0


def lines(folder: Path) -> int:
    """Steps logged so far by all stages."""
    return sum(steps(folder / stage) for stage in STAGES)


def wait_for(process, folder: Path, count: int) -> None:
    """Until `count` steps are logged (or the process ends)."""
    deadline = time.monotonic() + 300
    while lines(folder) < count and process.is_alive():
        assert time.monotonic() < deadline, (folder / "log.txt").read_text()
        time.sleep(0.001)


def strike(start, folder: Path, count: int, number: int, last: str = "ppo", wait: float = 0.0):
    """Start a process, send it a signal when `count` steps are logged, return its exit code.

    Where the process came to its end before us (this machine may be busy), its last stage is
    removed and it is started again.
    """
    for _ in range(10):
        process = start()
        wait_for(process, folder, count)
        time.sleep(wait)
        if process.is_alive():
            os.kill(process.pid, number)
        process.join(timeout=300)
        if process.exitcode != 0:
            return process.exitcode
        shutil.rmtree(folder / last)
    raise AssertionError("the process always ended before it could be stopped")


class Installed:
    """`python -m rlhf_course pretrain …` with the methods of a forked process."""

    def __init__(self, folder: Path):
        with open(folder / "log.txt", "w") as log:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "rlhf_course", *command("pretrain", folder)],
                stdout=log, stderr=log, cwd=Path(__file__).parents[1],
            )  # fmt: skip
        self.pid = self.process.pid

    def is_alive(self) -> bool:
        return self.process.poll() is None

    def join(self, timeout: float) -> None:
        self.exitcode = self.process.wait(timeout)


def assert_equal_runs(folder: Path, expected: Path) -> None:
    for stage in STAGES:
        compared = 0
        for name in RESULTS:
            ours, theirs = folder / stage / name, expected / stage / name
            assert ours.exists() == theirs.exists(), f"{stage}/{name}"
            if ours.exists():
                assert ours.read_bytes() == theirs.read_bytes(), f"{stage}/{name} differs"
                compared += 1
        assert compared == 4
    left = [p for p in folder.rglob(".*") if ".part-" in p.name or ".old-" in p.name]
    assert not left, "what a killed process left behind is cleared away"


def test_killed_at_random_moments(fork, undisturbed, tmp_path):
    folder, rng = tmp_path / "runs", random.Random(0)
    moments, begin = [], 0  # two in each stage, so that none is left out by chance
    for stage in STAGES:
        count = steps(undisturbed / stage)
        moments += sorted(rng.sample(range(begin, begin + count), 2))
        begin += count
    assert len(moments) == 10
    for moment in moments:
        wait = rng.uniform(0, 0.05)
        code = strike(lambda: fork(folder), folder, moment, signal.SIGKILL, wait=wait)
        assert code == -signal.SIGKILL
    finish(fork(folder), folder)
    assert_equal_runs(folder, undisturbed)


def test_killed_in_the_worst_places(fork, undisturbed, tmp_path):
    folder = tmp_path / "runs"
    for trap in TRAPS:
        process = fork(folder, trap)
        process.join(timeout=300)
        assert process.exitcode == -signal.SIGKILL, f"{trap}: the process got past it"
    finish(fork(folder), folder)
    assert_equal_runs(folder, undisturbed)


def test_ctrl_c_in_ppo_writes_a_checkpoint_and_exits_130(fork, undisturbed, tmp_path):
    folder = tmp_path / "runs"
    third = lines(undisturbed) - 4  # of seven steps of PPO
    assert strike(lambda: fork(folder), folder, third, signal.SIGINT) == 130
    told = (folder / "log.txt").read_text()
    done = steps(folder / "ppo")
    assert done < steps(undisturbed / "ppo")
    assert f"stopped after step {done} of 7" in told
    assert (folder / "ppo" / "checkpoints" / f"step-{done:06d}" / "state.json").exists()
    finish(fork(folder), folder)
    assert_equal_runs(folder, undisturbed)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL], ids=lambda n: n.name)
def test_the_installed_command_is_stopped_and_goes_on(fork, undisturbed, tmp_path, number):
    folder = tmp_path / "runs"
    folder.mkdir()
    code = strike(lambda: Installed(folder), folder, 5, number, last="pretrain")
    assert code == (130 if number == signal.SIGINT else -number), (folder / "log.txt").read_text()
    assert 5 <= lines(folder) < 30
    told = (folder / "log.txt").read_text()
    assert "Traceback" not in told
    assert ("The same command" in told) == (number == signal.SIGINT)
    finish(fork(folder), folder)
    assert_equal_runs(folder, undisturbed)


def test_a_wrong_byte_would_be_noticed(undisturbed, tmp_path):
    """The comparison itself, on a copy in which one weight's last bit differs."""
    shutil.copytree(undisturbed, tmp_path / "copy")
    assert_equal_runs(tmp_path / "copy", undisturbed)
    weights = tmp_path / "copy" / "sft" / "model" / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-4] ^= 1
    weights.write_bytes(content)
    with pytest.raises(AssertionError, match=r"sft/model/model\.safetensors differs"):
        assert_equal_runs(tmp_path / "copy", undisturbed)
