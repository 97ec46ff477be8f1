"""The fast ways of sampling give the answers of `sampling.generate`, or others just as likely."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from rlhf_course import decoding
from rlhf_course.decoding import decode, draw, fits, pays
from rlhf_course.device import casts_kept
from rlhf_course.errors import ModelError, TrainingError
from rlhf_course.sampling import generate, sample_token
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
def test_sampled_answers_are_the_same(kind, prompts, how, monkeypatch):
    """With `generate`'s own draws, and rows that keep their order."""
    monkeypatch.setattr(decoding, "draw", lambda logits, t, g: sample_token(logits, t, generator=g))
    model = model_of(kind)
    expected = generate(model, prompts, NEW, EOS, generator=generator(), **how)
    lengths = [len(r) for r in expected.responses]
    assert len(set(lengths)) > 4  # rows are dropped on the way
    found = decode(model, prompts, NEW, EOS, generator=generator(), every=1, fixed=True, **how)
    assert_same(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixed", [False, True])
@pytest.mark.parametrize("every", [1, 5, 16, 100])
def test_greedy_answers_are_the_same_however_seldom_one_looks(kind, every, fixed):
    model = model_of(kind)
    expected = generate(model, RAGGED, NEW, EOS, temperature=0)
    found = decode(model, RAGGED, NEW, EOS, temperature=0, every=every, fixed=fixed)
    assert_same(found, expected)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("fixed", [False, True])
def test_each_prompt_may_have_its_own_limit(kind, fixed):
    """Rows leave in every order, and what the others say does not change; log-probs neither."""
    model = model_of(kind)
    limits = [1 + (11 * i) % NEW for i in range(len(RAGGED))]
    whole = generate(model, RAGGED, NEW, EOS, temperature=0)
    for size in (None, 5):
        found = decode(model, RAGGED, limits, EOS, temperature=0, fixed=fixed, batch_size=size)
        for i, limit in enumerate(limits):
            assert found.responses[i] == whole.responses[i][:limit]
            assert found.logprobs[i] == pytest.approx(whole.logprobs[i][:limit], abs=2e-5)
            assert found.finished[i] == (EOS in whole.responses[i][:limit])


def test_the_draws_are_of_sample_tokens_distribution():
    """Frequencies of 40,000 draws from each of two rows, within 5 standard errors."""
    torch.manual_seed(0)
    logits, many = torch.randn(2, 50), 40_000
    logits[0, 7] = -torch.inf
    logits[1, -1] = -torch.inf  # also the last, where rounding might end up
    expected = (logits / 0.7).softmax(-1)
    tokens, logprobs = draw(logits.repeat(many, 1), 0.7, generator())
    for row in range(2):
        shares = torch.bincount(tokens[row::2], minlength=50) / many
        error = (expected[row] * (1 - expected[row]) / many).sqrt()
        assert (shares - expected[row]).abs().le(5 * error).all()
    assert torch.allclose(logprobs[:2], expected.log()[range(2), tokens[:2]], atol=1e-5)
    assert not ((tokens[::2] == 7).any() or (tokens[1::2] == 49).any())


def test_a_draw_is_the_inverse_of_the_cumulative_distribution():
    logits = torch.randn(64, 5000, generator=generator())
    at = torch.rand(64, 1, generator=generator())
    tokens, _ = draw(logits, generator=generator())
    edges = logits.double().softmax(-1).cumsum(-1)
    before = torch.nn.functional.pad(edges, (1, 0))
    assert (before.gather(1, tokens[:, None]) <= at + 1e-5).all()
    assert (edges.gather(1, tokens[:, None]) >= at - 1e-5).all()


def test_rows_that_stay_in_their_place_are_not_copied():
    model = tiny("gpt")
    cache = model.new_cache(6, 8)
    cache.keys.copy_(torch.arange(6.0)[None, :, None, None, None].expand_as(cache.keys))
    cache.length, before = 3, cache.keys.data_ptr()
    cache.select(torch.tensor([0, 5, 2, 4]))
    assert cache.keys.data_ptr() == before and cache.keys.shape[1] == 4
    assert cache.keys[0, :, 0, :3, 0].tolist() == [[x] * 3 for x in (0.0, 5.0, 2.0, 4.0)]


class Casts(TorchDispatchMode):
    """Counts what is cast to bf16, by shape."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function is torch.ops.aten._to_copy.default:
            self.shapes.append(tuple(args[0].shape))
        return function(*args, **(kwargs or {}))


def test_a_rollout_casts_each_weight_once():
    model = tiny("gpt").eval()
    model.compute_dtype = torch.bfloat16
    weight = tuple(model.blocks[0].mlp.expand.weight.shape)
    with Casts() as casts:
        collect(model, [Task("", EVEN[0])], Words(), PPOConfig(max_new_tokens=6), generator(), 48)
    assert casts.shapes.count(weight) == len(model.blocks)


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
    with torch.no_grad(), casts_kept(model):
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


def test_limits_are_as_many_as_prompts():
    for limits in ([3] * 12, [3] * 14, []):
        with pytest.raises(ValueError, match="limits for 13 prompts"):
            decode(tiny("gpt"), RAGGED, limits, EOS)


def test_a_rollout_of_a_broken_model_says_so(monkeypatch):
    monkeypatch.setattr(rollouts, "pays", lambda model: True)
    model = tiny("gpt")
    with torch.no_grad():
        model.token_embedding.weight[2, 0] = torch.nan
    with pytest.raises(TrainingError, match="NaN or infinite"):
        collect(model, [Task("", EVEN[0])], Words(), PPOConfig(max_new_tokens=6), generator(), 48)


def test_it_pays_where_much_is_drawn():
    model = tiny("gpt")
    assert not pays(model)
    model.vocab_size = 1024
    assert pays(model)


def test_a_rollout_takes_it_where_it_pays_unless_a_student_wrote_generate(monkeypatch):
    calls = []
    monkeypatch.setattr(rollouts, "pays", lambda model: True)
    monkeypatch.setattr(rollouts, "decode", lambda *a, **k: calls.append(k) or decode(*a, **k))
    tasks = [Task("", prompt) for prompt in EVEN]
    config = PPOConfig(max_new_tokens=6, generation_batch=5)
    arguments = (model_of("gpt"), tasks, Words(), config)
    answers = collect(*arguments, generator(), 48)
    assert len(answers.texts) == 13 and calls[0]["batch_size"] == 5

    def own(*args, **kwargs):
        return generate(*args, **kwargs)

    for name in ("generate", "sample_token"):
        with monkeypatch.context() as patched:
            patched.setattr(rollouts, name, own)
            collect(*arguments, generator(), 48)
    assert len(calls) == 1
