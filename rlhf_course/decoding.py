"""`sampling.generate` for a GPU: the same answers, without waiting for the host at every token.

`generate` reads each token back to Python to see whether an answer has ended, and its cache grows,
so every step has another shape. Here the cache has its final width from the beginning, tokens stay
on the device, and only every `every` steps the host asks who is still writing. Because nothing
changes its shape or its place, a step can be recorded once as a CUDA graph and replayed: the host
then launches one thing a token instead of some hundred.

Tested on CPUs against `generate`; CUDA graphs HAVE NOT BEEN RUN ON A GPU.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from rlhf_course.sampling import (
    Generation,
    LeftPadded,
    dropout_off,
    in_batches,
    require_room,
    sample_token,
)

EVERY = 16
"""Steps between two looks at who has finished: few enough that little is written in vain."""


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


class Writer:
    """One batch of prompts being answered: everything that a step reads and writes has its place.

    `record`: replay steps as a CUDA graph, recorded anew when rows are dropped.
    """

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
        hidden = self.model.hidden_states(batch.tokens, attend, positions, self.cache)
        self.cache.columns = column[P - 1 : P].clone()  # `step` moves it, then writes there
        self.seen = self.real & (column < P)  # (B, S)
        return self.model.unembed(hidden[:, -1])

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

    def select(self, rows: Tensor) -> None:
        """Go on with these rows alone."""
        self.cache.select(rows)
        self.real, self.seen = self.real[rows], self.seen[rows]
        self.token, self.position = self.token[rows], self.position[rows]
        self.graph = None


def fits(model) -> bool:
    """Whether this model takes a mask over a cache of fixed width: all but sliding windows."""
    return "sliding_attention" not in getattr(model, "attention_kinds", ())


@torch.no_grad()
def decode(
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
    every: int = EVERY,
    record: bool = False,
) -> Generation:
    """`sampling.generate`, whose arguments these are, but for two.

    every: steps between two looks at who has finished. 1 draws what `generate` draws from the same
    generator; with more, rows that have finished stay longer, and further draws are other ones of
    the same distribution. record: replay steps as a CUDA graph.
    Raises ModelError as `generate` does.
    """
    require_room(model, prompts, max_new_tokens)
    device, out = next(model.parameters()).device, Generation()
    with dropout_off(model):
        for part in in_batches(prompts, batch_size, progress):
            writer = Writer(model, part, max_new_tokens, device, record)
            alive = torch.arange(len(part), device=device)  # the rows that are still held
            said = torch.full((len(part), max_new_tokens), -1, device=device)
            logprobs = torch.zeros(len(part), max_new_tokens, device=device)
            done = torch.zeros(len(part), dtype=torch.bool, device=device)
            logits = writer.logits
            for t in range(max_new_tokens):
                new, logp = sample_token(logits, temperature, top_k, top_p, generator)
                said[alive, t], logprobs[alive, t] = new, logp
                done[alive] |= new == eos_id
                if t + 1 == max_new_tokens:
                    break
                if (t + 1) % every == 0:
                    running = (~done[alive]).nonzero()[:, 0]  # here the host waits
                    if not len(running):
                        break
                    if len(running) <= len(alive) // 2:
                        writer.select(running)
                        new, alive = new[running], alive[running]
                logits = writer.step(new)
            _collect(out, said, logprobs, done, eos_id)
    return out


def _collect(out: Generation, said: Tensor, logprobs: Tensor, done: Tensor, eos_id: int) -> None:
    """Each row up to its EOS, or to the last token that it wrote."""
    ends = (said == eos_id).int().argmax(dim=1) + 1  # (B,)
    lengths = torch.where(done, ends, (said >= 0).sum(dim=1)).tolist()
    for row, lps, length in zip(said.tolist(), logprobs.tolist(), lengths, strict=True):
        out.responses.append(row[:length])
        out.logprobs.append(lps[:length])
    out.finished += done.tolist()
