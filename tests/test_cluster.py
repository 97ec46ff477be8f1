"""PPO-ptx on the real Ray, vLLM and DeepSpeed: small runs, and what becomes of them when processes
are killed. Every process of a run carries a mark in its environment, by which orphans are found."""

import json
import os
import shutil
import signal
from pathlib import Path

import pytest

from rlhf_course import cli
from rlhf_course.gpt import GPT
from rlhf_course.planning.doctor import distributed_missing
from rlhf_course.reward_model import ScalarModel
from rlhf_course.runs import read_metrics, read_timing
from rlhf_course.stages.presets import model_shape
from rlhf_course.world import make_world
from tests.cluster_run import Ran

pytestmark = pytest.mark.xdist_group("cluster")
needs_cluster = pytest.mark.skipif(
    distributed_missing() is not None, reason=str(distributed_missing())
)

SMALL = ["ppo-ray", "--size", "tiny", "--iterations", "3", "--critic-warmup", "1", "--batch", "16",
         "--minibatch", "8", "--epochs", "1", "--kl-horizon", "40", "--reward-norm", "running",
         "--value-norm", "popart", "--micro-batch", "3", "--timeout", "200"]  # fmt: skip
COLOCATED = [*SMALL, "--actor-ranks", "2", "--engines", "2", "--verify-sync", "2"]
SEPARATE = [
    *SMALL,
    "--no-colocate",
    "--actor-ranks",
    "1",
    "--staleness",
    "1",
    "--importance",
    "tis",
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A policy and a reward model of the town, untrained but not neutral."""
    folder = tmp_path_factory.mktemp("models")
    tokenizer = make_world("town", "tiny", 0).tokenizer
    policy = GPT(model_shape("tiny", len(tokenizer), 64))
    for parameter in policy.parameters():
        if parameter.dim() == 2:
            parameter.data.mul_(4)  # sharper than fresh weights, so that a wrong one shows
    policy.save_pretrained(folder / "policy", tokenizer)
    ScalarModel.from_language_model(policy, "last").save_pretrained(folder / "reward", tokenizer)
    return ["--model", str(folder / "policy"), "--reward-model", str(folder / "reward")]


def weights(out: Path) -> bytes:
    return (out / "model" / "model.safetensors").read_bytes()


@pytest.fixture(scope="module")
def undisturbed(models, tmp_path_factory):
    run = Ran([*COLOCATED, *models], tmp_path_factory.mktemp("undisturbed") / "run")
    assert run.code == 0, run.said
    return run


@needs_cluster
def test_a_run_ends_with_a_model_and_without_orphans(undisturbed):
    assert not undisturbed.orphans()
    metrics = read_metrics(undisturbed.out)
    assert [row["step"] for row in metrics] == [0, 1, 2, 3]
    assert all(row["rollout_logprob_gap"] < 1e-4 for row in metrics)
    assert all(row["staleness"] == 0 for row in metrics)
    timing = read_timing(undisturbed.out)
    assert all(0 < row["generation_share"] < 1 for row in timing)
    trained = GPT.from_pretrained(undisturbed.out / "model")
    assert sum(p.abs().sum().item() for p in trained.parameters()) > 0


@needs_cluster
def test_killed_anywhere_a_run_goes_on_and_ends_with_the_same_bits(undisturbed, models, tmp_path):
    """The controller dies in a rollout; started again, the run loses an engine in a sync, a rank in
    an update, and one while it writes a checkpoint, each time healing itself."""
    out = tmp_path / "run"
    first = Ran([*COLOCATED, *models], out, [[1, "generate", "controller"]])
    assert first.code == -signal.SIGKILL
    assert not (out / "done.json").exists()
    roles = "actor/reference/critic/reward"
    again = Ran(
        [*COLOCATED, *models], out,
        [[1, "sync", "engine 1"], [2, "update_actor", f"{roles} rank 1"],
         [3, "save", f"{roles} rank 0"]],
    )  # fmt: skip
    assert again.code == 0, again.said
    assert sum(what.startswith("kill") for _, what in again.log) == 3
    assert max(again.after_kill("clear")) < 60
    assert again.said.count("Starting anew from the last checkpoint") == 3
    assert not first.orphans()
    assert not again.orphans()
    assert read_metrics(out) == read_metrics(undisturbed.out)
    assert weights(out) == weights(undisturbed.out)


@needs_cluster
def test_one_step_off_the_answers_are_one_update_old_and_survive_a_loss(models, tmp_path):
    """Separate roles, rollouts beside the training. The critic dies; the answers that had run ahead
    stand in the checkpoint, so the run that goes on trains on them."""
    out = tmp_path / "run"
    run = Ran([*SEPARATE, *models], out, [[2, "update_critic", "critic rank 0"]])
    assert run.code == 0, run.said
    assert run.said.count("Starting anew") == 1
    assert not run.orphans()
    metrics = read_metrics(out)
    assert [row["staleness"] for row in metrics] == [0, 1, 1, 1]
    assert metrics[0]["rollout_logprob_gap"] < 1e-4
    assert metrics[2]["rollout_logprob_gap"] > 1e-4  # its answers are of the weights before


@needs_cluster
def test_without_reward_model_and_critic_and_the_end_is_repeated(models, tmp_path, monkeypatch):
    """Two roles and the engine share a bundle; a rank has no corpus row; one prompt is held out,
    for two ranks. When the engine dies behind the last checkpoint, the new one gets the weights
    before it answers: the summary is that of a run which nothing disturbed."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    (tmp_path / "shortness.py").write_text("def score(p, r, rows): return [-len(x) for x in r]\n")
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text("".join(f'{{"prompt": "Who is {x}?"}}\n' for x in "ABCDE"))
    corpus = tmp_path / "corpus.jsonl"
    corpus.write_text('{"text": "They live in Rome."}\n' * 40)
    arguments = [*SMALL, *models[:2], "--advantages", "rloo", "--value-norm", "none", "--data",
                 str(prompts), "--reward", "shortness:score", "--ptx-rows", "1", "--lr", "0.003",
                 "--critic-warmup", "0", "--max-new-tokens", "8", "--ptx-coef", "0.1", "--ptx-data",
                 str(corpus)]  # fmt: skip
    calm = Ran(arguments, tmp_path / "calm")
    assert calm.code == 0, calm.said
    run = Ran(arguments, tmp_path / "run", [[2, "held out", "engine 0"]])
    assert run.code == 0, run.said
    assert run.said.count("Starting anew") == 1
    assert not run.orphans()
    first, second = (json.loads((out.out / "done.json").read_text()) for out in (calm, run))
    assert first["held_out_reward_after"] == second["held_out_reward_after"]
    assert weights(calm.out) == weights(run.out)


@needs_cluster
def test_a_run_that_loses_processes_too_often_stops_and_says_so(models, tmp_path):
    out = tmp_path / "run"
    plan = [[0, "score", "actor/reference/critic/reward rank 0"]]
    arguments = [*SMALL, "--actor-ranks", "1", "--restarts", "0"]
    run = Ran([*arguments, *models], out, plan)
    assert run.code == 2
    assert "rank 0 died" in run.said
    assert not run.orphans()
    assert not out.exists() or not (out / "model").exists()


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--staleness", "1"], "--no-colocate"),
        (["--actor-ranks", "0"], "--actor-ranks 0"),
        (["--critic-ranks", "3"], "--actor-ranks"),
        (["--autotp", "3"], "--autotp 3"),
        (["--importance-low", "6"], "--importance-high"),
        (["--gpu-memory-utilization", "1.5"], "--gpu-memory-utilization"),
        (["--timeout", "0"], "--timeout"),
        (["--actor-ranks", "9"], "minibatch of 8 answers"),
        (["--engines", "17"], "--batch 16"),
        (["--channel", "ipc", "--no-colocate"], "--colocate"),
        (["--channel", "nccl"], "--no-colocate"),
        (["--importance", "tis", "--mdp", "sequence", "--sequence-ratio"], "--sequence-ratio"),
        (["--deepspeed", "nowhere.json"], "--deepspeed nowhere.json: cannot be read"),
        (["--deepspeed", "/dev/null"], "--deepspeed /dev/null: cannot be read"),
        (["--dtype", "bfloat16"], "--dtype bfloat16: without GPUs"),
        (["--model", "nowhere/at/all"], "no such directory"),
        (["--ray-address", "127.0.0.1:9"], "--ray-address"),
    ],
)
@needs_cluster
def test_wrong_flags_are_told_before_anything_starts(flags, words, models, tmp_path, capsys):
    out = tmp_path / "run"
    given = models if "--model" not in flags else models[2:]
    assert cli.main([*SMALL, *given, *flags, "--out", str(out)]) == 2
    said = " ".join(capsys.readouterr().err.split())
    assert words in said
    assert not out.exists()
    shutil.rmtree(out, ignore_errors=True)
