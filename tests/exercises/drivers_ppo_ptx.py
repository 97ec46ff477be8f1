"""Chapter 6's drivers: objects with a state, and two ranks, on the answer's side."""

import threading

import torch
import torch.distributed as dist
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


class TwoThreads(dist.ProcessGroup):
    """A process group whose two ranks are threads of this process: it needs no network and takes
    microseconds. What a rank hands to its n-th collective call meets the other's n-th."""

    REDUCE = (
        (dist.ReduceOp.SUM, torch.sum), (dist.ReduceOp.PRODUCT, torch.prod),
        (dist.ReduceOp.MAX, torch.amax), (dist.ReduceOp.MIN, torch.amin),
    )  # fmt: skip

    def __init__(self, rank, posted, finished, news):
        super().__init__(rank, 2)
        self.me, self.posted, self.finished, self.news = rank, posted, finished, news

    def exchange(self, mine):
        """What the two ranks hand to this call. RuntimeError when the other never makes it."""
        with self.news:
            self.posted[self.me].append(mine.clone())
            self.news.notify_all()
            number, other = len(self.posted[self.me]), 1 - self.me
            self.news.wait_for(lambda: len(self.posted[other]) >= number or self.finished[other], 5)
            if len(self.posted[other]) < number:
                raise RuntimeError("the ranks did not call all_reduce equally often")
        return [self.posted[rank][number - 1] for rank in (0, 1)]

    def allreduce(self, tensors, options=None):
        operation = options.reduceOp if options else dist.ReduceOp.SUM
        reduce = next((f for op, f in self.REDUCE if operation == op), None)
        if reduce is None:  # as gloo has it
            raise RuntimeError(f"{operation} is not offered here: sum, and divide yourself")
        for tensor in tensors:
            tensor.copy_(reduce(torch.stack(self.exchange(tensor)), dim=0))
        return done(tensors)

    def allgather(self, outputs, inputs, options=None):
        for out, mine in zip(outputs, inputs, strict=True):
            for place, value in zip(out, self.exchange(mine), strict=True):
                place.copy_(value)
        return done(outputs)

    def _allgather_base(self, output, mine, options=None):
        output.view(2, *mine.shape).copy_(torch.stack(self.exchange(mine)))
        return done(output)

    def getBackendName(self):
        return "threads"


def done(value):
    """What a collective call returns: work that is over."""
    future = torch.futures.Future()
    future.set_result(value)
    return torch._C._distributed_c10d._create_work_from_future(future)


def on_two_ranks(namespace, first, second):
    """What `masked_moments` gives on each of two ranks, whose parts are (x, mask)."""
    shared, out = ([[], []], [False, False], threading.Condition()), [None, None]

    def work(rank, x, mask):
        try:
            out[rank] = namespace.masked_moments(x, mask, TwoThreads(rank, *shared))
        except BaseException as error:  # noqa: BLE001 - it is raised again where it is seen
            out[rank] = error
        with shared[2]:
            shared[1][rank] = True
            shared[2].notify_all()

    threads = [threading.Thread(target=work, args=(r, *p)) for r, p in enumerate((first, second))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in out if isinstance(result, BaseException)]
    # What a rank did wrong itself tells more than what the other, left alone, says of it.
    for error in sorted(errors, key=lambda error: type(error) is RuntimeError):
        raise error
    return [tuple(result) for result in out]
