"""LoRA: one copy of the weights, an exact reference, and peft's files in and out."""

import json
from pathlib import Path

import pytest
import tiny_families
import torch
from safetensors.torch import load_file, save_file
from tiny_families import FAMILIES
from tiny_models import tiny

from rlhf_course import adapters, cli
from rlhf_course.adapters import LoRA
from rlhf_course.device import Device
from rlhf_course.distributed.settings import RayPPOConfig, check_cluster
from rlhf_course.errors import CheckpointError, ConfigError, ModelError
from rlhf_course.gpt import GPT
from rlhf_course.huggingface import HuggingFaceLM, load_causal_lm, load_language_model
from rlhf_course.pretrained_model import WeightFormat
from rlhf_course.reward_model import ScalarModel
from rlhf_course.rollout import action_logprobs
from rlhf_course.runs import read_metrics
from rlhf_course.stages import ppo as ppo_stage
from rlhf_course.stages.checks import check_settings
from rlhf_course.stages.lora import weights_of
from rlhf_course.stages.presets import ADDED, identity, resolve
from rlhf_course.stages.settings import DPOConfig, PPOConfig, RewardModelConfig, SFTConfig
from rlhf_course.training import make_optimizer

CPU = Device(torch.device("cpu"), None, 1)
TOKENS = torch.randint(6, 60, (3, 14), generator=torch.Generator().manual_seed(1))
PPO = ["ppo", "--iterations", "3", "--critic-warmup", "1", "--batch", "4", "--minibatch", "2",
       "--max-new-tokens", "5", "--kl-horizon", "20", "--validation", "0",
       "--checkpoint-every", "1", "--threads", "1", "--device", "cpu",
       "--dtype", "float32"]  # fmt: skip
LORA_PPO = [*PPO, "--lora", "4"]


def words(texts, responses, rows):
    """A reward in Python, found as tests' module:function."""
    return [float(len(text)) for text in responses]


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    """policy, gpt (our own format) with a reward model each, and prompts.jsonl."""
    root = tmp_path_factory.mktemp("adapters")
    tiny_families.save("llama3", root / "policy")
    model, tokenizer = load_language_model(root / "policy")
    ScalarModel.from_language_model(model).save_pretrained(root / "reward", tokenizer)
    lines = [json.dumps({"prompt": f"What is {i}?", "response": f"{i}."}) for i in range(6)]
    (root / "prompts.jsonl").write_text("\n".join(lines))
    return root


def trainer_of(models: Path, *more: str, command=LORA_PPO) -> ppo_stage.PPOTrainer:
    command = [*command, "--data", models / "prompts.jsonl", "--model", models / "policy", *more]
    config = resolve(cli.parse([str(word) for word in command]), "ppo")
    return ppo_stage.PPOTrainer(config, CPU)


def learn(model, steps: int = 3) -> None:
    """Change what may change, visibly."""
    optimizer = make_optimizer(model, 0.05)
    for _ in range(steps):
        optimizer.zero_grad()
        model(TOKENS).logsumexp(-1).square().mean().backward()
        optimizer.step()


# ------------------------------------------------------------------------------ the adapter itself


@pytest.mark.parametrize("name", FAMILIES)
def test_a_fresh_adapter_changes_nothing_and_a_trained_one_can_be_switched_off(name, tmp_path):
    model = load_causal_lm(tiny_families.save(name, tmp_path), name, WeightFormat(ours=False))
    before = {key: p.detach().clone() for key, p in model.named_parameters()}
    untouched = model(TOKENS).detach()
    reference = model.adapt(LoRA(4), seed=3)
    assert torch.equal(model(TOKENS), untouched)
    trained = {key for key, p in model.named_parameters() if p.requires_grad}
    assert trained and all(adapters.is_adapters(key) for key in trained)
    learn(model)
    assert (model(TOKENS) - untouched).abs().max() > 0.01
    assert torch.equal(reference(TOKENS), untouched)
    assert set(reference.parameters()) == set(model.parameters())
    assert {key for key, p in model.named_parameters() if p.requires_grad} == trained
    for key, parameter in model.named_parameters():
        if not adapters.is_adapters(key):
            assert torch.equal(parameter, before[key.replace(".base_layer", "")])


def test_the_shape_of_the_adapter_is_what_was_asked_for():
    model = tiny("llama")
    model.adapt(LoRA(3, alpha=12.0, targets=("q_proj", "down_proj")))
    names = {key.split(".lora_")[0].split(".")[-1] for key, _ in model.named_parameters()
             if ".lora_" in key}  # fmt: skip
    assert names == {"q_proj", "down_proj"}
    layer = model.model.model.layers[0].self_attn.q_proj
    assert layer.lora_A["default"].weight.shape == (3, 32)
    assert layer.scaling == {"default": 4.0}
    whole = tiny("llama")
    whole.adapt(LoRA(2))
    assert whole.model.model.layers[1].mlp.up_proj.scaling == {"default": 2.0}
    assert not isinstance(whole.model.lm_head, type(layer))


def test_adapters_depend_on_their_seed_alone():
    def drawn(seed):
        torch.manual_seed(torch.initial_seed() + 1)
        model = tiny("llama")
        model.adapt(LoRA(2), seed)
        return torch.cat([p.flatten() for p in model.parameters() if p.requires_grad])

    assert torch.equal(drawn(1), drawn(1))
    assert not torch.equal(drawn(1), drawn(2))


def test_over_a_bf16_base_the_adapter_is_fp32_and_learns(tmp_path):
    tiny("llama").save_pretrained(tmp_path)
    model = load_causal_lm(tmp_path, "here", WeightFormat(ours=False, dtype=torch.bfloat16))
    model.adapt(LoRA(2))
    kinds = {(adapters.is_adapters(key), p.dtype) for key, p in model.named_parameters()}
    assert kinds == {(False, torch.bfloat16), (True, torch.float32)}
    model.compute_dtype = torch.bfloat16
    learn(model)
    model.save_pretrained(tmp_path / "merged")
    tensors = load_file(tmp_path / "merged" / "model.safetensors")
    assert {t.dtype for t in tensors.values()} == {torch.bfloat16}
    again = load_causal_lm(tmp_path / "merged", "merged")
    gap = (again(TOKENS) - model(TOKENS)).abs().max() / model(TOKENS).std()
    assert gap < 0.1


# ----------------------------------------------------------------------- one copy of the weights


def count(*modules) -> int:
    """Parameters of all of these, each once."""
    held = {id(p): p.numel() for module in modules if module for p in module.parameters()}
    return sum(held.values())


def test_ppo_holds_each_backbone_once(models):
    trainer = trainer_of(models, "--reward-model", str(models / "reward"))
    policy, reward = (
        load_causal_lm(models / "policy", ""),
        ScalarModel.from_pretrained(models / "reward"),
    )
    everything = (trainer.policy, trainer.reference, trainer.reward_model, trainer.critic)
    added = [p for m in everything for k, p in m.named_parameters() if adapters.is_adapters(k)]
    added = {id(p): p.numel() for p in added}
    head = tiny_families.WIDTH + 1
    assert count(*everything) == count(policy) + count(reward) + sum(added.values()) + head
    trained = {id(p): p.numel() for m in everything for p in m.parameters() if p.requires_grad}
    assert sum(trained.values()) == sum(added.values()) + head
    full = trainer_of(models, "--reward-model", str(models / "reward"), command=PPO)
    twice = count(full.policy, full.reference, full.reward_model, full.critic)
    assert twice == 2 * count(policy) + 2 * count(reward)


def test_ppos_reference_and_reward_model_stay_exact_while_policy_and_critic_learn(models):
    trainer = trainer_of(models, "--reward-model", str(models / "reward"))
    policy = load_causal_lm(models / "policy", "").eval()
    reward = ScalarModel.from_pretrained(models / "reward").eval()
    lengths = torch.tensor([4, 5, 6]), torch.tensor([7, 6, 8])
    mask = torch.ones(3, 13, dtype=torch.bool)
    with torch.no_grad():
        expected = action_logprobs(policy, TOKENS, mask)[0], reward.rewards(TOKENS, *lengths)
        values = trainer.critic.token_scores(TOKENS)
        assert torch.equal(values, reward.token_scores(TOKENS))  # it begins as the reward model
    for step in range(3):
        trainer.iterate(step)
    with torch.no_grad():
        assert torch.equal(action_logprobs(trainer.reference, TOKENS, mask)[0], expected[0])
        assert torch.equal(trainer.reward_model.rewards(TOKENS, *lengths), expected[1])
        assert (action_logprobs(trainer.policy, TOKENS, mask)[0] - expected[0]).abs().max() > 1e-5
        assert (trainer.critic.token_scores(TOKENS) - values).abs().max() > 1e-5


def test_the_first_updates_ratio_is_1(models, monkeypatch):
    seen = []
    check = ppo_stage.PPOTrainer.check_ratio
    monkeypatch.setattr(
        ppo_stage.PPOTrainer, "check_ratio", lambda self, x: (seen.append(x), check(self, x))
    )
    trainer = trainer_of(models, "--reward-model", str(models / "reward"), "--lr", "0.01")
    for step in range(3):
        trainer.iterate(step)
    assert len(seen) == 2 and max(seen) < 1e-5


def test_where_a_function_scores_the_critic_has_a_frozen_copy_of_its_own(models, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parent))
    trainer = trainer_of(models, "--reward", "test_adapters:words")
    trainer.iterate(0)
    trainer.iterate(1)
    policy = load_causal_lm(models / "policy", "")
    frozen = {k: p for k, p in trainer.critic.named_parameters() if not p.requires_grad}
    for key, tensor in policy.backbone.state_dict().items():
        held = [p for k, p in frozen.items() if k.replace(".base_layer", "").endswith(f".{key}")]
        assert len(held) == 1 and torch.equal(held[0], tensor)
    shared = {id(p) for p in trainer.policy.parameters()}
    assert not shared & {id(p) for p in trainer.critic.parameters()}


def test_a_resumed_run_with_an_adapter_ends_bitwise_where_it_would_have(
    models, tmp_path, monkeypatch
):
    def command(out):
        return [str(w) for w in [
            *LORA_PPO, "--data", models / "prompts.jsonl", "--model", models / "policy",
            "--reward-model", models / "reward", "--out", tmp_path / out]]  # fmt: skip

    assert cli.main(command("whole")) == 0
    iterate = ppo_stage.PPOTrainer.iterate

    def dies(self, step):
        if step == 2:
            raise KeyboardInterrupt
        return iterate(self, step)

    with monkeypatch.context() as broken:
        broken.setattr(ppo_stage.PPOTrainer, "iterate", dies)
        assert cli.main(command("broken")) != 0
    assert not (tmp_path / "broken" / "done.json").exists()
    assert cli.main(command("broken")) == 0
    assert read_metrics(tmp_path / "broken") == read_metrics(tmp_path / "whole")
    for part in ("model/model.safetensors", "adapter/adapter_model.safetensors"):
        assert (tmp_path / "broken" / part).read_bytes() == (tmp_path / "whole" / part).read_bytes()


# ------------------------------------------------------------- adapters that were trained elsewhere


def elsewhere(base: Path, out: Path, task: str = "CAUSAL_LM", **settings) -> torch.Tensor:
    """Train an adapter with plain peft; returns its logits for TOKENS[:1]."""
    import transformers
    from peft import LoraConfig, get_peft_model

    kind, more = "AutoModelForCausalLM", {}
    if task == "SEQ_CLS":
        kind, more = "AutoModelForSequenceClassification", {"num_labels": 1}
    torch.manual_seed(5)
    model = getattr(transformers, kind).from_pretrained(base, **more)
    model = get_peft_model(
        model, LoraConfig(r=3, task_type=task, init_lora_weights=False, **settings)
    )
    model.eval().save_pretrained(out)
    with torch.no_grad():
        return model(TOKENS[:1]).logits


@pytest.mark.parametrize("name", ["gpt2", "qwen2.5"])
def test_an_adapter_from_plain_peft_goes_in_as_a_model(name, tmp_path):
    base = tiny_families.save(name, tmp_path / "base")
    expected = elsewhere(base, tmp_path / "theirs")
    model, tokenizer = load_language_model(tmp_path / "theirs")
    assert type(model) is (GPT if name == "gpt2" else HuggingFaceLM)
    torch.testing.assert_close(model(TOKENS[:1]), expected, atol=2e-5, rtol=0)
    assert (load_causal_lm(base, name)(TOKENS[:1]) - expected).abs().max() > 0.01
    assert tokenizer.eos_token == FAMILIES[name].ends  # the base's own


def test_a_reward_adapter_from_plain_peft_goes_in(tmp_path):
    base = tiny_families.save("llama3", tmp_path / "base")
    expected = elsewhere(base, tmp_path / "theirs", "SEQ_CLS")
    model = ScalarModel.from_pretrained(tmp_path / "theirs")
    torch.testing.assert_close(model.token_scores(TOKENS[:1])[:, -1:], expected, atol=2e-5, rtol=0)


@pytest.mark.parametrize("pooling", ["last", "mean", "sum"])
def test_a_reward_models_adapter_is_read_as_it_was_trained(models, tmp_path, pooling):
    """Pooling and constants, for which peft's format has no place, are kept."""
    language_model, _ = load_language_model(models / "policy")
    model = ScalarModel.from_language_model(language_model, pooling, 3)
    model.backbone.adapt(LoRA(2))
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    model.gain.fill_(2.0)
    model.bias.fill_(0.5)
    model.save_adapter(tmp_path, str(models / "policy"))
    lengths = torch.tensor([4, 5, 6]), torch.tensor([7, 6, 8])
    with torch.no_grad():
        expected = model.eval().rewards(TOKENS, *lengths)
        again = ScalarModel.from_pretrained(tmp_path).eval().rewards(TOKENS, *lengths)
    torch.testing.assert_close(again, expected, atol=1e-5, rtol=1e-5)
    assert expected.std() > 1e-2
    with pytest.raises(ModelError, match="bits"):
        ScalarModel.from_pretrained(tmp_path, WeightFormat(ours=False, bits=4))


def test_an_adapter_goes_through_sft_and_a_second_one_over_it_is_told(tmp_path, models, capsys):
    base = tiny_families.save("llama3", tmp_path / "base")
    elsewhere(base, tmp_path / "theirs")
    command = ["sft", "--data", models / "prompts.jsonl", "--model", tmp_path / "theirs", "--steps",
               "1", "--batch", "2", "--lora", "2", "--out", tmp_path / "sft", "--threads", "1",
               "--device", "cpu"]  # fmt: skip
    assert cli.main([str(word) for word in command]) == 0
    assert "is an adapter itself" in " ".join(capsys.readouterr().out.split())
    assert (tmp_path / "sft" / "model" / "model.safetensors").exists()
    assert not (tmp_path / "sft" / "adapter").exists()


def test_an_adapter_over_another_base_or_damaged_is_refused(tmp_path):
    bases = {n: tiny_families.save(n, tmp_path / n) for n in ("llama3", "gpt2")}
    tiny("llama").save_pretrained(tmp_path / "narrow")  # the same layers, of another width
    bases["narrow"] = tmp_path / "narrow"
    elsewhere(bases["llama3"], tmp_path / "theirs")
    file = tmp_path / "theirs" / "adapter_config.json"
    right = json.loads(file.read_text())

    def failing(**change) -> str:
        file.write_text(json.dumps(right | change))
        with pytest.raises(CheckpointError) as error:
            load_causal_lm(tmp_path / "theirs", "theirs")
        return str(error.value)

    assert "names no base model" in failing(base_model_name_or_path=None)
    for other in ("gpt2", "narrow"):
        told = failing(base_model_name_or_path=str(bases[other]))
        assert "theirs" in told and "trained on" in told, told
    file.write_text(json.dumps(right))
    weights = tmp_path / "theirs" / "adapter_model.safetensors"
    tensors = load_file(weights)
    save_file(dict(list(tensors.items())[1:]), weights)
    assert "1 tensors of the adapter have no place" in failing()
    weights.write_bytes(weights.read_bytes()[:100])
    assert "does not fit" in failing()
    file.write_text("{")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_causal_lm(tmp_path / "theirs", "theirs")


# --------------------------------------------------------------------------------- flags and errors


def test_what_the_flags_may_not_say(models, tmp_path, capsys, monkeypatch):
    def told(*arguments) -> str:
        assert cli.main([str(a) for a in arguments]) == 2
        assert not (tmp_path / "out").exists()
        return " ".join(capsys.readouterr().err.split())

    sft = ["sft", "--data", models / "prompts.jsonl", "--out", tmp_path / "out"]
    given = [*sft, "--model", models / "policy", "--device", "cpu"]
    assert "--lora 0" in told(*given, "--lora", "0")
    for flag, value in (
        ("--lora-alpha", "8"),
        ("--lora-targets", "q_proj"),
        ("--quantize", "4bit"),
    ):
        assert f"{flag} says how an adapter" in told(*given, flag, value)
    assert "makes a new model" in told(*sft, "--lora", "4")
    assert "makes a new model" in told(*sft, "--lora", "4", "--model", "tiny")
    wrong = told(*given, "--lora", "4", "--lora-targets", "q_proj", "lm_head")
    assert "--lora-targets lm_head" in wrong and "down_proj, gate_proj, k_proj" in wrong
    monkeypatch.setattr(adapters.importlib.util, "find_spec", lambda name: None)
    assert "pip install" in told(*given, "--lora", "4")


def test_ppo_ray_refuses_what_it_does_not_do():
    for change in ({"lora": 4}, {"lora": 4, "quantize": "4bit"}):
        with pytest.raises(ConfigError, match=r"--lora and --quantize belong to `rlhf-course ppo`"):
            check_cluster(resolve(RayPPOConfig(**change), "ppo"))
    check_cluster(resolve(RayPPOConfig(gradient_checkpointing=True), "ppo"))


def test_rates_under_an_adapter_are_ten_times_those_of_a_model_with_weights():
    settings = {"data": "d.jsonl", "model": "owner/name"}
    for kind, stage in ((SFTConfig, "sft"), (RewardModelConfig, "reward_model"), (DPOConfig, "dpo"),
                        (PPOConfig, "ppo")):  # fmt: skip
        full, small = resolve(kind(**settings), stage), resolve(kind(lora=8, **settings), stage)
        check_settings(small)
        assert small.lr == pytest.approx(10 * full.lr)
        if stage == "ppo":
            assert small.critic_lr == pytest.approx(10 * full.critic_lr)
        assert resolve(kind(lora=8, lr=0.5, **settings), stage).lr == 0.5
        assert not set(identity(full)) & {*ADDED, "gradient_checkpointing"}
        assert identity(small)["lora"] == 8
    without = resolve(PPOConfig(lora=8, advantages="rloo", **settings), "ppo")
    assert without.critic_lr is None and without.lr == pytest.approx(1e-4)


def test_a_frozen_base_is_held_in_bf16_only_where_a_gpu_multiplies_so():
    gpu = Device(torch.device("cuda"), torch.bfloat16, 1)
    assert weights_of(SFTConfig(lora=4), gpu) == WeightFormat(False, torch.bfloat16, None, "cuda")
    assert weights_of(SFTConfig(), gpu) == WeightFormat()
    slow = Device(torch.device("cuda"), None, 1)
    for device in (slow, CPU, Device(torch.device("cpu"), torch.bfloat16, 1)):
        assert weights_of(SFTConfig(lora=4), device).dtype is torch.float32


def test_a_large_model_in_a_directory_is_trained_as_gently_as_the_hubs(tmp_path):
    folder = tmp_path / "sft" / "model"
    folder.mkdir(parents=True)
    weights = folder / "model.safetensors"
    rates = {}
    for size in (1_000_000, 250_000_000):
        with weights.open("wb") as file:
            file.truncate(size)  # a hole: nothing is written
        named = resolve(RewardModelConfig(data="d.jsonl", model=str(folder)), "reward_model")
        out = tmp_path / "reward_model"
        beside = resolve(RewardModelConfig(data="d.jsonl", out=out), "reward_model")
        assert named.lr == beside.lr
        rates[size] = named.lr
    assert list(rates.values()) == [5e-4, 2e-5]
    assert resolve(SFTConfig(data="d.jsonl", out=tmp_path / "sft"), "sft").lr == 2e-3
    weights.unlink()
    (folder / "adapter_config.json").write_text("{}")
    assert resolve(SFTConfig(data="d.jsonl", model=str(folder)), "sft").lr == 5e-5
