"""Continuous against static batching: the same answers, by the same vLLM engine.

    python benchmarks/rollouts.py [rollouts.json]

Answers differ in length (exponential, 32 tokens in the mean, 128 at most). Static: batches of n,
each of which begins when the longest answer of the one before it has ended. Continuous: whenever an
answer ends, the next one takes its place; never more than n at once. Random weights, since only
time is measured. Prints a Markdown table, medians with the range; a repeat runs both, one after the
other. Run it on a machine that does nothing else.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
import time

import torch

from rlhf_course.distributed.engine import RolloutEngine, engine_environment
from rlhf_course.gpt import GPT, GPTConfig

SHAPES = {"0.5M": {"layers": 2, "heads": 4, "width": 128},
          "3.4M": {"layers": 4, "heads": 8, "width": 256}}  # fmt: skip
ANSWERS, PROMPT, MEAN, LONGEST, AT_ONCE, REPEATS = 256, 12, 32, 128, (16, 64), 5


def lengths() -> list[int]:
    """How many tokens each answer has."""
    drawn = torch.empty(ANSWERS).exponential_(1 / MEAN, generator=torch.Generator().manual_seed(0))
    return drawn.ceil().clamp(1, LONGEST).int().tolist()


def answer(engine: RolloutEngine, wanted: list[int]) -> None:
    """One answer of each length, sampled, with its log-probs."""
    from vllm import SamplingParams

    prompts = [{"prompt_token_ids": [(7 * i + j) % 300 for j in range(PROMPT)]}
               for i in range(len(wanted))]  # fmt: skip
    settings = [SamplingParams(max_tokens=n, ignore_eos=True, logprobs=0, detokenize=False)
                for n in wanted]  # fmt: skip
    engine.llm.generate(prompts, settings, use_tqdm=False)


def measure(engine: RolloutEngine, at_once: int) -> dict[str, list[float]]:
    """Tokens a second, of each repeat."""
    wanted = lengths()
    batches = [wanted[i : i + at_once] for i in range(0, ANSWERS, at_once)]
    rates: dict[str, list[float]] = {"static": [], "continuous": []}
    for repeat in range(REPEATS + 1):
        for name, parts in (("static", batches), ("continuous", [wanted])):
            started = time.perf_counter()
            for part in parts:
                answer(engine, part)
            if repeat:  # the first one warms up
                rates[name].append(sum(wanted) / (time.perf_counter() - started))
    busy = sum(wanted) / sum(max(batch) * len(batch) for batch in batches)
    return rates | {"busy": [busy]}


def main() -> None:
    """Measure every shape, print the table, write the numbers."""
    environment = engine_environment("cuda" if torch.cuda.is_available() else "cpu")
    if not environment.items() <= os.environ.items():  # it counts before torch is imported
        os.execve(sys.executable, [sys.executable, *sys.argv], os.environ | environment)
    rows = []
    print("| parameters | n | static, tokens/s | continuous, tokens/s | ratio | busy if static |")
    print("|---|---:|---:|---:|---:|---:|")
    for size, shape in SHAPES.items():
        for at_once in AT_ONCE:
            with tempfile.TemporaryDirectory() as folder:
                GPT(GPTConfig(381, PROMPT + LONGEST, **shape)).save_pretrained(folder)
                engine = RolloutEngine(
                    folder, max_model_len=PROMPT + LONGEST, seed=0, max_num_seqs=at_once
                )
            rates = measure(engine, at_once)
            rows.append({"parameters": size, "n": at_once, **rates})
            static, continuous = (
                f"{statistics.median(r):.0f} ({min(r):.0f} … {max(r):.0f})"
                for r in (rates["static"], rates["continuous"])
            )
            ratio = statistics.median(
                c / s for c, s in zip(rates["continuous"], rates["static"], strict=True)
            )
            print(f"| {size} | {at_once} | {static} | {continuous} | {ratio:.2f} | "
                  f"{rates['busy'][0]:.0%} |", flush=True)  # fmt: skip
            del engine
    if len(sys.argv) > 1:
        with open(sys.argv[1], "w") as file:
            json.dump(rows, file, indent=1)


if __name__ == "__main__":
    main()
