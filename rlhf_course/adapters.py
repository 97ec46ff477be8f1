"""LoRA through `peft`: a few trained parameters beside frozen weights.

A linear layer's W x becomes W x + (alpha / r) B A x, with A (r × in) drawn at random and B
(out × r) zero at the start (Hu et al. 2021, §4.1), so that before the first update nothing has
changed. Only A and B are trained: a hundredth of the parameters, their gradients, their Adam state.

What PPO and DPO gain: with the adapter switched off the network is the untouched base, bit for bit.

    policy      the language model's backbone, adapter on     reference   the same, adapter off
    critic      the reward model's backbone, adapter on       reward      the same, adapter off

So each backbone is held once, where full fine-tuning holds two of each. The critic has a head of
its own. Where a function gives the score there is no reward model, and the critic is an adapter
over a second, frozen copy of the policy's base: one backbone carries one trained adapter here,
since gradient checkpointing reads it again in the backward pass and has to find it as it was.

This module works on transformers' modules; `huggingface` and `reward_model` use it.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf_course.errors import CheckpointError, ConfigError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"


@dataclass(frozen=True)
class LoRA:
    """The shape of an adapter."""

    rank: int
    """r: A and B are matrices of this rank."""
    alpha: float | None = None
    """B A x is multiplied by alpha / r. None: 2 r."""
    targets: tuple[str, ...] = ()
    """Last names of the layers that get one, such as q_proj. (): every linear layer of a block."""


def require_peft() -> None:
    """Raise ConfigError, with the command that installs it, where peft is missing."""
    if importlib.util.find_spec("peft") is None:
        raise ConfigError(
            "LoRA needs the package peft, which is not installed. "
            'Install it: python -m pip install "rlhf-course[models]" (or: pip install peft).'
        )


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Name -> layer: what an adapter can be put on, the linear layers of the model's blocks. The
    output matrix is not among them: it is often the token embedding once more."""
    from transformers.pytorch_utils import Conv1D

    found = {}
    for name, module in model.base_model.named_modules():
        if isinstance(module, (nn.Linear, Conv1D)):  # bitsandbytes' are nn.Linear too
            found[name] = module
    return found


def attach(model: nn.Module, lora: LoRA, seed: int = 0) -> None:
    """Freeze a transformers model and put an adapter on it, in place; a function of the seed.

    The adapter's parameters are fp32 whatever the base is in. Raises ConfigError for a target that
    the model does not have, naming those that it has.
    """
    require_peft()
    from peft import LoraConfig, inject_adapter_in_model
    from transformers.pytorch_utils import Conv1D

    layers = linear_layers(model)
    names = sorted({name.rpartition(".")[2] for name in layers})
    if unknown := sorted(set(lora.targets) - set(names)):
        raise ConfigError(
            f"--lora-targets {' '.join(unknown)}: no linear layer of this model's blocks is called "
            f"so. It has {', '.join(names)}."
        )
    transposed = any(isinstance(layer, Conv1D) for layer in layers.values())  # GPT-2's
    config = LoraConfig(
        r=lora.rank, lora_alpha=2 * lora.rank if lora.alpha is None else lora.alpha,
        target_modules=list(lora.targets or names), lora_dropout=0.0, bias="none",
        fan_in_fan_out=transposed,
    )  # fmt: skip
    model.requires_grad_(False)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        inject_adapter_in_model(config, model)
    for name, parameter in model.named_parameters():
        if is_adapters(name):
            parameter.data = parameter.data.float()


def is_adapters(name: str) -> bool:
    """Whether a tensor of this name belongs to an adapter."""
    return ".lora_" in name


def has_adapter(model: nn.Module) -> bool:
    """Whether `attach` was here."""
    return getattr(model, "peft_config", None) is not None


@contextlib.contextmanager
def switched_off(model: nn.Module) -> Iterator[None]:
    """The model as it was before `attach`, exactly; afterwards the adapter is on again."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    for layer in layers:
        layer.enable_adapters(False)
    try:
        yield
    finally:
        for layer in layers:
            layer.enable_adapters(True)


# ------------------------------------------------------------------------------- as plain weights


def plain_tensors(model: nn.Module) -> dict[str, Tensor]:
    """The `state_dict` of the model without adapter and quantisation: the adapter is added to the
    weights, in fp32, and the sum rounded to the base's dtype.

    What was quantised is taken as it was used in training, that is rounded to its 4 or 8 bits:
    those are the weights to which the adapter was fitted.
    """
    quantized = {name: m for name, m in model.named_modules() if is_quantized(m)}
    if not has_adapter(model) and not quantized:
        return model.state_dict()
    out, dtype = {}, next(p.dtype for p in model.parameters() if p.is_floating_point())
    for key, tensor in model.state_dict().items():
        last = key.rpartition(".")[2]
        of_quantized = any(key.startswith(f"{name}.") for name in quantized) and last != "bias"
        if not is_adapters(key) and not of_quantized:
            out[plain_name(key)] = tensor
    for name, module in quantized.items():
        out[f"{plain_name(name)}.weight"] = _dequantized(module).to(dtype)
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and hasattr(module, "get_delta_weight"):
            key = f"{name}.weight"
            merged = out[key].float() + module.get_delta_weight("default").float()
            out[key] = merged.to(out[key].dtype)
    for name, module in quantized.items():
        if module.source_cls.__name__ == "Conv1D":  # GPT-2 keeps its weights transposed
            out[f"{plain_name(name)}.weight"] = out[f"{plain_name(name)}.weight"].t()
    return out


def plain_name(key: str) -> str:
    """A name without peft's wrapper."""
    return key.replace(".base_layer", "")


def is_quantized(module: nn.Module) -> bool:
    """Whether this is one of bitsandbytes' linear layers."""
    return type(module).__module__.startswith("bitsandbytes.") and isinstance(module, nn.Linear)


@torch.no_grad()
def _dequantized(module: nn.Module) -> Tensor:
    from peft.utils.integrations import dequantize_bnb_weight

    # Not peft's dequantize_module_weight: on a CPU it leaves an 8-bit layer without its scales.
    return dequantize_bnb_weight(module.weight, state=getattr(module, "state", None))


# ------------------------------------------------------------------------------ peft's directories


def write_adapter(
    directory: str | os.PathLike, model: nn.Module, base: str, task: str,
    prefix: str = "", saved: Mapping[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write what `peft.PeftModel.from_pretrained(base model, directory)` opens.

    base: directory or hub name of the model that was started from. task: peft's, CAUSAL_LM or
    SEQ_CLS. prefix: where `model` stands within that task's model ("model." in a classifier).
    saved: whole tensors of further modules, such as a classifier's score.weight.
    """
    import copy

    config = copy.copy(model.peft_config["default"])
    config.base_model_name_or_path = str(base)
    config.task_type, config.inference_mode = task, True
    modules = sorted({name.rpartition(".")[0] for name in saved or {}})
    config.modules_to_save = modules or None
    tensors = {
        f"{prefix}{name.replace('.default', '')}": tensor
        for name, tensor in model.state_dict().items()
        if is_adapters(name)
    }
    tensors = {f"base_model.model.{k}": t for k, t in {**tensors, **(saved or {})}.items()}
    tensors = {name: t.detach().cpu().contiguous() for name, t in tensors.items()}
    Path(directory).mkdir(parents=True, exist_ok=True)
    save_file(tensors, Path(directory) / WEIGHTS, metadata={"format": "pt"})
    config.save_pretrained(directory)


def is_adapter(directory: Path) -> bool:
    """Whether this is a peft directory, and no whole model."""
    return (directory / CONFIG).exists() and not (directory / "config.json").exists()


def read_base_name(directory: Path, name: str) -> str:
    """The directory or hub name of the model that an adapter belongs to. Raises CheckpointError."""
    try:
        config = json.loads((directory / CONFIG).read_text(encoding="utf-8"))
        base = config["base_model_name_or_path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{name}: {CONFIG} cannot be read ({error}). Save the adapter again with peft."
        ) from None
    if not base:
        raise CheckpointError(
            f"{name}: {CONFIG} names no base model. Put its directory or hub name into "
            "base_model_name_or_path."
        )
    beside = directory / base
    return str(beside) if not Path(base).is_absolute() and beside.is_dir() else base


def merge(model: nn.Module, directory: Path, name: str) -> nn.Module:
    """A transformers model with an adapter from a peft directory added to its weights.

    Raises CheckpointError where the adapter belongs to a model of another shape, or is damaged.
    """
    require_peft()
    from peft import PeftConfig, get_peft_model, set_peft_model_state_dict

    try:
        config = PeftConfig.from_pretrained(str(directory))
        config.inference_mode = True
        tensors = load_file(directory / WEIGHTS)
        # Files in bf16 too: what is merged is added in the base's precision.
        tensors = {key: tensor.float() for key, tensor in tensors.items()}
        adapted = get_peft_model(model, config)
        told = set_peft_model_state_dict(adapted, tensors)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, RuntimeError) as error:
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise CheckpointError(
            f"{name}: the adapter does not fit its base model, "
            f"{model.config.name_or_path or type(model).__name__} ({' '.join(lines[:2])[:300]}). "
            "Take the model that it was trained on: base_model_name_or_path in "
            f"{CONFIG} names it."
        ) from error
    missing = [key for key in told.missing_keys if is_adapters(key) or "modules_to_save" in key]
    if told.unexpected_keys or missing:
        wrong = [*told.unexpected_keys, *missing]
        raise CheckpointError(
            f"{name}: {len(wrong)} tensors of the adapter have no place in its base model or are "
            f"missing: {', '.join(sorted(wrong)[:3])}. Take the model that it was trained on."
        )
    return adapted.merge_and_unload()
