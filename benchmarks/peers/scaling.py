"""How our cost grows: with the model, the context, the batch, the answers, and over processes.

Growth is measured on one thread, so that no point has more cores than another, and of each curve
the slope on logarithmic axes is told: 1 where twice as much takes twice as long. Below 1 something
is paid once however much there is (Python, kernels' starts); above 1 something grows faster, as
attention does with the context.

Processes share a batch as data-parallel ranks do: each adds up the gradient of its rows' losses,
and one all-reduce (gloo) adds up both, with the number of labelled tokens behind them.
"""

from __future__ import annotations

import math
import multiprocessing
import os
import statistics
import tempfile
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from peers.arena import Entry, contest, spread
from peers.cases import PAD, SHAPES, Case, write_models

LONGEST = timedelta(seconds=120)  # that a rank waits for the other


@dataclass(frozen=True)
class Sweep:
    """One quantity is varied, and the rest is held."""

    quantity: str
    function: str
    unit: str
    """What the seconds are for: an update, or the answers to all prompts."""
    points: tuple[tuple[int, Case], ...]
    """(the quantity's value, the work)"""


def sweeps(folder: str = "") -> dict[str, Sweep]:
    """All that `growth` measures. Rows are of equal lengths, half prompt and half answer. Quick
    work is done several times a turn: the seconds are those of one update all the same."""
    sizes = [name for name in SHAPES if name.endswith(" long")]
    small = "0.8M long"

    def train(size: str, rows: int, tokens: int, updates: int) -> Case:
        half = tokens // 2
        return Case(size, rows, half, half, updates=updates, even=True, folder=folder)

    def write(rows: int, answer: int) -> Case:
        return Case(small, rows, 32, answer, even=True, folder=folder)

    by_size = zip(sizes, (16, 8, 4, 2, 1), strict=True)
    sft, rollout = "peers.ours:sft", "peers.ours:rollout"
    return {
        "sft, model": Sweep("parameters", sft, "update", tuple(
            (SHAPES[size].numbers, train(size, 16, 32, updates)) for size, updates in by_size)),
        "sft, context": Sweep("tokens a row", sft, "update", tuple(
            (n, train(small, 4096 // n, n, 2)) for n in (64, 128, 256, 512, 1024))),
        "sft, batch": Sweep("rows", sft, "update", tuple(
            (n, train(small, n, 64, 128 // n)) for n in (4, 8, 16, 32, 64))),
        "rollout, answers": Sweep("tokens an answer", rollout, "rollout", tuple(
            (n, write(16, n)) for n in (16, 32, 64, 128, 256))),
        "rollout, batch": Sweep("prompts", rollout, "rollout", tuple(
            (n, write(n, 64)) for n in (4, 8, 16, 32, 64))),
    }  # fmt: skip


def slope(xs: Sequence[float], ys: Sequence[float]) -> float:
    """b of y = a xᵇ, by least squares on the logarithms. Raises ValueError for an x or y that is
    not positive, and (as StatisticsError) for fewer than two different xs."""
    return statistics.linear_regression([*map(math.log, xs)], [*map(math.log, ys)]).slope


def curve(xs: Sequence[float], seconds: Sequence[Sequence[float]]) -> dict:
    """The points of a curve, its slope and those of its pieces.

    seconds: for each x those of every repeat, as many for all. "slope" is that of the medians;
    "slopes" the spread over repeats, each of which is a curve of its own.
    """
    medians = [statistics.median(repeats) for repeats in seconds]
    return {
        "points": [{"x": x, "seconds": spread(r)} for x, r in zip(xs, seconds, strict=True)],
        "slope": slope(xs, medians),
        "slopes": spread([slope(xs, repeat) for repeat in zip(*seconds, strict=True)]),
        "pieces": [slope(xs[i : i + 2], medians[i : i + 2]) for i in range(len(xs) - 1)],
    }


def growth(folder: Path, repeats: int, say: Callable[[str], None] = print) -> dict:
    """For each sweep its quantity, unit and `curve`, and the work at the smallest value. The
    models are written into `folder`. Raises RuntimeError where a contestant ends early."""
    everything = sweeps(str(folder))
    _write(folder, {case.size for sweep in everything.values() for _, case in sweep.points})
    out = {}
    for name, sweep in everything.items():
        entries = {x: Entry(f"{name} {x}", sweep.function, case, threads=(1,))
                   for x, case in sweep.points}  # fmt: skip
        turns = contest(list(entries.values()), repeats, "tokens", lambda _: None)
        parts = [case.updates if sweep.unit == "update" else 1 for _, case in sweep.points]
        seconds = [[s / n for s in turns[entry.name].seconds]
                   for entry, n in zip(entries.values(), parts, strict=True)]  # fmt: skip
        said = curve(list(entries), seconds)
        out[name] = {"quantity": sweep.quantity, "unit": sweep.unit, "threads": 1,
                     "case": sweep.points[0][1].told(), **said}  # fmt: skip
        medians = ", ".join(f"{p['x']:,}: {p['seconds']['median']:.4f}" for p in said["points"])
        say(f"    {name}: seconds by {sweep.quantity} {medians}; slope {said['slope']:.2f}")
    return out


def _write(folder: Path, sizes: set[str]) -> None:
    """The models that are not there yet."""
    missing = [size for size in sorted(sizes) if not (folder / size / "reward").exists()]
    write_models(folder, missing)


ALONE = "1 process x 1 thread"
WAYS = {
    ALONE: ("peers.ours:sft", 1),
    "1 process x 2 threads": ("peers.ours:sft", 2),
    "2 processes x 1 thread": ("peers.scaling:sft_on_two", 1),
}


def processes(folder: Path, repeats: int, say: Callable[[str], None] = print) -> dict:
    """SFT's tokens a second with two cores' worth of threads or of processes, at the same batch.

    For each size the work, and for each of `WAYS` the spread of tokens a second and of how many
    times as fast it is as `ALONE` in the same repeat. "cores": how many this process may use.
    Raises RuntimeError where a contestant ends early.
    """
    _write(folder, {"0.8M", "10M"})
    out: dict = {"cores": len(os.sched_getaffinity(0)), "sizes": {}}
    for size, updates in (("0.8M", 8), ("10M", 1)):
        case = Case(size, 32, 32, 32, updates=updates, folder=str(folder))
        entries = [Entry(name, function, case, threads=(threads,))
                   for name, (function, threads) in WAYS.items()]  # fmt: skip
        turns = contest(entries, repeats, "tokens", say)
        rates = {name: turn.rates("tokens") for name, turn in turns.items()}
        out["sizes"][size] = {"case": case.told(), "ways": {
            name: {"tokens_per_second": spread(rate), "times_alone": spread(times(rate, rates))}
            for name, rate in rates.items()}}  # fmt: skip
    return out


def times(rate: Sequence[float], rates: dict[str, list[float]]) -> list[float]:
    """How many times as fast as `ALONE`, repeat for repeat."""
    return [mine / alone for mine, alone in zip(rate, rates[ALONE], strict=True)]


def dealt(rows: Sequence, rank: int, ranks: int) -> list:
    """A rank's rows (tokens, labels): dealt out by length, so that all have about as much to do."""
    return sorted(rows, key=lambda row: len(row[0]), reverse=True)[rank::ranks]


def gradient(model: nn.Module, rows: Sequence, rank: int = 0, ranks: int = 1) -> Tensor:
    """Set the gradient of the mean loss over ALL rows' answers; returns that mean, 0-dim.

    rows: (tokens, labels) of the whole batch, of which this rank reads its own; all ranks of the
    default group call together. Gradients become views of one flat tensor.
    """
    from rlhf_course.sft import IGNORE, answer_loss
    from rlhf_course.stages import sft as stage

    batch = stage.as_batch(dealt(rows, rank, ranks), model.context, PAD, packing=False)
    losses = []
    for part in stage.micro_batches(batch, None, torch.device("cpu")):
        loss = answer_loss(model, *part, denominator=1)  # a sum: others' tokens count as well
        loss.backward()
        losses.append(loss.detach())
    told = torch.stack([torch.stack(losses).sum(), (batch[1][:, 1:] != IGNORE).sum()])  # (2,)
    parameters = list(model.parameters())
    # (parameters' numbers + 2,): all gradients, the losses' sum and the number of its terms
    flat = torch.cat([*(p.grad.flatten() for p in parameters), told])
    if ranks > 1:
        dist.all_reduce(flat)
    flat[:-1] /= flat[-1].clone()
    views = flat[:-2].split([p.numel() for p in parameters])
    for parameter, view in zip(parameters, views, strict=True):
        parameter.grad = view.view_as(parameter)  # (n,) -> the parameter's shape
    return flat[-2]


def update(model: nn.Module, optimizer, rows: Sequence, rank: int, ranks: int) -> float:
    """One step with the `gradient` of all ranks, clipped at norm 1; returns the mean loss."""
    optimizer.zero_grad(set_to_none=True)
    loss = gradient(model, rows, rank, ranks)
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.item()


def _ready(case: Case, rank: int, store: str) -> Callable[[], int]:
    """Join the other rank; returns a function that makes a turn's updates and counts tokens."""
    from rlhf_course.gpt import GPT
    from rlhf_course.stages import sft as stage
    from rlhf_course.training import make_optimizer

    config = stage.SFTConfig(device="cpu", dtype=case.dtype, threads=1)
    model = stage.device_of(config).place(GPT.from_pretrained(case.model())).train()
    optimizer = make_optimizer(model, 1e-5)
    rows = [stage.as_example(p, a) for p, a in case.dialogues(case.rows * case.updates)]
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=LONGEST)

    def work() -> int:
        for start in range(0, len(rows), case.rows):
            update(model, optimizer, rows[start : start + case.rows], rank, 2)
        return sum(len(ids) for ids, _ in rows)

    return work


def _second(pipe, case: Case, store: str) -> None:
    """Rank 1: works when it is told to, sleeps until then, and ends with rank 0."""
    work = _ready(case, 1, store)
    with suppress(EOFError):
        while pipe.recv():
            work()
    dist.destroy_process_group()


def sft_on_two(case: Case, turn: Callable[..., None]) -> None:
    """A contestant: `ours.sft` with each batch shared with a second process, which it starts."""
    context = multiprocessing.get_context("spawn")
    mine, theirs = context.Pipe()
    with tempfile.TemporaryDirectory() as folder:
        store = (Path(folder) / "store").as_uri()
        second = context.Process(target=_second, args=(theirs, case, store), daemon=True)
        second.start()
        theirs.close()
        try:
            work = _ready(case, 0, store)
            turn()
            while True:
                mine.send(True)
                turn(tokens=work())
        finally:
            mine.close()
            second.join(10)
            second.kill()
            if dist.is_initialized():
                dist.destroy_process_group()
