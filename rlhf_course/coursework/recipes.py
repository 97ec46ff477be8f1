"""How the chapters train: settings that differ from the package's presets, by world and stage.

The presets are for the demo, which may take its time. A chapter may not, so its base models are
sometimes smaller; what a run says about a claim is said for these settings.
"""

from __future__ import annotations

SEED = 0  # of the worlds and the base models that all chapters share

BASE: dict[str, dict[str, dict]] = {
    "town": {},  # the presets of size "small" as they are
    "reviews": {  # one size smaller, and made in about a minute
        "pretrain": {"model": "tiny", "steps": 1400, "lr": 7e-3, "warmup": 100, "threads": 1},
        "sft": {"steps": 400, "lr": 4e-3, "threads": 1},
        "comparisons": {"prompts": 3000, "heldout": 300, "threads": 1},
        "reward_model": {"epochs": 3, "lr": 3e-3, "threads": 1},
        "ppo": {"iterations": 30, "critic_warmup": 3, "lr": 4e-4, "critic_lr": 8e-4,
                "kl_horizon": 1280.0, "ptx_coef": 0.0, "threads": 1},
        "dpo": {"lr": 1e-3, "epochs": 2, "threads": 1},
    },
}  # fmt: skip
"""World -> stage -> settings of the base pipeline."""

QUICK = {
    "steps": 15, "iterations": 2, "batch": 16, "minibatch": 16, "prompts": 48, "heldout": 24,
    "critic_warmup": 1, "epochs": 1, "eval_every": 15, "ptx_rows": 4,
}  # fmt: skip
"""Quick mode: no setting may exceed these. It shows that a notebook runs, not what it teaches."""
