"""Positions that nobody asks for: the last block leaves them out, and nothing else changes."""

import copy

import pytest
import torch
from tiny_models import KINDS, VOCABULARY, tiny

from rlhf_course import gpt, reward_model, shared_prefix
from rlhf_course.mdp import action_mask
from rlhf_course.recompute import checkpoint_blocks
from rlhf_course.reward_model import ScalarModel
from rlhf_course.rollout import action_logprobs, action_values
from rlhf_course.sft import segment_mask
from rlhf_course.shared_prefix import side_by_side
from rlhf_course.stages import reward_model as reward_stage

TOKENS = torch.randint(6, VOCABULARY, (4, 15), generator=torch.Generator().manual_seed(2))
PROMPTS, ANSWERS = torch.tensor([3, 9, 1, 6]), torch.tensor([5, 1, 14, 7])
PLACES = torch.tensor([59, 0, 14, 15, 15, 33, 7])
"""In any order, the first and the last, and one of them twice."""
SEGMENTS = torch.tensor([[0] * 7 + [1] * 8, [0] * 15, [0] * 2 + [1] * 9 + [-1] * 4, [0] * 14 + [1]])
WAYS = {
    "causal": lambda: (None, None),
    "packed": lambda: (segment_mask(SEGMENTS), torch.arange(15).expand(4, -1) % 7),
}


def exact(model):
    """In float64, where two orders of the same sums agree to 12 digits."""
    return model.double()


def read(model, places, way, weights):
    """(hidden states at PLACES, the gradients of a weighted sum of them)"""
    model.zero_grad()
    hidden = model.hidden_states(TOKENS, *WAYS[way](), places=places)
    if places is None:
        hidden = hidden.flatten(0, 1)[PLACES]
    (hidden * weights).sum().backward()
    named = model.named_parameters()
    return hidden.detach(), {k: p.grad for k, p in named if p.grad is not None}


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
def test_places_are_rows_of_the_whole(kind, way, recomputed):
    model = exact(tiny(kind)).train()
    if recomputed:
        checkpoint_blocks(model)
    weights = torch.randn(len(PLACES), model.width, dtype=torch.float64)
    whole, slopes = read(model, None, way, weights)
    slopes = copy.deepcopy(slopes)
    hidden, found = read(model, PLACES, way, weights)
    tolerance = {"rtol": 1e-10, "atol": 1e-10} if kind == "gpt" else {"rtol": 1e-4, "atol": 1e-4}
    torch.testing.assert_close(hidden, whole, **tolerance)  # transformers' are returned in float32
    assert found.keys() == slopes.keys()
    for name, slope in slopes.items():
        torch.testing.assert_close(found[name], slope, **tolerance, msg=name)
    assert whole.abs().max() > 1 and max(s.abs().max() for s in slopes.values()) > 1


def test_behind_a_cache_too():
    model = exact(tiny("gpt"))
    whole = model.hidden_states(TOKENS)
    cache = model.new_cache(4, 15)
    last = torch.arange(4) * 9 + 8  # of each row's first 9 tokens
    first = model.hidden_states(TOKENS[:, :9], None, None, cache, last)
    torch.testing.assert_close(first, whole[:, 8], rtol=1e-10, atol=1e-10)
    assert cache.length == 9
    rest = model.hidden_states(TOKENS[:, 9:], None, None, cache, torch.tensor([5, 23]))
    torch.testing.assert_close(rest, whole[[0, 3], 14], rtol=1e-10, atol=1e-10)


def test_dropout_acts_on_both_parts_of_the_block():
    torch.manual_seed(0)
    config = gpt.GPTConfig(VOCABULARY, 48, layers=2, heads=2, width=32, dropout=0.5)
    block = gpt.GPT(config).train().blocks[-1]
    x = torch.randn(4, 15, 32)
    block.attention.dropout = 0.0
    block.mlp.contract.weight.data.zero_()
    block.mlp.contract.bias.data.zero_()
    after_attention = block.at(PLACES, x) - x.flatten(0, 1)[PLACES]
    assert 0.3 < (after_attention == 0).float().mean() < 0.7
    block.mlp.contract.bias.data.fill_(1.0)
    block.attention.project.weight.data.zero_()
    after_mlp = block.at(PLACES, x) - x.flatten(0, 1)[PLACES]
    torch.testing.assert_close(after_mlp.round().unique(), torch.tensor([0.0, 2.0]))


class StudentsBlock(gpt.Block):
    """Forgets the MLP."""

    def forward(self, x, attend=None, cache=None, layer=0):
        return x + self.attention(self.norm_1(x), attend, cache, layer)


@pytest.mark.parametrize("recomputed", [False, True])
def test_a_students_block_is_used_in_the_last_layer_too(recomputed):
    model = exact(tiny("gpt"))
    for block in model.blocks:
        block.__class__ = StudentsBlock
    whole = model.hidden_states(TOKENS)
    if recomputed:
        checkpoint_blocks(model)
    hidden = model.hidden_states(TOKENS, places=PLACES)
    torch.testing.assert_close(hidden, whole.flatten(0, 1)[PLACES], rtol=0, atol=0)


def test_in_bf16_on_a_cpu_the_number_of_rows_repeats():
    """Products of the last block meet 18 rows where 17 are asked for, and 17 hidden states come."""
    model, seen = tiny("gpt"), []
    model.blocks[-1].mlp.register_forward_hook(lambda _, inputs, __: seen.append(len(inputs[0])))
    places = torch.arange(20, 37)
    exactly = model.hidden_states(TOKENS, places=places)
    model.compute_dtype = torch.bfloat16
    roughly = model.hidden_states(TOKENS, places=places)
    assert seen == [17, 18] and roughly.shape == exactly.shape and roughly.dtype == torch.float32
    whole = model.hidden_states(TOKENS).flatten(0, 1)[places]
    assert (roughly - whole).abs().max() < 0.05 < (exactly - exactly.roll(1, 0)).abs().max()
    roughly.sum().backward()
    assert model.token_embedding.weight.grad.isfinite().all()


# -------------------------------------------------------------------------------- those who ask


@pytest.mark.parametrize("pooling", ["last", "mean", "sum"])
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_rewards_are_pooled_from_all_token_scores(kind, pooling):
    model = ScalarModel.from_language_model(tiny(kind), pooling)
    expected = model.pooled(model.token_scores(TOKENS), PROMPTS, ANSWERS)
    expected.sum().backward()
    slopes = {k: p.grad.clone() for k, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    rewards = model.rewards(TOKENS, PROMPTS, ANSWERS)
    rewards.sum().backward()
    torch.testing.assert_close(rewards, expected, rtol=1e-5, atol=1e-5)
    for name, parameter in model.named_parameters():
        if name in slopes:
            torch.testing.assert_close(parameter.grad, slopes[name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("pooling", ["last", "mean", "sum"])
def test_pooling_reads_where_it_says(pooling):
    """NaN everywhere else changes nothing, and anywhere there it does."""
    model = ScalarModel.from_language_model(tiny("gpt"), pooling)
    scores = torch.randn(4, 15)
    read = model.pools(PROMPTS, ANSWERS, 15)
    assert torch.equal(
        read.sum(dim=1), torch.ones(4, dtype=torch.long) if pooling == "last" else ANSWERS
    )
    nothing = torch.full_like(scores, torch.nan)
    said = model.pooled(torch.where(read, scores, nothing), PROMPTS, ANSWERS)
    torch.testing.assert_close(said, model.pooled(scores, PROMPTS, ANSWERS), rtol=0, atol=0)
    for row, column in read.nonzero():
        spoiled = scores.clone()
        spoiled[row, column] = torch.nan
        assert model.pooled(spoiled, PROMPTS, ANSWERS)[row].isnan()


@pytest.mark.parametrize("shared", [False, True])
def test_a_students_pooling_may_read_anywhere(shared, monkeypatch):
    """As in chapter 3's gallery: the last column, a pad's in every row but the longest."""

    def last_column(token_scores, lengths):
        return token_scores[:, -1]

    monkeypatch.setattr(reward_model, "last_token_reward", last_column)
    model = ScalarModel.from_language_model(tiny("gpt"))
    prompts, answers = [[7, 8, 9]], [[[10, 11], [12, 13, 14, 15], [16]]]
    if shared:
        rewards = shared_prefix.shared_rewards(model, side_by_side(prompts, answers))[0]
    else:
        rewards = reward_stage.separate_rewards(model, prompts, answers)[0]
    assert rewards.shape == (3,) and rewards.detach().abs().min() > 0.01


@pytest.mark.parametrize("kind", KINDS)
def test_values_and_logprobs_are_those_of_the_whole_pass(kind):
    policy, critic = tiny(kind), ScalarModel.from_language_model(tiny(kind, seed=1))
    mask = action_mask(PROMPTS, ANSWERS, 15)
    with torch.no_grad():
        values = action_values(critic, TOKENS, mask)
        logprobs, _ = action_logprobs(policy, TOKENS, mask)
        wanted = torch.where(mask, critic.token_scores(TOKENS)[:, :-1], 0.0)
        logits = policy(TOKENS).log_softmax(-1)[:, :-1]
        chosen = torch.where(mask, logits.gather(-1, TOKENS[:, 1:, None])[..., 0], 0.0)
    torch.testing.assert_close(values, wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logprobs, chosen, rtol=1e-5, atol=1e-5)
    assert (values[~mask] == 0).all() and values[mask].abs().min() > 0


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("kind", ["gpt", "llama"])
def test_nobody_asked(kind, dtype):
    """A rank without answers: no value, and a gradient of 0 for whoever waits for one."""
    critic = ScalarModel.from_language_model(tiny(kind))
    critic.backbone.compute_dtype = dtype
    values = action_values(critic, TOKENS, torch.zeros(4, 14, dtype=torch.bool))
    assert values.shape == (4, 14) and not values.any()
    values.sum().backward()
    assert not critic.head.weight.grad.any()
