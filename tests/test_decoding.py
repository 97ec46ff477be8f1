"""Answers from a cache of fixed width are those of `sampling.generate`."""

import pytest
import torch

from rlhf_course.decoding import decode, fits
from rlhf_course.device import casts_kept
from rlhf_course.errors import ModelError
from rlhf_course.sampling import generate
from rlhf_course.stages import rollouts
from rlhf_course.stages.rollouts import Task, collect
from rlhf_course.stages.settings import PPOConfig
from tests.tiny_models import KINDS, VOCABULARY, tiny

EOS, NEW = 3, 24
RAGGED = [[1 + (i * 7 + j) % (VOCABULARY - 1) for j in range(1 + (5 * i) % 9)] for i in range(13)]
EVEN = [row[:1] * 4 for row in RAGGED]


def model_of(kind, bias=3.0):
    """EOS comes sooner or later: some answers end early, some in the middle, some never."""
    model = tiny(kind).eval()
    unembed = model.unembed

    def pushed(hidden):
        logits = 0.5 * unembed(hidden)
        logits[..., EOS] += bias - 2
        return logits

    model.unembed = pushed
    return model


def generator():
    return torch.Generator().manual_seed(5)


def assert_same(ours, theirs):
    assert ours.responses == theirs.responses
    assert ours.finished == theirs.finished
    for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
        assert a == pytest.approx(b, abs=2e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("prompts", [RAGGED, EVEN], ids=["ragged", "even"])
@pytest.mark.parametrize(
    "how", [{}, {"top_k": 9}, {"top_p": 0.8, "temperature": 0.7}], ids=["all", "top_k", "top_p"]
)
def test_sampled_answers_are_the_same(kind, prompts, how):
    model = model_of(kind)
    expected = generate(model, prompts, NEW, EOS, generator=generator(), **how)
    lengths = [len(r) for r in expected.responses]
    assert len(set(lengths)) > 4  # rows are dropped on the way
    assert_same(decode(model, prompts, NEW, EOS, generator=generator(), every=1, **how), expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("every", [1, 5, 16, 100])
def test_greedy_answers_are_the_same_however_seldom_one_looks(kind, every):
    model = model_of(kind)
    expected = generate(model, RAGGED, NEW, EOS, temperature=0)
    assert_same(decode(model, RAGGED, NEW, EOS, temperature=0, every=every), expected)


def test_batches_and_progress():
    seen, model = [], model_of("gpt")
    expected = generate(model, RAGGED, NEW, EOS, temperature=0, batch_size=4)
    found = decode(model, RAGGED, NEW, EOS, 0, batch_size=4, progress=seen.append)
    assert_same(found, expected)
    assert seen == [4, 8, 12, 13]
    assert decode(model, [], NEW, EOS).responses == []


def test_what_does_not_fit_is_refused():
    with pytest.raises(ModelError, match="exceed the context"):
        decode(tiny("gpt"), [[1] * 40], 30, EOS)
    with pytest.raises(ModelError, match="empty prompt"):
        decode(tiny("gpt"), [[]], 3, EOS)


@pytest.mark.parametrize("kind", KINDS)
def test_in_bf16_what_is_kept_between_steps_changes_no_bit(kind):
    model = tiny(kind).eval()
    model.compute_dtype = torch.bfloat16
    first = generate(model, EVEN, NEW, EOS, generator=generator())
    with torch.inference_mode(), casts_kept(model):
        again = generate(model, EVEN, NEW, EOS, generator=generator())
    assert (first.responses, first.logprobs) == (again.responses, again.logprobs)


def test_sliding_windows_are_left_to_generate():
    model = tiny("llama")
    assert fits(model)
    model.attention_kinds = {"sliding_attention"}
    assert not fits(model)


class Words:
    eos_token_id = EOS

    def batch_decode(self, ids):
        return ["" for _ in ids]


def test_a_rollout_on_a_gpu_takes_it_unless_a_student_wrote_generate(monkeypatch):
    calls = []
    monkeypatch.setattr(rollouts, "on_gpu", lambda model: True)
    monkeypatch.setattr(rollouts, "decode", lambda *a, **k: calls.append(k) or decode(*a, **k))
    tasks = [Task("", prompt) for prompt in EVEN]
    config = PPOConfig(max_new_tokens=6, generation_batch=5)
    arguments = (model_of("gpt"), tasks, Words(), config)
    answers = collect(*arguments, generator(), 48)
    assert len(answers.texts) == 13 and calls[0]["batch_size"] == 5

    def own(*args, **kwargs):
        return generate(*args, **kwargs)

    monkeypatch.setattr(rollouts, "generate", own)
    collect(*arguments, generator(), 48)
    assert len(calls) == 1
