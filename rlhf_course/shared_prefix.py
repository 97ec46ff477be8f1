"""All answers to one prompt in one row, so that the prompt is read once and not once an answer.

    tokens      p0  p1  p2 | a0  a1 | b0  b1  b2 | pad      prompt P = 3, answers of 2 and 3
    segments     0   0   0 |  1   1 |  2   2   2 |  -1
    positions    0   1   2 |  3   4 |  3   4   5 |   0

Behind the prompt the positions begin anew with each answer, and an answer sees the prompt and
itself, never its neighbour. So every token has the hidden state that it has in a row of its own,
prompt and answer, and rewards and gradients are equal up to rounding. Of the K (P + A) tokens of
such rows P + K A are left.

Attention loses by it: a row of P + K A tokens has more pairs of query and key than K short ones,
most of them masked out, and computed all the same. `costs_less` counts both.

Tested by `pytest tests/test_shared_prefix.py`.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

import torch
from torch import Tensor

from rlhf_course.padding import pad_rows, padded_length
from rlhf_course.reward_model import ScalarModel

PAD = -1
"""The segment of a pad. The prompt's is 0, those of the answers are 1, 2, …"""


class SharedRows(NamedTuple):
    """A row for each prompt, with up to K answers; all tensors are long."""

    tokens: Tensor
    """(B, T), right-padded."""
    segments: Tensor
    """(B, T): what each token belongs to."""
    positions: Tensor
    """(B, T): where each token would stand in a row of prompt and answer alone."""
    prompt_lengths: Tensor
    """(B, K), the same for all answers of a row."""
    starts: Tensor
    """(B, K): the column of each answer's first token."""
    lengths: Tensor
    """(B, K): how many tokens each answer has."""


def side_by_side(
    prompts: Sequence[list[int]], answers: Sequence[Sequence[list[int]]]
) -> SharedRows:
    """Each prompt once, with all its answers behind it: one row of tokens each.

    A prompt with fewer than K answers, the most that one has, names its first again in `starts`
    and `lengths`; no token is written for that. Every prompt needs an answer.
    """
    most = max(map(len, answers))
    tokens, segments, positions, starts, lengths = [], [], [], [], []
    for prompt, said in zip(prompts, answers, strict=True):
        parts, sizes = [prompt, *said], [len(answer) for answer in said]
        tokens.append([token for part in parts for token in part])
        segments.append([i for i, part in enumerate(parts) for _ in part])
        behind = [len(prompt) + i for size in sizes for i in range(size)]
        positions.append([*range(len(prompt)), *behind])
        begins = list(accumulate(sizes[:-1], initial=len(prompt)))
        starts.append(begins + begins[:1] * (most - len(said)))
        lengths.append(sizes + sizes[:1] * (most - len(said)))
    prompt_lengths = torch.tensor([[len(prompt)] * most for prompt in prompts])  # (B, K)
    return SharedRows(
        pad_rows(tokens), pad_rows(segments, fill=PAD), pad_rows(positions), prompt_lengths,
        torch.tensor(starts), torch.tensor(lengths),
    )  # fmt: skip


def shared_mask(segments: Tensor) -> Tensor:
    """Who may look at whom: of what came before, at the prompt and at its own answer.

    segments (B, T) long -> (B, 1, T, T) bool, [query, key], True = may look. A pad sees itself,
    since a query with nothing to look at would be 0 / 0; nothing sees a pad but pads.
    """
    same = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
    of_prompt = segments[:, None, :] == 0  # (B, 1, T)
    return (same | of_prompt).tril()[:, None]  # (B, 1, T, T)


def unshared(scores: Tensor, rows: SharedRows) -> Tensor:
    """Token scores of shared rows as those of rows with one answer each.

    scores (B, T) -> (B·K, P + A) for the longest P + A: prompt, answer, and behind them whatever
    stands there; row b·K + k is answer k of prompt b.
    """
    longest = int((rows.prompt_lengths + rows.lengths).max())
    place = torch.arange(longest, device=scores.device)  # (P + A,), in the row of one answer
    prompt, start = rows.prompt_lengths[:, :, None], rows.starts[:, :, None]  # (B, K, 1)
    columns = torch.where(place < prompt, place, start + place - prompt)  # (B, K, P + A)
    columns = columns.clamp(max=scores.shape[1] - 1).flatten(1)  # (B, K·(P + A))
    return scores.gather(1, columns).view(-1, longest)  # (B·K, P + A)


def shared_rewards(model: ScalarModel, rows: SharedRows) -> Tensor:
    """(B, K): the reward of every answer, as `model.rewards` gives it to rows of their own."""
    asked = rows.segments > 0  # (B, T): of an answer
    if model.pools_elsewhere:
        asked = None
    elif model.pooling == "last":
        ends = torch.where(rows.lengths > 0, rows.starts + rows.lengths, rows.prompt_lengths) - 1
        asked = torch.zeros_like(asked).scatter(1, ends, True)
    scores = model.token_scores(rows.tokens, shared_mask(rows.segments), rows.positions, asked)
    lengths = rows.prompt_lengths.flatten(), rows.lengths.flatten()  # (B·K,) each
    return model.pooled(unshared(scores, rows), *lengths).view(rows.lengths.shape)


def worth_sharing(
    prompts: Sequence[list[int]], answers: Sequence[Sequence[list[int]]], model: ScalarModel
) -> bool:
    """Whether a row for each prompt costs less (`costs_less`) than a row for each answer, pads
    included. Rows that exceed the model's context are not shared."""
    pairs = list(zip(prompts, answers, strict=True))
    longest = max(len(p) + max(map(len, said)) for p, said in pairs)
    if longest > model.backbone.context:
        return False  # positions would exceed it; `hidden_states` says so for separate rows
    together = padded_length(max(len(p) + sum(map(len, said)) for p, said in pairs))
    alone = padded_length(longest, model.backbone.context)
    return costs_less(together, max(map(len, answers)), alone, model.backbone.width)


def costs_less(together: int, answers: int, alone: int, width: int) -> bool:
    """Whether one row of `together` tokens costs less than a row of `alone` for each answer.

    Counted in multiplications of one block of width D: 12 D² for a token (attention's four matrices
    and the MLP's, 8 D²), and 2 D for a pair of query and key, once for its weight and once for the
    value. The causal kernel leaves out the pairs that look ahead, half of them; under a mask all
    are computed.
    """
    shared = together * (6 * width + together)  # in units of 2 D
    separate = answers * alone * (6 * width + alone / 2)
    return shared < separate
