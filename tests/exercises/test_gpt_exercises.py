"""Chapter 1's exercises: attention, the block, the loss, one token, whole answers."""

import math

import torch
from drivers_gpt import (
    VOCABULARY,
    answers,
    attention_with_dropout,
    draw,
    dropped,
    mean_of_the_past,
    small_model,
    through_block,
    what_attention_hears,
)
from torch import tensor

from rlhf_course.coursework.expect import agrees, equal, exercise, expect, same

I = -100  # noqa: E741 - the label that asks for nothing


def randn(rng, *shape):
    return torch.randn(*shape, generator=rng)


def randint(rng, low, high, *shape):
    """Integers, low … high."""
    return torch.randint(low, high + 1, shape, generator=rng)


# ------------------------------------------------------------------------------- causal_attention


def attention_by_loops(q, k, v, attend=None):
    """One query at a time: the softmax over the keys that it may see."""
    (B, H, T, d), S = q.shape, k.shape[2]
    if attend is not None:
        attend = attend.expand(B, H, T, S)
    rows = []
    for b in range(B):
        for h in range(H):
            for t in range(T):
                last = S - T + t
                seen = [
                    s for s in range(S) if (s <= last if attend is None else attend[b, h, t, s])
                ]
                scores = torch.stack([(q[b, h, t] * k[b, h, s]).sum() for s in seen]) / d**0.5
                weights = (scores - scores.detach().max()).exp()
                rows.append((weights[:, None] * v[b, h, seen]).sum(0) / weights.sum())
    return torch.stack(rows).view(B, H, T, v.shape[-1])


def qkv(rng, B, H, T, S, d):
    """Random queries, keys and values."""
    return randn(rng, B, H, T, d), randn(rng, B, H, S, d), randn(rng, B, H, S, d)


def one_head(*rows):
    """A (1, 1, T, d) tensor."""
    return tensor(rows)[None, None]


@exercise("gpt.causal_attention", core=True)
def test_equal_keys_give_the_mean_of_the_past(subject):
    """where all keys are alike, a position gets the mean of the values up to itself"""
    zeros = torch.zeros(1, 1, 3, 1)
    args = (zeros, zeros, one_head([1.0], [3.0], [8.0]))
    same(subject.causal_attention, args, one_head([1.0], [2.0], [4.0]))


@exercise("gpt.causal_attention", core=True)
def test_scores_are_divided_by_the_root_of_the_width(subject):
    """the weights are softmax(q·k / √d)"""
    q, k = one_head([2.0, 0.0, 0.0, 0.0]), one_head([0.0] * 4, [1.0, 0.0, 0.0, 0.0])
    v = one_head([0.0] * 4, [1.0] * 4)
    share = math.e / (1 + math.e)  # of the second key: its score is 2 / √4
    same(subject.causal_attention, (q, k, v), one_head([share] * 4))


@exercise("gpt.causal_attention")
def test_with_a_cache_the_queries_are_the_last_positions(subject):
    """fewer queries than keys: the queries are the LAST positions"""
    for T in (1, 2):
        args = (torch.zeros(1, 1, T, 1), torch.zeros(1, 1, 3, 1), one_head([1.0], [3.0], [8.0]))
        same(subject.causal_attention, args, one_head([2.0], [4.0])[:, :, 2 - T :])


@exercise("gpt.causal_attention")
def test_attend_takes_the_place_of_the_causal_rule(subject):
    """`attend` takes the place of the causal rule, True where a query may look"""
    zeros, values = torch.zeros(1, 1, 2, 1), one_head([1.0], [3.0])
    attend = tensor([[[[False, True], [True, True]]]])
    same(subject.causal_attention, (zeros, zeros, values, attend), one_head([3.0], [2.0]))


@exercise("gpt.causal_attention")
def test_attend_may_be_one_mask_for_all_heads(subject, rng):
    """`attend` may be one mask for all heads, or for the whole batch"""
    for shape in ((1, 1, 2, 3), (2, 1, 2, 3), (2, 2, 1, 3)):
        attend = torch.rand(shape, generator=rng) < 0.5
        attend[..., 1] = True
        args = (*qkv(rng, 2, 2, 2, 3, 2), attend)
        agrees(subject.causal_attention, attention_by_loops, args, wrt=(0, 1, 2))


@exercise("gpt.causal_attention")
def test_the_future_changes_nothing(subject, rng):
    """changing the last token changes nothing before it"""
    q, k, v = qkv(rng, 1, 1, 3, 3, 2)
    expected = attention_by_loops(q.double(), k.double(), v.double())[:, :, :2]
    for tensor_ in (q, k, v):
        tensor_[:, :, 2] += 5.0
    same(subject.causal_attention, (q, k, v), expected, pick=lambda out: out[:, :, :2])


@exercise("gpt.causal_attention")
def test_large_scores_do_not_overflow(subject):
    """large scores neither overflow nor give NaN"""
    q, k = one_head([100.0], [100.0]), one_head([-5.0], [5.0])
    args = (q, k, one_head([1.0], [2.0]))
    same(subject.causal_attention, args, one_head([1.0], [2.0]))


@exercise("gpt.causal_attention")
def test_dropout_falls_on_the_weights(subject, rng):
    """dropout takes away weights, and the others make up for them"""
    seed = int(randint(rng, 0, 10**6, 1))
    inputs = {"dropout": 0.5, "keys": 400, "every value": 1.0}
    got = subject.drive(attention_with_dropout, seed, 400, 0.5)
    expect(tuple(got.shape) == (8, 4), "another shape", inputs, (8, 4), tuple(got.shape))
    spread = (got - 1).abs().max() > 1e-3
    expect(spread, "nothing was dropped", inputs, "about 1, not exactly", "exactly 1")
    near = ((got - 1).abs() < 0.4).all()
    expect(near, "the sum of the weights is far from 1", inputs, "about 1", got[0, 0].item())
    got = subject.drive(attention_with_dropout, seed, 400, 0.0)
    equal(got, torch.ones(8, 4), "something was dropped though dropout is 0", {"dropout": 0.0})


@exercise("gpt.causal_attention")
def test_attention_and_gradient_on_any_batch(subject, rng):
    """value and gradient on any batch, with and without a cache"""
    for shape in ((1, 1, 2, 2, 1), (2, 3, 4, 4, 2), (2, 1, 2, 5, 3), (1, 2, 1, 4, 4)):
        agrees(subject.causal_attention, attention_by_loops, qkv(rng, *shape), wrt=(0, 1, 2))


# ---------------------------------------------------------------------------------- Block.forward


def block_by_formula(weights, x):
    """x + mixing(norm_1(x)), and to that + bending(norm_2(of that))."""

    def norm(name, x):
        scale, shift = weights[name]
        spread = ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
        return (x - x.mean(-1, keepdim=True)) / (spread + 1e-5).sqrt() * scale + shift

    x = x + mean_of_the_past(norm("norm_1", x)) @ weights["mixing"]
    return x + torch.tanh(norm("norm_2", x) @ weights["bending"])


def block_weights(rng, width):
    """Random norms and sub-layers."""
    return {
        "norm_1": (1 + randn(rng, width) / 3, randn(rng, width) / 3),
        "norm_2": (1 + randn(rng, width) / 3, randn(rng, width) / 3),
        "mixing": randn(rng, width, width),
        "bending": randn(rng, width, width),
    }


def plain_weights(attention=True, mlp=True):
    """Width 2, and numbers that can be followed by hand (see `PLAIN`)."""
    return {
        "norm_1": (torch.ones(2), torch.zeros(2)),
        "norm_2": (2 * torch.ones(2), torch.zeros(2)),
        "mixing": torch.eye(2) * attention,
        "bending": torch.eye(2) * mlp,
    }


PLAIN = {"norm_1": "scale 1, shift 0", "norm_2": "scale 2, shift 0"}


def compare_block(subject, rng, weights, x, what, story=None):
    """The answer's block against the formula: its result, its gradient, and x untouched."""
    double = {
        name: tuple(w.double() for w in weight) if isinstance(weight, tuple) else weight.double()
        for name, weight in weights.items()
    }
    start, cotangent = x.double().requires_grad_(), randn(rng, *x.shape)
    expected = block_by_formula(double, start)
    (gradient,) = torch.autograd.grad((expected * cotangent).sum(), start)
    written, got, slope = subject.drive(through_block, weights, x, cotangent)
    inputs = {"x": x} | (story or {})
    expect(not written, "it changed its input x in place", inputs, "a new tensor", "x itself")
    equal(got, expected.detach().float(), what, inputs, rtol=1e-3, atol=1e-4)
    equal(slope, gradient, f"{what}: the gradient by x", inputs, rtol=1e-2, atol=1e-3)


def stream(rng, B, T, D):
    """A stream with spread enough that its norm is well defined."""
    return randn(rng, B, T, D) + 2 * torch.arange(D) - D


@exercise("gpt.Block.forward", core=True)
def test_silent_sub_layers_leave_the_stream(subject, rng):
    """where attention and MLP say nothing, the stream passes unchanged"""
    x, story = tensor([[[1.0, -1.0], [3.0, 4.0]]]), {"attention": "says 0", "mlp": "says 0"}
    compare_block(subject, rng, plain_weights(False, False), x, "the stream", PLAIN | story)


@exercise("gpt.Block.forward", core=True)
def test_attention_is_added(subject, rng):
    """attention reads norm_1 of the stream and is added to it"""
    x = tensor([[[1.0, -1.0], [3.0, 5.0]]])
    story = {"attention": "says the mean of what it has read up to there", "mlp": "says 0"}
    what = "x + attention(norm_1(x))"
    compare_block(subject, rng, plain_weights(mlp=False), x, what, PLAIN | story)


@exercise("gpt.Block.forward", core=True)
def test_the_mlp_is_added(subject, rng):
    """the MLP reads norm_2 of the stream and is added to it"""
    x, what = tensor([[[1.0, -1.0], [3.0, 5.0]]]), "x + mlp(norm_2(x))"
    story = {"attention": "says 0", "mlp": "says tanh of what it reads"}
    compare_block(subject, rng, plain_weights(attention=False), x, what, PLAIN | story)


@exercise("gpt.Block.forward")
def test_the_mlp_reads_what_attention_has_added(subject, rng):
    """the MLP comes second: it reads the stream with attention's part in it"""
    for B, T, D in ((1, 1, 3), (1, 4, 3), (3, 5, 4)):
        compare_block(subject, rng, block_weights(rng, D), stream(rng, B, T, D), "the block")


@exercise("gpt.Block.forward")
def test_the_attention_hears_mask_cache_and_layer(subject, rng):
    """attend, cache and layer reach the attention"""
    attend = tensor([[[[True, False], [True, True]]]])
    calls, mask, cache, layer = subject.drive(
        what_attention_hears, block_weights(rng, 2), attend, 3
    )
    inputs = {"attend": attend, "cache": "a cache", "layer": 3}
    expect(mask, "`attend` does not reach the attention", inputs, "attend", "something else")
    expect(cache, "`cache` does not reach the attention", inputs, "the cache", "something else")
    expect(layer == 3, "`layer` does not reach the attention", inputs, 3, layer)
    expect(calls == 1, "the attention is asked once", inputs, 1, calls)


@exercise("gpt.Block.forward")
def test_dropout_falls_on_what_is_added(subject, rng):
    """dropout falls on what each sub-layer adds, not on the stream"""
    added = subject.drive(dropped, int(randint(rng, 0, 10**6, 1)))
    found = sorted(set(added.flatten().tolist()))
    inputs = {"dropout": 0.5, "attention adds": 1, "the MLP adds": 10}
    equal(found, [0.0, 2.0, 20.0, 22.0], "the numbers that are added", inputs)


# -------------------------------------------------------------------------------- next_token_loss


def next_token_by_loops(logits, labels, ignore=I):
    """Token by token: log Σ exp(z) - z of the next one."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, tokens in zip(logits, labels.tolist(), strict=True):
        for t in range(len(tokens) - 1):
            if tokens[t + 1] != ignore:
                top = row[t].detach().max()
                total = total + top + (row[t] - top).exp().sum().log() - row[t, tokens[t + 1]]
                count += 1
    return total / max(count, 1)


@exercise("gpt.next_token_loss", core=True)
def test_a_model_that_knows_nothing_pays_log_v(subject):
    """a model that knows nothing pays log V, in nats"""
    same(subject.next_token_loss, (torch.zeros(1, 3, 4), tensor([[1, 2, 3]])), tensor(math.log(4)))


@exercise("gpt.next_token_loss", core=True)
def test_position_t_is_asked_for_token_t_plus_1(subject):
    """position t is asked for token t + 1"""
    logits = torch.zeros(1, 3, 3)
    logits[0, 0, 1] = logits[0, 1, 2] = 20.0  # sure of token 1, then of token 2
    same(subject.next_token_loss, (logits, tensor([[0, 1, 2]])), tensor(0.0))
    same(subject.next_token_loss, (logits, tensor([[1, 2, 0]])), tensor(20.0))


@exercise("gpt.next_token_loss")
def test_ignored_labels_are_not_counted(subject):
    """ignored labels are not counted, neither above nor below the line"""
    logits = torch.zeros(1, 4, 2)
    logits[0, 1, 0] = 3.0
    expected = 3 + math.log1p(math.exp(-3))
    same(subject.next_token_loss, (logits, tensor([[0, I, 1, I]])), tensor(expected))


@exercise("gpt.next_token_loss")
def test_the_mean_is_over_tokens(subject):
    """the mean is over tokens, not of the rows' means"""
    logits = torch.zeros(2, 4, 2)
    logits[1, 2, 0] = 3.0
    labels = tensor([[0, 0, 1, 0], [I, I, I, 1]])
    expected = (3 * math.log(2) + 3 + math.log1p(math.exp(-3))) / 4
    same(subject.next_token_loss, (logits, labels), tensor(expected))


@exercise("gpt.next_token_loss")
def test_another_number_may_stand_for_nothing(subject):
    """`ignore` may be another number, also that of a token"""
    logits = torch.zeros(1, 4, 3)
    logits[0, 0, 0] = logits[0, 2, 0] = 4.0
    expected = (math.log(3) + 4 + math.log(1 + 2 * math.exp(-4))) / 2
    args = (logits, tensor([[1, 0, 2, 1]]))
    same(subject.next_token_loss, args, tensor(expected), {"ignore": 0})


@exercise("gpt.next_token_loss")
def test_nothing_counted_costs_nothing(subject):
    """where nothing is counted the loss is 0"""
    same(subject.next_token_loss, (torch.zeros(1, 3, 2), tensor([[1, I, I]])), tensor(0.0))
    same(subject.next_token_loss, (torch.zeros(2, 1, 2), tensor([[1], [0]])), tensor(0.0))


@exercise("gpt.next_token_loss")
def test_next_token_value_and_gradient(subject, rng):
    """value and gradient on any batch, large logits too"""
    args = (tensor([[[1.0, 0.0], [0.0, 2.0]]]), tensor([[0, 1]]))
    agrees(subject.next_token_loss, next_token_by_loops, args, wrt=(0,))
    for B, T in ((1, 4), (3, 5), (4, 8)):
        labels = torch.where(torch.rand(B, T, generator=rng) < 0.3, I, randint(rng, 0, 5, B, T))
        args = (2 * randn(rng, B, T, 6), labels)
        agrees(subject.next_token_loss, next_token_by_loops, args, wrt=(0,))
    args = (tensor([[[-200.0, 100.0], [0.0, 0.0]]]), tensor([[0, 0]]))
    agrees(subject.next_token_loss, next_token_by_loops, args, wrt=(0,))


# ----------------------------------------------------------------------------------- sample_token


def distribution(logits, temperature=1.0, top_k=0, top_p=1.0):
    """What is drawn from, of one row, token by token: (V,) float64."""
    odds = (logits.double() / temperature - logits.max().double() / temperature).exp().tolist()
    order = sorted(range(len(odds)), key=lambda token: -odds[token])
    kept = [t for t in order if not top_k or odds[t] >= odds[order[min(top_k, len(odds)) - 1]]]
    total, mass, nucleus = sum(odds[t] for t in kept), 0.0, []
    for token in kept:
        nucleus.append(token)
        mass += odds[token] / total
        if mass >= top_p:
            break
    probabilities = torch.zeros(len(odds), dtype=torch.float64)
    probabilities[nucleus] = tensor([odds[t] for t in nucleus], dtype=torch.float64)
    return probabilities / probabilities.sum()


def check_draws(subject, rng, logits, n=1, **how):
    """Draw n times from each row: tokens that are possible, with their log-probabilities."""
    seed, many = int(randint(rng, 0, 10**6, 1)), logits.repeat(n, 1)
    tokens, logprobs, after, _ = subject.drive(draw, many, seed, *how.values())
    inputs = {"logits": logits} | how
    B, expect_ = len(many), torch.stack([distribution(row, **how) for row in logits]).repeat(n, 1)
    shapes = [tuple(tokens.shape), tuple(logprobs.shape)]
    expect(shapes == [(B,), (B,)], "another shape than (B,)", inputs, [(B,), (B,)], shapes)
    equal(after[: len(logits)], logits, "it changed the logits in place", inputs)
    odds = expect_.gather(1, tokens[:, None])[:, 0]
    bad = sorted(set(tokens[odds == 0].tolist()))
    what = "a token was drawn that is not among the kept ones"
    expect(not bad, what, inputs, [row.nonzero()[:, 0].tolist() for row in expect_[:1]], bad)
    equal(logprobs, odds.log(), "other log-probs than those of the distribution drawn from",
          inputs | {"token": tokens}, atol=1e-4)  # fmt: skip
    return tokens, expect_


def check_all_come(subject, rng, probabilities, **how):
    """Of 300 draws, every token that is kept comes (each has a probability of 0.1 and more)."""
    logits = tensor([probabilities]).log()
    tokens, expected = check_draws(subject, rng, logits, 300, **how)
    kept, found = expected[0].nonzero()[:, 0].tolist(), sorted(set(tokens.tolist()))
    inputs = {"probabilities": probabilities} | how
    expect(found == kept, "a token that should be kept never comes", inputs, kept, found)


@exercise("gpt.sample_token", core=True)
def test_tokens_come_as_often_as_their_probability_says(subject, rng):
    """tokens come as often as their probability says"""
    n, logits = 4000, tensor([[0.6, 0.3, 0.1]]).log()
    for temperature in (1.0, 0.5, 2.0):
        how = {"temperature": temperature}
        seed = int(randint(rng, 0, 10**6, 1))
        tokens = subject.drive(draw, logits.repeat(n, 1), seed, temperature)[0]
        expected = distribution(logits[0], temperature)
        share = tokens.flatten().bincount(minlength=3)[:3] / n
        slack = 6 * (expected * (1 - expected) / n).sqrt() + 1 / n  # six standard deviations
        inputs = {"logits": logits[0], "draws": n} | how
        near = ((share - expected).abs() <= slack).all()
        expect(near, "tokens come in other shares", inputs, expected, (10 * share).round() / 10)


@exercise("gpt.sample_token", core=True)
def test_log_probs_are_of_the_tempered_distribution(subject, rng):
    """the log-probs are those of the tempered distribution; shapes are (B,)"""
    check_draws(subject, rng, tensor([[2.0, 0.0]]), temperature=1.0)
    check_draws(subject, rng, tensor([[2.0, 0.0]]), temperature=0.5)
    for rows in (1, 2, 6):
        check_draws(subject, rng, 2 * randn(rng, rows, 5), temperature=1.7)


@exercise("gpt.sample_token")
def test_temperature_0_takes_the_likeliest(subject, rng):
    """temperature 0 takes the likeliest, with the log-prob of the untempered model"""
    for logits in (tensor([[0.0, 1.0]]), 2 * randn(rng, 4, 6)):
        tokens, logprobs, *_ = subject.drive(draw, logits, 0, 0.0)
        inputs = {"logits": logits, "temperature": 0.0}
        equal(tokens, logits.argmax(-1), "the tokens", inputs)
        equal(logprobs, logits.double().log_softmax(-1).amax(-1), "the log-probs", inputs)


@exercise("gpt.sample_token")
def test_top_k_keeps_the_likeliest(subject, rng):
    """top_k keeps the k likeliest, and what ties with the last of them"""
    check_all_come(subject, rng, [0.2, 0.5, 0.3], temperature=1.0, top_k=1)
    check_all_come(subject, rng, [0.1, 0.4, 0.3, 0.2], temperature=1.0, top_k=2)
    check_all_come(subject, rng, [0.2, 0.4, 0.2, 0.2], temperature=1.0, top_k=2)
    for everything in (0, 3, 9):
        check_all_come(subject, rng, [0.2, 0.5, 0.3], temperature=1.0, top_k=everything)


@exercise("gpt.sample_token")
def test_top_p_keeps_the_smallest_set(subject, rng):
    """top_p keeps the smallest set that reaches p, and always the likeliest"""
    for p in (0.85, 0.6, 0.45, 1.0, 0.0):
        check_all_come(subject, rng, [0.15, 0.5, 0.1, 0.25], temperature=1.0, top_k=0, top_p=p)


@exercise("gpt.sample_token")
def test_top_p_counts_what_top_k_left(subject, rng):
    """top_p counts the mass of what top_k has left"""
    for p in (0.55, 0.6):  # 0.4 of 0.7 is 0.57
        check_all_come(subject, rng, [0.1, 0.4, 0.3, 0.2], temperature=1.0, top_k=2, top_p=p)


@exercise("gpt.sample_token")
def test_every_row_is_drawn_from_itself(subject, rng):
    """every row is drawn from its own logits and cut by its own order"""
    logits = tensor([[0.7, 0.2, 0.1], [0.1, 0.2, 0.7], [0.2, 0.7, 0.1]]).log()
    for how in ((1.0, 1, 1.0), (1.0, 0, 0.6), (0.5, 2, 1.0)):
        names = ("temperature", "top_k", "top_p")
        check_draws(subject, rng, logits, 20, **dict(zip(names, how, strict=True)))


@exercise("gpt.sample_token")
def test_the_generator_decides(subject, rng):
    """the generator decides: the same one draws the same, torch's own is left alone"""
    logits, seed = torch.zeros(20, 7), int(randint(rng, 0, 10**6, 1))
    tokens, _, _, elsewhere = subject.drive(draw, logits, seed)
    inputs = {"logits": "20 rows of 7 zeros", "generator": f"with seed {seed}"}
    expect(not elsewhere, "it drew from torch's own generator", inputs, "from `generator`", "not")
    again, *_ = subject.drive(draw, logits, seed)
    equal(again, tokens, "the same generator draws something else", inputs)
    other, *_ = subject.drive(draw, logits, seed + 1)
    expect((other != tokens).any(), "another seed must draw other tokens", inputs, "other", "same")


@exercise("gpt.sample_token")
def test_certain_tokens(subject, rng):
    """large logits neither overflow nor give NaN"""
    logits = tensor([[2000.0, 0.0, -2000.0]])
    for how in ((1.0, 0, 1.0), (0.5, 2, 0.9)):
        names = ("temperature", "top_k", "top_p")
        check_draws(subject, rng, logits, **dict(zip(names, how, strict=True)))


# --------------------------------------------------------------------------------------- generate

NEVER = VOCABULARY  # an EOS that no model can say
GREEDY = {"temperature": 0.0}


def said(subject, seed, prompts, limit, eos, how, **more):
    """What the answer generates, and how a mismatch names the call. Lists of the right lengths."""
    out = subject.drive(answers, seed, prompts, limit, eos, how, *more.values())
    inputs = {"prompts": prompts, "max_new_tokens": limit, "eos_id": eos} | how
    inputs |= {name: value for name, value in more.items() if value is not None}
    counts = [len(part) for part in out[:3]]
    expect(counts == [len(prompts)] * 3, "one answer to each prompt", inputs, len(prompts), counts)
    pairs = [[len(a), len(b)] for a, b in zip(out[0], out[1], strict=True)]
    fits = all(a == b for a, b in pairs)
    expect(fits, "one log-prob for each token of an answer", inputs, "equal lengths", pairs)
    return out, inputs


def before_each_token(seed, prompt, answer):
    """What the model says before each token of an answer, reading all of it: (n, V)."""
    with torch.no_grad():
        logits = small_model(seed)(tensor([prompt + answer]))[0]
    return logits[len(prompt) - 1 : -1]


def check_likeliest(seed, prompts, responses, inputs):
    """Every token is the likeliest after all that stands before it (or as good as)."""
    for prompt, answer in zip(prompts, responses, strict=True):
        logits = before_each_token(seed, prompt, answer)
        short = logits.amax(-1) - logits.gather(-1, tensor(answer)[:, None])[:, 0]
        for n, gap in enumerate(short.tolist()):
            story = inputs | {"prompt": prompt, "so far": answer[:n]}
            what = "not the likeliest token after all that stands before it"
            expect(gap < 1e-3, what, story, logits[n].argmax().item(), answer[n])


def check_logprobs(seed, prompts, out, how, inputs):
    """The log-probs are the full model's, under the distribution that was drawn from."""
    temperature, top_k = how.get("temperature", 1.0), how.get("top_k", 0)
    for prompt, answer, logprobs in zip(prompts, out[0], out[1], strict=True):
        logits = before_each_token(seed, prompt, answer)
        logp = (logits.double() / temperature).log_softmax(-1)
        if top_k:
            logp = torch.stack([distribution(row, temperature, top_k).log() for row in logits])
        wanted = logp.gather(-1, tensor(answer)[:, None])[:, 0]
        story = inputs | {"prompt": prompt, "answer": answer}
        what = "not the log-probs of a model that reads everything"
        equal(tensor(logprobs), wanted, what, story, rtol=1e-3, atol=1e-3)


def some_prompts(rng, *lengths):
    """Random prompts of these lengths."""
    return [randint(rng, 0, VOCABULARY - 1, n).tolist() for n in lengths]


def a_seed(rng):
    """Of a model, or of a generator."""
    return int(randint(rng, 0, 10**6, 1))


@exercise("gpt.generate", core=True)
def test_greedy_takes_the_likeliest_after_everything_before(subject, rng):
    """greedy: every token is the likeliest after all that stands before it"""
    seed, prompts = a_seed(rng), some_prompts(rng, 3)
    for limit in (1, 2, 8):
        out, inputs = said(subject, seed, prompts, limit, NEVER, GREEDY)
        check_likeliest(seed, prompts, out[0], inputs)
        expect(len(out[0][0]) == limit, "the answer's length", inputs, limit, len(out[0][0]))


@exercise("gpt.generate", core=True)
def test_ragged_prompts_are_answered_as_if_alone(subject, rng):
    """prompts of unequal lengths are answered as if each were alone"""
    seed, prompts = a_seed(rng), some_prompts(rng, 2, 5, 1, 4)
    out, inputs = said(subject, seed, prompts, 6, NEVER, GREEDY)
    check_likeliest(seed, prompts, out[0], inputs)
    check_logprobs(seed, prompts, out, {}, inputs)


@exercise("gpt.generate")
def test_log_probs_are_the_full_models(subject, rng):
    """sampled: the log-probs are those of a model that reads everything anew"""
    seed, prompts = a_seed(rng), some_prompts(rng, 3, 3, 1)
    for how in ({}, {"temperature": 1.7}, {"temperature": 0.8, "top_k": 3}):
        out, inputs = said(subject, seed, prompts, 5, NEVER, how)
        check_logprobs(seed, prompts, out, how, inputs)


def first_said(seed, prompts, limit):
    """Greedy answers without an end, token by token, everything read anew each time."""
    model, found = small_model(seed), []
    for prompt in prompts:
        tokens = list(prompt)
        for _ in range(limit):
            with torch.no_grad():
                tokens.append(model(tensor([tokens]))[0, -1].argmax().item())
        found.append(tokens[len(prompt) :])
    return found


@exercise("gpt.generate")
def test_eos_ends_an_answer_and_belongs_to_it(subject, rng):
    """an answer ends with the first EOS, which belongs to it; `finished` says so"""
    seed, prompts = a_seed(rng), some_prompts(rng, 3)
    free = first_said(seed, prompts, 4)[0]
    for eos in (free[0], free[2]):
        cut = free[: free.index(eos) + 1]
        out, inputs = said(subject, seed, prompts, 4, eos, GREEDY)
        equal(out[0], [cut], "the answer", inputs)
        equal(out[2], [True], "finished", inputs)


@exercise("gpt.generate")
def test_the_limit_ends_an_answer_too(subject, rng):
    """after max_new_tokens an answer ends unfinished; EOS as the last that fits counts"""
    seed, prompts = a_seed(rng), some_prompts(rng, 2)
    free = first_said(seed, prompts, 3)[0]
    cases = [(limit, NEVER, False) for limit in (1, 3)]
    fits = free.index(free[2]) + 1
    cases.append((fits, free[2], True))
    for limit, eos, finished in cases:
        out, inputs = said(subject, seed, prompts, limit, eos, GREEDY)
        equal(out[0], [free[:limit]], "the answer", inputs)
        equal(out[2], [finished], "finished", inputs)


@exercise("gpt.generate")
def test_rows_go_on_when_others_have_finished(subject, rng):
    """rows go on unharmed when others have finished"""
    how, limit = {"temperature": 4.0}, 12  # nearly flat
    for lengths in ((2, 4, 1, 3), (2, 4, 1, 3) * 2):
        seed, prompts = a_seed(rng), some_prompts(rng, *lengths)
        more = {"batch_size": None, "draw_seed": a_seed(rng)}
        with torch.no_grad():  # an EOS that is likely, so that rows end one after the other
            eos = sum(small_model(seed)(tensor([p]))[0, -1] for p in prompts).argmax().item()
        out, inputs = said(subject, seed, prompts, limit, eos, how, **more)
        for prompt, answer, finished in zip(prompts, out[0], out[2], strict=True):
            story = inputs | {"prompt": prompt, "answer": answer}
            expect(eos not in answer[:-1], "it goes on behind EOS", story, eos, answer)
            ends = bool(answer) and answer[-1] == eos
            expect(finished is ends, "`finished` is wrong", story, ends, finished)
            what = "an answer that is neither finished nor as long as it may be"
            expect(ends or len(answer) == limit, what, story, limit, len(answer))
        check_logprobs(seed, prompts, out, how, inputs)


@exercise("gpt.generate")
def test_prompts_are_read_once(subject, rng):
    """the prompts are read once, then one token of each row a step, until all have finished"""
    seed, prompts = a_seed(rng), some_prompts(rng, 3, 2)
    out, inputs = said(subject, seed, prompts, 4, NEVER, GREEDY)
    what = "(rows, tokens) that the model was given, step by step"
    equal(out[3], [[2, 3], [2, 1], [2, 1], [2, 1]], what, inputs)
    eos = first_said(seed, prompts[:1], 1)[0][0]
    out, inputs = said(subject, seed, [prompts[0]] * 2, 4, eos, GREEDY)
    equal(out[3], [[2, 3]], what, inputs)


@exercise("gpt.generate")
def test_settings_reach_the_sampling(subject, rng):
    """temperature, top_k, top_p and generator reach the sampling"""
    seed, prompts, limit = a_seed(rng), some_prompts(rng, 2) * 8, 5
    flat = {"temperature": 5.0}
    for how in (flat | {"top_k": 1}, flat | {"top_p": 0.0}):
        out, inputs = said(subject, seed, prompts, limit, NEVER, how)
        equal(out[1], [[0.0] * limit] * 8, "the log-prob of the only token that is kept", inputs)
    subject.begin(0)
    seeds = {"batch_size": None, "draw_seed": a_seed(rng)}
    first, inputs = said(subject, seed, prompts, limit, NEVER, flat, **seeds)
    again, _ = said(subject, seed, prompts, limit, NEVER, flat, **seeds)
    equal(again[0], first[0], "the same generator gives other answers", inputs)
    alike = len({tuple(answer) for answer in first[0]}) < 4
    expect(not alike, "equal prompts get the same answer", inputs, "different ones", first[0][:2])


@exercise("gpt.generate")
def test_batches_do_not_change_an_answer(subject, rng):
    """in batches the answers are the same, in the order of the prompts"""
    seed, prompts = a_seed(rng), some_prompts(rng, 2, 4, 1, 3, 3)
    for size in (2, 1):
        out, inputs = said(subject, seed, prompts, 4, NEVER, GREEDY, batch_size=size)
        check_likeliest(seed, prompts, out[0], inputs)
