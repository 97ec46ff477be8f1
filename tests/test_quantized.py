"""Bases in 8 and 4 bits. Where bitsandbytes is installed (a CPU suffices) they are trained on."""

import importlib.util
import json

import pytest
import tiny_families
import torch
from safetensors.torch import load_file

from rlhf_course import cli, quantized
from rlhf_course.adapters import LoRA, plain_tensors
from rlhf_course.errors import ConfigError, ModelError
from rlhf_course.huggingface import load_causal_lm
from rlhf_course.pretrained_model import WeightFormat

CPU = torch.device("cpu")
TOKENS = torch.randint(6, 60, (3, 14), generator=torch.Generator().manual_seed(1))
needs_it = pytest.mark.skipif(
    importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed"
)


def test_what_cannot_be_had_is_told(monkeypatch):
    assert quantized.bits_of(None, CPU) is None
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"--quantize 4bit needs .* pip install bitsandbytes"):
        quantized.bits_of("4bit", CPU)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: object())
    assert quantized.bits_of("8bit", torch.device("cuda")) == 8
    with pytest.raises(ConfigError, match="--quantize 8bit: bitsandbytes has no mps kernels"):
        quantized.bits_of("8bit", torch.device("mps"))


def test_how_transformers_is_asked():
    assert quantized.quantization(None, torch.float32, "cpu") == {}
    told = quantized.quantization(4, torch.bfloat16, "cuda")
    config = told["quantization_config"]
    assert told["device_map"] == {"": "cuda"}
    assert (config.load_in_4bit, config.bnb_4bit_quant_type) == (True, "nf4")
    assert config.bnb_4bit_use_double_quant and config.bnb_4bit_compute_dtype is torch.bfloat16
    assert quantized.quantization(8, torch.float32, "cpu")["quantization_config"].load_in_8bit


def rounded(name, folder, bits):
    how = WeightFormat(ours=False, bits=bits)
    return load_causal_lm(folder, name, how)


@needs_it
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("name", ["llama3", "gpt2"])
def test_a_base_in_few_bits_is_close_smaller_and_can_be_written_whole(name, bits, tmp_path):
    exact = load_causal_lm(tiny_families.save(name, tmp_path), name, WeightFormat(ours=False))
    model = rounded(name, tmp_path, bits)
    with torch.no_grad():
        wanted, got = exact(TOKENS), model(TOKENS)
    gap = (got - wanted).abs().max() / wanted.std()
    assert 1e-4 < gap < (0.2 if bits == 8 else 1.5)
    kinds = {p.dtype for p in model.parameters()}
    assert kinds == {torch.float32, torch.uint8 if bits == 4 else torch.int8}
    model.adapt(LoRA(4))
    model.train()
    whole = load_causal_lm(tmp_path, name, WeightFormat(ours=False))
    told = whole.model.load_state_dict(plain_tensors(model.model), strict=False)
    assert not told.unexpected_keys and set(told.missing_keys) <= {"lm_head.weight"}
    with torch.no_grad():
        torch.testing.assert_close(whole(TOKENS), model(TOKENS), atol=2e-3, rtol=0)


@needs_it
@pytest.mark.parametrize("bits", [4, 8])
def test_the_gradient_reaches_the_first_layer_also_after_sampling(bits, tmp_path):
    """bitsandbytes' own layout for inference on a CPU would lose it."""
    model = rounded("llama3", tiny_families.save("llama3", tmp_path), bits)
    model.adapt(LoRA(4))
    whole = load_causal_lm(tmp_path, "llama3", WeightFormat(ours=False))
    whole.model.load_state_dict(plain_tensors(model.model), strict=False)
    whole.adapt(LoRA(4))
    grads = []
    for each in (model, whole):
        each.eval()
        with torch.no_grad():
            each(TOKENS)
        each.train()
        each(TOKENS).logsumexp(-1).square().mean().backward()
        grads.append({k: p.grad for k, p in each.named_parameters() if p.grad is not None})
    assert grads[0].keys() == grads[1].keys()
    first = [k for k in grads[0] if "layers.0." in k and "lora_B" in k]
    assert len(first) == 7
    for key in first:
        assert grads[1][key].norm() > 1e-4
        gap = (grads[0][key] - grads[1][key]).norm() / grads[1][key].norm()
        assert gap < 0.02, key


@needs_it
@pytest.mark.parametrize("quantize", ["4bit", "8bit"])
def test_all_stages_over_a_base_in_few_bits(quantize, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_families.save("llama3", tmp_path / "base")
    rows = [{"prompt": f"What is {i}?", "response": f"{i}."} for i in range(8)]
    (tmp_path / "demos.jsonl").write_text("\n".join(map(json.dumps, rows)))
    rows = [{"prompt": f"What is {i}?", "chosen": f"{i}.", "rejected": "No."} for i in range(8)]
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    small = ["--lora", "4", "--quantize", quantize, "--threads", "1", "--device", "cpu", "--dtype",
             "float32", "--batch", "4", "--lr", "0.01", "--warmup", "0"]  # fmt: skip
    answers = ["--max-new-tokens", "4"]
    demos, pairs = (["--data", tmp_path / f"{name}.jsonl"] for name in ("demos", "pairs"))
    commands = {
        "sft": ["sft", *demos, "--model", tmp_path / "base", "--steps", "2"],
        "reward_model": ["reward-model", *pairs, "--steps", "2"],
        "ppo": ["ppo", *demos, *answers, "--iterations", "1", "--critic-warmup", "1",
                "--minibatch", "2", "--kl-horizon", "20"],
        "dpo": ["dpo", *pairs, *answers, "--steps", "2"],
    }  # fmt: skip
    for stage, command in commands.items():
        assert cli.main([str(w) for w in [*command, *small, "--out", tmp_path / stage]]) == 0
        tensors = load_file(tmp_path / stage / "model" / "model.safetensors")
        assert {t.dtype for t in tensors.values()} == {torch.float32}
        assert "quantization_config" not in (tmp_path / stage / "model/config.json").read_text()
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "ppo" / "model")
    assert torch.isfinite(plain(TOKENS).logits).all()


@needs_it
def test_an_adapters_directory_is_not_rounded(tmp_path):
    model = load_causal_lm(tiny_families.save("llama3", tmp_path / "base"), "base")
    model.adapt(LoRA(2))
    model.save_adapter(tmp_path / "adapter", str(tmp_path / "base"))
    with pytest.raises(ModelError, match="cannot be rounded to 4 bits"):
        rounded("adapter", tmp_path / "adapter", 4)
