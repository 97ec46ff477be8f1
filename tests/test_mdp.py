"""Chapter 04: masks, log-probabilities, KL, rewards, advantages."""

import math

import numpy as np
import pytest
import torch
from torch.autograd import gradcheck
from transformers import GPT2Config, GPT2LMHeadModel

from rlhf_course import mdp

NAN = float("nan")
DOUBLE = torch.float64


def close(actual, expected, tol=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol)


def pads_on(x, left, right, fill):
    """x with `left` and `right` more columns of `fill` on the action axis."""
    return torch.nn.functional.pad(x, (left, right), value=fill)


@pytest.fixture
def rollout():
    """Four answers of 1, 3, 5 and 4 tokens in a batch of T = 9; what is outside the mask is NaN."""
    generator = torch.Generator().manual_seed(4)
    prompt, response = torch.tensor([3, 2, 4, 1]), torch.tensor([1, 3, 5, 4])
    mask = mdp.action_mask(prompt, response, 9)
    names = ("logprobs", "ref_logprobs", "rewards", "values", "kl")
    tensors = {
        name: torch.randn(4, 8, generator=generator, dtype=DOUBLE).where(mask, torch.tensor(NAN))
        for name in names
    }
    return {"mask": mask, "scores": torch.tensor([1.0, -7.0, 9.0, 2.0], dtype=DOUBLE), **tensors}


# --------------------------------------------------------------------------------- golden vectors


def test_g01_logprobs_are_shifted_masked_by_length_and_tempered(golden):
    case = golden("G01")
    logits, tokens = case.inputs["logits"], case.inputs["tokens"].long()
    prompt, response = case.inputs["prompt_len"].long(), case.inputs["response_len"].long()
    attention = mdp.sequence_mask(prompt + response, tokens.shape[1])
    mask = mdp.action_mask(prompt, response, tokens.shape[1])
    case.matches(attention, case.expected["attention_mask"])
    case.matches(mask, case.expected["action_mask"])
    case.matches(mdp.position_ids(attention), case.expected["position_ids"])
    # Row 0 ends in an EOS that has the pad's id: a mask of `token != pad` loses that action.
    case.differs(mask, case.wrong["action_mask_if_built_from_token_ne_pad"])
    for temperature in (1.0, 0.7):
        expected = case.expected[f"T={temperature}"]
        logprobs = mdp.token_logprobs(logits, tokens, temperature)
        entropy = mdp.token_entropy(logits, temperature)
        case.matches(logprobs * mask, expected["action_logprobs"])
        case.matches(mdp.masked_sum(logprobs, mask, dim=1), expected["seq_logprob"])
        case.matches(entropy * mask, expected["entropy"])
        case.matches(mdp.masked_mean(entropy, mask), expected["mean_token_entropy"])
        case.differs(logprobs * mask, case.wrong["no_shift_T1"])


def test_g02_kl_estimates(golden):
    case = golden("G02")
    p, q, mask = case.inputs["p"], case.inputs["q"], case.inputs["action_mask"].bool()
    each = {kind: mdp.kl_estimate(p.log(), q.log(), kind) for kind in ("k1", "k2", "k3")}
    means = {kind: (p * k).sum() for kind, k in each.items()}
    for kind, mean in means.items():
        case.matches(mean, case.expected[f"E_{kind}"])
    case.matches(means["k1"], case.expected["KL_p_q"])
    case.matches(means["k3"], case.expected["KL_p_q"])
    case.differs(means["k2"], case.expected["KL_p_q"])
    for kind in ("k1", "k3"):
        variance = (p * (each[kind] - means[kind]).square()).sum()
        case.matches(variance, case.expected[f"var_{kind}"])
    for kind in ("k1", "k2", "k3"):
        logprobs = case.inputs["logp"].requires_grad_()
        k = mdp.kl_estimate(logprobs, case.inputs["ref_logp"], kind)
        (grad,) = torch.autograd.grad(mdp.masked_sum(k, mask), logprobs)
        aggregates = case.expected["aggregates"][kind]
        case.matches(k * mask, case.expected["per_token"][kind])
        case.matches(grad, case.expected["grad_wrt_logp"][f"d{kind}"])
        case.matches(mdp.masked_mean(k, mask), aggregates["token_mean"])
        case.matches(mdp.masked_sum(k, mask, dim=1).mean(), aggregates["seq_sum_mean"])
        case.matches(mdp.masked_mean(k, mask, dim=1).mean(), aggregates["seq_mean_mean"])


def test_g03_score_on_the_last_action(golden):
    case = golden("G03")
    kl, mask = case.inputs["kl"], case.inputs["action_mask"].bool()
    beta, clip, score = (case.inputs[name] for name in ("beta", "reward_clip", "score"))
    finished, penalty = case.inputs["ended_with_eos"].bool(), case.inputs["penalty"]
    late = case.wrong["one_slot_late_as_in_TRL_v1_and_Nplus"]
    rewards = mdp.token_rewards(score, kl, mask, beta, clip)
    case.matches(mdp.last_action(mask), case.expected["last_index"])
    case.matches(rewards, case.expected["rewards"])
    case.matches(rewards.sum(dim=1), case.expected["return_sum"])
    clipped = score.clamp(-clip, clip)
    changed = {
        "subtract": mdp.score_with_eos(clipped, finished, penalty),
        "override": mdp.score_with_eos(clipped, finished, override=-penalty),
    }
    for name, scores in changed.items():
        rewards = mdp.token_rewards(scores, kl, mask, beta)
        case.matches(rewards, case.expected[f"rewards_missing_eos_{name}"])
        case.differs(rewards, late)
    case.differs(mdp.token_rewards(score, kl, mask, beta, clip), late)


def test_g04_gae(golden):
    case = golden("G04")
    rewards, values = case.inputs["rewards"], case.inputs["values"]
    mask = case.inputs["action_mask"].bool()
    for gamma, lam in ((1.0, 0.95), (0.99, 0.9), (1.0, 1.0), (1.0, 0.0)):
        expected = case.expected[f"gamma={gamma},lam={lam}"]
        advantages, returns = mdp.gae(rewards, values, mask, gamma, lam)
        case.matches(advantages, expected["advantages"])
        case.matches(returns, expected["returns"])
        case.differs(advantages, case.wrong["values_not_zeroed_after_end_gamma1_lam095"])
    turns, wrong = case.inputs["multi_turn"], case.wrong["multi_turn_zeroing_variant"]
    mask = turns["action_mask"].bool()
    both = mdp.gae(turns["rewards"], turns["values"], mask, turns["gamma"], turns["lam"])
    for name, actual in zip(("advantages", "returns"), both, strict=True):
        case.matches(actual, case.expected["multi_turn_carry"][name])
        case.differs(actual, wrong[name])


def test_g13_losses_of_micro_batches_add_up(golden):
    case = golden("G13")
    losses, gas, dp = case.inputs["token_losses"], case.inputs["gas"], case.inputs["dp"]
    everything = {name: torch.ones_like(x, dtype=torch.bool) for name, x in losses.items()}
    tokens = sum(len(x) for x in losses.values())
    parts = {name: mdp.token_mean(x, everything[name], tokens) for name, x in losses.items()}
    case.matches(sum(parts.values()), case.expected["token_mean"])
    case.differs(sum(parts.values()), case.wrong["mean_of_micro_batch_means"])
    # An engine that divides by its accumulation steps and averages over its ranks.
    for name, expected in case.expected["per_micro_batch_losses_token"].items():
        case.matches(mdp.token_mean(losses[name], everything[name], tokens / (gas * dp)), expected)
    rows = sum(len(sequences) for sequences in case.inputs["sequences"].values())
    total = 0.0
    for name, sequences in case.inputs["sequences"].items():
        means = torch.stack([torch.as_tensor(s, dtype=DOUBLE).mean() for s in sequences])
        valid = torch.ones_like(means, dtype=torch.bool)
        expected = case.expected["per_micro_batch_losses_seq"][name]
        case.matches(mdp.token_mean(means, valid, rows / (gas * dp)), expected)
        total += mdp.token_mean(means, valid, rows)
    case.matches(total, case.expected["seq_mean_token_mean"])


def test_g14_sequence_advantages(golden):
    case = golden("G14")
    old, ref, mask = (case.inputs[name] for name in ("logp_old", "logp_ref", "action_mask"))
    score, value, beta, mask = case.inputs["score"], case.inputs["value"], 0.1, mask.bool()
    k1 = mdp.kl_estimate(old, ref)
    advantages, returns = mdp.sequence_advantages(score, k1, value, mask, beta)
    case.matches(mdp.masked_sum(k1, mask, dim=1), case.expected["kl_sum_k1"])
    case.matches(returns, case.expected["reward_sum"])
    case.matches(advantages, case.expected["adv_sum"][:, None] * mask)
    # Coati's k3 has exp(+d): the estimate with the two policies exchanged.
    coati = mdp.kl_estimate(ref, old, "k3")
    case.matches(mdp.masked_mean(coati, mask, dim=1), case.expected["kl_mean_coati"])
    advantages, returns = mdp.sequence_advantages(score, coati, value, mask, beta, "mean")
    case.matches(returns, case.expected["reward_coati"])
    case.matches(advantages, case.expected["adv_coati"][:, None] * mask)


def test_g15_importance_weights(golden):
    case = golden("G15")
    old, rollout, loss = (case.inputs[k] for k in ("old_logp", "rollout_logp", "per_token_loss"))
    mask, low, high = case.inputs["action_mask"].bool(), case.inputs["low"], case.inputs["high"]

    def weights(method, low=low, high=high):
        return mdp.importance_weights(old, rollout, mask, method, low, high)[0]

    plain, tis, icepop = weights("tis", 0.0, math.inf), weights("tis"), weights("icepop")
    case.matches(plain, case.expected["weight"])
    case.matches(tis, case.expected["tis"])
    case.matches(icepop, case.expected["icepop"])
    case.matches(mdp.masked_mean(tis * loss, mask), case.expected["loss_tis"])
    case.matches(mdp.masked_mean(icepop * loss, mask), case.expected["loss_icepop"])
    row_mean = mdp.masked_mean(plain.log().nan_to_num(neginf=0.0), mask, dim=1).exp()
    case.matches(row_mean, case.expected["seq_geo_mean"])
    whole = weights("seq_mask")
    keep = whole.ne(0).any(dim=1)
    case.matches(keep, case.expected["seq_keep"])
    case.matches(mdp.masked_mean(whole * loss, mask), case.expected["loss_seqmask_clamped"])
    case.differs(mdp.masked_mean(whole * loss, mask), case.expected["loss_seqmask_unclamped"])
    unclamped = mdp.masked_mean(plain * keep[:, None] * loss, mask)
    case.matches(unclamped, case.expected["loss_seqmask_unclamped"])
    _, stats = mdp.importance_weights(old, rollout, mask)
    case.matches(stats["rollout_kl"], case.expected["vllm_kl"])
    case.matches(stats["ratio_max"], case.expected["weight"].max())
    case.matches(stats["outside"], 2 / 5)  # exp(2) and exp(-0.8), beyond [0.5, 5]


# -------------------------------------------------------------------------------------------- masks


def test_action_mask_marks_the_emitters_of_response_tokens():
    prompt, response, length = [1, 2, 5, 3], [4, 1, 2, 0], 7
    mask = mdp.action_mask(torch.tensor(prompt), torch.tensor(response), length)
    assert mask.dtype == torch.bool
    for b in range(4):
        emitted = {a + 1 for a in range(length - 1) if mask[b, a]}  # action a emits token a+1
        assert emitted == set(range(prompt[b], prompt[b] + response[b]))


@pytest.mark.parametrize(("prompt", "response"), [(0, 3), (4, 4)])
def test_action_mask_refuses_lengths_that_cannot_be(prompt, response):
    with pytest.raises(ValueError, match="prompt"):
        mdp.action_mask(torch.tensor([2, prompt]), torch.tensor([2, response]), 7)


def test_position_ids_do_not_count_pads():
    attention = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 0, 0]])
    for given in (attention, attention.bool()):
        assert mdp.position_ids(given).tolist() == [[1, 1, 0, 1, 2], [0, 1, 2, 1, 1]]


def test_last_action_of_a_dialogue_with_gaps_and_of_an_empty_answer():
    mask = torch.tensor([[1, 0, 0], [1, 0, 1], [1, 1, 0]]).bool()
    assert mdp.last_action(mask).tolist() == [0, 2, 1]
    with pytest.raises(ValueError, match=r"empty answer.*\[1\]"):
        mdp.last_action(torch.tensor([[1, 0], [0, 0]]).bool())


def test_masked_statistics_ignore_what_is_outside():
    x = torch.tensor([[1.0, 2.0, NAN], [math.inf, 5.0, NAN], [NAN, NAN, NAN]], dtype=DOUBLE)
    mask = torch.tensor([[1, 1, 0], [0, 1, 0], [0, 0, 0]]).bool()
    close(mdp.masked_sum(x, mask), 8.0)
    close(mdp.masked_mean(x, mask), 8 / 3)
    close(mdp.masked_mean(x, mask, dim=1), [1.5, 5.0, 0.0])
    close(mdp.masked_mean(x, mask, dim=0), [1.0, 3.5, 0.0])
    close(mdp.token_mean(x, mask), 8 / 3)
    close(mdp.token_mean(x, mask, torch.tensor(16)), 0.5)


# ---------------------------------------------------------------------- log-probabilities, entropy


def random_logits(*shape, seed=0):
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.5])
def test_logprobs_and_entropy_against_numpy(temperature):
    logits = random_logits(2, 5, 7)
    tokens = torch.tensor([[3, 1, 0, 6, 2], [5, 5, 2, 0, 0]])
    logprobs = mdp.token_logprobs(logits, tokens, temperature)
    entropy = mdp.token_entropy(logits, temperature)
    assert logprobs.shape == entropy.shape == (2, 4)
    for b in range(2):
        for a in range(4):
            p = np.exp(logits[b, a].numpy() / temperature)
            p /= p.sum()
            close(logprobs[b, a], math.log(p[tokens[b, a + 1]]))
            close(entropy[b, a], -(p * np.log(p)).sum())


def test_gradients_of_logprobs_and_entropy():
    logits = random_logits(2, 4, 5).requires_grad_()
    tokens = torch.tensor([[3, 1, 0, 4], [2, 2, 0, 1]])
    assert gradcheck(lambda z: mdp.token_logprobs(z, tokens, 0.7), logits)
    assert gradcheck(lambda z: mdp.token_entropy(z, 0.7), logits)
    # Both in one graph: dividing the logits in place would break the other's backward pass.
    total = mdp.token_logprobs(logits, tokens, 0.7).sum() + mdp.token_entropy(logits, 0.7).sum()
    total.backward()


def test_logprobs_are_float32_and_finite_whatever_the_logits():
    tokens = torch.tensor([[0, 1, 2]])
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        logits = torch.tensor([[[4.3, 0.2, -2.0]] * 3]).to(dtype)
        logprobs = mdp.token_logprobs(logits, tokens)
        assert logprobs.dtype == mdp.token_entropy(logits).dtype == torch.float32
        expected = logits.double().log_softmax(-1)[:, :2].gather(-1, tokens[:, 1:, None])[..., 0]
        close(logprobs, expected, 1e-6)
    huge = torch.tensor([[[1e4, -1e4, 0.0]] * 3])
    close(mdp.token_logprobs(huge, tokens), [[-2e4, -1e4]], 1e-2)
    close(mdp.token_entropy(huge), [[0.0, 0.0]])


def test_wrong_shapes_and_temperatures_are_refused():
    logits, tokens = random_logits(2, 5, 7), torch.zeros(2, 4, dtype=torch.long)
    with pytest.raises(ValueError, match="do not fit"):
        mdp.token_logprobs(logits, tokens)
    with pytest.raises(ValueError, match="do not fit"):
        mdp.chunked_logprobs(logits[0], torch.nn.Identity(), tokens[0])
    with pytest.raises(ValueError, match="temperature"):
        mdp.token_entropy(logits, 0.0)


@pytest.fixture(scope="module")
def gpt2():
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=61, n_positions=16, n_embd=32, n_layer=2, n_head=1)
    return GPT2LMHeadModel(config).eval()


def test_logprobs_agree_with_hugging_face_loss(gpt2):
    tokens = torch.randint(61, (3, 12), generator=torch.Generator().manual_seed(1))
    prompt, response = torch.tensor([3, 5, 1]), torch.tensor([9, 4, 6])
    mask = mdp.action_mask(prompt, response, 12)
    labels = tokens.clone()
    labels[:, 0] = -100
    labels[:, 1:][~mask] = -100
    with torch.no_grad():
        output = gpt2(tokens, labels=labels)
    ours = -mdp.masked_mean(mdp.token_logprobs(output.logits, tokens), mask)
    close(ours, output.loss, 1e-6)


def test_padding_on_either_side_keeps_the_logprobs(gpt2):
    answer = torch.randint(61, (1, 7), generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        plain = mdp.token_logprobs(gpt2(answer).logits, answer, 0.7)
        for left, right in ((0, 3), (3, 0), (2, 2)):
            tokens = torch.nn.functional.pad(answer, (left, right), value=60)
            attention = torch.zeros_like(tokens)
            attention[:, left : left + 7] = 1
            places = mdp.position_ids(attention)
            logits = gpt2(tokens, attention_mask=attention, position_ids=places).logits
            padded = mdp.token_logprobs(logits, tokens, 0.7)
            close(padded[:, left : left + 6], plain, 1e-6)


# ---------------------------------------------------------------------- log-probabilities in chunks


@pytest.mark.parametrize("chunk_size", [1, 3, 4, 10, 64])
def test_chunks_give_the_same_values_and_gradients(chunk_size):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(10, 6, generator=generator, dtype=DOUBLE, requires_grad=True)
    weight = torch.randn(17, 6, generator=generator, dtype=DOUBLE, requires_grad=True)
    targets = torch.randint(17, (10,), generator=generator)
    mix = torch.randn(2, 10, generator=generator, dtype=DOUBLE)

    logp = (hidden @ weight.T / 0.7).log_softmax(-1)
    whole = logp[torch.arange(10), targets], -(logp.exp() * logp).sum(-1)
    parts = mdp.chunked_logprobs(hidden, lambda h: h @ weight.T, targets, 0.7, chunk_size)
    grads = []
    for logprobs, entropy in (whole, parts):
        loss = (mix[0] * logprobs + mix[1] * entropy).sum()
        grads.append(torch.autograd.grad(loss, (hidden, weight)))
    for expected, actual in zip(whole + grads[0], parts + grads[1], strict=True):
        close(actual, expected)


def test_chunks_bound_the_memory_in_both_passes():
    vocabulary, chunk_size, saved, rows = 97, 4, [], []
    hidden = torch.randn(30, 8, requires_grad=True)
    weight = torch.randn(vocabulary, 8, requires_grad=True)

    def unembed(h):
        rows.append(len(h))
        return h @ weight.T

    def pack(tensor):
        saved.append(tensor.shape)
        return tensor

    targets = torch.randint(vocabulary, (30,))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        logprobs, entropy = mdp.chunked_logprobs(hidden, unembed, targets, 1.0, chunk_size)
    assert rows == [4 + 1] * 7 + [2 + 1]  # one more ends a chunk's text
    assert not any(vocabulary in shape[1:] for shape in saved), "logits are kept for the backward"
    (logprobs.sum() + entropy.sum()).backward()
    assert sorted(rows) == [3] * 2 + [5] * 14  # computed once more, chunk by chunk


def test_chunks_agree_with_hugging_face(gpt2):
    tokens = torch.randint(61, (2, 9), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        logits = gpt2(tokens).logits
        hidden = gpt2.transformer(tokens).last_hidden_state[:, :-1]
        targets = tokens[:, 1:].flatten()
        scored = mdp.chunked_logprobs(hidden.flatten(0, 1), gpt2.lm_head, targets, 0.7, 5)
    close(scored[0], mdp.token_logprobs(logits, tokens, 0.7).flatten(), 1e-5)
    close(scored[1], mdp.token_entropy(logits, 0.7).flatten(), 1e-5)


def test_chunks_are_scored_by_token_logprobs(monkeypatch):
    """So that a student's own function enters the training, at the temperature in force."""
    hidden, weight, targets = torch.randn(5, 3), torch.randn(7, 3), torch.arange(5)
    asked = []

    def halved(logits, tokens, temperature=1.0):
        asked.append(temperature)
        return 0.5 * logprobs(logits, tokens, temperature)

    logprobs = mdp.token_logprobs
    plain, entropy = mdp.chunked_logprobs(hidden, lambda h: h @ weight.T, targets, 0.7, 2)
    monkeypatch.setattr(mdp, "token_logprobs", halved)
    own, same_entropy = mdp.chunked_logprobs(hidden, lambda h: h @ weight.T, targets, 0.7, 2)
    close(own, 0.5 * plain)
    close(same_entropy, entropy)
    assert asked == [0.7] * 3


def test_chunks_of_nothing():
    weight = torch.randn(5, 3)
    nothing = torch.empty(0, 3), lambda h: h @ weight.T, torch.empty(0, dtype=torch.long)
    assert [x.shape for x in mdp.chunked_logprobs(*nothing)] == [(0,), (0,)]


# ----------------------------------------------------------------------------------------------- KL


def test_kl_by_enumeration_value_and_gradient():
    """Over every outcome of a policy: which estimate is unbiased, which gradient is the KL's."""
    theta = random_logits(6, seed=3).requires_grad_()
    ref = random_logits(6, seed=4).log_softmax(-1)
    logp = theta.log_softmax(-1)
    p = logp.exp()
    kl = (p * (logp - ref)).sum()
    (true_grad,) = torch.autograd.grad(kl, theta, retain_graph=True)
    mean, grad = {}, {}
    for kind in ("k1", "k2", "k3"):
        estimate = mdp.kl_estimate(logp, ref, kind)
        mean[kind] = (p * estimate).sum().detach()
        as_loss = (p.detach() * estimate).sum()  # samples are given, only log pi is differentiated
        (grad[kind],) = torch.autograd.grad(as_loss, theta, retain_graph=True)
    close(mean["k1"], kl.detach())
    close(mean["k3"], kl.detach())
    assert (mean["k2"] - kl).abs() > 0.1 * kl
    close(grad["k2"], true_grad)
    close(grad["k1"], torch.zeros(6))
    assert (grad["k3"] - true_grad).abs().max() > 0.1 * true_grad.abs().max()


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_kl_gradients_and_extremes(kind):
    logprobs, ref = (random_logits(3, 4, seed=s).requires_grad_() for s in (1, 2))
    assert gradcheck(lambda x, y: mdp.kl_estimate(x, y, kind), (logprobs, ref))
    far = torch.tensor([-1e4, -60.0, 0.0, 60.0, 1e4], requires_grad=True)
    k = mdp.kl_estimate(far, torch.zeros(5), kind)
    k.sum().backward()
    assert k.isfinite().all() and far.grad.isfinite().all()
    close(mdp.kl_estimate(logprobs, logprobs, kind), torch.zeros(3, 4))


def test_k3_keeps_its_digits_in_float32():
    d = torch.tensor([1e-4, -1e-3])
    k3 = mdp.kl_estimate(d, torch.zeros(2), "k3")
    assert torch.allclose(k3.double(), torch.expm1(-d.double()) + d.double(), rtol=1e-2, atol=0)


def test_unknown_kinds_are_refused(rollout):
    with pytest.raises(ValueError, match="k4"):
        mdp.kl_estimate(torch.zeros(1), torch.zeros(1), "k4")
    with pytest.raises(ValueError, match="max"):
        mdp.sequence_advantages(
            *(rollout[k] for k in ("scores", "kl", "scores", "mask")), 0.1, "max"
        )
    with pytest.raises(ValueError, match="vtrace"):
        mdp.importance_weights(*(rollout[k] for k in ("kl", "kl", "mask")), "vtrace")


# ------------------------------------------------------------------------------------------ rewards


def test_score_with_eos():
    scores, finished = torch.tensor([2.0, -3.0, 0.5]), torch.tensor([True, False, False])
    close(mdp.score_with_eos(scores, finished), [2.0, -4.0, -0.5])
    close(mdp.score_with_eos(scores, finished, penalty=0.25), [2.0, -3.25, 0.25])
    close(mdp.score_with_eos(scores, finished, override=-1.0), [2.0, -1.0, -1.0])
    close(mdp.score_with_eos(scores, finished, override=0.0), [2.0, 0.0, 0.0])


def test_token_rewards_sum_to_the_sequence_reward(rollout):
    mask, kl, scores = rollout["mask"], rollout["kl"], rollout["scores"]
    rewards = mdp.token_rewards(scores, kl, mask, 0.3, score_clip=5.0)
    for b in range(4):
        valid = mask[b].nonzero().flatten().tolist()
        for a in range(8):
            expected = -0.3 * kl[b, a].item() if a in valid else 0.0
            if a == valid[-1]:
                expected += min(max(scores[b].item(), -5.0), 5.0)
            close(rewards[b, a], expected)
    _, returns = mdp.sequence_advantages(scores.clamp(-5, 5), kl, 0 * scores, mask, 0.3)
    close(rewards.sum(dim=1), returns)


def test_the_eos_action_is_rewarded_where_pad_is_eos():
    """Prompt 5 6, answer 7 EOS, pads that look like EOS: the score stands where EOS was emitted."""
    tokens = torch.tensor([[5, 6, 7, 0, 0, 0]])
    mask = mdp.action_mask(torch.tensor([2]), torch.tensor([2]), 6)
    rewards = mdp.token_rewards(torch.tensor([1.0]), torch.zeros(1, 5), mask, 0.1)
    emitted = rewards[0].nonzero().item() + 1
    assert emitted == 3 and tokens[0, emitted] == 0
    assert mask[0].nonzero().flatten().tolist() == [1, 2]


def test_an_empty_answer_cannot_be_rewarded():
    with pytest.raises(ValueError, match="empty answer"):
        mdp.token_rewards(torch.ones(1), torch.zeros(1, 3), torch.zeros(1, 3).bool(), 0.1)


# --------------------------------------------------------------------------------------- advantages


def gae_by_definition(rewards, values, mask, gamma, lam):
    """A_t = sum over later valid k of (gamma lam)^k delta, each delta on its own: O(T^2)."""
    advantages = np.zeros(mask.shape)
    for b in range(len(mask)):
        steps = np.flatnonzero(mask[b])
        v = [values[b, t] for t in steps] + [0.0]
        delta = [rewards[b, t] + gamma * v[k + 1] - v[k] for k, t in enumerate(steps)]
        for k, t in enumerate(steps):
            later = range(k, len(steps))
            advantages[b, t] = sum((gamma * lam) ** (j - k) * delta[j] for j in later)
    return advantages


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (1.0, 1.0), (0.97, 0.0)])
@pytest.mark.parametrize("several_turns", [False, True])
def test_gae_equals_its_definition(rollout, gamma, lam, several_turns):
    mask, rewards, values = rollout["mask"].clone(), rollout["rewards"], rollout["values"]
    if several_turns:
        mask[2, 4] = mask[2, 5] = mask[3, 1] = False
    advantages, returns = mdp.gae(rewards, values, mask, gamma, lam)
    expected = gae_by_definition(*(x.numpy() for x in (rewards, values, mask)), gamma, lam)
    close(advantages, expected)
    close(returns, np.where(mask, expected + values.nan_to_num().numpy(), 0.0))
    close(advantages[~mask], torch.zeros(int((~mask).sum())), 0)


def test_returns_are_rewards_to_go_without_bootstrapping(rollout):
    """gamma = lam = 1: whatever the critic says cancels out of the return."""
    mask, rewards = rollout["mask"], rollout["rewards"]
    _, returns = mdp.gae(rewards, rollout["values"], mask, 1.0, 1.0)
    to_go = rewards.where(mask, torch.tensor(0.0)).flip(1).cumsum(1).flip(1)
    close(returns, to_go * mask)


def test_a_perfect_critic_leaves_no_advantage(rollout):
    mask, rewards = rollout["mask"], rollout["rewards"]
    to_go = rewards.where(mask, torch.tensor(0.0)).flip(1).cumsum(1).flip(1)
    advantages, returns = mdp.gae(rewards, to_go, mask, 1.0, 0.7)
    close(advantages, torch.zeros(4, 8))
    close(returns, to_go * mask)


def test_sequence_advantages_by_hand():
    kl = torch.tensor([[0.5, 1.5, NAN], [1.0, NAN, NAN]])
    mask = torch.tensor([[1, 1, 0], [1, 0, 0]]).bool()
    scores, values = torch.tensor([3.0, 1.0]), torch.tensor([0.5, 2.0])
    advantages, returns = mdp.sequence_advantages(scores, kl, values, mask, 0.1)
    close(returns, [2.8, 0.9], 1e-6)
    close(advantages, [[2.3, 2.3, 0.0], [-1.1, 0.0, 0.0]], 1e-6)
    _, returns = mdp.sequence_advantages(scores, kl, values, mask, 0.1, "mean")
    close(returns, [2.9, 0.9], 1e-6)


# ------------------------------------------------------------------------------ importance weights


@pytest.mark.parametrize("method", ["none", "tis", "icepop", "seq_mask"])
def test_importance_weights_against_loops(method):
    logprobs, rollout = random_logits(5, 6, seed=8), random_logits(5, 6, seed=9)
    rollout = logprobs + (rollout - logprobs) / 3
    mask = mdp.sequence_mask(torch.tensor([6, 1, 4, 3, 2]), 6)
    weights, stats = mdp.importance_weights(logprobs, rollout, mask, method, 0.6, 1.8)
    kept_rows = 0
    for b in range(5):
        logs = [(logprobs[b, a] - rollout[b, a]).item() for a in range(6) if mask[b, a]]
        row_is_kept = 0.6 <= math.exp(sum(logs) / len(logs)) <= 1.8
        kept_rows += row_is_kept
        for a in range(6):
            w = math.exp(logs[a]) if mask[b, a] else 0.0
            expected = {
                "none": 1.0,
                "tis": min(max(w, 0.6), 1.8),
                "icepop": w if 0.6 <= w <= 1.8 else 0.0,
                "seq_mask": min(max(w, 0.6), 1.8) if row_is_kept else 0.0,
            }[method]
            close(weights[b, a], expected if mask[b, a] else 0.0)
    assert 0 < kept_rows < 5  # the case tells the methods apart
    valid = (logprobs - rollout)[mask]
    close(stats["rollout_kl"], -valid.mean())
    close(stats["ratio_max"], valid.max().exp())
    close(stats["outside"], ((valid.exp() < 0.6) | (valid.exp() > 1.8)).double().mean())


def test_importance_weights_stay_finite():
    far = torch.tensor([[1e4, -1e4, NAN]])
    mask = torch.tensor([[True, True, False]])
    for method in ("none", "tis", "icepop", "seq_mask"):
        weights, stats = mdp.importance_weights(far, torch.zeros(1, 3), mask, method, 0.0, math.inf)
        assert weights.isfinite().all() and all(x.isfinite() for x in stats.values())


# ------------------------------------------------------------------- properties of all of them

PER_ACTION = {
    "token_rewards": lambda r: mdp.token_rewards(r["scores"], r["kl"], r["mask"], 0.1, 5.0),
    "advantages": lambda r: mdp.gae(r["rewards"], r["values"], r["mask"], 0.9, 0.8)[0],
    "returns": lambda r: mdp.gae(r["rewards"], r["values"], r["mask"], 0.9, 0.8)[1],
    "sequence_advantages": lambda r: mdp.sequence_advantages(
        r["scores"], r["kl"], r["scores"] / 2, r["mask"], 0.1
    )[0],
    "importance_weights": lambda r: mdp.importance_weights(
        r["logprobs"], r["ref_logprobs"], r["mask"], "seq_mask", 0.7, 1.5
    )[0],
}


@pytest.mark.parametrize("name", PER_ACTION)
def test_pads_rows_and_dtypes_change_nothing(name, rollout):
    compute = PER_ACTION[name]
    plain = compute(rollout)
    assert plain.dtype == DOUBLE
    assert plain.isfinite().all() and (plain[~rollout["mask"]] == 0).all()

    for left, right in ((0, 3), (2, 0), (1, 4)):
        padded = {
            key: pads_on(x, left, right, False if key == "mask" else NAN) if x.ndim == 2 else x
            for key, x in rollout.items()
        }
        close(compute(padded), pads_on(plain, left, right, 0.0))

    order = torch.tensor([2, 0, 3, 1])
    close(compute({key: x[order] for key, x in rollout.items()}), plain[order])

    single = {key: x if key == "mask" else x.float() for key, x in rollout.items()}
    assert compute(single).dtype == torch.float32
    close(compute(single), plain, 1e-5)


@pytest.mark.parametrize("name", PER_ACTION)
def test_inputs_are_left_alone_and_no_gradient_passes(name, rollout):
    for key, x in rollout.items():
        rollout[key] = x if key == "mask" else x.requires_grad_()
    before = {key: x.detach().clone() for key, x in rollout.items()}
    assert not PER_ACTION[name](rollout).requires_grad
    for key, x in rollout.items():
        torch.testing.assert_close(x.detach(), before[key], rtol=0, atol=0, equal_nan=True)


def test_functions_on_logits_leave_them_alone():
    logits, tokens = random_logits(2, 5, 7), torch.zeros(2, 5, dtype=torch.long)
    before = logits.clone()
    mdp.token_logprobs(logits, tokens, 0.5)
    mdp.token_entropy(logits, 0.5)
    mdp.chunked_logprobs(
        logits[0], lambda hidden: hidden, tokens[0], 0.5, 2
    )  # unembed gives a view
    mdp.score_with_eos(logits[0, 0], torch.zeros(7).bool(), override=1.0)
    mdp.masked_mean(logits, logits > 0)
    assert torch.equal(logits, before)


@pytest.mark.parametrize("name", ["rewards", "values", "mask"])
def test_shapes_that_would_broadcast_are_refused(name, rollout):
    given = {key: rollout[key] for key in ("rewards", "values", "mask")}
    given[name] = given[name][:, :1]
    with pytest.raises(ValueError, match="has shape"):
        mdp.gae(**given)
    with pytest.raises(ValueError, match="bool"):
        mdp.gae(rollout["rewards"], rollout["values"], rollout["mask"].double())
    with pytest.raises(ValueError, match="scores has shape"):
        mdp.token_rewards(rollout["scores"][:, None], rollout["kl"], rollout["mask"], 0.1)
