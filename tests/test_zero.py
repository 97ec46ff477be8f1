"""Training over ranks is training in one process: ZeRO-1, 2 and 3 in real processes, on a CPU."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from rlhf_course.errors import ConfigError
from rlhf_course.planning.memory import zero_bytes
from rlhf_course.ppo_ptx import PTXSettings, ppo_ptx_step
from rlhf_course.training import make_optimizer

pytest.importorskip("deepspeed", reason="needs the extra `distributed`, on Linux")

from rlhf_course.distributed.zero import ZeroModel, ZeroSettings, deepspeed_config
from tests.zero_ranks import (
    BETAS,
    CASES,
    CRITIC_LR,
    LR,
    SECONDS,
    STEPS,
    Case,
    answers,
    models,
)

pytestmark = pytest.mark.xdist_group("ranks")

REPOSITORY = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def saw(tmp_path_factory):
    """saw(world, case, rank): what a rank saw. All ranks are run before the first test."""
    folder = tmp_path_factory.mktemp("zero")
    worlds = [str(world) for world in CASES]
    subprocess.run(
        [sys.executable, "-m", "tests.zero_ranks", str(folder), *worlds],
        cwd=REPOSITORY, timeout=SECONDS, check=True,
        env=os.environ | {"DS_ACCELERATOR": "cpu", "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    return lambda world, case, rank=0: torch.load(folder / f"{world}-{case}-{rank}.pt")


def alone(case, steps=STEPS):
    """The diagnostics and the models after the same updates in this process."""
    policy, critic = models(case.kind)
    batch, texts = answers(policy, critic)
    optimizers = [
        make_optimizer(model, lr, BETAS, 1e-6) for model, lr in ((policy, LR), (critic, CRITIC_LR))
    ]
    ptx = PTXSettings(**{"coef": 0.3, **case.ptx})
    stats = [
        ppo_ptx_step(policy, critic, batch, texts, *optimizers, case.settings, ptx)
        for _ in range(steps)
    ]
    return stats, policy, critic


def error(name, ours, wanted):
    """Of a tensor: the norm of the difference, relative to the norm.

    Our GPT's key biases are left out. They add the same to all of a query's scores, so that their
    gradient is 0, and what Adam makes of them are rounding errors divided by rounding errors.
    """
    if name.endswith("attention.qkv.bias"):
        ours, wanted = (torch.cat([x.chunk(3)[0], x.chunk(3)[2]]) for x in (ours, wanted))
    return float((ours - wanted).norm() / wanted.norm())


def assert_same_weights(ours, model, most=1e-5):
    assert list(ours) == [name for name, _ in model.named_parameters()]
    for name, parameter in model.named_parameters():
        assert error(name, ours[name], parameter.detach()) <= most, name


# --------------------------------------------------------------------------------- the same update


@pytest.mark.parametrize("world, name", [(w, name) for w, cases in CASES.items() for name in cases])
def test_the_update_of_one_process(saw, world, name):
    case, seen = CASES[world][name], saw(world, name)
    done = STEPS if case.load else 0  # before the state was saved
    wanted, policy, critic = alone(case, done + len(seen["stats"]))
    for ours, theirs in zip(seen["stats"], wanted[done:], strict=True):
        assert ours == pytest.approx(theirs, rel=1e-5, abs=1e-6)
    for rank in range(1, world):
        assert saw(world, name, rank)["stats"] == seen["stats"]
    assert_same_weights(seen["policy"], policy)
    assert_same_weights(seen["critic"], critic)


def test_the_update_is_not_none(saw):
    """The tolerance above is for a difference of two models that moved a thousand times as far."""
    before, after = models("gpt")[0], saw(2, "gpt-3")["policy"]
    for name, parameter in before.named_parameters():
        if parameter.dim() == 2:
            assert error(name, after[name], parameter.detach()) > 5e-3, name


# --------------------------------------------------------------------- parameters and their bytes


def test_gathered_parameters_are_deepspeeds(saw):
    for rank in (0, 1):
        seen = dict(saw(2, "gathering", rank))
        of_bytes = [seen.pop(f"bytes-{training}") for training in (False, True)]
        assert all(seen.values()), [name for name, good in seen.items() if not good]
        assert of_bytes[0]["optimizer"] == 0 < of_bytes[1]["optimizer"]


@pytest.mark.parametrize("world, name", [(2, "gpt-1"), (2, "gpt-2"), (2, "gpt-3"), (4, "gpt-3")])
def test_bytes_of_each_rank(saw, world, name):
    """What `plan` computes is what the ranks hold."""
    case = CASES[world][name]
    sizes = [p.numel() for p in models("gpt")[0].parameters()]
    plan = zero_bytes(sum(sizes), case.stage, world, parameter_bytes=4)
    # At stage 2 a parameter at the border of two shares has its gradient on both ranks.
    border = 4 * max(sizes) if case.stage == 2 else 0
    for rank in range(world):
        held = saw(world, name, rank)["bytes"]
        assert held["parameters"] == pytest.approx(plan["parameters"], rel=0.01)
        assert held["optimizer"] == pytest.approx(plan["optimizer"], rel=0.01)
        assert plan["gradients"] <= held["gradients"] <= 1.01 * plan["gradients"] + border


def test_bf16_trains_beside_fp32_masters(saw):
    seen = saw(2, "low-precision")
    for name, ours in seen.items():
        kind, stage = name.split("-")
        start, _ = models(kind)
        stats, policy, _ = alone(Case(kind), 1)
        names = ("policy_loss", "entropy", "ptx_loss", "policy_grad_norm")
        for key in names:
            assert ours["stats"][key] == pytest.approx(stats[0][key], rel=0.1), key
        for key, before in start.named_parameters():
            after = ours["state"][f"module/policy/{key}"]
            assert after.dtype == torch.float32
            assert error(key, after, policy.get_parameter(key).detach()) < 0.02
            assert not torch.equal(after, before)
        assert ours["again"] and ours["buffers"] and ours["dtypes"] == ["torch.bfloat16"]
        count = sum(p.numel() for p in start.parameters())
        plan = zero_bytes(count, int(stage), 2, parameter_bytes=2)
        assert ours["bytes"]["parameters"] == pytest.approx(plan["parameters"], rel=0.01)
        assert ours["bytes"]["optimizer"] == pytest.approx(plan["optimizer"], rel=0.01)


def test_a_share_moves_to_the_host_and_back(saw):
    seen = saw(2, "moved")
    wanted, policy, _ = alone(Case())
    assert seen["left"] == 0
    for ours, theirs in zip(seen["stats"], wanted, strict=True):
        assert ours == pytest.approx({key: theirs[key] for key in ours}, rel=1e-5, abs=1e-6)
    assert_same_weights(seen["policy"], policy)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_parameters_that_are_given(saw, stage):
    """They are what computes and what is trained on from."""
    seen, before = saw(2, "moved", 1), dict(models("gpt")[1].named_parameters())
    given, trained = seen[f"given-{stage}"], seen[f"trained-{stage}"]
    assert torch.equal(given.pop("head.weight"), torch.arange(32.0)[None])
    assert given.pop("head.bias").item() == 5
    assert all(torch.equal(value, before[name]) for name, value in given.items())
    assert (trained["head.weight"] - torch.arange(32.0)).abs().max() <= 1.1 * LR
    assert 0 < abs(trained["head.bias"].item() - 5) <= 1.1 * LR


# ---------------------------------------------------------------------------------- what goes wrong


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_nan_on_one_rank_updates_nothing(saw, stage):
    wanted, policy, _ = alone(Case(), 1)
    for rank in (0, 1):
        seen = saw(2, "not-finite", rank)
        assert "a gradient is NaN or infinite. Nothing was updated" in seen[f"gradient-{stage}"]
        assert "policy_loss is NaN or infinite. Nothing was updated" in seen[f"loss-{stage}"]
        assert seen[f"kept-{stage}"] and seen[f"still-{stage}"]
        stats, weights = seen[f"next-{stage}"]
        assert stats == pytest.approx({key: wanted[0][key] for key in stats}, rel=1e-5, abs=1e-6)
        assert_same_weights(weights, policy)


def test_another_models_state_is_refused_on_every_rank(saw):
    for rank in (0, 1):
        seen = saw(2, "refused", rank)
        assert "final_norm.bias (1 in all)" in seen["other"]
        assert "optimizer/policy/3/exp_avg (1 in all)" in seen["lacks"]


@pytest.mark.parametrize("wrong, message", [
    ({"stage": 0}, "choose stage 1, 2 or 3"),
    ({"offload": "disk"}, "offload none, optimizer or parameters"),
    ({"stage": 2, "offload": "parameters"}, "choose stage 3, or offload the optimizer"),
    ({"autotp": 2, "deepcompile": True}, "choose one of them"),
])  # fmt: skip
def test_settings_that_contradict_each_other(wrong, message):
    with pytest.raises(ConfigError, match=message):
        deepspeed_config(ZeroSettings(**wrong))


def test_what_this_machine_or_model_cannot_do():
    with pytest.raises(ConfigError, match="own GPT"):
        ZeroModel(models("gpt")[0], ZeroSettings(autotp=2))
    if not torch.cuda.is_available():
        with pytest.raises(ConfigError, match="CUDA"):
            ZeroModel(models("gpt")[0], ZeroSettings(deepcompile=True))


def test_configuration():
    more = {"zero_optimization": {"overlap_comm": False}, "prescale_gradients": True}
    config = deepspeed_config(ZeroSettings(3, "parameters", True, 0.5, autotp=2, extra=more))
    assert config["zero_optimization"]["stage"] == 3
    assert config["zero_optimization"]["offload_param"] == {"device": "cpu"}
    assert config["zero_optimization"]["offload_optimizer"] == {"device": "cpu"}
    assert config["zero_optimization"]["overlap_comm"] is False
    assert config["bf16"]["enabled"] and config["gradient_clipping"] == 0.5
    assert config["tensor_parallel"] == {"autotp_size": 2} and config["prescale_gradients"]
    assert deepspeed_config(ZeroSettings(deepcompile=True))["compile"] == {"deepcompile": True}
