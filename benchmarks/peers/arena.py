"""Contestants in processes of their own, which take turns at the same work.

A contestant is a function of a case and of `turn`: it makes itself ready, then works and calls
`turn(tokens=…)` after every repeat. The call waits until it is its turn again, and what lies
between two calls is what is timed. A trainer that calls back fits in as it is.

Only one works at a time. Every contestant first runs once with each number of threads, and goes
on with its best; then come the repeats, in another order each time.
"""

from __future__ import annotations

import importlib
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from peers.cases import Case

ENVIRONMENT = {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "WANDB_MODE": "disabled",
               "PYTHONWARNINGS": "ignore", "TRANSFORMERS_VERBOSITY": "error",
               "TRL_EXPERIMENTAL_SILENCE": "1"}  # fmt: skip


@dataclass(frozen=True)
class Entry:
    """Who takes part: a name for the table, "module:function", and what its process needs."""

    name: str
    function: str
    case: Case
    settings: dict[str, Any] = field(default_factory=dict)
    """Further arguments of the function."""
    environment: dict[str, str] = field(default_factory=dict)
    threads: tuple[int, ...] = ()
    """The numbers of threads to try; () is 1 and all cores."""


@dataclass
class Turns:
    """What a contestant did: seconds, units and peak memory of every repeat."""

    threads: int
    seconds: list[float] = field(default_factory=list)
    units: list[dict[str, float]] = field(default_factory=list)
    peak_bytes: int = 0

    def rates(self, unit: str) -> list[float]:
        """Units a second of every repeat."""
        return [u[unit] / s for u, s in zip(self.units, self.seconds, strict=True)]

    def told(self, unit: str) -> dict:
        """For the results."""
        return {"threads": self.threads, "rate": spread(self.rates(unit)),
                "rates": self.rates(unit), "peak_bytes": self.peak_bytes}  # fmt: skip


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


class Stopped(BaseException):
    """Raised in a contestant when the contest is over; no `except Exception` swallows it."""


def resident(name: str) -> int:
    """Bytes: "VmRSS" now, "VmHWM" at most, of this process (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def _live(pipe, log: str, entry: Entry) -> None:
    """A contestant's process."""
    with open(log, "w") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    import torch

    began = 0.0

    def turn(**units: float) -> None:
        nonlocal began
        seconds = time.perf_counter() - began if began else 0.0  # 0: ready for the first one
        pipe.send((seconds, units, resident("VmHWM")))
        threads = pipe.recv()
        if threads is None:
            raise Stopped
        torch.set_num_threads(threads)
        began = time.perf_counter()

    module, function = entry.function.split(":")
    try:
        getattr(importlib.import_module(module), function)(entry.case, turn, **entry.settings)
    except (Stopped, EOFError, BrokenPipeError):
        pass  # the contest is over
    except BaseException:  # noqa: BLE001  whatever it is, the arena wants to know
        traceback.print_exc()  # `Contestant.work` tells it
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(0)  # engines and trainers have threads that would go on


class Contestant:
    """A contestant's process, seen from the arena."""

    def __init__(self, entry: Entry, folder: str):
        self.entry, self.log = entry, str(Path(folder) / f"{entry.name}.log".replace(" ", "-"))
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=_live, args=(theirs, self.log, entry), daemon=False)
        wanted = ENVIRONMENT | entry.environment
        before = {name: os.environ.get(name) for name in wanted}
        os.environ.update(wanted)
        try:
            self.process.start()
        finally:
            for name, value in before.items():
                os.environ.pop(name) if value is None else os.environ.update({name: value})
        theirs.close()
        self.turns = Turns(0)

    def work(self, threads: int) -> tuple[float, dict[str, float]]:
        """One repeat: seconds, units. Raises RuntimeError with what the process last said."""
        with suppress(BrokenPipeError):  # `wait` tells
            self.pipe.send(threads)
        return self.wait()

    def wait(self) -> tuple[float, dict[str, float]]:
        """Until it has done its turn, or has made itself ready for the first one."""
        try:
            seconds, units, self.turns.peak_bytes = self.pipe.recv()
        except (EOFError, BrokenPipeError):
            said = Path(self.log).read_text(errors="replace")[-3000:]
            raise RuntimeError(
                f"{self.entry.name} on {self.entry.case} has ended:\n{said}"
            ) from None
        return seconds, units

    def close(self) -> None:
        """End the process."""
        with suppress(BrokenPipeError):
            self.pipe.send(None)
        self.pipe.close()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()


LONG = 4.0
"""Seconds of a turn from which fewer threads than cores are not tried: there is enough work."""


def _tune(player: Contestant, cores: int, unit: str, say: Callable[[str], None]) -> None:
    """Warm up, then find the best number of threads."""
    choices = player.entry.threads or tuple(sorted({cores, 1}, reverse=True))
    player.work(choices[0])
    tried: dict[int, float] = {}
    for threads in choices:
        seconds, units = player.work(threads)
        tried[threads] = units[unit] / seconds
        if seconds > LONG:
            break
    player.turns.threads = max(tried, key=tried.__getitem__)
    told = ", ".join(f"{n} threads {rate:,.0f}" for n, rate in tried.items())
    say(f"    {player.entry.name}: {told}")


def contest(
    entries: list[Entry], repeats: int, unit: str, say: Callable[[str], None] = print
) -> dict[str, Turns]:
    """All of them, `repeats` times each, one after the other."""
    cores = len(os.sched_getaffinity(0))
    with tempfile.TemporaryDirectory() as folder:
        players = [Contestant(entry, folder) for entry in entries]
        try:
            for player in players:
                player.wait()  # else the first would work while the others make themselves ready
            for player in players:
                _tune(player, cores, unit, say)
            for repeat in range(repeats):
                start = repeat % len(players)
                for player in players[start:] + players[:start]:
                    seconds, units = player.work(player.turns.threads)
                    player.turns.seconds.append(seconds)
                    player.turns.units.append(units)
        finally:
            for player in players:
                player.close()
    return {player.entry.name: player.turns for player in players}
