"""What `--size` and `--world` make of the settings left unset: the one dial.

The values were found on training and validation prompts. The strangers of the town's evaluation and
the held-out prompts of the reviews' had no say; the known people are the same everywhere, since a
model can only be asked what it knows about those in its corpus.
"""

from __future__ import annotations

from dataclasses import asdict, fields
from pathlib import Path

from rlhf_course.errors import ConfigError
from rlhf_course.gpt import GPTConfig
from rlhf_course.sources import short_name
from rlhf_course.stages.profiles import fill

SHAPES: dict[str, dict[str, int]] = {
    "tiny": {"layers": 2, "heads": 2, "width": 64},
    "small": {"layers": 3, "heads": 4, "width": 128},
    "gpt2": {"layers": 12, "heads": 12, "width": 768},
}


PRESETS: dict[tuple[str, str], dict[str, dict]] = {
    ("town", "small"): {
        "pretrain": {"steps": 700, "batch": 64, "lr": 3e-3, "warmup": 50, "context": 64,
                     "window": 48},
        "sft": {"steps": 450, "batch": 64, "lr": 1e-3, "warmup": 50, "corpus_rows": 0,
                "packing": False, "context": 256},
        "comparisons": {"prompts": 10000, "answers": 5, "hot_answers": 1},
        "reward_model": {"batch": 48, "lr": 5e-4, "warmup": 20, "epochs": 1, "pooling": "last",
                         "normalize": "bias"},
        "ppo": {"iterations": 90, "batch": 256, "lr": 2e-4, "critic_lr": 3e-4,
                "critic_warmup": 6, "critic_warmup_lr": 1e-3, "max_new_tokens": 12,
                "kl_coef": 0.2, "kl_gain": 1.0, "kl_target": 1.7, "kl_horizon": 1280.0,
                "kl_floor": 0.02, "eos_penalty": 1.0, "eos_override": -5.0,
                "ptx_coef": 0.1, "known_share": 0.3},
        "dpo": {"batch": 64, "lr": 2e-4, "warmup": 10, "epochs": 1, "beta": 0.5,
                "max_new_tokens": 12},
    },
    ("reviews", "small"): {
        "pretrain": {"steps": 2000, "batch": 24, "lr": 4e-3, "warmup": 50, "context": 64,
                     "window": 48},
        "sft": {"steps": 500, "batch": 32, "lr": 1.5e-3, "warmup": 50, "corpus_rows": 6,
                "packing": False, "context": 256},
        "comparisons": {"prompts": 8000, "answers": 5, "hot_answers": 0},
        "reward_model": {"batch": 32, "lr": 1e-3, "warmup": 30, "epochs": 3, "pooling": "sum",
                         "normalize": "gain_bias"},
        "ppo": {"iterations": 80, "batch": 128, "lr": 1.5e-4, "critic_lr": 4.5e-4,
                "critic_warmup": 6, "critic_warmup_lr": 1e-3, "max_new_tokens": 40,
                "kl_coef": 0.1, "kl_gain": 1.0, "kl_target": 3.5, "kl_horizon": 2560.0,
                "kl_floor": 0.02, "eos_penalty": 2.0, "ptx_coef": 1.0},
        "dpo": {"batch": 64, "lr": 2e-4, "warmup": 10, "epochs": 1, "beta": 0.5,
                "max_new_tokens": 40},
    },
}  # fmt: skip


def _derived(world: str, base: str, changes: dict[str, dict]) -> dict[str, dict]:
    preset = {stage: dict(values) for stage, values in PRESETS[world, base].items()}
    for stage, values in changes.items():
        preset[stage].update(values)
    return preset


# tiny: seconds, for tests and a first look. gpt2: 124 M parameters, for a GPU.
for _world in ("town", "reviews"):
    PRESETS[_world, "tiny"] = _derived(_world, "small", {
        "pretrain": {"steps": 60, "batch": 16, "warmup": 10},
        "sft": {"steps": 30, "batch": 16, "warmup": 5},
        "comparisons": {"prompts": 128},
        "reward_model": {"batch": 16, "epochs": 1},
        "ppo": {"iterations": 3, "batch": 32, "critic_warmup": 1, "kl_horizon": 160.0},
        "dpo": {"batch": 16, "warmup": 2},
    })  # fmt: skip
    PRESETS[_world, "gpt2"] = _derived(_world, "small", {
        "pretrain": {"lr": 6e-4, "warmup": 100},
        "sft": {"lr": 1e-4},
        "reward_model": {"lr": 3e-5, "batch": 48, "epochs": 1},
        "ppo": {"lr": 1e-5, "critic_lr": 3e-5, "critic_warmup_lr": 1e-4},
        "dpo": {"lr": 5e-6},
    })  # fmt: skip

# With --data there is no world to take a value from.
DATA_DEFAULTS = {
    "pretrain": {"steps": 1000, "batch": 32, "lr": 2e-3, "warmup": 50, "context": 256,
                 "window": 128},
    "sft": {"steps": 400, "batch": 32, "lr": 2e-3, "warmup": 50, "corpus_rows": 0,
            "packing": True},
    "reward_model": {"batch": 32, "lr": 5e-4, "warmup": 20, "epochs": 1, "pooling": "last",
                     "normalize": "none"},
    "ppo": {"iterations": 60, "batch": 128, "lr": 1e-4, "critic_lr": 3e-4, "critic_warmup": 4,
            "critic_warmup_lr": 1e-3,
            "max_new_tokens": 64, "kl_coef": 0.05, "kl_gain": 1.0,
            "kl_target": 4.0, "kl_horizon": 640.0, "kl_floor": 0.01, "eos_penalty": 1.0,
            "ptx_coef": 0.0},
    "dpo": {"batch": 32, "lr": 1e-4, "warmup": 10, "epochs": 1, "beta": 0.1,
            "max_new_tokens": 64},
}  # fmt: skip


# Learning rates of models that bring weights of their own: large and trained, they are easily hurt.
GENTLE = {
    "pretrain": {"lr": 1e-4},
    "sft": {"lr": 5e-5},
    "reward_model": {"lr": 2e-5},
    "ppo": {"lr": 1e-5, "critic_lr": 3e-5, "critic_warmup_lr": 1e-4},
    "dpo": {"lr": 1e-6},
}

# With --lora, about ten times as much: what Biderman et al. 2024 ("LoRA learns less and forgets
# less") and Schulman et al. 2025 ("LoRA without regret") found to be best.
LORA_RATE = 10

# Answers to a prompt where nothing is said: those of a group are each other's baseline.
GROUPS = {"gae": 1, "rloo": 4, "grpo": 4, "reinforce_plus_plus": 1}
NO_CRITIC = {"critic_lr": None, "critic_warmup": 0, "critic_warmup_lr": None}

# Settings that came after the first runs, and what those did: named in a run's identity only where
# they say something else, so that a folder from before is still the run that it was.
ADDED = {"world_seed": None, "advantages": "gae", "answers_per_prompt": 1, "lora": None,
         "lora_alpha": None, "lora_targets": None, "quantize": None, "generation_batch": None,
         "rollout": "own", "columns": None, "recipe": None, "bad_rows": None, "too_long": None,
         "duplicates": "keep", "rows": None, "rejected": None}  # fmt: skip
# Settings that are gone, by a field that only their stage has, and what they were.
GONE = {"corpus_rows": {"truncate": False}}


# Bytes of weights from which a directory holds a model that others have trained: GPT-2's 124 M
# parameters take 250 MB in bf16, a model of size small 4 MB.
LARGE = 100_000_000


def _starts_large(config, stage: str) -> bool:
    """Whether the stage starts from a model that is easily hurt: a hub's, an adapter's, or one in
    a directory, named or of the run beside this one, that is large."""
    model = getattr(config, "model", None)
    if model in SHAPES or (model is None and stage in ("pretrain", "sft")):
        return False
    folder = workspace(config) / "sft" / "model" if model is None else Path(model)
    if not folder.is_dir():
        return model is not None
    weights = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return weights >= LARGE or (folder / "adapter_config.json").exists()


def _values(config, stage: str) -> dict:
    """What a field left unset becomes."""
    if not getattr(config, "data", None):
        return PRESETS[config.world, config.size][stage]
    values = dict(DATA_DEFAULTS[stage])
    if config.size == "gpt2" or _starts_large(config, stage):
        values |= GENTLE[stage]
    return values


def resolve(config, stage: str):
    """Fill the fields that are None, in place, from the preset; returns the config."""
    if getattr(config, "profile", None) is not None:
        fill(config, stage)
    values = _values(config, stage)
    if getattr(config, "lora", None) is not None:
        values = {**values, **{name: LORA_RATE * rate for name, rate in GENTLE[stage].items()}}
    if getattr(config, "eos_penalty", None) is not None:  # asked for: the override gives way
        values = {k: v for k, v in values.items() if k != "eos_override"}
    if stage == "ppo":
        values = {**values, "answers_per_prompt": GROUPS[config.advantages]}
        if config.advantages != "gae":
            values |= NO_CRITIC
    for field in fields(config):
        if getattr(config, field.name) is None and field.name in values:
            setattr(config, field.name, values[field.name])
    if config.checkpoint_every < 1:
        raise ConfigError(f"--checkpoint-every {config.checkpoint_every}: give at least 1.")
    for name in ("steps", "batch", "iterations", "epochs", "minibatch", "prompts"):
        value = getattr(config, name, None)
        if value is not None and value < 1:
            raise ConfigError(f"--{name} {value}: give at least 1.")
    if config.out is None:
        config.out = workspace(config) / stage
    return config


def workspace(config) -> Path:
    """The folder in which the stages of one experiment lie side by side."""
    if config.out is not None:
        return Path(config.out).parent
    data = getattr(config, "data", None)
    return (
        Path("runs")
        / f"{short_name(data) if data else config.world}-{config.size}-seed{config.seed}"
    )


def identity(config) -> dict:
    """What makes the run what it is: every setting that changes its result, as plain JSON."""
    skip = {"out", "overwrite", "checkpoint_every", "track", "reward_timeout", "reward_retries",
            "gradient_checkpointing", "profile", "cuda_graphs"}  # fmt: skip
    gone = next((was for name, was in GONE.items() if hasattr(config, name)), {})
    return gone | {
        k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()
        if k not in skip and not (k in ADDED and v == ADDED[k])
    }  # fmt: skip


def model_shape(size: str, vocab_size: int, context: int) -> GPTConfig:
    """A GPT of this size. Heads are at least 32 wide, so that vLLM serves them on a CPU too."""
    if size not in SHAPES:
        raise ConfigError(f"size {size!r} is unknown: choose one of {', '.join(SHAPES)}.")
    return GPTConfig(vocab_size=vocab_size, context=context, **SHAPES[size])
