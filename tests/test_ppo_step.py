"""One update of PPO and of PPO-ptx on real (tiny) networks: what moves, by how much, and why."""

import copy
from dataclasses import fields, replace

import pytest
import torch
from tiny_models import KINDS, VOCABULARY, tiny

from rlhf_course import mdp
from rlhf_course.errors import TrainingError
from rlhf_course.ppo import policy_backward, ppo_step
from rlhf_course.ppo_ptx import PopArt, PTXSettings, ppo_ptx_step
from rlhf_course.reward_model import ScalarModel
from rlhf_course.rollout import PPOSettings, Rollout, action_logprobs
from rlhf_course.sampling import generate

FREE = PPOSettings(max_grad_norm=1e9)  # nothing is shortened
PROMPTS = [[5, 9, 11, 2], [7, 7], [1, 2, 3, 4, 5, 6, 8], [30, 0, 30], [17, 19, 23, 29, 31], [3]]
LENGTHS = [9, 3, 1, 6, 4, 2]  # of the answers, in tokens


def draw(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def models(kind="gpt"):
    """A policy, and a critic that shares nothing with it."""
    return tiny(kind, seed=1).train(), ScalarModel.from_language_model(tiny(kind, seed=2)).train()


def sampled(policy, temperature=1.0):
    """Answers of the policy, with the sampler's own log-probabilities; made-up advantages."""
    generator = torch.Generator().manual_seed(4)
    out = generate(policy, PROMPTS, max(LENGTHS), VOCABULARY, temperature, generator=generator)
    rows = [p + r[:n] for p, r, n in zip(PROMPTS, out.responses, LENGTHS, strict=True)]
    T = max(map(len, rows))
    tokens = torch.tensor([row + [0] * (T - len(row)) for row in rows])
    prompt_lengths = torch.tensor([len(prompt) for prompt in PROMPTS])
    mask = mdp.action_mask(prompt_lengths, torch.tensor(LENGTHS), T)
    flat = [x for logprobs, n in zip(out.logprobs, LENGTHS, strict=True) for x in logprobs[:n]]
    logprobs = torch.zeros(mask.shape).masked_scatter(mask, torch.tensor(flat))
    advantages, values, returns = (draw(*mask.shape, seed=i) * mask for i in range(3))
    reference = logprobs + 0.2 * draw(*mask.shape, seed=8) * mask
    weights = torch.ones_like(logprobs)
    return Rollout(tokens, mask, logprobs, advantages, values, returns, mask, reference, weights)


def moved(rollout):
    """The same answers after some updates: ratios on both sides of the clip, for both signs."""
    noise = 0.3 * draw(*rollout.mask.shape, seed=7) * rollout.mask
    return replace(rollout, logprobs=rollout.logprobs + noise)


def parameters(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def gradient_of(model, loss):
    """The gradient of a loss by itself, flat."""
    grads = torch.autograd.grad(loss, list(model.parameters()), allow_unused=True)
    zipped = zip(grads, model.parameters(), strict=True)
    return torch.cat([(torch.zeros_like(p) if g is None else g).flatten() for g, p in zipped])


def step(policy, critic, rollout, settings=FREE, lr=1.0, rows=None, ptx=None, **options):
    """What one step of plain gradient descent subtracts from copies of the two: with a rate of 1
    and no shortening, the gradients. -> (policy's, critic's, diagnostics)."""
    policy, critic = copy.deepcopy(policy), copy.deepcopy(critic)
    before = parameters(policy), parameters(critic)
    optimizers = [torch.optim.SGD(model.parameters(), lr=lr) for model in (policy, critic)]
    if ptx is None:
        stats = ppo_step(policy, critic, rollout, *optimizers, settings, **options)
    else:
        stats = ppo_ptx_step(
            policy, critic, rollout, rows, *optimizers, settings, ptx, **options
        )  # fmt: skip
    return before[0] - parameters(policy), before[1] - parameters(critic), stats


def near(actual, expected, tol=2e-6):
    """Equal up to `tol` of the whole's length, which is not small."""
    assert expected.norm() > 1e-2
    assert (actual - expected).norm() <= tol * max(expected.norm(), 1.0)


# ----------------------------------------------- the losses again, token by token, from all logits


def plain_policy_loss(policy, rollout, s):
    """(loss, mean entropy), as one would write them down."""
    logits = policy(rollout.tokens) / s.temperature
    terms, entropies = [], []
    for b in range(len(rollout)):
        log_ratios = []
        for a in rollout.mask[b].nonzero().flatten().tolist():
            logp = logits[b, a].log_softmax(-1)
            log_ratios.append(logp[rollout.tokens[b, a + 1]] - rollout.logprobs[b, a])
            entropies.append(-(logp.exp() * logp).sum())
        advantages = rollout.advantages[b][rollout.mask[b]]
        if s.sequence_ratio:  # one ratio and one advantage an answer
            log_ratios, advantages = [sum(log_ratios)], advantages[:1]
        for log_ratio, advantage in zip(log_ratios, advantages, strict=True):
            ratio = log_ratio.exp()
            clipped = ratio.clamp(1 - s.clip_low, 1 + s.clip_high)
            objective = torch.min(ratio * advantage, clipped * advantage)
            if s.dual_clip and advantage < 0:
                objective = torch.max(objective, s.dual_clip * advantage)
            terms.append(objective)
    return -torch.stack(terms).mean(), torch.stack(entropies).mean()


def plain_value_loss(critic, rollout, s, normalize=lambda x: x):
    scores, terms = critic.token_scores(rollout.tokens), []
    for b, a in rollout.value_mask.nonzero().tolist():
        value, old, target = (
            scores[b, a], normalize(rollout.values[b, a]), normalize(rollout.returns[b, a])
        )  # fmt: skip
        error = (value - target) ** 2
        if s.value_clip is not None:
            near_old = old + (value - old).clamp(-s.value_clip, s.value_clip)
            error = torch.max(error, (near_old - target) ** 2)
        terms.append(error)
    return 0.5 * torch.stack(terms).mean()


VARIANTS = {
    "default": FREE,
    "asymmetric": replace(FREE, clip_low=0.05, clip_high=0.4, dual_clip=1.1, value_clip=None),
    "cold": replace(FREE, temperature=0.7, value_clip=1.0),
    "sequence": replace(FREE, sequence_ratio=True, clip_low=0.1, clip_high=0.15),
    "entropy": replace(FREE, entropy_coef=0.5),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_update_is_the_gradient_of_the_written_out_losses(kind, variant):
    settings = VARIANTS[variant]
    policy, critic = models(kind)
    rollout = moved(sampled(policy, settings.temperature))
    policy_step, critic_step, stats = step(policy, critic, rollout, settings)
    loss, entropy = plain_policy_loss(policy, rollout, settings)
    error = plain_value_loss(critic, rollout, settings)
    near(policy_step, gradient_of(policy, loss - settings.entropy_coef * entropy))
    near(critic_step, gradient_of(critic, error))
    assert stats["policy_loss"] == pytest.approx(loss.item(), abs=1e-5)
    assert stats["entropy"] == pytest.approx(entropy.item(), abs=1e-5)
    assert stats["value_loss"] == pytest.approx(error.item(), abs=1e-5)
    assert stats["policy_grad_norm"] == pytest.approx(policy_step.norm().item(), rel=1e-4)
    assert stats["value_grad_norm"] == pytest.approx(critic_step.norm().item(), rel=1e-4)
    assert 0 < stats["clipfrac"] < 1
    assert {type(value) for value in stats.values()} == {float}


def test_the_settings_above_all_matter():
    policy, critic = models()
    rollout = moved(sampled(policy))
    plain, values, _ = step(policy, critic, rollout)
    for variant in ("asymmetric", "cold", "sequence", "entropy"):
        other, _, _ = step(policy, critic, rollout, VARIANTS[variant])
        assert (other - plain).norm() > 0.05 * plain.norm(), variant
    for clip in (None, 1.0):
        _, other, _ = step(policy, critic, rollout, replace(FREE, value_clip=clip))
        assert (other - values).norm() > 0.01 * values.norm()


# ------------------------------------------------------------------------ what must change nothing


def assert_same_step(first, second):
    near(first[0], second[0], 1e-6)
    near(first[1], second[1], 1e-6)
    assert first[2] == pytest.approx(second[2], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sequence_ratio", [False, True])
@pytest.mark.parametrize("size", [1, 2, 4, 6, 50])
def test_the_size_of_micro_batches(kind, sequence_ratio, size):
    policy, critic = models(kind)
    settings = replace(FREE, sequence_ratio=sequence_ratio, entropy_coef=0.1)
    rollout = moved(sampled(policy))
    whole = step(policy, critic, rollout, settings)
    parts = step(policy, critic, rollout, replace(settings, micro_batch_size=size))
    assert_same_step(parts, whole)


@pytest.mark.parametrize("kind", KINDS)
def test_the_order_of_rows(kind):
    policy, critic = models(kind)
    rollout = moved(sampled(policy))
    order = torch.tensor([3, 0, 5, 4, 1, 2])
    for size in (None, 4):
        settings = replace(FREE, micro_batch_size=size)
        assert_same_step(
            step(policy, critic, rollout.select(order), settings),
            step(policy, critic, rollout, settings),
        )


@pytest.mark.parametrize("kind", KINDS)
def test_more_padding_and_what_stands_on_it(kind):
    policy, critic = models(kind)
    rollout = moved(sampled(policy))
    rollout = replace(rollout, weights=torch.rand_like(rollout.advantages) + 0.5)
    fill = {"tokens": 13, "mask": False, "value_mask": False}
    wider = {}
    for name in (field.name for field in fields(rollout)):
        padding = fill.get(name, float("nan"))
        wider[name] = torch.nn.functional.pad(getattr(rollout, name), (0, 6), value=padding)
    assert_same_step(step(policy, critic, Rollout(**wider)), step(policy, critic, rollout))
    outside = {  # on the prompt's tokens and behind the answer: whatever the masks leave out
        name: torch.where(rollout.mask, getattr(rollout, name), float("nan"))
        for name in ("logprobs", "advantages", "values", "returns", "weights")
    }
    soiled = replace(rollout, **outside)
    assert_same_step(step(policy, critic, soiled), step(policy, critic, rollout))


# ---------------------------------------------------------------------------- the first update


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_before_the_first_update_every_ratio_is_1(kind, temperature):
    policy, critic = models(kind)
    rollout = sampled(policy, temperature)
    settings = replace(FREE, temperature=temperature, micro_batch_size=4)
    _, _, stats = step(policy, critic, rollout, settings)
    assert stats["log_ratio_max"] < 2e-5
    assert stats["ratio_mean"] == pytest.approx(1, abs=1e-5)
    assert stats["ratio_max"] == pytest.approx(1, abs=2e-5)
    assert stats["clipfrac"] == 0
    assert stats["kl_k1"] == pytest.approx(0, abs=1e-5)
    assert stats["kl_k3"] == pytest.approx(0, abs=1e-5)
    # With ratios of 1 the loss is minus the mean advantage.
    assert stats["policy_loss"] == pytest.approx(
        -rollout.advantages[rollout.mask].mean().item(), abs=1e-4
    )
    _, _, wrong = step(policy, critic, rollout, replace(settings, temperature=temperature + 0.3))
    assert wrong["log_ratio_max"] > 0.1


def test_the_second_update_sees_what_the_first_has_done():
    policy, critic = models()
    rollout = sampled(policy)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.05) for model in (policy, critic)]
    settings = replace(FREE, value_clip=None)
    first, second = (ppo_step(policy, critic, rollout, *optimizers, settings) for _ in range(2))
    assert first["log_ratio_max"] < 2e-5
    assert second["log_ratio_max"] > 0.01
    assert second["kl_k3"] > 1e-5
    assert second["policy_loss"] < first["policy_loss"]
    assert second["value_loss"] < first["value_loss"]


# ------------------------------------------------------------------------------- which way it moves


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sign", [1.0, -1.0])
def test_a_token_that_did_well_becomes_likelier(kind, sign):
    policy, critic = models(kind)
    rollout = sampled(policy)
    b, a = 1, rollout.mask[1].nonzero()[1].item()
    advantages = torch.zeros_like(rollout.advantages)
    advantages[b, a] = sign
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (policy, critic)]
    ppo_step(policy, critic, replace(rollout, advantages=advantages), *optimizers, FREE)
    with torch.no_grad():
        after, _ = action_logprobs(policy, rollout.tokens, rollout.mask)
    assert sign * (after - rollout.logprobs)[b, a] > 1e-3


def test_a_token_beyond_the_clip_is_pulled_back_but_not_pushed_on():
    policy, critic = models()
    rollout = sampled(policy)
    beyond = rollout.logprobs - 0.5 * rollout.mask  # every ratio is 1.65
    _, _, stats = step(policy, critic, replace(rollout, logprobs=rollout.logprobs + rollout.mask))
    assert stats["log_ratio_max"] == pytest.approx(1, abs=1e-4)  # of e⁻¹ as of e
    for sign, still in ((1.0, True), (-1.0, False)):
        advantages = sign * rollout.mask.float()
        policy_step, _, stats = step(
            policy, critic, replace(rollout, logprobs=beyond, advantages=advantages)
        )  # fmt: skip
        assert (policy_step.norm().item() == 0) == still
        assert stats["clipfrac"] == pytest.approx(float(still))


def test_the_entropy_bonus_makes_the_policy_less_sure():
    policy, critic = models()
    rollout = sampled(policy)
    rollout = replace(rollout, advantages=torch.zeros_like(rollout.advantages))
    seen = []
    for coef in (0.0, 0.5, -0.5):
        copied = copy.deepcopy(policy)
        optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (copied, critic)]
        ppo_step(copied, critic, rollout, *optimizers, replace(FREE, entropy_coef=coef))
        with torch.no_grad():
            _, entropy = action_logprobs(copied, rollout.tokens, rollout.mask)
        seen.append(entropy[rollout.mask].mean())
    assert seen[2] < seen[0] - 1e-3 < seen[0] + 1e-3 < seen[1]


def test_long_gradients_are_shortened_and_their_length_before_is_reported():
    policy, critic = models()
    rollout = moved(sampled(policy))
    free = step(policy, critic, rollout)
    short = step(policy, critic, rollout, replace(FREE, max_grad_norm=0.01))
    for i, name in ((0, "policy_grad_norm"), (1, "value_grad_norm")):
        assert short[2][name] == pytest.approx(free[i].norm().item(), rel=1e-4)
        assert short[i].norm() == pytest.approx(0.01, rel=1e-3)
        cosine = torch.nn.functional.cosine_similarity(short[i], free[i], dim=0)
        assert cosine > 0.999


def test_the_gradient_of_an_earlier_step_is_gone():
    policy, critic = models()
    rollout = moved(sampled(policy))
    clean = step(policy, critic, rollout)
    for parameter in (*policy.parameters(), *critic.parameters()):
        parameter.grad = torch.ones_like(parameter)
    assert_same_step(step(policy, critic, rollout), clean)


# ----------------------------------------------------------------------------------- the critic


def test_the_critic_is_trained_where_the_value_mask_says():
    policy, critic = models()
    rollout = sampled(policy)
    first = torch.zeros_like(rollout.mask)
    first[torch.arange(6), rollout.mask.int().argmax(dim=1)] = True
    one_value = replace(rollout, value_mask=first)
    whole = step(policy, critic, one_value)
    near(whole[1], gradient_of(critic, plain_value_loss(critic, one_value, FREE)))
    assert_same_step(step(policy, critic, one_value, replace(FREE, micro_batch_size=4)), whole)


def test_popart_trains_the_critic_on_normalised_targets():
    policy, critic = models()
    rollout = sampled(policy)
    with torch.no_grad():
        scores = critic.token_scores(rollout.tokens)[:, :-1]
    values, returns = scores + 3 * rollout.values, 40 + 7 * rollout.returns
    rollout = replace(rollout, values=values, returns=returns)
    popart = PopArt(critic.head)
    popart.update(rollout.returns, rollout.mask)
    assert popart.std > 5
    _, critic_step, stats = step(policy, critic, rollout, normalize=popart.normalize)
    loss = plain_value_loss(critic, rollout, FREE, lambda x: (x - popart.mean) / popart.std)
    near(critic_step, gradient_of(critic, loss))
    assert stats["value_loss"] == pytest.approx(loss.item(), rel=1e-4)
    assert 0 < stats["value_clipfrac"] < 1
    options = {"normalize": popart.normalize, "rows": CORPUS, "ptx": PTXSettings(0.4)}
    near(step(policy, critic, rollout, **options)[1], critic_step)
    _, unscaled, _ = step(policy, critic, rollout)
    assert unscaled.norm() > 3 * critic_step.norm()


# ----------------------------------------------------------------------------- what is not finite


def with_adam(*trained):
    return [torch.optim.AdamW(model.parameters(), lr=1e-2) for model in trained]


@pytest.mark.parametrize(
    ("field", "value", "named"),
    [
        ("advantages", float("nan"), "policy_loss"),
        ("advantages", float("inf"), "policy_loss"),
        ("logprobs", float("nan"), "policy_loss"),
        ("returns", float("nan"), "value_loss"),
        ("returns", float("inf"), "value_loss"),
    ],
)
def test_what_is_not_finite_stops_before_anything_is_updated(field, value, named):
    policy, critic = models()
    good = sampled(policy)
    optimizers = with_adam(policy, critic)
    ppo_step(policy, critic, good, *optimizers, FREE)
    before = [parameters(policy), parameters(critic)]
    states = copy.deepcopy([optimizer.state_dict() for optimizer in optimizers])
    bad = getattr(good, field).clone()
    bad[tuple(good.mask.nonzero()[3])] = value
    settings = replace(FREE, micro_batch_size=2)
    with pytest.raises(TrainingError, match=f"PPO update: .*{named}.* NaN or infinite"):
        ppo_step(policy, critic, replace(good, **{field: bad}), *optimizers, settings)
    assert torch.equal(parameters(policy), before[0])
    assert torch.equal(parameters(critic), before[1])
    for optimizer, state in zip(optimizers, states, strict=True):
        for index, slots in optimizer.state_dict()["state"].items():
            for name, slot in slots.items():
                assert torch.equal(slot, state["state"][index][name])
    stats = ppo_step(policy, critic, good, *optimizers, settings)  # and it can go on
    assert stats["policy_grad_norm"] > 0
    assert not torch.equal(parameters(policy), before[0])


def test_a_term_that_was_added_is_checked_too():
    policy, critic = models()
    rollout, before = sampled(policy), parameters(policy)
    with pytest.raises(TrainingError, match="PPO update: ptx_loss is NaN"):
        ppo_step(
            policy, critic, rollout, *with_adam(policy, critic), FREE,
            more_policy_gradient=lambda: {"ptx_loss": float("nan")},
        )  # fmt: skip
    assert torch.equal(parameters(policy), before)


# -------------------------------------------------------------------------------------- PPO-ptx


CORPUS = torch.randint(VOCABULARY, (5, 11), generator=torch.Generator().manual_seed(8))


def plain_ptx_loss(policy, reduction):
    logp = policy(CORPUS).log_softmax(-1)
    rows = [-sum(logp[b, t, CORPUS[b, t + 1]] for t in range(10)) for b in range(5)]
    return sum(rows) / (5 if reduction == "seq_sum" else 50)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("reduction", ["token_mean", "seq_sum"])
def test_the_gradient_is_that_of_the_sum_of_both_objectives(kind, reduction):
    policy, critic = models(kind)
    rollout = moved(sampled(policy))
    ptx = PTXSettings(0.4, reduction)
    both, values, stats = step(policy, critic, rollout, rows=CORPUS, ptx=ptx, measure=True)
    loss, _ = plain_policy_loss(policy, rollout, FREE)
    corpus_loss = plain_ptx_loss(policy, reduction)
    near(both, gradient_of(policy, loss + 0.4 * corpus_loss))
    assert stats["ptx_loss"] == pytest.approx(corpus_loss.item(), rel=1e-5)
    loss, _ = plain_policy_loss(policy, rollout, FREE)
    ppo_norm = gradient_of(policy, loss).norm().item()
    ptx_norm = gradient_of(policy, 0.4 * plain_ptx_loss(policy, reduction)).norm().item()
    assert stats["grad_norm_ppo"] == pytest.approx(ppo_norm, rel=1e-4)
    assert stats["grad_norm_ptx"] == pytest.approx(ptx_norm, rel=1e-4)
    assert stats["policy_grad_norm"] == pytest.approx(both.norm().item(), rel=1e-4)
    _, alone, _ = step(policy, critic, rollout)
    near(values, alone, 1e-6)


def test_the_pretraining_gradient_is_proportional_to_its_coefficient():
    policy, critic = models()
    rollout = sampled(policy)
    norms = {}
    for coef in (0.1, 0.2, 27.8):
        _, _, stats = step(
            policy, critic, rollout, rows=CORPUS, ptx=PTXSettings(coef), measure=True
        )
        norms[coef] = stats["grad_norm_ptx"]
    assert norms[0.1] > 0.01
    assert norms[0.2] == pytest.approx(2 * norms[0.1], rel=1e-3)
    assert norms[27.8] == pytest.approx(278 * norms[0.1], rel=1e-3)


def test_without_rows_it_is_ppo_and_unmeasured_it_is_the_same():
    policy, critic = models()
    rollout = moved(sampled(policy))
    without = step(policy, critic, rollout, rows=None, ptx=PTXSettings(0.4), measure=True)
    assert_same_step(without, step(policy, critic, rollout))
    assert "ptx_loss" not in without[2]
    settings = replace(FREE, micro_batch_size=2)
    kwargs = {"rows": CORPUS, "ptx": PTXSettings(0.4)}
    measured = step(policy, critic, rollout, measure=True, **kwargs)
    plain = step(policy, critic, rollout, settings, **kwargs)
    assert "grad_norm_ppo" not in plain[2]
    near(plain[0], measured[0], 1e-6)


def test_ptx_makes_the_corpus_likelier():
    policy, critic = models()
    rollout = sampled(policy)
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.02) for model in (policy, critic)]
    ptx = PTXSettings(1.0)
    losses = [
        ppo_ptx_step(policy, critic, rollout, CORPUS, *optimizers, FREE, ptx)["ptx_loss"]
        for _ in range(5)
    ]
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0] - 0.05


# ---------------------------------------------------------------------------------- the rollout


def test_selecting_rows_cuts_the_columns_that_only_hold_pads():
    rollout = sampled(tiny("gpt", seed=1))
    short = int(rollout.mask.int().cumsum(1).argmax(1).argmin())
    rows = torch.tensor([short])
    one = rollout.select(rows)
    last = int(rollout.mask[short].nonzero().max())
    width = min(-(-(last + 2) // 8) * 8, rollout.tokens.shape[1])  # a multiple of 8 repeats
    assert one.tokens.shape == (1, width)
    assert last + 2 <= width
    for field in fields(rollout):
        whole, cut = getattr(rollout, field.name)[rows], getattr(one, field.name)
        assert torch.equal(whole[:, : cut.shape[1]], cut)
        assert cut.shape[1] == width - 1 + (field.name == "tokens")
    assert len(one) == 1


def test_micro_batches_are_slices_in_order():
    rollout = sampled(tiny("gpt", seed=1))
    parts = list(rollout.micro_batches(4))
    assert [len(part) for part in parts] == [4, 2]
    assert torch.equal(parts[1].mask.sum(1), rollout.mask.sum(1)[4:])
    assert [len(part) for part in rollout.micro_batches(None)] == [6]


@pytest.mark.parametrize("kind", KINDS)
def test_action_logprobs_are_the_samplers_and_0_elsewhere(kind):
    policy = tiny(kind, seed=1)
    rollout = sampled(policy, 0.7)
    with torch.no_grad():
        logprobs, entropy = action_logprobs(policy, rollout.tokens, rollout.mask, 0.7)
        logits = policy(rollout.tokens)
    torch.testing.assert_close(logprobs, rollout.logprobs, rtol=0, atol=2e-5)
    expected = mdp.token_entropy(logits, 0.7)
    torch.testing.assert_close(entropy, expected * rollout.mask, rtol=0, atol=1e-5)
    assert not logprobs[~rollout.mask].any()
    assert not entropy[~rollout.mask].any()


def test_logits_are_made_at_the_actions_alone():
    policy, _ = models()
    rollout, rows, unembed = sampled(policy), [], policy.unembed
    policy.unembed = lambda hidden: rows.append(len(hidden)) or unembed(hidden)
    policy_backward(policy, rollout, FREE)
    assert rows == [int(rollout.mask.sum()) + 1]  # one more ends the text
