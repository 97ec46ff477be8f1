"""Two real processes that talk through gloo, for what is computed over data-parallel ranks."""

from pathlib import Path

import torch
import torch.distributed as dist
from torch import multiprocessing


def on_two_ranks(worker, folder: Path, *args) -> list:
    """Run worker(rank, group, *args) on ranks 0 and 1 and return what each gave back.

    `worker` is a function at the top level of a module, since the processes start from nothing;
    what it returns are tensors, numbers and dictionaries of them.
    """
    multiprocessing.spawn(_rank, args=(worker, folder, args), nprocs=2)
    return [torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2)]


def _rank(rank: int, worker, folder: Path, args: tuple) -> None:
    torch.set_num_threads(1)
    store = (folder / "store").as_uri()
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2)
    try:
        torch.save(worker(rank, dist.group.WORLD, *args), folder / f"rank{rank}.pt")
        dist.barrier()
    finally:
        dist.destroy_process_group()
