"""The plan for one device: its arithmetic, its command, and measured peaks beside it."""

import dataclasses
import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch

from rlhf_course import cli
from rlhf_course.planning import one_gpu
from rlhf_course.planning.one_gpu import Job, estimate
from rlhf_course.planning.one_plan import Way, jobs, largest, show_one, usable, ways
from rlhf_course.planning.plan import with_unit
from rlhf_course.planning.settings import PlanConfig
from rlhf_course.planning.shapes import PUBLIC, shape_of

ROOT = Path(__file__).parents[1]
SMALL = PUBLIC["qwen2.5-0.5b"]
STAGES = ("sft", "reward-model", "ppo")


def benchmark():
    """benchmarks/memory.py as a module."""
    spec = importlib.util.spec_from_file_location("memory", ROOT / "benchmarks" / "memory.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["memory"] = module
    spec.loader.exec_module(module)
    return module


memory = benchmark()

# ------------------------------------------------------------------------------ measured beside it

MEASURED = [
    memory.Case("sft", "qwen2", layers=4, vocabulary=16000, rows=8, micro_batch=4, prompt=32,
                answer=96),
    memory.Case("reward-model", "llama", rows=4, micro_batch=4, prompt=128, lora=16),
    memory.Case("ppo", "gpt", layers=4, width=512, rows=4, micro_batch=2, prompt=192, answer=32,
                generated=8, ptx_rows=8),
]  # fmt: skip
on_linux = pytest.mark.skipif(
    not (torch.cuda.is_available() or Path("/proc/self/clear_refs").exists()),
    reason="neither CUDA nor Linux, which tell the peak",
)


@on_linux
@pytest.mark.parametrize("case", MEASURED, ids=lambda case: case.stage)
def test_the_estimate_is_within_15_percent_of_the_measured_peak(case):
    found = memory.measure(case)
    assert found["peak"] > 150 << 20  # large beside what an allocator wastes
    assert found["estimate"] == pytest.approx(found["peak"], rel=0.15), found


# ------------------------------------------------------------------------------------ public models

TOTALS = {  # from the models' public cards and files
    "gpt2": 124_439_808, "gpt2-xl": 1_557_611_200, "pythia-410m": 405_334_016,
    "qwen2.5-0.5b": 494_032_768, "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-7b": 7_615_616_512,
    "qwen3-0.6b": 596_049_920, "llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248,
    "smollm2-135m": 134_515_008, "smollm2-360m": 361_821_120, "smollm2-1.7b": 1_711_376_384,
    "gemma-2-2b": 2_614_341_888, "gemma-3-270m": 268_098_176, "gemma-3-1b": 999_885_952,
}  # fmt: skip


@pytest.mark.parametrize("name", TOTALS)
def test_public_models_have_as_many_parameters_as_their_files(name):
    assert PUBLIC[name].parameters == TOTALS[name]


def theirs(shape):
    """The same model by transformers, without memory."""
    from transformers import AutoConfig, AutoModelForCausalLM

    kind = {"gpt2": "gpt2", "neox": "gpt_neox", "gemma3": "gemma3_text"}.get(
        shape.family, shape.family
    )
    if kind == "gpt2":
        config = AutoConfig.for_model(
            kind, vocab_size=shape.vocabulary, n_embd=shape.width, n_layer=shape.layers,
            n_head=shape.heads, n_positions=shape.context,
        )  # fmt: skip
    else:
        config = AutoConfig.for_model(
            kind, vocab_size=shape.vocabulary, hidden_size=shape.width,
            num_hidden_layers=shape.layers, num_attention_heads=shape.heads,
            num_key_value_heads=shape.kv_heads, head_dim=shape.head_width,
            intermediate_size=shape.inner, tie_word_embeddings=shape.tied,
        )  # fmt: skip
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


@pytest.mark.parametrize(
    "name", ["distilgpt2", "pythia-160m", "qwen2.5-3b", "qwen3-1.7b", "llama-3.2-3b",
             "smollm2-360m", "gemma-2-2b", "gemma-3-1b"],
)  # fmt: skip
def test_every_family_is_counted_as_transformers_counts_it(name):
    model = theirs(PUBLIC[name])
    assert sum(p.numel() for p in model.parameters()) == PUBLIC[name].parameters


def test_names_as_they_are_written_on_the_hub(tmp_path, monkeypatch):
    assert shape_of("Qwen/Qwen2.5-0.5B-Instruct") is SMALL
    assert shape_of("google/gemma-3-270m-it") is PUBLIC["gemma-3-270m"]
    from rlhf_course.errors import ConfigError

    with pytest.raises(ConfigError, match=r"gpt3: neither one of 7b, 13b, 70b, distilgpt2"):
        shape_of("gpt3")


# --------------------------------------------------------------------------------------- arithmetic


def job(stage="sft", **changes) -> Job:
    return dataclasses.replace(Job(stage, SMALL, 128, 128, 32, 4), **changes)


def test_sft_by_hand():
    """GPT-2's state, and activations of one row, from the sizes of its tensors."""
    shape, tokens = PUBLIC["gpt2"], 256
    found = estimate(Job("sft", shape, 128, 128, 1, 1))
    state = 12 * 124_439_808
    assert sum(found.state.values()) == state
    layer = 768 * (2 * 4 + 2 * 2 + 2 * 4 + 2 * 2 * 4)  # inputs of norms, products, attention, MLP
    copies = 12 * 12 * 768**2 * 2
    first = tokens * (12 * layer + 8 * 768) + copies + 4 * 3 * 128 * 50257
    last = 4 * 124_439_808 + 2 * 4 * 50257 * 768
    assert found.peak == state + max(first, last)


@pytest.mark.parametrize("stage", STAGES)
def test_what_saves_memory_saves_memory(stage):
    whole = estimate(job(stage, rows=32, micro_batch=16)).peak
    assert estimate(job(stage, rows=32, micro_batch=8)).peak < whole
    assert estimate(job(stage, rows=32, micro_batch=16, checkpointing=True)).peak < whole
    lora = estimate(job(stage, rows=32, micro_batch=16, lora=16))
    assert lora.peak < whole
    four = estimate(job(stage, rows=32, micro_batch=16, lora=16, quantize="4bit"))
    assert four.peak < lora.peak
    eight = estimate(job(stage, rows=32, micro_batch=16, lora=16, quantize="8bit"))
    assert four.peak < eight.peak < lora.peak


def test_a_comparison_reads_its_prompt_once_where_that_costs_less():
    job = Job("reward-model", SMALL, prompt=100, answer=50, rows=4, micro_batch=2)
    assert job.compared == 200 and dataclasses.replace(job, answers=5).compared == 350
    assert dataclasses.replace(job, prompt=1, answer=900).compared == 1802  # not one row of 1801
    peaks = [estimate(dataclasses.replace(job, prompt=p)).peak for p in (2000, 2010)]
    of_token = one_gpu.activations(job, 1) - one_gpu.activations(job, 0)
    assert peaks[1] - peaks[0] == 2 * 10 * of_token


def test_an_adapter_shares_the_base():
    """PPO with LoRA holds two bases, where full fine-tuning trains two and reads two more."""
    found = estimate(job("ppo", lora=16))
    held = sum(found.state.values())
    two = 2 * SMALL.parameters + 2 * SMALL.scalar_parameters
    adapters = 2 * 12 * one_gpu.adapters(job("ppo", lora=16))
    assert two + adapters <= held < 1.02 * (two + adapters)
    assert sum(estimate(job("ppo")).state.values()) > 6 * held


def test_adapters_are_those_of_peft():
    from transformers import Qwen2Config, Qwen2ForCausalLM

    from rlhf_course.adapters import LoRA
    from rlhf_course.huggingface import HuggingFaceLM
    from rlhf_course.planning.shapes import from_config

    pytest.importorskip("peft")
    config = Qwen2Config(
        vocab_size=61, hidden_size=64, intermediate_size=96, num_hidden_layers=3,
        num_attention_heads=4, num_key_value_heads=2,
    )  # fmt: skip
    model = HuggingFaceLM(Qwen2ForCausalLM(config))
    model.adapt(LoRA(8))
    count = sum(p.numel() for p in model.parameters() if p.requires_grad)
    shape = from_config(config.to_dict(), ".")
    assert one_gpu.adapters(Job("sft", shape, 8, 8, 2, 2, lora=8)) == count


# -------------------------------------------------------------------------------------- the command


@pytest.mark.parametrize("stage", STAGES)
def test_the_largest_micro_batch_fits_and_the_next_does_not(stage):
    config = PlanConfig(stage=stage, model="qwen2.5-0.5b")
    for way, size in itertools.product(ways(config), (8, 16, 40)):
        room = usable(size)
        fit = largest(config, stage, SMALL, way, room)
        if fit is None:
            smallest = list(jobs(config, stage, SMALL, way))[-1]
            assert smallest.micro_batch == 1 and estimate(smallest).peak > room
            continue
        assert fit.memory.peak <= room
        if fit.job.micro_batch < config.minibatch:
            doubled = dataclasses.replace(fit.job, micro_batch=2 * fit.job.micro_batch, generated=1)
            assert estimate(doubled).peak > room


def test_what_is_asked_for_is_planned():
    assert ways(PlanConfig(lora=8, quantize="4bit")) == [Way(8, "4bit", False)]
    assert ways(PlanConfig())[0] == Way() and len(ways(PlanConfig())) == 5


def test_the_command_prints_flags_that_the_stage_takes(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr("rlhf_course.progress.console.width", 150)
    file = tmp_path / "plan.json"
    given = f"plan --stage all --model gpt2 --prompt-length 256 --max-new-tokens 128 --json {file}"
    assert cli.main(given.split(" ")) == 0
    told = capsys.readouterr().out
    lines = [line.strip() for line in told.splitlines() if " GiB: --" in line]
    assert len(lines) == 15  # three stages, five sizes
    written = json.loads(file.read_text(encoding="utf-8"))
    assert written["model"]["parameters"] == 124_439_808
    for stage in STAGES:
        for fit in written["stages"][stage].values():
            assert cli.parse([stage, *fit["flags"].split(" ")]).micro_batch >= 1
            assert fit["flags"] in told


def test_a_gpu_of_another_size_gets_a_column():
    chosen = show_one(PlanConfig(stage="sft", model="gpt2", gpu_memory=12.0))
    assert list(chosen["sft"]) == [8, 12, 16, 24, 40, 80]


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--lora 16", "--lora belongs to one GPU: add --stage"),
        ("--stage ppo --gpus 4", "--gpus belongs to the plan of a cluster: leave --stage out"),
        ("--stage ppo --no-colocate", "--colocate belongs to the plan of a cluster"),
        ("--stage sft --quantize 4bit", "--quantize holds the base under an adapter"),
        ("--stage sft --model gpt2 --prompt-length 1000", "make 1512 tokens, and gpt2 reads 1024"),
        ("--stage sft --minibatch 0", "--minibatch 0: give at least 1"),
        ("--stage sft --model nowhere", "neither one of"),
    ],
)
def test_wrong_settings(given, told, capsys):
    assert cli.main(["plan", *given.split(" ")]) == 2
    assert told in " ".join(capsys.readouterr().err.split())


def test_units():
    assert with_unit(40 << 30) == "40.0 GiB"
    assert with_unit(1500 << 20) == "1.5 GiB"
    assert with_unit(3 << 19) == "1.5 MiB"
    assert with_unit(512) == "512 B" and with_unit(2048) == "2.0 KiB"
    assert with_unit(200 << 20) == "200 MiB"
