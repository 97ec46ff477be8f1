"""How many rows of logits may exist at a time.

The product with the vocabulary makes V numbers of D: with V = 152,000 (Qwen 2.5), the logits of
8,000 tokens are 4.9 GB in fp32, and their gradient as much again. Losses that ask for more than
`LOGITS` take them in chunks, and compute them once more in the backward pass.
"""

LOGITS = 1 << 27
"""Logits that exist at a time: 512 MiB in fp32. All that the course's own models ever ask for."""


def rows_at_a_time(vocabulary: int, most: int = LOGITS) -> int:
    """Rows of `vocabulary` logits that make `LOGITS` of them together; at least 1, at most `most`.

    On a GPU a few hundred rows fill a matrix product with a large vocabulary.
    """
    return max(1, min(LOGITS // vocabulary, most))
