"""Ziegler's KL controller, quick and slow, beside the one with a proportional term.

    rlhf-course demo --world reviews
    python benchmarks/kl_controllers.py runs/reviews-small-seed0 docs/figures/kl-reviews.png

Everything but the controller is the preset. Prints a Markdown table and draws KL and price.
"""

from __future__ import annotations

import sys
from pathlib import Path

from matplotlib.figure import Figure

from rlhf_course.plots import smooth
from rlhf_course.runs import read_json, read_metrics
from rlhf_course.stages.ppo import ppo
from rlhf_course.stages.settings import PPOConfig

# label -> (the change to the preset, colour)
CONTROLLERS = {
    "Ziegler, horizon 640": (
        {"kl_controller": "adaptive", "kl_floor": 0.0, "kl_horizon": 640.0},
        "#c2410c",
    ),
    "Ziegler, horizon 2560": ({"kl_controller": "adaptive", "kl_floor": 0.0}, "#a16207"),
    "proportional term, horizon 2560": ({}, "#1d4ed8"),
}


def main() -> None:
    """Train (or read) the runs, print the table, write the figure."""
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    folder, target_file = Path(sys.argv[1]), Path(sys.argv[2])
    base = read_json(folder / "ppo" / "config.json")
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    above, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
    print("| controller | KL of the last 20, / target | highest, / target | gold of the last 20 |")
    print("|---|---:|---:|---:|")
    for label, (change, colour) in CONTROLLERS.items():
        name = "ppo" if not change else "kl_" + "".join(c if c.isalnum() else "_" for c in label)
        shared = {key: base[key] for key in ("world", "size", "seed", "kl_target")}
        if change:
            ppo(PPOConfig(**shared, out=folder / name, **change))
        rows = [row for row in read_metrics(folder / name) if "lr" in row]  # without the warm-up
        kl, target = [row["kl"] for row in rows], base["kl_target"]
        last = sum(kl[-20:]) / 20 / target
        gold = sum(row["gold"] for row in rows[-20:]) / 20
        print(f"| {label} | {last:.2f} | {max(kl) / target:.2f} | {gold:.2f} |")
        above.plot(kl, ".", color=colour, alpha=0.25, markersize=3)
        above.plot(smooth(kl, 5), color=colour, label=label)
        below.plot([row["kl_coef"] for row in rows], color=colour)
    above.axhspan(0.85 * target, 1.15 * target, color="#64748b", alpha=0.15, label="target ± 15 %")
    above.set(ylabel="KL to the reference, nats an answer", title=f"{base['world']}: who holds it?")
    below.set(ylabel="price β, reward a nat", xlabel="iteration (one rollout)", yscale="log")
    above.legend(fontsize=9)
    target_file.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(target_file, dpi=120)


if __name__ == "__main__":
    main()
