"""Our GPT as a CPU answers with it fastest: the same network behind the same methods.

What it computes is what `gpt.GPT` does. How differs in three things, for passes without gradient:

- The matrices are laid out once as oneDNN's kernels read them, and not in every product.
- A row's keys lie side by side, (S, D), and one product serves all heads: the query of a head is 0
  outside its own d columns. That is H times the multiplications, and they are not what takes the
  time: a CPU waits for the keys. Values are kept in the dtype in which their product made them.
- Prompts are read in parts of like length (`padding.like_lengths`), so that fewer pads are.

`decoding.Growing` uses it for each batch of prompts. `suits` says for which models it stands in.
"""

from __future__ import annotations

import math
import platform

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_course import gpt
from rlhf_course.padding import last_places, like_lengths

COLUMNS = {torch.float32: 1, torch.bfloat16: 32}
"""Attention reads a multiple of these, the last ones unseen: a bf16 kernel is compiled and kept for
each number of columns, which took 450 MB in eight rollouts of ragged answers."""
LINEAR = "_linear_pointwise"
PYTORCH = "linear", "normalization", "sparse", "dropout", "module"
"""Where PyTorch has the layers that our GPT is made of."""


def suits(model: nn.Module) -> bool:
    """Whether `OneDNNGPT` may stand in for this model: our GPT as the package has it, in fp32 or
    with products in bf16, on an x86 CPU; no function of a student's, no adapter, no hook."""
    if type(model) is not gpt.GPT or not _has_kernels(model.compute_dtype):
        return False
    if any(p.dtype != torch.float32 or p.device.type != "cpu" for p in model.parameters()):
        return False
    return gpt.causal_attention.__module__ == gpt.__name__ and all(map(_plain, model.modules()))


def _has_kernels(dtype: torch.dtype | None) -> bool:
    """Whether PyTorch has oneDNN's linear layers for this machine; they are not documented."""
    if platform.machine().lower() not in ("x86_64", "amd64") or dtype not in (None, torch.bfloat16):
        return False
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, LINEAR):
        return False
    return dtype is None or torch.ops.mkldnn._is_mkldnn_bf16_supported()


def _plain(module: nn.Module) -> bool:
    """Whether this is a part of our GPT, or a layer of PyTorch's, that nobody has changed."""
    ours = (gpt.__name__, *(f"torch.nn.modules.{x}" for x in PYTORCH))
    changed = {"forward", "hidden_states", "unembed"} & vars(module).keys()
    hooked = module._forward_hooks or module._forward_pre_hooks
    return type(module).forward.__module__ in ours and not changed and not hooked


class Matrix:
    """A linear layer whose weight (K, N) lies as oneDNN's kernel for `rows` rows reads it."""

    def __init__(self, weight: Tensor, bias: Tensor | None, rows: int, dtype: torch.dtype):
        self.dtype = dtype
        self.weight = torch.ops.mkldnn._reorder_linear_weight(weight.to(dtype).contiguous(), rows)
        self.bias = None if bias is None else bias.to(dtype)

    def __call__(self, x: Tensor) -> Tensor:
        """(B, N) float -> (B, K) in the layer's dtype."""
        x = x.to(self.dtype)
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "none", [], "")


class RowCache(gpt.KVCache):
    """A cache as of one head that is as wide as all: keys and values (L, B, 1, S, D) each.

    Keys are fp32, since their products with a query are asked for in full.
    """

    def __init__(self, config: gpt.GPTConfig, batch: int, length: int, dtype: torch.dtype):
        shape = (config.layers, batch, 1, length, config.width)
        self.keys, self.values = torch.zeros(shape), torch.zeros(shape, dtype=dtype)
        self.length = 0

    @property
    def columns(self) -> int:
        """How many of them the next position reads, S, itself included."""
        multiple = COLUMNS[self.values.dtype]
        return min(-(-(self.length + 1) // multiple) * multiple, self.keys.shape[-2])

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write one position of every row, (B, D), behind what is there; returns all of them up to
        now and some empty ones, (B, S, D), S = `columns`."""
        end = self.columns
        self.keys[layer, :, 0, self.length] = k
        self.values[layer, :, 0, self.length] = v
        if layer == len(self.keys) - 1:  # the last layer of this pass: move on
            self.length += 1
        return self.keys[layer, :, 0, :end], self.values[layer, :, 0, :end]


class _Part:
    """The cache as some rows see it while their prompts are read, which end before column `end`."""

    length = 0

    def __init__(self, cache: RowCache, rows: Tensor, end: int):
        self.cache, self.rows, self.end = cache, rows, end

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, H, T, d); these are all that there is."""
        columns = slice(self.end - k.shape[2], self.end)
        for kept, x in ((self.cache.keys, k), (self.cache.values, v)):
            kept[layer, self.rows, 0, columns] = x.transpose(1, 2).flatten(2).to(kept.dtype)
        return k, v


class OneDNNGPT:
    """A GPT that `suits`, with its weights as they are now, for batches of about `rows` rows."""

    def __init__(self, model: gpt.GPT, rows: int):
        self.model, self.heads, self.width = model, model.config.heads, model.config.width
        self.dtype = model.compute_dtype or torch.float32
        self.blocks = [
            tuple(
                Matrix(layer.weight, layer.bias, rows, self.dtype)
                for layer in (block.attention.qkv, block.attention.project,
                              block.mlp.expand, block.mlp.contract)
            )
            for block in model.blocks
        ]  # fmt: skip
        self.vocabulary = Matrix(model.token_embedding.weight, None, rows, torch.float32)
        self.own = torch.eye(self.heads)[:, :, None]  # (H, H, 1): head h's columns, for head h

    def new_cache(self, batch: int, length: int) -> RowCache:
        """An empty cache for `batch` rows of up to `length` positions."""
        return RowCache(self.model.config, batch, length, self.dtype)

    def unembed(self, hidden: Tensor) -> Tensor:
        """(B, D) -> logits (B, V) fp32."""
        return self.vocabulary(hidden)

    def hidden_states(
        self,
        tokens: Tensor,
        attend: Tensor | None,
        positions: Tensor | None,
        cache: RowCache,
        places: Tensor | None = None,
    ) -> Tensor:
        """`GPT.hidden_states` as `decoding.Growing` asks: of prompts, into an empty cache, their
        last tokens (`places`), or one more token of every row -> (B, D) after the final norm."""
        if places is not None:
            return self._prompts(tokens, attend, positions, cache)
        if positions is None:
            positions = torch.full_like(tokens, cache.length)
        unseen = torch.arange(cache.columns) > cache.length  # (S,)
        if attend is not None:  # (B, 1, 1, up to here) bool
            unseen = ~F.pad(attend[:, 0], (0, cache.columns - attend.shape[3]))  # (B, 1, S)
        model = self.model
        x = model.token_embedding(tokens[:, 0]) + model.position_embedding(positions[:, 0])
        for layer, block in enumerate(model.blocks):
            qkv, project, expand, contract = self.blocks[layer]
            q, k, v = qkv(block.norm_1(x)).chunk(3, dim=-1)  # (B, D) each
            seen = self._attention(q, *cache.append(layer, k, v), unseen)  # (B, D)
            x = x + project(seen)
            x = x + contract(F.gelu(expand(block.norm_2(x)), approximate="tanh"))
        return model.final_norm(x)

    def _attention(self, q: Tensor, keys: Tensor, values: Tensor, unseen: Tensor) -> Tensor:
        """q (B, D); keys, values (B, S, D); unseen (B, 1, S) bool -> (B, D)."""
        (B, D), H = q.shape, self.heads
        queries = (q.view(B, 1, H, D // H) * self.own).view(B, H, D)  # fp32
        scores = torch.bmm(keys, queries.transpose(1, 2)).transpose(1, 2) / math.sqrt(D // H)
        scores = scores.masked_fill(unseen, -math.inf)  # (B, H, S)
        seen = torch.bmm(scores.softmax(-1).to(values.dtype), values)  # (B, H, D)
        own = seen.view(B, H, H, D // H).diagonal(dim1=1, dim2=2)  # (B, d, H): its own columns
        return own.transpose(1, 2).reshape(B, D)

    def _prompts(
        self, tokens: Tensor, attend: Tensor | None, positions: Tensor | None, cache: RowCache
    ) -> Tensor:
        """Read left-padded prompts (B, P); the hidden states of their last tokens, (B, D)."""
        B, P = tokens.shape
        lengths = [P] * B if positions is None else (positions[:, -1] + 1).tolist()
        out = torch.empty(B, self.width)
        for part in like_lengths(lengths, None, tokens.device, P):
            T, rows = max(lengths[i] for i in part), torch.tensor(part)
            out[rows] = self.model.hidden_states(
                tokens[rows, P - T :],
                None if attend is None else attend[rows, :, P - T :, P - T :],
                None if positions is None else positions[rows, P - T :],
                _Part(cache, rows, P),
                last_places(len(part), T, tokens.device),
            )
        cache.length = P
        return out
