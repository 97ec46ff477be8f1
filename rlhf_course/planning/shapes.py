"""The shapes of language models, and how many parameters follow from them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from rlhf_course.checkpoints import read_config
from rlhf_course.errors import CheckpointError, ConfigError


@dataclass(frozen=True)
class ModelShape:
    """A dense decoder: `layers` blocks of attention and MLP between an embedding and a head."""

    name: str
    family: Literal["gpt2", "llama", "qwen2", "other"]
    vocabulary: int
    width: int
    """D, of the residual stream."""
    layers: int
    heads: int
    kv_heads: int
    """Fewer than `heads` with grouped-query attention: the KV cache shrinks by that much."""
    head_width: int
    inner: int
    """Width of the MLP."""
    tied: bool
    """The output head is the token embedding."""
    context: int
    """Longest sequence; GPT-2 has a learned vector for each position."""
    counted: int | None = None
    """Parameters of a family whose formula is not here, counted on a model without memory."""

    @property
    def attention_width(self) -> int:
        """All heads side by side."""
        return self.heads * self.head_width

    @property
    def kv_width(self) -> int:
        """All keys (or values) of one token in one layer."""
        return self.kv_heads * self.head_width

    @property
    def gated(self) -> bool:
        """The MLP has three matrices (SwiGLU), not two."""
        return self.family != "gpt2"

    @property
    def parameters(self) -> int:
        """Of the language model, each shared one counted once."""
        if self.counted is not None:
            return self.counted
        D, A, K, F = self.width, self.attention_width, self.kv_width, self.inner
        matrices = D * (A + 2 * K) + A * D + (3 if self.gated else 2) * D * F
        if self.family == "gpt2":  # biases everywhere, layer norms of two vectors
            layer, final = matrices + (A + 2 * K) + D + F + D + 4 * D, 2 * D
        else:
            layer, final = matrices + 2 * D, D
        if self.family == "qwen2":
            layer += A + 2 * K
        embeddings = (1 if self.tied else 2) * self.vocabulary * D
        embeddings += self.context * D if self.family == "gpt2" else 0
        return self.layers * layer + final + embeddings

    @property
    def scalar_parameters(self) -> int:
        """Of a critic or reward model on this backbone: a row and its bias for the output head."""
        return self.parameters - (0 if self.tied else self.vocabulary * self.width) + self.width + 1


# Touvron et al. 2023, "Llama 2", as in the public config.json of each size.
LLAMA2 = {
    "7b": ModelShape("Llama 2 7B", "llama", 32000, 4096, 32, 32, 32, 128, 11008, False, 4096),
    "13b": ModelShape("Llama 2 13B", "llama", 32000, 5120, 40, 40, 40, 128, 13824, False, 4096),
    "70b": ModelShape("Llama 2 70B", "llama", 32000, 8192, 80, 64, 8, 128, 28672, False, 4096),
}


def shape_of(model: str) -> ModelShape:
    """The shape of "7b", "13b" or "70b" (Llama 2's), or of the model in a directory.

    Raises ConfigError for what is neither, CheckpointError for an unusable config.json.
    """
    if model.lower() in LLAMA2:
        return LLAMA2[model.lower()]
    if not Path(model).is_dir():
        raise ConfigError(
            f"--model {model}: neither one of {', '.join(LLAMA2)} nor a directory. Give one of "
            "these, or a directory that holds a model's config.json."
        )
    return from_config(read_config(model), model)


def from_config(config: dict, directory: str) -> ModelShape:
    """The shape that a `config.json` tells; `directory` holds it, and names it in errors."""
    kind, name = config.get("model_type"), Path(directory).resolve().name
    try:
        if kind == "gpt2":
            D, heads = config["n_embd"], config["n_head"]
            return ModelShape(
                name, "gpt2", config["vocab_size"], D, config["n_layer"], heads, heads, D // heads,
                config.get("n_inner") or 4 * D, config.get("tie_word_embeddings", True),
                config["n_positions"],
            )  # fmt: skip
        formula = kind in ("llama", "mistral", "qwen2")
        if formula and not (config.get("attention_bias") or config.get("mlp_bias")):
            family = "qwen2" if kind == "qwen2" else "llama"
            return _llama_like(config, name, family, config.get("tie_word_embeddings", False))
    except (KeyError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(
            f"{directory}/config.json: {error} is missing or no number. Save the model again."
        ) from None
    return _counted(directory, name)


def _llama_like(config: dict, name: str, family, tied: bool, counted=None) -> ModelShape:
    D, heads = config["hidden_size"], config["num_attention_heads"]
    return ModelShape(
        name, family, config["vocab_size"], D, config["num_hidden_layers"], heads,
        config.get("num_key_value_heads") or heads, config.get("head_dim") or D // heads,
        config["intermediate_size"], tied, config.get("max_position_embeddings", 1 << 20), counted,
    )  # fmt: skip


def _counted(directory: str, name: str) -> ModelShape:
    """Any other family: built by transformers on the meta device, where tensors have no memory."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        settings = AutoConfig.from_pretrained(directory)
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(settings)
        text = settings.get_text_config().to_dict()
        tied = model.get_output_embeddings().weight is model.get_input_embeddings().weight
        counted = sum(p.numel() for p in model.parameters())
        return _llama_like(text, name, "other", tied, counted)
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"{directory}: no causal language model that can be counted ({str(error)[:200]}). "
            "Give a Llama-, Qwen- or GPT-2-like one, or another that transformers knows."
        ) from error
