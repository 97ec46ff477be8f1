"""Chapter 4's exercises: masks, log-probabilities, KL, rewards, advantages."""

import math

import torch
from torch import tensor

from rlhf_course.coursework.expect import agrees, exercise, raises, same

NAN, INF = float("nan"), float("inf")
YES, NO = True, False


def randn(rng, *shape):
    return torch.randn(shape, generator=rng)


def randint(rng, low, high, *shape):
    """Integers, low … high."""
    return torch.randint(low, high + 1, shape, generator=rng)


def answers(rng, rows, columns):
    """A mask of random answers: some prompt, at least one action, some pads."""
    mask = torch.zeros(rows, columns, dtype=torch.bool)
    for row in mask:
        first, last = sorted(randint(rng, 0, columns - 1, 2).tolist())
        row[first : last + 1] = True
    return mask


def dialogues(rng, rows, columns):
    """A mask with gaps, as a dialogue of several turns has them; no row is empty."""
    mask = torch.rand(rows, columns, generator=rng) < 0.6
    mask[torch.arange(rows), randint(rng, 0, columns - 1, rows)] = True
    return mask


# ------------------------------------------------------------------------------------ action_mask


def mask_by_tokens(prompt_lengths, response_lengths, length):
    """Mark the emitter of every token that belongs to the answer, one after the other."""
    mask = torch.zeros(len(prompt_lengths), length - 1, dtype=torch.bool)
    pairs = zip(prompt_lengths.tolist(), response_lengths.tolist(), strict=True)
    for b, (prompt, response) in enumerate(pairs):
        for token in range(prompt, prompt + response):
            mask[b, token - 1] = True  # token a+1 was emitted by action a
    return mask


@exercise("mdp.action_mask", core=True)
def test_the_actions_of_one_answer(subject):
    """a prompt of 2 and an answer of 3 tokens: the actions are 1, 2 and 3"""
    args = tensor([2]), tensor([3]), 6
    same(subject.action_mask, args, tensor([[NO, YES, YES, YES, NO]]))


@exercise("mdp.action_mask", core=True)
def test_an_answer_to_a_prompt_of_one_token(subject):
    """the prompt's last token emits the first token of the answer"""
    same(subject.action_mask, (tensor([1]), tensor([1]), 3), tensor([[YES, NO]]))


@exercise("mdp.action_mask")
def test_the_mask_of_a_row_that_is_full(subject):
    """the action that emits the last token, the EOS, is one of them"""
    same(subject.action_mask, (tensor([2]), tensor([2]), 4), tensor([[NO, YES, YES]]))


@exercise("mdp.action_mask")
def test_the_masks_of_rows_of_other_lengths(subject):
    """every row has its own lengths"""
    expected = tensor([[YES, NO, NO, NO], [NO, YES, YES, NO], [NO, NO, NO, YES]])
    args = tensor([1, 2, 4]), tensor([1, 2, 1]), 5
    same(subject.action_mask, args, expected)


@exercise("mdp.action_mask")
def test_the_mask_of_an_empty_answer(subject):
    """an answer of no tokens has no action"""
    args = tensor([2, 3]), tensor([0, 1]), 5
    same(subject.action_mask, args, tensor([[NO] * 4, [NO, NO, YES, NO]]))


@exercise("mdp.action_mask")
def test_the_masks_of_random_lengths(subject, rng):
    """any batch: marked is what emitted a token of the answer"""
    for rows, length in ((1, 4), (3, 6), (9, 12)):
        prompts = randint(rng, 1, length - 1, rows)
        responses = torch.stack([randint(rng, 0, length - int(p), 1)[0] for p in prompts])
        args = prompts, responses, length
        same(subject.action_mask, args, mask_by_tokens(*args))


# --------------------------------------------------------------------------------- token_logprobs


def logprobs_by_hand(logits, tokens, temperature=1.0):
    """Action by action: log of exp(z / T) over their sum, the largest taken out first."""
    rows = []
    for b in range(tokens.shape[0]):
        row = []
        for a in range(tokens.shape[1] - 1):
            z = logits[b, a] / temperature
            z = z - z.max().detach()
            row.append(z[tokens[b, a + 1]] - torch.log(torch.exp(z).sum()))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@exercise("mdp.token_logprobs", core=True)
def test_the_logprob_of_a_fair_coin(subject):
    """two equal logits: every token has log 1/2"""
    args = torch.zeros(1, 3, 2), tensor([[0, 1, 0]])
    same(subject.token_logprobs, args, tensor([[-math.log(2), -math.log(2)]]))


@exercise("mdp.token_logprobs", core=True)
def test_the_logprob_of_the_token_that_came_next(subject):
    """the logits at a position speak of the token behind it"""
    p = tensor([[[0.25, 0.75], [0.1, 0.9], [0.5, 0.5]]])
    expected = tensor([[math.log(0.75), math.log(0.1)]])
    same(subject.token_logprobs, (p.log(), tensor([[0, 1, 0]])), expected)


@exercise("mdp.token_logprobs")
def test_the_logprobs_at_a_temperature(subject):
    """the temperature divides the logits, before anything else"""
    logits = tensor([[[0.0, math.log(3)], [0.0, 0.0]]])
    args, expected = (logits, tensor([[0, 1]])), tensor([[math.log(0.9)]])
    same(subject.token_logprobs, args, expected, {"temperature": 0.5})
    same(subject.token_logprobs, (logits, tensor([[0, 0]])), tensor([[math.log(0.1)]]),
         {"temperature": 0.5})  # fmt: skip


@exercise("mdp.token_logprobs")
def test_the_golden_logprobs(subject, golden):
    """two rows computed elsewhere, at two temperatures"""
    case = golden("G01")
    mask = case.expected["action_mask"].bool()

    def actions(out):
        return torch.where(mask, out, 0.0) if out.shape == mask.shape else out

    for temperature in case.inputs["temperatures"].tolist():
        args = case.inputs["logits"], case.inputs["tokens"].long(), temperature
        expected = case.expected[f"T={temperature}"]["action_logprobs"]
        same(subject.token_logprobs, args, expected, pick=actions)


@exercise("mdp.token_logprobs")
def test_the_logprobs_of_huge_logits(subject):
    """huge logits give no infinity"""
    logits = tensor([[[1000.0, -1000.0, 0.0]] * 3])
    same(subject.token_logprobs, (logits, tensor([[0, 1, 2]])), tensor([[-2000.0, -1000.0]]))


@exercise("mdp.token_logprobs")
def test_the_logprobs_of_half_precision(subject):
    """logits in half precision are read in float32"""
    logits = tensor([[[4.3, 0.2, -2.0]] * 3])
    for dtype in (torch.bfloat16, torch.float16):
        args = logits.to(dtype), tensor([[0, 1, 2]])
        expected = logprobs_by_hand(args[0].double(), args[1]).float()
        same(subject.token_logprobs, args, expected, rtol=2e-5)


@exercise("mdp.token_logprobs")
def test_value_and_gradient_of_logprobs(subject, rng):
    """value and gradient on any batch, at any temperature"""
    for (b, t, v), temperature in (((1, 2, 2), 1.0), ((1, 3, 4), 0.7), ((4, 6, 9), 2.5)):
        args = randn(rng, b, t, v), randint(rng, 0, v - 1, b, t), temperature
        agrees(subject.token_logprobs, logprobs_by_hand, args, wrt=(0,))


# ------------------------------------------------------------------------------------ kl_estimate


def kl_by_hand(logprobs, ref_logprobs, kind="k1"):
    """The three formulas, with the ratio r = ref / pi."""
    log_r = ref_logprobs - logprobs
    return {"k1": -log_r, "k2": 0.5 * log_r * log_r, "k3": torch.exp(log_r) - 1 - log_r}[kind]


@exercise("mdp.kl_estimate", core=True)
def test_the_kl_of_equal_policies(subject):
    """equal policies are at distance 0"""
    for kind in ("k1", "k2", "k3"):
        same(subject.kl_estimate, (tensor([-1.5]), tensor([-1.5]), kind), tensor([0.0]))


@exercise("mdp.kl_estimate", core=True)
def test_k1_of_one_action(subject):
    """k1 of one action, by hand; it is the default"""
    same(subject.kl_estimate, (tensor([-1.0]), tensor([-1.5]), "k1"), tensor([0.5]))
    same(subject.kl_estimate, (tensor([-2.0]), tensor([-1.0])), tensor([-1.0]))


@exercise("mdp.kl_estimate")
def test_k2_of_one_action(subject):
    """k2 of one action, by hand"""
    same(subject.kl_estimate, (tensor([-1.0]), tensor([-1.5]), "k2"), tensor([0.125]))
    same(subject.kl_estimate, (tensor([-4.0]), tensor([-1.0]), "k2"), tensor([4.5]))


@exercise("mdp.kl_estimate")
def test_k3_of_one_action(subject):
    """k3 of one action, by hand"""
    args = tensor([0.0]), tensor([-1.0]), "k3"
    same(subject.kl_estimate, args, tensor([math.exp(-1)]))
    same(subject.kl_estimate, (tensor([-1.0]), tensor([0.0]), "k3"), tensor([math.e - 2]))


@exercise("mdp.kl_estimate")
def test_the_expectation_of_the_estimates(subject, golden):
    """over all tokens of a policy, k1 and k3 have the KL as their mean"""
    case = golden("G02")
    p, q = case.inputs["p"], case.inputs["q"]
    for kind, mean in (("k1", "KL_p_q"), ("k3", "KL_p_q"), ("k2", "E_k2")):
        args = p.log(), q.log(), kind
        what = f"the mean of {kind} under the policy is another one"
        expected = case.expected[mean]
        same(subject.kl_estimate, args, expected, what=what, pick=lambda out: (p * out).sum())


@exercise("mdp.kl_estimate")
def test_the_golden_estimates(subject, golden):
    """seven actions computed elsewhere"""
    case = golden("G02")
    for kind in ("k1", "k2", "k3"):
        args = case.inputs["logp"], case.inputs["ref_logp"], kind
        same(subject.kl_estimate, args, case.expected["per_token"][kind])


@exercise("mdp.kl_estimate")
def test_value_and_gradient_of_the_estimates(subject, rng):
    """value and gradient by both arguments, in any shape"""
    for shape in ((1,), (), (2, 3), (2, 3, 4)):
        for kind in ("k1", "k2", "k3"):
            args = randn(rng, *shape) - 2, randn(rng, *shape) - 2, kind
            agrees(subject.kl_estimate, kl_by_hand, args, wrt=(0, 1))


@exercise("mdp.kl_estimate", weight=0.5)
def test_another_kind_is_refused(subject):
    """another kind than these three is refused with a ValueError"""
    raises(subject.kl_estimate, (tensor([0.0]), tensor([0.0]), "k4"))


# ---------------------------------------------------------------------------------- token_rewards


def rewards_by_hand(scores, kl, mask, kl_coef, score_clip=None):
    """Action by action."""
    rewards = torch.zeros_like(kl)
    for b, row in enumerate(mask.tolist()):
        actions = [a for a, valid in enumerate(row) if valid]
        for a in actions:
            rewards[b, a] = -kl_coef * kl[b, a]
        score = scores[b]
        if score_clip is not None:
            score = min(max(score, -score_clip), score_clip)
        rewards[b, actions[-1]] += score
    return rewards


@exercise("mdp.token_rewards", core=True)
def test_the_score_comes_at_the_last_action(subject):
    """the score is paid at the answer's last action"""
    args = tensor([2.0]), torch.zeros(1, 5), tensor([[NO, YES, YES, NO, NO]]), 0.1
    same(subject.token_rewards, args, tensor([[0.0, 0.0, 2.0, 0.0, 0.0]]))


@exercise("mdp.token_rewards", core=True)
def test_every_action_pays_for_its_kl(subject):
    """every action pays for its own KL, the last one too"""
    args = tensor([1.0]), tensor([[0.5, -0.25, 1.0]]), tensor([[YES, YES, YES]]), 0.1
    same(subject.token_rewards, args, tensor([[-0.05, 0.025, 0.9]]))


@exercise("mdp.token_rewards")
def test_the_score_is_clipped_and_the_kl_is_not(subject):
    """the score is clipped, on both sides, and the KL is not"""
    kl, mask = tensor([[30.0, 20.0]]), tensor([[YES, YES]])
    for score, clipped in ((12.0, 5.0), (-12.0, -5.0), (3.0, 3.0)):
        args = tensor([score]), kl, mask, 1.0, 5.0
        same(subject.token_rewards, args, tensor([[-30.0, clipped - 20.0]]))
    same(subject.token_rewards, (tensor([12.0]), kl, mask, 1.0), tensor([[-30.0, -8.0]]))


@exercise("mdp.token_rewards")
def test_rewards_outside_the_answer(subject):
    """prompt and pads get 0, whatever KL stands there"""
    mask = tensor([[NO, YES, YES, NO]])
    for odd in (7.0, NAN, INF):
        args = tensor([1.0]), tensor([[odd, 0.5, 0.5, odd]]), mask, 0.1
        same(subject.token_rewards, args, tensor([[0.0, -0.05, 0.95, 0.0]]))


@exercise("mdp.token_rewards")
def test_the_rewards_of_a_dialogue(subject):
    """an answer of two turns gets its score at the very end"""
    mask = tensor([[YES, NO, NO, YES, NO]])
    args = tensor([1.0]), tensor([[0.5, 9.0, 9.0, -0.5, 9.0]]), mask, 0.2
    same(subject.token_rewards, args, tensor([[-0.1, 0.0, 0.0, 1.1, 0.0]]))


@exercise("mdp.token_rewards")
def test_the_golden_rewards(subject, golden):
    """three answers computed elsewhere"""
    case = golden("G03")
    scores, kl, mask = (case.inputs[k] for k in ("score", "kl", "action_mask"))
    args = scores, kl, mask.bool(), case.inputs["beta"], case.inputs["reward_clip"]
    same(subject.token_rewards, args, case.expected["rewards"])


@exercise("mdp.token_rewards")
def test_the_rewards_of_random_answers(subject, rng):
    """any batch of answers"""
    for (rows, columns), clip in (((1, 3), None), ((3, 5), 0.5), ((8, 9), 1.0)):
        mask = answers(rng, rows, columns)
        args = 2 * randn(rng, rows), randn(rng, rows, columns), mask, 0.3, clip
        agrees(subject.token_rewards, rewards_by_hand, args)


@exercise("mdp.token_rewards", weight=0.5)
def test_an_empty_answer_is_refused(subject):
    """an empty answer is refused with a ValueError"""
    mask = tensor([[YES, YES], [NO, NO]])
    raises(subject.token_rewards, (tensor([1.0, 1.0]), torch.zeros(2, 2), mask, 0.1))


# -------------------------------------------------------------------------------------------- gae


def gae_by_sums(rewards, values, mask, gamma=1.0, lam=0.95):
    """A_t = sum over l of (gamma lam)^l delta_{t+l}, row by row, over the valid actions alone."""
    advantages, returns = torch.zeros_like(values), torch.zeros_like(values)
    for b, row in enumerate(mask.tolist()):
        places = [a for a, valid in enumerate(row) if valid]
        r, v = rewards[b, places], values[b, places]
        following = torch.cat([v[1:], torch.zeros_like(v[:1])])
        delta = r + gamma * following - v
        for i, place in enumerate(places):
            total = sum((gamma * lam) ** (j - i) * delta[j] for j in range(i, len(places)))
            advantages[b, place], returns[b, place] = total, total + v[i]
    return advantages, returns


@exercise("mdp.gae", core=True)
def test_the_advantage_of_one_action(subject):
    """one action: its advantage is reward minus value, its return the reward"""
    args = tensor([[1.0]]), tensor([[0.4]]), tensor([[YES]])
    same(subject.gae, args, (tensor([[0.6]]), tensor([[1.0]])))


@exercise("mdp.gae", core=True)
def test_the_advantages_of_two_actions(subject):
    """two actions, by hand"""
    args = tensor([[0.0, 1.0]]), tensor([[0.5, 0.6]]), tensor([[YES, YES]]), 1.0, 0.5
    # delta = (0.1, 0.4), A = (0.1 + 0.5 * 0.4, 0.4)
    same(subject.gae, args, (tensor([[0.3, 0.4]]), tensor([[0.8, 1.0]])))


@exercise("mdp.gae")
def test_lambda_0_and_lambda_1(subject):
    """λ = 0 looks one action ahead, λ = 1 to the end"""
    rewards, values = tensor([[0.25, 0.5, 1.0]]), tensor([[0.5, 0.25, 0.75]])
    mask = tensor([[YES, YES, YES]])
    one_step = tensor([[0.0, 1.0, 0.25]]), tensor([[0.5, 1.25, 1.0]])
    same(subject.gae, (rewards, values, mask, 1.0, 0.0), one_step)
    to_the_end = tensor([[1.25, 1.25, 0.25]]), tensor([[1.75, 1.5, 1.0]])
    same(subject.gae, (rewards, values, mask, 1.0, 1.0), to_the_end)


@exercise("mdp.gae")
def test_gamma_discounts(subject):
    """γ discounts both the rewards to come and the next value"""
    args = tensor([[0.0, 0.0, 1.0]]), torch.zeros(1, 3), tensor([[YES, YES, YES]]), 0.5, 1.0
    discounted = tensor([[0.25, 0.5, 1.0]])
    same(subject.gae, args, (discounted, discounted))
    args = tensor([[0.0, 0.0]]), tensor([[0.0, 1.0]]), tensor([[YES, YES]]), 0.5, 0.0
    same(subject.gae, args, (tensor([[0.5, -1.0]]), tensor([[0.5, 0.0]])))


@exercise("mdp.gae")
def test_no_value_behind_the_last_action(subject):
    """behind the last action nothing is to come, whatever stands on the pads"""
    mask = tensor([[NO, YES, YES, NO]])
    for odd in (5.0, NAN, INF):
        rewards, values = tensor([[odd, 0.0, 1.0, odd]]), tensor([[odd, 0.5, 0.6, odd]])
        expected = tensor([[0.0, 0.3, 0.4, 0.0]]), tensor([[0.0, 0.8, 1.0, 0.0]])
        same(subject.gae, (rewards, values, mask, 1.0, 0.5), expected)


@exercise("mdp.gae")
def test_a_gap_between_two_turns(subject):
    """in a dialogue the next action is the next valid one, across the gap"""
    mask = tensor([[YES, NO, NO, YES]])
    args = tensor([[0.0, 3.0, 3.0, 1.0]]), tensor([[0.5, 9.0, 9.0, 0.6]]), mask, 1.0, 0.5
    expected = tensor([[0.3, 0.0, 0.0, 0.4]]), tensor([[0.8, 0.0, 0.0, 1.0]])
    same(subject.gae, args, expected)


@exercise("mdp.gae")
def test_the_golden_advantages(subject, golden):
    """two answers and a dialogue computed elsewhere, for four pairs of γ and λ"""
    case = golden("G04")
    rewards, values, mask = (case.inputs[k] for k in ("rewards", "values", "action_mask"))
    for gamma, lam in ((1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (1.0, 0.0)):
        expected = case.expected[f"gamma={gamma},lam={lam}"]
        both = expected["advantages"], expected["returns"]
        same(subject.gae, (rewards, values, mask.bool(), gamma, lam), both)


@exercise("mdp.gae")
def test_the_advantages_of_random_answers(subject, rng):
    """any batch of answers and dialogues"""
    for rows, columns in ((1, 3), (3, 4), (6, 8)):
        for mask in (answers(rng, rows, columns), dialogues(rng, rows, columns)):
            gamma, lam = (0.5 + 0.5 * torch.rand(2, generator=rng)).tolist()
            rewards, values = randn(rng, rows, columns), randn(rng, rows, columns)
            agrees(subject.gae, gae_by_sums, (rewards, values, mask, gamma, lam))


# ---------------------------------------------------------------------------- sequence_advantages


def sequence_by_hand(scores, kl, values, mask, kl_coef, kl_reduction="sum"):
    """Answer by answer."""
    advantages, returns = torch.zeros_like(kl), torch.zeros_like(scores)
    for b, row in enumerate(mask):
        total = sum(kl[b, a] for a in row.nonzero().flatten().tolist())
        if kl_reduction == "mean":
            total = total / int(row.sum())
        returns[b] = scores[b] - kl_coef * total
        for a in row.nonzero().flatten().tolist():
            advantages[b, a] = returns[b] - values[b]
    return advantages, returns


@exercise("mdp.sequence_advantages", core=True)
def test_one_advantage_for_every_token(subject):
    """R is the score less the KL's price, A = R - V, the same at every token"""
    kl, mask = tensor([[1.0, 2.0]]), tensor([[YES, YES]])
    args = tensor([2.0]), kl, tensor([0.5]), mask, 0.1
    same(subject.sequence_advantages, args, (tensor([[1.2, 1.2]]), tensor([1.7])))


@exercise("mdp.sequence_advantages")
def test_the_mean_kl_of_an_answer(subject):
    """the reduction "mean" divides by the answer's own length"""
    kl, mask = tensor([[1.0, 2.0, 9.0]]), tensor([[YES, YES, NO]])
    args = tensor([2.0]), kl, tensor([0.5]), mask, 0.1, "mean"
    expected = tensor([[1.35, 1.35, 0.0]]), tensor([1.85])
    same(subject.sequence_advantages, args, expected)


@exercise("mdp.sequence_advantages")
def test_a_shared_advantage_stays_in_the_answer(subject):
    """prompt and pads get 0 and count for nothing, whatever KL stands there"""
    mask = tensor([[NO, YES, YES, NO]])
    for odd in (5.0, NAN, INF):
        args = tensor([2.0]), tensor([[odd, 1.0, 2.0, odd]]), tensor([0.5]), mask, 0.1
        expected = tensor([[0.0, 1.2, 1.2, 0.0]]), tensor([1.7])
        same(subject.sequence_advantages, args, expected)


@exercise("mdp.sequence_advantages")
def test_every_answer_has_its_own_advantage(subject):
    """two answers: each has its own score, KL and value"""
    kl = tensor([[1.0, 0.0], [0.0, 4.0]])
    args = tensor([1.0, 3.0]), kl, tensor([0.0, 2.0]), torch.ones(2, 2).bool(), 0.5
    expected = tensor([[0.5, 0.5], [-1.0, -1.0]]), tensor([0.5, 1.0])
    same(subject.sequence_advantages, args, expected)


@exercise("mdp.sequence_advantages")
def test_the_golden_shared_advantages(subject, golden):
    """two answers computed elsewhere"""
    case = golden("G14")
    old, ref, mask = (case.inputs[k] for k in ("logp_old", "logp_ref", "action_mask"))
    args = case.inputs["score"], old - ref, case.inputs["value"], mask.bool(), case.inputs["beta"]
    expected = case.expected["adv_sum"][:, None] * mask, case.expected["reward_sum"]
    same(subject.sequence_advantages, args, expected)


@exercise("mdp.sequence_advantages")
def test_the_shared_advantages_of_random_answers(subject, rng):
    """any batch of answers, with both reductions"""
    for rows, columns in ((1, 3), (3, 4), (7, 9)):
        for reduction in ("sum", "mean"):
            mask = answers(rng, rows, columns)
            kl, kl_coef = randn(rng, rows, columns), 0.2
            args = randn(rng, rows), kl, randn(rng, rows), mask, kl_coef, reduction
            agrees(subject.sequence_advantages, sequence_by_hand, args)
