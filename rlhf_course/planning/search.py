"""Which of the possible layouts of a cluster fits and is fastest, and what would make one fit."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import product

from rlhf_course.errors import ConfigError
from rlhf_course.planning.budget import Budget, budget
from rlhf_course.planning.settings import PlanConfig
from rlhf_course.planning.shapes import ModelShape
from rlhf_course.planning.speed import Speed, speed

POWERS = tuple(1 << i for i in range(13))
MOST_GPUS = 4096
"""No larger cluster is looked at for a model that does not fit."""
PROPOSALS = 3
"""Combinations of changes that are proposed, beside a larger cluster."""


@dataclass(frozen=True)
class Plan:
    """A layout with all its numbers."""

    config: PlanConfig
    """Every rank and engine given."""
    memory: Budget
    speed: Speed

    @property
    def seconds(self) -> float:
        """Of a step, as fast as the layout allows."""
        return min(self.speed.total, self.speed.overlapped or self.speed.total)


def best_plan(config: PlanConfig, shape: ModelShape) -> Plan:
    """The fastest layout that fits; where none does, the one that exceeds the memory least.

    Raises ConfigError where the GPUs cannot be shared out at all.
    """
    plans = []
    for layout in layouts(config, shape):
        memory = budget(layout, shape)
        plans.append(Plan(layout, memory, speed(layout, shape, memory)))
    if not plans:
        raise ConfigError(
            f"--gpus {config.gpus} cannot be shared out as asked: separate roles need a GPU for "
            "each rank, an engine's GPUs lie on one node and divide the model's heads, and no rank "
            "may be without an episode. Change --gpus, the ranks, --engines or --tensor-parallel, "
            "or take a larger --batch and --minibatch."
        )
    return min(plans, key=lambda plan: (plan.memory.over, plan.seconds))


def layouts(config: PlanConfig, shape: ModelShape) -> Iterator[PlanConfig]:
    """Every way to share out the GPUs that the settings leave open."""
    for tensor_parallel in [config.tensor_parallel] if config.tensor_parallel else POWERS:
        if shape.heads % tensor_parallel or tensor_parallel > config.gpus_per_node:
            continue
        for actor, critic, reference, reward in ranks_of_roles(config):
            free = actor if config.colocate else config.gpus - actor - critic - reference - reward
            engines = config.engines or min(free // tensor_parallel, config.batch)
            fits = 0 < engines * tensor_parallel <= free and engines <= config.batch
            # Its GPUs are side by side, and no engine straddles two nodes.
            fits &= config.gpus <= config.gpus_per_node or not (
                config.gpus_per_node % tensor_parallel
            )
            fits &= max(actor, critic) <= config.minibatch
            if fits and max(reference, reward) <= config.batch:
                yield replace(
                    config, actor_ranks=actor, critic_ranks=critic, reference_ranks=reference,
                    reward_ranks=reward, engines=engines, tensor_parallel=tensor_parallel,
                )  # fmt: skip


def ranks_of_roles(config: PlanConfig) -> Iterator[tuple[int, int, int, int]]:
    """Ranks of actor, critic, reference and reward model; what is given stays."""
    given = (config.critic_ranks, config.reference_ranks, config.reward_ranks)
    if config.colocate:
        ranks = config.actor_ranks or config.gpus
        if any(other not in (None, ranks) for other in given) or ranks > config.gpus:
            raise ConfigError(
                f"--colocate holds one rank of every role on each GPU, so all have the {ranks} of "
                f"the actor, at most one on each of the {config.gpus} GPUs. Leave the other ranks "
                "out, or add --no-colocate."
            )
        yield (ranks,) * 4
        return
    for actor in [config.actor_ranks] if config.actor_ranks else POWERS:
        smaller = [n for n in POWERS if n <= actor]
        for critic in [given[0]] if given[0] else {actor, max(actor // 2, 1)}:
            for scorer in smaller:
                ranks = (actor, critic, given[1] or scorer, given[2] or scorer)
                if sum(ranks) < config.gpus:
                    yield ranks
                if given[1] and given[2]:
                    break


def changes_that_fit(config: PlanConfig, shape: ModelShape) -> list[tuple[dict, Plan]]:
    """(what to change, the plan then): combinations of what saves memory, the fewest changes and
    the fastest first, and one larger cluster; [] where nothing helps."""
    levels = ("none", "optimizer", "parameters")
    options = {
        "gradient_checkpointing": {config.gradient_checkpointing, True},
        "micro_batch": {config.micro_batch, 1},
        "zero_stage": {config.zero_stage, 3},
        "offload": levels[levels.index(config.offload) :],
        "colocate": {config.colocate, not config.colocate},
    }
    found: list[tuple[dict, Plan]] = []
    for values in product(*options.values()):
        chosen = dict(zip(options, values, strict=True))
        if (plan := attempt(config, chosen, shape)) is not None:
            found.append((difference(config, chosen), plan))
    found.sort(key=lambda pair: (len(pair[0]), pair[1].seconds))
    kept: list[tuple[dict, Plan]] = []
    for changed, plan in found:  # what asks for more and takes longer is no proposal
        if not any(p.seconds <= plan.seconds and c.items() <= changed.items() for c, p in kept):
            kept.append((changed, plan))
    return kept[:PROPOSALS] + larger_cluster(config, shape)


def larger_cluster(config: PlanConfig, shape: ModelShape) -> list[tuple[dict, Plan]]:
    """The fewest GPUs, doubled and doubled again, on which everything fits."""
    gpus = config.gpus * 2
    while gpus <= MOST_GPUS:
        chosen = {"gpus": gpus, "zero_stage": 3, "gradient_checkpointing": True}
        chosen |= {name: max(getattr(config, name), gpus) for name in ("batch", "minibatch")}
        if (plan := attempt(config, chosen, shape)) is not None:
            return [(difference(config, chosen), plan)]
        gpus *= 2
    return []


def difference(config: PlanConfig, chosen: dict) -> dict:
    """What of `chosen` is not as it was."""
    return {name: value for name, value in chosen.items() if value != getattr(config, name)}


def attempt(config: PlanConfig, chosen: dict, shape: ModelShape) -> Plan | None:
    """The best plan with these settings changed, if it fits."""
    try:
        plan = best_plan(replace(config, **chosen), shape)
    except ConfigError:
        return None
    return plan if not plan.memory.over else None
