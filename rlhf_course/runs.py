"""A run folder: configuration, metrics, checkpoints, and an exact resume.

    runs/ppo/
      config.json        what the run was started with
      metrics.jsonl      one line a step, bitwise the same on every repetition
      timing.jsonl       seconds and tokens/s, which are not
      tensorboard/       the same curves as TensorBoard events; wandb/ for Weights & Biases
      checkpoints/step-000040/{tensors.safetensors, state.json}
      model/             the result, a Hugging Face directory
      done.json          written last: the stage is complete

A checkpoint is written under a temporary name and renamed, so one that exists is whole. Killed
anywhere, a run started again goes on from its newest checkpoint and drops the metrics behind it.
A run that fails before its first step leaves nothing. One process at a time may use a folder.
"""

from __future__ import annotations

import contextlib
import glob
import json
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from rlhf_course.choices import Track
from rlhf_course.errors import CheckpointError, ConfigError, Interrupted
from rlhf_course.files import (
    LEFTOVER,
    read_json,
    remove,
    replacing,
    require_writable,
    write_json,
    writing,
)
from rlhf_course.progress import Bar
from rlhf_course.tracking import open_tracker, require_tracker, rows_of

KEEP = 2  # checkpoints: the newest, and the one before it


def read_tensors(file: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint's file. Raises CheckpointError."""
    try:
        return load_file(file)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"{file.parent}: damaged ({error}). Remove this folder, and the same command goes on "
            "from the checkpoint before it, or from the start where there is none."
        ) from None


class State:
    """Everything that changes in training: modules without what is frozen in them, optimisers, and
    objects with a state_dict of plain numbers (controllers, running moments). Any object with
    `counters`, `save` and `restore` may stand in its place, where the tensors live in other
    processes."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        optimizers: dict[str, torch.optim.Optimizer],
        counters: dict[str, Any] | None = None,
    ):
        self.modules, self.optimizers, self.counters = modules, optimizers, counters or {}

    def tensors(self) -> dict[str, torch.Tensor]:
        """All tensors by name. Tied weights appear once (`named_parameters` says so), and frozen
        ones, such as those under an adapter, not at all: they are read again where they came from.
        """
        out = {}
        for name, module in self.modules.items():
            trained = [(key, p) for key, p in module.named_parameters() if p.requires_grad]
            for key, tensor in (*trained, *module.named_buffers()):
                out[f"module/{name}/{key}"] = tensor.detach()
        for name, optimizer in self.optimizers.items():
            for index, slots in optimizer.state_dict()["state"].items():
                for key, value in slots.items():
                    out[f"optimizer/{name}/{index}/{key}"] = torch.as_tensor(value)
        return out

    def save(self, folder: Path) -> None:
        """Write all tensors as `tensors.safetensors` into the folder of a checkpoint."""
        tensors = {name: t.cpu().contiguous() for name, t in self.tensors().items()}
        save_file(tensors, folder / "tensors.safetensors")

    def restore(self, folder: Path, counters: dict) -> None:
        """Put back what `save` wrote, and the counters."""
        self.load(read_tensors(folder / "tensors.safetensors"), counters)

    def load(self, tensors: dict[str, torch.Tensor], counters: dict) -> None:
        """Put everything back, in place."""
        own = {k: v for k, v in self.tensors().items() if k.startswith("module/")}
        there = {k: v.shape for k, v in tensors.items() if k.startswith("module/")}
        here = {k: v.shape for k, v in own.items()}
        if different := sorted(k for k in here.keys() | there if here.get(k) != there.get(k)):
            raise CheckpointError(
                f"the checkpoint's tensors are not those of this run's models: {different[0]} "
                f"({len(different)} in all). Start anew with --overwrite, or choose another --out."
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
    track: where the curves go besides `metrics.jsonl`, see `tracking`.
    Nothing is written before the context is entered: a stage loads its data and its models first,
    and what is wrong with them leaves no folder behind and replaces none.
    """

    def __init__(self, out: str | os.PathLike, config: dict, total: int, label: str,
                 overwrite: bool = False, checkpoint_every: int = 100,
                 track: Track = "tensorboard"):  # fmt: skip
        self.path, self.total, self.label = Path(out), total, label
        self.overwrite, self.checkpoint_every, self.track = overwrite, checkpoint_every, track
        self.config = json.loads(json.dumps(config))  # tuples become lists, as when read again
        self._stop = self._begun = False
        require_writable(self.path)
        if (self.path / "config.json").exists():
            if not overwrite:
                self._same_config()
        elif not all(LEFTOVER.fullmatch(file.name) for file in self.path.glob("*")):
            raise ConfigError(
                f"{self.path}: not empty, and not a run folder. Choose another --out."
            )
        if not self.finished:
            require_tracker(track)

    def _same_config(self) -> None:
        before, now = read_json(self.path / "config.json"), self.config
        different = [
            f"{key}: {before.get(key)!r} there, {now.get(key)!r} now"
            for key in sorted(before.keys() | now.keys())
            if before.get(key) != now.get(key)
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
        return (self.path / "done.json").exists() and not self.overwrite

    @property
    def model_dir(self) -> Path:
        """Where the stage's result stands."""
        return self.path / "model"

    # ---- open and close --------------------------------------------------------------------------

    def _open_folder(self) -> None:
        """Make the folder; clear away what was to be replaced, or was left by a killed run."""
        there = self.path.absolute()
        with writing(self.path):
            if self.overwrite and there.is_dir():  # only ever a run's: see __init__
                # Renamed first: half of a run, left by a kill, would be refused the next time.
                os.rename(there, there.with_name(f".{there.name}.old-{os.getpid()}"))
            self.overwrite = False
            beside = there.parent.glob(f".{glob.escape(there.name)}.old-*")
            for file in (*beside, *there.rglob(".*")):
                if LEFTOVER.fullmatch(file.name):
                    remove(file)
        self._new = not (self.path / "config.json").exists()
        if self._new:
            write_json(self.path / "config.json", self.config)

    def __enter__(self) -> Run:
        self._open_folder()

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

    def __exit__(self, kind, error, trace) -> None:
        if self._previous is not None:
            signal.signal(signal.SIGINT, self._previous)
        self.bar.close()
        self._close_logs()
        if kind is not None and self._new and not self._begun:
            remove(self.path)
        if self._stop and kind is None:  # pressed after the last step
            raise Interrupted(f"{self.label}: complete, in {self.path}; stopped behind it.")

    def _close_logs(self) -> None:
        for handle in ("_metrics", "_timing", "_tracker"):
            if hasattr(self, handle):
                with contextlib.suppress(OSError):  # `log` has said so already
                    getattr(self, handle).close()

    # ---- the loop --------------------------------------------------------------------------------

    def steps(self, state: State) -> Iterator[int]:
        """Restore the newest checkpoint, then yield the steps still to do, saving on the way.

        May be called again within the context, with another state, where the first was lost.
        """
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
                    f"in {self.path}. The same command (without --overwrite) goes on from there."
                )

    def log(self, step: int, metrics: dict[str, float], timing: dict[str, float] | None = None):
        """Record one step: `metrics` must be reproducible, `timing` need not be."""
        self._begun = True
        with writing(self.path / "metrics.jsonl"):
            self._metrics.write(json.dumps({"step": step, **metrics}) + "\n")
            self._metrics.flush()
            if timing:
                self._timing.write(json.dumps({"step": step, **timing}) + "\n")
                self._timing.flush()
            self._tracker.log(step, {**metrics, **(timing or {})})
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
        found = (self.path / "checkpoints").glob("step-*")
        return sorted(found, key=lambda path: (len(path.name), path.name))  # step-1000000 is last

    def _save(self, state: State, step: int) -> None:
        self._begun = True
        self._settle_logs()
        content = {
            "step": step,
            "counters": {name: c.state_dict() for name, c in state.counters.items()},
            "metrics_bytes": self._metrics.tell(),
            "timing_bytes": self._timing.tell(),
        }
        with replacing(self.path / "checkpoints" / f"step-{step:06d}") as part:
            self._tracker.flush()
            part.mkdir()
            state.save(part)
            (part / "state.json").write_text(json.dumps(content, indent=2), encoding="utf-8")
        for old in self._checkpoints()[:-KEEP]:
            remove(old)

    def _restore(self, state: State) -> tuple[int, dict[str, int]]:
        found = self._checkpoints()
        if not found:
            return 0, {"metrics_bytes": 0, "timing_bytes": 0}
        self._begun = True
        content = read_json(found[-1] / "state.json")
        state.restore(found[-1], content["counters"])
        return content["step"], content

    def _settle_logs(self) -> None:
        """Close the logs and open them again: a network folder, as Google Drive's, may keep what is
        written to itself until a file is closed, and a checkpoint must not be ahead of its logs."""
        for handle, name in (("_metrics", "metrics.jsonl"), ("_timing", "timing.jsonl")):
            with writing(self.path / name):
                offset = getattr(self, handle).tell()
                getattr(self, handle).close()
            setattr(self, handle, _open_at(self.path / name, offset))

    def _open_logs(self, step: int, offsets: dict[str, int]) -> None:
        self._close_logs()
        metrics = self.path / "metrics.jsonl"
        logged = metrics.read_bytes().count(b"\n") if metrics.exists() else 0
        self._metrics = _open_at(metrics, offsets["metrics_bytes"])
        self._timing = _open_at(self.path / "timing.jsonl", offsets["timing_bytes"])
        self._tracker = open_tracker(self.track, self.path, step, self.config, logged)


def _open_at(path: Path, offset: int):
    """Open for appending after `offset` bytes; what stands behind them is dropped."""
    with writing(path):
        handle = open(path, "a", encoding="utf-8", newline="\n")  # noqa: SIM115
        if handle.seek(0, os.SEEK_END) < offset:
            handle.close()
            raise CheckpointError(
                f"{path}: shorter than when the checkpoint was made. Remove the newest folder in "
                "checkpoints, and the same command goes on from the one before it, or start anew "
                "with --overwrite."
            )
        handle.truncate(offset)
        handle.seek(0, os.SEEK_END)
    return handle


def read_metrics(path: str | os.PathLike) -> list[dict]:
    """The rows of a run folder's `metrics.jsonl`."""
    return rows_of(Path(path) / "metrics.jsonl")


def read_timing(path: str | os.PathLike) -> list[dict]:
    """The rows of a run folder's `timing.jsonl`."""
    return rows_of(Path(path) / "timing.jsonl")
