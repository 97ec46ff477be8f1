"""Metrics as the stages log them, made up: for the tests of figures and report."""

import random


def supervised_rows(count: int, **sparse: float) -> list[dict]:
    """A stage's metrics: noisy, with some that are measured at every tenth step only."""
    rng = random.Random(0)
    rows = [
        {"step": i, "loss": 3 / (1 + i) + 0.5 + 0.1 * rng.random(), "grad_norm": 1 + rng.random(),
         "lr": 1e-3 * (1 - i / count)}
        for i in range(count)
    ]  # fmt: skip
    for i in range(9, count, 10):
        rows[i] |= {key: value + 0.001 * i for key, value in sparse.items()}
    return rows


def ppo_rows(count: int = 40, warmup: int = 4, ptx: bool = True, slope: float = 0.05) -> list[dict]:
    """PPO's metrics: KL 0 during the critic's warm-up, then rising."""
    rng = random.Random(1)
    rows = []
    for i in range(count):
        t = max(i - warmup, 0)
        row = {
            "step": i, "score": 0.1 + 0.02 * t + 0.05 * rng.random(), "kl": slope * t,
            "reward": 0.2 + 0.02 * t + 0.05 * rng.random(),
            "kl_coef": 0.3 / (1 + i), "length": 7 + rng.random(), "eos_rate": 1 - rng.random() / 99,
            "explained_variance": 1 - 4 / (1 + i), "gold": -0.3 + 0.03 * t - 0.0006 * t * t,
            "share_true": 0.3, "share_false": 0.5 - 0.01 * t, "share_idk": 0.1 + 0.01 * t,
            "share_bad": 0.1, "value_loss": 1 / (1 + i), "value_grad_norm": 2 + rng.random(),
        }  # fmt: skip
        if i >= warmup:
            row |= {
                "policy_loss": -0.01, "entropy": 0.4, "clipfrac": 0.02 * rng.random(),
                "kl_k1": 0.001, "kl_k3": 0.002, "ratio_max": 1.5 + rng.random(),
                "policy_grad_norm": 1 + rng.random(), "grad_norm_ppo": 1.0, "lr": 1e-4,
            }  # fmt: skip
        if i >= warmup and ptx:
            row |= {"ptx_loss": 0.8, "grad_norm_ptx": 0.1}
        rows.append(row)
    return rows


RUNS = {
    "pretrain": supervised_rows(60, validation_perplexity=2.0),
    "sft": supervised_rows(60, eval_loss=0.6, eval_exact_match=0.3),
    "reward_model": supervised_rows(
        60,
        eval_accuracy=0.7,
        bayes_closed_book=0.8,
        bayes_full=0.84,
        eval_calibration_error=0.02,
        eval_margin=0.7,
    ),
    "ppo": ppo_rows(),
    "dpo": [
        row | {"accuracy": 0.6, "reward_chosen": 0.1, "reward_rejected": -0.2, "margin": 0.3}
        for row in supervised_rows(
            60, kl=1.0, gold=0.2, eval_accuracy=0.7, length=7.0, eos_rate=0.9, share_true=0.3
        )
    ],
}

SHARES = {
    "before": {"known": {"true": 0.8, "false": 0.15, "idk": 0.05, "bad": 0.0},
               "strangers": {"true": 0.1, "false": 0.7, "idk": 0.15, "bad": 0.05}},
    "after": {"known": {"true": 0.9, "false": 0.02, "idk": 0.08, "bad": 0.0},
              "strangers": {"true": 0.02, "false": 0.1, "idk": 0.88}},
}  # fmt: skip
