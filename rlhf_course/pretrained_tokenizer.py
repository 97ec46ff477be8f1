"""The tokenizer beside a model: which token ends an answer, and which token begins a text.

A model that was trained elsewhere says twice how an answer ends: by `tokenizer.eos_token`, and by
the special token that its chat template writes behind an assistant's turn. They often differ:
Llama 3 ends a turn with <|eot_id|>, Gemma with <end_of_turn>, a Qwen base model with <|im_end|>.
What the template writes is what SFT teaches and what sampling has to stop at, so it becomes the
tokenizer's EOS when it is loaded; every stage, and every plain user of what a stage writes, then
finds one EOS. The former EOS remains in the vocabulary and in generation_config.json.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from rlhf_course import adapters, checkpoints
from rlhf_course.errors import ModelError

# One of these holds the vocabulary.
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")
PROBE = "Xanadu"
"""A text that no template writes by itself."""


def load_tokenizer(directory: str | os.PathLike, name: str | None = None):
    """The tokenizer beside a model, its EOS the token that ends an answer (see `turn_end`).

    Raises ModelError when there is none, or it has no EOS.
    """
    from transformers import AutoTokenizer

    where, directory = name or str(directory), Path(directory)
    if adapters.is_adapter(directory) and not _has_tokenizer(directory):
        directory = checkpoints.resolve(adapters.read_base_name(directory, where))
    try:
        # transformers would make an empty GPT-2 tokenizer out of nothing.
        if not _has_tokenizer(directory):
            raise ValueError("none of " + ", ".join(TOKENIZER_FILES))
        tokenizer = AutoTokenizer.from_pretrained(directory)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(
            f"{where}: no readable tokenizer beside the model ({str(error).splitlines()[0]}). "
            "Save it there with tokenizer.save_pretrained."
        ) from error
    end = turn_end(tokenizer)
    if end is not None and end != tokenizer.eos_token:
        _set_eos(tokenizer, end)
    if tokenizer.eos_token_id is None:
        raise ModelError(f"{where}: the tokenizer has no EOS token, so no answer could ever end.")
    return tokenizer


def _has_tokenizer(directory: Path) -> bool:
    return any((directory / file).exists() for file in TOKENIZER_FILES)


def turn_end(tokenizer) -> str | None:
    """The first special token that the chat template writes behind an answer; None where there is
    no template or it writes none (EOS is put there then, see `sft.encode_dialogue`)."""
    text = _probed(tokenizer)
    if text is None:
        return None
    behind = text.rpartition(PROBE)[2]
    special = [t.content for t in tokenizer.added_tokens_decoder.values() if t.special]
    # The first; of two that begin there, the longer.
    found = sorted((behind.find(t), -len(t), t) for t in special if t and t in behind)
    return found[0][2] if found else None


def _probed(tokenizer) -> str | None:
    """A dialogue as the chat template writes it, ending with an answer that holds `PROBE`."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        return None
    dialogue = [{"role": "user", "content": "Who?"}, {"role": "assistant", "content": PROBE}]
    try:
        return tokenizer.apply_chat_template(dialogue, tokenize=False)
    except (TemplateError, ValueError):  # it wants other messages; `sft` tells when they come
        return None


def _set_eos(tokenizer, end: str) -> None:
    """Make `end`, a token it has, the EOS; what the chat template writes stays as it was."""
    before, written = tokenizer.eos_token, _probed(tokenizer)
    tokenizer.eos_token = end
    if _probed(tokenizer) != written and isinstance(tokenizer.chat_template, str):
        # It writes the former EOS by its name, somewhere behind the end of the turn.
        name = "{% set eos_token = " + repr(before) + " %}"
        tokenizer.chat_template = name + tokenizer.chat_template


def begins_with_bos(tokenizer) -> bool:
    """Whether this tokenizer puts BOS before a text, so that its model has never read one without
    (Llama, Gemma). GPT-2, Pythia and Qwen do not."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token_id is not None and ids[:1] == [tokenizer.bos_token_id]


def begun(texts: Sequence[str], tokenizer) -> list[str]:
    """The texts as documents of the model's own kind: behind BOS where it has one."""
    return [tokenizer.bos_token + t for t in texts] if begins_with_bos(tokenizer) else list(texts)


def tokens_written(tokenizer, embeddings: int, name: str) -> int:
    """How many token ids the tokenizer can write: 0 … N-1, N at most `embeddings`, the model's.

    Many models have more embeddings than tokens, padded to a round number (Qwen, Pythia). Fewer is
    an error: nothing is resized in silence. Only a special token that no text needs may lack one
    (Gemma 3's <image_soft_token>); `sft` refuses a text that holds it. Raises ModelError.
    """
    vocabulary = tokenizer.get_vocab()
    beyond = {token: i for token, i in vocabulary.items() if i >= embeddings}
    added = tokenizer.added_tokens_decoder
    needed = {tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token, tokenizer.unk_token}
    missing = [t for t, i in beyond.items() if i not in added or not added[i].special]
    missing += [t for t in beyond if t in needed]
    if missing:
        raise ModelError(
            f"{name}: the tokenizer has {len(vocabulary)} tokens up to id "
            f"{max(vocabulary.values())}, and the model {embeddings} embeddings; {missing[0]!r} "
            "has none. Take the tokenizer that the model was trained with, or enlarge the model "
            "with resize_token_embeddings and train the new rows."
        )
    tokenizer.unread = frozenset(beyond.values())
    return min(max(vocabulary.values()) + 1, embeddings)
