"""Seconds per phase of `ppo-ray`: colocated against separate, in step against one step off.

    python benchmarks/cluster.py --runs runs/town-small-seed0 --iterations 12

--runs: a folder with the stages sft and reward_model (`make demo` makes one). Each arrangement
runs --repeats times, one after the other, with the critic's warm-up left out, and the first two
iterations of each run, in which kernels and caches are made, are not counted. Prints a table
(medians, and the range over repeats) and writes cluster.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from rlhf_course.runs import read_metrics, read_timing

ARRANGEMENTS = {
    "laptop: ppo, one process": ["ppo", "--dtype", "float32"],
    "colocated, 2 ranks": ["ppo-ray", "--actor-ranks", "2"],
    "colocated, 1 rank": ["ppo-ray", "--actor-ranks", "1"],
    "separate, 1 rank a role": ["ppo-ray", "--no-colocate", "--actor-ranks", "1"],
    "separate, one step off": ["ppo-ray", "--no-colocate", "--actor-ranks", "1",
                               "--staleness", "1", "--importance", "tis"],
}  # fmt: skip
KEYS = ("rollout_seconds", "scoring_seconds", "update_seconds", "sync_seconds", "seconds")
SKIPPED = 2


def measure(flags: list[str], runs: Path, iterations: int) -> dict[str, float]:
    """Median seconds of each phase of one run."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        command = [
            sys.executable, "-m", "rlhf_course", *flags, "--size", "small", "--critic-warmup", "0",
            "--iterations", str(iterations), "--model", str(runs / "sft" / "model"),
            "--reward-model", str(runs / "reward_model" / "model"), "--out", str(out),
            "--checkpoint-every", str(iterations),
        ]  # fmt: skip
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        rows, metrics = read_timing(out)[SKIPPED:], read_metrics(out)[SKIPPED:]
    for row in rows:
        row["seconds"] = sum(row.get(key, 0.0) for key in KEYS[:-1])
    found = {key: statistics.median(row.get(key, 0.0) for row in rows) for key in KEYS}
    found["share"] = found["rollout_seconds"] / found["seconds"]
    found["gap"] = max((row.get("rollout_logprob_gap", 0.0) for row in metrics), default=0.0)
    return found


def main() -> None:
    """Run every arrangement and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=12)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, default=Path("cluster.json"))
    asked = parser.parse_args()
    results: dict[str, list[dict]] = {name: [] for name in ARRANGEMENTS}
    for repeat in range(asked.repeats):
        for name, flags in ARRANGEMENTS.items():
            results[name].append(measure(flags, asked.runs, asked.iterations))
            print(f"repeat {repeat}: {name}: {results[name][-1]['seconds']:.2f} s", flush=True)
    asked.out.write_text(json.dumps(results, indent=2))
    print("| arrangement | rollout s | scores s | update s | sync s | iteration s | generation |")
    print("|---|---:|---:|---:|---:|---:|---:|")
    for name, found in results.items():
        cells = []
        for key in KEYS:
            values = sorted(row[key] for row in found)
            cells.append(f"{statistics.median(values):.2f} ({values[0]:.2f}–{values[-1]:.2f})")
        share = statistics.median(row["share"] for row in found)
        print(f"| {name} | {' | '.join(cells)} | {share:.0%} |")


if __name__ == "__main__":
    main()
