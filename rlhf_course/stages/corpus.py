"""Pretraining text as one stream of tokens, cut into rows that begin where a document begins."""

from __future__ import annotations

import re
import tempfile
from array import array
from collections.abc import Iterable, Iterator
from itertools import islice

import numpy as np
import torch
from torch import Tensor

from rlhf_course.errors import DataError
from rlhf_course.pretrained_tokenizer import begun
from rlhf_course.training import torch_generator

TOGETHER = 256  # documents that are encoded in one call
RUN = re.compile(r"\w{200,}|[^\w\s]{200,}|\s{200,}")


def words_of(texts: Iterable[str]) -> Iterator[str]:
    """The texts to train a tokenizer on: runs of one kind of character, which BPE takes for one
    word, end after 200. A word of a megabyte would take it hours, and teach it nothing."""
    return (RUN.sub(lambda run: run[0][:200], text) for text in texts)


class Corpus:
    """Documents in one stream, each ended by EOS, and behind BOS where the model's texts are; rows
    of `window` tokens for training.

    A row begins at a document's first token: a model that is to copy from a document's head (as
    the reviews world demands) never sees the head otherwise. A document longer than a row is also
    begun at every `window` tokens, so that all of it is read.

    Documents are encoded a few at a time; the tokens stand in a temporary file, 4 bytes each, which
    is mapped into memory: a corpus may be larger than it.
    """

    def __init__(self, documents: Iterable[str], tokenizer, window: int, name: str = "the text"):
        self.window, length, starts = window, 0, array("q")
        waiting = iter(documents)
        with tempfile.TemporaryFile() as file:
            while texts := list(islice(waiting, TOGETHER)):
                texts = begun(texts, tokenizer)
                for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]:
                    starts.extend(range(length, length + max(len(ids), 1), window))
                    length += file.write(array("i", [*ids, tokenizer.eos_token_id])) // 4
            if length < window:
                raise DataError(
                    f"{name} has {length} tokens, fewer than one row of {window}. "
                    "Give more text, or in pretraining shorter rows with --window."
                )
            file.flush()
            # The map holds the file's pages when the file is closed, which also removes its name.
            self.stream = torch.from_numpy(np.memmap(file, np.int32, "r+"))
        last = length - window  # the last row of all is moved back to where it fits
        fitting = [s for s in starts if s <= last] + [last] * (starts[-1] > last)
        self.starts = torch.tensor(fitting)

    def rows(self, count: int, seed: int, *purpose: str | int) -> Tensor:
        """(count, window) long: rows drawn for this purpose."""
        generator = torch_generator(seed, *purpose)
        pick = torch.randint(0, len(self.starts), (count, 1), generator=generator)  # (count, 1)
        return self.stream[self.starts[pick] + torch.arange(self.window)].long()

    def every_row(self, limit: int = 512) -> Tensor:
        """(N, window) long: the first rows that do not overlap, for measuring perplexity."""
        chosen, end = [], 0
        for start in self.starts.tolist():
            if start >= end:
                chosen.append(start)
                end = start + self.window
            if len(chosen) == limit:
                break
        rows = torch.tensor(chosen)[:, None] + torch.arange(self.window)  # (N, window)
        return self.stream[rows].long()
