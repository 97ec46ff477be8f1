"""Any Hugging Face causal language model behind the same five methods as our own GPT.

PPO is written once; what differs between Llama, Qwen, Gemma … and our GPT is hidden here. Read
`gpt.GPT` first: this file only translates.
"""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_course import adapters, checkpoints
from rlhf_course.errors import CheckpointError, ModelError
from rlhf_course.gpt import GPT, pick
from rlhf_course.gpt2_format import unlike_ours
from rlhf_course.pretrained_model import (
    PLAIN,
    WeightFormat,
    open_causal_lm,
    quiet,
    require_saveable,
    shell_of,
    text_part,
)
from rlhf_course.pretrained_tokenizer import load_tokenizer, tokens_written

__all__ = [
    "HuggingFaceCache", "HuggingFaceLM", "Unadapted", "WeightFormat", "load_causal_lm",
    "load_fitted", "load_language_model", "load_tokenizer",
]  # fmt: skip

# The kinds of attention whose masks we can make.
FULL, SLIDING = "full_attention", "sliding_attention"


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
        self.window = getattr(config, "sliding_window", None)
        kinds = getattr(config, "layer_types", None)
        self.attention_kinds = set(kinds or [SLIDING if self.window else FULL])
        self.masks_by_kind = kinds is not None and SLIDING in kinds
        self.written = self.vocab_size
        """Logits are made of this many tokens: those that the tokenizer can write."""
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
        places: Tensor | None = None,
    ) -> Tensor:
        """tokens: (B, T) long -> (B, T, D) after the final norm, fp32; with `places` (N, D). See
        `GPT.hidden_states`."""
        start = 0 if cache is None else cache.length
        if positions is None:
            if start + tokens.shape[1] > self.context:
                raise ModelError(
                    f"a sequence of {start + tokens.shape[1]} tokens does not fit the context of "
                    f"{self.context}. Shorten prompt or answer."
                )
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)[None]
        positions = positions.expand(len(tokens), -1)  # (B, T)
        low = self.compute_dtype is not None
        dtype = self.compute_dtype or torch.bfloat16
        with torch.autocast(tokens.device.type, dtype=dtype, enabled=low):
            out = self.backbone(
                input_ids=tokens,
                attention_mask=self._masks(attend, tokens, positions),
                position_ids=positions,
                past_key_values=None if cache is None else cache.past,
                use_cache=cache is not None,
            )
        hidden = out.last_hidden_state
        return (hidden if places is None else pick(hidden, places)).float()

    def _masks(
        self, attend: Tensor | None, tokens: Tensor, positions: Tensor
    ) -> Tensor | dict[str, Tensor] | None:
        """What transformers takes for `attend`: one mask, or one for each kind of layer."""
        if attend is None:
            return None
        masks = {FULL: self._additive(attend, tokens)}
        if SLIDING in self.attention_kinds:
            near = attend & self._near(positions, attend.shape[-1])
            masks[SLIDING] = self._additive(near, tokens)
            if not self.masks_by_kind:
                return masks[SLIDING]
        return masks if self.masks_by_kind else masks[FULL]

    def _near(self, positions: Tensor, keys: int) -> Tensor:
        """Bool, broadcastable to (B, 1, T, S): the keys less than a window behind each query.

        By positions: answers side by side are all as near to their prompt (`shared_prefix`). Behind
        a cache, which keeps no positions, by columns, and the last T are queries.
        """
        queries = positions.shape[1]
        if keys == queries:
            behind = positions[:, :, None] - positions[:, None, :]  # (B, T, T)
            return (behind < self.window)[:, None]  # (B, 1, T, T)
        key = torch.arange(keys, device=positions.device)
        return key > key[keys - queries :, None] - self.window  # (T, S)

    def _additive(self, attend: Tensor, tokens: Tensor) -> Tensor:
        """True/False -> 0/-inf, the form every attention kernel of transformers takes."""
        dtype = self.compute_dtype or self.model.get_input_embeddings().weight.dtype
        mask = torch.zeros(attend.shape, dtype=dtype, device=tokens.device)
        return mask.masked_fill(~attend, torch.finfo(dtype).min)

    def unembed(self, hidden: Tensor) -> Tensor:
        """(..., D) -> logits (..., V) fp32, with the model's own scale or soft cap.

        V is `written`. A vocabulary that was padded to a round number has more rows than tokens;
        those are left out, so that no answer ever has a token that stands for no text.
        """
        head = self.model.get_output_embeddings()
        weight, bias = head.weight[: self.written], getattr(head, "bias", None)
        bias = None if bias is None else bias[: self.written].float()
        logits = nn.functional.linear(hidden, weight.float(), bias)
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
        with quiet():
            if adapters.has_adapter(self.model):  # merged, under the base's own names
                shell_of(self.model).save_pretrained(
                    directory, state_dict=adapters.plain_tensors(self.model)
                )
            else:
                self.model.save_pretrained(directory, safe_serialization=True)

    def save_adapter(self, directory: str | os.PathLike, base: str, tokenizer=None) -> None:
        """Write the adapter alone, as a peft directory; base: what the training started from."""
        if tokenizer is not None:
            checkpoints.write_tokenizer(directory, tokenizer)
        adapters.write_adapter(directory, self.model, base, "CAUSAL_LM")

    def adapt(self, lora: adapters.LoRA, seed: int = 0) -> Unadapted:
        """Freeze this model and put an adapter on it; returns the same model without, a view."""
        adapters.attach(self.model, lora, seed)
        return Unadapted(self)


class Unadapted(nn.Module):
    """A HuggingFaceLM with its adapter switched off: the untouched base, exactly, and no copy."""

    def __init__(self, model: HuggingFaceLM):
        super().__init__()
        self.adapted = model
        self.width, self.vocab_size, self.context = model.width, model.vocab_size, model.context
        self.attention_kinds = model.attention_kinds
        self.train(model.training)

    def hidden_states(self, *args, **kwargs) -> Tensor:
        """See `HuggingFaceLM.hidden_states`."""
        with adapters.switched_off(self.adapted.model):
            return self.adapted.hidden_states(*args, **kwargs)

    def unembed(self, hidden: Tensor) -> Tensor:
        """See `HuggingFaceLM.unembed`; an adapter never stands on the output matrix."""
        return self.adapted.unembed(hidden)

    def forward(self, tokens, attend=None, positions=None, cache=None) -> Tensor:
        """tokens: (B, T) long -> logits (B, T, V) fp32."""
        return self.unembed(self.hidden_states(tokens, attend, positions, cache))

    def new_cache(self, batch: int, length: int) -> HuggingFaceCache:
        """An empty cache; it grows by itself."""
        return self.adapted.new_cache(batch, length)


def load_causal_lm(directory: Path, name: str, how: WeightFormat = PLAIN) -> GPT | HuggingFaceLM:
    """A local model directory: a GPT-2 becomes our own GPT, anything else is wrapped. An adapter's
    (peft) is added to the weights of its base model; of one that sees, the text's part is taken.

    Raises ModelError (not found), CheckpointError (damaged, or another architecture).
    """
    if adapters.is_adapter(directory):
        return _merged(directory, name, how)
    config = checkpoints.read_config(directory)
    architectures = config.get("architectures") or []
    known = (
        "LMHeadModel",
        "ForCausalLM",
        *["ForConditionalGeneration"] * ("text_config" in config),
    )
    if architectures and not any(a.endswith(known) for a in architectures):
        raise CheckpointError(
            f"{name}: holds a {architectures[0]}, not a causal language model. "
            "Give the directory of a language model (a reward model goes to --reward-model)."
        )
    if how.ours and not unlike_ours(config):
        return GPT.from_huggingface(checkpoints.read_tensors(directory), config, name)
    model = _checked(HuggingFaceLM(text_part(open_causal_lm(directory, name, how))), name)
    require_saveable(model.model)
    return model


def _merged(directory: Path, name: str, how: WeightFormat) -> GPT | HuggingFaceLM:
    """The language model behind a peft directory."""
    how.refuse_adapter(name)
    base = adapters.read_base_name(directory, name)
    wrapped = load_causal_lm(checkpoints.resolve(base), base, replace(how, ours=False))
    wrapped.model = adapters.merge(wrapped.model, directory, name)
    config = wrapped.model.config.to_dict()
    if how.ours and not unlike_ours(config):
        return GPT.from_huggingface(wrapped.model.state_dict(), config, name)
    return wrapped


@torch.no_grad()
def _checked(model: HuggingFaceLM, name: str) -> HuggingFaceLM:
    """The model, if it says behind our masks and our `unembed` what it says by itself."""
    if others := model.attention_kinds - {FULL, SLIDING}:
        raise ModelError(
            f"{name}: {type(model.model).__name__} has layers of the kind {sorted(others)[0]}, and "
            "this package makes masks for full and sliding attention only. Choose another model."
        )
    device = model.model.get_input_embeddings().weight.device  # of rounded weights: the GPU
    tokens = torch.arange(4, device=device)[None] % model.vocab_size  # (1, 4)
    causal = torch.ones(1, 1, 4, 4, dtype=torch.bool, device=device).tril()
    out = model.model.eval()(tokens).logits
    # In bf16 theirs are rounded once more: a step is 2^-8 of the number.
    tolerance = 1e-3 if out.dtype == torch.float32 else 0.05 * out.abs().max().item()
    try:
        ours = model(tokens, causal)
        same = torch.allclose(ours, out.float().to(ours.device), rtol=1e-3, atol=tolerance)
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


def load_fitted(name_or_dir: str | os.PathLike, how: WeightFormat = PLAIN):
    """`load_language_model`, for training: as many logits as the tokenizer has tokens, and the end
    of a turn among the tokens at which plain users of the saved model stop.

    Raises ModelError also where the tokenizer has tokens for which the model has no embedding.
    """
    directory, name = checkpoints.resolve(name_or_dir), str(name_or_dir)
    model, tokenizer = load_causal_lm(directory, name, how), load_tokenizer(directory, name)
    written = tokens_written(tokenizer, model.vocab_size, name)
    if isinstance(model, GPT) and written < model.vocab_size:  # ours has a logit for every row
        model = load_causal_lm(directory, name, replace(how, ours=False))
    if isinstance(model, HuggingFaceLM):
        model.written = written
        settings = model.model.generation_config
        known = settings.eos_token_id
        known = known if isinstance(known, list) else [] if known is None else [known]
        ends = [tokenizer.eos_token_id, *(i for i in known if i != tokenizer.eos_token_id)]
        settings.eos_token_id = ends if len(ends) > 1 else ends[0]
    return model, tokenizer
