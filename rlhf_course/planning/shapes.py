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
    family: Literal["gpt2", "neox", "llama", "qwen2", "qwen3", "gemma2", "gemma3", "other"]
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
        return self.family not in ("gpt2", "neox")

    @property
    def layer_matrices(self) -> int:
        """Numbers in the matrices of one layer."""
        D, A, K, F = self.width, self.attention_width, self.kv_width, self.inner
        return D * (A + 2 * K) + A * D + (3 if self.gated else 2) * D * F

    @property
    def parameters(self) -> int:
        """Of the language model, each shared one counted once."""
        if self.counted is not None:
            return self.counted
        D, A, K, F = self.width, self.attention_width, self.kv_width, self.inner
        if not self.gated:  # biases everywhere, layer norms of two vectors
            layer, final = self.layer_matrices + (A + 2 * K) + D + F + D + 4 * D, 2 * D
        else:
            layer, final = self.layer_matrices + 2 * D, D
        if self.family in ("gemma2", "gemma3"):  # a norm before and after each part
            layer += 2 * D
        if self.family in ("qwen3", "gemma3"):  # queries and keys have norms
            layer += 2 * self.head_width
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


# From the public config.json of each model on the Hugging Face hub (openai-community, EleutherAI,
# Qwen, meta-llama, HuggingFaceTB, google): family, vocabulary, width, layers, heads, heads of keys
# and values, width of a head, width of the MLP, tied, context.
_PUBLIC = """
distilgpt2   gpt2   50257  768  6  12 12 64  3072  tied 1024
gpt2         gpt2   50257  768  12 12 12 64  3072  tied 1024
gpt2-medium  gpt2   50257  1024 24 16 16 64  4096  tied 1024
gpt2-large   gpt2   50257  1280 36 20 20 64  5120  tied 1024
gpt2-xl      gpt2   50257  1600 48 25 25 64  6400  tied 1024
pythia-70m   neox   50304  512  6  8  8  64  2048  own  2048
pythia-160m  neox   50304  768  12 12 12 64  3072  own  2048
pythia-410m  neox   50304  1024 24 16 16 64  4096  own  2048
pythia-1b    neox   50304  2048 16 8  8  256 8192  own  2048
pythia-1.4b  neox   50304  2048 24 16 16 128 8192  own  2048
qwen2.5-0.5b qwen2  151936 896  24 14 2  64  4864  tied 32768
qwen2.5-1.5b qwen2  151936 1536 28 12 2  128 8960  tied 131072
qwen2.5-3b   qwen2  151936 2048 36 16 2  128 11008 tied 32768
qwen2.5-7b   qwen2  152064 3584 28 28 4  128 18944 own  131072
qwen3-0.6b   qwen3  151936 1024 28 16 8  128 3072  tied 40960
qwen3-1.7b   qwen3  151936 2048 28 16 8  128 6144  tied 40960
llama-3.2-1b llama  128256 2048 16 32 8  64  8192  tied 131072
llama-3.2-3b llama  128256 3072 28 24 8  128 8192  tied 131072
llama-3.1-8b llama  128256 4096 32 32 8  128 14336 own  131072
smollm2-135m llama  49152  576  30 9  3  64  1536  tied 8192
smollm2-360m llama  49152  960  32 15 5  64  2560  tied 8192
smollm2-1.7b llama  49152  2048 24 32 32 64  8192  tied 8192
gemma-2-2b   gemma2 256000 2304 26 8  4  256 9216  tied 8192
gemma-3-270m gemma3 262144 640  18 4  1  256 2048  tied 32768
gemma-3-1b   gemma3 262144 1152 26 4  1  256 6912  tied 32768
"""


def _public() -> dict[str, ModelShape]:
    shapes = {}
    for line in _PUBLIC.strip().splitlines():
        name, family, *numbers, tied, context = line.split()
        shapes[name] = ModelShape(name, family, *map(int, numbers), tied == "tied", int(context))
    return shapes


PUBLIC = _public()


def shape_of(model: str) -> ModelShape:
    """The shape of "7b", "13b" or "70b" (Llama 2's), of a directory's model, or of a public one, as
    "gpt2", "qwen2.5-0.5b" or "Qwen/Qwen2.5-0.5B-Instruct".

    Raises ConfigError for what is none of these, CheckpointError for an unusable config.json.
    """
    if model.lower() in LLAMA2:
        return LLAMA2[model.lower()]
    if Path(model).is_dir():
        return from_config(read_config(model), model)
    name = model.lower().rpartition("/")[2]
    name = name.removesuffix("-instruct").removesuffix("-it").removesuffix("-base")
    if name not in PUBLIC:
        raise ConfigError(
            f"--model {model}: neither one of {', '.join((*LLAMA2, *PUBLIC))} nor a directory. "
            "Give one of these, or a directory that holds a model's config.json."
        )
    return PUBLIC[name]


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
