"""Seeds, batches, the optimiser, learning rates, and the choice of a device."""

import math

import pytest
import torch

from rlhf_course import training
from rlhf_course.device import MAX_THREADS, Device, choose_device
from rlhf_course.errors import ConfigError
from rlhf_course.gpt import GPT, GPTConfig

DOUBLE = torch.float64


# ------------------------------------------------------------------------------ golden vectors


def adam_by_torch(case, eps_of_step):
    """The path of one parameter under torch.optim.Adam, in float64."""
    parameter = torch.nn.Parameter(torch.zeros(1, dtype=DOUBLE))
    inputs = case.inputs
    optimizer = torch.optim.Adam([parameter], lr=inputs["lr"], betas=tuple(inputs["betas"]))
    path = []
    for step, gradient in enumerate(inputs["grads"], start=1):
        optimizer.param_groups[0]["eps"] = eps_of_step(step)
        parameter.grad = gradient.reshape(1).clone()
        optimizer.step()
        path.append(parameter.item())
    return path


def test_g16_adam_in_pytorchs_and_in_tensorflows_form(golden):
    case = golden("G16")
    eps, beta2 = case.inputs["eps"], case.inputs["betas"][1].item()
    plain = adam_by_torch(case, lambda step: eps)
    tensorflow = adam_by_torch(case, lambda step: training.tensorflow_eps(eps, beta2, step))
    case.matches(plain, case.expected["theta_torch"])
    case.matches(tensorflow, case.expected["theta_tf"])
    case.differs(tensorflow, plain)


def test_g16_learning_rates(golden):
    case = golden("G16")
    peak, updates = case.inputs["linear"]["lr"], int(case.inputs["linear"]["updates"])
    linear = [training.learning_rate(peak, step, updates) for step in range(updates)]
    case.matches(linear, case.expected["linear_lr"])
    instruct = [
        training.learning_rate(1.0, step, 500, "constant", warmup=10, warmup_from=0.1)
        for step in range(12)
    ]
    case.matches(instruct, case.expected["instructgpt_multiplier_iter0_to_11"])


# ------------------------------------------------------------------------------- learning rates


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_after_the_warm_up_the_rate_starts_at_the_peak(schedule):
    rates = [training.learning_rate(2.0, step, 100, schedule, 20, 0.1) for step in range(101)]
    assert rates[0] == 0
    assert rates[:21] == pytest.approx([2.0 * step / 20 for step in range(21)], abs=1e-12)
    assert max(rates) == rates[20] == 2.0
    if schedule == "constant":
        assert set(rates[20:]) == {2.0}
        return
    shape = {"linear": lambda x: 1 - x, "cosine": lambda x: (1 + math.cos(math.pi * x)) / 2}
    expected = [2.0 * (0.1 + 0.9 * shape[schedule](done / 80)) for done in range(81)]
    assert rates[20:] == pytest.approx(expected, abs=1e-12)
    assert rates[100] == pytest.approx(0.2, abs=1e-12)
    assert training.learning_rate(2.0, 150, 100, schedule, 20, 0.1) == pytest.approx(0.2)


def test_a_warm_up_longer_than_the_run_divides_by_nothing():
    assert training.learning_rate(1.0, 3, 5, "linear", warmup=10) == pytest.approx(0.3)
    assert training.learning_rate(1.0, 10, 10, "cosine", warmup=10) == 1.0


def test_an_unknown_schedule():
    with pytest.raises(ConfigError, match="schedule 'step': choose constant, linear or cosine"):
        training.learning_rate(1.0, 0, 10, "step")


def test_every_group_gets_the_rate():
    model = torch.nn.Linear(2, 2)
    optimizer = training.make_optimizer(model, 1e-3)
    training.set_learning_rate(optimizer, 0.25)
    assert [group["lr"] for group in optimizer.param_groups] == [0.25, 0.25]


# ------------------------------------------------------------------------------------ optimiser


def test_only_matrices_decay():
    model = GPT(GPTConfig(11, context=4, layers=1, heads=1, width=4))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = training.make_optimizer(model, lr=0.1, weight_decay=0.5)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        share = 1 - 0.1 * 0.5 if parameter.dim() == 2 else 1.0
        torch.testing.assert_close(parameter.detach(), share * before[name], rtol=1e-6, atol=0)
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(before)


def test_the_optimiser_is_adamw_with_these_settings():
    torch.manual_seed(0)
    weight = torch.nn.Linear(3, 2, bias=False)
    start, gradients = weight.weight.detach().double().clone(), torch.randn(4, 2, 3)
    optimizer = training.make_optimizer(weight, 0.01, (0.8, 0.9), 1e-3, weight_decay=0.1)
    m = v = torch.zeros(2, 3, dtype=DOUBLE)
    expected = start
    for t, gradient in enumerate(gradients, start=1):
        weight.weight.grad = gradient
        optimizer.step()
        g = gradient.double()
        m, v = 0.8 * m + 0.2 * g, 0.9 * v + 0.1 * g**2
        step = (m / (1 - 0.8**t)) / ((v / (1 - 0.9**t)).sqrt() + 1e-3)
        expected = expected * (1 - 0.01 * 0.1) - 0.01 * step
    torch.testing.assert_close(weight.weight.detach().double(), expected, rtol=0, atol=1e-6)
    assert (expected - start).abs().mean() > 1e-2  # far more than the tolerance


def test_what_is_frozen_is_not_optimised():
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = training.make_optimizer(model, 0.1)
    optimised = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert optimised == {id(p) for p in model[1].parameters()}


def test_the_gradient_norm_is_of_all_gradients_together():
    model = torch.nn.Linear(2, 2)
    assert training.gradient_norm(model.parameters()) == 0.0
    model.weight.grad = torch.tensor([[3.0, 0.0], [0.0, 0.0]])
    assert training.gradient_norm(model.parameters()) == pytest.approx(3.0)
    model.bias.grad = torch.tensor([0.0, -4.0])
    assert training.gradient_norm(model.parameters()) == pytest.approx(5.0)


# -------------------------------------------------------------------------- seeds and batches


def test_seeds_are_these_on_every_machine():  # the first 63 bits of sha256("0/rollout/3")
    assert training.derive_seed(0) == 3456079177858693020
    assert training.derive_seed(0, "rollout", 3) == 3013096543775522488
    assert training.derive_seed(1, "rollout", 3) == 2514889546396444710
    assert training.shuffled(8, 0, "x") == [3, 0, 4, 7, 1, 5, 6, 2]


def test_every_purpose_has_its_own_seed():
    purposes = [(0, "a", 1), (0, "a", 2), (0, "b", 1), (1, "a", 1), (0, "a"), (0,), (0, "a1")]
    assert len({training.derive_seed(*purpose) for purpose in purposes}) == len(purposes)
    assert all(0 <= training.derive_seed(seed) < 2**63 for seed in range(100))


def test_a_generator_depends_on_its_purpose_alone():
    def draw(*purpose):
        return torch.rand(3, generator=training.torch_generator(0, *purpose)).tolist()

    first = draw("rollout", 0)
    torch.rand(7)
    assert draw("rollout", 0) == first != draw("rollout", 1)


@pytest.mark.parametrize(("count", "batch"), [(12, 4), (13, 4), (5, 5), (7, 1)])
def test_an_epoch_brings_every_index_once(count, batch):
    per_epoch = count // batch
    epochs = []
    for epoch in range(3):
        steps = range(epoch * per_epoch, (epoch + 1) * per_epoch)
        batches = [training.epoch_batch(count, batch, step, 0, "sft") for step in steps]
        assert {len(b) for b in batches} == {batch}
        epochs.append([index for b in batches for index in b])
        assert len(set(epochs[-1])) == per_epoch * batch
        assert set(epochs[-1]) <= set(range(count))
    assert epochs[0] != epochs[1] != epochs[2]
    if count % batch:  # another remainder is left out each time
        assert len({frozenset(range(count)) - frozenset(e) for e in epochs}) > 1


def test_a_batch_depends_on_step_seed_and_purpose():
    def batch(step, seed, purpose):
        return training.epoch_batch(100, 10, step, seed, purpose)

    assert batch(3, 0, "sft") == batch(3, 0, "sft")
    others = [batch(4, 0, "sft"), batch(3, 1, "sft"), batch(3, 0, "rm"), batch(13, 0, "sft")]
    assert batch(3, 0, "sft") not in others


def test_fewer_rows_than_a_batch_are_one_batch():
    for step in range(3):
        assert sorted(training.epoch_batch(3, 8, step, 0, "sft")) == [0, 1, 2]


# --------------------------------------------------------------------------------------- device


@pytest.fixture
def threads():
    """Whatever a test does to torch's thread count is undone."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def test_the_cpu_can_be_asked_for(threads, monkeypatch):
    device = choose_device("cpu", "float32", 2)
    assert device == Device(torch.device("cpu"), None, 2)
    assert torch.get_num_threads() == 2
    assert str(device) == "cpu, float32, 2 threads"
    assert choose_device("cpu", "bfloat16", 1).compute_dtype == torch.bfloat16
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    assert choose_device("cpu").threads == 3
    monkeypatch.delenv("OMP_NUM_THREADS")
    assert 1 <= choose_device("cpu").threads <= MAX_THREADS


def test_a_device_that_is_not_there(threads, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert choose_device("auto").device.type == "cpu"
    for name in ("cuda", "mps"):
        with pytest.raises(ConfigError, match=f"--device {name}: .* sees no such device"):
            choose_device(name)
    with pytest.raises(ConfigError, match="--threads 0: give at least 1"):
        choose_device("cpu", threads=0)


def test_bfloat16_is_chosen_where_the_cpu_is_fast_at_it(threads, monkeypatch):
    for fast, dtype in ((True, torch.bfloat16), (False, None)):
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda fast=fast: {"avx512_bf16": fast})
        assert choose_device("cpu").compute_dtype == dtype
        assert choose_device("cpu", "float32").compute_dtype is None


def test_a_model_is_told_its_dtype_inside_a_reward_model_too():
    from rlhf_course.reward_model import ScalarModel

    model = ScalarModel(GPT(GPTConfig(11, context=4, layers=1, heads=1, width=4)))
    Device(torch.device("cpu"), torch.bfloat16, 1).place(model)
    assert model.backbone.compute_dtype == torch.bfloat16
    Device(torch.device("cpu"), None, 1).place(model)
    assert model.backbone.compute_dtype is None
