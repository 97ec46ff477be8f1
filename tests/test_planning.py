"""Bytes, layouts and seconds before anything runs: by hand, beside autograd, beside DeepSpeed's own
estimators, and beside the partitions that real ranks hold."""

import dataclasses
import json
import os
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from rlhf_course import cli
from rlhf_course.distributed.placement import place
from rlhf_course.errors import CheckpointError, ConfigError
from rlhf_course.gpt import GPT, GPTConfig
from rlhf_course.huggingface import HuggingFaceLM
from rlhf_course.mdp import chunked_logprobs
from rlhf_course.planning import budget as budgets
from rlhf_course.planning import speed as speeds
from rlhf_course.planning.budget import GIB, budget
from rlhf_course.planning.memory import (
    activation_bytes,
    kv_cache_bytes,
    logit_bytes,
    working_bytes,
    zero_bytes,
)
from rlhf_course.planning.plan import as_flags, show_plan, spans
from rlhf_course.planning.search import best_plan, changes_that_fit, layouts
from rlhf_course.planning.settings import PlanConfig
from rlhf_course.planning.shapes import LLAMA2, from_config, shape_of
from rlhf_course.planning.speed import GPUS, speed
from rlhf_course.progress import console
from rlhf_course.reward_model import ScalarModel
from tests.tiny_models import tiny

ROOT = Path(__file__).parents[1]
SEVEN = LLAMA2["7b"]
SHARDED = {1: ("optimizer",), 2: ("optimizer", "gradients")}
SHARDED[3] = (*SHARDED[2], "parameters")

# ------------------------------------------------------------------------------ counting parameters


@pytest.mark.parametrize(
    ("name", "count"),
    [("7b", 6_738_415_616), ("13B", 13_015_864_320), ("70b", 68_976_648_192)],
)
def test_llama_2(name, count):
    assert shape_of(name).parameters == count


def written(folder: Path, config: dict) -> str:
    (folder / "config.json").write_text(json.dumps(config))
    return str(folder)


TRANSFORMERS = {
    "llama": {},
    "llama-tied": {"tie_word_embeddings": True},
    "llama-wide-heads": {"head_dim": 24},
    "llama-biased": {"attention_bias": True, "mlp_bias": True},
    "mistral": {},
    "qwen2": {},
    "qwen2-tied": {"tie_word_embeddings": True},
    "qwen3": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "num_key_value_heads": 4},
    "gpt2": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 40},
    "gpt2-inner": {"n_embd": 48, "n_layer": 2, "n_head": 4, "n_positions": 40, "n_inner": 100},
}


@pytest.mark.parametrize("name", TRANSFORMERS)
def test_counts_are_those_of_the_models_of_transformers(name, tmp_path):
    from transformers import AutoConfig, AutoModelForCausalLM

    shape = {
        "vocab_size": 61, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 40,
        "bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0,
    }  # fmt: skip
    settings = AutoConfig.for_model(name.partition("-")[0], **{**shape, **TRANSFORMERS[name]})
    settings.save_pretrained(tmp_path)
    found = shape_of(str(tmp_path))
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(settings)
        base = model.base_model
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.context == 40
    assert (found.vocabulary, found.width) == (61, 48)
    if name.startswith(("llama", "qwen2")):  # a critic leaves the output matrix away
        head = 48 + 1
        assert found.scalar_parameters == sum(p.numel() for p in base.parameters()) + head


@pytest.mark.parametrize("kind", ["gpt", "llama", "qwen2"])
def test_counts_are_those_of_our_models(kind, tmp_path):
    model = tiny(kind)
    if kind == "gpt":
        config = model.to_huggingface()[1]
    else:
        config = model.model.config.to_dict()
    shape = shape_of(written(tmp_path, config))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    critic = ScalarModel.from_language_model(model)
    assert shape.scalar_parameters == sum(p.numel() for p in critic.parameters())


def test_models_that_cannot_be_counted(tmp_path):
    with pytest.raises(ConfigError, match="--model 8b: neither one of 7b, 13b, 70b, distilgpt2"):
        shape_of("8b")
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        shape_of(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"config\.json: 'n_embd' is missing or no number"):
        shape_of(written(tmp_path, {"model_type": "gpt2"}))
    with pytest.raises(CheckpointError, match="no causal language model that can be counted"):
        shape_of(written(tmp_path, {"model_type": "never-heard-of"}))


# ------------------------------------------------------------------------------------- ZeRO's bytes


def test_zero_by_hand():
    # 7.5 billion parameters on 64 ranks: 120, 31.4, 16.6 and 1.9 GB (Rajbhandari et al., Figure 1)
    whole = 7_500_000_000
    for stage, expected in enumerate((120.0, 31.4, 16.6, 1.9)):
        held = sum(zero_bytes(whole, stage, 64).values())
        assert round(held / 1e9, 1) == expected
    assert zero_bytes(10, 3, 4) == {"parameters": 6, "gradients": 6, "optimizer": 36}
    assert zero_bytes(10, 1, 4, parameter_bytes=4) == {
        "parameters": 40, "gradients": 40, "optimizer": 36,
    }  # fmt: skip
    assert zero_bytes(10, 3, 4, training=False, parameter_bytes=4) == {
        "parameters": 12, "gradients": 0, "optimizer": 0,
    }  # fmt: skip
    assert zero_bytes(10, 2, 4, training=False)["parameters"] == 20


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
@pytest.mark.parametrize("element", [2, 4])
def test_one_rank_holds_everything(stage, element):
    alone = zero_bytes(1001, stage, 1, parameter_bytes=element)
    assert alone == zero_bytes(1001, 0, 7, parameter_bytes=element)
    assert sum(alone.values()) == 1001 * (2 * element + 12)


@pytest.mark.parametrize("ranks", [2, 3, 64])
@pytest.mark.parametrize("training", [True, False])
def test_a_higher_stage_and_more_ranks_never_take_more(ranks, training):
    totals = []
    for stage in (0, 1, 2, 3):
        held = zero_bytes(99_991, stage, ranks, training=training)
        more = zero_bytes(99_991, stage, 2 * ranks, training=training)
        assert all(more[name] <= held[name] for name in held)
        whole = zero_bytes(99_991, 0, ranks, training=training)
        assert all(ranks * held[name] >= whole[name] for name in held), "something is nowhere"
        shared = {name for name in held if held[name] < whole[name]}
        assert shared == {name for name in SHARDED.get(stage, ()) if whole[name]}
        totals.append(sum(held.values()))
    assert totals == sorted(totals, reverse=True)


def test_wrong_stages_and_ranks():
    with pytest.raises(ConfigError, match="ZeRO stage 4: choose 0, 1, 2 or 3"):
        zero_bytes(10, 4, 2)
    with pytest.raises(ConfigError, match="0 ranks: at least 1"):
        zero_bytes(10, 3, 0)


# The differences: DeepSpeed counts gradients in bf16 and in fp32 at stage 2, and in fp32 alone at
# stage 3. What it really keeps between two updates is bf16 (measured below).
@pytest.mark.parametrize("ranks", [1, 8])
@pytest.mark.parametrize("name", ["7b", "70b"])
def test_beside_the_estimators_of_deepspeed(name, ranks):
    pytest.importorskip("deepspeed")
    from deepspeed.runtime.zero.stage3 import estimate_zero3_model_states_mem_needs as stage_3
    from deepspeed.runtime.zero.stage_1_and_2 import estimate_zero2_model_states_mem_needs as two

    count = LLAMA2[name].parameters
    close = {"rel": 1e-9, "abs": 64 * ranks}

    _, theirs, largest = stage_3(count, 10**6, ranks, 1, cpu_offload=False)
    ours = sum(zero_bytes(count, 3, ranks).values())
    assert theirs - largest - ours == pytest.approx(2 * count / ranks, **close)

    _, theirs = two(count, ranks, 1, cpu_offload=False)
    ours = sum(zero_bytes(count, 2, ranks).values())
    assert theirs - ours == pytest.approx(4 * count / ranks, **close)
    update = 4 * -(-count // ranks)  # and this is when we have those 4 bytes: in the update
    assert working_bytes(
        dataclasses.replace(SEVEN, counted=count), 0, 0, 0, stage=2, ranks=ranks, training=True,
        scalar=True, checkpointing=True,
    ) == pytest.approx(update, **close)  # fmt: skip

    # The optimizer, or all of it, on the host: there we have the bf16 gradients besides.
    for offload, params, each in (("optimizer", False, 16), ("parameters", True, 18)):
        host, theirs, largest = stage_3(
            count, 10**6, ranks, 1, cpu_offload_params=params, additional_buffer_factor=1
        )
        assert host == pytest.approx(each * count)
        config = filled(model=name, gpus=5 * ranks, offload=offload, colocate=False, ranks=ranks)
        actor = budget(config, LLAMA2[name]).of("actor")
        assert theirs - largest == pytest.approx(actor.weights, **close)
        assert actor.gradients == actor.optimizer == 0
        assert ranks * actor.host - host == pytest.approx(2 * count, **close)


@pytest.fixture(scope="module")
def partitions(tmp_path_factory) -> dict[tuple[int, int], dict]:
    """(world, rank) -> what DeepSpeed's partitions took there, by stage and dtype."""
    pytest.importorskip("deepspeed", reason="pip install 'rlhf-course[distributed]' (Linux)")
    folder = tmp_path_factory.mktemp("partitions")
    done = subprocess.run(
        [sys.executable, "-m", "tests.partition_ranks", str(folder), "2", "4"], cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1"}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [path.stem.split("-") for path in folder.glob("*.json")]
    return {
        (int(world), int(rank)): json.loads((folder / f"{world}-{rank}.json").read_text())
        for world, rank in found
    }


def test_bytes_are_those_of_real_partitions(partitions, tmp_path):
    from tests.partition_ranks import KINDS, SHAPE

    model = GPT(SHAPE)
    count = shape_of(written(tmp_path, model.to_huggingface()[1])).parameters
    assert sorted(partitions) == [(2, 0), (2, 1), (4, 0), (4, 1), (4, 2), (4, 3)]
    for (world, _), seen in partitions.items():
        for stage, low in KINDS:
            held = seen[f"{stage}-{'bf16' if low else 'fp32'}"]
            element = 2 if low else 4
            ours = zero_bytes(count, stage, world, parameter_bytes=element)
            assert sum(held.values()) == pytest.approx(sum(ours.values()), rel=0.05)
            assert held["parameters"] == pytest.approx(ours["parameters"], rel=0.01)
            assert held["optimizer"] == pytest.approx(ours["optimizer"], rel=0.01)
            # Stage 2 keeps the gradients of parameters whole that lie on two ranks: the first and
            # the last of a share, a few of hundreds in a real model.
            longest = max(p.numel() for p in model.parameters()) if stage == 2 else 0
            above = held["gradients"] - ours["gradients"]
            assert -0.01 * ours["gradients"] <= above <= 2 * element * longest + 2000
        ours = zero_bytes(count, 3, world, training=False, parameter_bytes=4)
        assert seen["scoring-fp32"] == pytest.approx(ours, rel=0.01)


# -------------------------------------------------------------------- activations, logits, KV cache


def test_kv_cache_by_hand():
    assert kv_cache_bytes(SEVEN, 1) == 2 * 32 * 4096 * 2 == 512 * 1024
    assert kv_cache_bytes(LLAMA2["70b"], 10) == 10 * 2 * 80 * 8 * 128 * 2  # 8 of 64 heads
    assert kv_cache_bytes(SEVEN, 3, element_bytes=4) == 6 * kv_cache_bytes(SEVEN, 1)


def test_kv_cache_is_that_of_our_gpt(tmp_path):
    model = tiny("gpt")
    cache = model.new_cache(3, 17)
    held = cache.keys.nbytes + cache.values.nbytes
    shape = shape_of(written(tmp_path, model.to_huggingface()[1]))
    assert kv_cache_bytes(shape, 3 * 17, 4) == held


def kept_for_backward(model, tokens: torch.Tensor) -> int:
    """Bytes that autograd keeps of a forward pass, parameters apart."""
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    seen = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            seen[storage.data_ptr()] = (storage.nbytes(), tensor)  # kept: no address comes twice
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        hidden = model.hidden_states(tokens)
    del hidden
    return sum(size for size, _ in seen.values())


def of_layers(kind: str, layers: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    if kind == "gpt":
        return GPT(GPTConfig(61, 64, layers, heads=4, width=128))
    config = LlamaConfig(
        vocab_size=61, hidden_size=128, intermediate_size=344, num_hidden_layers=layers,
        num_attention_heads=4, num_key_value_heads=2 if kind == "grouped" else 4,
        max_position_embeddings=64,
    )  # fmt: skip
    return HuggingFaceLM(LlamaForCausalLM(config))


@pytest.mark.parametrize("kind", ["gpt", "llama", "grouped"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_activations_are_those_that_autograd_keeps(kind, dtype, tmp_path):
    tokens = torch.arange(128).view(2, 64) % 61
    models = [of_layers(kind, layers).to(dtype) for layers in (1, 3)]
    first, third = (kept_for_backward(model, tokens) for model in models)
    config = models[0].to_huggingface()[1] if kind == "gpt" else models[0].model.config.to_dict()
    shape = dataclasses.replace(from_config(config, str(tmp_path)), layers=2)
    element = torch.empty((), dtype=dtype).element_size()
    assert activation_bytes(shape, 128, element) == pytest.approx(third - first, rel=0.02)


def test_checkpointing_keeps_the_inputs_and_one_layer():
    every, one = activation_bytes(SEVEN, 100), activation_bytes(SEVEN, 100) // 32
    assert activation_bytes(SEVEN, 100, checkpointing=True) == 100 * 32 * 4096 * 2 + one
    assert every > 10 * activation_bytes(SEVEN, 100, checkpointing=True)


class Peak(TorchDispatchMode):
    """Most bytes of what is computed under it that live at a time."""

    def __init__(self):
        super().__init__()
        self.live = self.most = 0
        self.known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                self.see(tensor.untyped_storage())
        return out

    def see(self, storage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self.known:
            return
        self.known.add(key)
        self.live += size
        self.most = max(self.most, self.live)

        def gone():
            self.live -= size
            self.known.discard(key)

        weakref.finalize(storage, gone)


@pytest.mark.parametrize("rows", [512, 9000])
@pytest.mark.parametrize("training", [True, False])
def test_logits_are_those_that_are_really_held(rows, training):
    shape = dataclasses.replace(SEVEN, vocabulary=499, width=16)
    hidden = torch.randn(rows, 16, requires_grad=training)
    weight = torch.randn(499, 16, requires_grad=training)
    with torch.set_grad_enabled(training), Peak() as peak:
        logprobs, _ = chunked_logprobs(hidden, lambda x: x @ weight.T, torch.zeros(rows).long())
        if training:
            logprobs.sum().backward()
    ours = logit_bytes(shape, rows, training)
    assert 0.75 * ours <= peak.most <= 1.08 * ours  # and a few vectors of (rows,)


# ------------------------------------------------------------------------------------------ budgets


def filled(ranks: int = 8, engines: int = 1, tensor_parallel: int = 1, **settings) -> PlanConfig:
    """Settings with every rank and engine given."""
    roles = {f"{role}_ranks": ranks for role in ("actor", "critic", "reference", "reward")}
    return PlanConfig(
        **{**roles, "engines": engines, "tensor_parallel": tensor_parallel, **settings}
    )


def test_separate_roles_by_hand():
    config = filled(ranks=2, engines=2, gpus=10, colocate=False, zero_stage=2)
    found = budget(config, SEVEN)
    count, actor = SEVEN.parameters, found.of("actor")
    assert (actor.weights, actor.gradients, actor.optimizer) == (2 * count, count, 6 * count)
    reference = found.of("reference")  # it only scores: shared out as by stage 3
    assert (reference.weights, reference.gradients, reference.optimizer) == (count, 0, 0)
    engine = found.of("rollout")
    room = int(80 * GIB * 0.95) - GIB - 2 * GIB - 2 * count
    assert found.concurrent == room // kv_cache_bytes(SEVEN, 1024)
    assert engine.kv_cache == found.concurrent * kv_cache_bytes(SEVEN, 1024) <= room
    assert found.moments["actor works"] == GIB + actor.on_gpu
    assert found.host == 0


def test_colocated_roles_by_hand():
    found = budget(filled(engines=8), SEVEN)
    parts = {role: found.of(role) for role in ("actor", "critic", "reference", "reward")}
    state = sum(m.weights + m.gradients + m.optimizer for m in parts.values())
    gradients = sum(m.gradients for m in parts.values())
    engine = found.of("rollout")
    assert found.moments == {
        **{f"{r} works": 2 * GIB + state + m.working for r, m in parts.items()},
        "weights are sent": 2 * GIB + state + engine.weights,
        "answers are generated": 2 * GIB + gradients + engine.on_gpu,
    }
    # While the engine answers, everything else but the gradients is on the host.
    assert found.host == 8 * (state - gradients + engine.weights)
    assert found.concurrent == 512 // 8


@pytest.mark.parametrize("colocate", [True, False])
def test_what_saves_memory_saves_memory(colocate):
    def worst(**settings):
        found = budget(filled(gpus=40, colocate=colocate, **settings), SEVEN)
        return found.moments["actor works"]

    plain = worst(zero_stage=1)
    for saving in (
        {"zero_stage": 2}, {"zero_stage": 3}, {"zero_stage": 1, "offload": "optimizer"},
        {"zero_stage": 1, "gradient_checkpointing": True}, {"zero_stage": 1, "micro_batch": 1},
    ):  # fmt: skip
        assert worst(**saving) < plain
    assert worst(offload="parameters") < worst(offload="optimizer") < worst()


def test_the_kv_cache_never_takes_more_than_there_is_room():
    for memory in (24, 40, 80):
        for T in (1, 2, 4):
            config = filled(engines=1, tensor_parallel=T, gpu_memory=memory, gpus=40, batch=10_000)
            found = budget(dataclasses.replace(config, colocate=False, minibatch=64), SEVEN)
            if found.concurrent > 1:
                assert found.moments["rollout works"] <= found.usable
            assert 1 <= found.concurrent <= budgets.MOST_SEQUENCES


# -------------------------------------------------------------------------------------------- speed


def test_seconds_by_hand():
    gpu, count = GPUS["a100"], SEVEN.parameters
    config = filled(ranks=1, gpus=5, colocate=False, batch=8, minibatch=4, epochs=1, ptx_rows=2)
    took = speed(config, SEVEN, budget(config, SEVEN))
    compute, read = 0.4 * gpu.flops, 0.6 * gpu.bandwidth
    prefill = 2 * count * 8 * 512 / compute
    decoding = 512 * (2 * count + 8 * kv_cache_bytes(SEVEN, 512 + 256)) / read
    assert took.phases["rollout"] == pytest.approx(prefill + decoding)
    assert took.phases["scoring"] == pytest.approx(2 * count * 8 * 1024 / compute)  # side by side
    actor = 2 * (6 * count * (4 + 2) * 1024 / compute + 30 * count / read)  # two updates
    assert took.phases["training"] == pytest.approx(actor)
    assert took.phases["weight sync"] == pytest.approx(2 * count / gpu.link)
    assert took.total == pytest.approx(sum(took.phases.values()))
    rest = took.phases["scoring"] + took.phases["training"]
    sync = took.phases["weight sync"]
    assert took.overlapped == pytest.approx(max(took.phases["rollout"], rest) + sync)


def test_colocated_roles_take_turns_and_move():
    config = filled(engines=8)
    found = budget(config, SEVEN)
    took = speed(config, SEVEN, found)
    moved = sum(m.weights + m.optimizer for m in found.roles)
    assert took.phases["to the host and back"] == pytest.approx(2 * moved / speeds.HOST)
    assert took.overlapped is None
    apart = dataclasses.replace(config, colocate=False, gpus=40, gpus_per_node=40)
    beside = speed(apart, SEVEN, budget(apart, SEVEN)).phases
    for name in ("scoring", "training"):
        assert 1.5 * beside[name] < took.phases[name] < 5 * beside[name]


def test_small_batches_wait_for_the_links():
    """With one short sequence a pass, gathering takes longer than computing; between nodes more."""

    def training(**settings):
        config = filled(gpus=16, ranks=16, prompt_length=64, max_new_tokens=64, **settings)
        return speed(config, SEVEN, budget(config, SEVEN)).phases["training"]

    assert training(micro_batch=1) > 2 * training(micro_batch=8)
    assert training(micro_batch=1) > 2 * training(micro_batch=1, gpus_per_node=16)
    assert training(micro_batch=1, zero_stage=1) < 0.5 * training(micro_batch=1)


def test_longer_answers_shift_the_step_to_generation():
    def share(length):
        plan = best_plan(PlanConfig(max_new_tokens=length, micro_batch=1), SEVEN)
        return plan.speed.phases["rollout"] / plan.speed.total

    assert share(128) < share(512) < share(2048)


# ------------------------------------------------------------------------------------------- search


@pytest.mark.parametrize("colocate", [True, False])
@pytest.mark.parametrize("name", ["7b", "70b"])
def test_every_layout_can_be_placed(colocate, name):
    shape = LLAMA2[name]
    found = list(layouts(PlanConfig(gpus=16, colocate=colocate), shape))
    assert len(found) > 3
    for config in found:
        roles = {role: getattr(config, f"{role}_ranks") for role in budgets.TRAINERS}
        roles |= {role: getattr(config, f"{role}_ranks") for role in budgets.SCORERS}
        roles["rollout"] = config.engines
        bundles = place(roles, 8, colocate, config.tensor_parallel)
        assert 0 < len(bundles) <= 16


def test_what_is_given_stays():
    given = {"actor_ranks": 4, "critic_ranks": 2, "reference_ranks": 1, "reward_ranks": 3,
             "engines": 2, "tensor_parallel": 2}  # fmt: skip
    config = best_plan(PlanConfig(gpus=16, colocate=False, **given), SEVEN).config
    assert {name: getattr(config, name) for name in given} == given
    with pytest.raises(ConfigError, match="--gpus 8 cannot be shared out as asked"):
        best_plan(PlanConfig(colocate=False, **given), SEVEN)
    with pytest.raises(ConfigError, match="all have the 4 of the actor"):
        best_plan(PlanConfig(**given), SEVEN)


def test_the_best_plan_fits_where_one_does():
    for settings in ({}, {"gpu": "h100"}, {"colocate": False, "gpus": 16}):
        plan = best_plan(PlanConfig(**settings), SEVEN)
        assert plan.memory.over == 0
        others = [budget(c, SEVEN) for c in layouts(PlanConfig(**settings), SEVEN)]
        assert any(other.over == 0 for other in others)
    tight = best_plan(PlanConfig(gpus=1), SEVEN)
    assert tight.memory.over > 0


def test_proposed_changes_fit():
    for settings in ({"gpus": 1}, {"model": "70b", "gpu": "h100"}, {"gpus": 5, "colocate": False}):
        config = PlanConfig(**settings)
        shape = shape_of(config.model)
        changes = changes_that_fit(config, shape)
        assert 2 <= len(changes) <= 4
        for changed, plan in changes:
            again = best_plan(dataclasses.replace(config, **changed), shape)
            assert again == plan
            assert again.memory.over == 0
    assert not changes_that_fit(PlanConfig(gpu_memory=2.0), SEVEN)


# ------------------------------------------------------------------------------------------ command


def test_the_command_tells_and_writes_the_plan(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(console, "width", 200)
    model, file = tmp_path / "model", tmp_path / "plan.json"
    GPT(GPTConfig(2048, 128)).save_pretrained(model)
    given = f"plan --model {model} --gpus 4 --prompt-length 32 --max-new-tokens 32 --json {file}"
    assert cli.main(given.split(" ")) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "actor 0–3; critic 0–3; reference 0–3; reward 0–3; rollout 0–3" in told
    assert "It fits" in told and "That assumes:" in told and "40% of 312 TFLOP/s" in told
    written = json.loads(file.read_text())
    count = sum(p.numel() for p in GPT(GPTConfig(2048, 128)).parameters())
    assert written["model"]["parameters"] == count
    assert len(written["bundles"]) == 4 and written["memory"]["over"] == 0
    actor = next(role for role in written["memory"]["roles"] if role["role"] == "actor")
    assert actor["optimizer"] == zero_bytes(count, 3, 4)["optimizer"]
    assert sum(written["seconds"]["phases"].values()) == pytest.approx(written["seconds"]["total"])


def test_the_command_says_what_to_change(capsys, monkeypatch):
    monkeypatch.setattr(console, "width", 200)
    assert cli.main(["plan", "--model", "70b", "--gpus", "8", "--gpu", "h100"]) == 0
    told = " ".join(capsys.readouterr().out.split())
    assert "It does not fit. It would with" in told
    assert "--gradient-checkpointing --offload parameters (" in told
    assert "--gpus 64 --gradient-checkpointing (" in told
    assert cli.main(["plan", "--gpu-memory", "2"]) == 0
    assert "no change helps, nor do 4096 GPUs" in " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--gpus 0", "--gpus 0: give at least 1. A machine without GPUs needs no plan."),
        ("--micro-batch 0", "--micro-batch 0: give at least 1."),
        ("--gpu-memory nan", "--gpu-memory nan: give at least 1."),
        ("--ptx-rows -1", "--ptx-rows -1: give at least 0."),
        ("--model nowhere", "--model nowhere: neither one of 7b, 13b, 70b, distilgpt2"),
        ("--zero-stage 2 --offload parameters", "--offload parameters needs --zero-stage 3"),
        ("--max-new-tokens 4000", "4512 tokens, and Llama 2 7B reads 4096 at most"),
        ("--no-colocate --gpus 4", "--no-colocate gives each of five roles GPUs of its own"),
        ("--gpus 256", "--minibatch 128 leaves some of 256 colocated ranks without an episode"),
        ("--batch 64", "--minibatch 128 is more than --batch 64"),
        ("--critic-ranks 3", "--colocate holds one rank of every role on each GPU"),
        ("--tensor-parallel 3", "--gpus 8 cannot be shared out as asked"),
    ],
)
def test_wrong_settings(given, told, capsys):
    assert cli.main(["plan", *given.split(" ")]) == 2
    captured = capsys.readouterr()
    assert told in " ".join(captured.err.split())
    assert captured.out == ""


def test_words():
    assert spans([0, 1, 2, 5, 7, 8]) == "0–2, 5, 7–8"
    assert as_flags({"colocate": False, "offload": "optimizer", "micro_batch": 1}) == (
        "--no-colocate --offload optimizer --micro-batch 1"
    )
    assert as_flags({"gradient_checkpointing": True}) == "--gradient-checkpointing"


def test_a_plan_needs_no_engine():
    """Nothing heavy is imported, so that a laptop can plan."""
    code = (
        "import sys\nfrom rlhf_course import cli\ncli.main(['plan'])\n"
        "print(sorted({'deepspeed', 'ray', 'vllm', 'transformers'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_plan_is_returned():
    plan = show_plan(PlanConfig(), place)
    assert plan.config.actor_ranks == 8 and not plan.memory.over
