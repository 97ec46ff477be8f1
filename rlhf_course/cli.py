"""The command line: one subcommand a stage.

    rlhf-course demo                       everything, from nothing to a report
    rlhf-course sft --help                 a stage's settings with their defaults

Exit codes: 0 done, 2 a mistake that the message says how to mend, 130 stopped by Ctrl-C (a
checkpoint has been written and the same command goes on from it).
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# Set before tokenizers is imported: its threads and a later fork do not go together.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import tyro
from rich.markup import escape

from rlhf_course.coursework.settings import ProgressConfig
from rlhf_course.distributed.settings import RayPPOConfig
from rlhf_course.errors import EXIT_CODE, CourseError, Interrupted
from rlhf_course.export.settings import ExportConfig
from rlhf_course.grading.settings import GradeConfig
from rlhf_course.planning.doctor import DoctorConfig
from rlhf_course.planning.settings import PlanConfig
from rlhf_course.progress import console, error_console
from rlhf_course.stages import settings, viewing_settings

INTERRUPTED = 130


def export_world(config: viewing_settings.WorldConfig) -> Path:
    """Write a world's files; returns the folder."""
    from rlhf_course.world import make_world

    world = make_world(config.world, config.size, config.seed)
    folder = config.out or Path("worlds") / f"{config.world}-{config.size}-seed{config.seed}"
    world.export(folder)
    for key, value in world.describe().items():
        console.print(f"{key}: {value}", soft_wrap=True)
    console.print(f"written to {folder}")
    return folder


# A stage's module is imported when its command is chosen: `--help` need not wait for all of them.
COMMANDS: dict[str, tuple[type, str]] = {
    "demo": (settings.DemoConfig, "demo:demo"),
    "world": (viewing_settings.WorldConfig, ""),
    "data": (viewing_settings.DataConfig, "look:data"),
    "pretrain": (settings.PretrainConfig, "pretrain:pretrain"),
    "sft": (settings.SFTConfig, "sft:sft"),
    "comparisons": (settings.ComparisonsConfig, "comparisons:comparisons"),
    "reward-model": (settings.RewardModelConfig, "reward_model:train_reward_model"),
    "ppo": (settings.PPOConfig, "ppo:ppo"),
    "ppo-ray": (RayPPOConfig, "rlhf_course.distributed.ppo_ray:ppo_ray"),
    "dpo": (settings.DPOConfig, "dpo:dpo"),
    "evaluate": (settings.EvaluateConfig, "evaluate:evaluate"),
    "chat": (viewing_settings.ChatConfig, "chat:chat"),
    "export": (ExportConfig, "rlhf_course.export.command:export"),
    "grade": (GradeConfig, "rlhf_course.grading.command:grade"),
    "plan": (PlanConfig, "rlhf_course.distributed.plan:plan"),
    "doctor": (DoctorConfig, "rlhf_course.planning.doctor:doctor"),
    "progress": (ProgressConfig, "rlhf_course.coursework.advance:progress"),
}


def command_for(kind: type) -> Callable[[Any], Any]:
    """The function that takes this configuration."""
    from importlib import import_module

    place = next(place for config, place in COMMANDS.values() if config is kind)
    if not place:
        return export_world
    module, function = place.split(":")
    module = module if "." in module else f"rlhf_course.stages.{module}"
    return getattr(import_module(module), function)


def parse(arguments: Sequence[str] | None = None):
    """The configuration that the command line describes; exits with 2 when it is wrong."""
    subcommands = tyro.extras.SubcommandApp()
    for name, (kind, _) in COMMANDS.items():
        subcommands.command(kind, name=name)
    config = subcommands.cli(
        prog="rlhf-course", description="RLHF, from GPT to PPO-ptx.", args=arguments
    )
    words = sys.argv[1:] if arguments is None else arguments
    names = (word[2:].partition("=")[0].replace("-", "_") for word in words if word[:2] == "--")
    # What a profile must leave alone, a default that was typed included.
    config.given = frozenset(name.removeprefix("no_") for name in names)
    return config


def run(config) -> None:
    """Run the command that this configuration belongs to."""
    if type(config) is settings.PPOConfig and config.rollout == "vllm":
        from rlhf_course.distributed.one_process import ppo_vllm

        ppo_vllm(config)
    else:
        command_for(type(config))(config)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        config = parse(arguments)
    except BrokenPipeError:  # `rlhf-course ppo --help | head`: nobody reads on
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    warnings.filterwarnings("ignore", category=UserWarning, module="torch")
    try:
        run(config)
    except CourseError as error:
        error_console.print(f"[bold red]error:[/bold red] {escape(str(error))}", soft_wrap=True)
        return EXIT_CODE
    except Interrupted as stopped:
        error_console.print(f"[yellow]{escape(str(stopped))}[/yellow]", soft_wrap=True)
        return INTERRUPTED
    except KeyboardInterrupt:
        error_console.print("[yellow]stopped[/yellow]")
        return INTERRUPTED
    return 0
