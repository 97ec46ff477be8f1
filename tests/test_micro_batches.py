"""--micro-batch: less memory, the same update."""

import json
from dataclasses import replace

import pytest
import torch

from rlhf_course import cli
from rlhf_course.reward_model import ScalarModel
from rlhf_course.sft import IGNORE, pack, segment_mask
from rlhf_course.stages import reward_model as rm_stage
from rlhf_course.stages import rollouts
from rlhf_course.stages import sft as sft_stage
from rlhf_course.stages.reward_model import Ranked
from rlhf_course.stages.rollouts import Answers, Task
from rlhf_course.stages.settings import PPOConfig, RewardModelConfig
from tests.tiny_models import CONTEXT, KINDS, VOCABULARY, tiny

CPU = torch.device("cpu")


def examples(count=11, seed=0):
    """Dialogues (tokens, labels) of lengths 4 … 40, answers at least 1 token long."""
    generator = torch.Generator().manual_seed(seed)
    made = []
    for i in range(count):
        length = 4 + (i * 17) % 37
        tokens = torch.randint(1, VOCABULARY, (length,), generator=generator).tolist()
        start = 1 + (i * 5) % (length - 1)
        made.append((tokens, [IGNORE] * start + tokens[start:]))
    return made


def batch_of(packed: bool):
    if not packed:
        return *sft_stage.padded(examples(), CONTEXT), None, None
    rows = pack(examples(), CONTEXT, 0)
    return rows.tokens, rows.labels, segment_mask(rows.segments), rows.positions


def update_of(model, backward):
    model.zero_grad(set_to_none=True)
    loss = backward()
    return loss, [p.grad for p in model.parameters() if p.grad is not None]


def assert_same(first, second):
    torch.testing.assert_close(first[0], second[0], rtol=1e-5, atol=0)
    assert len(first[1]) == len(second[1]) > 3
    for a, b in zip(first[1], second[1], strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("size", [1, 3])
def test_sft_makes_the_same_update(kind, packed, size):
    model, batch = tiny(kind), batch_of(packed)
    whole, parts = (
        update_of(model, lambda n=n: sft_stage.backward(model, batch, n, CPU)) for n in (None, size)
    )
    assert_same(whole, parts)


def test_a_part_holds_rows_of_like_length_and_no_column_of_pads():
    tokens, labels, *_ = batch_of(False)
    parts = sft_stage.micro_batches((tokens, labels, None, None), 3, CPU)
    assert [len(part[0]) for part in parts] == [3, 3, 3, 2]
    widths = [part[0].shape[1] for part in parts]
    assert widths == sorted(widths, reverse=True) and widths[-1] <= 16 < widths[0]
    assert sum(int((part[1] != IGNORE).sum()) for part in parts) == int((labels != IGNORE).sum())
    wholes = sft_stage.micro_batches((tokens, labels, None, None), None, CPU)
    assert wholes[0][0] is tokens


def ranked(answers=(2, 4, 1, 3, 2, 4)):
    """One prompt with a single answer among them: it has no pair, and must not count."""
    generator = torch.Generator().manual_seed(1)

    def some(n):
        return torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()

    return [
        Ranked(some(2 + 3 * i % 7), [some(1 + (5 * i + 7 * j) % 30) for j in range(count)])
        for i, count in enumerate(answers)
    ]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("loss", ["kwise", "pairwise"])
@pytest.mark.parametrize("size", [1, 4])
def test_the_reward_model_makes_the_same_update(kind, loss, size):
    model, part = ScalarModel.from_language_model(tiny(kind), "mean"), ranked()
    config = RewardModelConfig(loss=loss)
    whole, parts = (
        update_of(model, lambda n=n: rm_stage.backward(replace(config, micro_batch=n), model, part))
        for n in (None, size)
    )
    assert_same(whole, parts)


@pytest.mark.parametrize("kind", KINDS)
def test_scores_by_length_stand_where_they_belong(kind):
    policy, reference = tiny(kind), tiny(kind, seed=1)
    critic = ScalarModel.from_language_model(policy)
    prompts = [[1 + i] * (1 + 7 * i % 11) for i in range(9)]
    said = [[2 + i] * (1 + 5 * i % 13) for i in range(9)]
    lengths = [torch.tensor([len(x) for x in xs]) for xs in (prompts, said)]
    tokens = rollouts.pad_rows([p + s for p, s in zip(prompts, said, strict=True)])
    tasks = [Task("", p) for p in prompts]
    answers = Answers(tasks, tokens, *lengths, torch.ones(9).bool(), [""] * 9)
    one, many = (
        rollouts.score_actions(policy, reference, critic, answers, config, None)
        for config in (PPOConfig(minibatch=9), PPOConfig(minibatch=9, micro_batch=2))
    )
    for whole, parts in zip(one, many, strict=True):
        torch.testing.assert_close(parts, whole, rtol=0, atol=2e-5)
        assert whole[answers.mask].abs().min() > 0
        assert not parts[~answers.mask].any()


@pytest.mark.parametrize("stage", ["sft", "reward-model"])
def test_a_micro_batch_larger_than_the_batch_is_refused(stage, capsys):
    assert cli.main([stage, "--size", "tiny", "--batch", "4", "--micro-batch", "5"]) == 2
    assert "--micro-batch 5 exceeds --batch 4" in capsys.readouterr().err


def test_the_whole_stage_learns_the_same(tmp_path, monkeypatch):
    """Three updates by the command, with and without: the losses agree until rounding has grown."""
    monkeypatch.chdir(tmp_path)
    rows = [{"prompt": "say " + "la " * (i % 9), "response": "so " * (1 + i % 5)}
            for i in range(60)]  # fmt: skip
    text = "\n".join(map(json.dumps, rows))
    (tmp_path / "d.jsonl").write_text(text, encoding="utf-8")
    common = ["sft", "--data", "d.jsonl", "--size", "tiny", "--steps", "3", "--batch", "16",
              "--context", "64", "--vocab-size", "300", "--dtype", "float32",
              "--packing", "False"]  # fmt: skip
    losses = []
    for more in ([], ["--micro-batch", "5"]):
        out = tmp_path / f"run{len(more)}"
        assert cli.main([*common, *more, "--out", str(out)]) == 0
        lines = (out / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
        losses.append([json.loads(line)["loss"] for line in lines])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] != losses[0][2]
