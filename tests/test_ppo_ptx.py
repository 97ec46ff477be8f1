"""Chapter 06: the pretraining term, running moments, PopArt; over two processes too."""

import copy
import json
import math

import numpy as np
import pytest
import torch
from ranks import on_two_ranks
from torch.autograd import gradcheck

from rlhf_course import mdp, ppo_ptx

NAN = float("nan")
DOUBLE = torch.float64


def close(actual, expected, tol=1e-12):
    actual = torch.as_tensor(actual, dtype=DOUBLE)
    expected = torch.as_tensor(expected, dtype=DOUBLE)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol)


def draw(*shape, seed, dtype=DOUBLE):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


# --------------------------------------------------------------------------------- golden vectors


def test_g10_ptx_reductions_and_coefficients(golden):
    case = golden("G10")
    nll, mask = case.inputs["nll"], case.inputs["mask"].bool()
    policy, gamma, length = (case.inputs[k] for k in ("policy_loss", "gamma", "context_len"))
    mean, total = ppo_ptx.ptx_loss(nll, mask), ppo_ptx.ptx_loss(nll, mask, "seq_sum")
    case.matches(mean, case.expected["ptx_token_mean"])
    case.matches(total, case.expected["ptx_seq_sum_mean"])
    case.differs(mean, case.expected["ptx_seq_sum_mean"])
    case.matches(policy + gamma * mean, case.expected["total_gamma27p8_token_mean"])
    case.matches(policy + 0.05 * mean, case.expected["total_coef0p05_token_mean"])
    case.matches(0.1 * policy + 0.9 * mean, case.expected["total_coati_convex_0p9"])
    # On documents of equal length L, the sum is L times the mean: so are the coefficients.
    even = draw(3, length, seed=0).abs()
    everything = torch.ones_like(even, dtype=torch.bool)
    ratio = ppo_ptx.ptx_loss(even, everything, "seq_sum") / ppo_ptx.ptx_loss(even, everything)
    as_mean = "equivalent_token_mean_coef_if_27p8_multiplies_seq_sum_of_2048"
    as_sum = "equivalent_seq_sum_coef_if_27p8_multiplies_token_mean_of_2048"
    close(gamma * ratio, case.expected[as_mean], 1e-8)
    case.matches(gamma / ratio, case.expected[as_sum])


def test_g12_running_and_ema_moments(golden):
    case = golden("G12")
    running, ema = ppo_ptx.RunningMoments(), ppo_ptx.EMAMoments(case.inputs["ema_decay"])
    steps = (case.inputs["batches"], case.expected["trace"], case.expected["ema_bias_corrected"])
    for shards, expected, expected_ema in zip(*steps, strict=True):
        x = torch.cat([torch.as_tensor(shard, dtype=DOUBLE) for shard in shards])
        running.update(x)
        ema.update(x)
        case.matches(running.count, expected["count"])
        case.matches(running.mean, expected["mean"])
        case.matches(running.var, expected["var_population"])
        case.matches(running.std, expected["std_unbiased"])
        case.matches(running.normalize(x), expected["batch_scaled_only"])
        case.matches(running.normalize(x, shift_mean=True), expected["batch_normalised"])
        case.matches(ema.mean, expected_ema["mean"])
        case.matches(ema.var, expected_ema["var"])


def test_g13_ptx_over_micro_batches(golden):
    case = golden("G13")
    losses = case.inputs["token_losses"]
    tokens = sum(len(x) for x in losses.values())
    total = 0.0
    for x in losses.values():
        mask = torch.ones(1, len(x), dtype=torch.bool)
        total += ppo_ptx.ptx_loss(x[None], mask, denominator=tokens)
    case.matches(total, case.expected["token_mean"])
    case.differs(total, case.wrong["mean_of_micro_batch_means"])


def linear(weight, bias, dtype=DOUBLE):
    head = torch.nn.Linear(len(weight), 1, dtype=dtype)
    with torch.no_grad():
        head.weight.copy_(torch.as_tensor(weight)[None])
        head.bias.fill_(bias)
    return head


def test_g17_popart(golden):
    case = golden("G17")
    head = linear(case.inputs["w"], case.inputs["b"])
    popart = ppo_ptx.PopArt(head)
    assert (popart.mean, popart.std) == (case.inputs["mu"], case.inputs["sigma"])
    targets = case.inputs["new_targets"]
    popart.update(targets[None], torch.ones(1, 4, dtype=torch.bool))
    case.matches(popart.mean, case.expected["mu_new"])
    case.matches(popart.std, case.expected["sigma_new"])
    case.matches(head.weight[0], case.expected["w_new"])
    case.matches(head.bias[0], case.expected["b_new"])
    values = popart.denormalize(head(case.inputs["hidden"])[:, 0])
    case.matches(values, case.expected["values_unchanged"])
    case.matches(popart.normalize(targets), case.expected["normalised_targets"])


# ---------------------------------------------------------------------------- the pretraining term


@pytest.fixture
def documents():
    """Four rows of 6, 1, 3 and 4 tokens; what is outside the mask is NaN."""
    mask = mdp.sequence_mask(torch.tensor([6, 1, 3, 4]), 7)
    return draw(4, 7, seed=1).abs().where(mask, torch.tensor(NAN)), mask


def ptx_and_gradient(nll, mask, reduction, denominator=None):
    nll = nll.clone().requires_grad_()
    loss = ppo_ptx.ptx_loss(nll, mask, reduction, denominator)
    return loss.detach(), torch.autograd.grad(loss, nll)[0]


REDUCTIONS = ["token_mean", "seq_sum"]


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ptx_against_loops_and_finite_differences(documents, reduction):
    nll, mask = documents
    sums = [sum(x for x, m in zip(*row, strict=True) if m) for row in zip(nll, mask, strict=True)]
    loss, gradient = ptx_and_gradient(nll, mask, reduction)
    count = 14 if reduction == "token_mean" else 4
    close(loss, sum(sums) / count)
    close(gradient, mask / count, 1e-7)

    def loss_of_valid_entries(valid):
        return ppo_ptx.ptx_loss(nll.masked_scatter(mask, valid), mask, reduction)

    assert gradcheck(loss_of_valid_entries, nll[mask].requires_grad_())


@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_ptx_pads_rows_and_micro_batches(documents, reduction):
    nll, mask = documents
    loss, gradient = ptx_and_gradient(nll, mask, reduction)
    for left, right in ((0, 2), (3, 0), (1, 1)):
        wide = [
            torch.nn.functional.pad(x, (left, right), value=v)
            for x, v in ((nll, NAN), (mask, False), (gradient, 0.0))
        ]
        wide_loss, wide_gradient = ptx_and_gradient(wide[0], wide[1], reduction)
        close(wide_loss, loss)
        close(wide_gradient, wide[2])
    order = torch.tensor([2, 0, 3, 1])
    shuffled = ptx_and_gradient(nll[order], mask[order], reduction)
    close(shuffled[0], loss)
    close(shuffled[1], gradient[order])
    count = mask.sum() if reduction == "token_mean" else torch.tensor(4)
    for sizes in ([1, 3], [3, 1], [1, 1, 1, 1]):
        parts = [
            ptx_and_gradient(nll[rows], mask[rows], reduction, count)
            for rows in torch.arange(4).split(sizes)
        ]
        close(sum(p[0] for p in parts), loss)
        close(torch.cat([p[1] for p in parts]), gradient)
    empty = ptx_and_gradient(nll, torch.zeros_like(mask), reduction)
    assert empty[0] == 0 and (empty[1] == 0).all()


def test_ptx_is_hugging_face_language_model_loss():
    # Imported here: the two processes below import this file too, and need none of it.
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(vocab_size=61, n_embd=32, n_layer=1, n_head=1)).eval()
    tokens = torch.randint(61, (3, 10))
    output = model(tokens, labels=tokens)
    nll = -mdp.token_logprobs(output.logits, tokens)
    loss = ppo_ptx.ptx_loss(nll, torch.ones_like(nll, dtype=torch.bool))
    parameter = model.transformer.h[0].mlp.c_fc.weight
    (ours,) = torch.autograd.grad(loss, parameter, retain_graph=True)
    (theirs,) = torch.autograd.grad(output.loss, parameter)
    close(loss.detach(), output.loss.detach(), 1e-6)
    close(ours, theirs, 1e-7)
    assert theirs.abs().max() > 1e-4


def test_ptx_refuses_what_it_does_not_know(documents):
    nll, mask = documents
    with pytest.raises(ValueError, match="mean_of_means"):
        ppo_ptx.ptx_loss(nll, mask, "mean_of_means")
    with pytest.raises(ValueError, match="has shape"):
        ppo_ptx.ptx_loss(nll[:, :1], mask)


# -------------------------------------------------------------------------------------- moments


def restored(fresh, state):
    """State taken through JSON, as a checkpoint does."""
    fresh.load_state_dict(json.loads(json.dumps(state)))
    return fresh


@pytest.mark.parametrize("sizes", [[40], [1, 39], [13, 1, 26], [1] * 40])
def test_running_moments_equal_those_of_everything_seen(sizes):
    x = 3 * draw(40, seed=2) - 7
    moments, seen = ppo_ptx.RunningMoments(), 0
    for batch in x.split(sizes):
        moments.update(batch)
        seen += len(batch)
        past = x[:seen].numpy()
        assert moments.count == seen
        close(moments.mean, past.mean())
        close(moments.var, past.var())
        close(moments.std, past.std(ddof=1) if seen > 1 else 1.0)


def test_moments_keep_their_digits_far_from_zero():
    x = draw(1000, seed=3) + 1e8
    running, ema = ppo_ptx.RunningMoments(), ppo_ptx.EMAMoments(0.9)
    for batch in x.split(100):
        running.update(batch)
        ema.update(batch)
    assert running.var == pytest.approx(x.numpy().var(), rel=1e-6)
    assert ema.var == pytest.approx(1, abs=0.2)  # from E[x^2] - E[x]^2 it would be noise


def test_ema_moments_against_a_weighted_mean():
    batches = [draw(n, seed=n) * n + n for n in (3, 1, 5, 2)]
    ema = ppo_ptx.EMAMoments(0.7)
    for t in range(1, 5):
        ema.update(batches[t - 1])
        weights = np.array([0.7 ** (t - 1 - k) for k in range(t)])
        weights /= weights.sum()
        past = list(zip(weights, [b.numpy() for b in batches[:t]], strict=True))
        first = sum(w * b.mean() for w, b in past)
        second = sum(w * (b**2).mean() for w, b in past)
        close(ema.mean, first)
        close(ema.var, second - first**2, 1e-11)
        close(ema.std, math.sqrt(second - first**2), 1e-11)
    assert ema.count == 11


@pytest.mark.parametrize("make", [ppo_ptx.RunningMoments, lambda: ppo_ptx.EMAMoments(0.9)])
def test_moments_start_empty_and_refuse_poison(make):
    moments = make()
    x = torch.tensor([4.0, -2.0])
    moments.update(torch.empty(0))
    assert (moments.count, moments.mean, moments.var, moments.std) == (0, 0.0, 0.0, 1.0)
    close(moments.normalize(x), x)
    close(moments.normalize(x, shift_mean=True), x)
    moments.update(x)
    state = moments.state_dict()
    for poison in (NAN, math.inf):
        with pytest.raises(ValueError, match="NaN or Inf"):
            moments.update(torch.tensor([1.0, poison]))
    moments.update(torch.empty(0))
    assert moments.state_dict() == state
    assert torch.equal(x, torch.tensor([4.0, -2.0]))


@pytest.mark.parametrize("make", [ppo_ptx.RunningMoments, lambda: ppo_ptx.EMAMoments(0.9)])
@pytest.mark.parametrize("constant", [0.0, 0.1, -1e5 / 3])
def test_a_constant_reward_is_not_blown_up(make, constant):
    """Rounding leaves such a constant a deviation near 1e-17, which is no scale to divide by."""
    moments = make()
    for n in (1, 3, 7, 11):
        x = torch.full((n,), constant, dtype=DOUBLE)
        moments.update(x)
    assert moments.std == 1.0
    close(moments.normalize(x), x)
    close(moments.normalize(x, shift_mean=True), torch.zeros(n), 1e-9)
    moments.update(torch.tensor([constant + 1]))
    assert 0.1 < moments.std < 1


@pytest.mark.parametrize("make", [ppo_ptx.RunningMoments, lambda: ppo_ptx.EMAMoments(0.9)])
def test_moments_are_restored_exactly(make):
    moments = make()
    for seed in range(3):
        moments.update(draw(5, seed=seed))
    again = restored(make(), moments.state_dict())
    for each in (moments, again):
        each.update(draw(4, seed=9))
    assert again.state_dict() == moments.state_dict()
    assert again.std == moments.std


@pytest.mark.parametrize("decay", [0.0, 1.0, -0.1])
def test_a_decay_outside_0_and_1_is_refused(decay):
    with pytest.raises(ValueError, match="decay"):
        ppo_ptx.EMAMoments(decay)


def test_normalised_rewards_keep_dtype_and_sign():
    moments = ppo_ptx.RunningMoments()
    x = torch.tensor([1.0, 2.0, 6.0])
    moments.update(x)
    scaled = moments.normalize(x)
    assert scaled.dtype == torch.float32
    close(scaled, x / math.sqrt(7), 1e-6)  # (4 + 1 + 9) / 2
    close(moments.normalize(x, shift_mean=True).mean(), 0.0, 1e-6)


# --------------------------------------------------------------------------------------- PopArt


@pytest.mark.parametrize("decay", [None, 0.9])
@pytest.mark.parametrize(("dtype", "tol"), [(torch.float32, 1e-6), (DOUBLE, 1e-12)])
def test_popart_preserves_what_the_critic_says(decay, dtype, tol):
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(8, 1, dtype=dtype), draw(16, 8, seed=5, dtype=dtype)
    popart = ppo_ptx.PopArt(head, decay)
    for step in range(10):
        before = popart.denormalize(head(hidden))
        scale = (1 + step % 3) / 2
        targets = scale * draw(4, 6, seed=step, dtype=dtype) - step / 10
        old = head.weight.clone()
        popart.update(targets, targets > -1)
        close(popart.denormalize(head(hidden)), before, tol)
        assert (head.weight - old).abs().max() > 1e-4  # it did move


@pytest.mark.parametrize("decay", [None, 0.9])
def test_popart_moments_are_those_of_the_valid_targets(decay):
    popart = ppo_ptx.PopArt(torch.nn.Linear(3, 1), decay)
    targets = torch.tensor([[1.0, 5.0, NAN], [9.0, NAN, NAN]], requires_grad=True)
    popart.update(targets, ~targets.isnan())
    close(popart.mean, 5.0)
    close(popart.std, math.sqrt(32 / 3))
    x = torch.tensor([-1.0, 5.0, 12.0])
    close(popart.normalize(x), (x - 5) / math.sqrt(32 / 3), 1e-6)
    close(popart.denormalize(popart.normalize(x)), x, 1e-5)
    assert popart.head.weight.requires_grad and popart.head.weight.grad is None


def test_popart_survives_equal_targets_and_none():
    head = torch.nn.Linear(3, 1)
    popart, hidden = ppo_ptx.PopArt(head), torch.randn(5, 3)
    before = head(hidden).detach()
    popart.update(torch.full((1, 4), 0.1), torch.ones(1, 4, dtype=torch.bool))
    assert popart.std == 1.0
    popart.update(torch.full((1, 4), NAN), torch.zeros(1, 4, dtype=torch.bool))
    close(popart.denormalize(head(hidden)), before, 1e-6)


def test_popart_is_restored_exactly():
    head = torch.nn.Linear(3, 1)
    popart = ppo_ptx.PopArt(head)
    everything = torch.ones(2, 5, dtype=torch.bool)
    popart.update(draw(2, 5, seed=1), everything)
    again = restored(ppo_ptx.PopArt(copy.deepcopy(head)), popart.state_dict())
    for each in (popart, again):
        each.update(draw(2, 5, seed=2), everything)
    assert (again.mean, again.std) == (popart.mean, popart.std)
    assert torch.equal(again.head.weight, head.weight) and torch.equal(again.head.bias, head.bias)


@pytest.mark.parametrize("head", [torch.nn.Linear(3, 2), torch.nn.Linear(3, 1, bias=False)])
def test_popart_needs_one_output_and_a_bias(head):
    with pytest.raises(ValueError, match="bias"):
        ppo_ptx.PopArt(head)


def test_popart_refuses_shapes_that_would_broadcast():
    with pytest.raises(ValueError, match="has shape"):
        ppo_ptx.PopArt(torch.nn.Linear(3, 1)).update(torch.ones(2, 4), torch.ones(2, 1).bool())


# --------------------------------------------------------------------------------- two processes


def moments_on_a_rank(rank, group, shards, targets):
    torch.manual_seed(0)
    running, ema = ppo_ptx.RunningMoments(), ppo_ptx.EMAMoments(0.8)
    popart = ppo_ptx.PopArt(torch.nn.Linear(4, 1, dtype=DOUBLE))
    for batch in shards[rank]:
        running.update(batch, group)
        ema.update(batch, group)
    for x, mask in targets[rank]:
        popart.update(x, mask, group)
    head = {"weight": popart.head.weight.detach(), "bias": popart.head.bias.detach()}
    return running.state_dict(), ema.state_dict(), popart.state_dict(), head


def joined(parts):
    """Batches of several ranks, flat -> the batches of one process that sees them all."""
    return [torch.cat([x.flatten() for x in batch])[None] for batch in zip(*parts, strict=True)]


def test_moments_and_popart_over_two_processes(golden, tmp_path):
    """Ranks with unequal batches, one of them empty at the end."""
    batches = golden("G12").inputs["batches"]
    shards, returns, masks = [], [], []
    for rank in range(2):
        last = draw(5 * (1 - rank), seed=rank)
        shards.append([torch.as_tensor(b[rank], dtype=DOUBLE) for b in batches] + [last])
        returns.append([5 * draw(n, 3, seed=n) for n in (2 + rank, 5 - rank)])
        masks.append([x > rank for x in returns[rank]])
    targets = [list(zip(*each, strict=True)) for each in zip(returns, masks, strict=True)]

    alone = list(zip(joined(returns), joined(masks), strict=True))
    expected = moments_on_a_rank(0, None, [joined(shards)], [alone])
    for state in on_two_ranks(moments_on_a_rank, tmp_path, shards, targets):
        for actual, reference in zip(state, expected, strict=True):
            assert actual.keys() == reference.keys()
            for key in reference:
                close(actual[key], reference[key])
