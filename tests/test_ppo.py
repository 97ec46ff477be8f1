"""Chapter 05: whitening, the clipped losses, the KL controllers."""

import json
import math

import numpy as np
import pytest
import torch
from ranks import on_two_ranks
from torch.autograd import gradcheck

from rlhf_course import mdp, ppo

NAN = float("nan")
DOUBLE = torch.float64


def close(actual, expected, tol=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol)


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.fixture
def batch():
    """Five answers of 6, 1, 4, 2 and 3 tokens, NaN outside the mask, ratios on both sides of the
    clip for advantages of both signs."""
    mask = mdp.sequence_mask(torch.tensor([6, 1, 4, 2, 3]), 8).roll(1, dims=1)
    names = ("logprobs", "old_logprobs", "advantages", "values", "old_values", "returns", "weights")
    tensors = {name: draw(5, 8, seed=seed) for seed, name in enumerate(names)}
    tensors["logprobs"] = tensors["old_logprobs"] + 0.4 * tensors["logprobs"]
    tensors["values"] = tensors["old_values"] + 0.4 * tensors["values"]
    tensors["weights"] = tensors["weights"].exp()
    return {"mask": mask, **{k: x.where(mask, torch.tensor(NAN)) for k, x in tensors.items()}}


# The losses as functions of a batch: what is differentiated, and what `denominator` counts.
def token_policy(batch, **options):
    names = ("logprobs", "old_logprobs", "advantages", "mask")
    return ppo.policy_loss(*(batch[k] for k in names), **options)


def weighted_policy(batch, **options):
    return token_policy(batch, clip_low=0.1, dual_clip=1.3, weights=batch["weights"], **options)


def sequence_policy(batch, **options):
    advantages = batch["advantages"].where(batch["mask"], torch.tensor(0.0)).sum(dim=1)
    old = batch["old_logprobs"]
    return ppo.sequence_policy_loss(batch["logprobs"], old, advantages, batch["mask"], **options)


def clipped_value(batch, **options):
    names = ("values", "old_values", "returns", "mask")
    return ppo.value_loss(*(batch[k] for k in names), **options)


def plain_value(batch, **options):
    return clipped_value(batch, clip=None, **options)


LOSSES = {
    "token": (token_policy, "logprobs"),
    "weighted": (weighted_policy, "logprobs"),
    "sequence": (sequence_policy, "logprobs"),
    "value": (clipped_value, "values"),
    "plain_value": (plain_value, "values"),
}


def loss_gradient_stats(name, batch, **options):
    compute, differentiated = LOSSES[name]
    x = batch[differentiated].clone().requires_grad_()
    loss, stats = compute({**batch, differentiated: x}, **options)
    (gradient,) = torch.autograd.grad(loss, x)
    return loss.detach(), gradient, stats


def valid_count(name, batch):
    return batch["mask"].any(dim=1).sum() if name == "sequence" else batch["mask"].sum()


# --------------------------------------------------------------------------------- golden vectors


def test_g05_whitening(golden):
    case = golden("G05")
    x, mask, eps = case.inputs["x"], case.inputs["mask"].bool(), case.inputs["eps"]
    mean, variance, count = ppo.masked_moments(x, mask)
    case.matches(mean, case.expected["mean"])
    case.matches(variance, case.expected["var_population"])
    case.differs(variance, case.expected["var_bessel"])
    case.matches(count, 5.0)
    whitened = ppo.whiten(x, mask, eps=eps)
    case.matches(whitened, case.expected["whitened_population"])
    case.differs(whitened, case.wrong["unmasked"])
    case.differs(whitened, case.expected["whitened_bessel"])
    case.matches(ppo.whiten(x, mask, shift_mean=False), case.expected["whitened_no_shift"])
    # Added or clamped, eps differs by 5e-10 here: the one published variant we can tell apart.
    assert (whitened - case.expected["whitened_population_clamp"]).abs().max() > case.tol
    flat = case.expected["constant_input"]
    case.matches(ppo.whiten(flat["x"], flat["mask"].bool()), flat["whitened"])


def test_g06_whitening_over_ranks_equals_whitening_of_everything(golden):
    case = golden("G06")
    x, mask = (torch.cat([case.inputs[f"rank{r}"][k] for r in range(2)]) for k in ("x", "mask"))
    mean, variance, count = ppo.masked_moments(x, mask.bool())
    case.matches(mean, case.expected["mean"])
    case.matches(variance, case.expected["var"])
    case.matches(count, case.expected["count"])
    whitened = ppo.whiten(x, mask.bool(), eps=case.inputs["eps"])
    case.matches(whitened, torch.cat([case.expected["rank0"], case.expected["rank1"]]))
    case.differs(whitened, torch.cat(case.wrong["per_rank_whitening"]))
    case.differs(mean, case.wrong["mean_of_rank_means"])


def test_g07_policy_loss(golden):
    case = golden("G07")
    logprobs = case.inputs["logp"].requires_grad_()
    mask = case.inputs["action_mask"].bool()
    fixed = case.inputs["old_logp"], case.inputs["advantages"], mask
    clips = {"clip_low": case.inputs["clip_low"], "clip_high": case.inputs["clip_high"]}
    loss, stats = ppo.policy_loss(logprobs, *fixed, **clips)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    case.matches(loss, case.expected["loss_token_mean"])
    case.matches(gradient, case.expected["grad_logp"])
    case.differs(loss, case.wrong["unmasked_mean"])
    dual, _ = ppo.policy_loss(logprobs, *fixed, **clips, dual_clip=case.inputs["dual_clip"])
    case.matches(dual, case.expected["loss_token_mean_dual_clip"])
    for ours, name in {"kl_k1": "approx_kl_k1", "kl_k3": "approx_kl_k3"}.items():
        case.matches(stats[ours], case.expected[name])
    for name in ("clipfrac", "ratio_mean", "ratio_max"):
        case.matches(stats[name], case.expected[name])
    # A mean over answers of means over tokens: each token weighs 1 / its answer's length.
    weights = (1 / mask.double().sum(dim=1, keepdim=True)).expand(mask.shape)
    means, _ = ppo.policy_loss(logprobs, *fixed, **clips, weights=weights, denominator=len(mask))
    case.matches(means, case.expected["loss_seq_mean"])


def test_g08_value_loss(golden):
    case = golden("G08")
    values = case.inputs["values"].requires_grad_()
    fixed = [case.inputs[name] for name in ("old_values", "returns")]
    fixed.append(case.inputs["action_mask"].bool())
    loss, stats = ppo.value_loss(values, *fixed, clip=case.inputs["value_clip"])
    (gradient,) = torch.autograd.grad(loss, values)
    case.matches(loss, case.expected["loss"])
    case.matches(gradient, case.expected["grad_values"])
    case.differs(loss, case.wrong["without_half"])
    case.differs(loss, case.wrong["averaged_over_pads"])
    case.matches(ppo.value_loss(values, *fixed, clip=None)[0], case.expected["loss_unclipped"])
    for name in ("clipfrac", "explained_variance"):
        case.matches(stats[name], case.expected[name])
    case.matches(stats["error"], 2 * case.expected["loss_unclipped"])


def test_g09_adaptive_kl(golden):
    case = golden("G09")
    kls, horizon = case.inputs["kls"].tolist(), case.inputs["horizon"]
    for episodes in case.inputs["n_steps"].int().tolist():
        controller = ppo.AdaptiveKLController(case.inputs["beta0"], case.inputs["target"], horizon)
        path = [controller.update(kl, episodes) for kl in kls]
        case.matches(path, case.expected[f"n={episodes}"])
        assert controller.value == path[-1]
        if episodes == 512:
            case.differs(path, case.wrong["clip_applied_after_scaling_n512"])


def test_g13_both_losses_over_micro_batches(golden):
    case = golden("G13")
    losses = case.inputs["token_losses"]
    tokens = sum(len(x) for x in losses.values())
    policy = value = 0.0
    for x in losses.values():
        zeros, mask = torch.zeros_like(x), torch.ones_like(x, dtype=torch.bool)
        policy += ppo.policy_loss(zeros, zeros, -x, mask, denominator=tokens)[0]
        value += ppo.value_loss((2 * x).sqrt(), zeros, zeros, mask, None, denominator=tokens)[0]
    for total in (policy, value):
        case.matches(total, case.expected["token_mean"])
        case.differs(total, case.wrong["mean_of_micro_batch_means"])


def test_g14_sequence_level_losses(golden):
    case = golden("G14")
    new, old, mask = (case.inputs[name] for name in ("logp_new", "logp_old", "action_mask"))
    mask, clip = mask.bool(), case.inputs["clip"]
    one, ratios = torch.ones(1), []
    for row in torch.arange(2).split(1):
        _, stats = ppo.sequence_policy_loss(new[row], old[row], one, mask[row])
        ratios.append(stats["ratio_mean"])
    case.matches(torch.stack(ratios), case.expected["seq_ratio"])
    loss, _ = ppo.sequence_policy_loss(new, old, case.expected["adv_sum"], mask, clip, clip)
    case.matches(loss, case.expected["loss_b_sequence"])
    shared = case.expected["adv_coati"][:, None].expand(mask.shape)
    weights = (1 / mask.double().sum(dim=1, keepdim=True)).expand(mask.shape)
    loss, _ = ppo.policy_loss(new, old, shared, mask, clip, clip, weights=weights, denominator=2)
    case.matches(loss, case.expected["loss_a_coati"])
    case.differs(loss, case.expected["loss_b_sequence"])
    everyone = torch.ones(2, dtype=torch.bool)
    whitened = ppo.whiten(case.expected["adv_sum"], everyone)
    case.matches(whitened, case.expected["adv_sum_whitened"])


# -------------------------------------------------------------------------- moments and whitening


def test_moments_and_whitening_against_numpy(batch):
    x, mask = batch["advantages"], batch["mask"]
    valid = x[mask].numpy()
    mean, variance, count = ppo.masked_moments(x, mask)
    assert {m.dtype for m in (mean, variance, count)} == {DOUBLE}
    close(mean, valid.mean())
    close(variance, valid.var())
    assert count == len(valid)
    expected = torch.zeros_like(x)
    expected[mask] = torch.from_numpy((valid - valid.mean()) / np.sqrt(valid.var() + 1e-8))
    close(ppo.whiten(x, mask), expected)
    expected[mask] += valid.mean()
    close(ppo.whiten(x, mask, shift_mean=False), expected)
    assert ppo.whiten(x, mask).sum(dim=1).abs().max() > 0.5  # whitened by row, all would be 0


def test_whitening_extremes():
    x, all_of_it = torch.tensor([[3.0, 3.0, 3.0]]), torch.ones(1, 3, dtype=torch.bool)
    close(ppo.whiten(x, all_of_it), torch.zeros(1, 3))
    close(ppo.whiten(x[:, :1], all_of_it[:, :1]), torch.zeros(1, 1))  # n = 1, no Bessel
    close(ppo.whiten(x, ~all_of_it), torch.zeros(1, 3))  # nothing valid
    assert [m.item() for m in ppo.masked_moments(x, ~all_of_it)] == [0, 0, 0]
    # eps is added to the variance: not to the deviation, and not put in place of a smaller one.
    tiny, half = torch.tensor([[-1e-4, 1e-4]], dtype=DOUBLE), 0.5**0.5
    close(ppo.whiten(tiny, all_of_it[:, :2]), [[-half, half]])
    close(ppo.whiten(1e4 * tiny, all_of_it[:, :2], eps=3.0), [[-0.5, 0.5]])


def test_moments_keep_their_digits_far_from_zero():
    """E[x^2] - E[x]^2 has no digit left at 1e8; a float32 sum has four."""
    noise = draw(1, 200_000, seed=3)
    mask = torch.ones_like(noise, dtype=torch.bool)
    far = noise + 1e8
    _, variance, _ = ppo.masked_moments(far, mask)
    assert variance.item() == pytest.approx(far.numpy().var(), rel=1e-7)
    single = (noise + 1000).float()
    mean, variance, _ = ppo.masked_moments(single, mask)
    exact = single.double().numpy()
    assert mean.item() == pytest.approx(exact.mean(), rel=1e-12)
    assert variance.item() == pytest.approx(exact.var(), rel=1e-10)
    whitened = ppo.whiten(single, mask)
    assert whitened.dtype == torch.float32
    close(whitened, (exact - exact.mean()) / np.sqrt(exact.var() + 1e-8), 1e-6)


def whiten_on_a_rank(rank, group, cases):
    return [
        (ppo.whiten(x, mask, group=group), *ppo.masked_moments(x, mask, group))
        for x, mask in cases[rank]
    ]


def test_whitening_over_two_processes(golden, tmp_path):
    """Unequal shapes and counts, and one rank without a single valid token."""
    case = golden("G06")
    first = [(r["x"], r["mask"].bool()) for r in (case.inputs["rank0"], case.inputs["rank1"])]
    long, short = draw(4, 9, seed=1) + 1e4, 5 * draw(2, 3, seed=2)
    second = [(long, long > 1e4), (short, short > 0)]
    third = [(long, long > 1e4), (short, torch.zeros_like(short).bool())]
    trials = [first, second, third]
    got = on_two_ranks(whiten_on_a_rank, tmp_path, [[t[rank] for t in trials] for rank in (0, 1)])

    for rank in range(2):
        case.matches(got[rank][0][0], case.expected[f"rank{rank}"])
        case.differs(got[rank][0][0], case.wrong["per_rank_whitening"][rank])
    for trial, shards in enumerate(trials):
        flat = [torch.cat([x[i].flatten() for x in shards])[None] for i in range(2)]
        whole = ppo.whiten(*flat).split([shards[0][0].numel(), shards[1][0].numel()], dim=1)
        for rank, (x, _) in enumerate(shards):
            whitened, *moments = got[rank][trial]
            close(whitened, whole[rank].view_as(x), 1e-11)
            for actual, expected in zip(moments, ppo.masked_moments(*flat), strict=True):
                torch.testing.assert_close(actual, expected, rtol=1e-12, atol=0)


# -------------------------------------------------------------------- losses, by plain Python loops


def surrogate(log_ratio, advantage, low=0.2, high=0.2, dual=None):
    ratio = math.exp(log_ratio)
    objective = min(ratio * advantage, min(max(ratio, 1 - low), 1 + high) * advantage)
    return max(objective, dual * advantage) if dual and advantage < 0 else objective


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dual", [None, 1.2, 3.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.4)])
def test_policy_loss_against_loops(batch, low, high, dual, weighted):
    valid = [tuple(i) for i in batch["mask"].nonzero().tolist()]
    d = {i: (batch["logprobs"] - batch["old_logprobs"])[i].item() for i in valid}
    a = {i: batch["advantages"][i].item() for i in valid}
    w = {i: batch["weights"][i].item() if weighted else 1.0 for i in valid}
    weights = batch["weights"] if weighted else None
    loss, stats = token_policy(batch, clip_low=low, clip_high=high, dual_clip=dual, weights=weights)
    n = len(valid)
    close(loss, -sum(w[i] * surrogate(d[i], a[i], low, high, dual) for i in valid) / n)
    cut = [surrogate(d[i], a[i], low, high) < math.exp(d[i]) * a[i] for i in valid]
    assert 0 < sum(cut) < n
    close(stats["clipfrac"], sum(cut) / n)
    close(stats["kl_k1"], sum(-d[i] for i in valid) / n)
    close(stats["kl_k3"], sum(math.exp(d[i]) - 1 - d[i] for i in valid) / n)
    close(stats["ratio_mean"], sum(math.exp(d[i]) for i in valid) / n)
    close(stats["ratio_max"], max(math.exp(d[i]) for i in valid))


def test_dual_clip_bounds_the_loss_and_ends_the_gradient():
    old, advantages = torch.zeros(1, 3, dtype=DOUBLE), torch.tensor([[-2.0, -2.0, 2.0]]).double()
    logprobs = torch.tensor([[5.0, 0.5, 5.0]], dtype=DOUBLE, requires_grad=True)
    mask = torch.ones(1, 3, dtype=torch.bool)
    loss, _ = ppo.policy_loss(logprobs, old, advantages, mask, dual_clip=3.0)
    (gradient,) = torch.autograd.grad(loss, logprobs)
    close(loss.detach(), -(3 * -2 + math.exp(0.5) * -2 + 1.2 * 2) / 3)
    close(gradient, [[0.0, 2 * math.exp(0.5) / 3, 0.0]])
    unbounded, _ = ppo.policy_loss(logprobs, old, advantages, mask)
    assert unbounded > 90


def test_sequence_policy_loss_against_loops(batch):
    loss, stats = sequence_policy(batch, clip_low=0.3, clip_high=0.1)
    d = (batch["logprobs"] - batch["old_logprobs"]).where(batch["mask"], torch.tensor(0.0)).sum(1)
    a = batch["advantages"].where(batch["mask"], torch.tensor(0.0)).sum(1)
    pairs = list(zip(d.tolist(), a.tolist(), strict=True))
    terms = [surrogate(x, y, 0.3, 0.1) for x, y in pairs]
    close(loss, -sum(terms) / 5)
    cut = [t < math.exp(x) * y for t, (x, y) in zip(terms, pairs, strict=True)]
    assert 0 < sum(cut) < 5
    close(stats["clipfrac"], sum(cut) / 5)
    close(stats["kl_k1"], -d.mean())
    close(stats["ratio_max"], d.exp().max())


def test_a_row_without_actions_is_no_sequence(batch):
    plain, gradient, stats = loss_gradient_stats("sequence", batch)
    longer = {k: torch.cat([x, x[:1]]) for k, x in batch.items()}
    longer["mask"] = torch.cat([batch["mask"], torch.zeros(1, 8, dtype=torch.bool)])
    again, longer_gradient, longer_stats = loss_gradient_stats("sequence", longer)
    close(again, plain)
    close(longer_gradient[:5], gradient)
    for name, x in stats.items():
        close(longer_stats[name], x)


@pytest.mark.parametrize("clip", [None, 0.1, 0.5])
def test_value_loss_against_loops(batch, clip):
    terms, cut, errors = [], 0, []
    for i in batch["mask"].nonzero().tolist():
        v, old, r = (batch[k][tuple(i)].item() for k in ("values", "old_values", "returns"))
        near = v if clip is None else old + min(max(v - old, -clip), clip)
        terms.append(max((v - r) ** 2, (near - r) ** 2))
        cut += (near - r) ** 2 > (v - r) ** 2
        errors.append((v - r) ** 2)
    loss, stats = clipped_value(batch, clip=clip)
    close(loss, 0.5 * sum(terms) / len(terms))
    close(stats["clipfrac"], cut / len(terms))
    close(stats["error"], sum(errors) / len(errors))
    assert clip is None or 0 < cut < len(terms)


def test_rounding_is_not_clipping():
    """V_old + (V - V_old) is V only up to rounding; none of these moved by the clip range."""
    generator = torch.Generator().manual_seed(0)
    values, old, returns = (torch.randn(1, 4096, generator=generator) for _ in range(3))
    assert ((old + (values - old) - returns) ** 2 > (values - returns) ** 2).any()
    _, stats = ppo.value_loss(values, old, returns, torch.ones(1, 4096).bool(), clip=100.0)
    assert stats["clipfrac"] == 0


def test_value_loss_takes_one_value_a_sequence():
    values, old = torch.tensor([1.0, 2.0, NAN]), torch.tensor([1.0, 1.9, NAN])
    mask = torch.tensor([True, True, False])
    loss, _ = ppo.value_loss(values, old, torch.tensor([0.0, 2.5, NAN]), mask)
    close(loss, 0.5 * (1 + 0.25) / 2, 1e-6)


def test_explained_variance(batch):
    returns, mask, values = batch["returns"], batch["mask"], batch["values"]
    valid = returns[mask].numpy()
    expected = 1 - ((valid - values[mask].numpy()) ** 2).mean() / valid.var()
    close(ppo.explained_variance(values, returns, mask), expected)
    close(ppo.explained_variance(returns, returns, mask), 1.0)
    close(ppo.explained_variance(torch.full_like(returns, valid.mean()), returns, mask), 0.0)
    for constant in (0.0, 0.1, -1e5 / 3):  # which rounding leaves a variance of 1e-34
        flat = torch.full_like(returns, constant)
        close(ppo.explained_variance(values, flat, mask), 0.0)
    biased = ppo.explained_variance(returns + 10, returns, mask)
    assert biased < -10  # a constant error counts: it is not the residual's variance


# ------------------------------------------------------------------------ properties of all losses


@pytest.mark.parametrize("name", LOSSES)
def test_gradients_against_finite_differences(batch, name):
    compute, differentiated = LOSSES[name]
    mask = batch["mask"]
    x = batch[differentiated][mask].requires_grad_()

    def loss_of_valid_entries(valid):
        return compute(
            {**batch, differentiated: batch[differentiated].masked_scatter(mask, valid)}
        )[0]

    assert gradcheck(loss_of_valid_entries, x)
    _, gradient, _ = loss_gradient_stats(name, batch)
    assert (gradient[~mask] == 0).all()
    assert (gradient[mask] != 0).sum() >= 5


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize(("left", "right"), [(0, 3), (2, 0), (1, 4)])
def test_pads_change_nothing(batch, name, left, right):
    def padded(x, fill):
        return torch.nn.functional.pad(x, (left, right), value=fill)

    loss, gradient, stats = loss_gradient_stats(name, batch)
    wide = {k: padded(x, False if k == "mask" else NAN) for k, x in batch.items()}
    wide_loss, wide_gradient, wide_stats = loss_gradient_stats(name, wide)
    close(wide_loss, loss)
    close(wide_gradient, padded(gradient, 0.0))
    for key, x in stats.items():
        close(wide_stats[key], x)


@pytest.mark.parametrize("name", LOSSES)
def test_the_order_of_rows_changes_nothing(batch, name):
    order = torch.tensor([3, 0, 4, 1, 2])
    loss, gradient, stats = loss_gradient_stats(name, batch)
    shuffled = loss_gradient_stats(name, {k: x[order] for k, x in batch.items()})
    close(shuffled[0], loss)
    close(shuffled[1], gradient[order])
    for key, x in stats.items():
        close(shuffled[2][key], x)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("sizes", [[1, 4], [2, 1, 2], [1, 1, 1, 1, 1]])
def test_micro_batches_add_up(batch, name, sizes):
    """Losses, gradients and mean statistics of uneven parts sum to the whole batch's."""
    loss, gradient, stats = loss_gradient_stats(name, batch)
    count = valid_count(name, batch)
    parts = []
    for rows in torch.arange(5).split(sizes):
        part = {k: x[rows] for k, x in batch.items()}
        parts.append(loss_gradient_stats(name, part, denominator=count))
    close(sum(p[0] for p in parts), loss)
    close(torch.cat([p[1] for p in parts]), gradient)
    for key in stats.keys() - {"ratio_max", "explained_variance"}:
        close(sum(p[2][key] for p in parts), stats[key])
    if "ratio_max" in stats:
        close(max(p[2]["ratio_max"] for p in parts), stats["ratio_max"])
    first = {k: x[:1] for k, x in batch.items()}
    counts = (None, int(valid_count(name, first)))
    own = [loss_gradient_stats(name, first, denominator=count)[0] for count in counts]
    close(own[0], own[1])  # None is this batch's own count


@pytest.mark.parametrize("name", LOSSES)
def test_only_the_new_model_gets_a_gradient(batch, name):
    compute, differentiated = LOSSES[name]
    for key, x in batch.items():
        batch[key] = x if key == "mask" else x.requires_grad_()
    before = {key: x.detach().clone() for key, x in batch.items()}
    loss, stats = compute(batch)
    loss.backward()
    assert batch[differentiated].grad is not None
    for key, x in batch.items():
        assert key == differentiated or x.grad is None
        torch.testing.assert_close(x.detach(), before[key], rtol=0, atol=0, equal_nan=True)
    assert not any(x.requires_grad for x in stats.values())
    assert all(x.shape == () for x in stats.values())


@pytest.mark.parametrize("name", LOSSES)
def test_float32_and_an_empty_micro_batch(batch, name):
    exact = loss_gradient_stats(name, batch)[0]
    single = {k: x if k == "mask" else x.float() for k, x in batch.items()}
    loss = loss_gradient_stats(name, single)[0]
    assert loss.dtype == torch.float32
    close(loss.double(), exact, 1e-5)
    nothing = {**batch, "mask": torch.zeros_like(batch["mask"])}
    for denominator in (None, 16):
        loss, gradient, stats = loss_gradient_stats(name, nothing, denominator=denominator)
        assert loss == 0 and (gradient == 0).all()
        assert all(x == 0 for x in stats.values())


def test_first_update_of_a_rollout(batch):
    """Before the first step the two policies are one: ratio 1, loss -mean A, gradient -A / N."""
    mask, advantages = batch["mask"], batch["advantages"]
    n = mask.sum()
    same = batch["logprobs"].clone().requires_grad_()
    for old in (same.detach(), same):  # it detaches the old ones itself
        loss, stats = ppo.policy_loss(same, old, advantages, mask, dual_clip=3.0)
        (gradient,) = torch.autograd.grad(loss, same)
        close(loss.detach(), -advantages[mask].mean())
        close(gradient, torch.where(mask, -advantages / n, 0.0))
        assert stats["ratio_mean"] == stats["ratio_max"] == 1
        assert stats["clipfrac"] == stats["kl_k1"] == stats["kl_k3"] == 0


def test_no_gradient_beyond_the_clip_but_always_a_way_back():
    advantages = torch.tensor([[1.0, 1.0, -1.0, -1.0]])
    logprobs = torch.tensor([[1.0, -1.0, -1.0, 1.0]], requires_grad=True)
    mask = torch.ones(1, 4, dtype=torch.bool)
    loss, stats = ppo.policy_loss(logprobs, torch.zeros(1, 4), advantages, mask)
    loss.backward()
    expected = [[0.0, -math.exp(-1) / 4, 0.0, math.exp(1) / 4]]
    close(logprobs.grad, expected, 1e-6)
    assert stats["clipfrac"] == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_extreme_ratios_stay_finite(dtype):
    logprobs = torch.tensor([[-1e4, 1e4, 0.0, -1e4, 1e4, NAN]], dtype=dtype, requires_grad=True)
    advantages = torch.tensor([[1.0, 1.0, 1.0, -1.0, -1.0, NAN]], dtype=dtype)
    mask = torch.tensor([[True, True, True, True, True, False]])
    old = torch.zeros(1, 6, dtype=dtype)
    token = ppo.policy_loss(logprobs, old, advantages, mask)
    sequence = ppo.sequence_policy_loss(logprobs, old, torch.ones(1, dtype=dtype), mask)
    for loss, stats in (token, sequence):
        (gradient,) = torch.autograd.grad(loss, logprobs)
        assert loss.isfinite() and gradient.isfinite().all()
        assert all(x.isfinite() for x in stats.values())
    assert token[1]["ratio_max"].item() == pytest.approx(math.exp(20), rel=0.01)


@pytest.mark.parametrize("name", ["logprobs", "old_logprobs", "advantages", "weights", "mask"])
def test_shapes_that_would_broadcast_are_refused(batch, name):
    batch[name] = batch[name][:, :1]
    with pytest.raises(ValueError, match="has shape"):
        weighted_policy(batch)
    with pytest.raises(ValueError, match="has shape"):
        ppo.value_loss(torch.ones(2), torch.ones(2, 1), torch.ones(2), torch.ones(2).bool())
    with pytest.raises(ValueError, match="bool"):
        ppo.whiten(torch.ones(2), torch.ones(2))


# ---------------------------------------------------------------------------------- KL controllers


def test_adaptive_controller_steps_by_hand():
    controller = ppo.AdaptiveKLController(0.1, target=2.0, horizon=1000)
    assert controller.value == 0.1
    assert controller.update(2.0, 100) == pytest.approx(0.1)  # on target
    assert controller.update(2.2, 100) == pytest.approx(0.1 * 1.01)  # 10 % above
    assert controller.update(90.0, 100) == pytest.approx(0.1 * 1.01 * 1.02)  # clipped at 20 %
    assert controller.update(-5.0, 50) == pytest.approx(0.1 * 1.01 * 1.02 * 0.99)  # and at -20 %
    assert controller.value == pytest.approx(0.1 * 1.01 * 1.02 * 0.99)


def test_floor_holds_the_price_up():
    low, ziegler = (ppo.AdaptiveKLController(0.1, 2.0, 1000, floor=floor) for floor in (0.09, 0.0))
    for _ in range(50):
        low.update(0.0, 500)
        ziegler.update(0.0, 500)
    assert low.value == 0.09
    assert ziegler.value == pytest.approx(0.1 * 0.9**50)
    assert low.update(100.0, 500) == pytest.approx(0.09 * 1.1)


def test_controllers_are_saved_and_restored_exactly():
    for make in (lambda c: ppo.AdaptiveKLController(c, 6.0), ppo.FixedKLController):
        controller, other = make(0.15), make(0.7)
        controller.update(7.3, 512)
        other.load_state_dict(json.loads(json.dumps(controller.state_dict())))
        assert other.value == controller.value
        assert other.update(5.1, 512) == controller.update(5.1, 512)


def test_fixed_controller_never_moves():
    controller = ppo.FixedKLController(0.05)
    assert controller.update(100.0, 512) == controller.value == 0.05


def test_controllers_refuse_nonsense():
    controller = ppo.AdaptiveKLController(0.1, 6.0, horizon=1000)
    for kl in (NAN, math.inf):
        with pytest.raises(ValueError, match="KL"):
            controller.update(kl, 10)
    with pytest.raises(ValueError, match="horizon"):
        controller.update(6.0, 5000)
    assert controller.value == 0.1
    for wrong in ({"kl_coef": 0.0}, {"target": 0.0}, {"horizon": 0}):
        with pytest.raises(ValueError, match="positive"):
            ppo.AdaptiveKLController(**{"kl_coef": 0.1, "target": 6.0, "horizon": 1000, **wrong})
