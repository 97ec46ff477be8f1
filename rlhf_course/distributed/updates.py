"""One PPO-ptx update of a model whose ranks hold different rows: `ppo_ptx.ppo_ptx_step` over ranks.

The losses are sums over tokens, divided by the tokens of the whole update, on all ranks together.
DeepSpeed averages the d ranks' gradients, so that each rank divides by N / d instead of N: then the
average of the ranks is the sum that one process would have made, however unequal their rows are.

Tested by `pytest tests/test_zero.py`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial

import torch
from torch import Tensor
from torch import distributed as dist
from torch.distributed import ProcessGroup

from rlhf_course.distributed.zero import ZeroModel
from rlhf_course.errors import check_finite
from rlhf_course.ppo import add_up, critic_terms, policy_terms
from rlhf_course.ppo_ptx import PTXSettings, ptx_terms
from rlhf_course.rollout import PPOSettings, Rollout

Terms = Callable[..., tuple[Tensor, dict[str, Tensor]]]
"""(model, a micro-batch) -> its share of the loss, 0-dim, and of the diagnostics."""


def update_policy(
    model: ZeroModel,
    part: Rollout,
    rows: Tensor | None,
    settings: PPOSettings,
    ptx: PTXSettings,
    lr: float,
    group: ProcessGroup,
) -> dict[str, float]:
    """One update of the policy; its diagnostics, the same on every rank, are `ppo_ptx_step`'s.

    part: this rank's answers, at least one; rows (B, T) long: its share of the corpus rows, of one
    T on all ranks, or None. `settings.micro_batch_size` rows go through the network at a time.
    Raises TrainingError, before anything is updated, when a loss or a gradient is not finite.
    """
    rows = part.tokens[:0] if rows is None else rows
    counts = [part.mask.sum(), part.mask.any(dim=1).sum(), rows[:, 1:].numel(), len(rows)]
    tokens, answers, corpus_tokens, corpus_rows = _over_ranks(counts, dist.ReduceOp.SUM, group)
    d, size = group.size(), settings.micro_batch_size
    of_answers = partial(policy_terms, settings=settings, tokens=tokens / d, answers=answers / d)
    corpus = corpus_tokens if ptx.reduction == "token_mean" else corpus_rows
    of_corpus = partial(ptx_terms, settings=ptx, denominator=corpus / d)
    texts = [text for text in rows.split(size or max(len(rows), 1)) if len(text)]
    work = _as_many(of_answers, part.micro_batches(size), part.select(torch.arange(1)), group)
    work += _as_many(of_corpus, texts, part.tokens[:1], group)
    return _update(model, work, lr, group, "policy_grad_norm")


def update_critic(
    model: ZeroModel, part: Rollout, settings: PPOSettings, lr: float, group: ProcessGroup
) -> dict[str, float]:
    """The same for the critic, whose values and targets are normalised already."""
    (count,) = _over_ranks([part.value_mask.sum()], dist.ReduceOp.SUM, group)
    terms = partial(critic_terms, settings=settings, count=count / group.size())
    spare = part.select(torch.arange(1))
    work = _as_many(terms, part.micro_batches(settings.micro_batch_size), spare, group)
    return _update(model, work, lr, group, "value_grad_norm")


def _over_ranks(values: list, op, group: ProcessGroup) -> list[float]:
    """Each number combined over all ranks."""
    device = "cuda" if dist.get_backend(group) == "nccl" else "cpu"
    numbers = torch.tensor([float(x) for x in values], dtype=torch.float64, device=device)
    dist.all_reduce(numbers, op, group)
    return numbers.tolist()


def _as_many(terms: Terms, parts: Iterable, spare, group: ProcessGroup) -> list[tuple]:
    """(terms, micro-batch, weight) for each of this rank's micro-batches, and as many more of
    weight 0, made of `spare`, as the rank with the most has: in every forward and backward pass the
    ranks gather and reduce together, and a rank that made one less would leave the others waiting.
    """
    work = [(terms, part, 1.0) for part in parts]
    (most,) = _over_ranks([len(work)], dist.ReduceOp.MAX, group)
    return work + [(terms, spare, 0.0)] * (int(most) - len(work))


def _weighted(model, terms: Terms, part, weight: float) -> tuple[Tensor, dict[str, Tensor]]:
    """The terms of one micro-batch, times its weight. Only a maximum is not: that of a spare row is
    the maximum of a row which counts elsewhere."""
    loss, stats = terms(model, part)
    largest = {name: x for name, x in stats.items() if name.endswith("_max")}
    return weight * loss, {name: weight * x for name, x in stats.items()} | largest


def _update(
    model: ZeroModel, work: list[tuple], lr: float, group: ProcessGroup, norm: str
) -> dict[str, float]:
    """Every micro-batch forward and backward, then one step; the diagnostics of all ranks."""
    parts = []
    for index, job in enumerate(work):
        loss, stats = model(_weighted, *job)
        model.backward(loss, last=index == len(work) - 1)
        parts.append(stats)
    sums = add_up(parts)
    largest = [name for name in sums if name.endswith("_max")]
    added = [name for name in sums if name not in largest]
    for names, op, ranks in (
        (added, dist.ReduceOp.SUM, group.size()),
        (largest, dist.ReduceOp.MAX, 1),
    ):
        values = _over_ranks([sums[name] for name in names], op, group)
        sums.update((name, value / ranks) for name, value in zip(names, values, strict=True))
    check_finite(sums, "PPO update")
    return {**sums, norm: model.step(lr)}
