"""One iteration of RLHF as a pipeline: rollout → train → sync, in step or one step apart."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def pipeline_step(
    step: int,
    last: int,
    pending: dict[int, Any],
    start: Callable[[int], Any],
    finish: Callable[[Any], Any],
    train: Callable[[int, Any], Any],
    sync: Callable[[int], None],
    staleness: int = 0,
) -> Any:
    """Train on the answers of `step`, and bring the rollout engines to the weights that come of it.

    start(k) begins the rollout of step k with the weights that the engines hold now, and returns at
    once; finish(handle) waits for its answers; train(step, answers) updates the trainer and gives
    what is returned here; sync(version) sends its weights, under the number of the updates that
    made them, `step + 1`.

    staleness 0: answers are always of the newest weights, and trainer and engines wait for each
    other. staleness s > 0: when training begins, the rollouts of the next s steps have been started
    too, and run beside it; their answers are of weights up to s updates old (Noukhovitch et al.
    2024, "Asynchronous RLHF"). Never more than that, so `pending` (handles by step, emptied from
    the front, carried from call to call) is bounded, and nothing is started beyond step `last`.
    """
    # BEGIN SOLUTION
    for ahead in range(step, min(step + staleness, last) + 1):
        if ahead not in pending:
            pending[ahead] = start(ahead)
    answers = finish(pending.pop(step))
    result = train(step, answers)
    sync(step + 1)
    return result
    # END SOLUTION
