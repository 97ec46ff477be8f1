"""How far is the plan's memory from what a stage really takes?

    python benchmarks/memory.py                    # a table of estimate / measured, in minutes
    python benchmarks/memory.py --json memory.json

Each case runs in a process of its own: two updates (PPO: two iterations) of the package's trainer
on random rows of full length. On a GPU the peak is `torch.cuda.max_memory_allocated`. On a CPU it
is the process's peak resident set above that before the first tensor, as Linux tells it; malloc is
told to give every large block back at once (MALLOC_MMAP_THRESHOLD_), else freed memory that it
keeps for later would count.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536",
               "MALLOC_ARENA_MAX": "1", "TOKENIZERS_PARALLELISM": "false",
               "HF_HUB_OFFLINE": "1"}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A stage on a model of this shape."""

    stage: str
    family: str = "gpt"
    """"gpt" (ours), "llama" or "qwen2"."""
    layers: int = 6
    width: int = 384
    vocabulary: int = 4096
    prompt: int = 64
    answer: int = 64
    rows: int = 8
    micro_batch: int | None = 8
    generated: int = 16
    ptx_rows: int = 0
    epochs: int = 1
    dtype: str = "bfloat16"
    lora: int | None = None
    checkpointing: bool = False


CASES = [
    *(Case(stage, family, rows=rows, micro_batch=micro, prompt=length, answer=length, dtype=dtype)
      for stage in ("sft", "reward-model", "ppo") for family in ("gpt", "llama")
      for rows, micro, length, dtype in (
          (4, 4, 128, "bfloat16"), (8, 2, 64, "bfloat16"), (8, 8, 128, "float32"))),
    Case("sft", "qwen2", vocabulary=32000, width=512, rows=4, micro_batch=2),
    Case("sft", "gpt", vocabulary=50257, layers=12, width=768, rows=2, micro_batch=2),
    Case("reward-model", "gpt", vocabulary=50257, layers=12, width=768, rows=2, micro_batch=2),
    Case("ppo", "gpt", vocabulary=50257, layers=12, width=768, rows=4, micro_batch=2, generated=4),
    Case("ppo", "qwen2", vocabulary=32000, width=512, rows=4, micro_batch=2, ptx_rows=16),
    Case("ppo", "gpt", vocabulary=2048, width=512, rows=16, micro_batch=16, answer=192),
    Case("ppo", "llama", vocabulary=2048, rows=4, micro_batch=4, answer=192, generated=96),
    Case("sft", "llama", vocabulary=50257, rows=32, micro_batch=32, prompt=32, answer=128),
    *(Case(stage, "llama", width=768, rows=4, micro_batch=4, prompt=128, lora=lora,
           checkpointing=checkpointing)
      for stage in ("sft", "reward-model", "ppo")
      for lora, checkpointing in ((16, False), (None, True), (16, True))),
]  # fmt: skip


# ------------------------------------------------------------------------- in the measured process


def build(case: Case):
    """A language model of this shape with random weights."""
    from rlhf_course.gpt import GPT, GPTConfig
    from rlhf_course.huggingface import HuggingFaceLM

    length, heads = case.prompt + case.answer, case.width // 64
    if case.family == "gpt":
        return GPT(GPTConfig(case.vocabulary, length, case.layers, heads, case.width))
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    shape = {
        "vocab_size": case.vocabulary, "hidden_size": case.width, "num_hidden_layers": case.layers,
        "num_attention_heads": heads, "num_key_value_heads": heads if heads % 2 else heads // 2,
        "intermediate_size": case.width * 8 // 3, "max_position_embeddings": length,
        "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if case.family == "llama":
        return HuggingFaceLM(LlamaForCausalLM(LlamaConfig(**shape)))
    return HuggingFaceLM(Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True)))


def job_of(case: Case, model, device):
    """The same as the plan knows it."""
    from rlhf_course.gpt import GPT
    from rlhf_course.planning.one_gpu import Job
    from rlhf_course.planning.shapes import from_config

    ours = isinstance(model, GPT)
    config = model.to_huggingface()[1] if ours else model.model.config.to_dict()
    products = 2 if device.compute_dtype is not None else 4
    return Job(
        case.stage, from_config(config, "."), case.prompt, case.answer, case.rows,
        case.micro_batch, generated=case.generated,
        ptx_tokens=case.ptx_rows * min(48, case.prompt + case.answer), products=products,
        attention=4 if ours and device.device.type == "cpu" else products,
        lora=case.lora, base=2 if device.device.type == "cuda" and products == 2 else 4,
        checkpointing=case.checkpointing,
    )  # fmt: skip


class Meter:
    """The peak of this process, or of its GPU."""

    def __init__(self, device):
        import torch

        self.cuda = device.type == "cuda"
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        else:  # since Linux 4.0: forget the peak so far
            Path("/proc/self/clear_refs").write_text("5")
        self.before = 0 if self.cuda else self._resident("VmRSS")

    def peak(self) -> int:
        """Bytes since this object was made."""
        import torch

        if self.cuda:
            return torch.cuda.max_memory_allocated()
        return self._resident("VmHWM") - self.before

    @staticmethod
    def _resident(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024


def supervised(case: Case, device) -> Callable[[], None]:
    """A function that makes one update of SFT or of the reward model, as the stages make it."""
    import torch

    from rlhf_course.adapters import LoRA
    from rlhf_course.recompute import checkpoint_blocks
    from rlhf_course.reward_model import ScalarModel
    from rlhf_course.stages import reward_model, sft
    from rlhf_course.stages.settings import RewardModelConfig
    from rlhf_course.training import make_optimizer

    model, scalar = build(case), case.stage == "reward-model"
    if scalar:
        model = ScalarModel(model if case.family == "gpt" else _headless(model))
    if case.lora:
        (model.backbone if scalar else model).adapt(LoRA(case.lora))
    model = device.place(model).train()
    if case.checkpointing:
        checkpoint_blocks(model)
    optimizer = make_optimizer(model, 1e-4)
    config = RewardModelConfig(batch=case.rows, micro_batch=case.micro_batch)

    def update() -> None:
        optimizer.zero_grad(set_to_none=True)
        rows = torch.randint(0, case.vocabulary, (case.rows * 2, case.prompt + case.answer))
        if scalar:
            pairs = [
                reward_model.Ranked(a[: case.prompt], [a[case.prompt :], b[case.prompt :]])
                for a, b in zip(rows[::2].tolist(), rows[1::2].tolist(), strict=True)
            ]
            reward_model.backward(config, model, pairs)
        else:
            tokens = rows[: case.rows]
            labels = tokens.clone()
            labels[:, : case.prompt] = sft.IGNORE
            batch = tokens, labels, None, None
            sft.backward(model, batch, case.micro_batch, device.device)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0).item()
        optimizer.step()

    return update


def _headless(model):
    from rlhf_course.huggingface import HuggingFaceLM

    return HuggingFaceLM(model.backbone)


def ppo(case: Case, device, policy=None, prompts=None, eos: int = -1):
    """A `PPOTrainer` of a random policy on prompts of random tokens, whose answers never end.

    policy: another one; prompts: step -> tokens of each prompt; eos: what ends an answer.
    """
    import torch

    from rlhf_course.reward_model import ScalarModel
    from rlhf_course.stages import ppo as stage
    from rlhf_course.stages import ppo_loop
    from rlhf_course.stages.presets import resolve
    from rlhf_course.stages.rollouts import Task
    from rlhf_course.stages.settings import PPOConfig

    class Prompts:
        def __init__(self, config, tokenizer, context):
            self.world, self.held = None, []

        def __call__(self, step):
            rows = torch.randint(1, case.vocabulary, (case.generated, case.prompt)).tolist()
            return [Task("", row) for row in (prompts(step) if prompts else rows)]

    class Corpus:
        def rows(self, count, *purpose):
            return torch.randint(0, case.vocabulary, (count, min(48, case.prompt + case.answer)))

    class Tokenizer:
        eos_token_id = eos

        def batch_decode(self, ids, **settings):
            return [""] * len(ids)

    policy = policy or build(case)
    made = {"policy": policy, "reader": ScalarModel.from_language_model(policy)}
    del policy  # the trainer's alone from here on
    stage.load_policy = lambda name, on, how: (on.place(made.pop("policy")), Tokenizer())
    stage.load_reward_model = lambda name, tokenizer, on, how: stage.frozen(
        on.place(made.pop("reader"))
    )
    ppo_loop.Prompts = Prompts
    ppo_loop.PPOLoop._corpus = lambda self: Corpus()
    config = resolve(
        PPOConfig(
            data="random", model="random", reward_model="random", batch=case.generated,
            minibatch=case.rows, micro_batch=case.micro_batch, max_new_tokens=case.answer,
            ptx_coef=0.1 if case.ptx_rows else 0.0, ptx_rows=case.ptx_rows or 16,
            epochs=case.epochs,
            critic_warmup=0, iterations=2, kl_horizon=1e4, lr=1e-6, lora=case.lora,
            gradient_checkpointing=case.checkpointing,
        ),
        "ppo",
    )  # fmt: skip
    return stage.PPOTrainer(config, device)


def twice(case: Case, device) -> None:
    """Two updates, or two iterations of PPO."""
    if case.stage == "ppo":
        trainer = ppo(case, device)
        for step in range(2):
            trainer.iterate(step)
        return
    update = supervised(case, device)
    for _ in range(2):
        update()


def measured(case: Case) -> dict:
    """{"estimate", "peak"} in bytes, in this process."""
    from rlhf_course import huggingface  # noqa: F401  imports come before the first measure
    from rlhf_course.device import choose_device
    from rlhf_course.planning.one_gpu import estimate
    from rlhf_course.stages import ppo as _  # noqa: F401

    device = choose_device("auto", case.dtype, 1)
    small = Case(case.stage, case.family, 1, 64, 64, 8, 8, 2, 2, 2, 0, 1, case.dtype,
                 case.lora, case.checkpointing)  # fmt: skip
    twice(small, device)  # kernels and threads are made once
    meter = Meter(device.device)
    twice(case, device)
    peak = meter.peak()
    told = estimate(job_of(case, build(case), device))
    return {"estimate": told.peak, "peak": peak, "worst": told.worst}


# ---------------------------------------------------------------------------------- and around it


def measure(case: Case) -> dict:
    """The same in a child process."""
    command = [sys.executable, str(Path(__file__).resolve()), "--case", json.dumps(asdict(case))]
    environment = {**os.environ, **ENVIRONMENT, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Measure all cases, print the table, write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.case:
        print(json.dumps(measured(Case(**json.loads(given.case)))))
        return
    rows = []
    print(f"{'case':80} {'plan MiB':>9} {'peak MiB':>9} ratio")
    for case in CASES:
        found = measure(case)
        rows.append(asdict(case) | found)
        how = f"lora {case.lora} " * bool(case.lora) + "recomputed" * case.checkpointing
        name = (
            f"{case.stage} {case.family} L{case.layers} D{case.width} V{case.vocabulary} "
            f"{case.rows}/{case.micro_batch}×({case.prompt}+{case.answer}) {case.dtype} {how}"
        )
        ratio = found["estimate"] / found["peak"]
        mib = found["estimate"] / 2**20, found["peak"] / 2**20
        print(f"{name:80} {mib[0]:9.0f} {mib[1]:9.0f} {ratio:5.2f}  {found['worst']}", flush=True)
    if given.json:
        with tempfile.NamedTemporaryFile("w", delete=False, dir=given.json.parent) as part:
            json.dump({"machine": platform.platform(), "cases": rows}, part, indent=2)
        os.replace(part.name, given.json)


if __name__ == "__main__":
    main()
