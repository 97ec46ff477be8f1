"""How weights travel from the trainer to the rollout engines (`weight_sync.Channel`).

Tensors go in buckets: the engines are told what comes (`receive`), the tensors follow, and every
engine has loaded them before the next bucket begins.

    gloo   broadcast between processes on CPUs, on one machine or several
    nccl   broadcast between GPUs; trainer and engines have GPUs of their own
    ipc    the engines share the trainers' GPUs, where NCCL refuses to work: only the address of the
           trainer's memory is sent, and the engine copies from there

gloo runs in the tests. nccl is the same code with another process group; it and ipc were written
from the sources of torch 2.13 and vLLM 0.32 and HAVE NOT BEEN RUN ON GPUS. vLLM's own backends know
no CPU, and broadcast without a time limit, so that one dead process would hang all others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf_course.errors import ConfigError, TrainingError

BUCKET = 1 << 26
"""Bytes that are held before they are sent; a tensor larger than this goes alone."""

Call = Callable[..., Callable[[], Any]]
"""An engine from afar: call(method, *args) starts it there and returns wait(), which gives what it
returned, raises what it raised, and gives up by itself after a time limit."""

Meta = tuple[str, str, tuple[int, ...], Any]
"""A tensor to come: Hugging Face's name, dtype ("float32"), shape, IPC handles by GPU or None."""


class StaleWeights(TrainingError):
    """An engine does not hold the weights that its answers are wanted of."""


class SyncError(TrainingError):
    """New weights did not reach every engine. None of them answers until a sync succeeds."""


class Group:
    """Trainer and workers, beside the global process groups that both need for themselves.

    Waits until all `world` processes have come; raises RuntimeError after timeout_s.
    """

    def __init__(self, kind: str, store: dist.Store, rank: int, world: int, timeout_s: float):
        self.limit = timedelta(seconds=timeout_s)
        if kind == "gloo":
            self.group = dist.ProcessGroupGloo(store, rank, world, self.limit)
        else:
            options = dist.ProcessGroupNCCL.Options()
            options._timeout = self.limit
            self.group = dist.ProcessGroupNCCL(store, rank, world, options)

    def broadcast(self, tensor: Tensor) -> None:
        """Rank 0's tensor to all others. RuntimeError when one of them dies or the time is up."""
        failure = "the group broke in an earlier broadcast"
        if self.group is not None:
            options = dist.BroadcastOptions()
            options.rootRank = options.rootTensor = 0
            try:  # with a limit `wait` waits for NCCL too, which else goes on in the background
                self.group.broadcast([tensor], options).wait(self.limit)
                return
            except RuntimeError as error:
                failure = str(error)
        self.group = None  # closes my connections, so that nobody waits for me until his limit
        raise RuntimeError(failure)  # a new one: the first would hold the group, and keep it open


def _meta(name: str, tensor: Tensor, handles: dict[str, tuple] | None = None) -> Meta:
    return name, str(tensor.dtype).removeprefix("torch."), tuple(tensor.shape), handles


@contextmanager
def _together(waits: list[Callable[[], Any]]) -> Iterator[None]:
    """The body is the trainer's part; then wait for all engines, and tell of all that failed."""
    failed: list[tuple[str, BaseException]] = []
    try:
        yield
    except RuntimeError as error:
        failed.append(("trainer", error))
    for number, wait in enumerate(waits):
        try:
            wait()
        except Exception as error:  # noqa: BLE001  it is told below, whatever it is
            failed.append((f"engine {number}", getattr(error, "cause", None) or error))
    if failed:
        said = "; ".join(f"{who}: {type(e).__name__}: {e}".split("\n")[0] for who, e in failed)
        raise SyncError(
            f"new weights did not reach every rollout engine ({said}). No engine answers until a "
            "sync succeeds: start dead engines again, connect, and sync."
        ) from failed[0][1]


class BroadcastChannel:
    """gloo and nccl: the trainer is rank 0, the engines' workers are ranks 1, 2, …"""

    def __init__(
        self, kind: str, engines: list[Call], tensor_parallel: int, host: str, timeout_s: float
    ):
        self.engines, self.bucket = engines, []
        world, limit = 1 + len(engines) * tensor_parallel, timedelta(seconds=timeout_s)
        # Port 0: any free one, which the store then holds; nobody can take it in between.
        self.store = dist.TCPStore(host, 0, world, True, limit, wait_for_workers=False)
        waits = [
            call("connect", kind, host, self.store.port, 1 + i * tensor_parallel, world, timeout_s)
            for i, call in enumerate(engines)
        ]
        with _together(waits):
            self.group = Group(kind, self.store, 0, world, timeout_s)

    def begin(self, version: int) -> None:
        """Void the engines' weights. What a failed sync has left in the bucket is dropped."""
        self.bucket = []
        self._all("begin", version)

    def send(self, name: str, tensor: Tensor) -> None:
        """Put a copy into the bucket; send the bucket first where that makes it too large."""
        if self.bucket and sum(t.nbytes for _, t in self.bucket) + tensor.nbytes > BUCKET:
            self._flush()
        copy = tensor.detach().clone(memory_format=torch.contiguous_format)
        self.bucket.append((name, copy))

    def finish(self, version: int) -> None:
        """Send what is left. The engines check that nothing is missing, and take the version."""
        if self.bucket:
            self._flush()
        self._all("finish", version)

    def _flush(self) -> None:
        metas = [_meta(name, tensor) for name, tensor in self.bucket]
        with _together([call("receive", metas) for call in self.engines]):
            for _, tensor in self.bucket:
                self.group.broadcast(tensor)
        self.bucket = []

    def _all(self, method: str, *args) -> None:
        with _together([call(method, *args) for call in self.engines]):
            pass


class IpcChannel(BroadcastChannel):
    """ipc, on EVERY trainer rank: a worker opens memory of its own GPU alone, so each rank offers
    its copy, by the GPU's UUID; rank 0 of `group` calls the engines. NOT RUN ON A GPU."""

    def __init__(self, engines: list[Call], group: dist.ProcessGroup | None):
        self.engines = engines if dist.get_rank(group) == 0 else []
        self.bucket, self.ranks = [], group

    def _flush(self) -> None:
        from torch.multiprocessing.reductions import reduce_tensor

        gpu = str(torch.cuda.get_device_properties(self.bucket[0][1].device).uuid)
        mine = (gpu, [reduce_tensor(tensor)[1] for _, tensor in self.bucket])
        torch.cuda.synchronize()  # the copies have been made before anyone reads them
        offered: list[Any] = [None] * dist.get_world_size(self.ranks)
        dist.all_gather_object(offered, mine, group=self.ranks)
        metas = [
            _meta(name, tensor, {gpu: handles[i] for gpu, handles in offered})
            for i, (name, tensor) in enumerate(self.bucket)
        ]
        self._all("receive", metas)
        dist.barrier(self.ranks)  # no rank frees its copies before every worker has read
        self.bucket = []


def make_channel(
    kind: str, engines: list[Call], *, tensor_parallel: int = 1, host: str = "127.0.0.1",
    timeout_s: float = 60.0, group: dist.ProcessGroup | None = None,
) -> BroadcastChannel:  # fmt: skip
    """Connect this process, the leading trainer rank, with every worker of every engine.

    host: this machine as the engines reach it. timeout_s: for connecting and for each broadcast.
    group: the trainer's ranks (None: the default group), for "ipc" alone, which each of them makes.
    Raises SyncError where an engine does not come, ConfigError for an unknown kind.
    """
    if kind in ("gloo", "nccl"):
        return BroadcastChannel(kind, engines, tensor_parallel, host, timeout_s)
    if kind == "ipc":
        return IpcChannel(engines, group)
    raise ConfigError(f"weight channel {kind!r} is unknown. Choose gloo, nccl or ipc.")
