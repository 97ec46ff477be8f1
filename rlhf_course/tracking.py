"""Where a run's curves go besides `metrics.jsonl`: TensorBoard, Weights & Biases, both or neither.

A tracker is a mirror of the run folder, never its record. A run that resumes drops the metrics
behind its checkpoint and measures them again; a tracker must show every step once all the same.
TensorBoard is told from which step on to forget. Weights & Biases forgets nothing, so it is sent
only the steps that it does not have, from `metrics.jsonl` where they were measured before.
"""

from __future__ import annotations

import json
import os
import uuid
from pathlib import Path
from typing import Protocol

from rlhf_course.choices import Track
from rlhf_course.errors import ConfigError
from rlhf_course.files import read_json, remove, write_json
from rlhf_course.progress import console

PROJECT = "rlhf-course"  # on Weights & Biases, unless WANDB_PROJECT says otherwise
OFFLINE = "WANDB_MODE=offline keeps the curves in the run folder, and `wandb sync` sends them later"


class Tracker(Protocol):
    """What a run asks of a tracker."""

    def log(self, step: int, values: dict[str, float]) -> None:
        """Show the values of one step."""

    def flush(self) -> None:
        """A checkpoint is being written: what was logged must outlive this process."""

    def close(self) -> None:
        """No step follows."""


class TensorBoard:
    """Event files in `tensorboard/` of the run folder."""

    def __init__(self, folder: Path, step: int):
        """step: the first to come; events from there on are hidden when the curves are drawn."""
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=step)

    def log(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        for key, value in values.items():
            self._writer.add_scalar(key, value, step)

    def flush(self) -> None:
        """See `Tracker`."""
        self._writer.flush()

    def close(self) -> None:
        """See `Tracker`."""
        self._writer.close()


class WeightsAndBiases:
    """A run on Weights & Biases, whose files stand in `wandb/` of the run folder.

    Its id is made once and kept there, so a run that resumes goes on in the same curves.
    """

    def __init__(self, folder: Path, config: dict, logged: int):
        """logged: steps that earlier processes measured; those behind the checkpoint come again.

        Raises ConfigError when Weights & Biases cannot be reached.
        """
        import wandb

        named = folder / "wandb" / f"{PROJECT}.json"
        if not named.exists():
            write_json(named, {"id": uuid.uuid4().hex[:8]})
        identity = read_json(named)["id"]
        try:
            self._run = wandb.init(
                project=os.environ.get("WANDB_PROJECT", PROJECT), id=identity, resume="allow",
                name="/".join(folder.absolute().parts[-2:]), group=folder.absolute().parent.name,
                config=config, dir=str(folder), settings=wandb.Settings(console="off"),
            )  # fmt: skip
        except wandb.Error as error:
            raise ConfigError(f"--track wandb: {error}. {OFFLINE}.") from error
        self._next = self._first(folder, identity, logged)
        for step, values in _measured(folder):
            self.log(step, values)

    def _first(self, folder: Path, identity: str, logged: int) -> int:
        """The first step that Weights & Biases does not have.

        Online the server says so. A process that is killed offline leaves a file of which nobody
        knows how far it goes: the new one takes its place from step 0 on, unless it was sent.
        """
        here = Path(self._run.dir).parent
        offline = (folder / "wandb").glob(f"offline-run-*-{identity}")
        others = [other for other in offline if other.absolute() != here.absolute()]
        sent = [other for other in others if any(other.glob("*.synced"))]
        for other in others:
            if other not in sent:
                remove(other)
        if self._run.offline:
            return logged if sent else 0
        return self._run.starting_step

    def log(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`; a step that is there already is not sent again."""
        if self._run is None or step < self._next:
            return
        try:
            self._run.log(values, step=step, commit=True)
        except Exception as error:  # noqa: BLE001 - its service may fail in ways of its own
            console.print(
                f"[yellow]Weights & Biases takes no more ({type(error).__name__}: {error}); the "
                "training goes on. A run that resumes sends what is missing.[/yellow]"
            )
            self._run = None

    def flush(self) -> None:
        """Nothing: what was lost is sent when the run resumes."""

    def close(self) -> None:
        """See `Tracker`."""
        if self._run is not None:
            self._run.finish()


class Several:
    """Several trackers, or none, as one."""

    def __init__(self, *trackers: Tracker):
        self.trackers = trackers

    def log(self, step: int, values: dict[str, float]) -> None:
        """See `Tracker`."""
        for tracker in self.trackers:
            tracker.log(step, values)

    def flush(self) -> None:
        """See `Tracker`."""
        for tracker in self.trackers:
            tracker.flush()

    def close(self) -> None:
        """See `Tracker`."""
        for tracker in self.trackers:
            tracker.close()


def require_tracker(track: Track) -> None:
    """Asked before anything is loaded. Raises ConfigError saying what to install or to set."""
    if track not in ("wandb", "both"):
        return
    try:
        # A folder `wandb` in the working directory can be imported too, and has nothing in it.
        from wandb import Error, login, setup
    except ImportError:
        raise ConfigError(
            f"--track {track}: the package wandb is not installed. Run `pip install wandb`, or "
            "leave the flag out: the curves then go to TensorBoard."
        ) from None
    try:
        offline = setup().settings.mode in ("offline", "dryrun", "disabled")
        problem = None if offline or login(prompt=False) else "no account is logged in"
    except (Error, ValueError) as error:  # a key that the server refuses; a WANDB_… that is wrong
        problem = " ".join(str(error).split())
    if problem:
        raise ConfigError(
            f"--track {track}: {problem}. Run `wandb login`, or set WANDB_API_KEY; {OFFLINE}."
        )


def open_tracker(track: Track, folder: Path, step: int, config: dict, logged: int) -> Tracker:
    """The tracker of a run whose next step is `step`; see `WeightsAndBiases` for `logged`."""
    trackers: list[Tracker] = []
    if track in ("tensorboard", "both"):
        trackers.append(TensorBoard(folder, step))
    if track in ("wandb", "both"):
        trackers.append(WeightsAndBiases(folder, config, logged))
    return Several(*trackers)


def rows_of(file: Path) -> list[dict]:
    """The rows of a file of JSON lines."""
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _measured(folder: Path) -> list[tuple[int, dict[str, float]]]:
    """(step, metrics and timing) of the steps up to the checkpoint that the run goes on from."""
    timing = {row["step"]: row for row in rows_of(folder / "timing.jsonl")}
    out = []
    for row in rows_of(folder / "metrics.jsonl"):
        values = {**row, **timing.get(row["step"], {})}
        out.append((values.pop("step"), values))
    return out
