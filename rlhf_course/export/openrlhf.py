"""OpenRLHF 0.11: `openrlhf.cli.train_sft | train_rm | train_dpo | train_ppo_ray`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rlhf_course.errors import ConfigError
from rlhf_course.export.amounts import Amounts, Rollouts, controlled, target_a_token
from rlhf_course.export.rewards import OPENRLHF, reward_script
from rlhf_course.export.shell import Command, answer, flags, messages, write_json_lines
from rlhf_course.export.source import Source
from rlhf_course.export.trl import reward_model_notes

VERSION = "0.11.2"
PROGRAMS = {"sft": "train_sft", "reward_model": "train_rm", "dpo": "train_dpo"}
ESTIMATORS = {"gae": "gae", "rloo": "rloo", "grpo": "group_norm",
              "reinforce_plus_plus": "reinforce"}  # fmt: skip


def row_of(row: Any) -> dict:
    """A row whose fields hold messages, for --data.apply_chat_template."""
    if hasattr(row, "response"):
        return {"input": messages(row.prompt), "output": answer(row.response)}
    if hasattr(row, "chosen"):
        return {"prompt": messages(row.prompt), "chosen": answer(row.chosen),
                "rejected": answer(row.rejected)}  # fmt: skip
    label = json.dumps({"prompt": row.prompt, "row": row.row}, ensure_ascii=False, default=str)
    return {"input": messages(row.prompt), "label": label}


def write_rows(source: Source, folder: Path) -> None:
    """data/train.jsonl and, where rows are held out, data/test.jsonl."""
    (folder / "data").mkdir()
    for name, rows in (("train", source.train), ("test", source.held)):
        if rows:
            write_json_lines(folder / "data" / f"{name}.jsonl", map(row_of, rows))


def _schedule(config, steps: int, warmup: int, notes: list[str]) -> dict[str, Any]:
    names = {"constant": "constant_with_warmup", "linear": "linear", "cosine": "cosine_with_min_lr"}
    name = names[getattr(config, "schedule", "linear")]
    if name == "linear" and config.lr_floor:
        notes.append(f"--lr-floor {config.lr_floor}: the linear schedule ends at 0.")
    more = {"min_lr_ratio": config.lr_floor} if name == "cosine_with_min_lr" else {}
    return {
        "lr_scheduler": name,
        "lr_warmup_ratio": round(min(warmup / max(steps, 1), 1.0), 6),
        **more,
    }


def _machine(config) -> dict[str, Any]:
    """Precision, LoRA, logging: what every program takes."""
    values = {"ds__zero_stage": getattr(config, "zero_stage", 2), "ds__param_dtype": "bf16"}
    if rank := getattr(config, "lora", None):
        values |= {"ds__lora__rank": rank}
        values |= {"ds__lora__alpha": int(getattr(config, "lora_alpha", None) or 2 * rank)}
        if targets := getattr(config, "lora_targets", None):
            values["ds__lora__target_modules"] = tuple(targets)
    values["ds__load_in_4bit"] = getattr(config, "quantize", None) == "4bit"
    if config.track in ("tensorboard", "both"):
        values["logger__tensorboard_dir"] = "./out/tensorboard"
    return values


def _supervised(source: Source) -> Command:
    config, amounts = source.config, Amounts.of(source)
    notes = [*source.notes, "Weights are bf16 with fp32 copies in the optimizer (ours: fp32)."]
    need, have = amounts.steps * amounts.batch, len(source.train)
    epochs = amounts.epochs(have)
    if need != epochs * have:
        notes.append(
            f"Epochs are whole there: {epochs} over {min(need, have)} rows, where our "
            f"{amounts.steps} updates of {amounts.batch} are {need / have:.3g} over {have}."
        )
    values: dict[str, Any] = {
        "model__model_name_or_path": source.start, "data__dataset": "./data/train.jsonl",
        "data__apply_chat_template": True, "data__tokenizer_chat_template": source.template,
        "data__max_len": source.longest, "data__max_samples": min(need, have),
        "train__batch_size": amounts.batch, "train__micro_batch_size": amounts.micro,
        "train__max_epochs": epochs, "train__seed": config.seed, "adam__lr": config.lr,
        "adam__betas": (0.9, 0.98), "adam__weight_decay": config.weight_decay,
        **_schedule(config, amounts.steps, amounts.warmup, notes),
        "max_norm": config.max_grad_norm, "ckpt__output_dir": "./out/model",
        "ckpt__path": "./out/checkpoints", "ckpt__save_steps": config.checkpoint_every,
        "model__gradient_checkpointing_enable": bool(
            getattr(config, "gradient_checkpointing", False)),
    } | _machine(config)  # fmt: skip
    if source.held:
        values |= {"eval__dataset": "./data/test.jsonl", "eval__split": "train",
                   "eval__steps": getattr(config, "eval_every", 100)}  # fmt: skip
    module = f"openrlhf.cli.{PROGRAMS[source.stage]}"
    command = Command(["deepspeed", "--module", module], notes=notes)
    if source.stage == "sft":
        values |= {"data__input_key": "input", "data__output_key": "output"}
        if config.packing:
            notes.append("--packing: add ds.packing_samples where flash-attention is installed.")
    else:
        values |= {"data__prompt_key": "prompt", "data__chosen_key": "chosen",
                   "data__rejected_key": "rejected"}  # fmt: skip
    if source.stage == "reward_model":
        values |= {"ds__value_head_prefix": "score", "model__loss_type": "sigmoid"}
        reward_model_notes(source, amounts, command)
    if source.stage == "dpo":
        values |= {"ref__model_name_or_path": source.start, "model__beta": config.beta}
    command.options = flags(**values)
    return command


def _ppo(source: Source) -> Command:
    config, notes, count = source.config, list(source.notes), Rollouts.of(source)
    if source.template:
        raise ConfigError(
            f"--to openrlhf: the tokenizer of {source.start} has no chat template, and its PPO "
            "takes none by a flag. Start from an SFT model, whose tokenizer has one."
        )
    gae = config.advantages == "gae"
    values: dict[str, Any] = {
        "actor__model_name_or_path": source.start,
        "reward__model_name_or_path": source.reward_model,
        "reward__remote_url": "./reward.py" if config.reward else None,
        "critic__model_name_or_path": (source.reward_model or source.start) if gae else None,
        "ds__value_head_prefix": "score",
        **_sizes(source, count), **_algorithm(source),
        **_optimizers(source, count.updates, notes),
        "actor__num_gpus_per_node": 1, "critic__num_gpus_per_node": 1 if gae else None,
        "ref__num_gpus_per_node": 1, "reward__num_gpus_per_node": 1,
        "vllm__num_engines": 1, "vllm__gpu_memory_utilization": 0.4,
        "train__colocate_all": True, "vllm__enable_sleep": True, "ds__enable_sleep": True,
        "actor__gradient_checkpointing_enable": bool(
            getattr(config, "gradient_checkpointing", False)),
        "ckpt__output_dir": "./out/model", "ckpt__path": "./out/checkpoints",
        "ckpt__save_steps": config.checkpoint_every, **_machine(config),
    }  # fmt: skip
    command = Command(["python", "-m", "openrlhf.cli.train_ppo_ray"], flags(**values))
    command.notes = [*notes, *_ppo_notes(source)]
    if config.reward:
        command.files["reward.py"] = reward_script(config, OPENRLHF, (source.tokenizer.eos_token,))
    return command


def _sizes(source: Source, count: Rollouts) -> dict[str, Any]:
    """The data, and how much of what at once."""
    config = source.config
    return {
        "rollout__batch_size": count.prompts, "rollout__n_samples_per_prompt": count.answers,
        "rollout__micro_batch_size": count.micro, "rollout__max_new_tokens": config.max_new_tokens,
        "rollout__temperature": config.temperature, "train__batch_size": count.minibatch,
        "train__micro_batch_size": count.micro, "train__max_epochs": config.epochs,
        "train__num_episodes": count.passes(source, config.iterations + config.critic_warmup),
        "train__seed": config.seed, "data__prompt_dataset": "./data/train.jsonl",
        "data__input_key": "input", "data__label_key": "label", "data__apply_chat_template": True,
        "data__max_len": source.longest_prompt + config.max_new_tokens,
    }  # fmt: skip


def _algorithm(source: Source) -> dict[str, Any]:
    """Advantages, KL, clipping, and what an answer that never ended is worth."""
    config = source.config
    gae, wide = config.advantages == "gae", config.reward_clip or 1e6
    values: dict[str, Any] = {
        "algo__advantage__estimator": ESTIMATORS[config.advantages],
        "algo__advantage__gamma": config.gamma, "algo__advantage__lambd": config.lam,
        "algo__advantage__no_std_norm": gae and not config.whiten,
        "algo__kl__init_coef": config.kl_coef,
        "algo__kl__estimator": "k3" if config.advantages == "grpo" else "k1",
        "algo__kl__use_loss": config.advantages == "grpo",
        "actor__eps_clip": config.clip, "actor__dual_clip": config.dual_clip,
        "actor__loss_agg_mode": "token-mean", "actor__entropy_coef": config.entropy_coef or None,
        "critic__value_clip": (config.value_clip or 1e6) if gae else None,
        "critic__freezing_steps": config.critic_warmup or None,
        "reward__clip_range": (-wide, wide),
        "reward__normalize_enable": config.reward_norm != "none",
    }  # fmt: skip
    if controlled(source):
        values |= {"algo__kl__target": round(target_a_token(source), 6),
                   "algo__kl__horizon": int(config.kl_horizon)}  # fmt: skip
    if config.eos_override is not None and config.eos_override < 0:
        values["reward__stop_properly_penalty_coef"] = config.eos_override
    return values


def _optimizers(source: Source, updates: int, notes: list[str]) -> dict[str, Any]:
    """The actor's and the critic's, whose flags differ in their first word."""
    config = source.config
    warmup = config.warmup * updates // max(config.iterations, 1)
    values: dict[str, Any] = {}
    for role, lr in (("actor", config.lr), ("critic", config.critic_lr)):
        if lr is None:
            continue
        schedule = _schedule(config, updates, warmup, notes if role == "actor" else [])
        values |= {f"{role}__adam__lr": lr, f"{role}__adam__betas": (0.9, 0.95),
                   f"{role}__adam__eps": 1e-6,
                   f"{role}__max_norm": config.max_grad_norm}  # fmt: skip
        values |= {f"{role}__{name}": value for name, value in schedule.items()}
    return values


def _ppo_notes(source: Source) -> list[str]:
    config = source.config
    said = {
        f"PPO-ptx (--ptx-coef {config.ptx_coef}) has no counterpart since OpenRLHF took it out: "
        "the pretraining gradient is left out.": config.ptx_coef,
        f"--kl-target {config.kl_target} nats a sequence is algo.kl.target nats a token, by the "
        "answers' mean length; the controller is Ziegler's, without our proportional term "
        "(--kl-gain) and floor (--kl-floor).": controlled(source),
        f"--eos-penalty {config.eos_penalty}: nothing is subtracted for a missing EOS; "
        "reward.stop_properly_penalty_coef replaces or scales the score.":
            config.eos_penalty and config.eos_override is None,
        "The critic's learning rate follows the actor's schedule, and its warm-up has the same "
        "rate (--critic-warmup-lr is lost).": config.critic_warmup,
        "--no-whiten: the mean is subtracted all the same.": not config.whiten,
        "--mdp sequence is token-level there.": config.mdp == "sequence",
        f"--value-norm {config.value_norm}: no counterpart.": config.value_norm != "none",
        "REINFORCE++ is their estimator `reinforce`, with advantages normalised over the rollout.":
            config.advantages == "reinforce_plus_plus",
    }  # fmt: skip
    return [note for note, wanted in said.items() if wanted]


def command(source: Source) -> Command:
    """The same stage in OpenRLHF. Raises ConfigError where there is none."""
    return _ppo(source) if source.stage == "ppo" else _supervised(source)
