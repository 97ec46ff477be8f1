"""Chunks of logits: the same loss and gradient, and never more logits than asked for."""

import pytest
import torch

from rlhf_course import rollout, sft, vocabulary
from rlhf_course.rollout import action_logprobs
from rlhf_course.sft import IGNORE, answer_loss, sft_loss
from tests.tiny_models import CONTEXT, KINDS, VOCABULARY, tiny


@pytest.mark.parametrize(
    ("size", "most", "rows"),
    [(50257, 1 << 30, 2670), (151936, 1 << 30, 883), (1 << 40, 9, 1), (128, 4096, 4096)],
)
def test_rows_at_a_time(size, most, rows):
    assert vocabulary.rows_at_a_time(size, most) == rows
    assert rows * size <= vocabulary.LOGITS or rows == 1


def data():
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(0, VOCABULARY, (5, CONTEXT), generator=generator)
    labels = torch.where(torch.rand(5, CONTEXT, generator=generator) < 0.6, tokens, IGNORE)
    return tokens, labels


SPARE = 1
"""Rows more that each product makes: the last position of the text, which is asked for nothing."""


class Watched:
    """Counts the rows that a model is asked to turn into logits at a time."""

    def __init__(self, model):
        self.rows, unembed = [], model.unembed

        def watch(hidden):
            self.rows.append(len(hidden))
            return unembed(hidden)

        model.unembed = watch


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return loss.detach(), [p.grad.clone() for p in model.parameters()]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("denominator", [None, 1000])
def test_the_loss_in_chunks_is_the_loss(kind, denominator, monkeypatch):
    tokens, labels = data()
    model = tiny(kind).double()
    plain = gradients(model, sft_loss(model(tokens), labels, denominator))
    monkeypatch.setattr(vocabulary, "LOGITS", 32 * VOCABULARY)
    seen = Watched(model)
    chunked = gradients(model, answer_loss(model, tokens, labels, denominator=denominator))
    asked = int((labels[:, 1:] != IGNORE).sum())
    assert asked > 3 * 32 and max(seen.rows) == 32 + SPARE
    chunks = -(-asked // 32)
    assert sum(seen.rows) == 2 * (asked + chunks * SPARE)  # once more in the backward pass
    # hidden states leave the model in fp32, and sums are taken in another order
    torch.testing.assert_close(chunked[0], plain[0], rtol=1e-6, atol=0)
    for ours, theirs in zip(chunked[1], plain[1], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-7)


def test_few_logits_are_made_at_once_and_only_once():
    model, (tokens, labels) = tiny("gpt"), data()
    seen = Watched(model)
    answer_loss(model, tokens, labels).backward()
    assert seen.rows == [int((labels[:, 1:] != IGNORE).sum()) + SPARE]


def test_the_student_s_loss_is_called_for_every_chunk(monkeypatch):
    calls = []

    def own(logits, labels, denominator=None):
        calls.append(logits.shape)
        return sft_loss(logits, labels, denominator)

    monkeypatch.setattr(sft, "sft_loss", own)
    monkeypatch.setattr(vocabulary, "LOGITS", 50 * VOCABULARY)
    with torch.no_grad():
        answer_loss(tiny("gpt"), *data())
    assert len(calls) > 1 and all(shape[-1] == VOCABULARY for shape in calls)


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_in_chunks_are_the_log_probs(kind, monkeypatch):
    tokens, labels = data()
    mask = labels[:, 1:] != IGNORE
    model = tiny(kind)
    whole = action_logprobs(model, tokens, mask)
    monkeypatch.setattr(vocabulary, "LOGITS", 20 * VOCABULARY)
    seen = Watched(model)
    parts = action_logprobs(model, tokens, mask)
    assert max(seen.rows) == 20 + SPARE
    for ours, theirs in zip(parts, whole, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)
    assert rollout.rows_at_a_time is vocabulary.rows_at_a_time
