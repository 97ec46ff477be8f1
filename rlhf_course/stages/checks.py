"""What the settings of a stage must fulfil: asked before anything is loaded or written.

tyro sees to the types; here are the ranges, and the flags that contradict each other. A flag that
would be ignored in silence is an error too: whoever gave it believes that it did something.
"""

from __future__ import annotations

import math
from dataclasses import fields

from rlhf_course.errors import ConfigError
from rlhf_course.recipes import find
from rlhf_course.stages.flags import LORA_FLAGS, DataFlags, ModelFlags
from rlhf_course.stages.presets import SHAPES
from rlhf_course.stages.settings import (
    ComparisonsConfig,
    DPOConfig,
    EvaluateConfig,
    PPOConfig,
    PretrainConfig,
    RewardModelConfig,
    SFTConfig,
)

# Field -> (smallest value, whether that value itself is allowed, largest value).
COUNT, AT_LEAST_0, ABOVE_0 = (1, True, math.inf), (0, True, math.inf), (0, False, math.inf)
SHARE = (0, True, 1)
RANGES: dict[str, tuple[float, bool, float]] = {
    **dict.fromkeys(
        ("checkpoint_every", "steps", "batch", "iterations", "epochs", "minibatch", "micro_batch",
         "prompts", "heldout", "context", "window", "vocab_size", "ptx_rows", "eval_every",
         "eval_prompts", "max_new_tokens", "answers_per_prompt", "lora", "rows",
         "generation_batch"), COUNT),
    **dict.fromkeys(
        ("warmup", "corpus_rows", "critic_warmup", "hot_answers", "weight_decay", "kl_coef",
         "kl_floor", "kl_gain", "ptx_coef", "entropy_coef", "eos_penalty", "reward_retries"),
        AT_LEAST_0),
    **dict.fromkeys(
        ("lr", "critic_lr", "critic_warmup_lr", "max_grad_norm", "clip", "value_clip",
         "reward_clip", "reward_timeout", "kl_target", "kl_horizon", "beta", "lora_alpha"),
        ABOVE_0),
    **dict.fromkeys(("gamma", "lam", "lr_floor", "known_share"), SHARE),
    "answers": (2, True, math.inf),
    "dual_clip": (1, False, math.inf),
    "eos_override": (-math.inf, False, math.inf),
}  # fmt: skip


def flag(name: str) -> str:
    """The field's name as it is typed."""
    return "--" + name.replace("_", "-")


def check_settings(config) -> None:
    """Raise ConfigError naming the flag that is out of range, or the two that do not go together.

    config: one of the stages' dataclasses, after `presets.resolve`.
    """
    for name, (low, included, high) in RANGES.items():
        value = getattr(config, name, None)
        if value is None:
            continue
        if math.isfinite(value) and low <= value <= high and (included or value > low):
            continue
        words = f"at least {low}" if included else f"a finite number above {low}"
        if high < math.inf:
            words = f"a number from {low} to {high}"
        raise ConfigError(f"{flag(name)} {value}: give {words}.")
    temperature = getattr(config, "temperature", 1.0)
    if not 0 <= temperature < math.inf or (
        temperature == 0 and isinstance(config, PPOConfig | DPOConfig)
    ):
        raise ConfigError(f"--temperature {temperature}: give a finite number above 0.")
    if isinstance(config, ModelFlags):
        _lora(config)
    if isinstance(config, DataFlags):
        _data(config)
    for kind, check in CHECKS.items():
        if isinstance(config, kind):
            check(config)


def _lora(config: ModelFlags) -> None:
    given = [name for name in LORA_FLAGS[1:] if getattr(config, name) is not None]
    if given and config.lora is None:
        raise ConfigError(
            f"{flag(given[0])} says how an adapter over frozen weights is made, and needs --lora. "
            "Give --lora 16, for example."
        )
    new = config.model in SHAPES or (config.data and config.model is None)
    if config.lora is not None and isinstance(config, SFTConfig) and new:
        raise ConfigError(
            f"--lora {config.lora}: an adapter stands over trained weights, and --model "
            f"{config.model or config.size} makes a new model without any. Name a directory or a "
            "hub name with --model, or leave --lora out."
        )


def _data(config) -> None:
    """The flags that say how --data is read belong to --data."""
    if config.recipe not in (None, "none"):
        find(config.recipe)
    names = [field.name for field in fields(DataFlags)] + ["rejected"]
    default = {field.name: field.default for field in fields(config)}
    given = [name for name in names if name in default and getattr(config, name) != default[name]]
    if given and not config.data:
        raise ConfigError(
            f"{flag(given[0])} says how --data is read: give --data, or leave it out."
        )


def _pretrain(config: PretrainConfig) -> None:
    if config.too_long:
        raise ConfigError(
            "--too-long does nothing here: text of any length is read in rows of --window tokens. "
            "Leave it out."
        )
    if config.window > config.context:
        raise ConfigError(
            f"--window {config.window}: a row must fit the context of {config.context} tokens. "
            "Lower --window or raise --context."
        )


def _micro_batch(config: SFTConfig | RewardModelConfig | DPOConfig) -> None:
    if config.micro_batch and config.micro_batch > config.batch:
        raise ConfigError(f"--micro-batch {config.micro_batch} exceeds --batch {config.batch}.")


def _sft(config: SFTConfig) -> None:
    _micro_batch(config)
    if config.packing and config.corpus_rows:
        raise ConfigError(
            "--packing and --corpus-rows do not go together: rows of text are mixed into batches "
            "of one dialogue a row. Give --packing False or --corpus-rows 0."
        )
    if config.data and config.corpus_rows:
        raise ConfigError("--corpus-rows needs an embedded world's text, so it excludes --data.")


def _comparisons(config: ComparisonsConfig) -> None:
    if config.hot_answers > config.answers - 1:
        raise ConfigError(
            f"--hot-answers {config.hot_answers}: of --answers {config.answers} one is injected, "
            f"so at most {config.answers - 1} can be sampled."
        )


# Only with GAE: a critic, its discount and mixture, one advantage an answer from its value, and
# the choice to whiten. RLOO and GRPO are what they are without, REINFORCE++ whitens always.
NEEDS_CRITIC = ("critic_lr", "critic_warmup_lr", "value_clip", "value_norm", "mdp", "gamma", "lam",
                "whiten")  # fmt: skip


def _without_critic(config: PPOConfig) -> None:
    default = {field.name: field.default for field in fields(PPOConfig)}
    given = [name for name in NEEDS_CRITIC if getattr(config, name) != default[name]]
    given += ["critic_warmup"] if config.critic_warmup else []
    if given:
        name = "--no-whiten" if given[0] == "whiten" else flag(given[0])
        raise ConfigError(
            f"{name} belongs to --advantages gae: {config.advantages} trains no critic and has its "
            "own normalisation. Leave it out."
        )
    if config.advantages in ("rloo", "grpo") and config.answers_per_prompt < 2:
        raise ConfigError(
            f"--answers-per-prompt {config.answers_per_prompt}: with {config.advantages} the other "
            "answers to a prompt are the baseline. Give at least 2."
        )


def _ppo(config: PPOConfig) -> None:
    if config.advantages != "gae":
        _without_critic(config)
    if config.batch % config.answers_per_prompt:
        raise ConfigError(
            f"--batch {config.batch} counts answers and is no multiple of --answers-per-prompt "
            f"{config.answers_per_prompt}. Change one of them."
        )
    sequence = config.mdp == "sequence"
    contradictions = {
        "--reward and --reward-model: two sources of the score. Give one of them.":
            config.reward and config.reward_model,
        "--sequence-ratio needs --mdp sequence.": config.sequence_ratio and not sequence,
        "--dual-clip does nothing with --sequence-ratio. Leave one of them out.":
            config.dual_clip is not None and config.sequence_ratio,
        "--ptx-coef with --data needs text: give --ptx-data, or --ptx-coef 0.":
            config.data and config.ptx_coef and not config.ptx_data,
        "--ptx-data does nothing without --ptx-coef: give a weight above 0, such as 0.1.":
            config.ptx_data and not config.ptx_coef,
        "--known-share belongs to the town's own prompts: leave it out.":
            config.known_share is not None and (config.data or config.world != "town"),
        "--rollout vllm samples in its own way: leave --cuda-graphs out.":
            config.rollout == "vllm" and config.cuda_graphs,
        f"--micro-batch {config.micro_batch} exceeds --minibatch {config.minibatch}.":
            config.micro_batch and config.micro_batch > config.minibatch,
    }  # fmt: skip
    for message, wrong in contradictions.items():
        if wrong:
            raise ConfigError(message)
    controlled = config.kl_controller != "fixed" and config.kl_coef > 0
    if controlled and 0.2 * config.batch >= config.kl_horizon:
        raise ConfigError(
            f"--kl-horizon {config.kl_horizon}: too short for --batch {config.batch}; the price "
            "of KL could turn negative within one step. Give more than a fifth of the batch."
        )


def _evaluate(config: EvaluateConfig) -> None:
    if config.track != "tensorboard":
        raise ConfigError(f"--track {config.track}: `evaluate` draws no curve. Leave it out.")


CHECKS = {PretrainConfig: _pretrain, SFTConfig: _sft, ComparisonsConfig: _comparisons,
          RewardModelConfig: _micro_batch, PPOConfig: _ppo, DPOConfig: _micro_batch,
          EvaluateConfig: _evaluate}  # fmt: skip
