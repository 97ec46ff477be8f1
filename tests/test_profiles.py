"""--profile: what it fills, what it leaves alone, and that it fits."""

import json

import pytest
import torch

from rlhf_course import cli
from rlhf_course.planning.one_gpu import Job, estimate
from rlhf_course.planning.one_plan import usable
from rlhf_course.planning.shapes import shape_of
from rlhf_course.stages.checks import check_settings
from rlhf_course.stages.presets import identity, resolve
from rlhf_course.stages.profiles import LENGTH, PROFILES
from rlhf_course.stages.settings import DPOConfig, PPOConfig, RewardModelConfig, SFTConfig

CONFIGS = {"sft": SFTConfig, "reward_model": RewardModelConfig, "ppo": PPOConfig}


@pytest.mark.parametrize("name", PROFILES)
@pytest.mark.parametrize("stage", CONFIGS)
def test_the_plan_says_that_it_fits(name, stage):
    """With rows of 512 tokens, the policy and the reward model those that SFT starts from."""
    profile = PROFILES[name]
    model = resolve(SFTConfig(data="d.jsonl", profile=name), "sft").model
    config = resolve(CONFIGS[stage](data="d.jsonl", profile=name), stage)
    check_settings(config)
    answer = config.max_new_tokens if stage == "ppo" else LENGTH // 2
    products = 4 if profile.products == "float32" else 2
    job = Job(
        stage.replace("_", "-"), shape_of(model), LENGTH - answer, answer,
        config.minibatch if stage == "ppo" else config.batch, config.micro_batch,
        generated=getattr(config, "generation_batch", None) or 1, products=products,
        attention=products if profile.gpu else 4, lora=config.lora,
        base=products if profile.gpu else 4, checkpointing=config.gradient_checkpointing,
    )  # fmt: skip
    found = estimate(job)
    assert found.peak <= usable(profile.gib), (found, usable(profile.gib))
    if profile.gpu:  # and is no waste of it; comparisons with long answers take twice the tokens
        assert found.peak > (0.15 if stage == "reward_model" else 0.2) * usable(profile.gib)


@pytest.mark.parametrize("stage", [*CONFIGS, "dpo"])
def test_a_given_flag_stays(stage):
    kind = {**CONFIGS, "dpo": DPOConfig}[stage]
    plain = resolve(kind(data="d.jsonl"), stage)
    config = resolve(kind(data="d.jsonl", profile="colab-t4", micro_batch=1, lora=4), stage)
    assert (config.micro_batch, config.lora, config.dtype) == (1, 4, "float32")
    assert config.gradient_checkpointing and not plain.gradient_checkpointing
    assert "micro_batch" not in config.chosen and config.chosen["dtype"] == "float32"


def test_a_default_that_was_typed_stays_too():
    typed = "ppo --data d.jsonl --profile colab-t4 --no-gradient-checkpointing --dtype auto"
    config = resolve(cli.parse(typed.split(" ")), "ppo")
    assert (config.gradient_checkpointing, config.dtype, config.lora) == (False, "auto", 16)
    untyped = resolve(cli.parse(["ppo", "--data", "d.jsonl", "--profile", "colab-t4"]), "ppo")
    assert (untyped.gradient_checkpointing, untyped.dtype) == (True, "float32")


def test_a_small_batch_bounds_the_micro_batch():
    config = resolve(SFTConfig(data="d.jsonl", profile="colab-a100", batch=4), "sft")
    assert config.micro_batch == 4
    check_settings(config)


def test_a_world_keeps_its_own_models():
    config = resolve(PPOConfig(profile="colab-t4"), "ppo")
    assert config.chosen == {"dtype": "float32"} and config.model is None


def test_a_new_model_gets_no_adapter():
    config = resolve(SFTConfig(data="d.jsonl", model="tiny", profile="cpu"), "sft")
    assert config.lora is None and config.chosen["micro_batch"] == 4


def test_a_run_is_what_its_settings_are_and_not_what_the_profile_is_called():
    config = resolve(SFTConfig(data="d.jsonl", profile="colab-a100"), "sft")
    by_hand = resolve(SFTConfig(data="d.jsonl", **config.chosen), "sft")
    assert identity(config) == identity(by_hand)
    assert "profile" not in identity(config)


def test_it_runs_where_the_gpu_is_not_and_says_so(tmp_path, monkeypatch, capsys):
    pytest.importorskip("peft")
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    from rlhf_course.gpt import GPT, GPTConfig
    from rlhf_course.world.tokenizer import train_tokenizer

    monkeypatch.chdir(tmp_path)
    tokenizer = train_tokenizer(["one two three"] * 9, 300, whole_words=False)
    torch.manual_seed(0)
    GPT(GPTConfig(len(tokenizer), 64, 1, 2, 64)).save_pretrained("model", tokenizer)
    rows = [{"prompt": "one " * (i % 5 + 1), "response": "two"} for i in range(24)]
    (tmp_path / "d.jsonl").write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")
    given = "sft --data d.jsonl --model model --profile laptop-8gb --steps 2 --batch 8 --out run"
    assert cli.main(given.split(" ")) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "--profile laptop-8gb chose --dtype bfloat16 --lora 16 --gradient-checkpointing" in told
    assert "--micro-batch 4; it is made for a laptop's GPU of 8 GB, and this runs on cpu" in told
    assert json.loads((tmp_path / "run" / "config.json").read_text())["lora"] == 16


def test_a_cluster_refuses_it(capsys):
    if cli.main(["ppo-ray", "--profile", "cpu", "--size", "tiny"]) != 2:
        pytest.fail("it must be refused")
    told = " ".join(capsys.readouterr().err.split())
    assert "--profile belong" in told or "not installed" in told
