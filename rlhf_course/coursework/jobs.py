"""One training run of a chapter: its configuration, whether it is finished, and how it is run."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rlhf_course.coursework import recipes
from rlhf_course.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    from filelock import BaseFileLock

STAGES = {
    "pretrain": ("PretrainConfig", "pretrain:pretrain", ()),
    "sft": ("SFTConfig", "sft:sft", ("pretrain",)),
    "comparisons": ("ComparisonsConfig", "comparisons:comparisons", ("pretrain", "sft")),
    "reward_model": ("RewardModelConfig", "reward_model:train_reward_model",
                     ("pretrain", "sft", "comparisons")),
    "ppo": ("PPOConfig", "ppo:ppo", ("pretrain", "sft", "comparisons", "reward_model")),
    "ppo_ray": ("RayPPOConfig", "ppo_ray:ppo_ray",
                ("pretrain", "sft", "comparisons", "reward_model")),
    "dpo": ("DPOConfig", "dpo:dpo", ("pretrain", "sft", "comparisons")),
}  # fmt: skip
"""Stage -> its configuration, its function, and the stages that have to be there before it."""

PACKAGES = {"ppo_ray": "rlhf_course.distributed"}
"""Where a stage's settings and function stand, if not in `rlhf_course.stages`."""
PRESETS = {"ppo_ray": "ppo"}
"""Whose values a stage takes for what is left unset, if not its own."""

OURS = {"out", "overwrite", "size", "world", "world_seed"}
"""Fields of the configurations that the laboratory fills in itself."""


def quick() -> bool:
    """True when RLHF_COURSE_QUICK is set."""
    return os.environ.get("RLHF_COURSE_QUICK", "") not in ("", "0")


def home() -> Path:
    """The folder that holds everything the chapters train."""
    asked = os.environ.get("RLHF_COURSE_HOME")
    return Path(asked).expanduser() if asked else Path.home() / ".cache" / "rlhf-course"


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


def _module(stage: str, name: str) -> Any:
    return import_module(f"{PACKAGES.get(stage, 'rlhf_course.stages')}.{name}")


def function(stage: str) -> Callable[[Any], Path]:
    """What runs a stage from its configuration."""
    module, name = entry(stage)[1].split(":")
    return getattr(_module(stage, module), name)


def place(world: str, name: str) -> Path:
    """The folder of a run of the student's. Raises ConfigError where it would replace a base model
    that all chapters share, or leave the workspace."""
    folder = workspace(world) / str(name)
    inside = os.path.relpath(os.path.abspath(folder), os.path.abspath(workspace(world)))
    if inside in (*STAGES, os.curdir) or inside.split(os.sep)[0] == os.pardir:
        raise ConfigError(
            f"name {name!r}: choose another one; {', '.join(STAGES)} are the models that all "
            "chapters share."
        )
    return folder


def base(world: str, stage: str) -> dict[str, Any]:
    """What the course sets for a stage. Raises ConfigError for a world that is not there."""
    if world not in recipes.BASE:
        raise ConfigError(f"there is no world {world!r}; choose one of {', '.join(recipes.BASE)}")
    return recipes.BASE[world].get(PRESETS.get(stage, stage), {})


def configuration(stage: str, folder: Path, world: str, settings: Mapping[str, Any]):
    """The stage's configuration, resolved; in quick mode nothing is larger than `recipes.QUICK`.

    Raises ConfigError for a setting that the stage does not have.
    """
    from rlhf_course.stages.presets import resolve

    kind = getattr(_module(stage, "settings"), entry(stage)[0])
    known = sorted({field.name for field in fields(kind)} - OURS)
    if unknown := sorted(set(settings) - set(known)):
        raise ConfigError(f"{stage} has no setting {unknown[0]!r}. It has: {', '.join(known)}.")
    preset = PRESETS.get(stage, stage)
    shared = {"world": world, "size": size(), "out": folder, "world_seed": recipes.SEED}
    try:
        config = resolve(kind(**{**shared, "seed": recipes.SEED, **settings}), preset)
    except TypeError as error:
        raise ConfigError(f"{stage}: a setting has a value of the wrong kind ({error}).") from error
    if quick():
        for key, most in recipes.QUICK.items():
            value = getattr(config, key, None)
            if value is not None and value > most:
                setattr(config, key, most)
    return config


def is_done(stage: str, folder: Path, world: str, settings: Mapping[str, Any]) -> bool:
    """True where this very run is finished, by the package's functions alone."""
    return _finished(configuration(stage, folder, world, settings))


def _finished(config) -> bool:
    folder = Path(config.out)
    ours = (folder / "done.json").exists() and not _of_others(folder).exists()
    return ours and _holds(config)


def _holds(config) -> bool:
    """True where the folder holds a run with these settings. One of the two identities may leave
    out what the other names (`presets.ADDED`)."""
    from rlhf_course.files import read_json
    from rlhf_course.stages.presets import identity

    there, wanted = read_json(Path(config.out) / "config.json"), identity(config)
    for name in getattr(import_module(type(config).__module__), "NOT_IDENTITY", ()):
        wanted.pop(name, None)  # where a cluster's run runs
    return all(there.get(k) == _plain(wanted.get(k)) for k in there.keys() | wanted.keys())


def _plain(value):
    return list(value) if isinstance(value, tuple) else value


def run(stage: str, folder: Path, world: str, settings: Mapping[str, Any], own: str = "") -> None:
    """Run a stage unless this very run is finished; another run in its folder is replaced.

    What was interrupted goes on from its checkpoint. own: the fingerprint of a student's functions
    where they are in use (`substitute.fingerprint`): such a run is never taken as it is, and goes
    on only where the interrupted one had the same. Where another notebook is at it, this one waits.
    """
    config = configuration(stage, folder, world, settings)
    if not own and _finished(config):
        return
    with _alone(folder):
        if not own and _finished(config):
            return  # while this one waited
        mark = _of_others(folder)
        begun = (folder / "config.json").exists()
        config.overwrite = begun and not _may_go_on(config, own)
        if own:
            mark.write_text(own, encoding="utf-8")
        with _silence():
            function(stage)(config)
        if not own:
            mark.unlink(missing_ok=True)


def _may_go_on(config, own: str) -> bool:
    """True where the run in the folder is this one, made by these functions, and not at its end."""
    folder = Path(config.out)
    mark = _of_others(folder)
    theirs = mark.read_text(encoding="utf-8") if mark.exists() else ""
    ended = own and (folder / "done.json").exists()
    return mark.exists() == bool(own) and theirs == own and not ended and _holds(config)


def _of_others(folder: Path) -> Path:
    """The file that says that the run beside it was made with a student's functions, and which."""
    return folder.with_name(f".{folder.name}.own")


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One process at a time may write to a run folder. The lock goes with its process, however
    that ends."""
    from rlhf_course.files import require_writable, writing

    try:
        require_writable(folder)
        folder.parent.mkdir(parents=True, exist_ok=True)
    except (OSError, CheckpointError) as error:
        raise CheckpointError(
            f"cannot write {folder}. Set RLHF_COURSE_HOME to a folder that may be written to."
        ) from error
    with writing(folder):
        lock = _locked(folder)
    try:
        yield
    finally:
        if lock is not None:
            lock.release()


def _locked(folder: Path) -> BaseFileLock | None:
    """The lock of a run folder, waited for; None where the file system has no locks."""
    from filelock import FileLock, Timeout

    from rlhf_course.progress import console

    file = folder.with_name(f".{folder.name}.lock")
    if not _can_lock(file):
        console.print(
            f"{folder.name}: files cannot be locked in {folder.parent}, so see to it that no other "
            "notebook trains there at the same time."
        )
        return None
    lock = FileLock(file)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        console.print(f"{folder.name}: another notebook is at it; this one waits for the end.")
        lock.acquire()
    return lock


NO_LOCKS = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL}


def _can_lock(file: Path) -> bool:
    """False where the file system has no locks, which a network folder may not have.

    There, filelock would take the file itself for a lock: one that a killed session leaves behind,
    so that all later ones wait for ever.
    """
    try:
        import fcntl
    except ImportError:  # Windows, where files can be locked
        return True
    # To be read too: NFS refuses a shared lock on a file that is open for writing alone.
    with open(file, "a+", encoding="utf-8") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:  # somebody holds it
            return True
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise
            return False
    return True


@contextmanager
def _silence() -> Iterator[None]:
    """The progress bar is enough in a notebook."""
    from rlhf_course.progress import console

    before, console.quiet = console.quiet, console.quiet or console.is_jupyter
    try:
        yield
    finally:
        console.quiet = before
