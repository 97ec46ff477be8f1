"""Pretraining text as one stream of tokens, cut into rows that begin where a document begins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from rlhf_course.errors import DataError
from rlhf_course.training import torch_generator


class Corpus:
    """Documents, each ended by EOS, in one stream; rows of `window` tokens for training.

    A row begins at a document's first token: a model that is to copy from a document's head (as
    the reviews world demands) never sees the head otherwise. A document longer than a row is also
    begun at every `window` tokens, so that all of it is read.
    """

    def __init__(self, documents: Sequence[str], tokenizer, window: int, name: str = "the text"):
        stream: list[int] = []
        starts: list[int] = []
        for ids in tokenizer(list(documents), add_special_tokens=False)["input_ids"]:
            starts += range(len(stream), len(stream) + max(len(ids), 1), window)
            stream += [*ids, tokenizer.eos_token_id]
        self.stream, self.window = torch.tensor(stream), window
        # The last row of all is moved back to where it fits.
        last = len(stream) - window
        fitting = [s for s in starts if s <= last] + [last] * (last >= 0 and starts[-1] > last)
        self.starts = torch.tensor(fitting)
        if not len(self.starts):
            raise DataError(
                f"{name} has {len(stream)} tokens, fewer than one row of {window}. "
                "Give more text, or in pretraining shorter rows with --window."
            )

    def rows(self, count: int, seed: int, *purpose: str | int) -> Tensor:
        """(count, window) long: rows drawn for this purpose."""
        generator = torch_generator(seed, *purpose)
        pick = torch.randint(0, len(self.starts), (count, 1), generator=generator)  # (count, 1)
        return self.stream[self.starts[pick] + torch.arange(self.window)]

    def every_row(self, limit: int = 512) -> Tensor:
        """(N, window) long: the first rows that do not overlap, for measuring perplexity."""
        chosen, end = [], 0
        for start in self.starts.tolist():
            if start >= end:
                chosen.append(start)
                end = start + self.window
        return self.stream[torch.tensor(chosen[:limit])[:, None] + torch.arange(self.window)]
