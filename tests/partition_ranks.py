"""Real ranks that say how many bytes DeepSpeed's partitions take, for test_planning.py.

    python -m tests.partition_ranks FOLDER WORLD...

The heavy imports are made once; the ranks are forks of that process. Rank r of WORLD writes
FOLDER/WORLD-r.json: the parameters, and what `ZeroModel.partition_bytes` says by stage and dtype.
"""

import json
import socket
import sys
from pathlib import Path

import torch
from torch.multiprocessing import start_processes

from rlhf_course.distributed.zero import ZeroModel, ZeroSettings, join
from rlhf_course.gpt import GPT, GPTConfig
from rlhf_course.rollout import action_logprobs

SHAPE = GPTConfig(vocab_size=64, context=32, layers=6, heads=2, width=64)
KINDS = [(stage, low) for stage in (1, 2, 3) for low in (False, True)]


def loss_of(model: torch.nn.Module) -> torch.Tensor:
    """Anything with a gradient for every parameter."""
    tokens = torch.arange(32)[None]
    return -action_logprobs(model, tokens, torch.ones(1, 31).bool())[0].mean()


def measured(stage: int, low: bool) -> dict[str, int]:
    """Bytes behind an update of two passes."""
    model = ZeroModel(GPT(SHAPE), ZeroSettings(stage, bf16=low), betas=(0.9, 0.95))
    for last in (False, True):
        model.backward(model(loss_of), last)
    model.step(1e-3)
    return model.partition_bytes()


def run_rank(rank: int, world: int, port: int, folder: Path) -> None:
    """Every stage in fp32 and bf16, and a model that only scores."""
    join(rank, world, "127.0.0.1", port, timeout_s=60)
    seen = {f"{stage}-{'bf16' if low else 'fp32'}": measured(stage, low) for stage, low in KINDS}
    seen["scoring-fp32"] = ZeroModel(GPT(SHAPE), ZeroSettings(3)).partition_bytes()
    (folder / f"{world}-{rank}.json").write_text(json.dumps(seen))


def main(folder: Path, worlds: list[int]) -> None:
    """The ranks of each world, one world after the other; raises where one of them failed."""
    import deepspeed  # noqa: F401  before the ranks are forked

    for world in worlds:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        start_processes(run_rank, (world, port, folder), world, start_method="fork")


if __name__ == "__main__":
    main(Path(sys.argv[1]), [int(world) for world in sys.argv[2:]])
