"""Sampling from a language model: one token, and whole answers with a key-value cache.

Serves every model that has `hidden_states`, `unembed` and `new_cache`: our GPT, and any Hugging
Face causal language model behind `huggingface.HuggingFaceLM`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from rlhf_course.errors import ModelError


@dataclass
class Generation:
    """What `generate` returns, one entry a prompt, in the order of the prompts."""

    responses: list[list[int]] = field(default_factory=list)
    """Token ids of the answer, the EOS included when it was sampled."""
    logprobs: list[list[float]] = field(default_factory=list)
    """Log-probability in nats of each of them under the distribution that was sampled from."""
    finished: list[bool] = field(default_factory=list)
    """True when the answer ended with EOS, False when it ran into `max_new_tokens`."""


def sample_token(
    logits: Tensor,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw one token from each row.

    logits: (B, V) float. temperature: 0 takes the likeliest token. top_k: keep the k likeliest
    (0: all), and what ties with the last of them. top_p: then keep the smallest set of tokens whose
    probability reaches p (nucleus sampling, Holtzman et al. 2020); the likeliest is always kept.
    Raises ValueError for a temperature or top_k below 0 or a top_p outside 0 … 1.
    Returns tokens (B,) long and their log-probs (B,) in nats under the distribution drawn from:
    tempered and truncated, as PPO needs it. At temperature 0, that of the untempered model.
    """
    if temperature < 0 or top_k < 0 or not 0 <= top_p <= 1:
        raise ValueError(f"temperature {temperature}, top_k {top_k}, top_p {top_p}: out of range")
    # BEGIN SOLUTION
    logits = logits.float()
    if temperature == 0:
        logprobs, tokens = logits.log_softmax(-1).max(-1)
        return tokens, logprobs
    logits = logits / temperature
    if 0 < top_k < logits.shape[-1]:
        smallest_kept = logits.topk(top_k, dim=-1).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < smallest_kept, -torch.inf)
    if top_p < 1:
        ordered, order = logits.sort(dim=-1, descending=True)
        probabilities = ordered.softmax(-1)
        before = probabilities.cumsum(-1).roll(1, -1)  # (B, V): mass of the likelier tokens
        before[:, 0] = -1.0  # the likeliest is kept, whatever top_p is
        ordered = ordered.masked_fill(before >= top_p, -torch.inf)
        logits = torch.empty_like(logits).scatter_(-1, order, ordered)  # back to token order
    logprobs = logits.log_softmax(-1)  # (B, V)
    tokens = torch.multinomial(logprobs.exp(), 1, generator=generator)  # (B, 1)
    return tokens[:, 0], logprobs.gather(-1, tokens)[:, 0]
    # END SOLUTION


class LeftPadded:
    """Ragged prompts in one batch, right-aligned: what the model reads, and where it stands.

    On the right edge every row's next token falls into the same column of the cache. What stands
    in the pads on the left does not matter, since nothing attends to them.
    """

    def __init__(self, prompts: list[list[int]], device):
        self.width = max(map(len, prompts))
        """The longest prompt, P."""
        rows = [[0] * (self.width - len(p)) + p for p in prompts]
        self.tokens = torch.tensor(rows, device=device)  # (B, P)
        self.pads = torch.tensor([self.width - len(p) for p in prompts], device=device)  # (B,)
        self._ragged = bool(self.pads.any())

    def prompts(self) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """(tokens (B, P), attend, positions) for `hidden_states`, to read all prompts at once."""
        if not self._ragged:
            return self.tokens, None, None
        column = torch.arange(self.width, device=self.pads.device)
        real = column >= self.pads[:, None]  # (B, P)
        positions = (column - self.pads[:, None]).clamp(min=0)  # (B, P), restarted behind the pads
        # A pad may look at itself: a row without any key would be 0 / 0.
        causal, own = column <= column[:, None], column == column[:, None]  # (P, P)
        return self.tokens, ((real[:, None] & causal) | own)[:, None], positions

    def append(self, tokens: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Put one more token, (B,), behind every row. Returns (tokens (B, 1), attend, positions)
        for `hidden_states`, to read these alone; what came before has to be in the cache."""
        self.width += 1
        if not self._ragged:
            return tokens[:, None], None, None
        real = torch.arange(self.width, device=self.pads.device) >= self.pads[:, None]  # (B, S)
        positions = self.width - 1 - self.pads  # (B,)
        return tokens[:, None], real[:, None, None], positions[:, None]

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch (the others have finished)."""
        self.pads = self.pads[rows]


@contextmanager
def dropout_off(model) -> Iterator[None]:
    """The model in evaluation mode; afterwards it is in the mode it was in, whatever happened."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)


def in_batches(
    prompts: list[list[int]], size: int | None, progress: Callable[[int], None] | None = None
) -> Iterator[list[list[int]]]:
    """`size` prompts at a time (None: all at once); tells `progress` how many have been dealt
    with when the next ones are asked for."""
    size = size or max(len(prompts), 1)
    for start in range(0, len(prompts), size):
        part = prompts[start : start + size]
        yield part
        if progress is not None:
            progress(start + len(part))


def require_room(model, prompts: list[list[int]], max_new_tokens: int) -> None:
    """Raise ModelError when a prompt is empty or prompt and answer do not fit the context."""
    longest = max((len(p) for p in prompts), default=0)
    if any(not p for p in prompts):
        raise ModelError("an empty prompt: give at least one token to go on from.")
    if longest + max_new_tokens > model.context:
        raise ModelError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context "
            f"of the model, {model.context}. Shorten the prompt, or lower max_new_tokens."
        )


@torch.no_grad()
def generate(
    model,
    prompts: list[list[int]],
    max_new_tokens: int,
    eos_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
) -> Generation:
    """Sample one answer to each prompt.

    prompts: token ids, ragged, none empty. An answer ends at `eos_id`, which belongs to it, or
    after `max_new_tokens`. batch_size: prompts sampled at once (default: all). progress: called
    with the number of prompts done. The prompts are read once; then each step reads the newest
    token of every row alone, since the keys and values of what came before are in the cache.
    Raises ModelError when a prompt is empty or prompt and answer do not fit the model's context.
    """
    require_room(model, prompts, max_new_tokens)
    device, out = next(model.parameters()).device, Generation()
    with dropout_off(model):
        for part in in_batches(prompts, batch_size, progress):
            batch = LeftPadded(part, device)  # batch.prompts(), then batch.append(new) each step
            cache = model.new_cache(len(part), batch.width + max_new_tokens)
            responses, logprobs = [[] for _ in part], [[] for _ in part]
            finished = [False] * len(part)
            # BEGIN SOLUTION
            read = batch.prompts()  # (tokens, attend, positions)
            alive = list(range(len(part)))  # the rows of the batch that the cache still holds
            for _ in range(max_new_tokens):
                hidden = model.hidden_states(*read, cache)[:, -1]  # (b, D)
                logits = model.unembed(hidden)  # (b, V)
                new, logp = sample_token(logits, temperature, top_k, top_p, generator)  # (b,), (b,)
                for row, token, lp in zip(alive, new.tolist(), logp.tolist(), strict=True):
                    if not finished[row]:
                        responses[row].append(token)
                        logprobs[row].append(lp)
                        finished[row] = token == eos_id
                running = [i for i, row in enumerate(alive) if not finished[row]]
                if not running:
                    break
                if len(running) <= len(alive) // 2:  # drop the finished: half the work from here on
                    keep = torch.tensor(running, device=device)
                    cache.select(keep)
                    batch.select(keep)
                    new, alive = new[keep], [alive[i] for i in running]
                read = batch.append(new)
            # END SOLUTION
            out.responses += responses
            out.logprobs += logprobs
            out.finished += finished
    return out
