"""Any Hugging Face causal language model behind the same five methods as our own GPT.

PPO is written once; what differs between Llama, Qwen, Gemma … and our GPT is hidden here. Read
`gpt.GPT` first: this file only translates.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from rlhf_course import checkpoints
from rlhf_course.errors import CheckpointError, ModelError
from rlhf_course.gpt import GPT, unlike_ours

# One of these holds the vocabulary.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")


class HuggingFaceCache:
    """transformers' cache with the two things that `generate` asks of ours."""

    def __init__(self):
        from transformers import DynamicCache

        self.past = DynamicCache()

    @property
    def length(self) -> int:
        """Positions already read."""
        return self.past.get_seq_length()

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.past.batch_select_indices(rows)


class HuggingFaceLM(nn.Module):
    """Wraps a `…ForCausalLM` of transformers; parameters are shared, not copied."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model = model
        config = model.config.get_text_config()
        self.width, self.vocab_size = config.hidden_size, config.vocab_size
        self.context = int(getattr(config, "max_position_embeddings", 1 << 20))
        self.window = getattr(config, "sliding_window", None) or self.context
        self.compute_dtype: torch.dtype | None = None
        for name, value in vars(config).items():  # see GPTConfig.dropout
            if "drop" in name and isinstance(value, float) and value > 0:
                raise ModelError(
                    f"{name} is {value}: RLHF needs the same network in rollout and update. "
                    "Load the model with load_language_model, which sets dropout to 0."
                )

    @property
    def backbone(self) -> nn.Module:
        """The network without its output matrix."""
        return self.model.base_model

    def hidden_states(
        self,
        tokens: Tensor,
        attend: Tensor | None = None,
        positions: Tensor | None = None,
        cache: HuggingFaceCache | None = None,
    ) -> Tensor:
        """tokens: (B, T) long -> (B, T, D) after the final norm, fp32. See `GPT.hidden_states`."""
        start = 0 if cache is None else cache.length
        if attend is not None and attend.shape[-1] > self.window:
            raise ModelError(
                f"{attend.shape[-1]} tokens are more than this model's sliding window of "
                f"{self.window}, and a mask of ours would lift the window. "
                "Shorten prompt or answer, or use prompts of one length and no packing."
            )
        if positions is None:
            if start + tokens.shape[1] > self.context:
                raise ModelError(
                    f"a sequence of {start + tokens.shape[1]} tokens does not fit the context of "
                    f"{self.context}. Shorten prompt or answer."
                )
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        low = self.compute_dtype is not None
        dtype = self.compute_dtype or torch.bfloat16
        with torch.autocast(tokens.device.type, dtype=dtype, enabled=low):
            out = self.backbone(
                input_ids=tokens,
                attention_mask=self._additive(attend, tokens),
                position_ids=positions.expand(len(tokens), -1),
                past_key_values=None if cache is None else cache.past,
                use_cache=cache is not None,
            )
        return out.last_hidden_state.float()

    def _additive(self, attend: Tensor | None, tokens: Tensor) -> Tensor | None:
        """True/False -> 0/-inf, the form every attention kernel of transformers takes."""
        if attend is None:
            return None
        dtype = self.compute_dtype or next(self.model.parameters()).dtype
        mask = torch.zeros(attend.shape, dtype=dtype, device=tokens.device)
        return mask.masked_fill(~attend, torch.finfo(dtype).min)

    def unembed(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V) fp32, with the model's own scale or soft cap."""
        head = self.model.get_output_embeddings()
        logits = nn.functional.linear(
            hidden, head.weight.float(), None if head.bias is None else head.bias.float()
        )
        config = self.model.config.get_text_config()
        if getattr(config, "logit_scale", None):  # Cohere
            logits = logits * config.logit_scale
        if getattr(config, "logits_scaling", None):  # Granite
            logits = logits / config.logits_scaling
        cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
        return logits if not cap else torch.tanh(logits / cap) * cap

    def forward(self, tokens, attend=None, positions=None, cache=None) -> Tensor:
        """tokens: (B, T) long -> logits (B, T, V) fp32."""
        return self.unembed(self.hidden_states(tokens, attend, positions, cache))

    def new_cache(self, batch: int, length: int) -> HuggingFaceCache:
        """An empty cache; it grows by itself."""
        return HuggingFaceCache()

    def save_pretrained(self, directory: str | os.PathLike, tokenizer=None) -> None:
        """Write a directory that `AutoModelForCausalLM.from_pretrained` opens."""
        if tokenizer is not None:
            checkpoints.write_tokenizer(directory, tokenizer)
        self.model.save_pretrained(directory, safe_serialization=True)


def load_causal_lm(directory: Path, name: str) -> GPT | HuggingFaceLM:
    """A local model directory: a GPT-2 becomes our own GPT, anything else is wrapped."""
    config = checkpoints.read_config(directory)
    architectures = config.get("architectures") or []
    if architectures and not any(a.endswith(("LMHeadModel", "ForCausalLM")) for a in architectures):
        raise CheckpointError(
            f"{name}: holds a {architectures[0]}, not a causal language model. "
            "Give the directory of a language model (a reward model goes to --reward-model)."
        )
    if not unlike_ours(config):
        return GPT.from_huggingface(checkpoints.read_tensors(directory), config, name)
    from transformers import AutoConfig, AutoModelForCausalLM

    checkpoints.weight_files(directory)  # complains about what transformers calls by no name
    try:
        settings = AutoConfig.from_pretrained(directory)
        for part in (settings, settings.get_text_config()):
            for key, value in list(vars(part).items()):
                if "drop" in key and isinstance(value, float):
                    setattr(part, key, 0.0)
        with _quiet():
            model, info = AutoModelForCausalLM.from_pretrained(
                directory, config=settings, use_safetensors=True, output_loading_info=True,
                dtype=torch.float32, ignore_mismatched_sizes=True,  # so that we can name them
            )  # fmt: skip
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        reason = str(error).strip().splitlines()[0]
        raise CheckpointError(
            f"{name}: transformers cannot load it ({reason}). "
            "Save the model again with safetensors, in this transformers version."
        ) from error
    if info["missing_keys"] or info["mismatched_keys"]:
        wrong = sorted(info["missing_keys"]) + sorted(m[0] for m in info["mismatched_keys"])
        raise CheckpointError(
            f"{name}: {len(wrong)} tensors are missing or misshapen: {', '.join(wrong[:4])}. "
            "Restore the checkpoint; random numbers would stand in their place."
        )
    checkpoints.require_finite(dict(model.named_parameters()), name)
    return _checked(HuggingFaceLM(model), name)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """transformers draws a bar and reports on stderr what it loads; what is wrong we say."""
    from transformers.utils import logging

    verbosity, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if bars:
            logging.enable_progress_bar()


@torch.no_grad()
def _checked(model: HuggingFaceLM, name: str) -> HuggingFaceLM:
    """The model, if it says behind our masks and our `unembed` what it says by itself."""
    tokens = torch.arange(4)[None] % model.vocab_size  # (1, 4)
    causal = torch.ones(1, 1, 4, 4, dtype=torch.bool).tril()
    theirs = model.model.eval()(tokens).logits.float()
    try:
        same = torch.allclose(model(tokens, causal), theirs, rtol=1e-3, atol=1e-3)
    except (TypeError, ValueError, RuntimeError):  # it takes no such mask, no positions …
        same = False
    if not same:
        raise ModelError(
            f"{name}: {type(model.model).__name__} takes masks or makes logits in a way of its own "
            "that this package does not know. Choose another architecture, such as Llama or Qwen."
        )
    return model


def load_language_model(name_or_dir: str | os.PathLike):
    """(model, tokenizer) from a directory or a hub name.

    Raises ModelError (not found, no tokenizer), CheckpointError (damaged, other architecture).
    """
    directory = checkpoints.resolve(name_or_dir)
    model = load_causal_lm(directory, str(name_or_dir))
    return model, load_tokenizer(directory, str(name_or_dir))


def load_tokenizer(directory: str | os.PathLike, name: str | None = None):
    """The tokenizer beside a model. Raises ModelError when there is none, or it has no EOS."""
    from transformers import AutoTokenizer

    where = name or str(directory)
    try:
        # transformers would make an empty GPT-2 tokenizer out of nothing.
        if not any((Path(directory) / file).exists() for file in TOKENIZER_FILES):
            raise ValueError("none of " + ", ".join(TOKENIZER_FILES))
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{where}: no readable tokenizer beside the model ({str(error).splitlines()[0]}). "
            "Save it there with tokenizer.save_pretrained."
        ) from error
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{where}: the tokenizer has no EOS token, so no answer could ever end.")
    return tokenizer
