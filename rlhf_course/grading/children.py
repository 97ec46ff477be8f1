"""The fork server and its children, seen from the referee: started, asked, waited for, killed."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from rlhf_course.coursework import bank, source
from rlhf_course.errors import GradingError
from rlhf_course.grading import wire

CONFINED = 60.0
"""Seconds within which a new child must be ready."""
SPARE = 10
"""Seconds of processor time that a player may use beyond those in which its exercise must end."""


class Stopped(BaseException):
    """A player hung, crashed or ended itself: its exercise is over. The text is for the student.

    Not an Exception, so that no test takes it for an error that the answer raised.
    """


@dataclass(frozen=True)
class Patience:
    """How long is waited, in seconds."""

    call: float = 10.0
    exercise: float = 60.0


class ForkServer:
    """The process that makes players. A context manager: with it go all its children."""

    def __init__(self, patience: Patience | None = None):
        self.patience = patience or Patience()
        self.isolation: list[str] = []
        self.folder = tempfile.mkdtemp(prefix="rlhf-course-players-")
        self.control, theirs = socket.socketpair()
        root = str(source.ROOT.parent)
        start = (
            f"import sys; sys.path.insert(0, {root!r}); "
            "from rlhf_course.grading.forkserver import main; "
            f"sys.path.pop(0); main({theirs.fileno()}, {self.folder!r}, {self._hidden()!r}, "
            f"{math.ceil(self.patience.exercise) + SPARE})"
        )
        self.process = subprocess.Popen(
            [sys.executable, "-I", "-B", "-c", start], pass_fds=[theirs.fileno()],
            env=_environment(self.folder), stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE, cwd="/", start_new_session=True,
        )  # fmt: skip
        theirs.close()

    @staticmethod
    def _hidden() -> list[str]:
        """The package with its answers, the tests, and a clone with chapters and solutions."""
        clone = source.ROOT.parent
        inside = [clone] if (clone / "pyproject.toml").exists() else [source.ROOT]
        return [str(place) for place in (*inside, bank.folder())]

    def _ask(self, text: str, fds: Sequence[int] = ()) -> dict:
        try:
            socket.send_fds(self.control, [text.encode()], fds)
            data = self.control.recv(1000)
        except OSError:
            data = b""
        if not data:
            self.process.kill()
            self.process.wait()  # from now on `check` knows
            said = self.process.stderr.read().decode(errors="replace")
            raise GradingError(f"players cannot be started here:\n{said[-2000:]}")
        return json.loads(data)

    def fork(self, kind: str) -> tuple[int, int]:
        """(pid, file descriptor of the channel) of a new child."""
        ours, theirs = socket.socketpair()
        with theirs:
            reply = self._ask(f"fork {kind}", [theirs.fileno()])
        if "problem" in reply:
            ours.close()
            raise GradingError(f"no player can be started: {reply['problem']}")
        ours.setblocking(False)
        return reply["pid"], ours.detach()

    def end(self, pid: int) -> int:
        """Kill a child; returns its exit status."""
        return self._ask(f"end {pid}")["status"]

    def check(self) -> None:
        """Raise GradingError where the server has died: what came of a test meanwhile, and would
        be the student's, is not."""
        if self.process.poll() is not None:
            raise GradingError("the process that starts the players has died")

    def close(self) -> None:
        """End the server, and with it all its children."""
        self.control.close()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.process.stderr.close()
        self.process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> ForkServer:
        return self

    def __exit__(self, *exception) -> None:
        self.close()


def _environment(folder: str) -> dict[str, str]:
    """Nothing of the referee's own; one thread a process, for several run side by side.

    A player can neither start a compiler nor open a window: torch.compile leaves functions as they
    are, and what an answer plots is drawn nowhere.
    """
    return {
        "PATH": "/usr/bin:/bin", "LANG": "C.UTF-8", "HOME": "/nonexistent", "TMPDIR": folder,
        "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1",
        "TORCH_COMPILE_DISABLE": "1", "MPLBACKEND": "agg",
    }  # fmt: skip


class Child:
    """A child of the fork server, and the conversation with it."""

    def __init__(self, server: ForkServer, kind: str):
        self.server, self.waited = server, 0.0
        self.pid, self.fd = server.fork(kind)
        try:  # the layers that confine it, told before it has heard of any student
            layers = wire.decode(wire.receive(self.fd, time.monotonic() + CONFINED))
        except wire.WireError as error:
            self.end()
            raise GradingError(f"a player cannot be confined here: {error}") from None
        server.isolation = [str(layer) for layer in layers]

    def ask(self, request: Any, reply: bool = True) -> Any:
        """The reply to a message. Raises Stopped, and ends the child, when there is none."""
        if self.fd is None:
            raise Stopped("It had been stopped before.")
        patience, began = self.server.patience, time.monotonic()
        deadline = began + min(patience.call, patience.exercise - self.waited)
        try:
            wire.send(self.fd, wire.encode(request), deadline)
            return wire.decode(wire.receive(self.fd, deadline)) if reply else None
        except wire.Late:
            self.end()
            if self.waited + time.monotonic() - began >= patience.exercise:
                raise Stopped(f"Together it took longer than {patience.exercise:g} s.") from None
            raise Stopped(f"It did not come back within {patience.call:g} s.") from None
        except wire.Closed:
            raise Stopped(_ended(self.end())) from None
        except wire.WireError as error:
            self.end()
            raise Stopped(f"Its result cannot be read ({error}).") from None
        finally:
            self.waited += time.monotonic() - began

    def end(self) -> int:
        """Kill it; 0 where it was dead already."""
        if self.fd is None:
            return 0
        os.close(self.fd)
        self.fd = None
        return self.server.end(self.pid)


def _ended(status: int) -> str:
    """A dead player in words."""
    if os.WIFSIGNALED(status) and os.WTERMSIG(status) != signal.SIGKILL:
        return f"It crashed ({signal.Signals(os.WTERMSIG(status)).name})."
    return "It ended its own process, or used more than it may of time or memory."
