"""Chapter 9's drivers: parameters in pieces on several ranks, and a channel that writes it down."""

from functools import partial

import torch
from drivers_ranks import on_ranks


def gathered(namespace, shards, shape):
    """What `gather_zero3_parameters` gives on each rank, and the shards as they are afterwards."""
    shards = [shard.clone() for shard in shards]
    parts = [(shard, tuple(shape)) for shard in shards]
    return on_ranks(namespace.gather_zero3_parameters, parts), shards


def of_its_own(namespace, shard, shape):
    """(whether the result requires a gradient, whether changing it changes the shard)."""
    shard = shard.clone().requires_grad_(shard.is_floating_point())
    before = shard.detach().clone()
    whole = namespace.gather_zero3_parameters(shard, tuple(shape))
    with torch.no_grad():
        whole.mul_(0)
    return whole.requires_grad, not torch.equal(shard.detach(), before)


class Trouble(Exception):
    """What a broken rank or a lost engine raises."""


class Recorder:
    """A channel to one engine that writes down what happens, in `events`."""

    def __init__(self, events, fails_at=None):
        self.events, self.fails_at = events, fails_at

    def begin(self, version):
        self.events.append(("begin", version))

    def send(self, name, tensor):
        if name == self.fails_at:
            raise Trouble(name)
        self.events.append(("send", name, tensor.detach().clone()))

    def finish(self, version):
        self.events.append(("finish", version))


class Model:
    """Parameters that are gathered into one buffer, as the next one is freed for the other."""

    def __init__(self, values, events, fails_at=None):
        self.values, self.events, self.fails_at = values, events, fails_at
        self.buffers = {}

    def gather(self, name):
        self.events.append(("gather", name))
        if name == self.fails_at:
            raise Trouble(name)
        for buffer in self.buffers.values():  # freed, and used for something else
            buffer.fill_(-99)
        buffer = self.buffers[name] = self.values[name].clone()
        return buffer

    def parameters(self):
        """As a generator: it is gone through once."""
        for name in self.values:
            yield name, partial(self.gather, name)


def synced(namespace, values, version, leading=True, gather_fails=None, send_fails=None):
    """(what `sync_weights` returns, or the name of its error, and every event in order).

    leading: the rank that has the channel.
    """
    events = []
    model = Model(values, events, gather_fails)
    channel = Recorder(events, send_fails) if leading else None
    try:
        result = namespace.sync_weights(model.parameters(), version, channel)
    except Trouble:
        result = "Trouble"
    return result, events


def synced_from_shards(namespace, shapes, shards, version):
    """Two ranks and more, each with its pieces: [(what it returns, events)].

    shapes: by name; shards: by name, a piece for each rank. Rank 0 has the channel.
    """

    def on_a_rank(rank, group):
        events = []

        def parameters():
            for name, shape in shapes.items():
                gather = namespace.gather_zero3_parameters
                yield name, partial(gather, shards[name][rank], tuple(shape), group)

        channel = None if rank else Recorder(events)
        return namespace.sync_weights(parameters(), version, channel), events

    return on_ranks(on_a_rank, [(rank,) for rank in range(len(next(iter(shards.values()))))])
