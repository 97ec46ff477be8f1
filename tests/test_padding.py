"""Padding to shapes that repeat."""

import pytest
import torch

from rlhf_course.padding import pad_rows, padded_length


@pytest.mark.parametrize(
    ("longest", "limit", "length"),
    [(1, None, 8), (8, None, 8), (9, None, 16), (61, 64, 64), (49, 50, 50), (50, 50, 50)],
)
def test_length_is_the_next_multiple_of_eight_within_the_context(longest, limit, length):
    assert padded_length(longest, limit) == length


def test_rows_are_filled_on_the_right():
    rows = pad_rows([[1, 2, 3], [4]], fill=-100)
    assert rows.dtype == torch.long and rows.shape == (2, 8)
    assert rows.tolist() == [[1, 2, 3] + [-100] * 5, [4] + [-100] * 7]


def test_a_row_beyond_the_limit_is_not_cut():
    assert pad_rows([[7] * 12], limit=10).shape == (1, 12)  # the model will say so
