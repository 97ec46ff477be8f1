"""GPT-2 in transformers' format: what its `config.json` and its tensors are called there."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

_SHAPE = [  # ours, transformers'
    ("vocab_size", "vocab_size"), ("context", "n_positions"), ("layers", "n_layer"),
    ("heads", "n_head"), ("width", "n_embd"), ("layer_norm_eps", "layer_norm_epsilon"),
]  # fmt: skip
# A checkpoint that says otherwise has the same tensors and computes something else with them.
_FIXED = {
    "model_type": "gpt2", "activation_function": "gelu_new", "tie_word_embeddings": True,
    "scale_attn_weights": True, "scale_attn_by_inverse_layer_idx": False,
}  # fmt: skip
# Ours, transformers'. Order matters: "blocks." must be replaced before the parts inside a block.
_NAMES = [
    ("token_embedding", "wte"), ("position_embedding", "wpe"), ("final_norm", "ln_f"),
    ("blocks.", "h."), ("norm_1", "ln_1"), ("norm_2", "ln_2"), ("attention.qkv", "attn.c_attn"),
    ("attention.project", "attn.c_proj"), ("mlp.expand", "mlp.c_fc"),
    ("mlp.contract", "mlp.c_proj"),
]  # fmt: skip


def unlike_ours(config: dict) -> str:
    """What in a `config.json` makes `gpt.GPT` compute other logits than it says; "" for nothing."""
    found = [f"{k} is {config[k]!r}" for k, v in _FIXED.items() if config.get(k, v) != v]
    needed = ("model_type", *dict(_SHAPE).values())
    return (found + [f"{k} is missing" for k in needed if k not in config] + [""])[0]


def shape_of(config: dict) -> dict:
    """A `config.json` as the fields of `gpt.GPTConfig`, but for dropout."""
    return {ours: config[theirs] for ours, theirs in _SHAPE}


def written(tensors: Mapping[str, Tensor], shape: dict) -> tuple[dict[str, Tensor], dict]:
    """Parameters of ours under transformers' names, and the `config.json` to go with them.

    shape: the fields of `gpt.GPTConfig`.
    """
    config = {theirs: shape[ours] for ours, theirs in _SHAPE} | _FIXED
    config |= dict.fromkeys(("embd_pdrop", "attn_pdrop", "resid_pdrop"), shape["dropout"])
    config |= {"architectures": ["GPT2LMHeadModel"], "dtype": "float32",
               "bos_token_id": None, "eos_token_id": None}  # fmt: skip
    return dict(huggingface_tensor(*named) for named in tensors.items()), config


def read(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The reverse for the tensors, in fp32."""
    ours: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        name = name.removeprefix("transformer.")
        if name == "lm_head.weight" or name.endswith((".attn.bias", ".attn.masked_bias")):
            continue  # the tied head, and constant masks that old checkpoints carry
        tensor = tensor.t() if _transposed(name) else tensor
        for mine, theirs in _NAMES:
            name = name.replace(theirs, mine)
        ours[name] = tensor.float()
    return ours


def huggingface_tensor(name: str, tensor: Tensor) -> tuple[str, Tensor]:
    """One of our parameters under transformers' name, transposed where its `Conv1D` has it so."""
    for ours, theirs in _NAMES:
        name = name.replace(ours, theirs)
    return "transformer." + name, tensor.t() if _transposed(name) else tensor


def _transposed(huggingface_name: str) -> bool:
    """Whether this is a matrix of a `Conv1D`: (in, out), where a `nn.Linear` has (out, in)."""
    return huggingface_name.endswith(("c_attn.weight", "c_proj.weight", "c_fc.weight"))
