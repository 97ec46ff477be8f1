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
import signal
import sys
import tempfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository, for its tests' traps

from tests.cluster_run import Ran

VICTIMS = ("engine 0", "actor rank 1", "critic rank 0", "reference rank 0", "reward rank 0")
PHASES = ("generate", "score", "update_actor", "update_critic", "sync", "save")


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
        undisturbed = Ran(arguments, calm, patience=None)
        assert undisturbed.code == 0, undisturbed.said
        rows, orphans = [], 0
        while plan:
            run = Ran(arguments, stormy, plan, patience=None)
            rows += waits(run.log)
            orphans += len(run.orphans())
            happened = [[row["step"], row["phase"], row["victim"]] for row in rows]
            plan = [entry for entry in plan if entry not in happened]
            if run.code != -signal.SIGKILL:
                break
        if run.code == -signal.SIGKILL:
            run = Ran(arguments, stormy, patience=None)
            orphans += len(run.orphans())
        same = (calm / "metrics.jsonl").read_bytes() == (stormy / "metrics.jsonl").read_bytes()
    asked.out.write_text(json.dumps({"kills": rows, "orphans": orphans, "same": same}, indent=2))
    print("| victim | phase | noticed after, s | that step done after, s |\n|---|---|---:|---:|")
    for row in rows:
        shown = [f"{row[key]:.1f}" if row[key] is not None else "–" for key in ("noticed", "done")]
        print(f"| {row['victim']} | {row['phase']} | {shown[0]} | {shown[1]} |")
    print(f"{len(rows)} kills, exit code {run.code}, metrics the same: {same}, orphans: {orphans}")


if __name__ == "__main__":
    main()
