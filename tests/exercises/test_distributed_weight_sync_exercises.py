"""Chapter 9's exercises: whole parameters from shards, and the way to the rollout engines."""

from math import prod

import torch
from drivers_distributed_weight_sync import gathered, of_its_own, synced, synced_from_shards
from torch import tensor

from rlhf_course.coursework.expect import equal, exercise, raises, same

NAN = float("nan")


def shards_of(whole, ranks, padding=NAN):
    """What each rank holds: the flat tensor, filled up and cut into pieces of equal length."""
    size = -(-whole.numel() // ranks)
    flat = torch.full((ranks * size,), padding, dtype=whole.dtype)
    flat[: whole.numel()] = whole.flatten()
    return list(flat.split(size)) if size else [flat] * ranks


def normal(rng, *shape, dtype=torch.float32):
    return torch.randn(shape, generator=rng).to(dtype)


# ------------------------------------------------------------------------- gather_zero3_parameters


def on_all_ranks(subject, whole, ranks, what="not the whole parameter, on every rank"):
    """Every rank gets the parameter, in its dtype, and keeps its own piece as it was."""
    shards = shards_of(whole, ranks)
    results, after = subject.drive(gathered, shards, list(whole.shape))
    inputs = {f"shard on rank {rank}": shard for rank, shard in enumerate(shards)}
    inputs["shape"] = tuple(whole.shape)
    equal(results, [whole] * ranks, what, inputs, rtol=0, atol=0)
    dtypes = [str(result.dtype) for result in results]
    equal(dtypes, [str(whole.dtype)] * ranks, "another dtype than the shards have", inputs)
    kept = [torch.equal(a.nan_to_num(), b.nan_to_num()) for a, b in zip(after, shards, strict=True)]
    equal(kept, [True] * ranks, "a shard was changed in place", inputs)


@exercise("distributed.weight_sync.gather_zero3_parameters", core=True)
def test_two_ranks_hold_half_each(subject):
    """two ranks: both get the whole parameter, in its shape"""
    on_all_ranks(subject, tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]]), 2)


@exercise("distributed.weight_sync.gather_zero3_parameters", core=True)
def test_one_process_alone(subject):
    """without a group the one piece is the whole"""
    shard, whole = tensor([1.0, 2.0, 3.0, 4.0]), tensor([[1.0, 2.0], [3.0, 4.0]])
    same(subject.gather_zero3_parameters, (shard, (2, 2)), whole, dtype=torch.float32)
    padded = tensor([1.0, 2.0, 3.0, NAN])
    same(subject.gather_zero3_parameters, (padded, (3,)), tensor([1.0, 2.0, 3.0]))


@exercise("distributed.weight_sync.gather_zero3_parameters")
def test_padding_is_left_out(subject):
    """the padding at the end of the last piece is left out"""
    on_all_ranks(subject, tensor([[1.0, 2.0, 3.0]]), 2)
    on_all_ranks(subject, tensor([[1.0, 2.0], [3.0, 4.0], [5.0, 6.0]]), 4)


@exercise("distributed.weight_sync.gather_zero3_parameters")
def test_a_rank_of_padding_takes_part(subject):
    """a rank that holds nothing but padding calls all the same, and gets the whole"""
    on_all_ranks(subject, tensor([7.0]), 2)
    on_all_ranks(subject, tensor([1.0, 2.0, 3.0, 4.0, 5.0]), 4)


@exercise("distributed.weight_sync.gather_zero3_parameters")
def test_three_ranks_in_order(subject):
    """the pieces stand in the order of the ranks"""
    on_all_ranks(subject, tensor([10.0, 20.0, 30.0]), 3)
    on_all_ranks(subject, torch.arange(12.0).view(2, 3, 2), 3)


@exercise("distributed.weight_sync.gather_zero3_parameters")
def test_every_dtype_stays(subject, rng):
    """bfloat16, float16 and float64 come back bit by bit, in their own dtype"""
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        on_all_ranks(subject, normal(rng, 3, 3, dtype=dtype), 2)


@exercise("distributed.weight_sync.gather_zero3_parameters")
def test_any_shape_on_any_number_of_ranks(subject, rng):
    """any shape, a single number too, on one to five ranks"""
    for ranks, shape in ((1, (2, 2)), (2, ()), (3, (5,)), (4, (3, 1, 3)), (5, (4, 4))):
        on_all_ranks(subject, normal(rng, *shape), ranks)


@exercise("distributed.weight_sync.gather_zero3_parameters")
def test_the_result_is_new(subject):
    """the result is a tensor of its own, without gradient"""
    shard = tensor([1.0, 2.0])
    told = subject.drive(of_its_own, shard, [2])
    what = "(requires a gradient, shares its memory with the shard)"
    equal(told, (False, False), what, {"shard": shard, "shape": (2,)})


@exercise("distributed.weight_sync.gather_zero3_parameters")
def test_too_few_numbers(subject):
    """pieces that do not fill the shape are refused"""
    raises(subject.gather_zero3_parameters, (tensor([1.0, 2.0, 3.0]), (2, 2)))


# ------------------------------------------------------------------------------------ sync_weights

VALUES = {"wte": tensor([[1.0, 2.0], [3.0, 4.0]]), "bias": tensor([5.0]), "head": tensor([6.0])}
A_RANK, THE_LEADER = "a rank without channel", "the leading rank"


def expected_events(values, version, leading=True):
    """Begin; each parameter gathered, then sent; finish. Without a channel only the gathering."""
    events = [("begin", version)]
    for name, value in values.items():
        events += [("gather", name), ("send", name, value)]
    events.append(("finish", version))
    return events if leading else [event for event in events if event[0] == "gather"]


def words(events):
    """The events without the tensors: "begin 7", "gather bias"."""
    return [f"{event[0]} {event[1]}" for event in events]


def given(values, version=7, rank=THE_LEADER, **more):
    return {"names of the parameters": list(values), "version": version, "seen from": rank} | more


@exercise("distributed.weight_sync.sync_weights", core=True)
def test_begin_each_parameter_finish(subject):
    """begin, then each parameter gathered and sent, then finish"""
    _, events = subject.drive(synced, VALUES, 7)
    what = "another order of events"
    equal(words(events), words(expected_events(VALUES, 7)), what, given(VALUES))


@exercise("distributed.weight_sync.sync_weights", core=True)
def test_the_other_ranks_gather_too(subject):
    """a rank without a channel gathers every parameter in the same order"""
    _, events = subject.drive(synced, VALUES, 7, False)
    wanted = expected_events(VALUES, 7, leading=False)
    equal(words(events), words(wanted), "another order of events", given(VALUES, rank=A_RANK))


@exercise("distributed.weight_sync.sync_weights")
def test_values_arrive(subject, rng):
    """each name comes with its own numbers, in shape and dtype"""
    values = {
        "a.weight": normal(rng, 2, 3), "a.bias": normal(rng, 3, dtype=torch.bfloat16),
        "scale": normal(rng), "0": normal(rng, 1, 1, 2),
    }  # fmt: skip
    _, events = subject.drive(synced, values, 3)
    sent = {event[1]: event[2] for event in events if event[0] == "send"}
    equal(sent, values, "other numbers were sent", given(values, 3), rtol=0, atol=0)
    dtypes = {name: str(value.dtype) for name, value in sent.items()}
    expected = {name: str(value.dtype) for name, value in values.items()}
    equal(dtypes, expected, "another dtype was sent", given(values, 3))


@exercise("distributed.weight_sync.sync_weights")
def test_one_at_a_time(subject):
    """a parameter is sent before the next is gathered, since its memory is used again then"""
    _, events = subject.drive(synced, VALUES, 7)
    what = "other numbers were sent (those of a freed buffer are -99)"
    sent = [event[2] for event in events if event[0] == "send"]
    equal(sent, list(VALUES.values()), what, given(VALUES), rtol=0, atol=0)


@exercise("distributed.weight_sync.sync_weights")
def test_how_many(subject):
    """every rank returns the number of parameters"""
    for values in (VALUES, {"only": tensor([1.0])}):
        for leading in (True, False):
            count, _ = subject.drive(synced, values, 1, leading)
            rank = THE_LEADER if leading else A_RANK
            equal(count, len(values), "another number", given(values, 1, rank))


@exercise("distributed.weight_sync.sync_weights")
def test_the_version(subject):
    """begin and finish get the version as it was given"""
    for version in (0, 12):
        _, events = subject.drive(synced, VALUES, version)
        told = words(event for event in events if event[0] in ("begin", "finish"))
        wanted = [f"begin {version}", f"finish {version}"]
        equal(told, wanted, "another version", given(VALUES, version))


@exercise("distributed.weight_sync.sync_weights")
def test_a_gathering_that_fails(subject):
    """when a parameter cannot be gathered, the error goes on and finish is never reached"""
    for name in VALUES:
        stop = words(expected_events(VALUES, 7)).index(f"gather {name}")
        wanted = "Trouble", words(expected_events(VALUES, 7))[: stop + 1]
        result, events = subject.drive(synced, VALUES, 7, True, name)
        inputs = given(VALUES, **{"fails to be gathered": name})
        equal((result, words(events)), wanted, "(result, events) are others", inputs)


@exercise("distributed.weight_sync.sync_weights")
def test_a_sending_that_fails(subject):
    """when an engine is lost on the way, the error goes on and finish is never reached"""
    for name in VALUES:
        stop = words(expected_events(VALUES, 7)).index(f"send {name}")
        wanted = "Trouble", words(expected_events(VALUES, 7))[:stop]
        result, events = subject.drive(synced, VALUES, 7, True, None, name)
        inputs = given(VALUES, **{"fails to be sent": name})
        equal((result, words(events)), wanted, "(result, events) are others", inputs)


@exercise("distributed.weight_sync.sync_weights")
def test_a_failure_elsewhere(subject):
    """a rank without a channel lets the error through as well"""
    result, events = subject.drive(synced, VALUES, 7, False, "bias")
    wanted = "Trouble", ["gather wte", "gather bias"]
    inputs = given(VALUES, rank=A_RANK, **{"fails to be gathered": "bias"})
    equal((result, words(events)), wanted, "(result, events) are others", inputs)


@exercise("distributed.weight_sync.sync_weights")
def test_from_shards_to_engine(subject, rng):
    """two and four ranks with their shards: the engine gets the whole parameters"""
    for ranks in (2, 4):
        values = {"wte": normal(rng, 3, 3), "head.weight": normal(rng, 2, 5), "b": normal(rng, 1)}
        shards = {name: shards_of(value, ranks) for name, value in values.items()}
        shapes = {name: list(value.shape) for name, value in values.items()}
        told = subject.drive(synced_from_shards, shapes, shards, 5)
        sent = [event for event in expected_events(values, 5) if event[0] != "gather"]
        wanted = [(3, sent)] + [(3, [])] * (ranks - 1)
        inputs = {"shapes": {name: tuple(shape) for name, shape in shapes.items()}, "ranks": ranks}
        what = "(result, events), rank by rank, are others"
        equal(told, wanted, what, inputs, rtol=0, atol=0)


def test_the_shards_are_made_as_told():
    whole = torch.arange(5.0)
    pieces = shards_of(whole, 4, padding=0.0)
    assert [len(piece) for piece in pieces] == [2] * 4
    assert torch.equal(torch.cat(pieces)[: prod(whole.shape)], whole)
