"""Which rank sits on which GPU, and which items each rank gets."""

import random
from collections import Counter
from itertools import pairwise

import pytest

from rlhf_course.distributed.placement import ROLES, balanced_chunks, place
from rlhf_course.errors import ConfigError

GPU, CPU = {"GPU": 1, "CPU": 1}, {"GPU": 0, "CPU": 1}
EIGHT = {"actor": 8, "critic": 8, "reference": 8, "reward": 8}


def seats(bundles: list[dict]) -> dict[tuple[str, int], int]:
    """(role, rank) -> number of its bundle."""
    pairs = [(seat, i) for i, bundle in enumerate(bundles) for seat in bundle["ranks"].items()]
    assert len(pairs) == len(dict(pairs)), "a rank has two seats"
    return dict(pairs)


# ------------------------------------------------------------------------------------------- place


def test_separate_by_hand():
    roles = {"actor": 2, "critic": 1, "rollout": 2}
    assert place(roles, 4, False) == [
        {"node": 0, "ranks": {"rollout": 0}, "resources": GPU, "share": 1.0},
        {"node": 0, "ranks": {"rollout": 1}, "resources": GPU, "share": 1.0},
        {"node": 0, "ranks": {"actor": 0}, "resources": GPU, "share": 1.0},
        {"node": 0, "ranks": {"actor": 1}, "resources": GPU, "share": 1.0},
        {"node": 1, "ranks": {"critic": 0}, "resources": GPU, "share": 1.0},
    ]


def test_colocated_by_hand():
    roles = {"actor": 4, "critic": 2, "reference": 4, "rollout": 1}
    found = place(roles, 2, True, tensor_parallel=2)
    assert [bundle["ranks"] for bundle in found] == [
        {"actor": 0, "critic": 0, "reference": 0, "rollout": 0},
        {"actor": 1, "critic": 1, "reference": 1, "rollout": 1},
        {"actor": 2, "reference": 2},
        {"actor": 3, "reference": 3},
    ]
    assert [bundle["node"] for bundle in found] == [0, 0, 1, 1]
    assert {bundle["share"] for bundle in found} == {0.25}
    assert all(bundle["resources"] == GPU for bundle in found)


@pytest.mark.parametrize("colocate", [False, True])
def test_a_machine_without_gpus_asks_for_none(colocate):
    found = place({"actor": 2, "reference": 2, "rollout": 1}, 0, colocate)
    assert len(found) == (2 if colocate else 5)
    assert all(bundle["resources"] == CPU and bundle["node"] == 0 for bundle in found)


def test_bundles_do_not_share_their_dictionaries():
    first, second = place({"actor": 2, "rollout": 1}, 8, True)
    first["resources"]["GPU"] = 7
    assert second["resources"] == GPU


def random_cluster(rng: random.Random) -> tuple[dict[str, int], int, bool, int]:
    colocate, T = rng.random() < 0.5, rng.choice([1, 2, 4])
    per_node = rng.choice([T, 2 * T, 8])
    chosen = rng.sample(ROLES[:4], rng.randint(1, 4))
    roles = {role: rng.randint(1, 9) for role in chosen}
    most = max(roles.values()) // T if colocate else 4
    if most:
        roles["rollout"] = rng.randint(1, most)
    return roles, per_node, colocate, T


@pytest.mark.parametrize("seed", range(60))
def test_everybody_sits_once_and_nothing_is_oversold(seed):
    roles, per_node, colocate, T = random_cluster(random.Random(seed))
    found = place(roles, per_node, colocate, T)
    wanted = {role: n * (T if role == "rollout" else 1) for role, n in roles.items()}
    assert set(seats(found)) == {(role, rank) for role, n in wanted.items() for rank in range(n)}
    for i, bundle in enumerate(found):
        assert bundle["node"] == i // per_node
        taken = bundle["share"] * len(bundle["ranks"])
        assert taken <= 1 + 1e-9
        if len(bundle["ranks"]) == len(roles) or not colocate:
            assert taken == pytest.approx(1)
    if colocate:
        assert len(found) == max(n for role, n in wanted.items() if role != "rollout")
        assert all(i == rank for (_, rank), i in seats(found).items())
    else:
        assert len(found) == sum(wanted.values())


@pytest.mark.parametrize("seed", range(60))
def test_no_engine_straddles_two_nodes(seed):
    roles, per_node, colocate, T = random_cluster(random.Random(1000 + seed))
    found, at = place(roles, per_node, colocate, T), None
    at = seats(found)
    for engine in range(roles.get("rollout", 0)):
        ranks = [at["rollout", engine * T + i] for i in range(T)]
        assert len({found[i]["node"] for i in ranks}) == 1
        assert all(b - a == 1 for a, b in pairwise(ranks))


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (({"actor": 1, "judge": 1}, 8, False), "role 'judge' is unknown: choose among actor"),
        (({"actor": 0}, 8, False), "actor has 0 ranks: give at least 1, or leave the role out"),
        (({"actor": 1}, 8, False, 0), "tensor_parallel has 0 ranks"),
        (({"actor": 1}, -1, False), "gpus_per_node is -1: give 0 for a machine without GPUs"),
        (({"actor": 4, "rollout": 3}, 8, True, 2), "3 colocated engines of 2 ranks do not fit the"),
        (({"rollout": 1}, 8, True), "do not fit the 0 bundles"),
        (({"rollout": 2}, 3, False, 2), "engine 1 of 2 tensor-parallel ranks would straddle nodes"),
        (({**EIGHT, "rollout": 2}, 6, True, 4), "straddle nodes 0 and 1 of 6 GPUs each. Choose a"),
        (({"rollout": 1}, 4, False, 8), "straddle nodes 0 and 1"),
    ],
)
def test_what_cannot_be_placed_is_refused(arguments, told):
    with pytest.raises(ConfigError, match=told):
        place(*arguments)


# --------------------------------------------------------------------------------- balanced_chunks


def test_chunks_by_hand():
    # 9 to the first, 7 to the second, 5 and 5 to the third and the second; the rest where room is
    assert balanced_chunks([9, 1, 1, 1, 5, 5, 7], 3) == [[0, 3], [1, 2, 6], [4, 5]]
    assert balanced_chunks([4, 4, 4, 4], 2) == [[0, 2], [1, 3]]
    assert balanced_chunks([3], 1) == [[0]]
    assert balanced_chunks((0, 0, 0), 3) == [[0], [1], [2]]


@pytest.mark.parametrize("seed", range(100))
def test_chunks_are_a_balanced_partition(seed):
    rng = random.Random(seed)
    lengths = [rng.randint(0, 40) for _ in range(rng.randint(1, 50))]
    parts = rng.randint(1, len(lengths))
    chunks = balanced_chunks(lengths, parts)
    assert Counter(i for chunk in chunks for i in chunk) == Counter(range(len(lengths)))
    counts = [len(chunk) for chunk in chunks]
    assert len(chunks) == parts and min(counts) >= 1 and max(counts) - min(counts) <= 1
    assert all(chunk == sorted(chunk) for chunk in chunks)
    tokens = [sum(lengths[i] for i in chunk) for chunk in chunks]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_chunks_are_better_than_slices():
    rng = random.Random(0)
    worst = Counter()
    for _ in range(50):
        lengths = sorted(rng.randint(1, 100) for _ in range(64))
        balanced = balanced_chunks(lengths, 4)
        slices = [range(i, i + 16) for i in range(0, 64, 16)]
        for name, chunks in (("balanced", balanced), ("slices", slices)):
            worst[name] += max(sum(lengths[i] for i in chunk) for chunk in chunks)
        worst["best possible"] += sum(lengths) / 4
    assert worst["balanced"] < 1.01 * worst["best possible"] < 0.7 * worst["slices"]


@pytest.mark.parametrize(("lengths", "parts"), [([1, 2], 3), ([], 1), ([1], 0)])
def test_fewer_items_than_ranks_are_refused(lengths, parts):
    told = f"{len(lengths)} items cannot be shared out among {parts} ranks.*--batch"
    with pytest.raises(ConfigError, match=told):
        balanced_chunks(lengths, parts)
