"""`ppo` and `ppo-ray` learn from the same answers: how far apart are they after n iterations?

    python benchmarks/same_answers.py --runs runs/town-small-seed0 --iterations 18

--runs: a folder with the stages sft and reward_model (`make demo` makes one). The laptop's trainer
runs first, and its answers are kept; then the cluster trains on those instead of asking its
engines. All that is left between the two are sums in another order. Prints, for some metrics, the
relative difference in each iteration, and writes same_answers.json.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

from rlhf_course import cli
from rlhf_course.runs import read_metrics

KEYS = ("reward", "kl", "policy_loss", "value_loss", "ptx_loss", "entropy", "policy_grad_norm")


def keep_answers(file: Path) -> None:
    """Let the laptop's trainer write what it collects into a file."""
    from rlhf_course.stages.ppo import PPOTrainer

    collect, kept = PPOTrainer.collect, {}

    def collecting(self, step):
        answers = collect(self, step)
        ends = zip(answers.prompt_lengths.tolist(), answers.response_lengths.tolist(), strict=True)
        rows = [row[p : p + r].tolist() for row, (p, r) in zip(answers.tokens, ends, strict=True)]
        kept[step] = {"responses": rows, "finished": answers.finished.tolist()}
        torch.save(kept, file)
        return answers

    PPOTrainer.collect = collecting


def give_answers(file: Path) -> None:
    """Let the cluster's controller find them where its engines' answers would be."""
    from rlhf_course.distributed.controller import RayTrainer

    kept = torch.load(file)

    def start(self, step):
        rows = kept[step]["responses"]
        return kept[step] | {"logprobs": [[0.0] * len(r) for r in rows], "version": step,
                             "seconds": 1.0}  # fmt: skip

    RayTrainer.start = start


def main() -> None:
    """Run both, in processes of their own, and compare."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--runs", type=Path, required=True)
    parser.add_argument("--iterations", type=int, default=18)
    parser.add_argument("--out", type=Path, default=Path("same_answers.json"))
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder, found = Path(name), []
        for command in ("ppo", "ppo-ray"):
            arguments = [
                command, "--dtype", "float32", "--size", "small", "--iterations",
                str(asked.iterations), "--model", str(asked.runs / "sft" / "model"),
                "--reward-model", str(asked.runs / "reward_model" / "model"),
                "--out", str(folder / command),
            ]  # fmt: skip
            own = [sys.executable, __file__, "--", str(folder / "answers.pt"), *arguments]
            subprocess.run(own, check=True)
            found.append(read_metrics(folder / command))
    apart = {key: [abs(b[key] / a[key] - 1) for a, b in zip(*found, strict=True) if key in a]
             for key in KEYS}  # fmt: skip
    asked.out.write_text(json.dumps(apart, indent=2))
    for key, values in apart.items():
        print(f"{key:16}", *(f"{value:.0e}" for value in values))


if __name__ == "__main__":
    if sys.argv[1:2] == ["--"]:
        command = sys.argv[3]
        (keep_answers if command == "ppo" else give_answers)(Path(sys.argv[2]))
        sys.exit(cli.main(sys.argv[3:]))
    main()
