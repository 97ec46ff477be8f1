"""Our GPT in oneDNN's layout: the same answers, and only where it may stand in."""

import platform

import pytest
import torch
from torch import nn

from rlhf_course import decoding, gpt, onednn_gpt, padding
from rlhf_course.coursework.substitute import substituted
from rlhf_course.decoding import Growing, decode
from rlhf_course.gpt import GPT, GPTConfig
from rlhf_course.onednn_gpt import OneDNNGPT, suits
from rlhf_course.recompute import checkpoint_blocks
from rlhf_course.sampling import LeftPadded, generate
from tests.tiny_models import tiny

SHAPE = GPTConfig(vocab_size=96, context=64, layers=3, heads=4, width=32)
RAGGED = [[1 + (i * 7 + 3 * j) % 95 for j in range(1 + (5 * i) % 23)] for i in range(11)]
EVEN = [row[:1] * 6 for row in RAGGED]
SHORT = [row[:1] for row in RAGGED]
NEVER = -2

if not suits(GPT(SHAPE)):
    pytest.skip("PyTorch has no oneDNN kernels for this machine", allow_module_level=True)


def model_of(dtype=None):
    """Weights as large as in `tests.tiny_models`: attention tells one token from another."""
    torch.manual_seed(3)
    model = GPT(SHAPE).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 2:
                parameter.normal_(std=0.3)
            else:
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.compute_dtype = dtype
    return model


@torch.no_grad()
def logits_of(model, prompts, steps=7, leave=()):
    """What `Growing` reads, behind the prompts and after each of some tokens: (1 + steps, B, V).
    leave: {step: rows that go on}."""
    writer, out = Growing(model, prompts, steps, "cpu"), []
    rows = torch.arange(len(prompts))
    whole = torch.zeros(len(prompts), SHAPE.vocab_size)
    for step in range(steps + 1):
        logits = writer.logits if step == 0 else writer.step((rows * 5 + step) % 90)
        out.append(whole.index_copy(0, rows, logits))
        if step in dict(leave):
            rows = rows[writer.select(torch.tensor(dict(leave)[step]))]
    return torch.stack(out), writer


@pytest.fixture
def plainly(monkeypatch):
    """plainly(function, ...): with nothing standing in for the model."""

    def call(function, *args, **kwargs):
        with monkeypatch.context() as patch:
            patch.setattr(decoding, "suits", lambda model: False)
            return function(*args, **kwargs)

    return call


@pytest.mark.parametrize("prompts", [RAGGED, EVEN, SHORT], ids=["ragged", "even", "short"])
@pytest.mark.parametrize("tokens", [2048, 32], ids=["one part", "parts"])
def test_it_computes_what_the_model_computes(prompts, tokens, plainly, monkeypatch):
    monkeypatch.setattr(padding, "CPU_TOKENS", tokens)
    leave = {2: [0, 1, 3, 4, 8, 10], 5: [1, 4, 5]}
    ours, writer = logits_of(model_of(), prompts, leave=leave)
    theirs, plain = plainly(logits_of, model_of(), prompts, leave=leave)
    assert type(writer.model) is OneDNNGPT and type(plain.model) is GPT
    assert theirs.std() > 1
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-5)


def test_bf16_is_no_further_from_the_truth_than_the_models_own(plainly):
    truth, _ = plainly(logits_of, model_of(), RAGGED)
    plain, _ = plainly(logits_of, model_of(torch.bfloat16), RAGGED)
    ours, writer = logits_of(model_of(torch.bfloat16), RAGGED)
    assert (writer.cache.keys.dtype, writer.cache.values.dtype) == (torch.float32, torch.bfloat16)
    error, usual = (ours - truth).square().mean().sqrt(), (plain - truth).square().mean().sqrt()
    assert 0 < usual < 0.05 * truth.std()
    assert 0 < error < 1.3 * usual


@pytest.mark.parametrize("prompts", [RAGGED, EVEN], ids=["ragged", "even"])
def test_columns_that_are_read_before_they_are_written_change_nothing(prompts, monkeypatch):
    """bf16 kernels are compiled for each number of columns, so few numbers occur."""
    seen, attention = [], OneDNNGPT._attention

    def watch(self, q, keys, *rest):
        seen.append(keys.shape[1])
        return attention(self, q, keys, *rest)

    monkeypatch.setattr(OneDNNGPT, "_attention", watch)
    monkeypatch.setattr(onednn_gpt, "COLUMNS", {torch.float32: 1, torch.bfloat16: 1})
    each, _ = logits_of(model_of(torch.bfloat16), prompts, steps=12)
    start = max(map(len, prompts)) + 1
    assert sorted(set(seen)) == list(range(start, start + 12))
    seen.clear()
    monkeypatch.setattr(onednn_gpt, "COLUMNS", {torch.float32: 1, torch.bfloat16: 8})
    few, writer = logits_of(model_of(torch.bfloat16), prompts, steps=12)
    end = writer.cache.keys.shape[-2]
    assert set(seen) == {min(8 * -(-n // 8), end) for n in range(start, start + 12)}
    torch.testing.assert_close(few, each, rtol=0, atol=2e-5)


@pytest.mark.parametrize("prompts", [RAGGED, EVEN], ids=["ragged", "even"])
def test_the_likeliest_answers_are_those_of_generate(prompts):
    model, eos = model_of(), 7
    ours = decode(model, prompts, 24, eos, temperature=0)
    theirs = generate(model, prompts, 24, eos, temperature=0)
    assert ours.responses == theirs.responses and len(set(map(tuple, ours.responses))) > 5
    for a, b in zip(ours.logprobs, theirs.logprobs, strict=True):
        assert a == pytest.approx(b, abs=2e-5)


def test_prompts_of_like_length_share_a_part(monkeypatch):
    monkeypatch.setattr(padding, "CPU_TOKENS", 32)
    model, seen = model_of(), []
    whole, standing_in = LeftPadded(RAGGED, "cpu"), OneDNNGPT(model, len(RAGGED))

    def hidden_states(tokens, *rest):
        seen.append(tokens.shape)
        return GPT.hidden_states(model, tokens, *rest)

    monkeypatch.setattr(model, "hidden_states", hidden_states)
    with torch.no_grad():
        standing_in._prompts(*whole.prompts(), standing_in.new_cache(len(RAGGED), 30))
    assert sum(rows for rows, _ in seen) == len(RAGGED)
    assert all(rows * columns <= 32 for rows, columns in seen if rows > 1)
    assert sum(rows * columns for rows, columns in seen) < 0.7 * whole.tokens.numel()


def test_weights_that_have_changed_are_laid_out_anew():
    model = model_of()
    before = decode(model, RAGGED, 8, NEVER, temperature=0)
    with torch.no_grad():
        model.blocks[1].mlp.expand.weight.neg_()
        model.token_embedding.weight.mul_(0.5)
    after = decode(model, RAGGED, 8, NEVER, temperature=0)
    assert after.responses == generate(model, RAGGED, 8, NEVER, temperature=0).responses
    assert after.responses != before.responses


def test_each_row_stands_for_itself():
    whole, _ = logits_of(model_of(), RAGGED)
    for row in (0, 4, 9):
        alone = Growing(model_of(), [RAGGED[row]], 7, "cpu")
        with torch.no_grad():
            for step in range(8):
                token = torch.tensor([(row * 5 + step) % 90])
                logits = alone.logits if step == 0 else alone.step(token)
                torch.testing.assert_close(logits[0], whole[step, row], rtol=0, atol=2e-5)


# ------------------------------------------------------------------------------- where it may not


class Block(gpt.Block):
    """A student's."""

    def forward(self, x, attend=None, cache=None, layer=0):
        return 0.5 * super().forward(x, attend, cache, layer)


def of(change):
    model = GPT(SHAPE)
    change(model)
    return model


def students_block(model):
    model.blocks[1] = Block(SHAPE)


def another_unembed(model):
    model.unembed = lambda hidden: hidden


class Louder(GPT):
    """Reads as ours does, and says something else."""

    def unembed(self, hidden):
        return 2 * super().unembed(hidden)


UNSUITED = {
    "float64": lambda m: m.double(),
    "weights in bf16": lambda m: m.bfloat16(),
    "products in fp16": lambda m: setattr(m, "compute_dtype", torch.float16),
    "a student's block": students_block,
    "another activation": lambda m: setattr(m.blocks[0].mlp, "expand", nn.Sequential(nn.SiLU())),
    "a function in the object": another_unembed,
    "a hook": lambda m: m.blocks[0].mlp.register_forward_hook(lambda *_: None),
    "a hook before": lambda m: m.final_norm.register_forward_pre_hook(lambda *_: None),
    "recomputed blocks": checkpoint_blocks,
}


@pytest.mark.parametrize("change", UNSUITED.values(), ids=list(UNSUITED))
def test_nothing_stands_in_for(change):
    assert suits(GPT(SHAPE))
    assert not suits(of(change))


def test_nothing_stands_in_for_a_class_of_ones_own():
    assert not suits(Louder(SHAPE))


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_nothing_stands_in_for_another_architecture(kind):
    assert not suits(tiny(kind))


def test_a_students_attention_writes_the_answers():
    """Through `substituted`, as `lab.train(own=[…])` does; theirs looks at itself alone."""

    def causal_attention(q, k, v, attend=None, dropout=0.0):
        return v[:, :, -q.shape[2] :]

    model = model_of()
    ours = decode(model, RAGGED, 8, NEVER, temperature=0)
    with substituted([causal_attention]):
        assert not suits(model)
        theirs = decode(model, RAGGED, 8, NEVER, temperature=0)
    assert suits(model) and theirs.responses != ours.responses


def test_other_machines_read_as_the_model_does(monkeypatch):
    with monkeypatch.context() as patch:
        patch.setattr(platform, "machine", lambda: "arm64")
        assert not suits(GPT(SHAPE))
    with monkeypatch.context() as patch:
        patch.setattr(onednn_gpt, "LINEAR", "not_there")
        assert not suits(GPT(SHAPE))
    assert suits(GPT(SHAPE))
