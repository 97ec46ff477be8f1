"""Several training runs side by side, in processes of one thread each.

Small models do not fill a core's vector units from several threads, so two runs of one thread each
are faster than one run of two threads after the other.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import rlhf_course
from rlhf_course.coursework import jobs
from rlhf_course.errors import ConfigError, CourseError, Interrupted, TrainingError
from rlhf_course.progress import Bar

Job = tuple[str, Path, str, dict]
"""Stage, run folder, world, settings; see `jobs`."""
WORTH = 1000  # steps of the common bar that one run stands for
PATIENCE = 20.0  # seconds that a worker may take to end
DONE = "done"  # what a worker says behind each run


def cores() -> int:
    """CPUs that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def one_thread() -> dict[str, str]:
    """The environment of a process of its own: this very package, one thread, texts in UTF-8."""
    package = str(Path(rlhf_course.__file__).parents[1])
    paths = [package, *filter(None, [os.environ.get("PYTHONPATH")])]
    alone = {"OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1"}
    return os.environ | alone


class Worker:
    """A process that does one run after another."""

    def __init__(self):
        self.job: Job | None = None
        self.share = 0.0
        self.errors = tempfile.TemporaryFile(  # noqa: SIM115 - closed by `stop`
            mode="w+", encoding="utf-8", errors="replace"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-m", "rlhf_course.coursework.workers"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors, text=True,
            encoding="utf-8", env=one_thread(),
            # A notebook's "interrupt" goes to the kernel's whole group; this one is told by `end`.
            start_new_session=True,
        )  # fmt: skip
        threading.Thread(target=self._read, daemon=True).start()

    def begin(self, job: Job) -> None:
        """Hand over a run."""
        stage, folder, world, settings = job
        self.job, self.share = job, 0.0
        with contextlib.suppress(BrokenPipeError):  # it has died, which `check` says better
            print(
                json.dumps([stage, str(folder), world, settings]),
                file=self.process.stdin, flush=True,
            )  # fmt: skip

    def _read(self) -> None:
        for line in self.process.stdout:
            if line.strip() == DONE:
                self.job, self.share = None, 0.0
                continue
            done, _, total = line.strip().partition("/")
            if done.isdigit() and total.isdigit():
                self.share = int(done) / max(int(total), 1)

    def check(self) -> None:
        """Raise TrainingError with its last words where the process has ended."""
        if self.process.poll() is None:
            return
        self.errors.seek(0)
        said = " ".join(self.errors.read().strip().splitlines()[-3:]) or "no message"
        name = self.job[1].name if self.job else "a worker"
        raise TrainingError(f"the run {name} failed: {said}")

    def end(self) -> None:
        """Ask it to end: in the middle of a run it finishes its step and leaves a checkpoint."""
        if self.job is not None:
            ask = signal.SIGTERM if os.name == "nt" else signal.SIGINT  # there it ends at once
            self.process.send_signal(ask)
        with contextlib.suppress(OSError):
            self.process.stdin.close()  # one that has nothing more to do ends by itself

    def stop(self, patience: float = PATIENCE) -> None:
        """Wait for its end, which is forced where that takes too long."""
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            pass
        finally:  # pressed twice: at once
            self.process.kill()
            self.process.wait()
            self.errors.close()


def run_all(jobs: Sequence[Job], workers: int | None = None) -> None:
    """Run the jobs, `workers` at a time (default: one a core), with one progress bar for all.

    Raises TrainingError with what a run said when it fails; the others are ended with it. A run
    that was stopped goes on from its checkpoint the next time.
    """
    workers = cores() if workers is None else workers
    if workers < 1:
        raise ConfigError(f"workers {workers}: give at least 1.")
    waiting, total = list(jobs), WORTH * len(jobs)
    bar = Bar(f"{len(jobs)} runs", total)
    bar.start()
    pool: list[Worker] = []
    try:
        for _ in range(min(workers, len(jobs))):
            pool.append(Worker())
        while waiting or any(worker.job for worker in pool):
            for worker in pool:
                worker.check()
                if waiting and worker.job is None:
                    worker.begin(waiting.pop(0))
            time.sleep(0.1)
            busy = [worker for worker in pool if worker.job]
            ended = len(jobs) - len(waiting) - len(busy)
            share = ended + sum(worker.share for worker in busy)
            bar.advance(min(int(WORTH * share), total - 1))
        bar.advance(total)
    finally:
        bar.close()
        with contextlib.ExitStack() as stack:  # whatever is raised, all of them are stopped
            for worker in pool:
                stack.callback(worker.stop)
            for worker in pool:
                worker.end()


class PipeBar(Bar):
    """Progress for the parent process: "done/total" lines."""

    pipe = sys.stdout

    def __init__(self, label: str, total: int):
        self.label, self.total, self.metrics = label, total, ""

    def start(self, done: int = 0) -> None:
        """Nothing to draw."""

    def advance(self, done: int, seconds: float = 0.0) -> None:
        """Tell the parent."""
        print(f"{done}/{self.total}", file=self.pipe, flush=True)

    def close(self) -> None:
        """Nothing was drawn."""


def main() -> None:
    """Do the runs whose descriptions come on the standard input, a line each."""
    from rlhf_course import runs
    from rlhf_course.progress import console

    runs.Bar, console.quiet = PipeBar, True
    PipeBar.pipe, sys.stdout = sys.stdout, sys.stderr  # nobody else speaks to the parent
    for line in sys.stdin:
        stage, folder, world, settings = json.loads(line)
        try:
            jobs.run(stage, Path(folder), world, settings)
        except (CourseError, Interrupted) as error:
            sys.exit(str(error))
        print(DONE, file=PipeBar.pipe, flush=True)


if __name__ == "__main__":
    main()
