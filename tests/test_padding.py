"""Padding to shapes that repeat."""

import pytest
import torch

from rlhf_course.padding import CPU_TOKENS, like_lengths, pad_rows, padded_length, rounded_count


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


def test_a_rounded_count_is_one_of_few():
    """From one power of two to the next there are 8, and none is an eighth too large."""
    rounded = [rounded_count(n) for n in range(4097)]
    assert all(n <= r <= n + (n - 1) // 8 for n, r in enumerate(rounded) if n)
    assert rounded[:17] == list(range(17)) and rounded[17:19] == [18, 18]
    for power in range(4, 12):
        assert len({r for r in rounded if 1 << power < r <= 2 << power}) == 8


CPU, GPU = torch.device("cpu"), torch.device("meta")


def test_rows_of_like_length_share_a_pass_of_a_cpu():
    """The longest first; a power of two of them, with some 2,000 tokens, and every row once."""
    lengths = [(37 * i) % 400 + 1 for i in range(100)]
    parts = like_lengths(lengths, None, CPU)
    assert sorted(i for part in parts for i in part) == list(range(100))
    ordered = [lengths[i] for part in parts for i in part]
    assert ordered == sorted(lengths, reverse=True)
    for part in parts[:-1]:
        size = len(part)
        assert size & (size - 1) == 0
        assert size * padded_length(lengths[part[0]]) <= CPU_TOKENS
        assert 2 * size * padded_length(lengths[part[0]]) > CPU_TOKENS  # as many as there is room
    assert [len(part) for part in parts[:3]] == [4, 4, 4]


def test_what_fits_at_once_stays_in_order():
    assert like_lengths([3, 9, 5], None, CPU) == [[0, 1, 2]]
    assert like_lengths([], None, CPU) == []


def test_a_row_longer_than_the_room_is_alone_and_one_of_no_token_is_no_division_by_zero():
    assert like_lengths([5000, 10, 4000], None, CPU) == [[0], [2], [1]]
    assert like_lengths([5000, 0, 0], None, CPU) == [[0], [1, 2]]


def test_a_given_number_of_rows_holds_and_a_gpu_takes_all():
    lengths = [1, 700, 3, 900, 5]
    assert like_lengths(lengths, 2, CPU) == [[3, 1], [4, 2], [0]]
    assert like_lengths(lengths, 2, GPU) == [[3, 1], [4, 2], [0]]
    assert like_lengths(lengths, None, GPU) == [[3, 1, 4, 2, 0]]


def test_the_context_bounds_the_room_that_is_counted():
    assert [len(part) for part in like_lengths([1020] * 5, None, CPU)] == [2, 2, 1]
    assert [len(part) for part in like_lengths([1025] * 5, None, CPU, 1024)] == [1] * 5
