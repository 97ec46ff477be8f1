"""The stages from end to end, at a size of seconds: what they write, and what each setting does.

Whether they learn well is the demo's business; here one check over three seeds has to see PPO move
in the right direction.
"""

import json
import math
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_course import cli
from rlhf_course.huggingface import load_language_model
from rlhf_course.reward_model import ScalarModel
from rlhf_course.runs import read_metrics
from rlhf_course.stages import ppo as ppo_stage

TINY = ["--size", "tiny", "--threads", "1"]
STAGES = {
    "pretrain": ["pretrain", "--steps", "12", "--batch", "8", "--window", "32"],
    "sft": ["sft", "--steps", "12", "--batch", "8", "--eval-every", "6"],
    "comparisons": ["comparisons", "--prompts", "16", "--heldout", "8"],
    "reward_model": ["reward-model", "--steps", "4", "--batch", "4"],
    "ppo": ["ppo", "--iterations", "2", "--critic-warmup", "1", "--batch", "8", "--minibatch", "4",
            "--kl-horizon", "20"],
}  # fmt: skip


def run(*arguments) -> None:
    assert cli.main([str(a) for a in arguments]) == 0


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def contents(folder: Path) -> dict[str, tuple[int, int]]:
    files = (p for p in folder.rglob("*") if p.is_file())
    return {str(p): (p.stat().st_mtime_ns, p.stat().st_size) for p in files}


def run_stages(world: str, folder: Path) -> Path:
    for stage, command in STAGES.items():
        run(*command, *TINY, "--world", world, "--out", folder / stage)
    return folder


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Path:
    return run_stages("town", tmp_path_factory.mktemp("town"))


@pytest.fixture(scope="module")
def reviews(tmp_path_factory) -> Path:
    return run_stages("reviews", tmp_path_factory.mktemp("reviews"))


@pytest.fixture(params=["town", "reviews"])
def pipeline(request) -> tuple[str, Path]:
    """(world, folder): every stage of a world, run by its command."""
    return request.param, request.getfixturevalue(request.param)


# --- what the stages write -----------------------------------------------------------------------


def test_run_folders_are_complete(pipeline):
    world, folder = pipeline
    for stage in STAGES:
        path = folder / stage
        rows = read_metrics(path)
        assert [row["step"] for row in rows] == list(range(len(rows))), stage
        assert all(math.isfinite(value) for row in rows for value in row.values()), stage
        assert len((path / "timing.jsonl").read_text().splitlines()) in (0, len(rows))
        assert json.loads((path / "config.json").read_text())["world"] == world
        assert (path / "done.json").exists()
        assert list((path / "tensorboard").glob("events.out.tfevents.*"))
        newest = sorted((path / "checkpoints").iterdir())[-1]
        assert newest.name == f"step-{len(rows):06d}"
        if stage != "comparisons":
            assert (path / "plots" / f"{stage}.png").stat().st_size > 5000
    assert len(read_metrics(folder / "ppo")) == 3
    lines = {name: (folder / "comparisons" / f"{name}.jsonl").read_text().splitlines()
             for name in ("heldout", "comparisons")}  # fmt: skip
    assert len(lines["heldout"]) == 8
    assert 8 <= len(lines["comparisons"]) <= 16
    best = json.loads(lines["comparisons"][0])
    assert len(best["responses"]) == len(best["finished"]) == len(best["utilities"]) >= 2


def test_finished_stages_are_left_alone(pipeline):
    world, folder = pipeline
    before = contents(folder)
    run_stages(world, folder)
    assert contents(folder) == before


def test_what_is_saved_opens_in_transformers(pipeline):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

    _, folder = pipeline
    tokenizer = AutoTokenizer.from_pretrained(folder / "ppo" / "model")
    prompt = [{"role": "user", "content": "where does she live ?"}]
    tokens = tokenizer.apply_chat_template(
        prompt, add_generation_prompt=True, return_tensors="pt", return_dict=False
    )
    for stage in ("pretrain", "sft", "ppo"):
        model, _ = load_language_model(folder / stage / "model")
        theirs = AutoModelForCausalLM.from_pretrained(folder / stage / "model")
        assert (theirs(tokens).logits - model(tokens)).abs().max() < 1e-4
    model = ScalarModel.from_pretrained(folder / "reward_model" / "model")
    theirs = AutoModelForSequenceClassification.from_pretrained(folder / "reward_model" / "model")
    ours = model.token_scores(tokens)[0, -1]
    assert abs(theirs(tokens).logits.item() - ours.item()) < 1e-4


def test_a_policy_is_evaluated_beside_a_baseline(pipeline, tmp_path):
    world, folder = pipeline
    run("evaluate", *TINY, "--world", world, "--out", folder / "evaluate", "--split", "validation")
    found = json.loads((folder / "evaluate" / "figures.json").read_text())
    assert {"gold", "shares", "perplexity", "proxy", "kl", "groups"} <= set(found["policy"])
    assert found["policy"]["perplexity"] > 1
    for group in found["policy"]["groups"].values():
        assert group["win_low"] <= group["win_rate"] <= group["win_high"]
    # A policy beside itself: no KL, and half of the wins.
    itself = ["--model", folder / "sft" / "model", "--baseline", folder / "sft" / "model"]
    run("evaluate", *TINY, "--world", world, *itself, "--out", tmp_path)
    found = json.loads((tmp_path / "figures.json").read_text())
    assert abs(found["policy"]["kl"]) < 1e-6
    assert all(g["win_rate"] == 0.5 for g in found["policy"]["groups"].values())


# --- what PPO's settings do ----------------------------------------------------------------------


@pytest.fixture(scope="module")
def plain(town) -> Path:
    """PPO in float32 with the settings to which every other one is compared."""
    return ppo(town, "plain")


def ppo(town: Path, name: str, *flags) -> Path:
    out = town / name
    run(*STAGES["ppo"], *TINY, "--dtype", "float32", *flags, "--out", out)
    return out


VARIANTS = {
    "sequence": ["--mdp", "sequence"],
    "sequence_ratio": ["--mdp", "sequence", "--sequence-ratio"],
    "gamma": ["--gamma", "0.9"],
    "lam": ["--lam", "0.5"],
    "clip": ["--clip", "0.01"],
    "dual_clip": ["--dual-clip", "1.001", "--clip", "0.5"],
    "value_clip": ["--value-clip", "0.001"],
    "entropy": ["--entropy-coef", "0.1"],
    "max_grad_norm": ["--max-grad-norm", "0.1"],
    "no_whiten": ["--no-whiten"],
    "no_kl": ["--kl-coef", "0"],
    "fixed_kl": ["--kl-controller", "fixed"],
    "ziegler": ["--kl-controller", "adaptive"],
    "kl_floor": ["--kl-floor", "0.15"],
    "running": ["--reward-norm", "running"],
    "ema": ["--reward-norm", "ema"],
    "popart": ["--value-norm", "popart"],
    "reward_clip": ["--reward-clip", "0.05"],
    "eos_penalty": ["--eos-penalty", "3"],
    "eos_override": ["--eos-override", "-1"],
    "no_ptx": ["--ptx-coef", "0"],
    "seq_sum": ["--ptx-reduction", "seq_sum"],
    "ptx_rows": ["--ptx-rows", "4"],
    "temperature": ["--temperature", "0.7"],
    "known_share": ["--known-share", "1"],
    "one_epoch": ["--epochs", "1"],
}


@pytest.mark.parametrize("name", VARIANTS)
def test_every_setting_of_ppo_does_something(town, plain, monkeypatch, name):
    ratios = []
    check = ppo_stage.PPOTrainer.check_ratio
    monkeypatch.setattr(
        ppo_stage.PPOTrainer, "check_ratio",
        lambda self, moved: (ratios.append(moved), check(self, moved)),
    )  # fmt: skip
    out = ppo(town, name, *VARIANTS[name])
    rows = read_metrics(out)
    assert all(math.isfinite(value) for row in rows for value in row.values())
    assert len(ratios) == 2, "asked before the first update of each rollout"
    assert max(ratios) < 1e-5, "rollout and update agree about the same tokens"
    other = weights(plain)
    assert any(not torch.equal(w, other[k]) for k, w in weights(out).items()), "no effect"
    told = [row["kl_coef"] for row in rows]
    if name in ("no_kl", "fixed_kl", "kl_floor"):
        assert told == [told[0]] * 3
    if name == "kl_floor":
        assert told[0] == 0.15
    assert ("ptx_loss" in rows[-1]) == (name != "no_ptx")
    if name == "reward_clip":  # then the penalty of one for each that did not end
        assert all(-5 <= row["score"] <= 0.05 for row in rows)


def test_micro_batches_change_nothing_but_memory(town):
    """One update, read from its losses and gradients: Adam blows rounding up beyond that."""
    once = ["--iterations", "1", "--critic-warmup", "0", "--epochs", "1", "--minibatch", "8"]
    (whole,), (parts,) = (
        read_metrics(ppo(town, name, *once, *more))
        for name, more in (("whole", []), ("parts", ["--micro-batch", "3"]))
    )
    for name, value in whole.items():
        assert parts[name] == pytest.approx(value, rel=1e-4, abs=1e-6), name
    assert whole["policy_grad_norm"] > 0.1
    assert whole["value_grad_norm"] > 0.1
    assert parts != whole, "the flag did nothing"


def test_the_reference_and_the_reward_model_do_not_move(town, monkeypatch):
    trainers = []
    iterate = ppo_stage.PPOTrainer.iterate

    def watched(self, step):
        trainers.append(self)
        return iterate(self, step)

    monkeypatch.setattr(ppo_stage.PPOTrainer, "iterate", watched)
    ppo(town, "watched")
    fresh, _ = load_language_model(town / "sft" / "model")
    scorer = ScalarModel.from_pretrained(town / "reward_model" / "model")
    trainer = trainers[0]
    for model, expected in ((trainer.reference, fresh), (trainer.reward_model, scorer)):
        for ours, theirs in zip(model.parameters(), expected.parameters(), strict=True):
            assert torch.equal(ours, theirs)
    assert not torch.equal(next(trainer.policy.parameters()), next(fresh.parameters()))


def test_while_the_critic_warms_up_the_policy_stands_still(town):
    out = ppo(town, "warm_up", "--critic-warmup", "2", "--iterations", "1", "--lr-floor", "0.01")
    rows = read_metrics(out)
    assert [("policy_loss" in row) for row in rows] == [False, False, True]
    assert rows[0]["kl"] == rows[1]["kl"] == rows[2]["kl"] == 0.0
    assert rows[1]["value_loss"] < rows[0]["value_loss"]


# --- other people's models -----------------------------------------------------------------------


@pytest.fixture(scope="module", params=["llama", "qwen2"])
def foreign(request, town, tmp_path_factory) -> Path:
    """A tiny random model of another architecture that knows the town's tokens."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    _, tokenizer = load_language_model(town / "sft" / "model")
    shape = {
        "vocab_size": len(tokenizer), "max_position_embeddings": 64, "hidden_size": 64,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }  # fmt: skip
    torch.manual_seed(0)
    llama = request.param == "llama"
    model = LlamaForCausalLM(LlamaConfig(**shape)) if llama else \
        Qwen2ForCausalLM(Qwen2Config(**shape))  # fmt: skip
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    return folder


def test_every_trainer_takes_a_hugging_face_model(foreign):
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    for stage in ("pretrain", "sft"):
        more = ["--window", "16"] if stage == "pretrain" else []
        run(stage, *TINY, "--model", foreign / "base", "--steps", "4", "--batch", "8", *more,
            "--lr", "0.003", "--warmup", "0", "--out", foreign / stage)  # fmt: skip
        loss = [row["loss"] for row in read_metrics(foreign / stage)]
        assert loss[-1] < loss[0]
    for stage in ("comparisons", "reward_model", "ppo"):
        run(*STAGES[stage], *TINY, "--out", foreign / stage)
    assert read_metrics(foreign / "ppo")[1]["ratio_max"] > 1
    kind = type(AutoModelForCausalLM.from_pretrained(foreign / "base"))
    assert type(AutoModelForCausalLM.from_pretrained(foreign / "ppo" / "model")) is kind
    classifier = AutoModelForSequenceClassification.from_pretrained(
        foreign / "reward_model" / "model"
    )
    assert type(classifier).__name__ == kind.__name__.replace("CausalLM", "SequenceClassification")
    before, after = weights(foreign / "sft"), weights(foreign / "ppo")
    assert before.keys() == after.keys()
    assert all(not torch.equal(before[name], after[name]) for name in before)


# --- data sets -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """The town's data as files, as `rlhf-course world` writes them."""
    folder = tmp_path_factory.mktemp("files")
    run("world", "--size", "tiny", "--out", folder / "town")
    return folder / "town"


@pytest.fixture(scope="module")
def on_files(files, tmp_path_factory) -> Path:
    """Every stage on files, from scratch."""
    out = tmp_path_factory.mktemp("on_files")
    few = ["--threads", "1", "--batch", "8", "--warmup", "0"]
    run("pretrain", "--data", files / "corpus.jsonl", "--size", "tiny", "--steps", "4", *few,
        "--context", "64", "--window", "48", "--out", out / "pretrain")  # fmt: skip
    run("sft", "--data", files / "demonstrations.jsonl", "--model", "tiny", "--steps", "16", *few,
        "--context", "64", "--eval-every", "8", "--out", out / "sft")  # fmt: skip
    run("reward-model", "--data", files / "comparisons.jsonl", "--steps", "4", *few,
        "--out", out / "reward_model")  # fmt: skip
    run("ppo", "--data", files / "prompts.jsonl", "--iterations", "2", "--critic-warmup", "1",
        "--batch", "8", "--minibatch", "4", "--max-new-tokens", "8", "--threads", "1", "--ptx-coef",
        "0.1", "--ptx-data", files / "corpus.jsonl", "--out", out / "ppo")  # fmt: skip
    return out


def test_every_stage_runs_on_files(on_files):
    for stage in ("pretrain", "sft", "reward_model", "ppo"):
        rows = read_metrics(on_files / stage)
        assert all(math.isfinite(value) for row in rows for value in row.values()), stage
        assert (on_files / stage / "done.json").exists()
    sft = read_metrics(on_files / "sft")
    assert sft[15]["eval_loss"] < sft[7]["eval_loss"] < sft[0]["loss"]
    assert 0 <= sft[15]["eval_exact_match"] <= 1
    assert 0 <= read_metrics(on_files / "reward_model")[-1]["eval_accuracy"] <= 1
    assert "ptx_loss" in read_metrics(on_files / "ppo")[-1]
    done = json.loads((on_files / "ppo" / "done.json").read_text())
    assert {"held_out_reward_before", "held_out_reward_after"} <= set(done)


def test_parquet_and_packing(files, on_files, tmp_path):
    import pyarrow
    import pyarrow.parquet

    lines = (files / "demonstrations.jsonl").read_text().splitlines()
    table = pyarrow.Table.from_pylist([json.loads(line) for line in lines])
    pyarrow.parquet.write_table(table, tmp_path / "train.parquet")
    few = ["--threads", "1", "--batch", "8", "--warmup", "0", "--steps", "2", "--context", "64",
           "--dtype", "float32", "--model", "tiny"]  # fmt: skip
    run("sft", "--data", tmp_path / "train.parquet", *few, "--out", tmp_path / "parquet")
    run("sft", "--data", files / "demonstrations.jsonl", *few, "--out", tmp_path / "lines")
    run("sft", "--data", files / "demonstrations.jsonl", *few, "--packing", "False",
        "--out", tmp_path / "unpacked")  # fmt: skip
    packed, unpacked = (weights(tmp_path / name) for name in ("lines", "unpacked"))
    for name, weight in weights(tmp_path / "parquet").items():
        assert torch.equal(weight, packed[name])
        torch.testing.assert_close(weight, unpacked[name], rtol=0, atol=1e-5)
    rows = [read_metrics(tmp_path / name)[1]["loss"] for name in ("lines", "unpacked")]
    assert rows[0] == pytest.approx(rows[1], abs=1e-5)


def test_dialogues_of_several_turns(files, on_files, tmp_path):
    turns = [
        {"role": "user", "content": "Hello."},
        {"role": "assistant", "content": "Hello to you."},
        {"role": "user", "content": "Where do you live?"},
    ]
    answer = [{"role": "assistant", "content": "In Oslo."}]
    other = [{"role": "assistant", "content": "In Rome."}]
    rows = [{"messages": [*turns, *answer], "prompt": turns, "chosen": answer, "rejected": other}]
    data = tmp_path / "turns.jsonl"
    data.write_text("\n".join(map(json.dumps, rows * 10)))
    few = ["--data", data, "--threads", "1", "--batch", "4", "--out"]
    run("sft", "--model", "tiny", "--context", "64", "--steps", "2", *few, tmp_path / "sft")
    run("reward-model", "--steps", "2", *few, tmp_path / "reward_model")
    run("ppo", "--iterations", "2", "--max-new-tokens", "4", *few, tmp_path / "ppo")
    assert len(read_metrics(tmp_path / "ppo")) == 6


@pytest.fixture
def reward_module(tmp_path, monkeypatch):
    """Write the module `seen_reward`; it is imported from the current folder."""

    def put(source: str) -> None:
        (tmp_path / "seen_reward.py").write_text(source)
        sys.modules.pop("seen_reward", None)  # or the one before it would be called again

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    yield put
    sys.modules.pop("seen_reward", None)


def test_a_reward_function_sees_prompts_answers_and_columns(
    files, on_files, reward_module, tmp_path
):
    reward_module(
        "calls = []\n"
        "def score(prompts, responses, rows):\n"
        "    calls.append((prompts, responses, rows))\n"
        "    return [float(row['group'] == 'known') for row in rows]\n"
    )
    rows = map(json.loads, (files / "prompts.jsonl").read_text().splitlines())
    everything = list({row["prompt"]: row for row in rows}.values())  # each prompt once
    data = tmp_path / "prompts.jsonl"
    data.write_text("\n".join(map(json.dumps, everything)))
    run("ppo", "--data", data, "--model", on_files / "sft" / "model",
        "--reward", "seen_reward:score", "--iterations", "2", "--critic-warmup", "0", "--batch",
        "8", "--max-new-tokens", "6", "--threads", "1", "--out", tmp_path / "ppo")  # fmt: skip
    calls = sys.modules["seen_reward"].calls
    *rollouts, before, after = calls
    assert [len(prompts) for prompts, _, _ in rollouts] == [8, 8]
    for prompts, responses, rows in calls:
        assert len(prompts) == len(responses) == len(rows)
        assert all(row in everything for row in rows)
        assert [row["prompt"] for row in rows] == prompts
        assert all(isinstance(r, str) and "<|endoftext|>" not in r for r in responses)
    # The held-out prompts are asked before and after, and in no rollout.
    assert before[0] == after[0]
    assert not set(before[0]) & {p for prompts, _, _ in rollouts for p in prompts}
    shares = [sum(row["group"] == "known" for row in rows) / 8 for _, _, rows in rollouts]
    assert [row["reward"] for row in read_metrics(tmp_path / "ppo")] == pytest.approx(shares)


# --- learning ------------------------------------------------------------------------------------

LIKES_NAMES = """
def score(prompts, responses, rows):
    '''Times the share of words that begin with a capital.'''
    words = [response.split() for response in responses]
    return [{sign} * sum(w[0].isupper() for w in said) / max(len(said), 1) for said in words]
"""


@pytest.mark.parametrize(
    ("sign", "seed", "least"), [(1, 0, 0.12), (1, 1, 0.12), (1, 2, 0.12), (-1, 0, 0.06)]
)
def test_ppo_moves_towards_the_reward(town, reward_module, tmp_path, sign, seed, least):
    """Paid for names, it says them more often, fined for them, less: 38 % become 65 % or 26 %.

    An answer's end costs and brings nothing, or it would learn that above all.
    """
    reward_module(LIKES_NAMES.format(sign=sign))
    run("ppo", *TINY, "--model", town / "sft" / "model", "--reward", "seen_reward:score", "--seed",
        seed, "--eos-penalty", "0", "--kl-coef", "0", "--ptx-coef", "0", "--max-new-tokens", "8",
        "--iterations", "8", "--batch", "64", "--minibatch", "16", "--epochs", "4", "--lr", "0.001",
        "--warmup", "0", "--critic-warmup", "1", "--out", tmp_path / "ppo")  # fmt: skip
    reward = [row["reward"] for row in read_metrics(tmp_path / "ppo")]
    before, after = sum(reward[:2]) / 2, sum(reward[-2:]) / 2
    assert after > before + least, reward
