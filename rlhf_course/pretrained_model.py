"""transformers' models opened from a directory: every tensor there and finite, or a clear error."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn

from rlhf_course import adapters, checkpoints
from rlhf_course.errors import CheckpointError, ModelError
from rlhf_course.quantized import keep_differentiable, quantization


@dataclass(frozen=True)
class WeightFormat:
    """How a model's weights are held in memory."""

    ours: bool = True
    """A GPT-2 becomes our own GPT; else it is wrapped as any other model is."""
    dtype: torch.dtype = torch.float32
    """Of weights that are frozen anyway, bfloat16 takes half the memory."""
    bits: int | None = None
    """8 or 4: the linear layers' weights are rounded to so many by bitsandbytes, and frozen."""
    device: str = "cpu"
    """Where they are rounded."""

    def refuse_adapter(self, name: str) -> None:
        """Raise ModelError where the weights of an adapter's directory are to be rounded."""
        if self.bits is not None:
            raise ModelError(
                f"{name}: an adapter's directory, which cannot be rounded to {self.bits} bits as "
                "it is read. Give a whole model: model/ of a run, or what peft's merge_and_unload "
                "and save_pretrained make of it; or leave --quantize out."
            )


PLAIN = WeightFormat()


def open_causal_lm(directory: Path, name: str, how: WeightFormat) -> nn.Module:
    """The `…ForCausalLM` of a directory, every tensor there and finite, without dropout."""
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoints.weight_files(directory)  # complains about what transformers calls by no name
    try:
        settings = without_dropout(AutoConfig.from_pretrained(directory))
        with quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                directory, config=settings, use_safetensors=True, output_loading_info=True,
                dtype=how.dtype, ignore_mismatched_sizes=True,  # so that we can name them
                **quantization(how.bits, how.dtype, how.device),
            )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name}: transformers cannot load it ({reason}). "
            "Save the model again with safetensors, in this transformers version."
        ) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(info["missing_keys"]) + sorted(m[0] for m in info["mismatched_keys"])
        raise CheckpointError(
            f"{name}: {len(wrong)} tensors are missing or misshapen: {', '.join(wrong[:4])}. "
            "Restore the checkpoint; random numbers would stand in their place."
        )
    keep_differentiable(model)
    checkpoints.require_finite(dict(model.named_parameters()), name)
    return model


def without_dropout(config):
    """A configuration of transformers, its dropout set to 0 in place: see `GPTConfig.dropout`."""
    for part in (config, config.get_text_config()):
        for key, value in list(vars(part).items()):
            if "drop" in key and isinstance(value, float):
                setattr(part, key, 0.0)
    return config


def opens_over(directory: Path) -> bool:
    """Whether the weights in this directory have the names that our language model of it has: it
    is no adapter itself, and no model that also sees (see `text_part`)."""
    return not adapters.is_adapter(directory) and "text_config" not in checkpoints.read_config(
        directory
    )


def text_part(model: nn.Module) -> nn.Module:
    """The language model within a model that also sees or hears, such as Gemma 3's larger ones
    (their config.json holds a text_config), as a causal LM of its own; any other as it is."""
    settings = model.config.get_text_config()
    if settings is model.config:
        return model
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        text = AutoModelForCausalLM.from_config(settings)
    text.set_input_embeddings(model.get_input_embeddings())
    setattr(text, text.base_model_prefix, model.get_decoder())
    text.set_output_embeddings(model.get_output_embeddings())
    text.generation_config = model.generation_config
    return text.eval()


def require_saveable(model: nn.Module) -> None:
    """Make sure that transformers will write the model's generation_config.json after hours of
    training: one that contradicts itself is replaced by its special tokens alone."""
    from transformers import GenerationConfig

    old = model.generation_config
    try:
        old.validate(strict=True)
    except ValueError:
        ids = ("bos_token_id", "eos_token_id", "pad_token_id")
        model.generation_config = GenerationConfig(**{key: getattr(old, key) for key in ids})


def shell_of(model: nn.Module) -> nn.Module:
    """A model of the same kind without memory for weights, to save others' under its names."""
    config = copy.deepcopy(model.config)
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    with torch.device("meta"):
        shell = type(model)(config)
    shell.generation_config = model.generation_config
    return shell.to(next(p.dtype for p in model.parameters() if p.is_floating_point()))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """transformers draws a bar and reports on stderr what it loads; what is wrong we say."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()
