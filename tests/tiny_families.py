"""Tiny random models of the public families, each with a tokenizer of that family's own habits.

The chat templates were written for these tests: they have the marks, the BOS and the end of a turn
of the family's, and little else.
"""

import json
from pathlib import Path
from typing import NamedTuple

import torch

from rlhf_course.pretrained_model import without_dropout

WIDTH, HEADS, CONTEXT = 64, 2, 192
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace(  # Qwen 3 writes an empty thought into the last answer
    "{{ m['content'] }}",
    "{% if loop.last and m['role'] == 'assistant' %}<think>\n\n</think>\n\n{% endif %}"
    "{{ m['content'] }}",
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] | trim }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n"
    "{{ m['content'] | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)


class Family(NamedTuple):
    """What is particular about a family."""

    kind: str
    """transformers' name: {kind}Config, {kind}ForCausalLM."""
    special: tuple[str, ...]
    eos: str
    ends: str
    """The token with which an answer ends, once loaded."""
    template: str | None = None
    bos: str | None = None
    adds_bos: bool = False
    pad: str | None = None
    padding: int = 0
    """Rows of the embedding for which there is no token."""
    config: dict | None = None


GEMMA_TOKENS = ("<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>")
SHARED = {"num_hidden_layers": 2, "num_attention_heads": HEADS, "num_key_value_heads": 1,
          "intermediate_size": 64, "hidden_size": WIDTH, "head_dim": WIDTH // HEADS,
          "max_position_embeddings": CONTEXT}  # fmt: skip
QWEN = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>")
FAMILIES = {
    "gpt2": Family(
        "GPT2", ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>", bos="<|endoftext|>",
        config={"n_embd": WIDTH, "n_layer": 2, "n_head": HEADS, "n_positions": CONTEXT},
    ),
    "pythia": Family(
        "GPTNeoX", ("<|endoftext|>",), "<|endoftext|>", "<|endoftext|>", padding=11,
        config={"hidden_size": WIDTH, "num_hidden_layers": 2, "num_attention_heads": HEADS,
                "intermediate_size": 64, "max_position_embeddings": CONTEXT},
    ),
    "qwen2.5": Family(
        "Qwen2", QWEN, "<|endoftext|>", "<|im_end|>", CHATML, pad="<|endoftext|>", padding=7,
        config={**SHARED, "tie_word_embeddings": True},
    ),
    "qwen3": Family(
        "Qwen3", QWEN, "<|im_end|>", "<|im_end|>", THINKING, pad="<|endoftext|>", config=SHARED
    ),
    "llama3": Family(
        "Llama", ("<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>",
                  "<|end_header_id|>", "<|eot_id|>"),
        "<|end_of_text|>", "<|eot_id|>", LLAMA3, bos="<|begin_of_text|>", adds_bos=True,
        config=SHARED,
    ),
    "smollm2": Family(
        "Llama", QWEN[:3], "<|im_end|>", "<|im_end|>", CHATML, pad="<|im_end|>",
        config={**SHARED, "tie_word_embeddings": True},
    ),
    "gemma": Family(
        "Gemma", GEMMA_TOKENS, "<eos>", "<eos>", None, "<bos>", True, "<pad>", config=SHARED
    ),
    "gemma2": Family(
        "Gemma2", GEMMA_TOKENS, "<eos>", "<end_of_turn>", GEMMA, "<bos>", True, "<pad>",
        config={**SHARED, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0,
                "attn_logit_softcapping": 5.0, "sliding_window": 8},
    ),
    "gemma3": Family(
        "Gemma3", GEMMA_TOKENS, "<eos>", "<end_of_turn>", GEMMA, "<bos>", True, "<pad>",
        config={**SHARED, "query_pre_attn_scalar": 16, "sliding_window": 8,
                "layer_types": ["sliding_attention", "full_attention"]},
    ),
}  # fmt: skip


def tokenizer_of(family: Family):
    """Bytes, the family's special tokens, and no merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: i for i, token in enumerate([*family.special, *alphabet])}
    bpe = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens(list(family.special))
    if family.adds_bos:
        bpe.post_processor = processors.TemplateProcessing(
            single=f"{family.bos} $A", special_tokens=[(family.bos, vocabulary[family.bos])]
        )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, eos_token=family.eos, bos_token=family.bos, pad_token=family.pad
    )
    tokenizer.chat_template = family.template
    return tokenizer


def model_of(family: Family, vocabulary: int, seed: int = 0, task: str = "CausalLM"):
    """A random model of a family for a task ("CausalLM", "SequenceClassification"), whose weights
    are visible: norms and biases too, none is neutral."""
    import transformers

    kind = family.kind
    config_class = getattr(transformers, f"{kind}TextConfig", None) or getattr(
        transformers, f"{kind}Config"
    )
    config = config_class(
        **{"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": None,
           "pad_token_id": None, **family.config}
    )  # fmt: skip
    config = without_dropout(config)
    torch.manual_seed(seed)
    model = getattr(transformers, f"AutoModelFor{task}").from_config(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.05 * torch.randn_like(parameter))
    return model


def save(name: str, folder: Path, seed: int = 0, dtype=None, **how) -> Path:
    """A directory as the hub has it: model, tokenizer, and where there are several ends of an
    answer a generation_config.json that lists them. how: of transformers' save_pretrained."""
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    model = model_of(family, len(tokenizer) + family.padding, seed)
    model.to(dtype or torch.float32).save_pretrained(folder, **how)
    tokenizer.save_pretrained(folder)
    if family.ends != family.eos:
        ids = tokenizer.convert_tokens_to_ids([family.eos, family.ends])
        file = folder / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": ids}))
    return folder
