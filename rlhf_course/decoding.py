"""`sampling.generate` made fast: the same signature, answers of the same distribution.

On a GPU, `generate` reads each token back to Python to see whether an answer has ended, and its
cache grows, so every step has another shape. `Fixed` gives the cache its final width from the
beginning, tokens stay on the device, and only every `EVERY` steps the host asks who is still
writing. Because nothing changes its shape or its place, a step can be recorded once as a CUDA graph
and replayed: the host then launches one thing a token instead of some hundred.

On a CPU it is the arithmetic that takes the time. There, `Growing` reads what has been written and
no more; an answer that ends gives its place to the last one, so that the others go on without being
copied; and `draw` needs one random number a row instead of one for each token of the vocabulary.

Tested on CPUs against `generate`; CUDA graphs HAVE NOT BEEN RUN ON A GPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from rlhf_course.onednn_gpt import OneDNNGPT, suits
from rlhf_course.padding import last_places
from rlhf_course.sampling import (
    Generation,
    LeftPadded,
    dropout_off,
    in_batches,
    require_room,
    sample_token,
)

EVERY = 16
"""Steps between two looks at who has finished, on a GPU: few enough that little is wasted."""
LARGE = 1024
"""Tokens of a vocabulary from which `generate` spends much of its time on drawing, on a CPU."""


def draw(
    logits: Tensor, temperature: float = 1.0, generator: torch.Generator | None = None
) -> tuple[Tensor, Tensor]:
    """`sampling.sample_token` from the whole distribution, with one random number a row.

    logits (B, V) float -> tokens (B,) long and their log-probs (B,), nats. A number between 0 and
    the sum of all probabilities falls into the stretch of one token: inversion of the cumulative
    distribution (Devroye 1986, ch. III.2). `sample_token` draws V exponentials a row: a fifth of
    the time that a model of 10 M parameters takes for a token. Raises RuntimeError on a CPU where
    logits are NaN, as `torch.multinomial` does.
    """
    probabilities = (logits.float() / temperature).softmax(-1)  # (B, V)
    edges = probabilities.cumsum(-1)  # (B, V): where each token's stretch ends
    if edges.device.type == "cpu" and not edges[:, -1].isfinite().all():
        raise RuntimeError("the probability tensor holds NaN")
    at = torch.rand(len(logits), 1, generator=generator, device=logits.device) * edges[:, -1:]
    tokens = torch.searchsorted(edges, at, right=True)  # (B, 1): no stretch of width 0 is hit
    tokens = tokens.clamp(max=logits.shape[1] - 1)  # of NaN, where nobody has looked
    return tokens[:, 0], probabilities.gather(-1, tokens).log()[:, 0]


class FixedCache:
    """Keys and values of `width` positions in every layer, for our GPT and for transformers.

    What is written next goes to `columns`, a tensor on the device: to move on is to add to it.
    """

    def __init__(self, width: int, device):
        self.width, self.length = width, 0  # length: the models' own counting is not used
        self.columns = torch.zeros(1, dtype=torch.long, device=device)
        self.held: dict[int, tuple[Tensor, Tensor]] = {}
        self.past = self  # as `huggingface.HuggingFaceCache` has it

    def update(self, k: Tensor, v: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Write (B, H, T, d) into `columns`; returns all, (B, H, width, d) each. transformers'
        rotated keys may be fp32 beside bf16 values: attention rounds them anyway."""
        if layer not in self.held:
            shapes = ((*x.shape[:2], self.width, x.shape[3]) for x in (k, v))
            self.held[layer] = tuple(v.new_zeros(shape) for shape in shapes)
        keys, values = self.held[layer]
        keys.index_copy_(2, self.columns, k.to(keys.dtype))
        values.index_copy_(2, self.columns, v)
        return keys, values

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """The same, as `gpt.KVCache` has it."""
        return self.update(k, v, layer)

    def get_seq_length(self, layer: int = 0) -> int:
        """transformers asks; positions are always given, so nothing follows from it."""
        return 0

    def select(self, rows: Tensor) -> None:
        """Keep only these rows of the batch."""
        self.held = {layer: (k[rows], v[rows]) for layer, (k, v) in self.held.items()}


class Growing:
    """One batch of prompts being answered on a CPU, with the models' own cache."""

    leave = 1 / 8
    """Share of the rows that have to have finished before they are dropped."""

    def __init__(self, model, prompts: list[list[int]], new: int, device):
        self.batch = LeftPadded(prompts, device)
        self.model = OneDNNGPT(model, len(prompts)) if suits(model) else model
        self.cache = self.model.new_cache(len(prompts), self.batch.width + new)
        self.logits = self._read(self.batch.prompts())  # (B, V)

    def _read(self, what: tuple) -> Tensor:
        (B, T), last = what[0].shape, None
        if T > 1:  # of a prompt, its last token alone
            last = last_places(B, T, what[0].device)
        hidden = self.model.hidden_states(*what, self.cache, last)
        return self.model.unembed(hidden.view(B, -1))

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token of every row, (B,); returns the logits behind it, (B, V)."""
        return self._read(self.batch.append(tokens))

    def select(self, running: Tensor) -> Tensor:
        """Go on with these rows, in ascending order, alone; returns them in their new order: the
        last ones take the places of those that leave."""
        rows, count = torch.arange(len(running), device=running.device), len(running)
        stay = running[running < count]
        left = torch.ones(count, dtype=torch.bool, device=running.device)
        left[stay] = False
        rows[left] = running[running >= count]
        self.cache.select(rows)
        self.batch.select(rows)
        return rows


class Fixed:
    """One batch of prompts being answered: everything that a step reads and writes has its place.

    `record`: replay steps as a CUDA graph, recorded anew when rows are dropped.
    """

    leave = 1 / 2

    def __init__(self, model, prompts: list[list[int]], new: int, device, record: bool = False):
        batch = LeftPadded(prompts, device)
        self.model, self.record, self.graph = model, record, None
        self.cache = FixedCache(batch.width + new, device)
        column = torch.arange(self.cache.width, device=device)
        self.real = column >= batch.pads[:, None]  # (B, S): no pad of the prompt
        self.token = torch.zeros(len(prompts), 1, dtype=torch.long, device=device)
        self.position = batch.width - 1 - batch.pads[:, None]  # (B, 1), of the last token read
        self.seen = torch.empty(0)
        self.logits = self._prompts(batch)  # (B, V)

    def _prompts(self, batch: LeftPadded) -> Tensor:
        P, S = batch.width, self.cache.width
        column = torch.arange(S, device=batch.pads.device)
        # A pad looks at itself: a row without any key would be 0 / 0.
        own = column == column[:P, None]  # (P, S)
        attend = ((self.real[:, None] & (column <= column[:P, None])) | own)[:, None]
        positions = (column[:P] - batch.pads[:, None]).clamp(min=0)  # (B, P)
        self.cache.columns = column[:P]
        last = last_places(len(batch.tokens), P, column.device)
        hidden = self.model.hidden_states(batch.tokens, attend, positions, self.cache, last)
        self.cache.columns = column[P - 1 : P].clone()  # `step` moves it, then writes there
        self.seen = self.real & (column < P)  # (B, S)
        return self.model.unembed(hidden)

    def step(self, tokens: Tensor) -> Tensor:
        """Read one more token of every row, (B,); returns the logits behind it, (B, V)."""
        self.token.copy_(tokens[:, None])
        self.position.add_(1)
        self.cache.columns.add_(1)
        self.seen.index_fill_(1, self.cache.columns, True)
        if not self.record:
            return self._read()
        if self.graph is None:
            self._record()
        self.graph.replay()
        return self.logits

    def _read(self) -> Tensor:
        attend = self.seen[:, None, None]  # (B, 1, 1, S)
        hidden = self.model.hidden_states(self.token, attend, self.position, self.cache)
        return self.model.unembed(hidden[:, -1])

    def _record(self) -> None:
        """Twice beside the current stream, as torch asks, so that libraries have set themselves
        up; every run writes the same column, so nothing is spoiled. Then record."""
        beside = torch.cuda.Stream()
        beside.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(beside):
            for _ in range(2):
                self._read()
        torch.cuda.current_stream().wait_stream(beside)
        self.graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self.graph):
            self.logits = self._read()

    def select(self, rows: Tensor) -> Tensor:
        """Go on with these rows alone; returns them."""
        self.cache.select(rows)
        self.real, self.seen = self.real[rows], self.seen[rows]
        self.token, self.position = self.token[rows], self.position[rows]
        self.graph = None
        return rows


def fits(model) -> bool:
    """Whether this model takes a mask over a cache of fixed width: all but sliding windows."""
    return "sliding_attention" not in getattr(model, "attention_kinds", ())


def pays(model) -> bool:
    """Whether `decode` is faster than `generate`."""
    device = next(model.parameters()).device.type
    return model.vocab_size >= LARGE if device == "cpu" else device == "cuda" and fits(model)


@torch.no_grad()
def decode(
    model,
    prompts: list[list[int]],
    max_new_tokens: int | Sequence[int],
    eos_id: int,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    batch_size: int | None = None,
    progress: Callable[[int], None] | None = None,
    every: int | None = None,
    record: bool = False,
    fixed: bool | None = None,
) -> Generation:
    """`sampling.generate`, whose arguments these are, but for four.

    max_new_tokens: for all, or one for each prompt. every: steps between two looks at who has
    finished (default: 1 on a CPU, else 16). fixed: the cache has its final width from the beginning
    (default: not on a CPU). record: replay steps as a CUDA graph. The draws are other ones of the
    same distribution than `generate`'s; at temperature 0 the answers are the same.
    Raises ModelError as `generate` does, ValueError where there are not as many limits as prompts.
    """
    limits = _limits(model, prompts, max_new_tokens)
    device, out = next(model.parameters()).device, Generation()
    fixed = device.type != "cpu" if fixed is None else fixed
    every, remaining = every or (1 if device.type == "cpu" else EVERY), iter(limits)
    whole = temperature > 0 and top_k == 0 and top_p == 1
    with dropout_off(model):
        for part in in_batches(prompts, batch_size, progress):
            limit = torch.tensor([n for _, n in zip(part, remaining, strict=False)], device=device)
            most = int(limit.max())
            kind = partial(Fixed, record=record) if fixed else Growing
            writer = kind(model, part, most, device)
            alive = torch.arange(len(part), device=device)  # the rows that are still held
            said = torch.full((len(part), most), -1, device=device)
            logprobs = torch.zeros(len(part), most, device=device)
            logits, ended = writer.logits, torch.zeros(len(part), dtype=torch.bool, device=device)
            for t in range(most):
                if whole:
                    new, logp = draw(logits, temperature, generator)
                else:
                    new, logp = sample_token(logits, temperature, top_k, top_p, generator)
                said[alive, t], logprobs[alive, t] = new, logp
                if t + 1 == most:
                    break
                ended |= (new == eos_id) | (limit[alive] <= t + 1)
                if (t + 1) % every == 0:
                    running = (~ended).nonzero()[:, 0]  # here the host waits
                    if not len(running):
                        break
                    if len(alive) - len(running) >= writer.leave * len(alive):
                        rows = writer.select(running)
                        new, alive, ended = new[rows], alive[rows], ended[rows]
                logits = writer.step(new)
            _collect(out, said, logprobs, limit, eos_id)
    return out


def _limits(model, prompts: list[list[int]], limits: int | Sequence[int]) -> Sequence[int]:
    """How many tokens each answer may have, checked."""
    if isinstance(limits, int):
        limits = [limits] * len(prompts)
    if len(limits) != len(prompts):
        raise ValueError(f"{len(limits)} limits for {len(prompts)} prompts")
    require_room(model, prompts, max(limits, default=0))
    return limits


def _collect(out: Generation, said: Tensor, logprobs: Tensor, limit: Tensor, eos_id: int) -> None:
    """Each row up to its EOS, or to the last token that it was to write."""
    end = (said == eos_id) & (torch.arange(said.shape[1], device=said.device) < limit[:, None])
    ended = end.any(dim=1)  # (B,)
    lengths = torch.where(ended, end.int().argmax(dim=1) + 1, limit).tolist()
    for row, lps, length in zip(said.tolist(), logprobs.tolist(), lengths, strict=True):
        out.responses.append(row[:length])
        out.logprobs.append(lps[:length])
    out.finished += ended.tolist()
