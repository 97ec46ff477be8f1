"""Frozen weights in 8 or 4 bits, by bitsandbytes: a large base under a small adapter that learns.

8bit: LLM.int8() (Dettmers et al. 2022). 4bit: NF4 with double quantisation, as in QLoRA (Dettmers
et al. 2023, §3): each weight becomes one of 16 levels, which are the quantiles of a normal
distribution, and the scales of its blocks are quantised once more. Products are computed in
bfloat16 on a GPU and in float32 on a CPU. Embeddings, norms and the output matrix are not rounded.
"""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn

from rlhf_course.errors import ConfigError


def bits_of(name: str | None, device: torch.device) -> int | None:
    """What --quantize asks for. Raises ConfigError where it cannot be had, and says why."""
    if name is None:
        return None
    if importlib.util.find_spec("bitsandbytes") is None:
        raise ConfigError(
            f"--quantize {name} needs the package bitsandbytes, which is not installed. "
            "Install it: python -m pip install bitsandbytes"
        )
    if device.type not in ("cuda", "cpu"):
        raise ConfigError(
            f"--quantize {name}: bitsandbytes has no {device.type} kernels. Give --device cuda or "
            "cpu, or leave it out."
        )
    return {"8bit": 8, "4bit": 4}[name]


def quantization(bits: int | None, dtype: torch.dtype, device: str) -> dict[str, Any]:
    """The arguments of transformers' `from_pretrained` that round the weights; {} for none."""
    if bits is None:
        return {}
    from transformers import BitsAndBytesConfig

    if bits == 8:
        config = BitsAndBytesConfig(load_in_8bit=True)
    else:
        config = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        )  # fmt: skip
    return {"quantization_config": config, "device_map": {"": device}}


def keep_differentiable(model: nn.Module) -> None:
    """Forbid a layout of 4-bit weights, in place, that has no backward pass: bitsandbytes (0.50)
    takes it on CPUs with AVX-512-BF16 when a layer first runs in evaluation mode, and the gradient
    of every layer below is lost from then on without a word."""
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
