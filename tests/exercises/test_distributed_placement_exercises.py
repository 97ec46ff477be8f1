"""Chapter 9's exercises: which rank sits where, and which items each rank gets."""

import torch

from rlhf_course.coursework.expect import call, equal, exercise, expect, raises, same
from rlhf_course.errors import ConfigError

ROLES = ("actor", "critic", "reference", "reward", "rollout")
PARTS = {"node", "ranks", "resources", "share"}

# ------------------------------------------------------------------------------------------- place


def words(bundles):
    """Bundles in words: "node 0 (actor 1, rollout 0), GPU 1, CPU 1, share 0.5"."""
    said = []
    for bundle in bundles:
        ranks = sorted(bundle["ranks"].items(), key=lambda pair: (*map(str, pair),))
        here = ", ".join(f"{role} {rank}" for role, rank in ranks) or "nobody"
        gpu, cpu = (bundle["resources"].get(name, "?") for name in ("GPU", "CPU"))
        share = f"{bundle['share']:.4g}"
        said.append(f"node {bundle['node']} ({here}), GPU {gpu}, CPU {cpu}, share {share}")
    return said


def bundle(node, share=1.0, gpu=1, **ranks):
    return {"node": node, "ranks": ranks, "resources": {"GPU": gpu, "CPU": 1}, "share": share}


def placed(subject, roles, gpus_per_node, colocate, expected, tensor_parallel=None):
    """The answer's bundles are those, in this order."""
    args = (roles, gpus_per_node, colocate) + (
        () if tensor_parallel is None else (tensor_parallel,)
    )
    got = call(subject.place, args)
    names = ("roles", "gpus_per_node", "colocate", "tensor_parallel")
    inputs = dict(zip(names, args, strict=False))
    shaped = isinstance(got, list) and all(
        isinstance(b, dict) and b.keys() >= PARTS and isinstance(b["ranks"], dict)
        and isinstance(b["resources"], dict) and isinstance(b["share"], (int, float))
        for b in got
    )  # fmt: skip
    wanted = "a list of dicts with node, ranks, resources and share"
    expect(shaped, "not a list of bundles", inputs, wanted, got)
    equal(words(got), words(expected), "other bundles", inputs)


def by_loops(roles, gpus_per_node, colocate, tensor_parallel):
    """The bundles, seat by seat."""
    engines = roles.get("rollout", 0) * tensor_parallel
    others = {role: count for role, count in roles.items() if role != "rollout"}
    seats = []
    if colocate:
        for i in range(max(others.values())):
            here = {role: i for role, count in others.items() if i < count}
            seats.append(here | ({"rollout": i} if i < engines else {}))
    else:
        seats += [{"rollout": i} for i in range(engines)]
        for role, count in others.items():
            seats += [{role: i} for i in range(count)]
    share, gpu = 1 / len(roles) if colocate else 1.0, int(gpus_per_node > 0)
    return [
        bundle(i // gpus_per_node if gpus_per_node else 0, share, gpu, **here)
        for i, here in enumerate(seats)
    ]


def drawn(rng, low, high):
    """A whole number from low to high, high excluded."""
    return torch.randint(low, high, (1,), generator=rng).item()


@exercise("distributed.placement.place", core=True)
def test_separate_roles(subject):
    """separate: every rank has a bundle of its own, the engines first"""
    expected = [bundle(0, rollout=0), bundle(0, actor=0), bundle(0, actor=1)]
    placed(subject, {"rollout": 1, "actor": 2}, 4, False, expected)


@exercise("distributed.placement.place", core=True)
def test_colocated_roles(subject):
    """colocated: bundle i holds rank i of every role, and each takes an equal share"""
    expected = [bundle(0, 0.5, actor=0, rollout=0), bundle(0, 0.5, actor=1, rollout=1)]
    placed(subject, {"actor": 2, "rollout": 2}, 2, True, expected)


@exercise("distributed.placement.place")
def test_engines_come_first(subject):
    """separate: the engines come first wherever they are named, the others in their order"""
    roles = {"critic": 1, "actor": 2, "rollout": 2, "reward": 1}
    expected = [
        bundle(0, rollout=0), bundle(0, rollout=1), bundle(0, critic=0), bundle(0, actor=0),
        bundle(0, actor=1), bundle(0, reward=0),
    ]  # fmt: skip
    placed(subject, roles, 8, False, expected)


@exercise("distributed.placement.place")
def test_node_after_node(subject):
    """a node is filled before the next one is begun"""
    expected = [bundle(0, actor=0), bundle(0, actor=1), bundle(1, actor=2), bundle(1, critic=0)]
    placed(subject, {"actor": 3, "critic": 1}, 2, False, expected)
    expected = [bundle(i // 2, 1.0, actor=i) for i in range(5)]
    placed(subject, {"actor": 5}, 2, True, expected)


@exercise("distributed.placement.place")
def test_engines_of_several_ranks(subject):
    """an engine of several tensor-parallel ranks has that many bundles, side by side"""
    expected = [bundle(i // 4, rollout=i) for i in range(4)] + [bundle(1, actor=0)]
    placed(subject, {"actor": 1, "rollout": 2}, 4, False, expected, 2)
    third = 1 / 3
    expected = [bundle(0, third, actor=i, critic=i, rollout=i) for i in range(4)]
    placed(subject, {"actor": 4, "critic": 4, "rollout": 1}, 8, True, expected, 4)


@exercise("distributed.placement.place")
def test_colocated_roles_of_unequal_size(subject):
    """colocated: a smaller role is in the first bundles, and shares are the same in all"""
    expected = [
        bundle(0, 0.25, actor=0, critic=0, reference=0, rollout=0),
        bundle(0, 0.25, actor=1, critic=1), bundle(1, 0.25, critic=2),
    ]  # fmt: skip
    placed(subject, {"actor": 2, "critic": 3, "reference": 1, "rollout": 1}, 2, True, expected)


@exercise("distributed.placement.place")
def test_without_gpus(subject):
    """on a machine without GPUs nothing asks for one, and there is one node"""
    expected = [bundle(0, gpu=0, rollout=0), bundle(0, gpu=0, actor=0), bundle(0, gpu=0, actor=1)]
    placed(subject, {"actor": 2, "rollout": 1}, 0, False, expected)
    expected = [bundle(0, 0.5, 0, actor=i, rollout=i) for i in range(2)]
    placed(subject, {"actor": 2, "rollout": 1}, 0, True, expected, 2)


@exercise("distributed.placement.place")
def test_without_engines(subject):
    """roles without engines are placed as well"""
    placed(subject, {"actor": 1}, 1, False, [bundle(0, actor=0)])
    expected = [bundle(0, 0.5, actor=0, reference=0)]
    placed(subject, {"actor": 1, "reference": 1}, 1, True, expected)


@exercise("distributed.placement.place")
def test_engines_that_do_not_fit(subject):
    """colocated engines with more ranks than there are bundles are refused"""
    raises(subject.place, ({"actor": 2, "rollout": 3}, 8, True), ConfigError)
    raises(subject.place, ({"actor": 3, "rollout": 2}, 8, True, 2), ConfigError)


@exercise("distributed.placement.place")
def test_engines_that_would_straddle_nodes(subject):
    """an engine whose ranks would be on two nodes is refused, colocated or not"""
    raises(subject.place, ({"actor": 1, "rollout": 1}, 1, False, 2), ConfigError)
    raises(subject.place, ({"actor": 1, "rollout": 2}, 3, False, 2), ConfigError)
    raises(subject.place, ({"actor": 4, "rollout": 2}, 3, True, 2), ConfigError)
    expected = [bundle(i // 3, rollout=i) for i in range(2)] + [bundle(0, actor=0)]
    placed(subject, {"actor": 1, "rollout": 1}, 3, False, expected, 2)


@exercise("distributed.placement.place")
def test_any_placement(subject, rng):
    """any roles on any nodes"""
    for _ in range(8):
        first = drawn(rng, 0, 4)  # roles begin there, so that their order is another one
        names = [*ROLES[first:4], *ROLES[:first]]
        roles = {role: drawn(rng, 1, 5) for role in names[: drawn(rng, 1, 5)]}
        parallel = 2 ** drawn(rng, 0, 2)
        engines = drawn(rng, 0, max(roles.values()) // parallel + 1)
        roles |= {"rollout": engines} if engines else {}
        gpus = 2 * drawn(rng, 0, 4)
        for colocate in (False, True):
            expected = by_loops(roles, gpus, colocate, parallel)
            placed(subject, roles, gpus, colocate, expected, parallel)


# --------------------------------------------------------------------------------- balanced_chunks


def greedy(lengths, parts):
    """Item by item; a part is full when it has what the others could not do without."""
    chunks = [[] for _ in range(parts)]
    for item in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        sizes = [len(chunk) for chunk in chunks]
        most = len(lengths) // parts
        larger = sum(size > most for size in sizes)
        allowed = most + (larger < len(lengths) % parts)
        open_parts = [p for p in range(parts) if sizes[p] < allowed]
        tokens = [sum(lengths[i] for i in chunk) for chunk in chunks]
        best = min(tokens[p] for p in open_parts)
        chunks[next(p for p in open_parts if tokens[p] == best)].append(item)
    return [sorted(chunk) for chunk in chunks]


def shared(subject, lengths, parts, expected):
    what = "another distribution"
    same(subject.balanced_chunks, (lengths, parts), expected, what=what, rtol=0, atol=0)


@exercise("distributed.placement.balanced_chunks", core=True)
def test_the_longest_first(subject):
    """the longest item first, each to the part with the fewest tokens"""
    shared(subject, [5, 4, 3], 3, [[0], [1], [2]])
    shared(subject, [1, 9, 2, 8], 2, [[0, 1], [2, 3]])


@exercise("distributed.placement.balanced_chunks", core=True)
def test_every_part_has_something(subject):
    """no part is empty, and counts differ by at most one, however long one item is"""
    shared(subject, [100, 1, 1, 1], 2, [[0, 3], [1, 2]])
    shared(subject, [100, 1, 1, 1, 1], 2, [[0, 4], [1, 2, 3]])


@exercise("distributed.placement.balanced_chunks")
def test_one_part_or_as_many_as_items(subject):
    """one part gets everything; of as many parts as items each gets one"""
    shared(subject, [3, 1, 2], 1, [[0, 1, 2]])
    shared(subject, [3, 1, 2], 3, [[0], [2], [1]])


@exercise("distributed.placement.balanced_chunks")
def test_ascending_indices(subject):
    """the indices of a part ascend, whatever the order in which they came to it"""
    shared(subject, [1, 2, 3, 4, 5, 6], 2, [[1, 2, 5], [0, 3, 4]])


@exercise("distributed.placement.balanced_chunks")
def test_ties(subject):
    """of equal items the earliest goes first, and of equal parts the first one gets it"""
    shared(subject, [2, 2, 2, 2], 2, [[0, 2], [1, 3]])
    shared(subject, [1, 4, 4, 1, 1, 1], 3, [[1, 4], [2, 5], [0, 3]])


@exercise("distributed.placement.balanced_chunks")
def test_items_without_tokens(subject):
    """items without tokens are items, too"""
    shared(subject, [0, 0, 0], 2, [[0, 1], [2]])
    shared(subject, [0, 7, 0, 0], 2, [[1, 3], [0, 2]])


@exercise("distributed.placement.balanced_chunks")
def test_a_remainder_of_several(subject):
    """where items are left over, as many parts as that have one more, and no other"""
    shared(subject, [9, 8, 7, 1, 1, 1, 1, 1], 3, [[0, 6], [1, 4, 7], [2, 3, 5]])
    shared(subject, [9, 1, 1, 1, 1, 1, 1], 3, [[0, 6], [1, 3, 5], [2, 4]])


@exercise("distributed.placement.balanced_chunks")
def test_any_lengths(subject, rng):
    """any lengths, among any number of ranks"""
    for _ in range(12):
        parts = drawn(rng, 1, 9)
        count = parts + drawn(rng, 0, 30)
        lengths = torch.randint(0, 40, (count,), generator=rng).tolist()
        shared(subject, lengths, parts, greedy(lengths, parts))


def test_the_two_oracles_are_of_use():
    """A long item does not leave the others idle, and everybody has a seat."""
    chunks = greedy([50, 1, 1, 30, 20, 1, 1], 3)
    assert sorted(len(chunk) for chunk in chunks) == [2, 2, 3]
    assert sorted(item for chunk in chunks for item in chunk) == list(range(7))
    assert len(by_loops({"actor": 2, "critic": 3, "rollout": 1}, 2, False, 4)) == 9
