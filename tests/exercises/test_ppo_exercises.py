"""Chapter 5's exercises: whitening, the two losses, the KL's price, one update."""

import math
from functools import cache

import torch
from drivers_ppo import prices, update, world
from torch import tensor

from rlhf_course.coursework.expect import agrees, equal, exercise, expect, gradients, same

NAN, INF = float("nan"), float("inf")
YES, NO = True, False


def randn(rng, *shape):
    return torch.randn(shape, generator=rng)


def some(rng, *shape):
    """A random mask; its first entry is True."""
    mask = torch.rand(shape, generator=rng) < 0.7
    mask.view(-1)[0] = True
    return mask


def loss_of(out):
    """The loss alone, without the statistics."""
    return out[0] if isinstance(out, (tuple, list)) and out else out


# ----------------------------------------------------------------------------------------- whiten


def whitened_by_hand(x, mask, shift_mean=True, eps=1e-8):
    """Two passes over the valid entries."""
    valid = [x[place] for place in map(tuple, mask.nonzero().tolist())]
    mean = sum(valid) / len(valid)
    variance = sum((v - mean) ** 2 for v in valid) / len(valid)
    out = (x - mean) / torch.sqrt(variance + eps) + (0.0 if shift_mean else mean)
    return torch.where(mask, out, 0.0).detach()


@exercise("ppo.whiten", core=True)
def test_two_numbers_whitened(subject):
    """two numbers become -1 and 1"""
    same(subject.whiten, (tensor([[1.0, 3.0]]), tensor([[YES, YES]])), tensor([[-1.0, 1.0]]))


@exercise("ppo.whiten", core=True)
def test_rows_share_mean_and_spread(subject):
    """all rows share one mean and one spread, or good answers look like bad ones"""
    args = tensor([[1.0, 1.0], [3.0, 3.0]]), torch.ones(2, 2).bool()
    same(subject.whiten, args, tensor([[-1.0, -1.0], [1.0, 1.0]]))


@exercise("ppo.whiten")
def test_whitening_beside_pads(subject):
    """what stands outside the mask counts for nothing, and becomes 0"""
    mask = tensor([[YES, YES, NO], [NO, YES, YES]])
    for odd in (100.0, NAN):
        x = tensor([[0.0, 4.0, odd], [odd, 4.0, 0.0]])
        same(subject.whiten, (x, mask), tensor([[-1.0, 1.0, 0.0], [0.0, 1.0, -1.0]]))


@exercise("ppo.whiten")
def test_whitening_keeps_the_mean_if_told(subject):
    """with shift_mean=False the mean is added back"""
    args = tensor([[0.0, 4.0, 9.0]]), tensor([[YES, YES, NO]])
    same(subject.whiten, args, tensor([[1.0, 3.0, 0.0]]), {"shift_mean": False})


@exercise("ppo.whiten")
def test_nothing_to_whiten(subject):
    """equal numbers, or a single one, become 0"""
    same(subject.whiten, (tensor([[3.0, 3.0]]), tensor([[YES, YES]])), tensor([[0.0, 0.0]]))
    same(subject.whiten, (tensor([[3.0, 7.0]]), tensor([[YES, NO]])), tensor([[0.0, 0.0]]))


@exercise("ppo.whiten")
def test_eps_is_added_to_the_variance(subject):
    """eps is added to the variance"""
    args, kwargs = (tensor([[1.0, 3.0]]), tensor([[YES, YES]])), {"eps": 3.0}
    same(subject.whiten, args, tensor([[-0.5, 0.5]]), kwargs)


@exercise("ppo.whiten")
def test_numbers_far_from_0(subject):
    """numbers far from 0 keep their differences"""
    args = tensor([[10000.0, 10002.0, 10004.0]]), torch.ones(1, 3).bool()
    spread = math.sqrt(1.5)
    same(subject.whiten, args, tensor([[-spread, 0.0, spread]]), rtol=1e-2, atol=1e-2)


@exercise("ppo.whiten")
def test_whitened_in_the_inputs_dtype_without_gradient(subject):
    """the result has the input's dtype and carries no gradient"""
    args = tensor([[0.5, 1.0, 3.0]]), torch.ones(1, 3).bool()
    expected = whitened_by_hand(*args)
    same(subject.whiten, args, expected, dtype=torch.float32)
    same(subject.whiten, (args[0].double(), args[1]), expected.double(), dtype=torch.float64)
    _, (grad,) = gradients(subject.whiten, args)
    equal(grad, torch.zeros(1, 3), "a gradient reaches x", {"x": args[0], "mask": args[1]})


@exercise("ppo.whiten")
def test_whitening_any_batch(subject, rng, golden):
    """any batch, and one computed elsewhere"""
    case = golden("G05")
    args = case.inputs["x"], case.inputs["mask"].bool()
    same(subject.whiten, args, case.expected["whitened_population"])
    same(subject.whiten, args, case.expected["whitened_no_shift"], {"shift_mean": False})
    for shape in ((1, 4), (3, 5), (8, 7)):
        mask = some(rng, *shape)
        mask[0, :2] = True
        for shift_mean in (True, False):
            args = 2 * randn(rng, *shape) + 0.5, mask
            agrees(subject.whiten, whitened_by_hand, args, {"shift_mean": shift_mean})


# ------------------------------------------------------------------------------------ policy_loss


def policy_loss_by_hand(
    logprobs, old_logprobs, advantages, mask, clip_low=0.2, clip_high=0.2,
    dual_clip=None, weights=None, denominator=None,
):  # fmt: skip
    """Token by token; the one of the two terms that is smaller is written down."""
    total = 0.0
    places = list(map(tuple, mask.nonzero().tolist()))
    for place in places:
        ratio = torch.exp((logprobs[place] - old_logprobs[place].detach()).clamp(-20, 20))
        a = advantages[place].item()
        stopped = ratio > 1 + clip_high if a > 0 else ratio < 1 - clip_low
        term = ratio * a
        if stopped:
            term = (1 + clip_high if a > 0 else 1 - clip_low) * a + 0 * logprobs[place]
        if dual_clip is not None and a < 0 and term < dual_clip * a:
            term = dual_clip * a + 0 * logprobs[place]
        total = total - term * (1.0 if weights is None else weights[place].item())
    return total / (len(places) if denominator is None else denominator)


def one_token(ratio, advantage):
    """Arguments of the loss for a single token at this ratio."""
    old = tensor([[-1.0]])
    return old + math.log(ratio), old, tensor([[advantage]]), tensor([[YES]])


def check_policy_loss(subject, args, kwargs=None, wrt=(0,)):
    agrees(subject.policy_loss, policy_loss_by_hand, args, kwargs, wrt=wrt, pick=loss_of)


@exercise("ppo.policy_loss", core=True)
def test_the_loss_before_the_first_update(subject):
    """before the first update the loss is minus the mean advantage"""
    args = tensor([[-1.0, -2.0]]), tensor([[-1.0, -2.0]]), tensor([[1.0, 3.0]]), tensor([[YES] * 2])
    same(subject.policy_loss, args, -2.0, pick=loss_of)
    check_policy_loss(subject, args)


@exercise("ppo.policy_loss", core=True)
def test_the_ratio_of_a_token(subject):
    """the ratio is new over old probability, and multiplies the advantage"""
    for ratio, advantage in ((1.1, 2.0), (0.9, 2.0), (1.1, -2.0), (0.9, -2.0)):
        check_policy_loss(subject, one_token(ratio, advantage))


@exercise("ppo.policy_loss")
def test_a_token_that_has_moved_enough(subject):
    """a token that has moved as far as it may gains nothing more, and gets no gradient"""
    check_policy_loss(subject, one_token(1.5, 1.0))
    check_policy_loss(subject, one_token(0.5, -1.0))


@exercise("ppo.policy_loss")
def test_a_token_that_moved_the_wrong_way(subject):
    """a token that moved the wrong way is pulled back, however far it is"""
    check_policy_loss(subject, one_token(0.5, 1.0))
    check_policy_loss(subject, one_token(1.5, -1.0))


@exercise("ppo.policy_loss")
def test_two_clip_ranges(subject):
    """clip_low bounds the ratio from below, clip_high from above"""
    for ratio, advantage in ((1.5, 1.0), (0.5, -1.0), (1.2, 1.0), (0.8, -1.0)):
        check_policy_loss(subject, one_token(ratio, advantage), {"clip_low": 0.1, "clip_high": 0.3})


@exercise("ppo.policy_loss")
def test_the_dual_clip(subject):
    """the dual clip bounds the loss of a bad token, and touches no other"""
    for ratio, advantage in ((8.0, -1.0), (2.0, -1.0), (0.5, -1.0), (0.5, 1.0), (8.0, 1.0)):
        check_policy_loss(subject, one_token(ratio, advantage), {"dual_clip": 3.0})


@exercise("ppo.policy_loss")
def test_the_policy_loss_beside_pads(subject):
    """what stands outside the mask changes neither loss nor gradient, not even NaN"""
    mask = tensor([[NO, YES, YES, NO], [YES, NO, NO, NO]])
    parts = tensor([[0.0, -1.0, -2.0, 0.0], [-0.5, 0.0, 0.0, 0.0]]), torch.full((2, 4), -1.1)
    advantages = tensor([[0.0, 1.0, -2.0, 0.0], [3.0, 0.0, 0.0, 0.0]])
    for odd in (500.0, NAN):
        args = [torch.where(mask, x, odd) for x in (*parts, advantages)]
        check_policy_loss(subject, (*args, mask))
    check_policy_loss(subject, (*parts, torch.where(mask, advantages, NAN), mask))
    without = torch.where(mask, parts[1], -INF)
    check_policy_loss(subject, (parts[0], without, advantages, mask))


@exercise("ppo.policy_loss")
def test_the_policy_loss_in_parts(subject):
    """with a common denominator the losses of two micro-batches add up"""
    args = tensor([[-1.0, -2.0]]), tensor([[-1.1, -1.9]]), tensor([[1.0, 3.0]]), tensor([[YES] * 2])
    check_policy_loss(subject, args, {"denominator": 8})
    check_policy_loss(subject, args, {"denominator": tensor(0.5)})


@exercise("ppo.policy_loss")
def test_the_weights_of_tokens(subject):
    """weights multiply each token's term and get no gradient"""
    args = tensor([[-1.0, -2.0]]), tensor([[-1.1, -1.9]]), tensor([[1.0, 3.0]]), tensor([[YES] * 2])
    weights = tensor([[2.0, 0.5]])
    check_policy_loss(subject, (*args, 0.2, 0.2, None, weights), wrt=(0, 7))


@exercise("ppo.policy_loss")
def test_log_ratios_that_ran_away(subject):
    """a huge log-ratio gives no infinity and no NaN"""
    mask = tensor([[YES]])
    for log_ratio, advantage in ((200.0, 1.0), (-200.0, -1.0)):
        args = tensor([[log_ratio]]), tensor([[0.0]]), tensor([[advantage]]), mask
        check_policy_loss(subject, args)
    args = tensor([[200.0]]), tensor([[0.0]]), tensor([[-1.0]]), mask
    same(subject.policy_loss, args, math.exp(20), pick=loss_of)


@exercise("ppo.policy_loss")
def test_the_golden_policy_loss(subject, golden):
    """seven tokens computed elsewhere: loss and statistics"""
    case = golden("G07")
    parts = [case.inputs[name] for name in ("logp", "old_logp", "advantages")]
    args, expected = (*parts, case.inputs["action_mask"].bool()), case.expected
    same(subject.policy_loss, args, expected["loss_token_mean"], pick=loss_of)
    stats = {
        "clipfrac": expected["clipfrac"],
        "kl_k1": expected["approx_kl_k1"],
        "kl_k3": expected["approx_kl_k3"],
        "ratio_mean": expected["ratio_mean"],
        "ratio_max": expected["ratio_max"],
    }
    same(subject.policy_loss, args, stats, pick=lambda out: out[1])


@exercise("ppo.policy_loss")
def test_value_and_gradient_of_the_policy_loss(subject, rng):
    """value and gradient on any batch; only the new log-probabilities get one"""
    for shape in ((1, 3), (5, 4)):
        logprobs = -randn(rng, *shape).abs()
        args = logprobs, logprobs + 0.4 * randn(rng, *shape), randn(rng, *shape), some(rng, *shape)
        for kwargs in ({}, {"clip_low": 0.1, "clip_high": 0.4, "dual_clip": 1.5}):
            check_policy_loss(subject, args, kwargs, wrt=(0, 1, 2))


# ------------------------------------------------------------------------------------- value_loss


def value_loss_by_hand(values, old_values, returns, mask, clip=0.2, denominator=None):
    """Entry by entry."""
    total = 0.0
    places = list(map(tuple, mask.nonzero().tolist()))
    for place in places:
        old, target = old_values[place].item(), returns[place].item()
        value = values[place]
        error = (value - target) ** 2
        if clip is not None:
            if value > old + clip:
                near = old + clip + 0 * value
            elif value < old - clip:
                near = old - clip + 0 * value
            else:
                near = value
            if (near - target) ** 2 > error:
                error = (near - target) ** 2
        total = total + error / 2
    return total / (len(places) if denominator is None else denominator)


def one_value(value, old, target):
    """Arguments of the loss for a single value."""
    return tensor([[value]]), tensor([[old]]), tensor([[target]]), tensor([[YES]])


def check_value_loss(subject, args, kwargs=None, wrt=(0,)):
    agrees(subject.value_loss, value_loss_by_hand, args, kwargs, wrt=wrt, pick=loss_of)


@exercise("ppo.value_loss", core=True)
def test_half_the_squared_error(subject):
    """without a clip it is half the mean squared error"""
    args = tensor([[1.0, 2.0]]), torch.zeros(1, 2), tensor([[3.0, 2.0]]), tensor([[YES, YES]])
    same(subject.value_loss, args, 1.0, {"clip": None}, pick=loss_of)
    check_value_loss(subject, args, {"clip": None})


@exercise("ppo.value_loss", core=True)
def test_a_value_within_the_range(subject):
    """a value near its old one is not clipped"""
    for args in (one_value(1.1, 1.0, 3.0), one_value(0.9, 1.0, 3.0), one_value(1.1, 1.0, 0.0)):
        check_value_loss(subject, args)


@exercise("ppo.value_loss")
def test_a_value_that_has_moved_enough(subject):
    """a value that ran ahead towards its target gets no gradient: the larger square counts"""
    check_value_loss(subject, one_value(1.0, 0.0, 1.0))
    check_value_loss(subject, one_value(2.0, 3.0, 1.0))


@exercise("ppo.value_loss")
def test_a_value_that_moved_away(subject):
    """a value that moved away from its target is pulled back"""
    check_value_loss(subject, one_value(2.0, 1.0, 0.0))
    check_value_loss(subject, one_value(2.0, 3.0, 4.0))


@exercise("ppo.value_loss")
def test_another_value_clip(subject):
    """`clip` is the range"""
    check_value_loss(subject, one_value(1.0, 0.0, 2.0), {"clip": 0.5})
    check_value_loss(subject, one_value(1.0, 0.0, 2.0), {"clip": 1.5})


@exercise("ppo.value_loss")
def test_the_value_loss_beside_pads(subject):
    """what stands outside the mask changes neither loss nor gradient, not even NaN"""
    mask = tensor([[NO, YES, YES, NO], [YES, NO, NO, NO]])
    for odd in (50.0, NAN):
        columns = ((0.5, 1.0, 2.0), (0.4, 1.5, 2.0), (1.0, 1.0, 3.0))
        args = [torch.full((2, 4), odd).masked_scatter(mask, tensor(c)) for c in columns]
        check_value_loss(subject, (*args, mask))


@exercise("ppo.value_loss")
def test_the_value_loss_in_parts(subject):
    """with a common denominator the losses of two micro-batches add up"""
    args = tensor([[1.0, 2.0]]), torch.zeros(1, 2), tensor([[3.0, 2.5]]), tensor([[YES, YES]])
    check_value_loss(subject, args, {"denominator": 8})
    check_value_loss(subject, args, {"denominator": tensor(0.5)})


@exercise("ppo.value_loss")
def test_the_golden_value_loss(subject, golden):
    """six values computed elsewhere: loss and statistics"""
    case = golden("G08")
    parts = [case.inputs[name] for name in ("values", "old_values", "returns")]
    args, expected = (*parts, case.inputs["action_mask"].bool()), case.expected
    same(subject.value_loss, args, expected["loss"], pick=loss_of)
    same(subject.value_loss, args, expected["loss_unclipped"], {"clip": None}, pick=loss_of)
    stats = {
        "clipfrac": expected["clipfrac"],
        "error": 2 * expected["loss_unclipped"],
        "explained_variance": expected["explained_variance"],
    }
    same(subject.value_loss, args, stats, pick=lambda out: out[1])


@exercise("ppo.value_loss")
def test_value_and_gradient_of_the_value_loss(subject, rng):
    """value and gradient on any batch; only the new values get one"""
    for shape in ((1, 3), (4,), (5, 4)):
        values = randn(rng, *shape)
        args = values, values + 0.3 * randn(rng, *shape), randn(rng, *shape), some(rng, *shape)
        for kwargs in ({}, {"clip": None}):
            check_value_loss(subject, args, kwargs, wrt=(0, 1, 2))


# -------------------------------------------------------------------- AdaptiveKLController.update


def ziegler(kl_coef, target, horizon, floor, batches):
    """The price after each batch."""
    values = []
    for kl, episodes in batches:
        error = (kl - target) / target
        error = 0.2 if error > 0.2 else -0.2 if error < -0.2 else error
        kl_coef = kl_coef + kl_coef * error * episodes / horizon
        kl_coef = floor if kl_coef < floor else kl_coef
        values.append(kl_coef)
    return values, list(values)


def check_prices(subject, *args):
    """The controller, given kl_coef, target, horizon, floor and batches of (kl, episodes)."""

    def controller(kl_coef, target, horizon, floor, batches):
        return subject.drive(prices, kl_coef, target, horizon, floor, batches)

    same(controller, args, ziegler(*args), rtol=1e-6, what="returned and kept are other prices")


@exercise("ppo.AdaptiveKLController.update", core=True)
def test_on_target_the_price_stays(subject):
    """on target the price stays as it is"""
    check_prices(subject, 0.1, 6.0, 10000.0, 0.0, [(6.0, 1000)])


@exercise("ppo.AdaptiveKLController.update", core=True)
def test_a_kl_near_its_target(subject):
    """10 % above the target it rises, 10 % below it falls"""
    check_prices(subject, 0.1, 6.0, 10000.0, 0.0, [(6.6, 1000)])
    check_prices(subject, 0.1, 6.0, 10000.0, 0.0, [(5.4, 1000)])


@exercise("ppo.AdaptiveKLController.update")
def test_a_kl_far_from_its_target(subject):
    """beyond 20 % the error counts as 20 %, above and below"""
    check_prices(subject, 0.1, 6.0, 10000.0, 0.0, [(60.0, 1000)])
    check_prices(subject, 0.1, 6.0, 10000.0, 0.0, [(0.5, 1000)])
    check_prices(subject, 0.1, 6.0, 10000.0, 0.0, [(-1.0, 1000)])


@exercise("ppo.AdaptiveKLController.update")
def test_a_batch_counts_by_its_episodes(subject):
    """a batch of twice as many episodes moves it twice as far, a longer horizon less"""
    check_prices(subject, 0.5, 2.0, 1000.0, 0.0, [(2.2, 100)])
    check_prices(subject, 0.5, 2.0, 1000.0, 0.0, [(2.2, 200)])
    check_prices(subject, 0.5, 2.0, 4000.0, 0.0, [(2.2, 200)])


@exercise("ppo.AdaptiveKLController.update")
def test_batch_after_batch(subject, rng):
    """each batch begins at the price of the one before"""
    check_prices(subject, 0.15, 6.0, 10000.0, 0.0, [(7.0, 512), (7.0, 512), (1.0, 512)])
    kls = (12 * torch.rand(8, generator=rng)).tolist()
    check_prices(subject, 0.15, 6.0, 10000.0, 0.0, [(kl, 512) for kl in kls])


@exercise("ppo.AdaptiveKLController.update")
def test_the_floor_of_the_price(subject):
    """it never falls below the floor, and leaves it again"""
    check_prices(subject, 0.1, 6.0, 1000.0, 0.09, [(1.0, 1000), (1.0, 1000), (9.0, 500)])


@exercise("ppo.AdaptiveKLController.update")
def test_the_golden_prices(subject, golden):
    """six batches computed elsewhere"""
    case = golden("G09")
    start = (case.inputs[name] for name in ("beta0", "target", "horizon"))
    kl_coef, target, horizon = map(float, start)
    for episodes in (512, 1024):
        batches = [(kl, episodes) for kl in case.inputs["kls"].tolist()]
        returned, _ = subject.drive(prices, kl_coef, target, horizon, 0.0, batches)
        expected = case.expected[f"n={episodes}"].tolist()
        equal(returned, expected, inputs={"batches (kl, episodes)": batches}, rtol=1e-6)


# --------------------------------------------------------------------------------------- ppo_step


@cache
def gradients_by_hand(seed, clip=0.2, unit=1.0, updates=0):
    """(policy's gradient, critic's, losses) of the world `seed` after so many updates at a rate
    of 1; written out, in float64."""
    policy, critic, rollout = world(seed)
    table, worth = policy.table.detach().double(), critic.worth.detach().double()
    for before in range(updates):
        policy_grad, value_grad, _ = gradients_by_hand(seed, clip, unit, before)
        table, worth = table - policy_grad, worth - value_grad
    table.requires_grad_(), worth.requires_grad_()
    tokens, parts = rollout.tokens, {}
    for name in ("logprobs", "advantages", "values", "returns"):
        parts[name] = getattr(rollout, name).double()
    logprobs = torch.zeros_like(parts["logprobs"])
    for b, a in rollout.mask.nonzero().tolist():
        row = table[tokens[b, a]]
        logprobs[b, a] = row[tokens[b, a + 1]] - torch.logsumexp(row, 0)
    policy_loss = policy_loss_by_hand(
        logprobs, parts["logprobs"], parts["advantages"], rollout.mask, clip, clip
    )
    values, old, targets = worth[tokens[:, :-1]], parts["values"] / unit, parts["returns"] / unit
    value_loss = value_loss_by_hand(values, old, targets, rollout.mask)
    (policy_grad,) = torch.autograd.grad(policy_loss, table)
    (value_grad,) = torch.autograd.grad(value_loss, worth)
    losses = {"policy_loss": policy_loss.item(), "value_loss": value_loss.item()}
    return policy_grad.float(), value_grad.float(), losses


def step(subject, seed, settings=None, **options):
    """(what came of an update by the code under test, its inputs to be shown)."""
    given = {"steps": 1, "dirty": False, "more": 0.0, "unit": 1.0, "spoil": ""} | options
    result = subject.drive(update, seed, settings or {}, *given.values())
    return result, {"settings": settings or "defaults", **options}


def check_moves(result, inputs, policy, critic):
    """What gradient descent subtracted from both."""
    equal(result["policy"], policy, "the policy moved differently", inputs, atol=1e-5)
    equal(result["critic"], critic, "the critic moved differently", inputs, atol=1e-5)


def seed_of(rng):
    return int(torch.randint(10**6, (1,), generator=rng))


@exercise("ppo.ppo_step", core=True)
def test_both_models_follow_their_losses(subject, rng):
    """policy and critic each make one step against the gradient of their loss"""
    for settings in ({}, {"clip_low": 0.05, "clip_high": 0.05}):
        seed = seed_of(rng)
        policy, critic, _ = gradients_by_hand(seed, settings.get("clip_low", 0.2))
        check_moves(*step(subject, seed, settings=settings), policy, critic)


@exercise("ppo.ppo_step")
def test_gradients_from_before_are_dropped(subject, rng):
    """gradients left from before play no part"""
    seed = seed_of(rng)
    policy, critic, _ = gradients_by_hand(seed)
    check_moves(*step(subject, seed, dirty=True), policy, critic)


@exercise("ppo.ppo_step")
def test_a_second_update(subject, rng):
    """a second update begins where the first has ended"""
    seed = seed_of(rng)
    first, second = gradients_by_hand(seed), gradients_by_hand(seed, updates=1)
    check_moves(*step(subject, seed, steps=2), first[0] + second[0], first[1] + second[1])


@exercise("ppo.ppo_step")
def test_long_gradients_are_shortened(subject, rng):
    """gradients longer than max_grad_norm are shortened to it, each model's by itself"""
    seed = seed_of(rng)
    policy, critic, _ = gradients_by_hand(seed)
    longest = 0.5 * min(policy.norm().item(), critic.norm().item())
    result, inputs = step(subject, seed, settings={"max_grad_norm": longest})
    policy, critic = (longest * grad / grad.norm() for grad in (policy, critic))
    check_moves(result, inputs, policy, critic)


@exercise("ppo.ppo_step")
def test_the_lengths_are_those_before_shortening(subject, rng):
    """the diagnostics hold both losses, and the gradients' lengths before they were shortened"""
    seed = seed_of(rng)
    policy, critic, losses = gradients_by_hand(seed)
    lengths = {"policy_grad_norm": policy.norm().item(), "value_grad_norm": critic.norm().item()}
    shortest = 0.5 * min(lengths.values())
    for longest in (1e9, shortest):
        result, inputs = step(subject, seed, settings={"max_grad_norm": longest})
        stats = result["stats"]
        equal(stats, losses | lengths, "other diagnostics", inputs, atol=1e-5)
        entropy = stats.get("entropy")
        expect(entropy is not None, "the policy's entropy is missing", inputs, "entropy", stats)
        kinds = {name: type(value).__name__ for name, value in stats.items()}
        right = set(kinds.values()) == {"float"}
        expect(right, "the diagnostics must be floats", inputs, "float", kinds)


@exercise("ppo.ppo_step")
def test_more_gradient_is_added(subject, rng):
    """more_policy_gradient is called before gradients are shortened, and its terms are reported"""
    seed = seed_of(rng)
    policy, critic, _ = gradients_by_hand(seed)
    policy = policy + 0.5
    result, inputs = step(subject, seed, more=0.5)
    check_moves(result, inputs, policy, critic)
    equal(result["stats"], {"more_loss": 2.5}, "its terms are missing", inputs)
    longest = 0.5 * policy.norm().item()
    result, inputs = step(subject, seed, more=0.5, settings={"max_grad_norm": longest})
    shortened = policy * longest / policy.norm()
    equal(result["policy"], shortened, "the policy moved differently", inputs, atol=1e-5)


@exercise("ppo.ppo_step")
def test_the_critic_in_other_units(subject, rng):
    """the critic's targets are normalised when a function for it is given"""
    seed = seed_of(rng)
    policy, critic, _ = gradients_by_hand(seed, unit=4.0)
    check_moves(*step(subject, seed, unit=4.0), policy, critic)


@exercise("ppo.ppo_step")
def test_micro_batches_change_nothing(subject, rng):
    """micro-batches change nothing"""
    seed = seed_of(rng)
    policy, critic, _ = gradients_by_hand(seed)
    check_moves(*step(subject, seed, settings={"micro_batch_size": 1}), policy, critic)


@exercise("ppo.ppo_step")
def test_nothing_moves_when_something_is_nan(subject, rng):
    """a NaN raises TrainingError, and neither model has moved"""
    for spoil in ("advantages", "returns"):
        result, inputs = step(subject, seed_of(rng), spoil=spoil)
        raised = result["raised"]
        expect(raised == "TrainingError", "no TrainingError", inputs, "TrainingError", raised)
        for model in ("policy", "critic"):
            still = bool((result[model] == 0).all())
            what = f"the {model} moved although the {spoil} hold a NaN"
            expect(still, what, inputs, 0.0, result[model])
