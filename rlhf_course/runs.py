"""A run folder: configuration, metrics, checkpoints, and an exact resume.

    runs/ppo/
      config.json        what the run was started with
      metrics.jsonl      one line a step, bitwise the same on every repetition
      timing.jsonl       seconds and tokens/s, which are not
      tensorboard/       the same curves as TensorBoard events
      checkpoints/step-000040/{tensors.safetensors, state.json}
      model/             the result, a Hugging Face directory
      done.json          written last: the stage is complete

A checkpoint is written under a temporary name and renamed, so one that exists is whole. Killed
anywhere, a run started again goes on from its newest checkpoint and drops the metrics behind it.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf_course.errors import CheckpointError, ConfigError
from rlhf_course.progress import Bar

KEEP = 2  # checkpoints: the newest, and the one before it


class Interrupted(Exception):
    """Ctrl-C was pressed; a checkpoint has been written. The command line exits with 130."""


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary sibling of `path`, which takes its place when the block succeeds.

    Whatever goes wrong inside, `path` is either as before or complete. OSError (disk full, no
    permission) becomes a CheckpointError.
    """
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        old = path.with_name(f".{path.name}.old-{os.getpid()}")
        if path.is_dir():  # a directory cannot be renamed over another
            os.rename(path, old)
        os.replace(part, path)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror or error}. "
            "Free some space or choose another folder with --out; what was there is untouched."
        ) from error
    finally:
        if part.is_dir():
            shutil.rmtree(part, ignore_errors=True)
        else:
            part.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON; a damaged file is a CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). Remove it and run again."
        ) from None


class State:
    """Everything that changes in training: modules, optimisers, and objects with a state_dict
    of plain numbers (controllers, running moments)."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        optimizers: dict[str, torch.optim.Optimizer],
        counters: dict[str, Any] | None = None,
    ):
        self.modules, self.optimizers, self.counters = modules, optimizers, counters or {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name. Tied weights appear once (`named_parameters` says so)."""
        out = {}
        for name, module in self.modules.items():
            for key, tensor in (*module.named_parameters(), *module.named_buffers()):
                out[f"module/{name}/{key}"] = tensor.detach()
        for name, optimizer in self.optimizers.items():
            for index, slots in optimizer.state_dict()["state"].items():
                for key, value in slots.items():
                    out[f"optimizer/{name}/{index}/{key}"] = torch.as_tensor(value)
        return out

    def load(self, tensors: dict[str, torch.Tensor], counters: dict) -> None:
        """Put everything back, in place."""
        own = {k: v for k, v in self.tensors().items() if k.startswith("module/")}
        if own.keys() != {k for k in tensors if k.startswith("module/")}:
            raise CheckpointError(
                "the checkpoint holds other tensors than this run's models. "
                "Start anew with --overwrite, or choose another --out."
            )
        with torch.no_grad():
            for key, tensor in own.items():
                tensor.copy_(tensors[key])
        for name, optimizer in self.optimizers.items():
            state = optimizer.state_dict()
            for key, tensor in tensors.items():
                kind, owner, *rest = key.split("/")
                if kind == "optimizer" and owner == name:
                    state["state"].setdefault(int(rest[0]), {})[rest[1]] = tensor.clone()
            optimizer.load_state_dict(state)
        for name, counter in self.counters.items():
            counter.load_state_dict(counters[name])


class Run:
    """One stage's folder, open for training. Use as a context manager.

    config: what makes the run what it is; a folder that holds another configuration is refused.
    """

    def __init__(self, out: str | os.PathLike, config: dict, total: int, label: str,
                 overwrite: bool = False, checkpoint_every: int = 100):  # fmt: skip
        self.path, self.total, self.label = Path(out), total, label
        self.checkpoint_every = checkpoint_every
        self._stop = False
        if overwrite and (self.path / "config.json").exists():
            shutil.rmtree(self.path)  # only ever a folder that is a run
        for part in (*self.path.glob(".*.part-*"), *self.path.glob("checkpoints/.*.part-*")):
            shutil.rmtree(part, ignore_errors=True)  # left by a run that was killed while writing
        config = json.loads(json.dumps(config))  # tuples become lists, as they will be when read
        if (self.path / "config.json").exists():
            self._same_config(config)
        else:
            if self.path.is_dir() and any(self.path.iterdir()):
                raise ConfigError(
                    f"{self.path}: not empty, and not a run folder. Choose another --out."
                )
            write_json(self.path / "config.json", config)

    def _same_config(self, config: dict) -> None:
        before = read_json(self.path / "config.json")
        different = [
            f"{key}: {before.get(key)!r} there, {config.get(key)!r} now"
            for key in sorted(before.keys() | config.keys())
            if before.get(key) != config.get(key)
        ]
        if different:
            raise ConfigError(
                f"{self.path}: holds a run with another configuration "
                f"({'; '.join(different[:4])}). "
                "Choose another --out, or replace it with --overwrite."
            )

    @property
    def finished(self) -> bool:
        """True when the stage has run to its end and `model/` is there."""
        return (self.path / "done.json").exists()

    @property
    def model_dir(self) -> Path:
        """Where the stage's result stands."""
        return self.path / "model"

    # ---- open and close --------------------------------------------------------------------------

    def __enter__(self) -> Run:
        def on_interrupt(signum, frame):
            if self._stop:  # pressed twice: at once
                raise KeyboardInterrupt
            self._stop = True

        try:
            self._previous = signal.signal(signal.SIGINT, on_interrupt)
        except ValueError:  # not in the main thread: no handler, no graceful Ctrl-C
            self._previous = None
        self.bar = Bar(self.label, self.total)
        return self

    def __exit__(self, *exc) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        self.bar.close()
        for handle in ("_metrics", "_timing", "_events"):
            if hasattr(self, handle):
                getattr(self, handle).close()

    # ---- the loop --------------------------------------------------------------------------------

    def steps(self, state: State) -> Iterator[int]:
        """Restore the newest checkpoint, then yield the steps still to do, saving on the way."""
        self.path.mkdir(parents=True, exist_ok=True)
        step, offsets = self._restore(state)
        self._open_logs(step, offsets)
        self.bar.start(step)
        while step < self.total:
            began = time.perf_counter()
            yield step
            step += 1
            self.bar.advance(step, time.perf_counter() - began)
            if self._stop or step == self.total or step % self.checkpoint_every == 0:
                self._save(state, step)
            if self._stop:
                raise Interrupted(
                    f"{self.label}: stopped after step {step} of {self.total}; a checkpoint stands "
                    f"in {self.path}. The same command goes on from there."
                )

    def log(self, step: int, metrics: dict[str, float], timing: dict[str, float] | None = None):
        """Record one step: `metrics` must be reproducible, `timing` need not be."""
        self._metrics.write(json.dumps({"step": step, **metrics}) + "\n")
        self._metrics.flush()
        if timing:
            self._timing.write(json.dumps({"step": step, **timing}) + "\n")
            self._timing.flush()
        for key, value in {**metrics, **(timing or {})}.items():
            self._events.add_scalar(key, value, step)
        self.bar.show(metrics)

    def finish(self, export: Callable[[Path], None] | None = None, summary: dict | None = None):
        """Write `model/` by calling `export` on a temporary folder, then `done.json`."""
        if export is not None:
            with replacing(self.model_dir) as part:
                part.mkdir()
                export(part)
        write_json(self.path / "done.json", summary or {})

    # ---- checkpoints -----------------------------------------------------------------------------

    def _checkpoints(self) -> list[Path]:
        return sorted((self.path / "checkpoints").glob("step-*"))

    def _save(self, state: State, step: int) -> None:
        self._events.flush()
        content = {
            "step": step,
            "counters": {name: c.state_dict() for name, c in state.counters.items()},
            "metrics_bytes": self._metrics.tell(),
            "timing_bytes": self._timing.tell(),
        }
        with replacing(self.path / "checkpoints" / f"step-{step:06d}") as part:
            part.mkdir()
            save_file({k: v.cpu().contiguous() for k, v in state.tensors().items()},
                      part / "tensors.safetensors")  # fmt: skip
            (part / "state.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        for old in self._checkpoints()[:-KEEP]:
            shutil.rmtree(old, ignore_errors=True)

    def _restore(self, state: State) -> tuple[int, dict[str, int]]:
        found = self._checkpoints()
        if not found:
            return 0, {"metrics_bytes": 0, "timing_bytes": 0}
        content = read_json(found[-1] / "state.json")
        state.load(load_file(found[-1] / "tensors.safetensors"), content["counters"])
        return content["step"], content

    def _open_logs(self, step: int, offsets: dict[str, int]) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._metrics = _open_at(self.path / "metrics.jsonl", offsets["metrics_bytes"])
        self._timing = _open_at(self.path / "timing.jsonl", offsets["timing_bytes"])
        self._events = SummaryWriter(str(self.path / "tensorboard"), purge_step=step)


def _open_at(path: Path, offset: int):
    """Open for appending after `offset` bytes; what stands behind them is dropped."""
    try:
        handle = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
        handle.truncate(offset)
        handle.seek(0, os.SEEK_END)
    except OSError as error:
        raise CheckpointError(
            f"cannot write {path}: {error.strerror}. Choose another folder with --out."
        ) from error
    return handle


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The rows of a run folder's `metrics.jsonl`."""
    text = (Path(path) / "metrics.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]
