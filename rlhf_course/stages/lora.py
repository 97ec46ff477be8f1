"""What --lora, --quantize and --gradient-checkpointing make of the models of a stage."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

from rlhf_course import adapters, checkpoints
from rlhf_course.adapters import LoRA
from rlhf_course.device import Device
from rlhf_course.files import replacing
from rlhf_course.huggingface import HuggingFaceLM, Unadapted
from rlhf_course.pretrained_model import PLAIN, WeightFormat, opens_over
from rlhf_course.progress import console
from rlhf_course.quantized import bits_of
from rlhf_course.recompute import checkpoint_blocks
from rlhf_course.runs import Run
from rlhf_course.training import derive_seed


def lora_of(config) -> LoRA | None:
    """The adapter that the flags describe. Raises ConfigError where peft is missing."""
    if config.lora is None:
        return None
    adapters.require_peft()
    return LoRA(config.lora, config.lora_alpha, tuple(config.lora_targets or ()))


def weights_of(config, device: Device) -> WeightFormat:
    """How the stage holds its models. Under an adapter the base is frozen, and bfloat16 suffices
    where the GPU multiplies in bfloat16 anyway; trained weights are float32 always.
    Raises ConfigError where bitsandbytes is wanted and missing."""
    if config.lora is None:
        return PLAIN
    adapters.require_peft()
    low = device.device.type == "cuda" and device.compute_dtype is torch.bfloat16
    dtype = torch.bfloat16 if low else torch.float32
    bits = bits_of(config.quantize, device.device)
    return WeightFormat(ours=False, dtype=dtype, bits=bits, device=str(device.device))


def adapted(config, model: HuggingFaceLM, owner: str) -> Unadapted | None:
    """Put the adapter that the flags describe on a model; returns the model without it, a view.
    None, and nothing done, without --lora. owner: whose adapter it is, for its seed."""
    lora = lora_of(config)
    if lora is None:
        return None
    view = model.adapt(lora, derive_seed(config.seed, "adapter", owner))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    whole = sum(p.numel() for p in model.parameters())
    console.print(f"LoRA: {trained:,} of {whole:,} parameters of the {owner} are trained")
    return view


def save_activations(config, *models: nn.Module | None) -> None:
    """Gradient checkpointing for these models, where the flag is given."""
    for model in models:
        if config.gradient_checkpointing and model is not None:
            checkpoint_blocks(model)


def write_adapter_beside(run: Run, config, source, write) -> None:
    """Write the run's `adapter/`, which peft opens over the model that the stage started from.

    source: that model; write(folder, its name). Nothing is written without --lora.
    """
    if config.lora is None:
        return
    where, start = Path(source), checkpoints.resolve(source)
    if not opens_over(start):
        console.print(
            f"no {run.path / 'adapter'}: {source} is an adapter itself, or a model that also sees, "
            "and peft would not find its layers there. model/ holds everything.", soft_wrap=True,
        )  # fmt: skip
        return
    with replacing(run.path / "adapter") as part:
        part.mkdir()
        write(part, str(where.absolute()) if where.is_dir() else str(source))
