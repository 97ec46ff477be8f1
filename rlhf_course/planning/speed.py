"""Estimated seconds of one PPO-ptx step: arithmetic on named assumptions, no measurement.

A matrix product of N parameters with D tokens is 2 N D operations forward, and twice that backward.
A decoding engine reads all its weights and the KV cache for every token that it adds to each of its
sequences: not arithmetic bounds it, but the memory's bandwidth.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import ceil

from rlhf_course.planning.budget import SCORERS, TRAINERS, Budget
from rlhf_course.planning.memory import kv_cache_bytes
from rlhf_course.planning.settings import PlanConfig
from rlhf_course.planning.shapes import ModelShape


@dataclass(frozen=True)
class GPU:
    """What its data sheet says."""

    flops: float
    """bf16 operations a second of dense matrix products."""
    bandwidth: float
    """Bytes a second of its memory."""
    link: float
    """Bytes a second to the GPUs of its node, one way."""


GPUS = {
    "a100": GPU(312e12, 2.04e12, 300e9),
    "h100": GPU(989e12, 3.35e12, 450e9),
    "h200": GPU(989e12, 4.8e12, 450e9),
}
COMPUTE = 0.4
"""Share of the peak operations that training and scoring reach."""
BANDWIDTH = 0.6
"""Share of the memory's bandwidth that decoding reaches."""
NETWORK = 50e9
"""Bytes a second of each GPU to other nodes: 400 Gbit/s."""
HOST = 25e9
"""Bytes a second between a GPU and its host, and of the host's own update."""
ALL_REDUCE = 15e-6
"""Seconds of one of the two all-reduces in each layer of a tensor-parallel engine."""
UPDATE = 30
"""Bytes that AdamW reads and writes for each number."""


@dataclass(frozen=True)
class Speed:
    """Seconds of a step, by phase."""

    phases: dict[str, float]
    total: float
    """One phase after the other."""
    overlapped: float | None
    """With rollouts one step off beside the training; None where they share GPUs."""


def speed(config: PlanConfig, shape: ModelShape, memory: Budget) -> Speed:
    """Seconds of a step of a plan whose ranks and engines are all given."""
    gpu = GPUS[config.gpu]
    link = gpu.link if config.gpus <= config.gpus_per_node else NETWORK
    sizes = dict.fromkeys(("actor", "reference"), shape.parameters)
    sizes |= dict.fromkeys(("critic", "reward"), shape.scalar_parameters)
    scoring = {
        role: scoring_seconds(role, count, config, gpu, link) for role, count in sizes.items()
    }
    training = {role: training_seconds(role, sizes[role], config, gpu, link) for role in TRAINERS}
    both = sum if config.colocate else max  # in turns, or side by side
    phases = {
        "rollout": rollout_seconds(config, shape, gpu, memory.concurrent),
        "scoring": both(scoring.values()),
        "training": both(training.values()),
        "weight sync": 2 * shape.parameters / link,
    }
    if config.colocate:  # what the engine and the trainer make room for each other with
        moved = sum(m.weights + m.optimizer for m in memory.roles)
        phases["to the host and back"] = 2 * moved / HOST
    total = sum(phases.values())
    overlapped = None
    if not config.colocate:
        rest = phases["scoring"] + phases["training"]
        overlapped = max(phases["rollout"], rest) + phases["weight sync"]
    return Speed(phases, total, overlapped)


def rollout_seconds(config: PlanConfig, shape: ModelShape, gpu: GPU, concurrent: int) -> float:
    """All answers, each of full length; as many of them at a time as the KV cache holds."""
    sequences = ceil(config.batch / config.engines)
    waves = ceil(sequences / concurrent)
    together = ceil(sequences / waves)
    T, operations = config.tensor_parallel, 2 * shape.parameters * together
    compute, read = T * gpu.flops * COMPUTE, T * gpu.bandwidth * BANDWIDTH
    middle = config.prompt_length + config.max_new_tokens // 2  # of the answer, on average
    moved = 2 * shape.parameters + together * kv_cache_bytes(shape, middle)
    token = max(moved / read, operations / compute)
    if T > 1:
        token += 2 * shape.layers * ALL_REDUCE
    prefill = operations * config.prompt_length / compute
    return waves * (prefill + config.max_new_tokens * token)


def scoring_seconds(role: str, count: int, config: PlanConfig, gpu: GPU, link: float) -> float:
    """One forward pass over all answers; at stage 3 every micro-batch gathers the parameters."""
    ranks = getattr(config, f"{role}_ranks")
    tokens = config.batch * (config.prompt_length + config.max_new_tokens)
    compute = 2 * count * tokens / (ranks * gpu.flops * COMPUTE)
    passes = ceil(ceil(config.batch / ranks) / config.micro_batch)
    gathers = config.zero_stage == 3 or role in SCORERS
    return max(compute, gathers * passes * gathering(count, config, ranks, link))


def training_seconds(role: str, count: int, config: PlanConfig, gpu: GPU, link: float) -> float:
    """All updates of a step, forward and backward; the actor's have rows of text besides."""
    ranks = getattr(config, f"{role}_ranks")
    updates = config.epochs * ceil(config.batch / config.minibatch)
    rows = config.minibatch + (config.ptx_rows if role == "actor" else 0)
    tokens = rows * (config.prompt_length + config.max_new_tokens)
    operations = 8 if config.gradient_checkpointing else 6
    compute = operations * count * tokens / (ranks * gpu.flops * COMPUTE)
    passes = ceil(ceil(rows / ranks) / config.micro_batch)
    moved, gather = (ranks > 1) * 2 * count / link, gathering(count, config, ranks, link)
    if config.zero_stage == 3:  # gathered forward and backward, and the gradients reduced
        traffic = passes * (2 * gather + moved)
    elif config.zero_stage == 2:  # the gradients of every pass; afterwards the new weights
        traffic = (passes + 1) * moved
    else:
        traffic = 2 * moved
    place = gpu.bandwidth * BANDWIDTH if config.offload == "none" else HOST
    return updates * (max(compute, traffic) + UPDATE * count / ranks / place)


def gathering(count: int, config: PlanConfig, ranks: int, link: float) -> float:
    """Seconds until every rank has read all parameters once; offloaded, each brings its share."""
    seconds = 2 * count / link if ranks > 1 else 0.0
    return seconds + (2 * count / ranks / HOST if config.offload == "parameters" else 0.0)
