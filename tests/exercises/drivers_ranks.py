"""Several ranks in one process, for the drivers of exercises that talk to other ranks."""

import threading

import torch
import torch.distributed as dist

PATIENCE = 5  # seconds for a rank that computes; one that has returned is not waited for


class Board:
    """What the ranks have handed to their calls so far, and who is done."""

    def __init__(self, size):
        self.posted, self.finished = [[] for _ in range(size)], [False] * size
        self.news = threading.Condition()

    def leave(self, rank):
        """A rank makes no further call."""
        with self.news:
            self.finished[rank] = True
            self.news.notify_all()

    def exchange(self, rank, mine):
        """What all ranks hand to this call. RuntimeError when one of them never makes it."""
        with self.news:
            self.posted[rank].append(mine.detach().clone())
            self.news.notify_all()
            number = len(self.posted[rank])

            def here():
                return [len(calls) >= number for calls in self.posted]

            def settled():
                return all(a or b for a, b in zip(here(), self.finished, strict=True))

            self.news.wait_for(settled, PATIENCE)
            if not all(here()):
                raise RuntimeError("the ranks did not make equally many collective calls")
            return [calls[number - 1] for calls in self.posted]


class ThreadGroup(dist.ProcessGroup):
    """A process group whose ranks are threads of this process: it needs no network and takes
    microseconds. What a rank hands to its n-th collective call meets the others' n-th."""

    REDUCE = (
        (dist.ReduceOp.SUM, torch.sum), (dist.ReduceOp.PRODUCT, torch.prod),
        (dist.ReduceOp.MAX, torch.amax), (dist.ReduceOp.MIN, torch.amin),
    )  # fmt: skip

    def __init__(self, rank, board):
        super().__init__(rank, len(board.posted))
        self.me, self.board = rank, board

    def exchange(self, mine):
        return self.board.exchange(self.me, mine)

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
        output.view(self.size(), *mine.shape).copy_(torch.stack(self.exchange(mine)))
        return done(output)

    def broadcast(self, tensors, options):
        for tensor in tensors:
            tensor.copy_(self.exchange(tensor)[options.rootRank])
        return done(tensors)

    def getBackendName(self):
        return "threads"


def done(value):
    """What a collective call returns: work that is over."""
    future = torch.futures.Future()
    future.set_result(value)
    return torch._C._distributed_c10d._create_work_from_future(future)


def on_ranks(function, parts):
    """[function(*part, group)] on as many ranks as there are parts, at the same time."""
    board, out = Board(len(parts)), [None] * len(parts)

    def work(rank):
        try:
            out[rank] = function(*parts[rank], ThreadGroup(rank, board))
        except BaseException as error:  # noqa: BLE001 - it is raised again where it is seen
            out[rank] = error
        board.leave(rank)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(len(parts))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in out if isinstance(result, BaseException)]
    # What a rank did wrong itself tells more than what the others, left alone, say of it.
    for error in sorted(errors, key=lambda error: type(error) is RuntimeError):
        raise error
    return out
