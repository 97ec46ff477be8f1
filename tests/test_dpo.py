"""The stages that do without a critic: DPO, and PPO with the advantages of chapter 8."""

import json
import math
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from rlhf_course import beyond_ppo, cli, mdp
from rlhf_course.errors import ConfigError
from rlhf_course.huggingface import load_language_model
from rlhf_course.runs import read_metrics
from rlhf_course.stages import dpo as dpo_stage
from rlhf_course.stages import ppo as ppo_stage
from rlhf_course.stages.checks import check_settings
from rlhf_course.stages.presets import identity, resolve
from rlhf_course.stages.rollouts import assemble
from rlhf_course.stages.settings import DPOConfig, PPOConfig

TINY = ["--size", "tiny", "--threads", "1", "--dtype", "float32"]
STAGES = {
    "pretrain": ["pretrain", "--steps", "12", "--batch", "8", "--window", "32"],
    "sft": ["sft", "--steps", "12", "--batch", "8", "--eval-every", "6"],
    "comparisons": ["comparisons", "--prompts", "16", "--heldout", "8"],
    "reward_model": ["reward-model", "--steps", "4", "--batch", "4"],
}
PPO = ["ppo", "--iterations", "2", "--batch", "8", "--minibatch", "4", "--kl-horizon", "20"]
DPO = ["dpo", "--batch", "6", "--warmup", "0", "--eval-every", "2", "--eval-prompts", "8"]
WITHOUT_CRITIC = ["rloo", "grpo", "reinforce_plus_plus"]


def run(*arguments) -> None:
    assert cli.main([str(a) for a in arguments]) == 0


@pytest.fixture(scope="module")
def town(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("town")
    for stage, command in STAGES.items():
        run(*command, *TINY, "--out", folder / stage)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model" / "model.safetensors")


def differ(one: Path, other: Path) -> bool:
    theirs = weights(other)
    return any(not torch.equal(weight, theirs[name]) for name, weight in weights(one).items())


def ends_as_if_never_stopped(folder: Path, command: list, every: int) -> None:
    """A run whose newest checkpoints are taken away goes on from the one that is left."""
    whole, cut = folder / "whole", folder / "cut"
    run(*command, "--checkpoint-every", every, "--out", whole)
    shutil.copytree(whole, cut)
    (cut / "done.json").unlink()
    shutil.rmtree(cut / "model")
    newest = sorted((cut / "checkpoints").iterdir())[-1]
    shutil.rmtree(newest)
    assert list((cut / "checkpoints").iterdir()), "nothing to go on from"
    run(*command, "--checkpoint-every", every, "--out", cut)
    for name in ("metrics.jsonl", "done.json", "model/model.safetensors"):
        assert (cut / name).read_bytes() == (whole / name).read_bytes(), name


# --- PPO without a critic ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def runs(town) -> dict[str, Path]:
    """One run of every kind of advantages."""
    for kind in ["gae", *WITHOUT_CRITIC]:
        run(*PPO, *TINY, "--advantages", kind, "--out", town / kind)
    return {kind: town / kind for kind in ["gae", *WITHOUT_CRITIC]}


@pytest.mark.parametrize("kind", WITHOUT_CRITIC)
def test_a_run_without_a_critic(runs, kind):
    rows = read_metrics(runs[kind])
    assert len(rows) == 2, "there is no critic to warm up"
    assert all(math.isfinite(value) for row in rows for value in row.values())
    for row in rows:
        critics = {name for name in row if "value" in name or name == "explained_variance"}
        assert not critics
        assert {"score", "kl", "gold", "policy_loss", "ptx_loss", "policy_grad_norm"} <= set(row)
        assert ("kl_loss" in row) == (kind == "grpo")
    assert rows[0]["kl"] == 0.0
    newest = sorted((runs[kind] / "checkpoints").iterdir())[-1]
    assert not any("critic" in name for name in load_file(newest / "tensors.safetensors"))
    assert all(differ(runs[kind], runs[other]) for other in runs if other != kind)
    load_language_model(runs[kind] / "model")
    assert (runs[kind] / "plots" / "ppo.png").stat().st_size > 5000


@pytest.mark.parametrize("kind", WITHOUT_CRITIC)
def test_a_run_without_a_critic_is_resumed_exactly(town, tmp_path, kind):
    for stage in ("sft", "reward_model"):
        (tmp_path / stage).symlink_to(town / stage)
    more = ["--reward-norm", "running", "--iterations", "3"]
    ends_as_if_never_stopped(tmp_path, [*PPO, *TINY, "--advantages", kind, *more], 1)


class Made:
    """Two prompts with two answers each, of 3, 1, 2 and 2 actions."""

    tokens = torch.zeros(4, 6, dtype=torch.long)
    mask = mdp.action_mask(torch.tensor([2, 2, 1, 1]), torch.tensor([3, 1, 2, 2]), 6)


def assembled(kind, kl_coef=0.5):
    """What `assemble` makes of made-up log-probabilities and scores."""
    generator = torch.Generator().manual_seed(3)
    logprobs, reference = (torch.randn(4, 5, generator=generator) * Made.mask for _ in range(2))
    scores = torch.tensor([1.0, 3.0, -1.0, -4.0])
    config = PPOConfig(advantages=kind, answers_per_prompt=2)
    values = torch.zeros(4, 5)
    rollout, kl = assemble(Made, scores, logprobs, reference, values, kl_coef, config)
    torch.testing.assert_close(kl, (logprobs - reference).sum(dim=1))
    assert torch.equal(rollout.ref_logprobs, reference)
    assert not rollout.value_mask.any()
    assert (rollout.advantages[~Made.mask] == 0).all()
    return rollout.advantages, scores, (logprobs - reference), kl


def test_rloo_pays_for_the_kl_in_the_reward():
    advantages, scores, _, kl = assembled("rloo")
    reward = scores - 0.5 * kl
    for one, other in ((0, 1), (1, 0), (2, 3), (3, 2)):
        here = advantages[one][Made.mask[one]]
        torch.testing.assert_close(here, (reward[one] - reward[other]).expand_as(here))


def test_grpo_leaves_the_kl_to_the_loss():
    advantages, *_ = assembled("grpo")
    for row, expected in enumerate([-(0.5**0.5), 0.5**0.5, 0.5**0.5, -(0.5**0.5)]):
        here = advantages[row][Made.mask[row]]
        torch.testing.assert_close(here, torch.full_like(here, expected))
    assert torch.equal(assembled("grpo", kl_coef=9.0)[0], advantages)


def test_reinforce_plus_plus_pays_token_by_token():
    advantages, scores, kl, _ = assembled("reinforce_plus_plus")
    expected = beyond_ppo.reinforce_plus_plus_advantages(scores, kl, Made.mask, 0.5)
    assert torch.equal(advantages, expected)
    assert advantages[0][Made.mask[0]].unique().numel() == 3


def test_the_price_in_grpos_loss_is_the_controllers(town, tmp_path, monkeypatch):
    seen = []
    update = ppo_stage.PPOTrainer.update

    def watched(self, *args):
        seen.append(self.settings.kl_loss_coef)
        return update(self, *args)

    monkeypatch.setattr(ppo_stage.PPOTrainer, "update", watched)
    models = ["--model", town / "sft" / "model", "--reward-model", town / "reward_model" / "model"]
    run(*PPO, *TINY, "--advantages", "grpo", *models, "--iterations", "3", "--out", tmp_path / "p")
    assert seen == [row["kl_coef"] for row in read_metrics(tmp_path / "p")]
    assert len(set(seen)) == 3


def test_the_answers_to_a_prompt_stand_side_by_side(town, monkeypatch, tmp_path):
    groups = []
    score = ppo_stage.PPOTrainer.score

    def watched(self, answers):
        groups.append([task.text for task in answers.tasks])
        return score(self, answers)

    monkeypatch.setattr(ppo_stage.PPOTrainer, "score", watched)
    models = ["--model", town / "sft" / "model", "--reward-model", town / "reward_model" / "model"]
    for kind, size in (("rloo", 4), ("reinforce_plus_plus", 1), ("gae", 2)):
        groups.clear()
        more = ["--answers-per-prompt", "2"] if kind == "gae" else []
        run(*PPO, *TINY, "--advantages", kind, *models, *more, "--out", tmp_path / kind)
        for texts in groups:
            assert len(texts) == 8
            for first in range(0, 8, size):
                assert len(set(texts[first : first + size])) == 1
            assert len(set(texts)) > 8 // size - 3


BAD = {
    "critic": {"advantages": "rloo", "critic_lr": 1e-3},
    "warm-up": {"advantages": "grpo", "critic_warmup": 3},
    "popart": {"advantages": "grpo", "value_norm": "popart"},
    "sequence": {"advantages": "rloo", "mdp": "sequence"},
    "gamma": {"advantages": "reinforce_plus_plus", "gamma": 0.9},
    "lam": {"advantages": "reinforce_plus_plus", "lam": 1.0},
    "no-whiten": {"advantages": "grpo", "whiten": False},
    "answers-per-prompt 1": {"advantages": "rloo", "answers_per_prompt": 1},
    "no multiple": {"advantages": "grpo", "batch": 32, "answers_per_prompt": 5},
    "at least 1": {"answers_per_prompt": 0},
}


@pytest.mark.parametrize("told", BAD)
def test_settings_that_do_not_go_together_are_refused(told):
    with pytest.raises(ConfigError, match=told if " " in told else "Leave it out"):
        check_settings(resolve(PPOConfig(**BAD[told]), "ppo"))


def test_old_runs_are_still_the_runs_that_they_were():
    """A setting that came later is not named where it says what was always done."""
    told = identity(resolve(PPOConfig(), "ppo"))
    assert not {"advantages", "answers_per_prompt", "world_seed"} & set(told)
    told = identity(resolve(PPOConfig(advantages="rloo", world_seed=3), "ppo"))
    assert (told["advantages"], told["answers_per_prompt"], told["world_seed"]) == ("rloo", 4, 3)
    assert told["critic_warmup"] == 0
    assert told["critic_lr"] is None


# --- DPO -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trained(town) -> Path:
    run(*DPO, *TINY, "--steps", "6", "--lr", "0.001", "--out", town / "dpo")
    return town / "dpo"


def test_dpo_writes_what_every_stage_writes(trained, town):
    rows = read_metrics(trained)
    assert [row["step"] for row in rows] == list(range(6))
    assert all(math.isfinite(value) for row in rows for value in row.values())
    first, last = rows[0], rows[-1]
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-4), "policy and reference are one"
    assert first["margin"] == pytest.approx(0, abs=1e-4)
    assert last["loss"] < first["loss"]
    assert last["margin"] > 0
    assert last["margin"] == pytest.approx(
        last["reward_chosen"] - last["reward_rejected"], rel=1e-4
    )
    measured = {"kl", "gold", "length", "eos_rate", "eval_accuracy", "eval_margin"}
    assert [measured <= set(row) for row in rows] == [False, True] * 3
    done = json.loads((trained / "done.json").read_text())
    assert done["kl"] == last["kl"]
    assert list((trained / "tensorboard").glob("events.out.tfevents.*"))
    assert (trained / "plots" / "dpo.png").stat().st_size > 5000
    load_language_model(trained / "model")
    assert differ(trained, town / "sft")


def test_dpo_is_resumed_exactly(town, tmp_path):
    for stage in ("sft", "comparisons"):
        (tmp_path / stage).symlink_to(town / stage)
    ends_as_if_never_stopped(tmp_path, [*DPO, *TINY, "--steps", "6"], 2)


def test_without_steps_every_pair_comes_once_an_epoch(town, tmp_path):
    lines = (town / "comparisons" / "comparisons.jsonl").read_text().splitlines()
    sizes = [len(json.loads(line)["responses"]) for line in lines]
    for stage in ("sft", "comparisons"):
        (tmp_path / stage).symlink_to(town / stage)
    for kind, count in (("best_worst", len(sizes)), ("all", sum(k * (k - 1) // 2 for k in sizes))):
        out = tmp_path / kind
        run(*DPO, *TINY, "--pairs", kind, "--epochs", "2", "--eval-every", "99", "--out", out)
        assert len(read_metrics(out)) == 2 * math.ceil(count / 6)
    assert differ(tmp_path / "best_worst", tmp_path / "all")


def test_the_pairs_and_what_the_reference_thinks_of_them(town):
    model, _ = load_language_model(town / "sft" / "model")
    ranked = [
        dpo_stage.Ranked([5, 6, 7], [[8, 9], [10], [11, 12, 13]]),
        dpo_stage.Ranked([4], [[9, 9], [3]]),
    ]
    (first, second) = dpo_stage.make_pairs(model, ranked, "best_worst")
    assert (first.chosen, first.rejected) == ([8, 9], [11, 12, 13])
    assert (second.chosen, second.rejected) == ([9, 9], [3])
    chosen = [p.chosen for p in dpo_stage.make_pairs(model, ranked, "all")]
    assert chosen == [[8, 9], [8, 9], [10], [9, 9]]
    for pair in (first, second):
        for answer, told in zip((pair.chosen, pair.rejected), pair.reference, strict=True):
            tokens = torch.tensor([pair.prompt + answer])
            with torch.no_grad():
                logprobs = mdp.token_logprobs(model(tokens), tokens)
            expected = logprobs[0, len(pair.prompt) - 1 :].sum().item()
            assert told == pytest.approx(expected, abs=1e-4)


def test_micro_batches_of_pairs_change_nothing(town, tmp_path):
    for stage in ("sft", "comparisons"):
        (tmp_path / stage).symlink_to(town / stage)
    once = [*DPO, *TINY, "--steps", "2"]
    run(*once, "--out", tmp_path / "whole")
    run(*once, "--micro-batch", "4", "--out", tmp_path / "parts")
    for ours, theirs in zip(
        read_metrics(tmp_path / "whole"), read_metrics(tmp_path / "parts"), strict=True
    ):
        for name in ("loss", "margin", "grad_norm"):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-3, abs=1e-4), name


def test_dpo_on_a_data_set_learns_it(town, tmp_path):
    """Four pairs of a real schema, seen again and again: the margin grows as it must."""
    (tmp_path / "sft").symlink_to(town / "sft")
    prompts = [f"Where does number {n} live?" for n in range(8)]
    rows = [{"prompt": p, "chosen": "In the town.", "rejected": "Who knows."} for p in prompts]
    data = tmp_path / "pairs.jsonl"
    data.write_text("\n".join(map(json.dumps, rows)))
    run("dpo", "--data", data, *TINY, "--batch", "4", "--steps", "12", "--lr", "0.001",
        "--validation", "0.25", "--max-new-tokens", "6", "--eval-every", "6",
        "--out", tmp_path / "dpo")  # fmt: skip
    rows = read_metrics(tmp_path / "dpo")
    assert rows[-1]["margin"] > 0.5
    assert rows[-1]["accuracy"] == 1.0
    assert rows[-1]["eval_accuracy"] == 1.0
    assert "gold" not in rows[-1]
    assert "kl" in rows[-1]


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"beta": 0.0}, "--beta"),
        ({"temperature": 0.0}, "--temperature"),
        ({"micro_batch": 99}, "--micro-batch 99 exceeds"),
        ({"eval_prompts": 0}, "--eval-prompts"),
    ],
)
def test_dpo_refuses_settings_out_of_range(settings, told):
    with pytest.raises(ConfigError, match=told):
        check_settings(resolve(DPOConfig(**settings), "dpo"))


def test_dpo_without_comparisons_says_what_to_do(town, tmp_path, capsys):
    (tmp_path / "sft").symlink_to(town / "sft")
    assert cli.main(["dpo", *TINY, "--out", str(tmp_path / "dpo")]) == 2
    assert "rlhf-course comparisons" in " ".join(capsys.readouterr().err.split())
    assert not (tmp_path / "dpo").exists()
