"""Two real processes whiten the same advantages together and alone."""

import inspect

import pytest
import torch

from rlhf_course.coursework import two_ranks
from rlhf_course.errors import TrainingError
from rlhf_course.gpt import GPT, GPTConfig
from rlhf_course.ppo import masked_moments
from rlhf_course.rollout import Rollout, action_logprobs
from rlhf_course.world import make_world


@pytest.fixture
def batch(tmp_path):
    """A tiny policy's folder, and four answers: two whose advantages are high, two low."""
    tokenizer = make_world("town", "tiny").tokenizer
    torch.manual_seed(0)
    policy = GPT(GPTConfig(len(tokenizer), context=16, layers=1, heads=2, width=32))
    policy.save_pretrained(tmp_path / "policy", tokenizer)
    tokens = torch.randint(0, 40, (4, 7), generator=torch.Generator().manual_seed(0))
    mask = torch.zeros(4, 6, dtype=torch.bool)
    mask[:, 2:4] = True
    advantages = torch.full((4, 6), torch.nan)
    advantages[:, 2:4] = torch.tensor([[4.0, 3.0], [2.0, 1.0], [0.0, -1.0], [-2.0, -3.0]])
    with torch.no_grad():
        logprobs, _ = action_logprobs(policy, tokens, mask)
    held = (tokens, mask, logprobs, advantages, logprobs, logprobs, mask)
    return tmp_path / "policy", Rollout(*held), [True, True, False, False]


def test_half_of_the_signs_turn_where_each_rank_takes_its_own_mean(batch):
    rows = two_ranks.measure(*batch, inspect.getsource(masked_moments), sizes=(1, 2), repeats=1)
    by_case = {(row["order"], row["answers"]): row for row in rows}
    assert len(by_case) == 4
    sorted_by_source = by_case[two_ranks.ORDERS[1], 2]
    assert sorted_by_source["flipped"] == 0.5
    assert sorted_by_source["cosine"] < 0.9


def test_a_rank_that_fails_is_heard(batch):
    broken = "def masked_moments(x, mask, group=None):\n    raise RuntimeError('my mistake')\n"
    with pytest.raises(TrainingError, match="my mistake"):
        two_ranks.measure(*batch, broken, sizes=(1,), repeats=1)
