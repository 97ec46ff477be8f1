"""Gradient checkpointing: activations are computed a second time instead of being kept.

Of each block only the input is held; in the backward pass the block runs again (Chen et al. 2016).
The memory of activations falls from all that L blocks hold to L inputs and one block, for about a
third more computing. Loss and gradient stay what they are.
"""

from __future__ import annotations

from functools import partial

from torch import nn
from torch.utils.checkpoint import checkpoint

from rlhf_course.gpt import Block
from rlhf_course.huggingface import HuggingFaceLM


def checkpoint_blocks(model: nn.Module) -> None:
    """Turn it on, in place, for every block in the model, ours or transformers'. Those of
    transformers do so in training mode alone, in which they take no cache."""
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = partial(checkpoint, module.forward, use_reentrant=False)
        elif isinstance(module, HuggingFaceLM):
            module.model.gradient_checkpointing_enable({"use_reentrant": False})
