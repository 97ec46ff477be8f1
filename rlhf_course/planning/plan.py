"""Placement, memory and seconds of a step, before a single GPU is rented.

rlhf-course plan --model 70b --gpus 64 --no-colocate
rlhf-course plan --model runs/town-small-seed0/sft/model --gpus 1 --gpu-memory 40
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from itertools import groupby

from rich.markup import escape
from rich.table import Table

from rlhf_course.errors import ConfigError
from rlhf_course.files import write_json
from rlhf_course.planning import budget, memory, speed
from rlhf_course.planning.budget import GIB
from rlhf_course.planning.search import MOST_GPUS, Plan, best_plan, changes_that_fit
from rlhf_course.planning.settings import PlanConfig
from rlhf_course.planning.shapes import ModelShape, shape_of
from rlhf_course.progress import console
from rlhf_course.stages.flags import as_flags

COLUMNS = {"weights": "weights", "gradients": "grads", "optimizer": "optim.", "working": "activ.",
           "kv_cache": "KV", "on_gpu": "in all", "host": "host"}  # fmt: skip


def show_plan(config: PlanConfig, place: Callable[..., list[dict]]) -> Plan:
    """Print the best plan for these settings and, with --json, write it; returns it.

    place: `distributed.placement.place`. Raises ConfigError, before anything is printed, for
    settings out of range or that contradict each other; CheckpointError for an unusable model.
    """
    shape = shape_of(config.model)
    one = {"--lora": config.lora, "--quantize": config.quantize,
           "--dtype": config.dtype != "bfloat16"}  # fmt: skip
    for flag, given in one.items():
        if given:
            raise ConfigError(f"{flag} belongs to one GPU: add --stage sft, reward-model or ppo.")
    check(config, shape)
    found = best_plan(config, shape)
    chosen = found.config
    roles = {role: getattr(chosen, f"{role}_ranks") for role in (*budget.TRAINERS, *budget.SCORERS)}
    roles["rollout"] = chosen.engines
    bundles = place(roles, config.gpus_per_node, config.colocate, chosen.tensor_parallel)
    changes = changes_that_fit(config, shape) if found.memory.over else []
    describe(config, shape)
    show("Placement", placement_table(bundles))
    show("Memory of a rank of each role", memory_table(found))
    show("What a GPU needs at the worst moments", moments_table(found))
    tell_what_fits(found, changes)
    show("Estimated seconds of a step", speed_table(found))
    console.print("\nThat assumes:")
    for line in assumptions(found, shape):
        console.print(f"- {line}", style="dim", soft_wrap=True)
    if config.json is not None:
        write_json(config.json, as_plain(found, shape, bundles, changes))
        console.print(f"written to {config.json}", soft_wrap=True)
    return found


def check(config: PlanConfig, shape: ModelShape) -> None:
    """Raise ConfigError for a number out of range, and for settings that contradict each other."""
    for field in fields(config):
        value, least = getattr(config, field.name), int(field.name != "ptx_rows")
        if isinstance(value, (int, float)) and not isinstance(value, bool) and not value >= least:
            flag = field.name.replace("_", "-")
            more = " A machine without GPUs needs no plan." if flag == "gpus" else ""
            raise ConfigError(f"--{flag} {value}: give at least {least}.{more}")
    length = config.prompt_length + config.max_new_tokens
    wrong = {
        f"--offload parameters needs --zero-stage 3: stage {config.zero_stage} keeps whole "
        "parameters on every GPU. Change one of the two.":
            config.offload == "parameters" and config.zero_stage < 3,
        f"--prompt-length and --max-new-tokens make {length} tokens, and {shape.name} reads "
        f"{shape.context} at most. Lower one of them.": length > shape.context,
        f"--no-colocate gives each of five roles GPUs of its own, and --gpus is {config.gpus}. "
        "Give at least 5, or leave --no-colocate out.": not config.colocate and config.gpus < 5,
        f"--minibatch {config.minibatch} leaves some of {config.gpus} colocated ranks without an "
        "episode. Raise --minibatch (and --batch), or take fewer --gpus.":
            config.colocate and (config.actor_ranks or config.gpus) > config.minibatch,
        f"--minibatch {config.minibatch} is more than --batch {config.batch}. Change one of the "
        "two.": config.minibatch > config.batch,
    }  # fmt: skip
    for message, holds in wrong.items():
        if holds:
            raise ConfigError(message)


# ----------------------------------------------------------------------------------------- printing


def describe(config: PlanConfig, shape: ModelShape) -> None:
    """The model and the cluster in two lines."""
    console.print(
        f"[bold]{escape(shape.name)}[/bold]: {shape.parameters:,} parameters, {shape.layers} "
        f"layers of width {shape.width}, {shape.heads} heads ({shape.kv_heads} of keys and "
        f"values), {shape.vocabulary:,} tokens", soft_wrap=True,
    )  # fmt: skip
    console.print(
        f"on {config.gpus} × {config.gpu} of {config.gpu_memory:g} GiB, {config.gpus_per_node} a "
        "node", soft_wrap=True,
    )  # fmt: skip


def spans(numbers: list[int]) -> str:
    """[0, 1, 2, 5] -> "0–2, 5"."""
    runs = [list(run) for _, run in groupby(enumerate(numbers), key=lambda pair: pair[1] - pair[0])]
    ends = [(run[0][1], run[-1][1]) for run in runs]
    return ", ".join(str(a) if a == b else f"{a}–{b}" for a, b in ends)


def show(title: str, table: Table) -> None:
    """A table under its title, which may be wider."""
    console.print(f"\n[bold]{title}[/bold]")
    console.print(table)


def placement_table(bundles: list[dict]) -> Table:
    """One row for neighbouring GPUs of a node that hold the same roles."""
    table = Table()
    for name in ("node", "GPUs", "ranks", "share"):
        table.add_column(name)
    numbered = list(enumerate(bundles))
    for (node, roles), group in groupby(numbered, lambda p: (p[1]["node"], tuple(p[1]["ranks"]))):
        held = list(group)
        ranks = {role: spans([bundle["ranks"][role] for _, bundle in held]) for role in roles}
        text = "; ".join(f"{role} {numbers}" for role, numbers in ranks.items())
        table.add_row(str(node), spans([i for i, _ in held]), text, f"{held[0][1]['share']:g}")
    return table


def gib(count: int) -> str:
    """Bytes as GiB with one digit; nothing for 0."""
    return f"{count / GIB:.1f}" if count else ""


def with_unit(count: int) -> str:
    """Bytes in the unit that suits them: "37.4 GiB", "512 MiB", "0 B"."""
    for name, size in (("GiB", GIB), ("MiB", 1 << 20), ("KiB", 1 << 10)):
        if count >= size:
            return f"{count / size:.{int(count < 100 * size)}f} {name}"
    return f"{count} B"


def memory_table(found: Plan) -> Table:
    """What each role takes on each of its GPUs."""
    table = Table()
    table.add_column("role")
    for heading in COLUMNS.values():
        table.add_column(heading, justify="right")
    for role in found.memory.roles:
        counts = [getattr(role, name) for name in COLUMNS]
        parts = [with_unit(count) if count else "" for count in counts]
        table.add_row(f"{role.role} × {role.ranks}", *parts)
    return table


def moments_table(found: Plan) -> Table:
    """What everything on a GPU needs together at the worst moment of each phase."""
    usable = found.memory.usable
    table = Table()
    table.add_column("moment")
    table.add_column("takes", justify="right")
    table.add_column(f"of {gib(usable)} GiB")
    for name, need in found.memory.moments.items():
        verdict = "fits" if need <= usable else f"[red]{with_unit(need - usable)} too much[/red]"
        table.add_row(name, with_unit(need), verdict)
    return table


def tell_what_fits(found: Plan, changes: list[tuple[dict, Plan]]) -> None:
    """The verdict, and, where it is no, what to change."""
    if not found.memory.over:
        host = found.memory.host
        beside = f", with {with_unit(host)} of a node's own memory" if host else ""
        console.print(f"[green]It fits[/green]{beside}.", soft_wrap=True)
        return
    if not changes:
        console.print(
            f"[red]It does not fit[/red], and no change helps, nor do {MOST_GPUS} GPUs: take a "
            "smaller model.", soft_wrap=True,
        )  # fmt: skip
        return
    console.print("[red]It does not fit.[/red] It would with (seconds of a step, node's memory):")
    for changed, plan in changes:
        needs = f"{plan.seconds:.0f} s, {with_unit(plan.memory.host)}"
        console.print(f"  {as_flags(changed)}   ({needs})", soft_wrap=True)


def speed_table(found: Plan) -> Table:
    """Seconds of each phase."""
    took, config = found.speed, found.config
    table = Table()
    table.add_column("phase")
    table.add_column("seconds", justify="right")
    table.add_column("share", justify="right")
    for name, seconds in took.phases.items():
        table.add_row(name, f"{seconds:.3g}", f"{seconds / took.total:.0%}")
    table.add_row("one after the other", f"{took.total:.3g}", "")
    if took.overlapped is not None:
        table.add_row("rollouts one step off (--staleness 1)", f"{took.overlapped:.3g}", "")
    table.add_row("episodes a second", f"{config.batch / found.seconds:.3g}", "")
    return table


def assumptions(found: Plan, shape: ModelShape) -> list[str]:
    """Everything that the numbers stand on."""
    config, gpu = found.config, speed.GPUS[found.config.gpu]
    one = memory.kv_cache_bytes(shape, 1)
    idle = (
        "Engine and trainer take turns: while one works, the other's weights and optimizer states "
        "are on the host."
        if config.colocate
        else "Separate roles keep what they have; nothing is moved to the host."
    )
    checkpointing = "8 N D with checkpointing" if config.gradient_checkpointing else "6 N D"
    return [
        "Actor, critic, reference and reward model have this one shape. Weights and gradients are "
        "bf16; the fp32 master copy and Adam's two moments are 12 bytes a parameter.",
        f"{1 - budget.USABLE:.0%} of a GPU is lost to fragments, {gib(budget.CONTEXT)} GiB to "
        f"CUDA and NCCL in each process, {gib(budget.ENGINE_WORKING)} GiB to an engine at work.",
        idle,
        "Activations count logits too, for the answers alone and "
        f"{memory.LOGIT_ROWS} rows at a time, and the parameters that ZeRO-3 gathers, at most "
        f"{memory.LIVE_PARAMETERS:.0e} at a time; or the update's fp32 gradients, if those are "
        "more. Attention keeps no T × T matrix.",
        f"The KV cache takes {with_unit(one)} a token; an engine holds "
        f"{found.memory.concurrent} sequences of {config.prompt_length} + {config.max_new_tokens} "
        f"tokens, with --gpu-memory-utilization {utilization(found):.2f}.",
        f"Every answer has all {config.max_new_tokens} tokens; {config.batch} episodes a step, "
        f"{config.epochs} epochs in updates of {config.minibatch} episodes and {config.ptx_rows} "
        f"rows of text, {config.micro_batch} sequences a pass.",
        f"Training takes {checkpointing} operations, a forward pass 2 N D, at {speed.COMPUTE:.0%} "
        f"of {gpu.flops / 1e12:.0f} TFLOP/s of each {config.gpu}. Each generated token reads the "
        f"weights and the KV cache at {speed.BANDWIDTH:.0%} of {gpu.bandwidth / 1e12:.2f} TB/s.",
        f"Parameters and gradients travel at {gpu.link / 1e9:.0f} GB/s within a node, "
        f"{speed.NETWORK / 1e9:.0f} GB/s between nodes, {speed.HOST / 1e9:.0f} GB/s to the host, "
        "beside the computation. A tensor-parallel engine's all-reduce takes "
        f"{speed.ALL_REDUCE * 1e6:.0f} µs.",
    ]


def utilization(found: Plan) -> float:
    """vLLM's share of a GPU: weights, working memory, KV cache and its own CUDA context."""
    engine = found.memory.of("rollout")
    return (engine.on_gpu + budget.CONTEXT) / (found.config.gpu_memory * GIB)


def as_plain(found: Plan, shape: ModelShape, bundles: list[dict], changes: list) -> dict:
    """The whole plan as plain JSON, in bytes and seconds."""
    return {
        "settings": {k: str(v) if k == "json" else v for k, v in asdict(found.config).items()},
        "model": asdict(shape) | {"parameters": shape.parameters},
        "bundles": bundles,
        "memory": asdict(found.memory) | {"over": found.memory.over},
        "seconds": asdict(found.speed),
        "changes": [
            {"flags": as_flags(changed), "seconds": plan.seconds} for changed, plan in changes
        ],
        "assumptions": assumptions(found, shape),
    }
