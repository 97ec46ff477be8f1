"""GPT-2 from scratch: the network, its loss, and sampling with a key-value cache.

The architecture is that of Radford et al. 2019, "Language Models are Unsupervised Multitask
Learners": learned positions, layer norm before each sub-layer, GELU, and an output head that is the
token embedding once more ("tied"). A checkpoint of ours opens in transformers as
`GPT2LMHeadModel` with the same logits, and the other way round.

Sampling (`sample_token`, `generate`) serves any model; it stands in `sampling.py`.
"""

from __future__ import annotations

import math
import os
from dataclasses import asdict, dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_course import checkpoints, gpt2_format
from rlhf_course.errors import CheckpointError, ModelError
from rlhf_course.padding import rounded_count
from rlhf_course.sampling import Generation, generate, sample_token

__all__ = ["GPT", "MLP", "Attention", "Block", "GPTConfig", "Generation", "KVCache",
           "causal_attention", "generate", "next_token_loss", "sample_token"]  # fmt: skip


@dataclass
class GPTConfig:
    """The shape of a GPT."""

    vocab_size: int
    """Number of tokens, V."""
    context: int = 128
    """Longest sequence in tokens: there is one learned vector for each position."""
    layers: int = 3
    """Number of blocks, L."""
    heads: int = 4
    """Attention heads in a block, H; the width of one head is width / heads."""
    width: int = 128
    """Width of the residual stream, D."""
    dropout: float = 0.0
    """Share of activations dropped in training. 0: with dropout on, the log-probs of the
    rollout and of the update come from different networks, and PPO's ratio is not 1."""
    layer_norm_eps: float = 1e-5
    """Added to the variance inside layer norm."""

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise ModelError(
                f"width {self.width} is not a multiple of heads {self.heads}: "
                "each head gets width / heads dimensions. Change one of the two."
            )


def causal_attention(
    q: Tensor, k: Tensor, v: Tensor, attend: Tensor | None = None, dropout: float = 0.0
) -> Tensor:
    """Scaled dot-product attention in which a position sees itself and what came before.

    softmax(q kᵀ / √d + mask) v, Vaswani et al. 2017, Eq. 1.

    q: (B, H, T, d); k, v: (B, H, S, d), floating point. The T queries are the last T of the S
    positions (S > T when a cache holds earlier keys).
    attend: bool, broadcastable to (B, H, T, S), True where a query may look; it replaces the
    causal rule, so it must contain it. None: causal.
    dropout: share of the softmax's weights to drop; the others grow to match. Returns (B, H, T, d).
    """
    # BEGIN SOLUTION
    if attend is None and 1 < q.shape[2] < k.shape[2]:
        # torch's is_causal aligns the mask to the upper left; ours belongs to the lower right.
        attend = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device)
        attend = attend.tril(k.shape[2] - q.shape[2])  # (T, S)
    causal = attend is None and q.shape[2] > 1  # a single new token may look at everything
    return F.scaled_dot_product_attention(
        q, k, v, attn_mask=attend, dropout_p=dropout, is_causal=causal
    )
    # END SOLUTION


def pick(x: Tensor, places: Tensor) -> Tensor:
    """(B, T, D) -> (N, D): the rows at these places among the B T, (N,) long. The gradient of
    index_select adds rows up 6 times as fast as that of x[mask]."""
    return x.flatten(0, 1).index_select(0, places)


class KVCache:
    """Keys and values of the positions already read: (L, B, H, S, d) each, filled from the left.

    Allocated once for the longest sequence, so that a step of generation writes one column
    instead of copying the whole past.
    """

    def __init__(self, config: GPTConfig, batch: int, length: int, device, dtype=torch.float32):
        shape = (config.layers, batch, config.heads, length, config.width // config.heads)
        self.keys = torch.zeros(shape, device=device, dtype=dtype)
        self.values = torch.zeros(shape, device=device, dtype=dtype)
        self.length = 0

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write (B, H, T, d) behind what is there; returns all keys and values up to now."""
        end = self.length + k.shape[2]
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        if layer == len(self.keys) - 1:  # the last layer of this pass: move on
            self.length = end
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def select(self, rows: Tensor) -> None:
        """Keep these rows of the batch, in this order; only those that change place are copied."""
        move, n = (rows != torch.arange(len(rows), device=rows.device)).nonzero()[:, 0], self.length
        for kept in (self.keys, self.values):
            kept[:, move, :, :n] = kept[:, rows[move], :, :n]
        self.keys, self.values = self.keys[:, : len(rows)], self.values[:, : len(rows)]


class Attention(nn.Module):
    """Multi-head causal self-attention with one projection for q, k and v."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.heads, self.dropout = config.heads, config.dropout
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.project = nn.Linear(config.width, config.width)

    def forward(
        self,
        x: Tensor,
        attend: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
        places: Tensor | None = None,
    ) -> Tensor:
        """x: (B, T, D) -> (B, T, D); with `places` (N, D), see `Block.at`."""
        B, T, D = x.shape
        qkv = self.qkv(x).view(B, T, 3, self.heads, D // self.heads)  # (B, T, 3, H, d)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # 3 × (B, H, T, d)
        if x.device.type == "cpu":  # its bf16 attention kernel is slower than its fp32 one
            q, k, v = q.to(x.dtype), k.to(x.dtype), v.to(x.dtype)
        with torch.autocast(x.device.type, enabled=False):  # in the dtype that q, k, v have
            if cache is not None:
                k, v = cache.append(layer, k, v)  # (B, H, S, d)
            out = causal_attention(q, k, v, attend, self.dropout if self.training else 0.0)
        out = out.transpose(1, 2).reshape(B, T, D)
        return self.project(out if places is None else pick(out, places))


class MLP(nn.Module):
    """Two linear layers with GELU (tanh form, as in GPT-2) between them; the width is 4 D."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.expand = nn.Linear(config.width, 4 * config.width)
        self.contract = nn.Linear(4 * config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        """x: (B, T, D) -> (B, T, D)."""
        return self.contract(F.gelu(self.expand(x), approximate="tanh"))


class Block(nn.Module):
    """One layer: attention, then MLP, each behind a layer norm and added to the stream."""

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.attention = Attention(config)
        self.norm_2 = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self.mlp = MLP(config)
        self.drop = nn.Dropout(config.dropout)

    def forward(
        self, x: Tensor, attend: Tensor | None = None, cache: KVCache | None = None, layer: int = 0
    ) -> Tensor:
        """x: (B, T, D) -> (B, T, D). Pre-norm residual block, Radford et al. 2019, §2.3;
        attend, cache, layer are for the attention. `drop` acts on what is added to the stream."""
        # BEGIN SOLUTION
        x = x + self.drop(self.attention(self.norm_1(x), attend, cache, layer))
        return x + self.drop(self.mlp(self.norm_2(x)))
        # END SOLUTION

    def at(
        self,
        places: Tensor,
        x: Tensor,
        attend: Tensor | None = None,
        cache: KVCache | None = None,
        layer: int = 0,
    ) -> Tensor:
        """`forward` where somebody reads on and nowhere else: (B, T, D) -> (N, D) at these places
        among the B T, (N,) long. Every position has its key and its value, since others look at
        them; what a position makes of what it saw, three quarters of the products, only these.
        Hooks on the block are not called; those on its parts are."""
        if type(self).forward.__module__ != __name__:  # a student wrote it, so theirs it is
            return pick(self(x, attend, cache, layer), places)
        seen = self.attention(self.norm_1(x), attend, cache, layer, places)
        x = pick(x, places) + self.drop(seen)  # (N, D)
        return x + self.drop(self.mlp(self.norm_2(x)))


class GPT(nn.Module):
    """A GPT-2 language model.

    `compute_dtype` (None = fp32) is the dtype of the matrix products inside the blocks; parameters,
    attention on a CPU, the final norm, and the logits stay in fp32.
    """

    def __init__(self, config: GPTConfig):
        super().__init__()
        self.config = config
        self.vocab_size, self.context, self.width = config.vocab_size, config.context, config.width
        self.compute_dtype: torch.dtype | None = None
        self.token_embedding = nn.Embedding(config.vocab_size, config.width)
        self.position_embedding = nn.Embedding(config.context, config.width)
        self.drop = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.final_norm = nn.LayerNorm(config.width, eps=config.layer_norm_eps)
        self._initialise()

    def _initialise(self) -> None:
        """N(0, 0.02²) for every matrix, as in GPT-2; what writes into the residual stream is
        scaled by 1/√(2L), so that the stream's variance does not grow with depth."""
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2:
                into_stream = name.endswith(("project.weight", "contract.weight"))
                std = 0.02 / math.sqrt(2 * self.config.layers) if into_stream else 0.02
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)

    def hidden_states(
        self,
        tokens: Tensor,
        attend: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
        places: Tensor | None = None,
    ) -> Tensor:
        """tokens: (B, T) long -> (B, T, D) after the final norm, fp32.

        attend: see `causal_attention`; positions: (B, T) long, default 0 … T-1 (behind the cache).
        places: (N,) long, those of the B T that are asked for -> (N, D), equal up to rounding.
        Raises ModelError when the sequence is longer than the context.
        """
        start, T = 0 if cache is None else cache.length, tokens.shape[1]
        if positions is None:
            if start + T > self.context:
                raise ModelError(
                    f"a sequence of {start + T} tokens does not fit the context of {self.context}. "
                    "Shorten prompt or answer, or train a model with a longer context."
                )
            positions = torch.arange(start, start + T, device=tokens.device)  # (T,)
        x = self.token_embedding(tokens) + self.position_embedding(positions)  # (B, T, D)
        x = self.drop(x)
        low, asked = self.compute_dtype is not None, None if places is None else len(places)
        if asked is not None and low and x.device.type == "cpu":  # a shape that repeats
            places = F.pad(places, (0, rounded_count(asked) - asked))
        with torch.autocast(x.device.type, dtype=self.compute_dtype or torch.bfloat16, enabled=low):
            for layer, block in enumerate(self.blocks):
                if places is None or layer < len(self.blocks) - 1:
                    x = block(x, attend, cache, layer)
                else:
                    x = block.at(places, x, attend, cache, layer)  # (N, D)
        if asked is not None and asked < len(x):
            x = x[:asked]
        return self.final_norm(x).to(torch.promote_types(x.dtype, torch.float32))

    def unembed(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V) fp32, with the token embedding as the output matrix."""
        return F.linear(hidden, self.token_embedding.weight.to(hidden.dtype))

    def forward(
        self,
        tokens: Tensor,
        attend: Tensor | None = None,
        positions: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """tokens: (B, T) long -> logits (B, T, V) fp32."""
        return self.unembed(self.hidden_states(tokens, attend, positions, cache))

    def new_cache(self, batch: int, length: int) -> KVCache:
        """An empty cache for `batch` rows of up to `length` positions."""
        weight = self.token_embedding.weight
        low = None if weight.device.type == "cpu" else self.compute_dtype  # as in `Attention`
        return KVCache(self.config, batch, length, weight.device, low or weight.dtype)

    def to_huggingface(self) -> tuple[dict[str, Tensor], dict]:
        """The weights under transformers' GPT-2 names, and the `config.json` to go with them."""
        return gpt2_format.written(self.state_dict(), asdict(self.config))

    @classmethod
    def from_huggingface(cls, tensors: dict[str, Tensor], config: dict, where: str) -> GPT:
        """The reverse of `to_huggingface`; `where` names the checkpoint in errors."""
        if other := gpt2_format.unlike_ours(config):
            raise CheckpointError(
                f"{where}: not a GPT-2 like ours: {other}. "
                "Load it with rlhf_course.huggingface.load_language_model."
            )
        model = cls(GPTConfig(**gpt2_format.shape_of(config)))
        checkpoints.load_into(model, gpt2_format.read(tensors), where)
        return model

    def save_pretrained(self, directory: str | os.PathLike, tokenizer=None) -> None:
        """Write a directory that `AutoModelForCausalLM.from_pretrained` opens."""
        tensors, config = self.to_huggingface()
        if tokenizer is not None:
            config |= checkpoints.write_tokenizer(directory, tokenizer)
        checkpoints.write_model(directory, config, tensors)

    @classmethod
    def from_pretrained(cls, name_or_dir: str | os.PathLike) -> GPT:
        """Read a GPT-2 from a directory or a hub name. Dropout is 0 whatever the file says.

        Raises ModelError (not found), CheckpointError (another architecture, missing tensors).
        """
        directory = checkpoints.resolve(name_or_dir)
        config, tensors = checkpoints.read_config(directory), checkpoints.read_tensors(directory)
        return cls.from_huggingface(tensors, config, str(name_or_dir))

    def extra_repr(self) -> str:
        """The configuration, for `print(model)`."""
        return ", ".join(f"{k}={v}" for k, v in asdict(self.config).items())


def next_token_loss(logits: Tensor, labels: Tensor, ignore: int = -100) -> Tensor:
    """Mean negative log-likelihood in nats per token of each next token.

    logits: (B, T, V) float; labels: (B, T) long, the tokens themselves: logits at position t are
    asked for labels[:, t + 1]; `ignore` is not counted. Returns a scalar, 0 if nothing is counted.
    """
    # BEGIN SOLUTION
    predicted, wanted = logits[:, :-1], labels[:, 1:]  # (B, T-1, V), (B, T-1)
    total = F.cross_entropy(
        predicted.flatten(0, 1), wanted.flatten(), ignore_index=ignore, reduction="sum"
    )
    return total / (wanted != ignore).sum().clamp(min=1)
    # END SOLUTION
