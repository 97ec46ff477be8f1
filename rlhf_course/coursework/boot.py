"""What a notebook's first cell does where the course is new, as in Colab.

The cell has installed this package without what it needs. Here the rest is added around what is
there already: torch, numpy and whatever is built against them stay in their versions, since another
torch means gigabytes, a restart, and libraries beside it that no longer fit. In Colab the student's
models can be kept in Google Drive, where they outlive the session.

Only the standard library and `packaging`, which every Jupyter kernel has, are imported here.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from importlib import invalidate_caches, metadata
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf_course.coursework.project import NAME
from rlhf_course.errors import ConfigError

if TYPE_CHECKING:
    from packaging.requirements import Requirement

HEAVY = ("torch", "numpy")
"""Never replaced: too old a one is told, with what to do."""
BESIDE = (
    "jax", "jaxlib", "numba", "pandas", "pyarrow", "scikit-learn", "scipy", "tensorflow",
    "torchao", "torchaudio", "torchcodec", "torchvision", "triton",
)  # fmt: skip
"""What is built against those, and stays with them."""
MOUNT = Path("/content/drive")
KEPT = MOUNT / "MyDrive" / NAME
"""The course's folder in Google Drive."""
HOME = "RLHF_COURSE_HOME"
PIP = (sys.executable, "-m", "pip")


def start(drive: bool = False) -> None:
    """Make the course ready: install what is missing, and mount Google Drive where that is asked.

    Where nothing is missing and no Drive is asked for, it does and prints nothing. drive: keep what
    is trained in Google Drive; the same happens where RLHF_COURSE_HOME names a folder in it.
    Raises ConfigError, with what to do, where the session cannot be made to fit.
    """
    complete()
    home = os.environ.get(HOME)
    inside = home is not None and Path(home).is_relative_to(MOUNT)
    if drive and home and not inside:
        raise ConfigError(
            f"DRIVE is True, and {HOME} is {home}: two places. Take one of the two away."
        )
    if drive or inside:
        os.environ[HOME] = str(mounted(Path(home or KEPT)))


# ------------------------------------------------------------------------------------- packages


def complete() -> None:
    """Install what the course needs and is missing or too old, and say so in a line or two.

    Raises ConfigError where torch or numpy is too old, pip fails, or what was replaced is already
    imported here.
    """
    needed = requirements()
    wrong = [each for each in needed if not fits(each)]
    if not wrong:
        return
    refuse_heavy([each for each in wrong if each.name in HEAVY and installed(each.name)])
    before, began = versions(), time.perf_counter()
    install([str(each) for each in needed], kept(before))
    invalidate_caches()
    after = versions()
    print(summary(before, after, time.perf_counter() - began))
    if still := [str(each) for each in needed if not fits(each)]:
        raise ConfigError(
            f"pip ended well, and {', '.join(still)} is still missing. Start afresh (Colab: "
            "Runtime > Disconnect and delete runtime) and run this cell again."
        )
    stale = [name for name in before if before[name] != after.get(name) and imported(name)]
    if stale:
        raise ConfigError(
            f"{', '.join(sorted(stale))} had been imported before it was replaced. "
            "Restart the session (Colab: Runtime > Restart session) and run this cell again."
        )


def requirements() -> list[Requirement]:
    """What the course needs on this Python, extras left out; none where it is not installed, as in
    a clone on the path."""
    from packaging.requirements import Requirement

    try:
        lines = metadata.requires(NAME) or []
    except metadata.PackageNotFoundError:
        return []
    found = [Requirement(line) for line in lines]
    return [each for each in found if each.marker is None or each.marker.evaluate({"extra": ""})]


def versions() -> dict[str, str]:
    """Name -> version of every installed distribution, names as pip compares them."""
    from packaging.utils import canonicalize_name

    found = {}
    for each in metadata.distributions():
        name = each.metadata["Name"]
        if name:  # a folder that pip left half removed has none
            found.setdefault(canonicalize_name(name), each.version)  # the first is imported
    return found


def installed(name: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def fits(requirement: Requirement) -> bool:
    """True where this is installed in a version that will do: nightly builds of torch count."""
    exact = installed(requirement.name)
    return exact is not None and requirement.specifier.contains(exact, prereleases=True)


def refuse_heavy(old: Sequence[Requirement]) -> None:
    """Raise ConfigError for a torch or numpy that is too old."""
    if not old:
        return
    have = ", ".join(f"{each.name} {installed(each.name)}" for each in old)
    wanted = " ".join(f'"{each}"' for each in old)
    raise ConfigError(
        f"this session has {have}, and the course needs {wanted}. Take a newer one (Colab: "
        "Runtime > Change runtime type > Runtime version: Latest), or upgrade, which takes some "
        f"minutes: %pip install -U {wanted}, then restart the session and run this cell again."
    )


def kept(have: Mapping[str, str]) -> dict[str, str]:
    """What pip may not touch: name -> the installed version."""
    return {name: have[name] for name in (*HEAVY, *BESIDE) if name in have}


def install(wanted: Sequence[str], kept: Mapping[str, str]) -> None:
    """Have pip install what is missing, from wheels, with what is kept as a constraint.

    Raises ConfigError with pip's last words.
    """
    with tempfile.TemporaryDirectory() as folder:
        held = Path(folder) / "constraints.txt"
        held.write_text("".join(f"{n}=={v}\n" for n, v in kept.items()), encoding="utf-8")
        command = [*PIP, "install", "--quiet", "--only-binary", ":all:", "-c", str(held), *wanted]
        done = subprocess.run(command, capture_output=True, text=True, encoding="utf-8")
    if done.returncode:
        said = " ".join((done.stderr or done.stdout).strip().splitlines()[-3:]) or "no message"
        pins = ", ".join(f"{name} {version}" for name, version in kept.items())
        raise ConfigError(f"pip cannot add what the course needs to {pins or 'this'}: {said}")


def summary(before: Mapping[str, str], after: Mapping[str, str], seconds: float) -> str:
    """What has been done, in a line; and in another what is newer now than it was."""
    stayed = [f"{name} {after[name]}" for name in HEAVY if before.get(name) == after.get(name, "")]
    new = [f"{name} {after[name]}" for name in sorted(after.keys() - before.keys())]
    other = [
        f"{name} {before[name]} -> {after[name]}"
        for name in sorted(before.keys() & after.keys())
        if before[name] != after[name]
    ]
    lines = [f"Kept {' and '.join(stayed)}." if stayed else "", _added(new, seconds)]
    if other:
        lines.append(f"\nReplaced, as the course needs newer ones: {', '.join(other)}.")
    return " ".join(filter(None, lines)).replace(" \n", "\n")


def _added(new: Sequence[str], seconds: float) -> str:
    named = ", ".join(new[:4]) + (f" and {len(new) - 4} more" if len(new) > 4 else "")
    return f"Installed {named or 'nothing new'} ({seconds:.0f} s)."


def imported(name: str) -> bool:
    """True where this process has imported a distribution's package."""
    return name in sys.modules or name.replace("-", "_") in sys.modules


# ----------------------------------------------------------------------------------- Google Drive


def mounted(home: Path) -> Path:
    """Mount Google Drive, make the course's folder there and say where it is.

    Raises ConfigError outside Colab, and where the student or Google declines.
    """
    if find_spec("google") is None or find_spec("google.colab") is None:
        raise ConfigError(
            f"Google Drive can be mounted in Colab only. Here, set DRIVE = False; {HOME} names the "
            "folder for what is trained."
        )
    from google.colab import drive

    try:
        drive.mount(str(MOUNT))
        home.mkdir(parents=True, exist_ok=True)
    except Exception as error:
        raise ConfigError(
            f"Google Drive was not mounted ({error}). Run this cell again and allow it, or set "
            "DRIVE = False: then what is trained goes with the session."
        ) from error
    print(f"What you train is kept in {home}: the next session goes on from there.")
    return home
