"""The public families through every stage by the command, and what comes out read by others.

Each model is a tiny random one with the family's architecture, and a tokenizer with its habits
(`tiny_families`): with and without a chat template, a pad token, a BOS, rows without a token.
"""

import importlib.util
import json
from functools import cache
from pathlib import Path

import pytest
import tiny_families
import torch
from safetensors.torch import load_file
from tiny_families import FAMILIES

from rlhf_course import cli
from rlhf_course.distributed.engine_processes import start_engines
from rlhf_course.huggingface import HuggingFaceLM, load_fitted
from rlhf_course.reward_model import ScalarModel
from rlhf_course.sampling import generate
from rlhf_course.sft import encode_dialogue, encode_prompt
from rlhf_course.stages.chat import Chat
from rlhf_course.stages.viewing_settings import ChatConfig

QUICK = ["--threads", "1", "--device", "cpu", "--dtype", "float32", "--lr", "0.01"]
PROMPTS = [f"What is {i * i}?" for i in range(10)]
LORA = ("llama3", "gemma3", "gpt2")  # these also with an adapter
STAGES = ("sft", "reward_model", "ppo", "dpo")
every_family = pytest.mark.parametrize("name", FAMILIES)
every_run = pytest.mark.parametrize(
    ("name", "lora"), [*((n, False) for n in FAMILIES), *((n, True) for n in LORA)]
)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """trained(name, lora) -> folder: base, and every stage's run, made once."""
    root = tmp_path_factory.mktemp("families")
    rows = [
        {"prompt": p, "response": f"It is {i}.", "chosen": f"It is {i}.", "rejected": "No idea."}
        for i, p in enumerate(PROMPTS)
    ]
    for name, keys in (
        ("demos", ("prompt", "response")),
        ("pairs", ("prompt", "chosen", "rejected")),
    ):
        lines = [json.dumps({key: row[key] for key in keys}) for row in rows]
        (root / f"{name}.jsonl").write_text("\n".join(lines))

    @cache
    def train(name: str, lora: bool = False) -> Path:
        folder = root / f"{name}-{lora}"
        tiny_families.save(name, folder / "base")
        demos, pairs = ["--data", root / "demos.jsonl"], ["--data", root / "pairs.jsonl"]
        small = ["--batch", "4", "--max-new-tokens", "5"]
        commands = {
            "sft": ["sft", *demos, "--model", folder / "base", "--steps", "2", "--batch", "4",
                    "--warmup", "0"],
            "reward_model": ["reward-model", *pairs, "--steps", "2", "--batch", "4",
                             "--warmup", "0"],
            "ppo": ["ppo", *demos, *small, "--iterations", "1", "--critic-warmup", "1",
                    "--minibatch", "2", "--kl-horizon", "20", "--warmup", "0"],
            "dpo": ["dpo", *pairs, *small, "--steps", "2", "--warmup", "0", "--eval-prompts", "2"],
        }  # fmt: skip
        for stage, command in commands.items():
            command = [*command, *QUICK, "--out", folder / stage, *["--lora", "4"] * lora]
            assert cli.main([str(word) for word in command]) == 0
        return folder

    return train


def logits_of(model, tokens):
    with torch.no_grad():
        out = model(tokens)
    return getattr(out, "logits", out)


# ------------------------------------------------------------------- read by plain transformers


@every_run
def test_what_every_stage_writes_is_an_ordinary_model_with_equal_logits(trained, name, lora):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = trained(name, lora)
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    for stage in ("sft", "ppo", "dpo"):
        ours, tokenizer = load_fitted(folder / stage / "model")
        theirs = AutoModelForCausalLM.from_pretrained(folder / stage / "model").eval()
        assert (
            theirs.get_input_embeddings().weight.shape == base.get_input_embeddings().weight.shape
        )
        plain = AutoTokenizer.from_pretrained(folder / stage / "model")
        assert plain.chat_template == tokenizer.chat_template is not None
        tokens = torch.tensor([encode_prompt(tokenizer, PROMPTS[3])])
        expected = logits_of(theirs, tokens)
        got = logits_of(ours.eval(), tokens)
        assert got.shape[-1] == len(tokenizer)
        torch.testing.assert_close(got, expected[..., : len(tokenizer)], atol=2e-5, rtol=0)
        assert (logits_of(base.eval(), tokens) - expected).abs().max() > 1e-3, "it was trained"


@every_run
def test_a_reward_model_scores_in_transformers_as_it_does_here(trained, name, lora):
    from transformers import AutoModelForSequenceClassification

    folder = trained(name, lora) / "reward_model" / "model"
    ours, theirs = (
        kind.from_pretrained(folder).eval()
        for kind in (ScalarModel, AutoModelForSequenceClassification)
    )
    tokenizer = load_fitted(trained(name, lora) / "sft" / "model")[1]
    for prompt in PROMPTS[:3]:
        tokens, start = encode_dialogue(tokenizer, prompt, "It is so.")
        row = torch.tensor([tokens])
        lengths = torch.tensor([start]), torch.tensor([len(tokens) - start])
        with torch.no_grad():
            expected = ours.rewards(row, *lengths)
            if tokenizer.pad_token_id == tokens[-1]:  # then transformers looks before the EOS
                theirs.config.pad_token_id = None
            torch.testing.assert_close(theirs(row).logits[:, 0], expected, atol=2e-5, rtol=0)
    assert json.loads((folder / "config.json").read_text())["reward_token_bias"] == 0


@every_run
def test_transformers_generates_what_our_sampling_does(trained, name, lora):
    from transformers import AutoModelForCausalLM

    folder = trained(name, lora) / "ppo" / "model"
    model, tokenizer = load_fitted(folder)
    theirs = AutoModelForCausalLM.from_pretrained(folder).eval()
    asked = [encode_prompt(tokenizer, prompt + "?" * i) for i, prompt in enumerate(PROMPTS[:3])]
    said = generate(model, asked, 16, tokenizer.eos_token_id, temperature=0)  # ragged, one batch
    for prompt, response in zip(asked, said.responses, strict=True):
        row = torch.tensor([prompt])
        out = theirs.generate(
            row, attention_mask=torch.ones_like(row), max_new_tokens=16, do_sample=False,
            suppress_tokens=list(range(len(tokenizer), theirs.config.vocab_size)) or None,
            pad_token_id=0,
        )  # fmt: skip
        assert out[0, len(prompt) :].tolist()[: len(response)] == response


# ---------------------------------------------------------------------- ends, beginnings, padding


@every_family
def test_an_answer_ends_as_the_chat_template_ends_it(trained, name):
    family, folder = FAMILIES[name], trained(name) / "sft" / "model"
    model, tokenizer = load_fitted(folder)
    assert tokenizer.eos_token == family.ends
    tokens, start = encode_dialogue(tokenizer, "Who?", "She.")
    end = tokenizer.convert_tokens_to_ids(family.ends)
    assert tokens[start:].count(end) == 1 and tokens[-1] == end
    said = json.loads((folder / "generation_config.json").read_text())["eos_token_id"]
    wanted = [end, tokenizer.convert_tokens_to_ids(family.eos)]
    assert said == (end if family.eos == family.ends else wanted)
    if isinstance(model, HuggingFaceLM):
        assert model.model.generation_config.eos_token_id == said


@every_family
def test_one_bos_where_the_family_has_it_and_no_pad_token_that_was_not_there(trained, name):
    family = FAMILIES[name]
    for stage in STAGES:
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(trained(name) / stage / "model")
        tokens = encode_prompt(tokenizer, "Who?")
        bos = tokenizer.bos_token_id if family.adds_bos else None
        assert tokens.count(bos) == (tokens[0] == bos) == family.adds_bos
        assert tokenizer.pad_token == family.pad
        config = json.loads((trained(name) / stage / "model" / "config.json").read_text())
        vocabulary = json.loads((trained(name) / "base" / "config.json").read_text())["vocab_size"]
        assert config["vocab_size"] == vocabulary == len(tokenizer) + family.padding


@every_family
def test_both_models_answer_in_chat(trained, name):
    folder = trained(name)
    config = ChatConfig(
        model=str(folder / "ppo" / "model"), against=str(folder / "sft" / "model"), size="tiny",
        max_new_tokens=4, device="cpu", threads=1,
    )  # fmt: skip
    answers = Chat(config).ask("What is 9?")
    assert [a.speaker for a in answers] == ["ppo", "sft"]


@pytest.mark.parametrize(("name", "lora"), [("llama3", True), ("gemma3", False)])
def test_a_world_evaluates_it(trained, name, lora, tmp_path):
    folder = trained(name, lora)
    command = ["evaluate", "--size", "tiny", "--model", folder / "ppo" / "model", "--baseline",
               folder / "sft" / "model", "--out", tmp_path, "--threads", "1"]  # fmt: skip
    assert cli.main([str(word) for word in command]) == 0
    figures = json.loads((tmp_path / "figures.json").read_text())["policy"]
    assert sum(figures["shares"]["known"].values()) == pytest.approx(1)
    assert figures["perplexity"] > 50 and figures["kl"] > 0


# ------------------------------------------------------------------------------------------ peft


@pytest.mark.parametrize("name", LORA)
def test_the_adapter_beside_a_model_opens_in_peft_with_equal_outputs(trained, name):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    folder = trained(name, True)
    bases = {"sft": folder / "base"} | dict.fromkeys(STAGES[1:], folder / "sft" / "model")
    tokens = torch.randint(6, 200, (1, 12), generator=torch.Generator().manual_seed(0))
    for stage, base in bases.items():
        kind, more = AutoModelForCausalLM, {}
        if stage == "reward_model":
            kind, more = AutoModelForSequenceClassification, {"num_labels": 1}
        settings = json.loads((folder / stage / "adapter" / "adapter_config.json").read_text())
        assert settings["base_model_name_or_path"] == str(base)
        plain = kind.from_pretrained(base, **more)
        adapted = PeftModel.from_pretrained(plain, folder / stage / "adapter").eval()
        merged = kind.from_pretrained(folder / stage / "model").eval()
        expected = logits_of(merged, tokens)
        torch.testing.assert_close(logits_of(adapted, tokens), expected, atol=2e-5, rtol=0)
        with adapted.disable_adapter():
            assert (logits_of(adapted, tokens) - expected).abs().max() > 1e-4


# ------------------------------------------------------------------------------------------ vLLM


@pytest.mark.xdist_group("engines")
@pytest.mark.parametrize("name", ["gpt2", "llama3", "qwen3"])
def test_a_trained_model_answers_in_vllm_as_it_does_here(trained, name):
    if importlib.util.find_spec("vllm") is None:
        pytest.skip("vLLM is not installed: `rlhf-course doctor` says how to get it")
    folder = trained(name, name in LORA) / "ppo" / "model"
    model, tokenizer = load_fitted(folder)
    asked = [encode_prompt(tokenizer, prompt) for prompt in PROMPTS[:6]]
    wanted = generate(model, asked, 12, eos_id=-1, temperature=0).responses
    settings = {"model_dir": folder, "max_model_len": tiny_families.CONTEXT, "seed": 0}
    engine = start_engines({name: settings})[name]
    try:
        assert engine.ask("greedy", asked, 12) == wanted
    finally:
        engine.pipe.close()


# --------------------------------------------------------------------------------- whole, or not


def test_only_the_adapter_is_in_a_runs_checkpoints(trained):
    newest = sorted((trained("llama3", True) / "ppo" / "checkpoints").iterdir())[-1]
    names = set(load_file(newest / "tensors.safetensors"))
    weights = {name for name in names if name.startswith("module/")}
    assert {n for n in weights if ".lora_" in n} and {n for n in weights if "critic/head" in n}
    left = {n for n in weights if ".lora_" not in n and "/head." not in n}
    assert all("inv_freq" in n or n.endswith(("/gain", "/bias")) for n in left), left
