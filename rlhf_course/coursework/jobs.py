"""One training run of a chapter: its configuration, whether it is finished, and how it is run."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import Any

from rlhf_course.coursework import recipes
from rlhf_course.errors import ConfigError

STAGES = {
    "pretrain": ("PretrainConfig", "pretrain:pretrain", ()),
    "sft": ("SFTConfig", "sft:sft", ("pretrain",)),
    "comparisons": ("ComparisonsConfig", "comparisons:comparisons", ("pretrain", "sft")),
    "reward_model": ("RewardModelConfig", "reward_model:train_reward_model",
                     ("pretrain", "sft", "comparisons")),
    "ppo": ("PPOConfig", "ppo:ppo", ("pretrain", "sft", "comparisons", "reward_model")),
    "dpo": ("DPOConfig", "dpo:dpo", ("pretrain", "sft", "comparisons")),
}  # fmt: skip
"""Stage -> its configuration, its function, and the stages that have to be there before it."""


def quick() -> bool:
    """True when RLHF_COURSE_QUICK is set."""
    return os.environ.get("RLHF_COURSE_QUICK", "") not in ("", "0")


def home() -> Path:
    """The folder that holds everything the chapters train."""
    return Path(os.environ.get("RLHF_COURSE_HOME") or Path.home() / ".cache" / "rlhf-course")


def size() -> str:
    """The models' size: "small", and "tiny" in quick mode."""
    return "tiny" if quick() else "small"


def workspace(world: str = "town") -> Path:
    """Where the runs on one world stand side by side."""
    return home() / f"{world}-{size()}{'-quick' if quick() else ''}"


def entry(stage: str) -> tuple[str, str, tuple[str, ...]]:
    """The stage's line of STAGES. Raises ConfigError for another name."""
    if stage not in STAGES:
        raise ConfigError(f"stage {stage!r}: there are {', '.join(STAGES)}.")
    return STAGES[stage]


def configuration(stage: str, folder: Path, world: str, settings: Mapping[str, Any]):
    """The stage's configuration, resolved; in quick mode nothing is larger than `recipes.QUICK`.

    Raises ConfigError for a setting that the stage does not have.
    """
    from rlhf_course.stages import settings as kinds
    from rlhf_course.stages.presets import resolve

    kind = getattr(kinds, entry(stage)[0])
    known = {field.name for field in fields(kind)}
    if unknown := sorted(set(settings) - known):
        raise ConfigError(f"{stage} has no setting {unknown[0]!r}. It has: {', '.join(known)}.")
    shared = {"world": world, "size": size(), "out": folder, "world_seed": recipes.SEED}
    config = resolve(kind(**{**shared, "seed": recipes.SEED, **settings}), stage)
    if quick():
        for key, most in recipes.QUICK.items():
            value = getattr(config, key, None)
            if value is not None and value > most:
                setattr(config, key, most)
    return config


def is_done(stage: str, folder: Path, world: str, settings: Mapping[str, Any]) -> bool:
    """True where this very run is finished."""
    from rlhf_course.files import read_json
    from rlhf_course.stages.presets import identity

    if not (folder / "done.json").exists():
        return False
    wanted = identity(configuration(stage, folder, world, settings))
    return _same(read_json(folder / "config.json"), wanted)


def _same(there: dict, wanted: dict) -> bool:
    """True where two identities agree; one may leave out what the other names (`presets.ADDED`)."""
    return all(there.get(k) == _plain(wanted.get(k)) for k in there.keys() | wanted.keys())


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def run(
    stage: str, folder: Path, world: str, settings: Mapping[str, Any], again: bool = False
) -> None:
    """Run a stage unless this very run is finished; another run in its folder is replaced."""
    if not again and is_done(stage, folder, world, settings):
        return
    config = configuration(stage, folder, world, settings)
    config.overwrite = again or _is_other(config)
    module, function = entry(stage)[1].split(":")
    with _silence():
        getattr(import_module(f"rlhf_course.stages.{module}"), function)(config)


def _is_other(config) -> bool:
    """True where the folder holds a run with other settings."""
    from rlhf_course.files import read_json
    from rlhf_course.stages.presets import identity

    path = Path(config.out) / "config.json"
    if not path.exists():
        return False
    return not _same(read_json(path), identity(config))


@contextmanager
def _silence() -> Iterator[None]:
    """The progress bar is enough in a notebook."""
    from rlhf_course.progress import console

    before, console.quiet = console.quiet, console.is_jupyter
    try:
        yield
    finally:
        console.quiet = before
