"""What chapter 9 runs in other processes: real ranks, real engines."""

import time
from pathlib import Path

import pytest
import torch

from rlhf_course.distributed import lessons
from rlhf_course.distributed.engine_processes import start_engines
from rlhf_course.errors import TrainingError
from rlhf_course.gpt import GPT, GPTConfig
from rlhf_course.planning.doctor import distributed_missing
from rlhf_course.planning.memory import zero_bytes
from rlhf_course.sampling import generate
from rlhf_course.world import make_world

pytestmark = [
    pytest.mark.skipif(distributed_missing() is not None, reason=str(distributed_missing())),
    pytest.mark.xdist_group("lessons"),
]
WRONG = """
def gather_zero3_parameters(shard, shape, group=None):
    pieces = [torch.empty_like(shard) for _ in range(group.size())]
    all_gather(pieces, shard, group=group)
    return torch.cat(pieces[::-1])[: math.prod(shape)].view(shape)
"""
BROKEN = "def gather_zero3_parameters(shard, shape, group=None):\n    raise OSError('my mistake')\n"


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    """(folder, model): vLLM's attention on a CPU wants heads of 32 dimensions or more."""
    folder = tmp_path_factory.mktemp("lessons") / "policy"
    tokenizer = make_world("town", "tiny").tokenizer
    torch.manual_seed(0)
    model = GPT(GPTConfig(len(tokenizer), context=64, layers=1, heads=2, width=64))
    model.save_pretrained(folder, tokenizer)
    return folder, model.eval()


def test_a_rank_holds_what_the_formula_says(policy):
    folder, model = policy
    count = sum(p.numel() for p in model.parameters())
    for told in lessons.on_ranks("partitions", folder):
        assert list(told) == ["1", "2", "3"]
        for stage, row in told.items():
            expected = zero_bytes(count, int(stage), 2)
            if stage != "2":  # it also keeps whole gradients of what lies on two ranks
                assert sum(row["bytes"].values()) == pytest.approx(sum(expected.values()), rel=0.05)
            assert row["bytes"]["optimizer"] == pytest.approx(expected["optimizer"], rel=0.01)
            assert row["seconds"] > 0


def test_a_students_function_is_tried_on_real_shards(policy):
    """The right one is tried where the chapter is executed; here one that swaps the pieces."""
    folder, model = policy
    rows = lessons.on_ranks("gather", folder, source=WRONG)[0]
    for row, (name, parameter) in zip(rows, model.named_parameters(), strict=True):
        assert row["name"] == name
        assert tuple(row["shape"]) == parameter.shape
        assert 2 * row["shard"] >= parameter.numel()
        assert row["equal"] == bool((parameter == parameter.flatten()[0]).all())  # norms, biases
    with pytest.raises(TrainingError, match="my mistake"):
        lessons.on_ranks("gather", folder, source=BROKEN)


def test_a_rank_with_less_to_do_leaves_the_other_waiting():
    good, waits = zip(
        *lessons.on_ranks("passes", trials=[[2, 2], [2, 1]], limit_s=1.0), strict=True
    )
    assert [row["error"] for row in (*good, waits[1])] == ["", "", ""]
    assert "Timed out" in waits[0]["error"]
    assert 1 <= waits[0]["seconds"] < 30


def test_engines_answer_write_and_end(policy):
    folder, model = policy
    settings = {"model_dir": folder, "max_model_len": 64, "seed": 0, "max_num_seqs": 4}
    engines = start_engines({"good": settings, "bad": settings | {"model_dir": folder / "no"}})
    prompts = [[7 + i, 9] for i in range(8)]
    try:
        said = engines["good"].ask("greedy", prompts, 6)
        assert said == generate(model, prompts, 6, -1, temperature=0.0).responses
        for static in (None, 4):
            assert 0 < engines["good"].ask("write", prompts, [1, 9] * 4, static) < 60
        with pytest.raises(TrainingError, match="the engine has died"):
            engines["bad"].ask("info")
        pid = engines["good"].ask("info")["pid"]
    finally:
        for engine in engines.values():
            engine.pipe.close()
    for _ in range(100):
        if not Path(f"/proc/{pid}").exists():
            break
        time.sleep(0.1)
    else:
        pytest.fail("the engine lives on")
