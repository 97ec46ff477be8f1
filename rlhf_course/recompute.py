"""Gradient checkpointing: activations are computed a second time instead of being kept.

Of each block only the input is held; in the backward pass the block runs again (Chen et al. 2016).
The memory of activations falls from all that L blocks hold to L inputs and one block, for about a
third more computing. Loss and gradient stay what they are.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_course.gpt import Block
from rlhf_course.huggingface import HuggingFaceLM


def checkpoint_blocks(model: nn.Module) -> None:
    """Turn it on, in place, for every block in the model, ours or transformers'. Those of
    transformers do so in training mode alone, in which they take no cache; so a model that is
    trained is put into it."""
    for module in model.modules():
        if isinstance(module, Block):
            module.forward = partial(_recomputed, module.forward)
            module.at = partial(_recomputed, module.at)
        elif isinstance(module, HuggingFaceLM):
            module.model.gradient_checkpointing_enable({"use_reentrant": False})
            if any(parameter.requires_grad for parameter in module.parameters()):
                module.train()


def _recomputed(forward: Callable[..., Tensor], *args) -> Tensor:
    """A block's output; where there is no gradient there is nothing to keep or to compute again."""
    if not torch.is_grad_enabled():
        return forward(*args)
    return checkpoint(forward, *args, use_reentrant=False)
