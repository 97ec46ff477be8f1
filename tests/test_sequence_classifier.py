"""Reward models in transformers' format: those of others go in, ours come out, up to a constant."""

import json

import pytest
import tiny_families
import torch
from tiny_families import FAMILIES, tokenizer_of

from rlhf_course.errors import CheckpointError
from rlhf_course.gpt import GPT
from rlhf_course.huggingface import HuggingFaceLM, load_causal_lm
from rlhf_course.reward_model import ScalarModel

TOKENS = torch.randint(6, 60, (3, 14), generator=torch.Generator().manual_seed(1))
LENGTHS = torch.tensor([4, 5, 6]), torch.tensor([10, 9, 8])  # all 14 tokens long
SHIFTED = {"gpt2", "pythia"}  # a LayerNorm with a bias comes last


def logits_of(folder):
    """Of plain transformers, a row at a time: no pad token is needed then."""
    from transformers import AutoModelForSequenceClassification

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return torch.cat([model(row[None]).logits[:, 0].float() for row in TOKENS])


@pytest.mark.parametrize("pooling", ["last", "mean"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_constant_is_folded_away_where_the_last_norm_has_a_bias(name, pooling, tmp_path):
    family = FAMILIES[name]
    model = load_causal_lm(tiny_families.save(name, tmp_path / "base"), name)
    ours = ScalarModel.from_language_model(model, pooling)
    with torch.no_grad():
        ours.head.bias.fill_(0.3)
        ours.gain.fill_(1.7)
        ours.bias.fill_(-0.9)
        ours.save_pretrained(tmp_path / "reward", tokenizer_of(family) if family.pad else None)
        again = ScalarModel.from_pretrained(tmp_path / "reward")
        expected = ours.rewards(TOKENS, *LENGTHS)
        torch.testing.assert_close(again.rewards(TOKENS, *LENGTHS), expected, atol=2e-5, rtol=0)
        read = again.token_scores(TOKENS)[:, -1]
    left = json.loads((tmp_path / "reward" / "config.json").read_text())["reward_token_bias"]
    assert left == pytest.approx(0.0 if name in SHIFTED else 1.7 * 0.3 - 0.9)
    theirs = logits_of(tmp_path / "reward")
    torch.testing.assert_close(theirs + left, read, atol=2e-5, rtol=0)
    if pooling == "last":  # differences are equal whatever became of the constant
        torch.testing.assert_close(theirs.diff(), expected.diff(), atol=4e-5, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("how", ["float32", "bfloat16", "sharded"])
def test_a_classifier_made_by_plain_transformers_goes_in(name, how, tmp_path):
    family = FAMILIES[name]
    family = family._replace(config={**family.config, "num_labels": 1})
    theirs = tiny_families.model_of(family, 270, task="SequenceClassification")
    if how == "bfloat16":
        theirs.bfloat16()
    theirs.save_pretrained(tmp_path, max_shard_size="30KB" if how == "sharded" else "5GB")
    assert (len(list(tmp_path.glob("*.safetensors"))) > 2) == (how == "sharded")
    ours = ScalarModel.from_pretrained(tmp_path)
    assert type(ours.backbone) is (GPT if name == "gpt2" else HuggingFaceLM)
    assert {p.dtype for p in ours.parameters()} == {torch.float32}
    with torch.no_grad():
        got = ours.rewards(TOKENS, *LENGTHS)
    expected = logits_of(tmp_path)
    torch.testing.assert_close(got, expected, atol=2e-5, rtol=0)
    assert expected.std() > 1e-3


def test_an_adapter_without_a_head_is_no_reward_model(tmp_path):
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny_families.save("qwen3", tmp_path / "base"))
    get_peft_model(base, LoraConfig(r=2)).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match="brings no score head"):
        ScalarModel.from_pretrained(tmp_path / "adapter")
