"""The README's figures from two finished demos.

rlhf-course demo && rlhf-course demo --world reviews
python benchmarks/readme_figures.py runs/town-small-seed0 runs/reviews-small-seed0 docs/figures
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from rlhf_course.plots import honesty, overoptimisation
from rlhf_course.runs import read_metrics

NAMES = {"sft": "SFT", "ppo": "PPO-ptx"}
RUNS = {
    "ppo": "KL and ptx",
    "ppo_no_ptx": "KL only",
    "ppo_no_kl": "ptx only",
    "ppo_no_kl_no_ptx": "neither",
}


def main() -> None:
    """Write honesty.png and overoptimisation.png."""
    if len(sys.argv) != 4:
        sys.exit(__doc__)
    town, reviews, out = map(Path, sys.argv[1:])
    out.mkdir(parents=True, exist_ok=True)
    policies = json.loads((town / "evaluation.json").read_text(encoding="utf-8"))["policies"]
    shares = {label: policies[name]["shares"] for name, label in NAMES.items()}
    honesty(shares).savefig(out / "honesty.png", dpi=110)
    runs = {label: read_metrics(reviews / name) for name, label in RUNS.items()
            if (reviews / name).is_dir()}  # fmt: skip
    best = json.loads((reviews / "evaluation.json").read_text(encoding="utf-8"))["best_of_n"]
    overoptimisation(runs, best).savefig(out / "overoptimisation.png", dpi=110)


if __name__ == "__main__":
    main()
