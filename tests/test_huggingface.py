"""Any causal language model of transformers behind the methods of our GPT."""

import json

import pytest
import torch
from tiny_models import CONTEXT, VOCABULARY, WIDTH, tiny

from rlhf_course.errors import CheckpointError, ModelError
from rlhf_course.gpt import GPT, next_token_loss
from rlhf_course.huggingface import (
    HuggingFaceLM,
    _checked,
    load_causal_lm,
    load_language_model,
    load_tokenizer,
)
from rlhf_course.reward_model import ScalarModel
from rlhf_course.sampling import generate


def close(actual, expected, tol):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol)


def tokens_of(rows, length, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(VOCABULARY, (rows, length), generator=generator)


SHAPE = {
    "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "hidden_size": WIDTH,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None, "pad_token_id": None,
}  # fmt: skip


def of_transformers(name, **settings):
    """A tiny random `{name}ForCausalLM` with visible weights."""
    import transformers

    return made_from(getattr(transformers, f"{name}Config")(**{**SHAPE, **settings}))


def made_from(config):
    """The causal language model of a configuration."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(3)
    model = AutoModelForCausalLM.from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.2 * torch.randn_like(parameter))
    return model


SOFT_CAP = {"head_dim": 16, "final_logit_softcapping": 3.0, "query_pre_attn_scalar": 16}
SCALED = {  # what stands between the hidden states and the logits differs
    "Llama": {},
    "Qwen2": {"tie_word_embeddings": True},
    "Gemma2": SOFT_CAP,
    "Granite": {"logits_scaling": 4.0},
    "Cohere": {"logit_scale": 0.25},
    "Phi": {},  # its output matrix has a bias
}


# ------------------------------------------------------------------------------ the same numbers


@pytest.mark.parametrize("name", SCALED)
def test_hidden_states_and_unembed_make_the_models_own_logits(name):
    theirs = of_transformers(name, **SCALED[name])
    ours, tokens = HuggingFaceLM(theirs), tokens_of(3, 20)
    assert (ours.width, ours.context, ours.vocab_size) == (WIDTH, CONTEXT, VOCABULARY)
    with torch.no_grad():
        expected = theirs(tokens).logits
        hidden = ours.hidden_states(tokens)
        assert hidden.shape == (3, 20, WIDTH)
        close(ours(tokens), expected, 1e-5)
        close(ours.unembed(hidden[1, 4:9]), expected[1, 4:9], 1e-5)
    assert expected.std() > 0.1


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_the_gradient_is_the_models_own(kind):
    ours, tokens = tiny(kind), tokens_of(2, 12)
    next_token_loss(ours(tokens), tokens).backward()
    got = {name: p.grad.clone() for name, p in ours.model.named_parameters()}
    ours.zero_grad()
    ours.model(tokens, labels=tokens).loss.backward()
    for name, parameter in ours.model.named_parameters():
        close(got[name], parameter.grad, 1e-5)
    assert sum(g.norm() ** 2 for g in got.values()) > 0.1


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_a_mask_and_positions_keep_two_sequences_apart(kind):
    model = tiny(kind).eval()
    a, b = tokens_of(1, 9, seed=1), tokens_of(1, 6, seed=2)
    segments = torch.tensor([0] * 9 + [1] * 6)
    attend = (segments[:, None] == segments).tril()[None, None]  # (1, 1, T, T)
    positions = torch.cat([torch.arange(9), torch.arange(6)])[None]
    row = torch.cat([a, b], dim=1)
    with torch.no_grad():
        apart = torch.cat([model(a), model(b)], dim=1)
        close(model(row, attend, positions), apart, 1e-5)
        assert (model(row) - apart)[:, 9:].abs().max() > 0.1
        model.compute_dtype = torch.bfloat16
        rough = model(row, attend, positions)
    assert rough.dtype == torch.float32
    assert 1e-4 < (rough - apart).abs().max() < 0.1 * apart.std()


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_positions_are_heeded(kind):
    model, tokens = tiny(kind).eval(), tokens_of(2, 8)
    everywhere = torch.ones(1, 1, 8, 8, dtype=torch.bool).tril()
    with torch.no_grad():
        plain = model(tokens, everywhere)
        close(plain, model(tokens), 1e-5)
        # Rotary positions are relative: shifted they say the same, stretched they do not.
        close(model(tokens, everywhere, torch.arange(5, 13)[None]), plain, 1e-4)
        stretched = model(tokens, everywhere, 3 * torch.arange(8)[None])
    assert (stretched - plain).abs().max() > 0.1


@pytest.mark.parametrize("name", ["Llama", "Qwen2", "Gemma2"])
def test_the_cache_says_what_the_whole_sequence_says(name):
    model, tokens = HuggingFaceLM(of_transformers(name, **SCALED[name])), tokens_of(3, 16)
    with torch.no_grad():
        whole = model(tokens)
        cache = model.new_cache(3, 16)
        parts = [model(tokens[:, :7], cache=cache), model(tokens[:, 7:10], cache=cache)]
        close(torch.cat(parts, dim=1), whole[:, :10], 1e-5)
        assert cache.length == 10
        cache.select(torch.tensor([2, 0]))
        steps = [model(tokens[[2, 0], t : t + 1], cache=cache) for t in range(10, 16)]
    close(torch.cat(steps, dim=1), whole[[2, 0], 10:], 1e-5)


def test_more_than_the_context_is_refused_and_the_whole_context_is_not():
    model = tiny("llama").eval()
    model(tokens_of(1, CONTEXT))
    with pytest.raises(ModelError, match=f"{CONTEXT + 1} tokens .* context of {CONTEXT}"):
        model(tokens_of(1, CONTEXT + 1))
    cache = model.new_cache(1, CONTEXT)
    model(tokens_of(1, CONTEXT), cache=cache)
    with pytest.raises(ModelError, match=f"{CONTEXT + 1} tokens"):
        model(tokens_of(1, 1), cache=cache)


def windowed(name):
    """A model whose layers, or some of them, look back at 6 tokens at most."""
    more = {
        "Mistral": {},
        "Gemma2": SOFT_CAP,  # every second layer
        "Gemma3": {"head_dim": 16, "layer_types": ["sliding_attention", "full_attention"]},
        "Qwen2": {"use_sliding_window": True, "max_window_layers": 1},
    }[name]
    if name == "Gemma3":
        import transformers

        config = transformers.Gemma3TextConfig(**{**SHAPE, **more, "sliding_window": 6})
        return made_from(config)
    return of_transformers(name, sliding_window=6, **more)


@pytest.mark.parametrize("name", ["Mistral", "Gemma2", "Gemma3", "Qwen2"])
def test_under_a_mask_of_ours_a_sliding_window_stays_one(name):
    theirs = windowed(name)
    model, tokens = HuggingFaceLM(theirs), tokens_of(2, 14)
    causal = torch.ones(1, 1, 14, 14, dtype=torch.bool).tril()
    with torch.no_grad():
        expected = theirs(tokens).logits
        close(model(tokens), expected, 1e-5)
        close(model(tokens, causal), expected, 1e-5)
        # Packed: two sequences in a row, each as if alone.
        segments = torch.tensor([0] * 5 + [1] * 9)
        apart = (segments[:, None] == segments).tril()[None, None]
        positions = torch.cat([torch.arange(5), torch.arange(9)])[None]
        close(model(tokens, apart, positions)[:, 5:], theirs(tokens[:, 5:]).logits, 1e-5)
        full = HuggingFaceLM(theirs)
        full.window = CONTEXT  # what a mask without the window would do
        assert (full(tokens, causal) - expected).abs().max() > 0.01


@pytest.mark.parametrize("name", ["Mistral", "Gemma2", "Gemma3", "Qwen2"])
def test_ragged_prompts_are_answered_beyond_the_window_as_each_alone(name):
    model = HuggingFaceLM(windowed(name))
    prompts = [tokens_of(1, n, seed=n)[0].tolist() for n in (3, 11, 8)]
    together = generate(model, prompts, 9, -1, temperature=0)
    alone = [generate(model, [prompt], 9, -1, temperature=0) for prompt in prompts]
    assert together.responses == [one.responses[0] for one in alone]
    for prompt, response in zip(prompts, together.responses, strict=True):
        with torch.no_grad():
            whole = model.model(torch.tensor([prompt + response])).logits[0]
        assert whole[len(prompt) - 1 : -1].argmax(-1).tolist() == response


def test_layers_of_an_unknown_kind_are_refused(tmp_path):
    folder = tmp_path / "model"
    of_transformers("Qwen2").save_pretrained(folder)
    model = load_causal_lm(folder, "here")
    model.attention_kinds = {"full_attention", "linear_attention"}
    with pytest.raises(ModelError, match="layers of the kind linear_attention"):
        _checked(model, "here")


# ------------------------------------------------------------------------------------- dropout


def test_dropout_is_refused_when_wrapped_and_set_to_0_when_loaded(tmp_path):
    theirs = of_transformers("Llama", attention_dropout=0.3)
    with pytest.raises(ModelError, match=r"attention_dropout is 0\.3"):
        HuggingFaceLM(theirs)
    theirs.save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path, "here").train()
    tokens = tokens_of(2, 10)
    with torch.no_grad():
        assert torch.equal(model(tokens), model(tokens))
        close(model(tokens), theirs(tokens).logits, 1e-5)


# ----------------------------------------------------------------------------- save and load


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_what_is_saved_opens_again_here_and_in_transformers(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    model, tokens = tiny(kind).eval(), tokens_of(2, 12)
    model.save_pretrained(tmp_path)
    again = load_causal_lm(tmp_path, "here")
    assert type(again) is HuggingFaceLM
    plain = AutoModelForCausalLM.from_pretrained(tmp_path)
    with torch.no_grad():
        expected = model(tokens)
        assert torch.equal(again(tokens), expected)
        close(plain(tokens).logits, expected, 1e-5)
    head, embedding = again.model.lm_head.weight, again.model.get_input_embeddings().weight
    assert (head is embedding) == (kind == "qwen2")


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
def test_shards_are_put_together(kind, tmp_path):
    model, tokens = tiny(kind).eval(), tokens_of(2, 12)
    model.model.save_pretrained(tmp_path, max_shard_size="10KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    assert torch.equal(load_causal_lm(tmp_path, "here")(tokens), model(tokens))


def test_the_language_model_of_one_that_sees_is_taken(tmp_path):
    from transformers import AutoModelForCausalLM, Gemma3Config, Gemma3ForConditionalGeneration

    text = {**SHAPE, "head_dim": 16, "sliding_window": 6}
    sight = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1,
             "num_attention_heads": 2, "image_size": 28, "patch_size": 14}  # fmt: skip
    torch.manual_seed(0)
    theirs = Gemma3ForConditionalGeneration(
        Gemma3Config(text_config=text, vision_config=sight, mm_tokens_per_image=4)
    ).eval()
    for parameter in theirs.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    theirs.save_pretrained(tmp_path / "sees")
    model, tokens = load_causal_lm(tmp_path / "sees", "here"), tokens_of(2, 12)
    assert sum(p.numel() for p in model.parameters()) < sum(p.numel() for p in theirs.parameters())
    with torch.no_grad():
        expected = theirs(tokens).logits
        close(model(tokens), expected, 1e-5)
        model.save_pretrained(tmp_path / "reads")
        plain = AutoModelForCausalLM.from_pretrained(tmp_path / "reads")
        assert type(plain).__name__ == "Gemma3ForCausalLM"
        close(plain(tokens).logits, expected, 1e-5)


def test_settings_of_generation_that_contradict_themselves_do_not_hinder_saving(tmp_path):
    model = tiny("llama")
    model.save_pretrained(tmp_path / "base")
    file = tmp_path / "base" / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": [5, 6], "do_sample": False, "temperature": 0.6}))
    again = load_causal_lm(tmp_path / "base", "here")
    again.save_pretrained(tmp_path / "out")
    saved = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert saved["eos_token_id"] == [5, 6] and "temperature" not in saved


def test_half_precision_becomes_float32(tmp_path):
    model = tiny("llama")
    wanted = model.model.lm_head.weight.detach().bfloat16().float()
    model.model.bfloat16().save_pretrained(tmp_path)
    again = load_causal_lm(tmp_path, "here")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    assert torch.equal(again.model.lm_head.weight, wanted)


def test_half_precision_weights_give_float32_hidden_states_and_logits():
    exact, rough, tokens = tiny("llama").eval(), tiny("llama").eval(), tokens_of(2, 12)
    rough.model.bfloat16()
    causal = torch.ones(1, 1, 12, 12, dtype=torch.bool).tril()
    with torch.no_grad():
        assert rough.hidden_states(tokens, causal).dtype == torch.float32
        logits = rough(tokens, causal)
        assert logits.dtype == torch.float32
        assert 1e-4 < (logits - exact(tokens)).abs().max() < 0.2 * logits.std()


def test_a_gpt2_becomes_our_own_unless_ours_would_compute_something_else(tmp_path):
    from transformers import GPT2Config, GPT2LMHeadModel

    tiny("gpt").save_pretrained(tmp_path / "ours")
    assert type(load_causal_lm(tmp_path / "ours", "here")) is GPT
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_positions=24, n_embd=32, n_layer=1, n_head=2, bos_token_id=None,
        eos_token_id=None, activation_function="relu",
    )  # fmt: skip
    theirs = GPT2LMHeadModel(config).eval()
    theirs.save_pretrained(tmp_path / "relu")
    model, tokens = load_causal_lm(tmp_path / "relu", "here").train(), tokens_of(2, 10)
    assert type(model) is HuggingFaceLM
    with torch.no_grad():
        close(model(tokens), theirs(tokens).logits, 1e-5)
    reward_model = ScalarModel.from_language_model(model)
    reward_model.save_pretrained(tmp_path / "reward")
    again = ScalarModel.from_pretrained(tmp_path / "reward")
    with torch.no_grad():
        close(again.token_scores(tokens), reward_model.token_scores(tokens), 1e-5)


def test_an_architecture_with_masks_or_logits_of_its_own_is_refused(tmp_path, monkeypatch):
    of_transformers("Bloom", n_layer=2, n_head=2).save_pretrained(tmp_path / "bloom")
    with pytest.raises(ModelError, match=r"BloomForCausalLM .* way of its own"):
        load_causal_lm(tmp_path / "bloom", "here")
    of_transformers("Granite", logits_scaling=4.0).save_pretrained(tmp_path / "granite")
    load_causal_lm(tmp_path / "granite", "here")
    head = HuggingFaceLM.unembed  # as if nobody had heard of Granite's scale
    monkeypatch.setattr(HuggingFaceLM, "unembed", lambda self, hidden: 4 * head(self, hidden))
    with pytest.raises(ModelError, match=r"GraniteForCausalLM .* way of its own"):
        load_causal_lm(tmp_path / "granite", "here")


# ------------------------------------------------------------------------------------ tokenizers


@pytest.fixture(scope="module")
def tokenizer():
    from rlhf_course.world import make_world

    return make_world("town", "tiny").tokenizer


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_model_and_tokenizer_come_back_together(kind, tokenizer, tmp_path):
    tiny(kind).save_pretrained(tmp_path, tokenizer)
    model, again = load_language_model(str(tmp_path))
    assert type(model) is (GPT if kind == "gpt" else HuggingFaceLM)
    text = "<|user|>Where does Ada live?<|assistant|>"
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.eos_token_id == tokenizer.eos_token_id
    assert again.chat_template == tokenizer.chat_template is not None


@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_no_tokenizer_beside_the_model(kind, tmp_path):
    tiny(kind).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="some-name: no readable tokenizer"):
        load_tokenizer(tmp_path, "some-name")
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ModelError, match="no readable tokenizer"):
        load_tokenizer(tmp_path)


def test_a_tokenizer_without_an_end(tokenizer, tmp_path):
    tokenizer.save_pretrained(tmp_path)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    config.pop("eos_token")
    file.write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).eos_token == tokenizer.eos_token  # the chat template's
    (tmp_path / "chat_template.jinja").unlink()
    with pytest.raises(ModelError, match="no EOS token"):
        load_tokenizer(tmp_path)


def test_errors_carry_the_name_that_was_given(tmp_path):
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        load_language_model(tmp_path)
    with pytest.raises(ModelError, match="no-such-owner/no-such-model"):
        load_language_model("no-such-owner/no-such-model")
