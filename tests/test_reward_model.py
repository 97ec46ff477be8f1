"""Chapter 03: pooling, the losses on comparisons, normalisation, the model and its files."""

import itertools
import json
import math

import pytest
import torch
from tiny_models import CONTEXT, KINDS, VOCABULARY, WIDTH, tiny
from torch import nn
from torch.autograd import gradcheck

from rlhf_course import reward_model as rm
from rlhf_course.checkpoints import read_config, read_tensors, write_model
from rlhf_course.errors import CheckpointError, ConfigError, ModelError
from rlhf_course.world.tokenizer import train_tokenizer

NAN = float("nan")
DOUBLE = torch.float64
POOLINGS = ("last", "mean", "sum")


def close(actual, expected, tol=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol)


def draw(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=DOUBLE)


# ----------------------------------------------------------------------------------------- pooling

PROMPTS, RESPONSES = torch.tensor([2, 1, 3, 4]), torch.tensor([3, 1, 4, 2])


@pytest.fixture
def token_scores():
    """(4, 7), with NaN on the pads and large numbers on the prompt."""
    scores = draw(4, 7)
    position = torch.arange(7)
    scores[position < PROMPTS[:, None]] += 100
    scores[position >= (PROMPTS + RESPONSES)[:, None]] = NAN
    return scores


POOL = {
    "last": lambda s, p, r: rm.last_token_reward(s, p + r),
    "mean": rm.mean_reward,
    "sum": rm.sum_reward,
}


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_reads_the_response_alone(pooling, token_scores):
    expected = []
    for row, p, r in zip(token_scores.tolist(), PROMPTS.tolist(), RESPONSES.tolist(), strict=True):
        said = row[p : p + r]
        expected.append({"last": said[-1], "sum": sum(said), "mean": sum(said) / r}[pooling])
    assert max(map(abs, expected)) < 10  # no prompt in it
    close(POOL[pooling](token_scores, PROMPTS, RESPONSES), expected)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_gradient_stays_on_the_response(pooling, token_scores):
    weights = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=DOUBLE)
    scores = token_scores.clone().requires_grad_()
    (POOL[pooling](scores, PROMPTS, RESPONSES) * weights).sum().backward()
    expected = torch.zeros(4, 7, dtype=DOUBLE)
    for b, (p, r) in enumerate(zip(PROMPTS.tolist(), RESPONSES.tolist(), strict=True)):
        share = {"last": 0, "sum": 1, "mean": 1 / r}[pooling]
        expected[b, p : p + r] = weights[b] * share
        if pooling == "last":
            expected[b, p + r - 1] = weights[b]
    close(scores.grad, expected)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_pooling_ignores_pads_and_row_order(pooling, token_scores):
    expected = POOL[pooling](token_scores, PROMPTS, RESPONSES)
    padded = nn.functional.pad(token_scores, (0, 3), value=NAN)
    close(POOL[pooling](padded, PROMPTS, RESPONSES), expected, tol=0)
    order = torch.tensor([3, 0, 2, 1])
    permuted = POOL[pooling](token_scores[order], PROMPTS[order], RESPONSES[order])
    close(permuted, expected[order], tol=0)


def test_pooling_refuses_empty_and_overlong_answers():
    scores = torch.zeros(2, 4)
    one = torch.tensor([1, 1])
    for pool in (rm.mean_reward, rm.sum_reward):
        with pytest.raises(ValueError, match="empty answer"):
            pool(scores, one, torch.tensor([1, 0]))
        with pytest.raises(ValueError, match="longer than the row"):
            pool(scores, one, torch.tensor([1, 4]))
    for length in (0, 5):
        with pytest.raises(ValueError, match="1 … 4"):
            rm.last_token_reward(scores, torch.tensor([2, length]))


# ------------------------------------------------------------------------------------------ losses


def softplus(x):
    return math.log1p(math.exp(-abs(x))) + max(x, 0)


def test_pairwise_loss_golden(golden):
    case = golden("G11")
    chosen, rejected, margin = (case.inputs[k] for k in ("chosen", "rejected", "margin"))
    each = [rm.pairwise_loss(c[None], r[None]) for c, r in zip(chosen, rejected, strict=True)]
    case.matches(torch.stack(each), case.expected["pair_losses"])
    case.matches(rm.pairwise_loss(chosen, rejected), case.expected["pair_loss"])
    case.matches(rm.pairwise_loss(chosen, rejected, margin), case.expected["margin_loss"])
    case.differs(rm.pairwise_loss(rejected, chosen), case.expected["pair_loss"])
    case.differs(rm.pairwise_loss(chosen, rejected, -margin), case.expected["margin_loss"])


def test_kwise_loss_golden(golden):
    case = golden("G11")
    scores = case.inputs["kwise_scores"][None].clone().requires_grad_()
    ranks = case.inputs["kwise_rank"][None]
    loss = rm.kwise_loss(scores, ranks)
    loss.backward()
    case.matches(loss, case.expected["kwise_loss"])
    case.matches(scores.grad[0], case.expected["kwise_grad"])
    # The tied pair (1, 3) counted in the mean, or lower ranks taken for worse, give other numbers.
    case.differs(loss * 5 / 6, case.expected["kwise_loss"])
    case.differs(rm.kwise_loss(scores, -ranks), case.expected["kwise_loss"])


def test_normalisation_golden(golden):
    case = golden("G11")
    demonstrations, samples = case.inputs["demo_rewards"], case.inputs["policy_samples"]
    gain, bias = rm.normalize_rewards(demonstrations, "bias")
    case.matches([gain, bias], [1.0, case.expected["instructgpt_bias"]])
    case.matches(gain * demonstrations + bias, case.expected["demos_after_bias"])
    gain, bias = rm.normalize_rewards(samples, "gain_bias")
    case.matches([gain, bias], [case.expected["ziegler_gain"], case.expected["ziegler_bias"]])
    case.matches(gain * samples + bias, case.expected["samples_after"])
    case.differs(gain, 1 / samples.std().item())  # Bessel's n - 1


@pytest.mark.parametrize("margin", [None, 0.7, draw(6, seed=3).abs()])
def test_pairwise_gradient(margin):
    chosen, rejected = draw(6, seed=1).requires_grad_(), draw(6, seed=2).requires_grad_()
    assert gradcheck(lambda c, r: rm.pairwise_loss(c, r, margin), (chosen, rejected))
    rm.pairwise_loss(chosen, rejected, margin).backward()
    distance = (chosen - rejected - (0 if margin is None else margin)).detach()
    expected = -torch.sigmoid(-distance) / 6
    close(chosen.grad, expected)
    close(rejected.grad, -expected)


def test_a_margin_may_be_a_number_and_must_not_broadcast():
    chosen, rejected = draw(3, seed=1), draw(3, seed=2)
    expected = sum(softplus(-(c - r - 0.7)) for c, r in zip(chosen, rejected, strict=True)) / 3
    close(rm.pairwise_loss(chosen, rejected, 0.7), expected)
    close(rm.pairwise_loss(chosen, rejected, torch.tensor(0.7, dtype=DOUBLE)), expected)
    for shape in ((3, 1), (1,), (2,)):
        with pytest.raises(ValueError, match="margin"):
            rm.pairwise_loss(chosen, rejected, torch.ones(shape))
    with pytest.raises(ValueError, match="not \\(N,\\)"):
        rm.pairwise_loss(chosen[:, None], rejected[:, None])
    with pytest.raises(ValueError, match="not \\(N,\\)"):
        rm.pairwise_loss(chosen, rejected[:2])


def test_pairwise_loss_survives_extreme_differences():
    chosen = torch.tensor([-500.0, 500.0], requires_grad=True)
    loss = rm.pairwise_loss(chosen, -chosen.detach())
    loss.backward()
    close(loss, 500.0, tol=1e-3)  # mean of 1000 and 0
    close(chosen.grad, [-0.5, 0.0], tol=1e-6)


def test_pairwise_micro_batches_add_up():
    chosen, rejected = draw(7, seed=1).requires_grad_(), draw(7, seed=2)
    full = rm.pairwise_loss(chosen, rejected)
    (whole,) = torch.autograd.grad(full, chosen)
    parts = [
        rm.pairwise_loss(chosen[rows], rejected[rows], denominator=7)
        for rows in (slice(0, 1), slice(1, 7))
    ]
    close(sum(parts), full.item())
    close(torch.autograd.grad(sum(parts), chosen)[0], whole)
    assert rm.pairwise_loss(chosen[:0], rejected[:0]) == 0


def kwise_by_loops(scores, ranks, mask):
    """(sum over prompts of their mean over pairs, prompts with a pair)."""
    total, prompts = 0.0, 0
    for s, rank, m in zip(scores.tolist(), ranks.tolist(), mask.tolist(), strict=True):
        pairs = [
            softplus(-(s[i] - s[j]))
            for i, j in itertools.permutations(range(len(s)), 2)
            if m[i] and m[j] and rank[i] < rank[j]
        ]
        if pairs:
            total, prompts = total + sum(pairs) / len(pairs), prompts + 1
    return total, prompts


@pytest.fixture
def ranked():
    """Five prompts: 5 answers, 3, 4 with ties, 2 that tie (no pair), 1 (no pair); NaN elsewhere."""
    counts = torch.tensor([5, 3, 4, 2, 1])
    mask = torch.arange(5) < counts[:, None]
    ranks = torch.tensor(
        [[2, 0, 4, 1, 3], [1, 2, 0, 9, 9], [1, 0, 1, 0, -9], [1, 1, 0, 0, 0], [0, 5, 5, 5, 5]]
    )
    return torch.where(mask, 2 * draw(5, 5), NAN), ranks, mask


def test_kwise_is_the_mean_over_prompts_of_the_mean_over_pairs(ranked):
    scores, ranks, mask = ranked
    total, prompts = kwise_by_loops(*ranked)
    assert prompts == 3
    close(rm.kwise_loss(scores, ranks, mask), total / 3)
    close(rm.kwise_loss(scores, ranks, mask, denominator=8), total / 8)
    # Over all 10 + 3 + 4 pairs at once a prompt with many answers would weigh more.
    alone = [rm.kwise_loss(scores[b : b + 1], ranks[b : b + 1], mask[b : b + 1]) for b in range(3)]
    pooled = sum(n * loss for n, loss in zip((10, 3, 4), alone, strict=True)) / 17
    assert abs(pooled - total / 3) > 0.01


def test_kwise_gradient(ranked):
    scores, ranks, mask = ranked
    filled = scores.nan_to_num(0.3).requires_grad_()
    assert gradcheck(lambda s: rm.kwise_loss(s, ranks, mask), filled)
    scores.requires_grad_()
    rm.kwise_loss(scores, ranks, mask).backward()
    assert torch.isfinite(scores.grad).all()  # in spite of NaN outside
    (expected,) = torch.autograd.grad(rm.kwise_loss(filled, ranks, mask), filled)
    close(scores.grad, expected)
    assert (scores.grad[:3][mask[:3]] != 0).all()
    assert (scores.grad[3:] == 0).all() and (scores.grad[~mask] == 0).all()
    close(scores.grad.sum(dim=1), torch.zeros(5))  # differences alone count


def test_kwise_without_a_mask_counts_every_answer(ranked):
    scores, ranks, mask = ranked
    close(
        rm.kwise_loss(scores[:1], ranks[:1]), rm.kwise_loss(scores[:1], ranks[:1], mask[:1]).item()
    )


def test_kwise_does_not_depend_on_the_order_of_answers_or_prompts(ranked):
    scores, ranks, mask = ranked
    expected = rm.kwise_loss(scores, ranks, mask).item()
    order = torch.tensor([3, 1, 4, 0, 2])
    answers = rm.kwise_loss(scores[:, order], ranks[:, order], mask[:, order])
    close(answers, expected)
    close(rm.kwise_loss(scores[order], ranks[order], mask[order]), expected)
    assert (
        abs(rm.kwise_loss(scores[:1, order], ranks[:1]) - rm.kwise_loss(scores[:1], ranks[:1]))
        > 0.01
    )


def test_kwise_adds_up_over_micro_batches_and_ignores_more_columns(ranked):
    scores, ranks, mask = ranked
    expected = rm.kwise_loss(scores, ranks, mask).item()
    parts = [
        rm.kwise_loss(*(t[rows] for t in ranked), denominator=3) for rows in ([0, 3], [1, 2, 4])
    ]
    close(sum(parts), expected)
    wider = [
        nn.functional.pad(t, (0, 2), value=v) for t, v in zip(ranked, (NAN, 0, 0), strict=True)
    ]
    close(rm.kwise_loss(*wider), expected)


def test_kwise_of_two_answers_is_the_pairwise_loss():
    scores, first_is_better = draw(6, 2), torch.tensor([1, 0, 1, 1, 0, 0], dtype=torch.bool)
    ranks = torch.stack([~first_is_better, first_is_better], dim=1).int()
    chosen = torch.where(first_is_better, scores[:, 0], scores[:, 1])
    rejected = torch.where(first_is_better, scores[:, 1], scores[:, 0])
    close(rm.kwise_loss(scores, ranks), rm.pairwise_loss(chosen, rejected).item())


def test_kwise_of_no_pair_is_zero_and_shapes_are_checked():
    scores = draw(2, 3).requires_grad_()
    loss = rm.kwise_loss(scores, torch.zeros(2, 3).long())
    loss.backward()
    assert loss == 0 and (scores.grad == 0).all()
    with pytest.raises(ValueError, match="not \\(B, K\\)"):
        rm.kwise_loss(scores, torch.zeros(3).long())
    with pytest.raises(ValueError, match="not \\(B, K\\)"):
        rm.kwise_loss(scores[0], torch.zeros(3).long())


# ----------------------------------------------------------------------------------- normalisation


def test_normalised_rewards_have_the_moments_promised():
    rewards = 1e4 + 3 * draw(50).float()  # float32 sums would lose the third digit
    gain, bias = rm.normalize_rewards(rewards, "gain_bias")
    after = gain * rewards.double() + bias
    close(after.mean(), 0.0, tol=1e-8)
    close(after.std(correction=0), 1.0, tol=1e-9)
    gain, bias = rm.normalize_rewards(rewards)
    assert gain == 1.0
    close((rewards.double() + bias).mean(), 0.0, tol=1e-9)


def test_normalisation_refuses_what_has_no_moments():
    with pytest.raises(ValueError, match="finite"):
        rm.normalize_rewards(torch.tensor([1.0, math.inf]))
    with pytest.raises(ValueError, match="at least one"):
        rm.normalize_rewards(torch.tensor([]))
    with pytest.raises(ValueError, match="all equal"):
        rm.normalize_rewards(torch.ones(3), "gain_bias")
    assert rm.normalize_rewards(torch.ones(3), "bias") == (1.0, -1.0)
    with pytest.raises(ConfigError, match="gain_bias"):
        rm.normalize_rewards(torch.ones(3), "std")


# ------------------------------------------------------------------------------------------- model

TOKENS = torch.randint(4, VOCABULARY, (4, 7), generator=torch.Generator().manual_seed(5))
TOKENS[torch.arange(7) >= (PROMPTS + RESPONSES)[:, None]] = 0  # pads


def reward_model(kind="gpt", pooling="last"):
    """One whose head's bias, gain and bias all count."""
    model = rm.ScalarModel.from_language_model(tiny(kind), pooling, seed=7)
    with torch.no_grad():
        model.head.bias.fill_(0.4)
        model.gain.fill_(1.7)
        model.bias.fill_(-2.3)
    return model


def rewards_of(model):
    with torch.no_grad():
        return model.rewards(TOKENS, PROMPTS, RESPONSES)


@pytest.mark.parametrize("kind", KINDS)
def test_head_reads_the_language_models_hidden_states(kind):
    language_model = tiny(kind)
    model = rm.ScalarModel.from_language_model(language_model, seed=7)
    assert model.backbone.compute_dtype is None
    with torch.no_grad():
        hidden = language_model.hidden_states(TOKENS)
        scores = model.token_scores(TOKENS)
        expected = hidden @ model.head.weight[0] + model.head.bias
    assert scores.shape == TOKENS.shape and scores.dtype == torch.float32
    close(scores, expected, tol=1e-5)
    assert scores.std() > 0.1


def test_a_score_knows_the_tokens_up_to_its_own_alone():
    model = reward_model()
    other = TOKENS.clone()
    other[:, 4] = (other[:, 4] + 1) % VOCABULARY
    with torch.no_grad():
        before, after = model.token_scores(TOKENS), model.token_scores(other)
    assert torch.equal(before[:, :4], after[:, :4])
    assert ((before - after)[:, 4:].abs() > 1e-4).all()


@pytest.mark.parametrize("pooling", POOLINGS)
def test_reward_is_gain_times_pooled_scores_plus_bias(pooling):
    model = reward_model(pooling=pooling)
    pooled = POOL[pooling](model.token_scores(TOKENS).detach(), PROMPTS, RESPONSES)
    close(rewards_of(model), 1.7 * pooled - 2.3, tol=1e-6)


@pytest.mark.parametrize("pooling", POOLINGS)
def test_reward_does_not_depend_on_pads(pooling):
    model = reward_model(pooling=pooling)
    wide = nn.functional.pad(TOKENS, (0, 5), value=3)
    with torch.no_grad():
        close(model.rewards(wide, PROMPTS, RESPONSES), rewards_of(model), tol=1e-5)
        alone = [
            model.rewards(TOKENS[b : b + 1, : p + r], p[None], r[None])
            for b, (p, r) in enumerate(zip(PROMPTS, RESPONSES, strict=True))
        ]
    close(torch.cat(alone), rewards_of(model), tol=1e-5)


def test_a_new_head_has_variance_one_over_width_plus_one_and_follows_its_seed():
    wide = tiny("gpt")
    wide.width = 40_000  # only the head is drawn; its size is all that counts here
    head = rm.ScalarModel.from_language_model(wide, seed=1).head
    close(head.weight.var() * 40_001, 1.0, tol=0.03)
    close(head.weight.mean() * 200, 0.0, tol=0.03)
    assert (head.bias == 0).all()
    again, other = (rm.ScalarModel.from_language_model(wide, seed=s).head for s in (1, 2))
    assert torch.equal(head.weight, again.weight)
    assert not torch.equal(head.weight, other.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_the_backbone_multiplies_in_the_language_models_dtype(kind):
    language_model = tiny(kind)
    language_model.compute_dtype = torch.bfloat16
    model = rm.ScalarModel.from_language_model(language_model)
    assert model.backbone.compute_dtype == torch.bfloat16
    assert model.token_scores(TOKENS).dtype == torch.float32


@pytest.mark.parametrize("kind", KINDS)
def test_training_the_reward_model_leaves_the_language_model_alone(kind):
    language_model = tiny(kind).requires_grad_(False)
    before = language_model(TOKENS)
    model = rm.ScalarModel.from_language_model(language_model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    model.rewards(TOKENS, PROMPTS, RESPONSES).sum().backward()
    assert all(p.grad is not None for p in model.parameters())  # no output matrix is carried along
    optimizer.step()
    assert torch.equal(language_model(TOKENS), before)


def test_a_reward_model_learns_a_preference():
    model = rm.ScalarModel.from_language_model(tiny("gpt"), seed=0)
    ones = torch.ones(8, dtype=torch.long)
    chosen = torch.randint(0, 30, (8, 4), generator=torch.Generator().manual_seed(0))
    rejected = chosen + 30  # other words
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    for _ in range(30):
        loss = rm.pairwise_loss(*(model.rewards(t, ones, 3 * ones) for t in (chosen, rejected)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss < 0.05


def test_pooling_and_language_model_are_checked():
    with pytest.raises(ConfigError, match="pooling 'eos'"):
        rm.ScalarModel(tiny("gpt"), "eos")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("pooling", POOLINGS)
def test_a_critic_begins_on_the_rewards_own_scale(kind, pooling):
    model = reward_model(kind, pooling)
    critic = model.requires_grad_(False).as_critic()
    close(rewards_of(critic), rewards_of(model), tol=2e-5)
    scores = model.token_scores(TOKENS)
    constant = 0.0 if pooling == "sum" else -2.3
    close(critic.token_scores(TOKENS).detach(), 1.7 * scores + constant, tol=1e-5)
    assert all(p.requires_grad for p in critic.parameters())
    assert critic.gain == 1 and (pooling == "sum" or critic.bias == 0)
    critic.token_scores(TOKENS).sum().backward()
    assert not any(p.requires_grad or p.grad is not None for p in model.parameters())
    assert model.gain == pytest.approx(1.7)


# ------------------------------------------------------------------------------------------- files


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["she lives in oslo"], 512)


def in_transformers(folder, tokens=TOKENS):
    """(logits, config) of transformers' classifier in this folder."""
    from transformers import AutoModelForSequenceClassification

    model, info = AutoModelForSequenceClassification.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    with torch.no_grad():
        return model.eval()(tokens, attention_mask=torch.ones_like(tokens)).logits, model.config


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_gives_the_same_rewards(kind, tmp_path, tokenizer):
    model = reward_model(kind)
    model.save_pretrained(tmp_path, tokenizer)
    logits, config = in_transformers(tmp_path)
    assert logits.shape == (4, 1) and config.num_labels == 1
    assert config.pad_token_id == tokenizer.pad_token_id == 0
    expected = rewards_of(model)
    constant = config.reward_token_bias
    assert constant == (0 if kind == "gpt" else pytest.approx(1.7 * 0.4 - 2.3))
    close(logits[:, 0] + constant, expected, tol=1e-5)
    assert expected.std() > 0.1
    named = {"gpt": "GPT2", "llama": "Llama", "qwen2": "Qwen2"}[kind]
    assert config.architectures == [f"{named}ForSequenceClassification"]


def test_where_pad_is_eos_transformers_reads_one_token_early(tmp_path, tokenizer):
    model = reward_model()
    tokens = torch.where(TOKENS == 0, tokenizer.eos_token_id, TOKENS)
    last = (PROMPTS + RESPONSES - 1)[:, None]
    tokens.scatter_(1, last, tokenizer.eos_token_id)
    model.save_pretrained(tmp_path)
    saved = read_config(tmp_path) | {"pad_token_id": tokenizer.eos_token_id}
    write_model(tmp_path, saved, read_tensors(tmp_path))
    with torch.no_grad():
        ours = model.rewards(tokens, PROMPTS, RESPONSES)
        scores = rm.ScalarModel.from_pretrained(tmp_path).token_scores(tokens)
    theirs = in_transformers(tmp_path, tokens)[0][:, 0]
    close(theirs, scores.gather(1, last - 1)[:, 0], tol=1e-5)
    assert (theirs - ours).abs().min() > 1e-3


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", KINDS)
def test_what_is_saved_comes_back_with_equal_rewards(kind, pooling, tmp_path, tokenizer):
    model = reward_model(kind, pooling)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    model.save_pretrained(tmp_path / "a", tokenizer)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    loaded = rm.ScalarModel.from_pretrained(tmp_path / "a")
    assert loaded.pooling == pooling
    close(rewards_of(loaded), rewards_of(model), tol=1e-5)
    close(loaded.as_critic().token_scores(TOKENS), model.as_critic().token_scores(TOKENS), tol=1e-5)
    assert all(p.requires_grad for p in loaded.parameters())
    # Once folded, nothing more drifts: the second file is the first.
    loaded.save_pretrained(tmp_path / "b", tokenizer)
    first, second = (read_tensors(tmp_path / x) for x in "ab")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[k], second[k]) for k in first)
    assert read_config(tmp_path / "a") == read_config(tmp_path / "b")


def test_a_head_of_zeros_keeps_its_constant(tmp_path):
    model = reward_model()
    nn.init.zeros_(model.head.weight)
    model.save_pretrained(tmp_path)
    loaded = rm.ScalarModel.from_pretrained(tmp_path)
    close(rewards_of(loaded), torch.full((4,), 1.7 * 0.4 - 2.3), tol=1e-6)


@pytest.mark.parametrize("name", ["GPT2", "Llama"])
def test_a_classifier_of_transformers_is_read(name, tmp_path):
    import transformers

    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        intermediate_size=48, n_embd=WIDTH, n_layer=2, n_head=2, n_positions=CONTEXT,
        num_labels=1, pad_token_id=0, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    config.attention_dropout = 0.1  # is set to 0: a reward must not be a matter of luck
    classifier = getattr(transformers, f"{name}ForSequenceClassification")(config).eval()
    classifier.save_pretrained(tmp_path)
    model = rm.ScalarModel.from_pretrained(tmp_path).train()
    with torch.no_grad():
        expected = classifier(TOKENS, attention_mask=torch.ones_like(TOKENS)).logits[:, 0]
    close(rewards_of(model), expected, tol=1e-5)


def damaged(tmp_path, kind, change):
    """A saved reward model whose (config, tensors) went through `change`."""
    reward_model(kind).save_pretrained(tmp_path)
    config, tensors = read_config(tmp_path), read_tensors(tmp_path)
    change(config, tensors)
    write_model(tmp_path, config, tensors)
    return tmp_path


@pytest.mark.parametrize(
    ("kind", "tensor", "named"),
    [
        ("gpt", "score.weight", "score.weight"),
        ("gpt", "transformer.h.1.mlp.c_fc.weight", r"blocks\.1\.mlp\.expand\.weight"),
        ("llama", "score.weight", "score.weight"),
        ("llama", "model.layers.1.mlp.up_proj.weight", r"layers\.1\.mlp\.up_proj\.weight"),
    ],
)
def test_missing_tensors_are_named(kind, tensor, named, tmp_path):
    folder = damaged(tmp_path, kind, lambda config, tensors: tensors.pop(tensor))
    with pytest.raises(CheckpointError, match=f"(?s){named}.*missing|missing.*{named}"):
        rm.ScalarModel.from_pretrained(folder)


def test_other_checkpoints_are_refused(tmp_path):
    language_model = tiny("gpt")
    language_model.save_pretrained(tmp_path / "lm")
    with pytest.raises(CheckpointError, match="GPT2LMHeadModel, not a reward model"):
        rm.ScalarModel.from_pretrained(tmp_path / "lm")

    def three_labels(config, tensors):
        tensors["score.weight"] = tensors["score.weight"].repeat(3, 1)

    with pytest.raises(CheckpointError, match=r"score.weight is of shape \(3, 32\)"):
        rm.ScalarModel.from_pretrained(damaged(tmp_path / "three", "gpt", three_labels))

    def wider(config, tensors):
        tensors["score.weight"] = torch.zeros(1, WIDTH + 1)

    with pytest.raises(CheckpointError, match=r"weight is \(1, 33\), expected \(1, 32\)"):
        rm.ScalarModel.from_pretrained(damaged(tmp_path / "wider", "llama", wider))

    def unknown(config, tensors):
        config["model_type"] = "llama-from-the-future"

    with pytest.raises(CheckpointError, match="cannot build it"):
        rm.ScalarModel.from_pretrained(damaged(tmp_path / "future", "llama", unknown))
    with pytest.raises(ModelError, match="no such directory"):
        rm.ScalarModel.from_pretrained(tmp_path / "nowhere")


def test_a_backbone_without_a_classifier_cannot_be_saved(tmp_path):
    model = reward_model("llama")
    model.backbone.model.config.model_type = "bert-generation"
    with pytest.raises(ModelError, match="no sequence classifier for 'bert-generation'"):
        model.save_pretrained(tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_config_is_plain_json_with_what_transformers_does_not_know(tmp_path):
    reward_model("qwen2", "sum").save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["reward_pooling"] == "sum"
    assert config["reward_token_bias"] == pytest.approx(1.7 * 0.4)
    assert config["reward_bias"] == pytest.approx(-2.3)
