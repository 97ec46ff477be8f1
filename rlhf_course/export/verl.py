"""verl 0.9: `verl.trainer.sft_trainer` and `verl.trainer.main_ppo`, set by Hydra overrides.

verl trains no reward model and has no DPO trainer; what OpenRLHF or TRL trained is read here.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from rlhf_course.errors import ConfigError
from rlhf_course.export.amounts import Amounts, Rollouts, controlled, target_a_token
from rlhf_course.export.rewards import VERL, reward_script
from rlhf_course.export.shell import Command, answer, messages, write_parquet
from rlhf_course.export.source import Source
from rlhf_course.stages.cards import data_name

VERSION = "0.9.1"
ESTIMATORS = {"gae": "gae", "rloo": "rloo", "grpo": "grpo",
              "reinforce_plus_plus": "reinforce_plus_plus"}  # fmt: skip


PLAIN = re.compile(r"[A-Za-z_./][\w./-]*")  # texts that Hydra takes as they are
WORDS = ("true", "false", "null", "nan", "inf")


def rows_of(source: Source, rows: list, split: str) -> list[dict]:
    """SFT: `messages`. PPO: the prompt as messages, and what a reward function may want."""
    if source.stage == "sft":
        return [{"messages": messages(row.prompt) + answer(row.response)} for row in rows]
    name = data_name(source.config)
    return [
        {
            "data_source": name, "prompt": messages(row.prompt), "ability": "rlhf",
            "reward_model": {"style": "rule", "ground_truth": json.dumps(
                {"prompt": row.prompt, "row": row.row}, ensure_ascii=False, default=str)},
            "extra_info": {"split": split, "index": index},
        }
        for index, row in enumerate(rows)
    ]  # fmt: skip


def write_rows(source: Source, folder: Path) -> None:
    """data/train.parquet and data/test.parquet; verl's PPO wants the second always."""
    (folder / "data").mkdir()
    held = source.held or (source.train[:64] if source.stage == "ppo" else [])
    for name, rows in (("train", source.train), ("test", held)):
        if rows:
            write_parquet(folder / "data" / f"{name}.parquet", rows_of(source, rows, name))


def value_of(value: Any) -> str:
    """A value in Hydra's grammar: texts in quotes where they need them, lists in brackets."""
    if isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and PLAIN.fullmatch(value) and value.lower() not in WORDS:
        return value
    if isinstance(value, list | tuple):
        return f"[{','.join(map(value_of, value))}]"
    if isinstance(value, str):
        return "'" + value.replace("\\", "\\\\").replace("'", "\\'") + "'"
    return "null" if value is None else str(value)


def overrides(**values: Any) -> list[list[str]]:
    """`a.b=value` for every value that is not None; two underscores stand for a dot."""
    return [[f"{name.replace('__', '.')}={value_of(value)}"]
            for name, value in values.items() if value is not None]  # fmt: skip


def _machine(config) -> dict[str, Any]:
    loggers = {"both": ["tensorboard", "wandb"], "none": []}.get(config.track, [config.track])
    return {
        "trainer__n_gpus_per_node": 1, "trainer__nnodes": 1,
        "trainer__logger": ["console", *loggers], "trainer__project_name": "rlhf-course",
        "trainer__default_local_dir": "./out", "trainer__save_freq": config.checkpoint_every,
    }  # fmt: skip


def _lora(config, prefix: str) -> dict[str, Any]:
    rank = getattr(config, "lora", None)
    if not rank:
        return {}
    alpha = int(getattr(config, "lora_alpha", None) or 2 * rank)
    values = {f"{prefix}lora_rank": rank, f"{prefix}lora_alpha": alpha}
    targets = getattr(config, "lora_targets", None)
    return values | ({f"{prefix}target_modules": list(targets)} if targets else {})


def _schedule(config, notes: list[str]) -> dict[str, Any]:
    kind = getattr(config, "schedule", "linear")
    if kind == "linear":
        notes.append("A linear schedule has no counterpart: it is a cosine down to the same floor.")
    floor = {} if kind == "constant" else {"min_lr_ratio": config.lr_floor}
    return {"lr_scheduler_type": "constant" if kind == "constant" else "cosine", **floor}


def _sft(source: Source) -> Command:
    config, amounts = source.config, Amounts.of(source)
    notes = [
        *source.notes,
        "Each turn is written by the chat template for itself; a template that writes a turn "
        "otherwise among others is refused (data.ignore_input_ids_mismatch).",
    ]
    optimizer = {
        "optim__lr": config.lr, "optim__betas": [0.9, 0.98],
        "optim__weight_decay": config.weight_decay, "optim__lr_warmup_steps": amounts.warmup,
        "optim__clip_grad": config.max_grad_norm,
        **{f"optim__{k}": v for k, v in _schedule(config, notes).items()},
    }  # fmt: skip
    values = {
        "data__train_files": "./data/train.parquet",
        "data__val_files": "./data/test.parquet" if source.held else None,
        "data__messages_key": "messages", "data__train_batch_size": amounts.batch,
        "data__micro_batch_size_per_gpu": amounts.micro, "data__max_length": source.longest,
        "data__max_token_len_per_gpu": max(8192, source.longest),
        "model__path": source.start, "model__custom_chat_template": source.template,
        "model__enable_gradient_checkpointing": bool(
            getattr(config, "gradient_checkpointing", False)),
        **_lora(config, "model__"), **optimizer,
        "trainer__total_training_steps": amounts.steps,
        "trainer__total_epochs": amounts.epochs(len(source.train)), "trainer__seed": config.seed,
        "trainer__experiment_name": "sft", "trainer__test_freq": config.eval_every,
        "checkpoint__save_contents": ["model", "optimizer", "extra", "hf_model"],
        **_machine(config),
    }  # fmt: skip
    program = ["torchrun", "--standalone", "--nnodes=1", "--nproc_per_node=1",
               "-m", "verl.trainer.sft_trainer"]  # fmt: skip
    return Command(program, overrides(**values), notes)


def _ppo(source: Source) -> Command:
    config, notes = source.config, list(source.notes)
    count, rollouts = Rollouts.of(source), config.iterations + config.critic_warmup
    micro = count.micro
    actor, model = "actor_rollout_ref__actor__", "actor_rollout_ref__model__"
    rollout = "actor_rollout_ref__rollout__"
    data = {
        "data__train_files": "./data/train.parquet", "data__val_files": "./data/test.parquet",
        "data__prompt_key": "prompt", "data__train_batch_size": count.prompts,
        "data__max_prompt_length": source.longest_prompt,
        "data__max_response_length": config.max_new_tokens, "data__seed": config.seed,
    }  # fmt: skip
    policy = {
        model + "path": source.start, model + "custom_chat_template": source.template,
        model + "enable_gradient_checkpointing": bool(
            getattr(config, "gradient_checkpointing", False)),
        **_lora(config, model),
        actor + "ppo_mini_batch_size": max(count.minibatch // count.answers, 1),  # in prompts
        actor + "ppo_micro_batch_size_per_gpu": micro, actor + "ppo_epochs": config.epochs,
        actor + "shuffle": True, actor + "clip_ratio": config.clip,
        actor + "clip_ratio_low": config.clip, actor + "clip_ratio_high": config.clip,
        actor + "clip_ratio_c": config.dual_clip or 1e6, actor + "loss_agg_mode": "token-mean",
        actor + "entropy_coeff": config.entropy_coef, actor + "grad_clip": config.max_grad_norm,
        actor + "optim__lr": config.lr, actor + "optim__betas": [0.9, 0.95],
        actor + "optim__weight_decay": 0.0,
        actor + "optim__lr_warmup_steps": config.warmup * count.updates // config.iterations,
        **{f"{actor}optim__{k}": v for k, v in _schedule(config, notes).items()},
        rollout + "name": "vllm", rollout + "n": count.answers,
        rollout + "temperature": config.temperature, rollout + "tensor_model_parallel_size": 1,
        rollout + "gpu_memory_utilization": 0.4,
        rollout + "log_prob_micro_batch_size_per_gpu": micro,
        "actor_rollout_ref__ref__log_prob_micro_batch_size_per_gpu": micro,
    }  # fmt: skip
    trainer = {
        "trainer__total_training_steps": rollouts,
        "trainer__total_epochs": count.passes(source, rollouts),
        "trainer__critic_warmup": config.critic_warmup, "trainer__experiment_name": "ppo",
        "trainer__val_before_train": False, **_machine(config),
    }  # fmt: skip
    values = data | policy | _algorithm(source) | _critic(source, micro) | _reward(source) | trainer
    command = Command(["python", "-m", "verl.trainer.main_ppo"], overrides(**values))
    command.notes = [*notes, *_ppo_notes(source)]
    if config.reward:
        command.files["reward.py"] = reward_script(config, VERL)
    return command


def _algorithm(source: Source) -> dict[str, Any]:
    """Advantages and KL: in the reward, or for GRPO in the loss."""
    config = source.config
    values = {"algorithm__adv_estimator": ESTIMATORS[config.advantages],
              "algorithm__gamma": config.gamma, "algorithm__lam": config.lam}  # fmt: skip
    if config.advantages == "grpo":
        return values | {
            "actor_rollout_ref__actor__use_kl_loss": config.kl_coef > 0,
            "actor_rollout_ref__actor__kl_loss_coef": config.kl_coef,
            "actor_rollout_ref__actor__kl_loss_type": "low_var_kl",
        }
    values |= {"algorithm__use_kl_in_reward": config.kl_coef > 0, "algorithm__kl_penalty": "kl",
               "algorithm__kl_ctrl__kl_coef": config.kl_coef}  # fmt: skip
    if controlled(source):
        values |= {"algorithm__kl_ctrl__type": "adaptive",
                   "algorithm__kl_ctrl__target_kl": round(target_a_token(source), 6),
                   "algorithm__kl_ctrl__horizon": int(config.kl_horizon)}  # fmt: skip
    return values


def _critic(source: Source, micro: int) -> dict[str, Any]:
    config = source.config
    if config.advantages != "gae":
        return {"critic__enable": False}
    return {
        "critic__model__path": source.reward_model or source.start,
        "critic__optim__lr": config.critic_lr, "critic__optim__betas": [0.9, 0.95],
        "critic__optim__weight_decay": 0.0, "critic__cliprange_value": config.value_clip or 1e6,
        "critic__ppo_micro_batch_size_per_gpu": micro, "critic__grad_clip": config.max_grad_norm,
    }  # fmt: skip


def _reward(source: Source) -> dict[str, Any]:
    if source.config.reward:
        return {"reward__custom_reward_function__path": "./reward.py",
                "reward__custom_reward_function__name": "compute_score"}  # fmt: skip
    prefix = "reward__reward_model__"
    return {
        prefix + "enable": True, prefix + "model_path": source.reward_model,
        prefix + "rollout__name": "vllm", prefix + "rollout__tensor_model_parallel_size": 1,
        prefix + "rollout__gpu_memory_utilization": 0.2,
    }  # fmt: skip


def _ppo_notes(source: Source) -> list[str]:
    config = source.config
    said = {
        f"PPO-ptx (--ptx-coef {config.ptx_coef}) has no counterpart: the pretraining gradient is "
        "left out.": config.ptx_coef,
        f"--kl-target {config.kl_target} nats a sequence is kl_ctrl.target_kl nats a token, by the "
        "answers' mean length; the controller is Ziegler's, without our proportional term "
        "(--kl-gain) and floor (--kl-floor).": controlled(source) and config.advantages != "grpo",
        "An answer without an EOS keeps its score: --eos-penalty and --eos-override are lost.":
            config.eos_penalty or config.eos_override is not None,
        "The advantages of GAE are whitened always; --no-whiten is lost.": not config.whiten,
        "--mdp sequence is token-level there.": config.mdp == "sequence",
        "The critic's warm-up has its usual learning rate (--critic-warmup-lr is lost).":
            config.critic_warmup,
        f"--reward-norm {config.reward_norm}, --value-norm {config.value_norm}: no counterpart.":
            config.reward_norm != "none" or config.value_norm != "none",
        f"--reward-clip {config.reward_clip}: no counterpart.": config.reward_clip,
    }  # fmt: skip
    return [note for note, wanted in said.items() if wanted]


def command(source: Source) -> Command:
    """The same stage in verl. Raises ConfigError where there is none."""
    if source.stage == "sft":
        return _sft(source)
    if source.stage == "ppo":
        return _ppo(source)
    what = "reward model" if source.stage == "reward_model" else "model by DPO"
    raise ConfigError(
        f"--to verl: verl {VERSION} trains no {what}. Export to openrlhf or trl; verl reads what "
        "they trained."
    )
