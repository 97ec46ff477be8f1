"""Advantages normalised over all ranks and by each rank for itself, in two real processes.

    rollout, known, folder = raw_rollout(256)
    rows = measure(folder, rollout, known, inspect.getsource(masked_moments))

The two processes talk through gloo, as data-parallel ranks do. Each holds its half of a batch of
answers, whitens its advantages in both ways, and adds its part to the policy's gradient.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from itertools import product
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf_course import moments, ppo
from rlhf_course.coursework import jobs, lab
from rlhf_course.coursework.workers import one_thread
from rlhf_course.errors import TrainingError
from rlhf_course.huggingface import load_language_model
from rlhf_course.mdp import masked_sum
from rlhf_course.rollout import Rollout, action_logprobs

ORDERS = ("shuffled", "rank 0: known people, rank 1: strangers")
PARTS = ("tokens", "mask", "logprobs", "advantages")
LONGEST = 300  # seconds that the two processes may take


def raw_rollout(answers: int = 512, world: str = "town") -> tuple[Rollout, list[bool], Path]:
    """The SFT policy's answers with advantages as GAE gives them, from a critic that is warm.

    Returns (rollout, whether each question is about a known person, the policy's folder).
    """
    from rlhf_course.device import choose_device
    from rlhf_course.stages.ppo import PPOTrainer
    from rlhf_course.stages.rollouts import assemble, collect, score_actions, shape_scores
    from rlhf_course.training import torch_generator

    lab.ensure("reward_model", world)
    policy = lab.folder("sft", world) / "model"
    settings = {"batch": 16 if lab.quick else answers, "whiten": False, "known_share": 0.5,
                "ptx_coef": 0.0, "critic_warmup": 4}  # fmt: skip
    config = jobs.configuration("ppo", lab.workspace(world) / "two-ranks", world, settings)
    trainer = PPOTrainer(config, choose_device("cpu"))
    for step in range(config.critic_warmup):
        trainer.iterate(step)
    tasks = trainer.prompts(config.critic_warmup)
    generator = torch_generator(config.seed, "two ranks")
    said = collect(trainer.policy, tasks, trainer.tokenizer, config, generator, trainer.context)
    scores = shape_scores(trainer.score(said), said.finished, config, None)
    actions = score_actions(trainer.policy, trainer.reference, trainer.critic, said, config, None)
    rollout, _ = assemble(said, scores, *actions, trainer.controller.value, config)
    return rollout, [task.source.group == "known" for task in tasks], policy


def measure(
    policy: Path,
    rollout: Rollout,
    known: Sequence[bool],
    source: str | None = None,
    sizes: Sequence[int] = (2, 4, 8, 16, 32, 64),
    repeats: int = 4,
) -> list[dict]:
    """Compare both normalisations for several numbers of answers a rank.

    source: a student's `masked_moments` as text; both processes use it. Returns rows of "order",
    "answers", "flipped" (share of tokens whose advantage has another sign than under global
    moments) and "cosine" (of the two gradients). Raises TrainingError with a process's last words.
    """
    known = torch.tensor(known)
    sizes = [n for n in sizes if n <= min(int(known.sum()), int((~known).sum()))]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_file({**{p: getattr(rollout, p).contiguous() for p in PARTS}, "known": known},
                  folder / "rollout.safetensors")  # fmt: skip
        job = {"policy": str(policy), "source": source, "sizes": sizes, "repeats": repeats}
        (folder / "job.json").write_text(json.dumps(job), encoding="utf-8")
        _run_both(folder)
        return json.loads((folder / "rows.json").read_text(encoding="utf-8"))


def _run_both(folder: Path) -> None:
    """Start both ranks, wait, and end the other one where one fails."""
    ranks = [
        subprocess.Popen(
            [sys.executable, "-m", "rlhf_course.coursework.two_ranks", str(folder), str(rank)],
            env=one_thread(),
            stderr=subprocess.PIPE, text=True, encoding="utf-8",
        )
        for rank in (0, 1)
    ]  # fmt: skip
    try:
        for process in ranks:
            _, said = process.communicate(timeout=LONGEST)
            if process.returncode:
                words = " ".join(said.strip().splitlines()[-3:])
                raise TrainingError(f"one of the two ranks failed: {words}")
    finally:
        for process in ranks:
            process.kill()
            process.wait()


# ------------------------------------------------------------------------ what happens on a rank


def main() -> None:
    """One rank: `python -m rlhf_course.coursework.two_ranks FOLDER RANK`."""
    folder, rank = Path(sys.argv[1]), int(sys.argv[2])
    job = json.loads((folder / "job.json").read_text(encoding="utf-8"))
    if job["source"]:
        known = dict(vars(moments))
        exec(compile(job["source"], "your masked_moments", "exec"), known)
        ppo.masked_moments = known["masked_moments"]
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=(folder / "store").as_uri(), rank=rank, world_size=2
    )
    try:
        rows = _compare(folder, job, rank)
        if rank == 0:
            (folder / "rows.json").write_text(json.dumps(rows), encoding="utf-8")
        dist.barrier()
    finally:
        dist.destroy_process_group()


def _compare(folder: Path, job: dict, rank: int) -> list[dict]:
    held = load_file(folder / "rollout.safetensors")
    policy, _ = load_language_model(job["policy"])
    rows = []
    for order, size, repeat in product(ORDERS, job["sizes"], range(job["repeats"])):
        generator = torch.Generator().manual_seed(1000 * size + repeat)
        mine = _choose(held["known"], order, size, generator)[rank * size : (rank + 1) * size]
        flipped, cosine = _both_ways(policy, *(held[p][mine] for p in PARTS))
        rows.append({"order": order, "answers": size, "flipped": flipped, "cosine": cosine})
    return rows


def _choose(known: Tensor, order: str, size: int, generator: torch.Generator) -> Tensor:
    """Rows of a batch of 2 size answers, half about known people; the same on both ranks."""

    def some(which: Tensor) -> Tensor:
        rows = which.nonzero()[:, 0]
        return rows[torch.randperm(len(rows), generator=generator)[:size]]

    both = torch.cat([some(known), some(~known)])
    return both if order != ORDERS[0] else both[torch.randperm(2 * size, generator=generator)]


def _both_ways(
    policy: torch.nn.Module, tokens: Tensor, mask: Tensor, old: Tensor, raw: Tensor
) -> tuple[float, float]:
    """(share of signs that differ, cosine of the gradients), over both ranks."""
    world = dist.group.WORLD
    together, alone = ppo.whiten(raw, mask, group=world), ppo.whiten(raw, mask)
    differ = masked_sum((together.sign() != alone.sign()).double(), mask)
    counts = torch.stack([differ, mask.sum().double()])
    dist.all_reduce(counts)
    gradients = []
    for advantages in (together, alone):
        policy.zero_grad()
        logprobs, _ = action_logprobs(policy, tokens, mask)
        loss, _ = ppo.policy_loss(logprobs, old, advantages, mask, denominator=counts[1])
        loss.backward()
        flat = torch.cat([p.grad.flatten() for p in policy.parameters() if p.grad is not None])
        dist.all_reduce(flat)  # a sum: the denominator is that of both ranks
        gradients.append(flat)
    cosine = torch.nn.functional.cosine_similarity(*gradients, dim=0)
    return (counts[0] / counts[1]).item(), cosine.item()


if __name__ == "__main__":
    main()
