"""PPO with vLLM's answers in the process that trains: one run of the command, by a real engine."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import pytest
import tiny_families
import torch

from rlhf_course import cli
from rlhf_course.device import Device
from rlhf_course.distributed import one_process
from rlhf_course.errors import ConfigError
from rlhf_course.stages.ppo import ppo
from rlhf_course.stages.presets import resolve
from rlhf_course.stages.settings import PPOConfig

ROOT = Path(__file__).parents[1]
REWARD = """
def score(prompts, responses, rows):
    return [float(len(set(r))) / 10 for r in responses]
"""


def test_the_stage_alone_does_not_sample_by_itself_in_its_place(tmp_path):
    with pytest.raises(ConfigError, match="the command line starts it"):
        ppo(PPOConfig(rollout="vllm", size="tiny", out=tmp_path / "run"))
    assert not (tmp_path / "run").exists()


def test_a_ratio_of_whole_answers_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("rlhf_course.distributed.one_process.installed", lambda name: "1")
    given = "ppo --rollout vllm --mdp sequence --sequence-ratio --size tiny"
    assert cli.main(given.split(" ")) == 2
    assert "--rollout vllm and --sequence-ratio" in capsys.readouterr().err


def test_without_vllm_it_says_what_is_missing(monkeypatch, capsys):
    monkeypatch.setattr("rlhf_course.distributed.one_process.installed", lambda name: None)
    assert cli.main(["ppo", "--rollout", "vllm", "--size", "tiny"]) == 2
    assert "vLLM is not installed" in capsys.readouterr().err


@pytest.mark.xdist_group("engines")
@pytest.mark.skipif(importlib.util.find_spec("vllm") is None, reason="vLLM is not installed")
def test_vllm_answers_with_the_weights_of_every_update(tmp_path):
    from rlhf_course.gpt import GPT, GPTConfig
    from rlhf_course.world.tokenizer import train_tokenizer

    tokenizer = train_tokenizer(["say it again and again"] * 9, 300, whole_words=False)
    torch.manual_seed(0)
    GPT(GPTConfig(len(tokenizer), 64, 2, 2, 64)).save_pretrained(tmp_path / "model", tokenizer)
    rows = "\n".join(json.dumps({"prompt": "again " * (1 + i % 4)}) for i in range(24))
    (tmp_path / "prompts.jsonl").write_text(rows, encoding="utf-8")
    (tmp_path / "lengths.py").write_text(REWARD, encoding="utf-8")
    command = (
        "-m rlhf_course ppo --data prompts.jsonl --model model --reward lengths:score --rollout "
        "vllm --iterations 3 --critic-warmup 0 --batch 8 --minibatch 4 --lr 3e-3 --dtype float32 "
        "--kl-horizon 100 --max-new-tokens 12 --warmup 0 --out run"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, *command.split(" ")], cwd=tmp_path, capture_output=True, text=True,
        env=environment, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    assert len(found) == 3
    # Another version of the weights would show: three updates of this size move them far.
    assert all(row["rollout_logprob_gap"] < 1e-4 for row in found), found
    assert all(row["rollout_outside"] == 0 for row in found)
    assert found[2]["kl"] > 100 * found[2]["rollout_logprob_gap"]
    assert found[0]["kl"] == pytest.approx(0, abs=1e-3)


def test_rows_without_a_token_have_a_logit_where_the_engine_can_draw_them(tmp_path, monkeypatch):
    tiny_families.save("qwen2.5", tmp_path / "model")  # its embedding is padded
    (tmp_path / "d.jsonl").write_text('{"prompt": "Who?", "response": "She."}\n' * 4)
    (tmp_path / "padded_score.py").write_text(REWARD)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(one_process, "RolloutEngine", mock.MagicMock())
    config = PPOConfig(
        data=str(tmp_path / "d.jsonl"), model=str(tmp_path / "model"), rollout="vllm",
        reward="padded_score:score", advantages="rloo", batch=4, max_new_tokens=4,
    )  # fmt: skip
    trainer = one_process.VLLMTrainer(resolve(config, "ppo"), Device(torch.device("cpu"), None, 1))
    rows = trainer.policy.model.get_output_embeddings().weight.shape[0]
    assert rows > len(trainer.tokenizer)
    for model in (trainer.policy, trainer.reference):
        assert model(torch.tensor([[3, 4]])).shape[-1] == rows
