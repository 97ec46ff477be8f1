"""Reward models as transformers' sequence classifiers with one label: written, and read.

A classifier of transformers has a backbone, and a `score` matrix without a bias. So a reward's
constant has to go elsewhere: see `fold_constant`.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_course import adapters, checkpoints
from rlhf_course.errors import CheckpointError, ModelError
from rlhf_course.gpt import GPT
from rlhf_course.gpt2_format import unlike_ours
from rlhf_course.huggingface import HuggingFaceLM
from rlhf_course.pretrained_model import PLAIN, WeightFormat, quiet, without_dropout
from rlhf_course.quantized import keep_differentiable, quantization

Backbone = GPT | HuggingFaceLM
READING = "reward_config.json"
"""Beside an adapter: how its reward is read, for which peft's format has no place."""


def read_config(directory: Path, where: str) -> dict:
    """config.json of a sequence classifier. Raises CheckpointError for anything else."""
    config = checkpoints.read_config(directory)
    architecture = (config.get("architectures") or ["an unnamed architecture"])[0]
    if not architecture.endswith("ForSequenceClassification"):
        raise CheckpointError(
            f"{where}: holds {architecture}, not a reward model (…ForSequenceClassification). "
            "Train one with `rlhf-course reward-model`."
        )
    return config


def read_classifier(
    directory: Path, where: str, how: WeightFormat = PLAIN
) -> tuple[Backbone, Tensor, dict]:
    """(backbone, score.weight (1, D) fp32, config.json) of a directory. An adapter's (peft) is
    added to the weights of its base model.

    Raises CheckpointError (another architecture, more labels, missing tensors: named).
    """
    if adapters.is_adapter(directory):
        return _merged(directory, where, how)
    config, tensors = read_config(directory, where), checkpoints.read_tensors(directory)
    weight = tensors.pop("score.weight", None)
    if weight is None or weight.shape[0] != 1:
        found = "missing" if weight is None else f"of shape {tuple(weight.shape)}"
        raise CheckpointError(
            f"{where}: score.weight is {found}; a reward model has one row of weights. "
            "Restore the checkpoint, or take one with a single label."
        )
    return _read_backbone(directory, config, tensors, where, how), weight.float(), config


def _read_backbone(
    directory: Path, config: dict, tensors: dict[str, Tensor], where: str, how: WeightFormat
) -> Backbone:
    """A GPT-2 becomes our own GPT, anything else is wrapped."""
    if how.ours and not unlike_ours(config):
        return GPT.from_huggingface(tensors, config, where)
    from transformers import AutoConfig, AutoModel

    try:
        settings = without_dropout(AutoConfig.from_pretrained(directory))
        if how.bits is not None:
            with quiet():
                base, info = AutoModel.from_pretrained(
                    directory, config=settings, use_safetensors=True, dtype=how.dtype,
                    output_loading_info=True, **quantization(how.bits, how.dtype, how.device),
                )  # fmt: skip
            if info["missing_keys"]:
                missing = ", ".join(sorted(info["missing_keys"])[:4])
                raise CheckpointError(f"{where}: tensors are missing: {missing}. Restore it.")
            checkpoints.require_finite(tensors, where)
            keep_differentiable(base)
            return HuggingFaceLM(base)
        base = AutoModel.from_config(settings, dtype=how.dtype)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(
            f"{where}: transformers cannot build it ({str(error).strip().splitlines()[0]}). "
            "Save it again with this transformers version."
        ) from error
    prefix = f"{base.base_model_prefix}."
    checkpoints.load_into(base, {k.removeprefix(prefix): t for k, t in tensors.items()}, where)
    return HuggingFaceLM(base)


def _merged(directory: Path, where: str, how: WeightFormat) -> tuple[Backbone, Tensor, dict]:
    """The reward model behind a peft directory, its head among the adapter's tensors."""
    from transformers import AutoConfig, AutoModelForSequenceClassification

    how.refuse_adapter(where)
    name = adapters.read_base_name(directory, where)
    base = checkpoints.resolve(name)
    try:
        settings = without_dropout(AutoConfig.from_pretrained(base, num_labels=1))
        with quiet():
            model = AutoModelForSequenceClassification.from_pretrained(
                base, config=settings, use_safetensors=True, dtype=torch.float32
            )
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise CheckpointError(
            f"{where}: its base model {name} cannot be loaded as a sequence classifier "
            f"({str(error).strip().splitlines()[0]})."
        ) from error
    if model.score.weight.shape[0] != 1 or not _brings_head(directory):
        raise CheckpointError(
            f"{where}: the adapter brings no score head with one label. Train it with peft's "
            "task type SEQ_CLS on a model with num_labels=1."
        )
    model = adapters.merge(model, directory, where)
    weight, config = model.score.weight.detach().float(), model.config.to_dict()
    if (directory / READING).exists():
        config |= checkpoints.read_object(directory / READING)
    if how.ours and not unlike_ours(config):
        tensors = {k: t for k, t in model.state_dict().items() if not k.startswith("score")}
        return GPT.from_huggingface(tensors, config, where), weight, config
    return HuggingFaceLM(model.base_model.to(how.dtype)), weight, config


def _brings_head(directory: Path) -> bool:
    from safetensors import safe_open

    with safe_open(directory / adapters.WEIGHTS, "pt") as file:
        return any(key.endswith("score.weight") for key in file.keys())  # noqa: SIM118


def write_classifier(
    directory: str | os.PathLike, backbone: Backbone, weight: Tensor, token_bias: Tensor,
    more: dict, tokenizer=None,
) -> None:  # fmt: skip
    """Write a directory that `AutoModelForSequenceClassification.from_pretrained` opens.

    weight (1, D), token_bias (1,): the head. more: further entries of config.json. The constant
    that could not be folded away is written as `reward_token_bias`.
    Raises ModelError when transformers has no such classifier for the backbone.
    """
    tensors, config = _backbone_tensors(backbone)
    token_bias = fold_constant(tensors, weight, token_bias)
    config |= {"id2label": {"0": "reward"}, "label2id": {"reward": 0}, **more}
    config["reward_token_bias"] = token_bias.item()
    if tokenizer is not None:
        config |= checkpoints.write_tokenizer(directory, tokenizer)
    checkpoints.write_model(directory, config, {**tensors, "score.weight": weight})


# The final LayerNorm of GPT-2, of Pythia, and of Phi and others: it has a bias.
FINAL_BIAS = ("ln_f.bias", "final_layer_norm.bias", "final_layernorm.bias")


def fold_constant(tensors: dict[str, Tensor], weight: Tensor, token_bias: Tensor) -> Tensor:
    """Put the constant c of every token's score into `tensors`; returns what is left, (1,).

    A final LayerNorm has a bias, and adding c w / (w·w) to it, with w the head's weights (1, D),
    adds c to every score. The RMSNorm of Llama, Qwen or Gemma has none: every score of such a
    model is w·(g ∘ x / rms(x)), in which no choice of w and g adds a constant. There c is left,
    and transformers' logit lacks it. Differences of rewards, all that was learned, are equal.
    """
    name = next((n for n in tensors if n.count(".") == 2 and n.endswith(FINAL_BIAS)), None)
    if name is None or not weight.any():
        return token_bias
    shift = token_bias * weight[0] / weight.square().sum()
    tensors[name] = (tensors[name].float() + shift).to(tensors[name].dtype)
    return torch.zeros_like(token_bias)


def _backbone_tensors(backbone: Backbone) -> tuple[dict[str, Tensor], dict]:
    """The backbone's weights under the names of transformers' classifier, and its config.json."""
    if isinstance(backbone, GPT):
        tensors, config = backbone.to_huggingface()
        return tensors, config | {"architectures": ["GPT2ForSequenceClassification"]}
    from transformers.models.auto import modeling_auto

    base = backbone.backbone
    config = json.loads(base.config.to_json_string())
    config.pop("quantization_config", None)
    kind = base.config.model_type
    classifier = modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES.get(kind)
    if classifier is None:
        raise ModelError(
            f"transformers has no sequence classifier for {kind!r}, so a reward model on it cannot "
            "be saved. Start from another language model."
        )
    tensors = adapters.plain_tensors(base)
    dtype = str(next(t.dtype for t in tensors.values())).removeprefix("torch.")
    tensors = {f"{base.base_model_prefix}.{name}": t for name, t in tensors.items()}
    return tensors, config | {"architectures": [classifier], "dtype": dtype}


def write_reward_adapter(
    directory: str | os.PathLike, backbone: HuggingFaceLM, weight: Tensor, base: str, more: dict
) -> None:
    """Write the peft directory of a reward model: the adapter, and the head among the modules to
    save. `peft.PeftModel.from_pretrained` opens it over
    `AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)`; its logits are the
    rewards up to the constant, for which peft's format has no place: `more`, pooling and constants,
    stands in a file of ours beside it."""
    module: nn.Module = backbone.backbone
    adapters.write_adapter(
        directory, module, base, "SEQ_CLS", f"{module.base_model_prefix}.", {"score.weight": weight}
    )
    text = json.dumps(more, indent=2, sort_keys=True)
    (Path(directory) / READING).write_text(text + "\n", encoding="utf-8")
