"""Kill every kind of process of `ppo-ray` in every phase, and see what becomes of the run.

    python benchmarks/faults.py --runs runs/town-small-seed0

One run with separate roles loses one process after the other, each in another phase; the controller
is killed in every phase too, and started again. At the end the run's metrics must be those of a run
that was never disturbed, byte for byte, and no process may be left. Prints a table: victim, phase,
seconds until the loss was noticed, seconds until the step was done again. Writes faults.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

ROOT = Path(__file__).parents[1]
VICTIMS = ("engine 0", "actor rank 1", "critic rank 0", "reference rank 0", "reward rank 0")
PHASES = ("generate", "score", "update_actor", "update_critic", "sync", "save")


def run(arguments: list[str], out: Path, plan: list) -> tuple[int, list[list[str]], str]:
    """(exit code, log, mark of its processes) of one run with these traps."""
    mark, file = uuid.uuid4().hex, out.with_name(f"plan-{len(plan)}-{time.time():.0f}.json")
    file.write_text(json.dumps(plan))
    command = [sys.executable, "-m", "tests.cluster_run", str(file), "--", *arguments]
    environment = {**os.environ, "RLHF_MARK": mark, "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(
        [*command, "--out", str(out)], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL,
        check=False,
    )  # fmt: skip
    log = file.with_suffix(".log").read_text().splitlines()
    return done.returncode, [line.split(" ", 1) for line in log], mark


def left_over(mark: str, patience: float = 90.0) -> int:
    """Processes of a run that are still there after `patience` seconds."""
    until = time.monotonic() + patience
    while True:
        count = 0
        for folder in Path("/proc").glob("[0-9]*"):
            try:
                count += mark.encode() in (folder / "environ").read_bytes()
            except OSError:
                continue
        if not count or time.monotonic() > until:
            return count
        time.sleep(0.5)


def waits(log: list[list[str]]) -> list[dict]:
    """For each kill: the entry, seconds until noticed and until that step was done."""
    out = []
    for i, (when, what) in enumerate(log):
        if not what.startswith("kill"):
            continue
        step, phase, victim = json.loads(what[5:].replace("'", '"'))
        later = [(float(t) - float(when), said) for t, said in log[i + 1 :]]
        noticed = next((t for t, said in later if said == "clear"), None)
        done = next((t for t, said in later if said.startswith(f"done {step}")), None)
        out.append(
            {"step": step, "phase": phase, "victim": victim, "noticed": noticed, "done": done}
        )
    return out


def main() -> None:
    """Run the whole matrix."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--victims", nargs="+", default=[*VICTIMS, "controller"])
    parser.add_argument("--out", type=Path, default=Path("faults.json"))
    asked = parser.parse_args()
    kills = [(phase, victim) for victim in asked.victims for phase in PHASES]
    plan = [[2 + i, phase, victim] for i, (phase, victim) in enumerate(kills)]
    arguments = [
        "ppo-ray", "--size", "tiny", "--iterations", str(len(plan) + 2), "--critic-warmup", "1",
        "--batch", "16", "--minibatch", "8", "--epochs", "1", "--kl-horizon", "40",
        "--no-colocate", "--actor-ranks", "2", "--critic-ranks", "1", "--reference-ranks", "1",
        "--reward-ranks", "1", "--restarts", "99", "--timeout", "120",
        "--model", str(asked.runs.absolute() / "sft" / "model"),
        "--reward-model", str(asked.runs.absolute() / "reward_model" / "model"),
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        calm, stormy = Path(folder) / "calm", Path(folder) / "stormy"
        code, _, _ = run(arguments, calm, [])
        assert code == 0, f"the undisturbed run ended with {code}"
        rows, orphans = [], 0
        while plan:
            code, log, mark = run(arguments, stormy, plan)
            rows += waits(log)
            orphans += left_over(mark)
            happened = [[row["step"], row["phase"], row["victim"]] for row in rows]
            plan = [entry for entry in plan if entry not in happened]
            if code != -signal.SIGKILL:
                break
        if code == -signal.SIGKILL:
            code, _, mark = run(arguments, stormy, [])
            orphans += left_over(mark)
        same = (calm / "metrics.jsonl").read_bytes() == (stormy / "metrics.jsonl").read_bytes()
    asked.out.write_text(json.dumps({"kills": rows, "orphans": orphans, "same": same}, indent=2))
    print("| victim | phase | noticed after, s | that step done after, s |\n|---|---|---:|---:|")
    for row in rows:
        shown = [f"{row[key]:.1f}" if row[key] is not None else "–" for key in ("noticed", "done")]
        print(f"| {row['victim']} | {row['phase']} | {shown[0]} | {shown[1]} |")
    print(f"{len(rows)} kills, exit code {code}, metrics the same: {same}, orphans: {orphans}")


if __name__ == "__main__":
    main()
