"""The memory of each role on one GPU, and what all roles of a GPU need at their worst moment."""

from __future__ import annotations

from dataclasses import dataclass

from rlhf_course.planning.memory import kv_cache_bytes, working_bytes, zero_bytes
from rlhf_course.planning.settings import PlanConfig
from rlhf_course.planning.shapes import ModelShape

GIB = 1 << 30
USABLE = 0.95
"""Of a GPU's memory; the rest is lost between blocks of the allocator."""
CONTEXT = GIB
"""CUDA's and NCCL's own memory, for each process on a GPU."""
ENGINE_WORKING = 2 * GIB
"""An engine's activations and CUDA graphs."""
MOST_SEQUENCES = 256
"""That an engine answers at a time."""
TRAINERS = ("actor", "critic")
SCORERS = ("reference", "reward")


@dataclass(frozen=True)
class RoleMemory:
    """Bytes that one rank of a role needs on its GPU, and beside it on the host."""

    role: str
    ranks: int
    weights: int
    gradients: int = 0
    optimizer: int = 0
    working: int = 0
    """Activations, logits, gathered parameters: whatever is gone after the pass."""
    kv_cache: int = 0
    host: int = 0

    @property
    def on_gpu(self) -> int:
        """While the role works."""
        return self.weights + self.gradients + self.optimizer + self.working + self.kv_cache


def trained_or_scoring(role: str, config: PlanConfig, shape: ModelShape) -> RoleMemory:
    """Memory of the actor, the critic, the reference or the reward model.

    What only scores has its parameters shared out as by stage 3 whatever --zero-stage says. An
    optimizer that is offloaded takes its gradients along, and an fp32 copy of them.
    """
    scalar, training = role in ("critic", "reward"), role in TRAINERS
    ranks = getattr(config, f"{role}_ranks")
    stage = config.zero_stage if training else 3
    count = shape.scalar_parameters if scalar else shape.parameters
    held = zero_bytes(count, stage, ranks, training=training)
    weights, gradients, optimizer = held["parameters"], held["gradients"], held["optimizer"]
    working = working_bytes(
        shape, config.micro_batch, config.prompt_length, config.max_new_tokens, stage=stage,
        ranks=ranks, training=training, scalar=scalar, host_update=config.offload != "none",
        checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    host = weights + optimizer if config.colocate else 0  # while the engine answers
    if config.offload != "none" and training:
        host += gradients + 4 * -(-count // ranks) + (0 if config.colocate else optimizer)
        gradients = optimizer = 0
    if config.offload == "parameters":
        host, weights = host + (0 if config.colocate else weights), 0
    return RoleMemory(role, ranks, weights, gradients, optimizer, working, 0, host)


@dataclass(frozen=True)
class Budget:
    """What a plan needs on one GPU."""

    roles: tuple[RoleMemory, ...]
    moments: dict[str, int]
    """Bytes at the worst moment of each phase (colocated), or of each role's own GPU."""
    usable: int
    host: int
    """Bytes of one node's own memory, at most."""
    concurrent: int
    """Sequences that one engine's KV cache holds in full length."""

    @property
    def over(self) -> int:
        """Bytes by which all moments together exceed the GPU; 0 where everything fits."""
        return sum(max(0, need - self.usable) for need in self.moments.values())

    def of(self, role: str) -> RoleMemory:
        """The memory of one role."""
        return next(memory for memory in self.roles if memory.role == role)


def budget(config: PlanConfig, shape: ModelShape) -> Budget:
    """Memory of every role of a plan whose ranks and engines are all given.

    Colocated, engine and trainer take turns. While the engine answers, the trainer's weights and
    optimizers are on the host; while the roles train and score, one after the other beside each
    other's state, the engine's are; while new weights are sent, both have theirs on the GPU.
    """
    usable = int(config.gpu_memory * GIB * USABLE)
    trained = [trained_or_scoring(role, config, shape) for role in (*TRAINERS, *SCORERS)]
    contexts = CONTEXT * (2 if config.colocate else 1)
    state = sum(m.weights + m.gradients + m.optimizer for m in trained)
    stays = sum(m.gradients for m in trained) if config.colocate else 0
    weights = -(-2 * shape.parameters // config.tensor_parallel)
    room = usable - contexts - stays - weights - ENGINE_WORKING
    length = config.prompt_length + config.max_new_tokens
    each = kv_cache_bytes(shape, length) // min(config.tensor_parallel, shape.kv_heads)
    wanted = min(-(-config.batch // config.engines), MOST_SEQUENCES)
    concurrent = max(1, min(wanted, room // each))
    asleep = weights if config.colocate else 0
    engine = RoleMemory(
        "rollout", config.engines * config.tensor_parallel, weights, working=ENGINE_WORKING,
        kv_cache=concurrent * each, host=asleep,
    )  # fmt: skip
    everyone = (*trained, engine)
    if config.colocate:
        moments = {f"{m.role} works": contexts + state + m.working for m in trained}
        moments["weights are sent"] = contexts + state + weights
        moments["answers are generated"] = contexts + stays + engine.on_gpu
        host = sum(m.host for m in everyone)
    else:
        moments = {f"{m.role} works": contexts + m.on_gpu for m in everyone}
        host = max(m.host for m in everyone)
    host *= min(config.gpus, config.gpus_per_node)
    return Budget(everyone, moments, usable, host, concurrent)
