"""Chapter 6's drivers: objects with a state, and two ranks, on the answer's side."""

import torch
from drivers_ranks import on_ranks
from torch import nn


def merged(namespace, batches):
    """[(count, mean, var)] after each batch that fresh RunningMoments are updated with."""
    moments, trace = namespace.RunningMoments(), []
    for batch in batches:
        moments.update(batch)
        trace.append([float(moments.count), float(moments.mean), float(moments.var)])
    return trace


def deviations(namespace, batches):
    """The unbiased standard deviation after all batches, and a value of 1.0 once normalised."""
    moments = namespace.RunningMoments()
    for batch in batches:
        moments.update(batch)
    return float(moments.std), moments.normalize(torch.ones(1, dtype=torch.float64))


def head_of(weight, bias, dtype=torch.float64):
    head = nn.Linear(len(weight), 1, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(weight[None])
        head.bias.fill_(bias)
    return head


def rescaled(namespace, weight, bias, rollouts, hidden):
    """What PopArt makes of a head: mean and std after all rollouts [(targets, mask)], weight,
    bias, and the values it gives to `hidden`, (S, D), before and after, (S,) each."""
    head = head_of(weight, bias)
    popart = namespace.PopArt(head)
    before = popart.denormalize(head(hidden)[:, 0]).detach()
    for targets, mask in rollouts:
        popart.update(targets, mask)
    after = popart.denormalize(head(hidden)[:, 0]).detach()
    return {
        "mean": float(popart.mean), "std": float(popart.std), "weight": head.weight.detach()[0],
        "bias": head.bias.detach()[0], "before": before, "after": after,
    }  # fmt: skip


def same_parameters(namespace, weight, targets, mask):
    """Whether the head's parameters are still those that an optimiser was given, and trained."""
    head = head_of(weight, 0.5)
    given = list(head.parameters())
    namespace.PopArt(head).update(targets, mask)
    kept = all(a is b for a, b in zip(given, head.parameters(), strict=True))
    return kept, all(p.requires_grad and p.grad_fn is None for p in head.parameters())


def on_two_ranks(namespace, first, second):
    """What `masked_moments` gives on each of two ranks, whose parts are (x, mask)."""
    return [tuple(result) for result in on_ranks(namespace.masked_moments, [first, second])]
