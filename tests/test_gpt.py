"""Chapter 01: the network against transformers, attention and loss against loops, checkpoints."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import CONTEXT, VOCABULARY, tiny
from torch.autograd import gradcheck

from rlhf_course import gpt
from rlhf_course.errors import CheckpointError, ModelError
from rlhf_course.stages.presets import SHAPES, model_shape

DOUBLE = torch.float64


def close(actual, expected, tol):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol)


def draw(*shape, seed=0, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def tokens_of(rows, length, seed=0, vocabulary=VOCABULARY):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(vocabulary, (rows, length), generator=generator)


@pytest.fixture(scope="module")
def theirs():
    """A GPT-2 of transformers with the defaults of its config (dropout 0.1) and visible weights."""
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=24, n_embd=48, n_layer=3, n_head=3,
        layer_norm_epsilon=1e-3, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(1)
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.15 * torch.randn_like(parameter))
    return model


# --------------------------------------------------------- the same network as transformers' GPT-2


def test_what_we_save_opens_in_transformers_with_the_same_logits(tmp_path):
    from transformers import AutoModelForCausalLM

    model = tiny("gpt").eval()
    model.save_pretrained(tmp_path)
    other = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    assert type(other).__name__ == "GPT2LMHeadModel"
    assert other.lm_head.weight is other.transformer.wte.weight
    tokens = tokens_of(3, CONTEXT)
    with torch.no_grad():
        ours = model(tokens)
        close(ours, other(tokens).logits, 1e-5)
    assert ours.std() > 1
    c = other.config
    assert (c.vocab_size, c.n_positions, c.n_layer) == (VOCABULARY, CONTEXT, 2)
    assert (c.n_embd, c.n_head, c.layer_norm_epsilon) == (32, 2, 1e-5)
    assert c.activation_function == "gelu_new"
    assert c.resid_pdrop == c.embd_pdrop == c.attn_pdrop == 0
    assert c.eos_token_id is None


def test_the_gradients_are_those_of_transformers(theirs, tmp_path):
    theirs.save_pretrained(tmp_path)
    model = gpt.GPT.from_pretrained(tmp_path)
    tokens = tokens_of(3, 20)
    gpt.next_token_loss(model(tokens), tokens).backward()
    theirs.zero_grad()
    theirs(tokens, labels=tokens).loss.backward()
    gradients = gpt.GPT(model.config)  # holds them as weights, so that they can be renamed
    for place, parameter in zip(gradients.parameters(), model.parameters(), strict=True):
        place.data.copy_(parameter.grad)
    renamed, _ = gradients.to_huggingface()
    wanted = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert renamed.keys() == wanted.keys()
    for name, gradient in wanted.items():
        close(renamed[name], gradient, 1e-5)
    assert torch.cat([g.flatten() for g in wanted.values()]).norm() > 1


def save_plain(model, folder):
    model.save_pretrained(folder)


def save_sharded(model, folder):
    model.save_pretrained(folder, max_shard_size="50KB")
    assert len(list(folder.glob("model-*.safetensors"))) > 3


def save_backbone(model, folder):  # the names lack "transformer."
    model.transformer.save_pretrained(folder)
    assert "h.0.ln_1.bias" in load_file(folder / "model.safetensors")


def save_as_of_old(model, folder):  # with the tied head, and the causal masks as tensors
    model.save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"].clone()
    for layer in range(3):
        tensors[f"transformer.h.{layer}.attn.bias"] = torch.ones(1, 1, 24, 24).tril()
        tensors[f"transformer.h.{layer}.attn.masked_bias"] = torch.tensor(-1e4)
    save_file(tensors, folder / "model.safetensors")


@pytest.mark.parametrize("save", [save_plain, save_sharded, save_backbone, save_as_of_old])
def test_a_gpt2_of_transformers_opens_here_with_the_same_logits(theirs, tmp_path, save):
    save(theirs, tmp_path)
    model = gpt.GPT.from_pretrained(tmp_path)
    assert model.config == gpt.GPTConfig(
        VOCABULARY, context=24, layers=3, heads=3, width=48, dropout=0.0, layer_norm_eps=1e-3
    )
    assert (model.vocab_size, model.context, model.width) == (VOCABULARY, 24, 48)
    tokens = tokens_of(3, 24)
    with torch.no_grad():
        expected = theirs(tokens).logits
        close(model.train()(tokens), expected, 1e-5)
    assert expected.std() > 1


def test_saved_and_read_it_is_the_same_model(tmp_path):
    model = tiny("gpt")
    model.save_pretrained(tmp_path)
    again = gpt.GPT.from_pretrained(tmp_path)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(again.state_dict()[name], tensor), name
    assert f"width={model.width}" in repr(again)


def test_a_half_precision_checkpoint_becomes_float32(theirs, tmp_path):
    import copy

    copy.deepcopy(theirs).bfloat16().save_pretrained(tmp_path)
    model = gpt.GPT.from_pretrained(tmp_path)
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    close(model.token_embedding.weight, theirs.transformer.wte.weight.detach(), 1e-2)


OTHERS = {
    "model_type": "llama",
    "activation_function": "gelu",
    "tie_word_embeddings": False,
    "scale_attn_weights": False,
    "scale_attn_by_inverse_layer_idx": True,
}


@pytest.mark.parametrize("key", OTHERS)
def test_what_would_compute_other_logits_with_the_same_tensors_is_refused(tmp_path, key):
    tiny("gpt").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {key: OTHERS[key]}))
    with pytest.raises(CheckpointError, match=f"{key} is {OTHERS[key]!r}"):
        gpt.GPT.from_pretrained(tmp_path)


@pytest.mark.parametrize("key", ["model_type", "n_embd", "n_positions", "layer_norm_epsilon"])
def test_a_config_that_lacks_something_is_refused(tmp_path, key):
    tiny("gpt").save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    config = json.loads(file.read_text())
    del config[key]
    file.write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=f"{key} is missing"):
        gpt.GPT.from_pretrained(tmp_path)


def test_heads_share_the_width_evenly():
    with pytest.raises(ModelError, match="width 30 is not a multiple of heads 4"):
        gpt.GPTConfig(10, heads=4, width=30)


@pytest.mark.parametrize("size", SHAPES)
def test_every_size_has_heads_that_vllm_serves_on_a_cpu(size):
    config = model_shape(size, vocab_size=100, context=16)
    assert config.width // config.heads >= 32
    assert (config.vocab_size, config.context, config.dropout) == (100, 16, 0.0)


# -------------------------------------------------------------------------------------- attention


def attention_by_loops(q, k, v, may_look):
    """One query at a time; may_look(b, t, s) says which keys it sees."""
    out = torch.zeros_like(q)
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for t in range(q.shape[2]):
                seen = [s for s in range(k.shape[2]) if may_look(b, t, s)]
                scores = torch.stack([q[b, h, t] @ k[b, h, s] for s in seen])
                weights = (scores / math.sqrt(q.shape[3])).exp()
                out[b, h, t] = (weights / weights.sum()) @ v[b, h, seen]
    return out


@pytest.mark.parametrize(("T", "S"), [(5, 5), (2, 2), (3, 5), (1, 5), (1, 1)])
def test_attention_is_causal_softmax_attention(T, S):
    q, k, v = draw(2, 2, T, 4, seed=1), draw(2, 2, S, 4, seed=2), draw(2, 2, S, 4, seed=3)
    expected = attention_by_loops(q, k, v, lambda b, t, s: s <= S - T + t)
    close(gpt.causal_attention(q, k, v), expected, 1e-12)


def test_attention_takes_a_mask_in_place_of_the_causal_rule():
    q, k, v = draw(2, 2, 3, 4, seed=1), draw(2, 2, 5, 4, seed=2), draw(2, 2, 5, 4, seed=3)
    attend = torch.rand(2, 1, 3, 5, generator=torch.Generator().manual_seed(0)) < 0.5
    attend[..., 0] = True
    expected = attention_by_loops(q, k, v, lambda b, t, s: attend[b, 0, t, s])
    close(gpt.causal_attention(q, k, v, attend), expected, 1e-12)
    close(gpt.causal_attention(q[:, :, :1], k, v, attend[:, :, :1]), expected[:, :, :1], 1e-12)


@pytest.mark.parametrize("T", [4, 2, 1])
def test_attention_has_the_gradient_of_the_loop(T):
    inputs = [draw(1, 2, n, 3, seed=n + i).requires_grad_() for i, n in enumerate((T, 4, 4))]
    weights = draw(1, 2, T, 3, seed=9)
    ours = torch.autograd.grad((gpt.causal_attention(*inputs) * weights).sum(), inputs)
    by_loops = attention_by_loops(*inputs, lambda b, t, s: s <= 4 - T + t)
    for a, b in zip(ours, torch.autograd.grad((by_loops * weights).sum(), inputs), strict=True):
        close(a, b, 1e-12)
    assert gradcheck(gpt.causal_attention, inputs)


def test_attention_dropout_is_what_it_is_told():
    q, k, v = (draw(1, 2, 6, 4, seed=i) for i in range(3))
    torch.manual_seed(0)
    dropped = gpt.causal_attention(q, k, v, dropout=0.5)
    assert (dropped - gpt.causal_attention(q, k, v)).abs().max() > 0.1
    assert torch.equal(gpt.causal_attention(q, k, v), gpt.causal_attention(q, k, v, dropout=0.0))


# ------------------------------------------------------------------------------ block and network


def small_block():
    torch.manual_seed(2)
    config = gpt.GPTConfig(7, context=8, layers=1, heads=2, width=6, layer_norm_eps=1e-3)
    block = gpt.Block(config).double()
    for parameter in block.parameters():
        parameter.data.add_(0.5 * torch.randn_like(parameter))
    return block


def test_a_block_adds_attention_then_mlp_each_behind_its_norm():
    block, x = small_block(), draw(2, 4, 6)

    def norm(layer, x):
        variance = x.var(dim=-1, correction=0, keepdim=True)
        scaled = (x - x.mean(dim=-1, keepdim=True)) / (variance + 1e-3).sqrt()
        return scaled * layer.weight + layer.bias

    def linear(layer, x):
        return x @ layer.weight.T + layer.bias

    q, k, v = linear(block.attention.qkv, norm(block.norm_1, x)).split(6, dim=-1)  # (B, T, D)
    heads = [t.unflatten(-1, (2, 3)).transpose(1, 2) for t in (q, k, v)]  # (B, H, T, d)
    seen = attention_by_loops(*heads, lambda b, t, s: s <= t).transpose(1, 2).flatten(2)
    middle = x + linear(block.attention.project, seen)
    wide = linear(block.mlp.expand, norm(block.norm_2, middle))
    gelu = 0.5 * wide * (1 + torch.tanh(math.sqrt(2 / math.pi) * (wide + 0.044715 * wide**3)))
    close(block(x), middle + linear(block.mlp.contract, gelu), 1e-12)
    assert wide.shape[-1] == 4 * 6


def test_a_block_has_the_gradient_of_finite_differences():
    block = small_block()
    assert gradcheck(block, draw(1, 3, 6).requires_grad_())


def test_a_token_changes_nothing_before_it():
    model, tokens = tiny("gpt").eval(), tokens_of(2, 20)
    changed = tokens.clone()
    changed[:, 12] = (changed[:, 12] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model(tokens), model(changed)
    assert torch.equal(before[:, :12], after[:, :12])
    assert ((before - after).abs().amax(dim=-1)[:, 12:] > 1e-3).all()


def test_the_cache_says_what_the_whole_sequence_says():
    model, tokens = tiny("gpt").eval(), tokens_of(3, 20)
    with torch.no_grad():
        whole = model(tokens)
        cache = model.new_cache(3, 20)
        parts = [model(tokens[:, :7], cache=cache), model(tokens[:, 7:12], cache=cache)]
        parts += [model(tokens[:, t : t + 1], cache=cache) for t in range(12, 15)]
        close(torch.cat(parts, dim=1), whole[:, :15], 1e-5)
        assert cache.length == 15
        cache.select(torch.tensor([2, 0]))
        close(model(tokens[[2, 0], 15:], cache=cache), whole[[2, 0], 15:], 1e-5)


def test_two_sequences_in_one_row_do_not_see_each_other():
    model = tiny("gpt").eval()
    a, b = tokens_of(1, 9, seed=1), tokens_of(1, 6, seed=2)
    segments = torch.tensor([0] * 9 + [1] * 6)
    attend = (segments[:, None] == segments).tril()[None, None]  # (1, 1, T, T)
    positions = torch.cat([torch.arange(9), torch.arange(6)])[None]
    with torch.no_grad():
        packed = model(torch.cat([a, b], dim=1), attend, positions)
        close(packed, torch.cat([model(a), model(b)], dim=1), 1e-5)
        leaking = model(torch.cat([a, b], dim=1), None, positions)
        unshifted = model(torch.cat([a, b], dim=1), attend)
    for wrong in (leaking, unshifted):
        assert (wrong - packed)[:, 9:].abs().max() > 0.1


def test_positions_matter():
    model, same = tiny("gpt").eval(), torch.full((1, 5), 3)
    with torch.no_grad():
        logits = model(same)
    assert (logits[0, 1:] - logits[0, :1]).abs().amax(dim=-1).min() > 0.1


def test_more_than_the_context_is_refused_and_the_whole_context_is_not():
    model = tiny("gpt").eval()
    model(tokens_of(1, CONTEXT))
    with pytest.raises(ModelError, match=f"{CONTEXT + 1} tokens .* context of {CONTEXT}"):
        model(tokens_of(1, CONTEXT + 1))
    cache = model.new_cache(1, CONTEXT + 1)
    model(tokens_of(1, CONTEXT), cache=cache)
    with pytest.raises(ModelError, match=f"{CONTEXT + 1} tokens"):
        model(tokens_of(1, 1), cache=cache)


def test_no_dropout_by_default_and_dropout_where_it_is_asked_for():
    tokens = tokens_of(2, 10)
    assert gpt.GPTConfig(10).dropout == 0
    still = tiny("gpt").train()
    assert torch.equal(still(tokens), still(tokens))
    config = gpt.GPTConfig(VOCABULARY, CONTEXT, layers=2, heads=2, width=32, dropout=0.3)
    model = gpt.GPT(config)
    model.load_state_dict(still.state_dict())
    with torch.no_grad():
        close(model.eval()(tokens), still(tokens), 1e-6)
        assert (model.train()(tokens) - model(tokens)).abs().max() > 0.5
    # It acts on the embeddings, on both sub-layers' outputs, and on the attention's weights.
    block, x = model.blocks[0].train(), draw(2, 5, 32, dtype=torch.float32)
    seen = []
    for module in (model.drop, block.drop):
        module.register_forward_hook(lambda module, args, out: seen.append((out == 0).float()))
    with torch.no_grad():
        block(x)
        model(tokens)
    assert len(seen) == 2 + 1 + 2
    assert 0.2 < torch.cat([s.flatten() for s in seen]).mean() < 0.4
    torch.manual_seed(0)
    weighed = block.attention(x)
    assert (weighed - block.attention(x)).abs().max() > 0.01
    block.eval()
    assert torch.equal(block.attention(x), block.attention(x))


def test_fresh_weights_are_gpt2s():
    torch.manual_seed(0)
    model = gpt.GPT(gpt.GPTConfig(300, context=64, layers=3, heads=4, width=128))
    matrices = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            into_stream = "attention.project" in name or "mlp.contract" in name
            std = 0.02 / math.sqrt(6) if into_stream else 0.02
            assert abs(parameter.std().item() / std - 1) < 0.05, name
            assert abs(parameter.mean().item()) < 0.05 * std
            matrices += 1
        elif name.endswith("bias"):
            assert not parameter.any(), name
        else:
            assert (parameter == 1).all(), name
    assert matrices == 2 + 3 * 4


def test_bfloat16_products_change_little_and_float64_nothing():
    model, tokens = tiny("gpt").eval(), tokens_of(2, 16)
    with torch.no_grad():
        exact = model(tokens)
        model.compute_dtype = torch.bfloat16
        rough = model(tokens)
        cache = model.new_cache(2, 16)
        steps = [model(tokens[:, t : t + 1], cache=cache) for t in range(16)]
        assert rough.dtype == torch.float32
        assert 1e-4 < (rough - exact).abs().max() < 0.05 * exact.std()
        close(torch.cat(steps, dim=1), rough, 0.05 * exact.std().item())
        model.compute_dtype = None
        fine = model.double()(tokens)
        assert fine.dtype == torch.float64
        close(fine.float(), exact, 1e-4)
        cache = model.new_cache(2, 16)
        steps = [model(tokens[:, t : t + 1], cache=cache) for t in range(16)]
    close(torch.cat(steps, dim=1), fine, 1e-12)


def test_on_a_cpu_attention_stays_in_float32(monkeypatch):
    model, seen, attention = tiny("gpt").eval(), [], gpt.causal_attention

    def spy(q, k, v, *rest):
        out = attention(q, k, v, *rest)
        seen.extend(t.dtype for t in (q, k, v, out))
        return out

    monkeypatch.setattr(gpt, "causal_attention", spy)
    model.compute_dtype = torch.bfloat16
    model(tokens_of(1, 4))
    assert set(seen) == {torch.float32}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_on_a_gpu_the_logits_are_those_of_the_cpu(dtype):
    model, tokens = tiny("gpt").eval(), tokens_of(2, 16)
    expected = model(tokens)
    model.to("cuda").compute_dtype = dtype
    cache = model.new_cache(2, 16)
    tolerance = 1e-3 if dtype is None else 0.2 * expected.std().item()
    whole = model(tokens.cuda()).cpu()
    steps = [model(tokens[:, t : t + 1].cuda(), cache=cache).cpu() for t in range(16)]
    close(whole, expected, tolerance)
    close(torch.cat(steps, dim=1), whole, tolerance)


# ------------------------------------------------------------------------------------------- loss


def test_the_loss_is_the_mean_over_the_counted_next_tokens():
    logits, labels = draw(3, 5, 7), tokens_of(3, 5, vocabulary=7)
    labels[0, 2:] = -100
    labels[1, 0] = -100  # the first label is never asked for
    terms = []
    for b in range(3):
        for t in range(4):
            if labels[b, t + 1] != -100:
                exponentials = logits[b, t].exp()
                terms.append(-(exponentials[labels[b, t + 1]] / exponentials.sum()).log())
    assert len(terms) == 1 + 4 + 4
    close(gpt.next_token_loss(logits, labels), torch.stack(terms).mean(), 1e-12)
    other = torch.where(labels == -100, 6, labels)
    assert gpt.next_token_loss(logits, other) != gpt.next_token_loss(logits, labels)
    marked = torch.where(labels == -100, 3, labels)
    counted = (marked[:, 1:] != 3).sum()
    kept = gpt.next_token_loss(logits, marked, ignore=3) * counted
    by_hand = -logits[:, :-1].log_softmax(-1).gather(-1, marked[:, 1:, None])[..., 0]
    close(kept, by_hand[marked[:, 1:] != 3].sum(), 1e-12)


def test_the_loss_has_the_gradient_softmax_less_one_hot():
    logits, labels = draw(2, 4, 5).requires_grad_(), tokens_of(2, 4, vocabulary=5)
    labels[1, 2] = -100
    gpt.next_token_loss(logits, labels).backward()
    counted = (labels[:, 1:] != -100).double()[..., None]
    one_hot = torch.nn.functional.one_hot(labels[:, 1:].clamp(min=0), 5)
    expected = (logits.detach()[:, :-1].softmax(-1) - one_hot) * counted / 5
    close(logits.grad[:, :-1], expected, 1e-12)
    assert not logits.grad[:, -1].any()
    assert gradcheck(gpt.next_token_loss, (logits, labels))


def test_the_loss_of_nothing_is_zero():
    logits = draw(2, 3, 5).requires_grad_()
    loss = gpt.next_token_loss(logits, torch.full((2, 3), -100))
    loss.backward()
    assert loss == 0
    assert not logits.grad.any()
    assert gpt.next_token_loss(logits[:, :1], torch.zeros(2, 1, dtype=torch.long)) == 0


def test_the_loss_of_a_uniform_guess_is_the_logarithm_of_the_vocabulary():
    loss = gpt.next_token_loss(torch.zeros(2, 6, 50, dtype=DOUBLE), tokens_of(2, 6, vocabulary=50))
    assert abs(loss.item() - math.log(50)) < 1e-12
