"""Sampling from a language model: one token, and whole answers with a key-value cache.

Serves every model that has `hidden_states`, `unembed` and `new_cache`: our GPT, and any Hugging
Face causal language model behind `huggingface.HuggingFaceLM`.
"""

from __future__ import annotations

from collections.abc import Callable
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


def left_pad(prompts: list[list[int]], device) -> tuple[Tensor, Tensor]:
    """Right-aligned prompts (B, P) long, and the count of pads before each (B,) long.

    On the right edge every row's next token falls into the same column of the cache. What stands
    in the pads does not matter, since nothing attends to them.
    """
    longest = max(map(len, prompts))
    rows = [[0] * (longest - len(p)) + p for p in prompts]
    pads = torch.tensor([longest - len(p) for p in prompts], device=device)
    return torch.tensor(rows, device=device), pads


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

    prompts: token ids, ragged, none empty. An answer ends at `eos_id` or after `max_new_tokens`.
    batch_size: prompts sampled at once (default: all). progress: called with the number of
    prompts done.
    Raises ModelError when a prompt is empty or prompt and answer do not fit the model's context.
    """
    longest = max((len(p) for p in prompts), default=0)
    if any(not p for p in prompts):
        raise ModelError("an empty prompt: give at least one token to go on from.")
    if longest + max_new_tokens > model.context:
        raise ModelError(
            f"a prompt of {longest} tokens and {max_new_tokens} new ones exceed the context "
            f"of the model, {model.context}. Shorten the prompt, or lower max_new_tokens."
        )
    was_training = model.training
    model.eval()
    out = Generation()
    step = batch_size or max(len(prompts), 1)
    how = (temperature, top_k, top_p, generator)
    try:
        for start in range(0, len(prompts), step):
            part = prompts[start : start + step]
            _generate_batch(model, part, max_new_tokens, eos_id, how, out)
            if progress is not None:
                progress(start + len(part))
    finally:
        model.train(was_training)
    return out


def _generate_batch(model, prompts, max_new_tokens, eos_id, how, out: Generation) -> None:
    """One batch: read the prompts once, then one token a step for the rows still alive."""
    device = next(model.parameters()).device
    tokens, pads = left_pad(prompts, device)  # (B, P), (B,)
    B, P = tokens.shape
    cache = model.new_cache(B, P + max_new_tokens)
    column = torch.arange(P + max_new_tokens, device=device)
    ragged = bool(pads.any())
    real = column >= pads[:, None]  # (B, S): which columns of the cache are not pads
    attend = positions = None
    if ragged:
        positions = (column[:P] - pads[:, None]).clamp(min=0)  # (B, P), restarted behind the pads
        # A pad may look at itself: a row without any key would be 0 / 0.
        causal = column[:P] <= column[:P, None]  # (P, P)
        own = torch.eye(P, dtype=torch.bool, device=device)
        attend = ((real[:, None, :P] & causal) | own)[:, None]  # (B, 1, P, P)

    alive = torch.arange(B, device=device)  # the rows of the batch that the cache still holds
    sampled = torch.full((B, max_new_tokens), eos_id, device=device)  # what is left over stays EOS
    logprobs = torch.zeros(B, max_new_tokens, device=device)
    lengths = torch.full((B,), max_new_tokens, device=device)
    finished = torch.zeros(B, dtype=torch.bool, device=device)
    for t in range(max_new_tokens):
        hidden = model.hidden_states(tokens, attend, positions, cache)[:, -1]  # (b, D)
        new, logp = sample_token(model.unembed(hidden), *how)  # (b,), (b,)
        running = ~finished[alive]
        sampled[alive, t] = torch.where(running, new, eos_id)
        logprobs[alive, t] = torch.where(running, logp, 0.0)
        ended = running & (new == eos_id)
        lengths[alive[ended]] = t + 1
        finished[alive[ended]] = True
        running = running & ~ended
        count = int(running.sum())
        if count == 0:
            break
        if count <= len(alive) // 2:  # drop the finished rows: half the work from here on
            keep = running.nonzero()[:, 0]
            cache.select(keep)
            alive, new, real, pads = alive[keep], new[keep], real[keep], pads[keep]
        tokens = new[:, None]  # (b, 1)
        if ragged:
            positions = (P + t - pads)[:, None]  # (b, 1)
            attend = real[:, None, None, : P + t + 1]  # (b, 1, 1, S)
    for row, n, lp, end in zip(
        sampled.tolist(), lengths.tolist(), logprobs.tolist(), finished.tolist(), strict=True
    ):
        out.responses.append(row[:n])
        out.logprobs.append(lp[:n])
        out.finished.append(end)
