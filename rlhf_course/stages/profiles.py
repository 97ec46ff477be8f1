"""`--profile`: sane settings for four machines, for flags that were not given.

Measured by the planner (`rlhf-course plan --stage …`), which says that each of them fits; a test
holds that. A T4 has no bf16 (its kernels emulate it, slowly), and fp16 would need a scaled loss, so
that gradients do not vanish: there products are fp32. Learning rates and lengths of training are
not here: they belong to the model and the data (`presets`).
"""

from __future__ import annotations

from dataclasses import MISSING, dataclass, fields

from rlhf_course.device import Device
from rlhf_course.stages.flags import as_flags

NEW = ("tiny", "small", "gpt2")  # sizes: models without weights
SMALL, LARGER = "HuggingFaceTB/SmolLM2-135M-Instruct", "Qwen/Qwen2.5-0.5B-Instruct"


@dataclass(frozen=True)
class Profile:
    """A machine, and what suits it."""

    machine: str
    gib: float
    """Memory that a stage may count on: the GPU's, or the CPU's own."""
    gpu: bool
    products: str
    """dtype of matrix products."""
    every: dict
    """For every stage on data."""
    stages: dict[str, dict]
    """For single stages besides."""


def _stages(supervised: int, comparisons: int, ppo: int, generated: int) -> dict[str, dict]:
    """Micro-batches of dialogues, comparisons and answers, and answers sampled at a time."""
    return {
        "sft": {"batch": 32, "micro_batch": supervised},
        "reward_model": {"batch": 32, "micro_batch": comparisons},
        "dpo": {"batch": 32, "micro_batch": comparisons},
        "ppo": {"batch": 128, "micro_batch": ppo, "generation_batch": generated,
                "max_new_tokens": 128},
    }  # fmt: skip


PROFILES = {
    "laptop-8gb": Profile(
        "a laptop's GPU of 8 GB", 8, True, "bfloat16",
        {"model": LARGER, "lora": 16, "gradient_checkpointing": True}, _stages(4, 2, 4, 32),
    ),
    "colab-t4": Profile(
        "a Tesla T4 of 16 GB (Colab)", 15, True, "float32",
        {"model": LARGER, "lora": 16, "gradient_checkpointing": True}, _stages(8, 4, 4, 32),
    ),
    "colab-a100": Profile(
        "an A100 of 40 GB (Colab)", 40, True, "bfloat16", {"model": LARGER}, _stages(16, 8, 8, 128),
    ),
    "cpu": Profile(
        "a CPU with 8 GB of memory", 8, False, "auto", {"model": SMALL, "lora": 16},
        _stages(4, 2, 4, 32),
    ),
}  # fmt: skip
LENGTH = 512
"""Tokens of a row, prompt and answer, for which the profiles were made."""


def fill(config, stage: str) -> None:
    """Give the settings of its profile to the fields that were not given, in place.

    config.given holds the fields that were, where the command line says so; without it a field
    counts as given when it is not its default. What is chosen is kept in `config.chosen`.
    """
    profile = PROFILES[config.profile]
    wanted = {"dtype": profile.products}
    if config.data:  # the worlds' own models are small, and bring settings of their own
        wanted |= profile.every | profile.stages[stage]
        if stage != "sft":
            wanted.pop("model")  # the run of SFT that stands beside
    given = getattr(config, "given", frozenset())
    chosen = {}
    for field in fields(config):
        default = None if field.default is MISSING else field.default
        untouched = field.name not in given and getattr(config, field.name) == default
        if field.name in wanted and untouched and wanted[field.name] != default:
            chosen[field.name] = wanted[field.name]
    if config.data and stage == "sft" and getattr(config, "model", None) in NEW:
        chosen.pop("lora", None)  # a new model has no weights for an adapter to stand on
    rows = "minibatch" if stage == "ppo" else "batch"
    most = chosen.get(rows) or getattr(config, rows)
    if "micro_batch" in chosen and most:
        chosen["micro_batch"] = min(chosen["micro_batch"], most)
    for name, value in chosen.items():
        setattr(config, name, value)
    config.chosen = chosen


def told(config, device: Device) -> str:
    """What the profile chose, and, where it is another machine's, that it is."""
    profile = PROFILES[config.profile]
    flags = as_flags(config.chosen) or "nothing: all was given"
    line = f"--profile {config.profile} chose {flags}"
    there = device.device.type == "cuda"
    if profile.gpu and not there:
        line += f"; it is made for {profile.machine}, and this runs on {device.device.type}"
    elif profile.gpu:
        import torch

        total = torch.cuda.get_device_properties(device.device).total_memory / 2**30
        if total < 0.9 * profile.gib:
            line += f"; it is made for {profile.machine}, and this GPU has {total:.1f} GiB"
    return line
