"""TRL 1.12: `trl sft | reward | dpo`, and a script for the PPO trainer in `trl.experimental`.

TRL writes rows that hold messages with the tokenizer's own chat template.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_course.errors import ConfigError
from rlhf_course.export.amounts import Amounts, Rollouts, controlled
from rlhf_course.export.shell import Command, answer, flags, messages, write_json_lines
from rlhf_course.export.source import Source
from rlhf_course.export.trl_ppo import SCRIPT

VERSION = "1.12.0"
PROGRAMS = {"sft": "sft", "reward_model": "reward", "dpo": "dpo"}


def row_of(row: Any) -> dict:
    """A row in TRL's schema: conversational prompt-completion, preference, or prompt-only."""
    out = {"prompt": messages(row.prompt)}
    if hasattr(row, "response"):
        out["completion"] = answer(row.response)
    elif hasattr(row, "chosen"):
        out |= {"chosen": answer(row.chosen), "rejected": answer(row.rejected)}
    return out


def write_rows(source: Source, folder: Path) -> None:
    """data/train.jsonl and, where rows are held out, data/test.jsonl."""
    (folder / "data").mkdir()
    for name, rows in (("train", source.train), ("test", source.held)):
        if rows:
            write_json_lines(folder / "data" / f"{name}.jsonl", map(row_of, rows))


def _schedule(config, steps: int, warmup: int) -> dict[str, Any]:
    """Our schedules, floor included, by transformers' names."""
    if config.schedule == "constant":
        return {"lr_scheduler_type": "constant_with_warmup"}
    if config.schedule == "cosine":
        name, more = "cosine_with_min_lr", {"min_lr_rate": config.lr_floor}
    else:  # a decay without a stable part is a straight line down to the floor
        name = "warmup_stable_decay"
        more = {"num_decay_steps": max(steps - warmup, 1), "decay_type": "linear",
                "min_lr_ratio": config.lr_floor}  # fmt: skip
    return {"lr_scheduler_type": name, "lr_scheduler_kwargs": json.dumps(more)}


def _shared(source: Source) -> dict[str, Any]:
    """What every trainer takes: models, precision, LoRA, logging."""
    config = source.config
    report = {"both": ("tensorboard", "wandb")}.get(config.track, config.track)
    values: dict[str, Any] = {
        "dataset_name": "./data", "output_dir": "./out", "max_grad_norm": config.max_grad_norm,
        "seed": config.seed, "dtype": "float32", "bf16": str(config.dtype != "float32"),
        "gradient_checkpointing": str(bool(getattr(config, "gradient_checkpointing", False))),
        "logging_steps": 1, "report_to": report, "save_steps": config.checkpoint_every,
        "save_total_limit": 2,
    }  # fmt: skip
    if rank := getattr(config, "lora", None):
        values |= {"use_peft": True, "lora_r": rank}
        values |= {"lora_alpha": int(getattr(config, "lora_alpha", None) or 2 * rank)}
        if targets := getattr(config, "lora_targets", None):
            values["lora_target_modules"] = tuple(targets)
    if bits := getattr(config, "quantize", None):
        values[f"load_in_{bits}"] = True
    return values


def _supervised(source: Source) -> Command:
    config, amounts = source.config, Amounts.of(source)
    values = {"model_name_or_path": source.start} | _shared(source) | {
        "max_steps": amounts.steps, "per_device_train_batch_size": amounts.micro,
        "gradient_accumulation_steps": amounts.batch // amounts.micro,
        "learning_rate": config.lr, "warmup_steps": amounts.warmup,
        **_schedule(config, amounts.steps, amounts.warmup),
        "weight_decay": config.weight_decay, "adam_beta1": 0.9, "adam_beta2": 0.98,
        "max_length": source.longest,
    }  # fmt: skip
    if source.held:
        values |= {"eval_strategy": "steps", "eval_steps": getattr(config, "eval_every", 100)}
    if source.template:
        values["chat_template_path"] = "./chat_template.jinja"
    command = Command(["trl", PROGRAMS[source.stage]], notes=list(source.notes))
    if source.stage == "sft":
        values["completion_only_loss"] = "True"
        if config.packing:
            command.notes.append(
                "--packing is left out: it saves padding and changes no loss here, while with "
                "TRL's a batch would count packed rows instead of dialogues."
            )
    elif source.stage == "reward_model":
        reward_model_notes(source, amounts, command)
    else:
        values |= {"beta": config.beta, "loss_type": "sigmoid", "precompute_ref_log_probs": "True"}
    command.options = flags(**values)
    return command


def reward_model_notes(source: Source, amounts: Amounts, command: Command) -> None:
    """What a reward model of ours has, and a pairwise trainer has not."""
    config = source.config
    if config.loss == "kwise" and source.per_prompt > 1:
        command.notes.append(
            f"All pairs of a prompt as one batch element (--loss kwise) has no counterpart: the "
            f"{amounts.batch} pairs of a batch are of as many prompts, and an answer is read once "
            "for each of its pairs."
        )
    if config.pooling != "last":
        command.notes.append(f"The reward is read at the last token, not as --pooling "
                             f"{config.pooling}.")  # fmt: skip
    if config.normalize != "none":
        command.notes.append(
            f"--normalize {config.normalize} has no counterpart: scores keep an arbitrary mean."
        )


def _ppo(source: Source) -> Command:
    config = source.config
    if config.reward:
        raise ConfigError(
            "--to trl: its PPO trainer takes a reward model, no function and no server. Export "
            "to openrlhf or verl, or give a --reward-model."
        )
    if config.advantages != "gae":
        raise ConfigError(
            f"--to trl: its PPO has no --advantages {config.advantages}; TRL has trainers of their "
            "own for RLOO and GRPO. Export to openrlhf or verl, or take gae."
        )
    sizes = Rollouts.of(source)
    values = {"model_name_or_path": source.start, "sft_model_path": source.start,
              "reward_model_path": source.reward_model} | _shared(source) | {
        "total_episodes": config.iterations * config.batch,
        "per_device_train_batch_size": sizes.micro,
        "gradient_accumulation_steps": sizes.minibatch // sizes.micro,
        "num_mini_batches": sizes.an_epoch, "num_ppo_epochs": config.epochs,
        "local_rollout_forward_batch_size": sizes.micro, "num_sample_generations": 0,
        "response_length": config.max_new_tokens, "stop_token": "eos",
        "temperature": config.temperature, "learning_rate": config.lr,
        "warmup_steps": config.warmup, "lr_scheduler_type": "linear",
        "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-6,
        "kl_coef": config.kl_coef, "kl_estimator": "k1", "cliprange": config.clip,
        "cliprange_value": config.value_clip or 1e6, "vf_coef": 0.1,
        "gamma": config.gamma, "lam": config.lam, "missing_eos_penalty": config.eos_penalty or None,
    }  # fmt: skip
    del values["save_steps"], values["save_total_limit"]
    values["save_strategy"] = "no"  # its checkpoints fail with transformers 5.19
    program = ["python", "ppo.py"]
    command = Command(program, flags(**values), [*source.notes, *_ppo_notes(source)])
    command.files["ppo.py"] = SCRIPT
    return command


def _ppo_notes(source: Source) -> list[str]:
    config = source.config
    said = {
        f"PPO-ptx (--ptx-coef {config.ptx_coef}) has no counterpart: the pretraining gradient is "
        "left out.": config.ptx_coef,
        f"The adaptive KL (--kl-controller {config.kl_controller}, --kl-target {config.kl_target} "
        "nats a sequence) has no counterpart: the price stays what it is at the start.":
            controlled(source),
        f"One learning rate for policy and critic: --critic-lr {config.critic_lr} is lost.":
            config.critic_lr != config.lr,
        f"--critic-warmup {config.critic_warmup}: the critic is not trained ahead of the policy.":
            config.critic_warmup,
        f"--eos-override {config.eos_override}: an answer without an EOS keeps its score, less "
        "missing_eos_penalty.": config.eos_override is not None,
        f"--lr-floor {config.lr_floor}: the linear schedule ends at 0.": config.lr_floor,
        "Advantages are whitened always; --no-whiten is lost.": not config.whiten,
        f"--mdp sequence is token-level there, with --gamma {config.gamma}.":
            config.mdp == "sequence",
        f"--reward-norm {config.reward_norm}, --value-norm {config.value_norm}: no counterpart.":
            config.reward_norm != "none" or config.value_norm != "none",
        f"--reward-clip {config.reward_clip}: no counterpart.": config.reward_clip,
        f"--dual-clip {config.dual_clip}: no counterpart.": config.dual_clip,
        f"--entropy-coef {config.entropy_coef}: no counterpart.": config.entropy_coef,
    }  # fmt: skip
    return [note for note, wanted in said.items() if wanted]


def command(source: Source) -> Command:
    """The same stage in TRL. Raises ConfigError where there is none."""
    return _ppo(source) if source.stage == "ppo" else _supervised(source)
