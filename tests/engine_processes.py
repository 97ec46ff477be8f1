"""Real rollout engines, each in a process of its own, called through a pipe."""

from __future__ import annotations

import os
import signal
from multiprocessing.connection import Connection
from unittest import mock

from torch import multiprocessing

from rlhf_course.distributed import engine
from rlhf_course.distributed.engine import RolloutEngine, engine_environment


class TestedEngine(RolloutEngine):
    """With a look into the cache."""

    def cached_tokens(self, prompt: list[int]) -> int:
        """How many of the prompt's tokens vLLM finds in its cache. Reads the prompt into it."""
        from vllm import SamplingParams

        settings = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)
        out = self.llm.generate([{"prompt_token_ids": prompt}], settings, use_tqdm=False)
        return out[0].num_cached_tokens


class EngineProcess:
    """The near end of an engine: `ask` a method for its result; `call` is what a channel wants."""

    def __init__(self, pipe: Connection):
        self.pipe = pipe

    def call(self, method: str, *args, limit_s: float = 60.0):
        """Start a method there; the function returned waits for it."""
        self.pipe.send((method, args))

        def wait():
            if not self.pipe.poll(limit_s):
                raise TimeoutError(f"{method}: no answer after {limit_s} s")
            good, value = self.pipe.recv()
            if not good:
                raise value
            return value

        return wait

    def ask(self, method: str, *args, limit_s: float = 60.0):
        """What a method returns or raises there."""
        return self.call(method, *args, limit_s=limit_s)()

    def kill(self) -> None:
        """SIGKILL, in the middle of whatever it does."""
        os.kill(self.ask("info")["pid"], signal.SIGKILL)


def start_engines(settings: dict[str, dict]) -> tuple[dict[str, EngineProcess], object]:
    """name -> settings of RolloutEngine (and `worker`), as name -> engine, and the process above
    them all: it imports vLLM once, which takes longer than all the rest, and splits."""
    context = multiprocessing.get_context("spawn")
    pipes = {name: context.Pipe() for name in settings}
    parts = [(pipes[name][1], chosen) for name, chosen in settings.items()]
    above = context.Process(target=_split, args=(parts,))
    with mock.patch.dict(os.environ, engine_environment("cpu")):
        above.start()
    return {name: EngineProcess(near) for name, (near, _) in pipes.items()}, above


def stop_engines(engines: dict[str, EngineProcess], above) -> None:
    """Their pipes end, so they do."""
    for held in engines.values():
        held.pipe.close()
    above.join(30)
    above.kill()


def _split(parts: list[tuple[Connection, dict]]) -> None:
    from vllm import LLM  # noqa: F401  for the children

    fork = multiprocessing.get_context("fork")
    pipes = [pipe for pipe, _ in parts]
    children = [fork.Process(target=_serve, args=(*part, pipes)) for part in parts]
    for child in children:
        child.start()
    for pipe in pipes:
        pipe.close()
    for child in children:
        child.join()


def _serve(pipe: Connection, settings: dict, pipes: list[Connection]) -> None:
    for other in pipes:
        if other is not pipe:
            other.close()  # a pipe has to end with its engine
    engine.WORKER = settings.pop("worker", engine.WORKER)
    held = TestedEngine(**settings)
    while True:
        try:
            method, args = pipe.recv()
        except EOFError:
            os._exit(0)  # there is nothing to save, and an engine takes its time to end
        try:
            pipe.send((True, getattr(held, method)(*args)))
        except Exception as error:  # noqa: BLE001  it is raised over there
            pipe.send((False, error))
