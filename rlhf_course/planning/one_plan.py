"""`rlhf-course plan --stage …`: what fits on one GPU, by which flags.

rlhf-course plan --stage ppo --model qwen2.5-0.5b
rlhf-course plan --stage sft --model gpt2 --prompt-length 256 --max-new-tokens 256 --lora 16
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from typing import get_args

from rich.markup import escape
from rich.table import Table

from rlhf_course.errors import ConfigError
from rlhf_course.files import write_json
from rlhf_course.planning.budget import GIB
from rlhf_course.planning.one_gpu import Estimate, Job, Stage, estimate
from rlhf_course.planning.plan import as_flags, show, with_unit
from rlhf_course.planning.settings import PlanConfig
from rlhf_course.planning.shapes import ModelShape, shape_of
from rlhf_course.progress import console

SIZES = (8, 16, 24, 40, 80)
"""GPUs that are planned for, in GiB as they are sold."""
USABLE = 0.9
"""Of that: drivers keep up to 6 % (a T4 of 16 GB shows 15), the allocator loses some between its
blocks."""
CONTEXT = GIB // 2
"""CUDA's own memory, of a process that talks to no other GPU."""
RANK = 16
USED = {"model", "stage", "lora", "quantize", "dtype", "gradient_checkpointing", "prompt_length",
        "max_new_tokens", "batch", "minibatch", "ptx_rows", "gpu_memory", "json"}  # fmt: skip


@dataclass(frozen=True)
class Way:
    """How the weights are trained; from what is best to what needs least."""

    lora: int | None = None
    quantize: str | None = None
    gradient_checkpointing: bool = False

    def flags(self) -> dict:
        """Those that differ from the stages' defaults."""
        return {name: value for name, value in asdict(self).items() if value}


@dataclass(frozen=True)
class Fit:
    """The largest job of its kind that fits a GPU."""

    job: Job
    memory: Estimate

    def flags(self) -> dict:
        """What to give to the stage's command."""
        job = self.job
        found = {"lora": job.lora, "quantize": job.quantize,
                 "gradient_checkpointing": job.checkpointing, "micro_batch": job.micro_batch,
                 "generation_batch": job.generated if job.stage == "ppo" else None}  # fmt: skip
        return {name: value for name, value in found.items() if value}


def usable(gib: float) -> int:
    """Bytes of a GPU of this size that a stage may use."""
    return int(gib * GIB * USABLE) - CONTEXT


def ways(config: PlanConfig) -> list[Way]:
    """The one that was asked for, or all that there are."""
    if config.lora or config.quantize or config.gradient_checkpointing:
        return [Way(config.lora, config.quantize, config.gradient_checkpointing)]
    return [Way(), Way(None, None, True), Way(RANK), Way(RANK, None, True), Way(RANK, "4bit", True)]


def jobs(config: PlanConfig, stage: Stage, shape: ModelShape, way: Way) -> Iterator[Job]:
    """Every job of this kind, the largest micro-batch first, then the most answers at a time."""
    products = 2 if config.dtype == "bfloat16" else 4
    first = Job(
        stage, shape, config.prompt_length, config.max_new_tokens, config.minibatch, 1,
        generated=config.batch, products=products, attention=products, lora=way.lora,
        base=products, quantize=way.quantize, checkpointing=way.gradient_checkpointing,
        ptx_tokens=config.ptx_rows * 48 if stage == "ppo" else 0,
    )  # fmt: skip
    micro = 1 << (config.minibatch.bit_length() - 1)
    while micro:
        generated = config.batch
        while generated and (stage == "ppo" or generated == config.batch):
            yield replace(first, micro_batch=micro, generated=generated)
            generated //= 2
        micro //= 2


def largest(config: PlanConfig, stage: Stage, shape: ModelShape, way: Way, room: int) -> Fit | None:
    """The first of `jobs` that fits into `room` bytes."""
    for job in jobs(config, stage, shape, way):
        memory = estimate(job)
        if memory.peak <= room:
            return Fit(job, memory)
    return None


def show_one(config: PlanConfig) -> dict[str, dict[float, Fit | None]]:
    """Print what fits and, with --json, write it; returns stage -> GiB -> the first way that fits.

    Raises ConfigError for a flag of the cluster's plan, and for numbers out of range.
    """
    shape = shape_of(config.model)
    check(config, shape)
    stages = get_args(Stage) if config.stage == "all" else (config.stage,)
    sizes = sorted({*SIZES, config.gpu_memory})
    length = f"{config.prompt_length} + {config.max_new_tokens} tokens"
    console.print(f"[bold]{escape(shape.name)}[/bold]: {shape.parameters:,} parameters, rows of "
                  f"{length}, one GPU", soft_wrap=True)  # fmt: skip
    chosen: dict[str, dict[float, Fit | None]] = {}
    for stage in stages:
        fits = {way: {size: largest(config, stage, shape, way, usable(size)) for size in sizes}
                for way in ways(config)}  # fmt: skip
        show(f"{stage}: the largest micro-batch, and what it takes", table_of(fits, sizes))
        chosen[stage] = {
            size: next((row[size] for row in fits.values() if row[size]), None) for size in sizes
        }
        for size, fit in chosen[stage].items():
            told = as_flags(fit.flags()) if fit else "nothing fits: take a smaller model"
            console.print(f"  {size:g} GiB: {told}", soft_wrap=True)
    console.print("\nThat assumes:")
    for line in assumptions(config):
        console.print(f"- {line}", style="dim", soft_wrap=True)
    if config.json is not None:
        write_json(config.json, as_plain(config, shape, chosen))
        console.print(f"written to {config.json}", soft_wrap=True)
    return chosen


def check(config: PlanConfig, shape: ModelShape) -> None:
    """Raise ConfigError for what this plan would not heed, and for numbers out of range."""
    for field in fields(config):
        name = "--" + field.name.replace("_", "-")
        value = getattr(config, field.name)
        if field.name not in USED and value != field.default:
            raise ConfigError(f"{name} belongs to the plan of a cluster: leave --stage out.")
        number = isinstance(value, (int, float)) and not isinstance(value, bool)
        if number and value < (0 if field.name == "ptx_rows" else 1):
            raise ConfigError(f"{name} {value}: give at least 1.")
    if config.quantize and not config.lora:
        raise ConfigError("--quantize holds the base under an adapter: add --lora, 16 for example.")
    length = config.prompt_length + config.max_new_tokens
    if length > shape.context:
        raise ConfigError(
            f"--prompt-length and --max-new-tokens make {length} tokens, and {shape.name} reads "
            f"{shape.context} at most. Lower one of them."
        )


def table_of(fits: dict[Way, dict[float, Fit | None]], sizes: list[float]) -> Table:
    """One row for each way, one column for each GPU; it fits a terminal of 80 columns."""
    table = Table(padding=(0, 1, 0, 0), show_lines=True)
    table.add_column("flags", min_width=len("--gradient-checkpointing"))
    for size in sizes:
        table.add_column(f"{size:g} GiB", justify="right")
    for way, row in fits.items():
        cells = [f"{f.job.micro_batch}\n{with_unit(f.memory.peak)}" if f else "–"
                 for f in row.values()]  # fmt: skip
        table.add_row(as_flags(way.flags()) or "(all weights)", *cells)
    return table


def assumptions(config: PlanConfig) -> list[str]:
    """What the numbers stand on."""
    held = "bf16" if config.dtype == "bfloat16" else "fp32"
    return [
        f"{USABLE:.0%} of a GPU is usable, less {with_unit(CONTEXT)} for CUDA.",
        f"Weights, gradients and Adam's moments are fp32, products {held}; PPO's reference and "
        f"reward model hold their matrices in {held}. Under --lora the base is {held} and is held "
        "once for policy and reference, and once for critic and reward model.",
        "Every row has prompt and answer in full; a comparison has two answers. Updates of "
        f"{config.minibatch} rows; PPO: {config.batch} answers a rollout, with "
        f"{config.ptx_rows} rows of 48 tokens of text in an update.",
        "Attention keeps no T × T matrix. Logits exist for the answers alone, half a GiB at a "
        "time. Adapters stand beside every matrix of every layer.",
    ]


def as_plain(config: PlanConfig, shape: ModelShape, chosen: dict) -> dict:
    """The plan as plain JSON, in bytes."""
    settings = {k: v for k, v in asdict(config).items() if k in USED and k != "json"}
    return {
        "settings": settings,
        "model": asdict(shape) | {"parameters": shape.parameters},
        "stages": {
            stage: {
                f"{size:g}": fit and {"flags": as_flags(fit.flags()), **asdict(fit.memory)}
                for size, fit in row.items()
            }
            for stage, row in chosen.items()
        },
        "assumptions": assumptions(config),
    }
