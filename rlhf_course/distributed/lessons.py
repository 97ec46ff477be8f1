"""What chapter 9 runs on real ranks, which are processes of their own: DeepSpeed is imported there.

on_ranks("partitions", policy)                       bytes and seconds by ZeRO stage
on_ranks("gather", policy, source=getsource(f))      a student's function on real shards
on_ranks("passes", trials=[[2, 2], [2, 1]])          ranks that make unequally many passes
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import distributed as dist
from torch import multiprocessing

from rlhf_course.distributed import weight_sync
from rlhf_course.distributed.cluster import PACKAGE
from rlhf_course.distributed.zero import ZeroModel, ZeroSettings, join
from rlhf_course.errors import TrainingError
from rlhf_course.huggingface import load_language_model
from rlhf_course.rollout import action_logprobs

LONGEST = 300.0  # seconds that a job may take
BETAS = (0.9, 0.95)


def on_ranks(job: str, policy: str | Path = "", ranks: int = 2, **settings) -> list:
    """Let real ranks do a job, on CPUs; what each of them says, in the order of the ranks.

    job: "partitions", "gather" or "passes", with the arguments of the functions below.
    Raises TrainingError with the last words of a rank that fails.
    """
    paths = [PACKAGE, *filter(None, [os.environ.get("PYTHONPATH")])]
    alone = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore",
             "PYTHONPATH": os.pathsep.join(paths)}  # fmt: skip
    if policy:
        settings["policy"] = str(policy)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        todo = {"job": job, "ranks": ranks, "settings": settings}
        (folder / "job.json").write_text(json.dumps(todo), encoding="utf-8")
        above = subprocess.Popen(
            [sys.executable, "-m", "rlhf_course.distributed.lessons", name], text=True,
            env=os.environ | alone, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE,
            start_new_session=True,
        )  # fmt: skip
        try:
            _, said = above.communicate(timeout=LONGEST)
        except subprocess.TimeoutExpired:
            raise TrainingError(f"{job}: the ranks gave no answer in {LONGEST:g} s.") from None
        finally:  # also where the notebook is interrupted
            with contextlib.suppress(ProcessLookupError):
                os.killpg(above.pid, signal.SIGKILL)
        if above.returncode:
            raise TrainingError("a rank failed: " + " ".join(said.strip().splitlines()[-3:]))
        files = [folder / f"{rank}.json" for rank in range(ranks)]
        return [json.loads(file.read_text(encoding="utf-8")) for file in files]


def partitions(policy: str, stages: Sequence[int] = (1, 2, 3)) -> dict:
    """For each stage "bytes" that this rank holds in mixed precision, and "seconds" of an update:
    two forward and backward passes and a step."""
    out = {}
    for stage in stages:
        model = ZeroModel(load_language_model(policy)[0], ZeroSettings(stage, bf16=True), BETAS)
        seconds = []
        for _ in range(2):
            began = time.perf_counter()
            for last in (False, True):
                model.backward(model(_loss), last)
            model.step(1e-5)
            seconds.append(time.perf_counter() - began)
        out[stage] = {"bytes": model.partition_bytes(), "seconds": min(seconds)}
    return out


def _loss(model: torch.nn.Module) -> torch.Tensor:
    tokens = torch.arange(48).repeat(16, 1) + torch.arange(16)[:, None]
    return -action_logprobs(model, tokens, torch.ones(16, 47).bool())[0].mean()


def gather(policy: str, source: str) -> list[dict]:
    """`gather_zero3_parameters`, given as its source, on every parameter of a policy under ZeRO-3:
    name, shape, numbers of this rank's shard, whether DeepSpeed gathers the same, and seconds."""
    import deepspeed

    known = {**vars(weight_sync), "math": math, "F": F, "dist": dist}
    exec(compile(source, "your gather_zero3_parameters", "exec"), known)
    model, rows = ZeroModel(load_language_model(policy)[0], ZeroSettings(3), BETAS), []
    for name, parameter in model.model.named_parameters():
        shard, shape = parameter.ds_tensor, tuple(parameter.ds_shape)
        began = time.perf_counter()
        mine = known["gather_zero3_parameters"](shard, shape, model.group)
        seconds = time.perf_counter() - began
        with deepspeed.zero.GatheredParameters([parameter]):
            equal = torch.equal(mine, parameter)
        rows.append({"name": name, "shape": shape, "shard": shard.numel(), "equal": equal,
                     "seconds": seconds})  # fmt: skip
    return rows


def passes(trials: Sequence[Sequence[int]], limit_s: float = 3.0) -> list[dict]:
    """For each trial as many forward passes as it says for this rank, of which all that counts is
    that every rank gathers a layer: "seconds", and "error" where it was left waiting."""
    out, rank = [], dist.get_rank()
    for counts in trials:
        group = dist.new_group(timeout=timedelta(seconds=limit_s))
        began, error = time.perf_counter(), ""
        try:
            for _ in range(counts[rank]):
                weight_sync.gather_zero3_parameters(torch.ones(4), (2, 4), group)
        except RuntimeError as failure:
            error = str(failure).splitlines()[0]
        out.append({"seconds": time.perf_counter() - began, "error": error})
    dist.barrier()  # one that has nothing to do waits like one that computes
    return out


JOBS = {"partitions": partitions, "gather": gather, "passes": passes}


def main() -> None:
    """All ranks: `python -m rlhf_course.distributed.lessons FOLDER`. They are forks of this one,
    so that the heavy imports are made once."""
    import deepspeed  # noqa: F401

    folder = Path(sys.argv[1])
    todo = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    if policy := todo["settings"].get("policy"):
        load_language_model(policy)
        torch.compile(_loss)  # DeepSpeed calls it on something else, and so imports the compiler
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    arguments = (port, folder, todo)
    multiprocessing.start_processes(_rank, arguments, todo["ranks"], start_method="fork")


def _rank(rank: int, port: int, folder: Path, todo: dict) -> None:
    join(rank, todo["ranks"], "127.0.0.1", port, timeout_s=60)
    said = JOBS[todo["job"]](**todo["settings"])
    (folder / f"{rank}.json").write_text(json.dumps(said), encoding="utf-8")


if __name__ == "__main__":
    main()
