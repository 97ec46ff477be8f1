"""Chapter 3's exercises: pooling, the losses on comparisons, normalisation."""

import math

import torch
from torch import tensor

from rlhf_course.coursework.expect import agrees, equal, exercise, expect, raises, same

NAN = float("nan")


def randn(rng, *shape):
    return torch.randn(*shape, generator=rng)


def randint(rng, low, high, count):
    """`count` integers, low … high."""
    return torch.randint(low, high + 1, (count,), generator=rng)


def softplus(x):
    """-log σ(-x), so that it neither overflows nor loses digits."""
    return x.clamp(min=0) + torch.log1p(torch.exp(-x.abs()))


# ------------------------------------------------------------------------------ last_token_reward


def last_by_loops(scores, lengths):
    """Row by row."""
    return torch.stack([row[n - 1] for row, n in zip(scores, lengths.tolist(), strict=True)])


@exercise("reward_model.last_token_reward", core=True)
def test_the_score_at_the_last_token(subject):
    """the score is read at the last token of the row"""
    same(subject.last_token_reward, (tensor([[1.0, 2.0, 3.0, 0.5]]), tensor([3])), tensor([3.0]))


@exercise("reward_model.last_token_reward", core=True)
def test_every_row_ends_where_its_own_length_says(subject):
    """every row ends where its own length says"""
    scores = tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])
    same(subject.last_token_reward, (scores, tensor([2, 3, 1])), tensor([2.0, 6.0, 7.0]))


@exercise("reward_model.last_token_reward")
def test_the_last_tokens_of_two_rows(subject):
    """two rows give two rewards, a vector of shape (B,)"""
    scores = tensor([[1.0, 2.0], [3.0, 4.0]])
    same(subject.last_token_reward, (scores, tensor([2, 1])), tensor([2.0, 3.0]))


@exercise("reward_model.last_token_reward")
def test_pads_behind_the_last_token_may_be_nan(subject):
    """what stands on the pads does not matter, not even NaN"""
    scores = tensor([[1.0, 2.0, NAN, NAN], [3.0, NAN, NAN, NAN]])
    same(subject.last_token_reward, (scores, tensor([2, 1])), tensor([2.0, 3.0]))


@exercise("reward_model.last_token_reward")
def test_a_row_without_pads_and_a_row_of_one_token(subject):
    """a full row and a row of a single token"""
    same(subject.last_token_reward, (tensor([[4.0]]), tensor([1])), tensor([4.0]))
    scores = tensor([[4.0, 0.0, -1.0], [0.0, 0.0, 6.0]])
    same(subject.last_token_reward, (scores, tensor([1, 3])), tensor([4.0, 6.0]))


@exercise("reward_model.last_token_reward")
def test_the_last_token_gets_all_of_the_gradient(subject, rng):
    """the gradient goes to the last token alone, on any batch"""
    cases = [(tensor([[1.0, 2.0, 3.0]]), tensor([2]))]
    cases += [(randn(rng, b, t), randint(rng, 1, t, b)) for b, t in ((1, 5), (4, 4), (7, 3))]
    for args in cases:
        agrees(subject.last_token_reward, last_by_loops, args, wrt=(0,))


# ------------------------------------------------------------------------------------ mean_reward


def mean_by_loops(scores, prompts, responses):
    """Row by row."""
    rows = zip(scores, prompts.tolist(), responses.tolist(), strict=True)
    return torch.stack([sum(row[p : p + r]) / r for row, p, r in rows])


@exercise("reward_model.mean_reward", core=True)
def test_the_mean_of_the_response(subject):
    """the mean of the response's scores: the prompt is left out"""
    args = (tensor([[9.0, 9.0, 1.0, 2.0, 6.0]]), tensor([2]), tensor([3]))
    same(subject.mean_reward, args, tensor([3.0]))


@exercise("reward_model.mean_reward", core=True)
def test_the_mean_without_pads(subject):
    """the pads are left out"""
    args = (tensor([[9.0, 1.0, 2.0, 5.0, 5.0]]), tensor([1]), tensor([2]))
    same(subject.mean_reward, args, tensor([1.5]))


@exercise("reward_model.mean_reward")
def test_every_answer_is_divided_by_its_own_length(subject):
    """every answer is divided by its own length"""
    scores = tensor([[9.0, 6.0, 0.0], [9.0, 6.0, 2.0]])
    same(subject.mean_reward, (scores, tensor([1, 1]), tensor([1, 2])), tensor([6.0, 4.0]))


@exercise("reward_model.mean_reward")
def test_outside_the_response_anything_may_stand(subject):
    """what stands on prompt and pads does not matter, not even NaN"""
    args = (tensor([[NAN, 1.0, 3.0, NAN]]), tensor([1]), tensor([2]))
    same(subject.mean_reward, args, tensor([2.0]))


@exercise("reward_model.mean_reward")
def test_an_answer_of_one_token_is_worth_its_score(subject):
    """the mean over a single token is its score, the EOS counts like any other"""
    same(subject.mean_reward, (tensor([[0.0, 5.0]]), tensor([1]), tensor([1])), tensor([5.0]))
    args = (tensor([[0.0, 0.0, 0.0, 8.0]]), tensor([2]), tensor([2]))
    same(subject.mean_reward, args, tensor([4.0]))


@exercise("reward_model.mean_reward")
def test_the_gradient_is_shared_out_over_the_response(subject, rng):
    """the gradient is shared out evenly over the response, on any batch"""
    cases = [(tensor([[1.0, 2.0, 3.0]]), tensor([1]), tensor([2]))]
    for b, t in ((1, 6), (4, 5), (6, 9)):
        prompts = randint(rng, 1, t - 1, b)
        responses = torch.stack([randint(rng, 1, t - int(p), 1)[0] for p in prompts])
        cases.append((randn(rng, b, t), prompts, responses))
    for args in cases:
        agrees(subject.mean_reward, mean_by_loops, args, wrt=(0,))


# ---------------------------------------------------------------------------------- pairwise_loss


def pairwise_by_loops(chosen, rejected, margin=None, denominator=None):
    """Pair by pair."""
    total = chosen.sum() * 0
    for n in range(len(chosen)):
        apart = 0.0 if margin is None else margin
        apart = apart[n] if isinstance(apart, torch.Tensor) and apart.dim() else apart
        total = total + softplus(rejected[n] - chosen[n] + apart)
    return total / (max(len(chosen), 1) if denominator is None else denominator)


@exercise("reward_model.pairwise_loss", core=True)
def test_equal_rewards_cost_log_2(subject):
    """two equal rewards cost log 2"""
    same(subject.pairwise_loss, (tensor([1.0]), tensor([1.0])), tensor(math.log(2)))


@exercise("reward_model.pairwise_loss", core=True)
def test_the_further_the_better_answer_is_ahead_the_less_it_costs(subject):
    """the further ahead the better answer is, the less it costs"""
    ahead, behind = tensor(0.1269280), tensor(2.1269280)  # log(1 + e^-2), log(1 + e^2)
    same(subject.pairwise_loss, (tensor([2.0]), tensor([0.0])), ahead)
    same(subject.pairwise_loss, (tensor([0.0]), tensor([2.0])), behind)


@exercise("reward_model.pairwise_loss")
def test_the_mean_over_pairs(subject, golden):
    """the mean over pairs, on the golden vector"""
    case = golden("G11")
    args = (case.inputs["chosen"].float(), case.inputs["rejected"].float())
    same(subject.pairwise_loss, args, tensor(case.expected["pair_loss"]))


@exercise("reward_model.pairwise_loss")
def test_a_margin_asks_for_more_distance(subject, golden):
    """a margin asks for more distance: a number, or one for each pair"""
    same(subject.pairwise_loss, (tensor([3.0]), tensor([1.0]), 2.0), tensor(math.log(2)))
    case = golden("G11")
    args = tuple(case.inputs[name].float() for name in ("chosen", "rejected", "margin"))
    same(subject.pairwise_loss, args, tensor(case.expected["margin_loss"]))


@exercise("reward_model.pairwise_loss")
def test_far_apart_it_stays_finite(subject):
    """rewards far apart neither overflow nor vanish"""
    for chosen, rejected, expected in ((-300.0, 0.0, 300.0), (300.0, 0.0, 0.0)):
        args = (tensor([chosen]), tensor([rejected]))
        same(subject.pairwise_loss, args, tensor(expected))
        agrees(subject.pairwise_loss, pairwise_by_loops, args, wrt=(0, 1))


@exercise("reward_model.pairwise_loss")
def test_the_denominator_of_a_step_of_many_micro_batches(subject):
    """a given denominator takes the place of the number of pairs"""
    args = (tensor([1.0, 1.0]), tensor([1.0, 1.0]))
    same(subject.pairwise_loss, args, tensor(math.log(2) / 4), {"denominator": 8})
    same(subject.pairwise_loss, args, tensor(math.log(2) / 4), {"denominator": tensor(8.0)})


@exercise("reward_model.pairwise_loss")
def test_no_pairs_cost_nothing(subject):
    """no pairs cost 0"""
    same(subject.pairwise_loss, (torch.zeros(0), torch.zeros(0)), tensor(0.0))


@exercise("reward_model.pairwise_loss")
def test_the_gradient_pulls_the_two_apart(subject, rng):
    """the gradient pulls the two answers apart, each by σ(-difference) / N"""
    agrees(subject.pairwise_loss, pairwise_by_loops, (tensor([1.0]), tensor([0.5])), wrt=(0, 1))
    for n in (1, 2, 9):
        args = (2 * randn(rng, n), 2 * randn(rng, n))
        agrees(subject.pairwise_loss, pairwise_by_loops, args, wrt=(0, 1))
        margin = {"margin": randn(rng, n).abs()}
        agrees(subject.pairwise_loss, pairwise_by_loops, args, margin, wrt=(0, 1))


# ------------------------------------------------------------------------------------- kwise_loss


def kwise_by_loops(scores, ranks, mask=None, denominator=None):
    """Pair by pair, prompt by prompt."""
    prompts, total = 0, torch.zeros((), dtype=torch.float64)
    for b in range(len(scores)):
        there = [k for k in range(scores.shape[1]) if mask is None or mask[b, k]]
        pairs = [(i, j) for i in there for j in there if ranks[b, i] < ranks[b, j]]
        if pairs:
            prompts += 1
            total = total + sum(softplus(scores[b, j] - scores[b, i]) for i, j in pairs) / len(
                pairs
            )
    return total / (max(prompts, 1) if denominator is None else denominator)


@exercise("reward_model.kwise_loss", core=True)
def test_two_answers_are_a_pair(subject):
    """K = 2 is the pairwise loss; a lower rank is better"""
    scores = tensor([[2.0, 0.0]])
    same(subject.kwise_loss, (scores, tensor([[0, 1]])), tensor(0.1269280))
    same(subject.kwise_loss, (scores, tensor([[1, 0]])), tensor(2.1269280))


@exercise("reward_model.kwise_loss", core=True)
def test_all_pairs_of_three(subject):
    """three answers make three pairs; their mean counts"""
    terms = [math.log1p(math.exp(-d)) for d in (1.0, 3.0, 2.0)]
    args = (tensor([[3.0, 2.0, 0.0]]), tensor([[0, 1, 2]]))
    same(subject.kwise_loss, args, tensor(sum(terms) / 3))


@exercise("reward_model.kwise_loss")
def test_a_tie_says_nothing(subject, golden):
    """tied answers are no pair, on the golden vector"""
    tied = tensor(math.log1p(math.exp(-1.0)))
    same(subject.kwise_loss, (tensor([[1.0, 0.0, 0.0]]), tensor([[0, 1, 1]])), tied)
    case = golden("G11")
    args = (case.inputs["kwise_scores"][None].float(), case.inputs["kwise_rank"][None].long())
    same(subject.kwise_loss, args, tensor(case.expected["kwise_loss"]))


@exercise("reward_model.kwise_loss")
def test_every_prompt_weighs_the_same(subject):
    """every prompt weighs the same, however many pairs it has"""
    scores, ranks = tensor([[0.0, 0.0, 0.0], [2.0, 0.0, 0.0]]), tensor([[0, 1, 2], [1, 0, 0]])
    same(subject.kwise_loss, (scores, ranks), tensor((math.log(2) + 2.1269280) / 2))


@exercise("reward_model.kwise_loss")
def test_a_prompt_without_a_pair_is_left_out(subject):
    """a prompt without any pair is left out; where no prompt has one, the loss is 0"""
    scores, ranks = tensor([[0.0, 0.0], [1.0, 5.0]]), tensor([[0, 1], [3, 3]])
    same(subject.kwise_loss, (scores, ranks), tensor(math.log(2)))
    same(subject.kwise_loss, (scores[1:], ranks[1:]), tensor(0.0))


@exercise("reward_model.kwise_loss")
def test_an_answer_that_is_not_there_is_in_no_pair(subject):
    """what the mask hides is in no pair, whatever stands there"""
    mask = {"mask": tensor([[True, True, False]])}
    for hidden in (7.0, NAN):
        args = (tensor([[2.0, 0.0, hidden]]), tensor([[1, 2, 0]]))
        same(subject.kwise_loss, args, tensor(0.1269280), mask)
        args = (tensor([[2.0, 0.0, hidden]]), tensor([[1, 2, 3]]))
        same(subject.kwise_loss, args, tensor(0.1269280), mask)


@exercise("reward_model.kwise_loss")
def test_scores_far_apart_stay_finite(subject):
    """scores far apart neither overflow nor vanish"""
    args = (tensor([[-300.0, 0.0]]), tensor([[0, 1]]))
    same(subject.kwise_loss, args, tensor(300.0))
    agrees(subject.kwise_loss, kwise_by_loops, args, wrt=(0,))


@exercise("reward_model.kwise_loss")
def test_the_denominator_counts_prompts(subject):
    """a given denominator takes the place of the number of prompts"""
    args = (torch.zeros(2, 3), tensor([[0, 1, 2], [2, 0, 1]]))
    same(subject.kwise_loss, args, tensor(math.log(2) / 4), {"denominator": 8})


@exercise("reward_model.kwise_loss")
def test_kwise_value_and_gradient(subject, rng):
    """value and gradient on any batch, with ties and missing answers"""
    agrees(subject.kwise_loss, kwise_by_loops, (tensor([[1.0, 0.0]]), tensor([[0, 1]])), wrt=(0,))
    for b, k in ((1, 4), (3, 2), (4, 5)):
        ranks = torch.randint(0, 4, (b, k), generator=rng)
        mask = torch.rand(b, k, generator=rng) < 0.8
        scores = torch.where(mask, 2 * randn(rng, b, k), NAN)
        agrees(subject.kwise_loss, kwise_by_loops, (scores, ranks, mask), wrt=(0,))
        agrees(subject.kwise_loss, kwise_by_loops, (2 * randn(rng, b, k), ranks), wrt=(0,))


# ------------------------------------------------------------------------------ normalize_rewards


@exercise("reward_model.normalize_rewards", core=True)
def test_the_bias_of_demonstrations(subject, golden):
    """ "bias": the rewards' mean becomes 0, the gain is 1"""
    same(subject.normalize_rewards, (tensor([1.0, 3.0]), "bias"), (1.0, -2.0))
    case = golden("G11")
    bias = case.expected["instructgpt_bias"]
    same(subject.normalize_rewards, (case.inputs["demo_rewards"].float(), "bias"), (1.0, bias))


@exercise("reward_model.normalize_rewards", core=True)
def test_gain_and_bias_of_samples(subject, golden):
    """ "gain_bias": mean 0 and standard deviation 1, the population's"""
    same(subject.normalize_rewards, (tensor([-3.0, 3.0]), "gain_bias"), (1 / 3, 0.0))
    case = golden("G11")
    expected = (case.expected["ziegler_gain"], case.expected["ziegler_bias"])
    samples = case.inputs["policy_samples"].float()
    same(subject.normalize_rewards, (samples, "gain_bias"), expected)


@exercise("reward_model.normalize_rewards")
def test_the_bias_is_added_after_the_gain(subject):
    """the bias is added after the gain: gain * r + bias"""
    same(subject.normalize_rewards, (tensor([10.0, 14.0]), "gain_bias"), (0.5, -6.0))


@exercise("reward_model.normalize_rewards")
def test_bias_is_the_default(subject):
    """without a method it is "bias", also on one reward or on equal ones"""
    same(subject.normalize_rewards, (tensor([2.0, 6.0]),), (1.0, -4.0))
    same(subject.normalize_rewards, (tensor([5.0]),), (1.0, -5.0))
    same(subject.normalize_rewards, (tensor([2.5, 2.5]),), (1.0, -2.5))


@exercise("reward_model.normalize_rewards")
def test_rewards_that_do_not_vary_have_no_gain(subject):
    """equal rewards cannot be brought to standard deviation 1: ValueError"""
    raises(subject.normalize_rewards, (tensor([2.5, 2.5]), "gain_bias"))


@exercise("reward_model.normalize_rewards")
def test_it_normalises(subject, rng):
    """gain * r + bias is normalised, and a better answer stays better"""
    for rewards in (tensor([1.0, 2.0, 6.0]), 3 * randn(rng, 40) - 5, 0.1 * randn(rng, 7) + 2):
        for method, std in (("bias", rewards.double().std(correction=0)), ("gain_bias", 1.0)):
            gain, bias = subject.normalize_rewards(rewards.clone(), method)
            inputs = {"rewards": rewards, "method": method}
            expect(gain > 0, "the gain must be positive", inputs, "> 0", gain)
            after = gain * rewards.double() + bias
            found = (after.mean(), after.std(correction=0))
            what = "mean and standard deviation of gain * r + bias"
            equal(found, (tensor(0.0), torch.as_tensor(std)), what, inputs, rtol=1e-3, atol=1e-4)
