"""Who sits where: the bundles of a Ray placement group, and each rank's share of a batch.

A bundle is one GPU's worth of a node (on a machine without GPUs: one CPU's worth). Ray reserves all
bundles together or none of them, so no role waits for ever for what another one holds.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf_course.errors import ConfigError

ROLES = ("actor", "critic", "reference", "reward", "rollout")


def place(
    roles: dict[str, int], gpus_per_node: int, colocate: bool, tensor_parallel: int = 1
) -> list[dict]:
    """The bundles, in the order in which they fill node after node:

        {"node": 0, "ranks": {"actor": 3}, "resources": {"GPU": 1, "CPU": 1}, "share": 1.0}

    roles: ranks of each role that there is, a subset of ROLES; of "rollout" the number of engines,
    each of which has `tensor_parallel` ranks: engine e has the ranks e * tensor_parallel + 0, 1, …
    share: what each rank takes of its bundle's GPU and CPU.

    Separate: every rank has a bundle of its own and all of it; the engines come first, then the
    other roles in the order of `roles`. Colocated ("hybrid engine"): bundle i holds rank i of every
    role that has one, and there are as many bundles as the largest role but "rollout" has ranks.
    The roles take turns there, so each takes 1 / len(roles), in every bundle alike.
    Bundle i is on node i // gpus_per_node. gpus_per_node 0 is a machine without GPUs: nothing asks
    for one, "GPU" is 0 everywhere, and all bundles are on node 0.

    Raises ConfigError for an unknown role, a number below 1 (gpus_per_node: below 0), colocated
    engines with more ranks than there are bundles, and an engine that would straddle two nodes:
    its ranks exchange every layer's activations, for which a network between nodes is too slow.
    """
    if unknown := sorted(set(roles) - set(ROLES)):
        raise ConfigError(f"role {unknown[0]!r} is unknown: choose among {', '.join(ROLES)}.")
    for name, count in {**roles, "tensor_parallel": tensor_parallel}.items():
        if count < 1:
            raise ConfigError(f"{name} has {count} ranks: give at least 1, or leave the role out.")
    if gpus_per_node < 0:
        raise ConfigError(f"gpus_per_node is {gpus_per_node}: give 0 for a machine without GPUs.")
    # BEGIN SOLUTION
    engines = roles.get("rollout", 0)
    ranks = {"rollout": engines * tensor_parallel} if engines else {}
    ranks |= {role: count for role, count in roles.items() if role != "rollout"}
    if colocate:
        bundles = max((ranks[role] for role in ranks if role != "rollout"), default=0)
        if engines * tensor_parallel > bundles:
            raise ConfigError(
                f"{engines} colocated engines of {tensor_parallel} ranks do not fit the {bundles} "
                "bundles of the roles that train and score. Take fewer or smaller engines, more "
                "ranks for the actor, or separate placement."
            )
        held = [{role: i for role in roles if i < ranks[role]} for i in range(bundles)]
    else:
        held = [{role: rank} for role, count in ranks.items() for rank in range(count)]
    nodes = [i // gpus_per_node if gpus_per_node else 0 for i in range(len(held))]
    for engine in range(engines):  # its ranks are side by side, whether colocated or first of all
        first, last = engine * tensor_parallel, (engine + 1) * tensor_parallel - 1
        if nodes[first] != nodes[last]:
            raise ConfigError(
                f"engine {engine} of {tensor_parallel} tensor-parallel ranks would straddle nodes "
                f"{nodes[first]} and {nodes[last]} of {gpus_per_node} GPUs each. Choose a "
                "tensor-parallel size that divides the GPUs of a node."
            )
    resources = {"GPU": 1 if gpus_per_node else 0, "CPU": 1}
    share = 1 / len(roles) if colocate else 1.0
    return [
        {"node": node, "ranks": here, "resources": dict(resources), "share": share}
        for node, here in zip(nodes, held, strict=True)
    ]
    # END SOLUTION


def balanced_chunks(lengths: Sequence[int], parts: int) -> list[list[int]]:
    """Share out items among ranks: the indices of each part, ascending.

    lengths: tokens of each item, at least 0. No part is empty, their numbers of items differ by at
    most 1 (a rank that misses a forward pass leaves the others waiting in ZeRO-3's all-gathers),
    and their tokens are balanced greedily: the longest item first (of equal ones the earliest), to
    the part that has the fewest tokens so far among those with room (of equal ones the first).
    Room: len(lengths) = q * parts + r, and a part takes q items, r of the parts one more.

    Raises ConfigError where there are fewer items than parts, or no parts.
    """
    if not 1 <= parts <= len(lengths):
        raise ConfigError(
            f"{len(lengths)} items cannot be shared out among {parts} ranks, since each needs one. "
            "Take larger batches (--batch, --minibatch) or fewer ranks."
        )
    # BEGIN SOLUTION
    least, longer = divmod(len(lengths), parts)
    chunks: list[list[int]] = [[] for _ in range(parts)]
    tokens = [0] * parts
    for item in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = [p for p in range(parts) if len(chunks[p]) < least + (longer > 0)]
        part = min(room, key=lambda p: (tokens[p], p))
        longer -= len(chunks[part]) == least  # it becomes one of those with an item more
        chunks[part].append(item)
        tokens[part] += lengths[item]
    return [sorted(chunk) for chunk in chunks]
    # END SOLUTION
