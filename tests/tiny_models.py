"""Language models small enough for a test: our GPT, and two of transformers' made from configs.

Their weights are larger than a fresh model's, so that a token that should not be seen changes the
result visibly and not in the fifth digit.
"""

import torch

from rlhf_course.gpt import GPT, GPTConfig
from rlhf_course.huggingface import HuggingFaceLM

KINDS = ("gpt", "llama", "qwen2")
VOCABULARY, CONTEXT, WIDTH = 61, 48, 32


def tiny(kind: str, seed: int = 0) -> GPT | HuggingFaceLM:
    """A random language model: vocabulary 61, context 48, width 32, two layers, two heads."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        if kind == "gpt":
            config = GPTConfig(VOCABULARY, CONTEXT, layers=2, heads=2, width=WIDTH)
            model = GPT(config)
        else:
            model = HuggingFaceLM(_transformers(kind))
        for parameter in model.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.2)
            else:  # norms and biases too: none may be neutral
                parameter.data.add_(0.1 * torch.randn_like(parameter))
    return model


def _transformers(kind: str) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen2ForCausalLM

    shape = {
        "vocab_size": VOCABULARY, "max_position_embeddings": CONTEXT, "hidden_size": WIDTH,
        "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "bos_token_id": None, "eos_token_id": None,
    }  # fmt: skip
    if kind == "llama":
        return LlamaForCausalLM(LlamaConfig(**shape))
    return Qwen2ForCausalLM(Qwen2Config(**shape, tie_word_embeddings=True))
