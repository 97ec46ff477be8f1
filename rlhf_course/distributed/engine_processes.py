"""Rollout engines in processes of their own, called through pipes: what a notebook can hold.

engines = start_engines({"fp32": {"model_dir": policy, "max_model_len": 64, "seed": 0}})
engines["fp32"].ask("greedy", prompts, 8)
"""

from __future__ import annotations

import atexit
import os
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import multiprocessing

from rlhf_course.distributed.engine import RolloutEngine, engine_environment
from rlhf_course.errors import TrainingError

LONGEST = 300.0  # seconds that a call, or the start of an engine, may take


class LessonEngine(RolloutEngine):
    """An engine that can also be watched while it batches."""

    def write(
        self, prompts: list[list[int]], lengths: list[int], static: int | None = None
    ) -> float:
        """Seconds to answer with exactly so many tokens each. static: in batches of this size, all
        of which go on until their longest answer ends, as in Hugging Face's `generate`; None: by
        continuous batching."""
        from vllm import SamplingParams

        rows, seconds = list(range(len(prompts))), 0.0
        size = static or len(rows)
        for batch in (rows[i : i + size] for i in range(0, len(rows), size)):
            wanted = [lengths[i] for i in batch]
            wanted = [max(wanted)] * len(batch) if static else wanted
            how = [SamplingParams(max_tokens=n, ignore_eos=True, detokenize=False) for n in wanted]
            requests = [{"prompt_token_ids": prompts[i]} for i in batch]
            self._forget()
            began = time.perf_counter()
            self.llm.generate(requests, how, use_tqdm=False)
            seconds += time.perf_counter() - began
        return seconds


class EngineProcess:
    """An engine in a process of its own, called through a pipe."""

    def __init__(self, pipe, log: str):
        self.pipe, self.log, self.limit_s = pipe, log, LONGEST

    def call(self, method: str, *args):
        """Start a method there; the function returned waits for it. Channels want this."""
        with suppress(BrokenPipeError):  # `wait` says better that it has died
            self.pipe.send((method, args))

        def wait():
            if not self.pipe.poll(self.limit_s):
                raise TrainingError(f"{method}: no answer of the engine within {self.limit_s:g} s.")
            try:
                good, value = self.pipe.recv()
            except EOFError:
                said = Path(self.log).read_text(encoding="utf-8", errors="replace")
                last = " ".join(said.strip().splitlines()[-3:])
                raise TrainingError(f"{method}: the engine has died. {last}") from None
            if not good:
                raise value
            return value

        return wait

    def ask(self, method: str, *args) -> Any:
        """What a method returns or raises there."""
        return self.call(method, *args)()


def start_engines(
    settings: dict[str, dict], kind: type[RolloutEngine] = LessonEngine
) -> dict[str, EngineProcess]:
    """name -> settings of an engine of this kind, as name -> the engine. They end with this
    process, or when their `pipe` is closed. vLLM is imported once, by a process that then splits.
    """
    spawn = multiprocessing.get_context("spawn")
    pipes = [spawn.Pipe() for _ in settings]
    descriptor, log = tempfile.mkstemp(prefix="engines-", suffix=".log")
    os.close(descriptor)
    near, parts = [a for a, _ in pipes], [b for _, b in pipes]
    above = spawn.Process(target=_split, args=(parts, kind, list(settings.values()), log))
    environment = engine_environment("cuda" if torch.cuda.is_available() else "cpu")
    with mock.patch.dict(os.environ, environment):
        above.start()
    for pipe in parts:
        pipe.close()  # so that the death of an engine is seen here
    for pipe in near:
        atexit.register(pipe.close)  # before Python waits for `above`, which waits for the engines
    atexit.register(Path(log).unlink, missing_ok=True)
    return {name: EngineProcess(a, log) for name, a in zip(settings, near, strict=True)}


def _split(pipes: list, kind: type, settings: list[dict], log: str) -> None:
    with open(log, "w") as file:  # not into the notebook
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    from vllm import LLM  # noqa: F401  for the children

    fork = multiprocessing.get_context("fork")
    numbered = enumerate(settings)
    children = [fork.Process(target=_serve, args=(i, pipes, kind, held)) for i, held in numbered]
    for child in children:
        child.start()
    for pipe in pipes:
        pipe.close()
    for child in children:
        child.join()


def _serve(number: int, pipes: list, kind: type, settings: dict) -> None:
    for i, other in enumerate(pipes):
        if i != number:
            other.close()  # a pipe has to end with its engine
    pipe, held = pipes[number], kind(**settings)
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            os._exit(0)  # there is nothing to save, and an engine takes its time to end
        try:
            pipe.send((True, getattr(held, method)(*args)))
        except Exception as error:  # noqa: BLE001  it is raised over there
            pipe.send((False, error))
