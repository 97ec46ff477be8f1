"""Sampling: one token against its distribution, whole answers against transformers and by hand."""

import functools

import pytest
import torch
from tiny_models import CONTEXT, KINDS, VOCABULARY, tiny

from rlhf_course.errors import ModelError
from rlhf_course.gpt import GPT, Generation, GPTConfig, generate, sample_token

NEVER = VOCABULARY  # an EOS that no model can say


def prompts_of(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


RAGGED = prompts_of([5, 1, 9, 2, 7, 9, 3, 4])


# ---------------------------------------------------------------- the distribution, by a plain loop


def processed(logits, temperature, top_k, top_p):
    """The distribution that is sampled from: logits (V,) -> probabilities (V,) in float64."""
    probabilities = (logits.double() / temperature).softmax(-1)
    order = sorted(range(len(logits)), key=lambda i: -probabilities[i])
    kept = order[:top_k] if top_k else order
    total = sum(probabilities[i] for i in kept)
    nucleus, mass = [], 0.0
    for i in kept:
        nucleus.append(i)
        mass += probabilities[i] / total
        if mass >= top_p:
            break
    out = torch.zeros_like(probabilities)
    out[nucleus] = probabilities[nucleus]
    return out / out.sum()


SETTINGS = [  # temperature, top_k, top_p
    (1.0, 0, 1.0), (0.7, 0, 1.0), (1.6, 5, 1.0), (1.0, 0, 0.6), (0.8, 4, 0.8), (2.5, 3, 0.7),
]  # fmt: skip


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_tokens_come_as_often_as_they_should(temperature, top_k, top_p):
    n = 20000
    logits = torch.tensor([0.3, -1.0, 1.2, 0.1, -0.4, 0.9, -2.0, 0.6])
    expected = processed(logits, temperature, top_k, top_p)
    generator = torch.Generator().manual_seed(5)
    tokens, logprobs = sample_token(logits.repeat(n, 1), temperature, top_k, top_p, generator)
    counts = tokens.bincount(minlength=len(logits)).double()
    assert not counts[expected == 0].any()
    possible = expected > 0
    chi2 = ((counts - n * expected)[possible].square() / (n * expected[possible])).sum()
    # Mean k - 1, standard deviation sqrt(2 (k - 1)): five of them are about 1 in 10,000.
    freedom = possible.sum().item() - 1
    assert chi2 < freedom + 5 * (2 * freedom) ** 0.5
    torch.testing.assert_close(logprobs.double(), expected.log()[tokens], rtol=0, atol=1e-5)


def test_each_row_is_drawn_from_its_own_distribution():
    logits = torch.full((3, 5), -50.0)
    logits[[0, 1, 2], [4, 0, 2]] = 50.0
    tokens, logprobs = sample_token(logits, generator=torch.Generator().manual_seed(0))
    assert tokens.tolist() == [4, 0, 2]
    assert logprobs.abs().max() < 1e-6


def kept(logits, top_k=0, top_p=1.0):
    """The tokens that are ever drawn."""
    generator = torch.Generator().manual_seed(0)
    many = torch.as_tensor(logits, dtype=torch.float32).repeat(500, 1)
    return set(sample_token(many, 1.0, top_k, top_p, generator)[0].tolist())


@pytest.mark.parametrize(
    ("top_p", "count"), [(0.0, 1), (0.1, 1), (0.25, 1), (0.26, 2), (0.5, 2), (0.51, 3), (1.0, 4)]
)
def test_top_p_keeps_the_smallest_set_that_reaches_it(top_p, count):
    assert len(kept([1.0, 1.0, 1.0, 1.0], top_p=top_p)) == count  # 0.25 each, without rounding


@pytest.mark.parametrize(
    ("top_p", "expected"), [(0.49, {2}), (0.51, {2, 0}), (0.79, {2, 0}), (0.81, {2, 0, 3})]
)
def test_top_p_keeps_the_likeliest(top_p, expected):
    assert kept(torch.tensor([0.3, 0.05, 0.5, 0.15]).log(), top_p=top_p) == expected


def test_top_k_keeps_the_likeliest_and_what_ties_with_the_last():
    logits = [0.0, 2.0, 1.0, 1.5, 1.0]
    assert kept(logits, top_k=1) == {1}
    assert kept(logits, top_k=2) == {1, 3}
    assert kept(logits, top_k=3) == {1, 2, 3, 4}
    for everything in (0, 5, 6):
        assert kept(logits, top_k=everything) == {0, 1, 2, 3, 4}


def test_top_p_counts_the_mass_of_what_top_k_left():
    logits = torch.tensor([0.4, 0.3, 0.2, 0.1]).log()
    assert kept(logits, top_p=0.56) == {0, 1}
    assert kept(logits, top_k=2, top_p=0.56) == {0}  # 4/7 of what is left


def test_temperature_0_takes_the_likeliest_with_its_own_log_probability():
    logits = torch.randn(4, 9, generator=torch.Generator().manual_seed(0))
    tokens, logprobs = sample_token(logits, temperature=0)
    assert torch.equal(tokens, logits.argmax(-1))
    assert torch.equal(logprobs, logits.log_softmax(-1).amax(-1))
    one, certain = sample_token(logits, temperature=0.5, top_k=1)
    assert torch.equal(one, tokens)
    assert not certain.any()


def test_half_precision_logits_give_float32_log_probabilities():
    logits = torch.randn(3, 9, generator=torch.Generator().manual_seed(0)).bfloat16()
    tokens, logprobs = sample_token(logits, generator=torch.Generator().manual_seed(1))
    assert logprobs.dtype == torch.float32
    expected = logits.float().log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    assert torch.equal(logprobs, expected)


@pytest.mark.parametrize(
    "wrong", [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 1.1}, {"top_p": -0.1}]
)
def test_settings_out_of_range(wrong):
    with pytest.raises(ValueError, match="out of range"):
        sample_token(torch.zeros(1, 4), **wrong)


# ----------------------------------------------------------------------- whole answers, greedy


def by_hand(model, prompt, max_new_tokens, eos_id):
    """Greedy, one prompt, no cache, no padding."""
    tokens, logprobs = list(prompt), []
    for _ in range(max_new_tokens):
        with torch.no_grad():
            logp, token = model(torch.tensor([tokens]))[0, -1].log_softmax(-1).max(-1)
        tokens.append(token.item())
        logprobs.append(logp.item())
        if token == eos_id:
            break
    answer = tokens[len(prompt) :]
    return answer, logprobs, answer[-1] == eos_id


LIMIT = 16


@functools.cache
def greedy(kind):
    """(EOS, what `by_hand` says to each of RAGGED). The EOS is a token with which some of the
    answers end, at different lengths, and some do not."""
    free = [by_hand(model_of(kind), prompt, LIMIT, NEVER) for prompt in RAGGED]
    ends = {
        eos: [answer.index(eos) if eos in answer else None for answer, _, _ in free]
        for eos in range(VOCABULARY)
    }
    spread = {eos: len(set(at)) for eos, at in ends.items() if None in at}
    eos = max(spread, key=spread.get)
    assert spread[eos] >= 4
    cuts = [LIMIT if at is None else at + 1 for at in ends[eos]]
    return eos, [
        (answer[:cut], logprobs[:cut], answer[cut - 1] == eos)
        for (answer, logprobs, _), cut in zip(free, cuts, strict=True)
    ]


def model_of(kind):
    return tiny(kind, seed=4).eval()


@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_to_ragged_prompts_are_those_of_transformers(kind, tmp_path):
    from transformers import AutoModelForCausalLM

    model, (eos, _) = model_of(kind), greedy(kind)
    model.save_pretrained(tmp_path)
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path).eval()
    longest = max(map(len, RAGGED))
    padded = torch.tensor([[eos] * (longest - len(p)) + p for p in RAGGED])
    real = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in RAGGED])
    out = theirs.generate(
        padded, attention_mask=real, do_sample=False, max_new_tokens=LIMIT, eos_token_id=eos,
        pad_token_id=eos,
    )  # fmt: skip
    ours = generate(model, RAGGED, LIMIT, eos, temperature=0)
    for answer, finished, row in zip(
        ours.responses, ours.finished, out[:, longest:].tolist(), strict=True
    ):
        assert answer == row[: len(answer)]
        assert set(row[len(answer) :]) <= {eos}
        assert finished == (eos in row)
    assert True in ours.finished
    assert False in ours.finished


@pytest.mark.parametrize("batch_size", [None, 3, 1])
@pytest.mark.parametrize("kind", KINDS)
def test_a_row_of_a_batch_is_what_it_is_alone(kind, batch_size):
    model, (eos, expected), seen = model_of(kind), greedy(kind), []
    out = generate(
        model, RAGGED, LIMIT, eos, temperature=0, batch_size=batch_size, progress=seen.append
    )
    assert seen == {None: [8], 3: [3, 6, 8], 1: [1, 2, 3, 4, 5, 6, 7, 8]}[batch_size]
    for i, (answer, logprobs, finished) in enumerate(expected):
        assert out.responses[i] == answer
        assert out.finished[i] == finished
        assert out.logprobs[i] == pytest.approx(logprobs, abs=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_padding_token_0_may_be_the_eos_and_stand_in_the_prompt(kind):
    """Pads are told from EOS by lengths alone."""
    model, (eos, _) = model_of(kind), greedy(kind)
    with torch.no_grad():  # 0 becomes that EOS: the two tokens change places
        shift = torch.arange(VOCABULARY)
        shift[[0, eos]] = shift[[eos, 0]]
        for weight in {id(p): p for p in model.parameters() if p.shape[0] == VOCABULARY}.values():
            weight.copy_(weight[shift])
    prompts = [[0, *p] if i % 2 else [*p, 0] for i, p in enumerate(RAGGED)]
    out = generate(model, prompts, 8, 0, temperature=0)
    expected = [by_hand(model, p, 8, 0) for p in prompts]
    assert out.responses == [answer for answer, _, _ in expected]
    assert out.finished == [finished for _, _, finished in expected]
    assert len({len(answer) for answer in out.responses}) > 2


def test_finished_rows_are_dropped_from_the_work():
    model, (eos, _) = model_of("gpt"), greedy("gpt")
    read, hidden_states = [], model.hidden_states

    def spy(tokens, attend, *rest):
        read.append(tuple(tokens.shape))
        assert attend.any(dim=-1).all()  # softmax over nothing is 0 / 0, on a pad too
        return hidden_states(tokens, attend, *rest)

    model.hidden_states = spy
    out = generate(model, RAGGED, LIMIT, eos, temperature=0)
    assert read[0] == (8, 9)  # the prompts once, padded to the longest
    assert {length for _, length in read[1:]} == {1}  # then one token a step
    assert len(read) == LIMIT
    rows = [count for count, _ in read]
    for step in range(1, LIMIT):
        alive = sum(len(answer) > step for answer in out.responses)
        assert alive <= rows[step] < max(2 * alive, 2)


def test_it_stops_when_all_have_finished():
    model = model_of("gpt")
    first = by_hand(model, RAGGED[0], 1, NEVER)[0][0]
    steps, hidden_states = [], model.hidden_states
    model.hidden_states = lambda *args: steps.append(1) or hidden_states(*args)
    out = generate(model, [RAGGED[0]] * 3, 16, first, temperature=0)
    assert out.responses == [[first]] * 3
    assert out.finished == [True] * 3
    assert len(steps) == 1


def test_an_eos_as_the_last_token_that_fits_counts_as_finished():
    eos, expected = greedy("gpt")
    longest = max(len(answer) for answer, _, finished in expected if finished)
    out = generate(model_of("gpt"), RAGGED, longest, eos, temperature=0)
    last = [a[-1] == eos and len(a) == longest for a in out.responses]
    assert any(last)
    assert out.finished == [eos in answer for answer in out.responses]


# --------------------------------------------------------------------- whole answers, sampled


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("temperature", "top_k", "top_p"), SETTINGS)
def test_log_probabilities_are_those_of_the_distribution_sampled_from(
    kind, temperature, top_k, top_p
):
    model = model_of(kind)
    generator = torch.Generator().manual_seed(1)
    out = generate(model, RAGGED, 10, 42, temperature, top_k, top_p, generator)
    for prompt, answer, logprobs in zip(RAGGED, out.responses, out.logprobs, strict=True):
        assert len(answer) == len(logprobs)
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        for row, token, logp in zip(logits, answer, logprobs, strict=True):
            expected = processed(row, temperature, top_k, top_p)[token]
            assert expected > 0
            assert logp == pytest.approx(expected.log().item(), abs=1e-4)


def test_answers_end_with_eos_or_at_the_limit_and_nowhere_else():
    eos = 42
    generator = torch.Generator().manual_seed(0)
    out = generate(tiny("gpt"), RAGGED * 20, 12, eos, generator=generator)
    assert len(out.responses) == len(out.logprobs) == len(out.finished) == 160
    for answer, finished in zip(out.responses, out.finished, strict=True):
        assert eos not in answer[:-1]
        assert finished == (answer[-1] == eos)
        assert finished or len(answer) == 12
    assert 20 < sum(out.finished) < 140


def test_the_same_seed_gives_the_same_answers():
    model = tiny("gpt")

    def draw(seed):
        return generate(model, RAGGED, 12, 7, generator=torch.Generator().manual_seed(seed))

    assert draw(0) == draw(0)
    assert draw(0).responses != draw(1).responses


def test_equal_prompts_get_different_answers():
    out = generate(tiny("gpt"), [RAGGED[0]] * 8, 8, 7, generator=torch.Generator().manual_seed(0))
    assert len({tuple(answer) for answer in out.responses}) == 8


def test_bfloat16_products_change_little():
    model = tiny("gpt").eval()
    model.compute_dtype = torch.bfloat16
    out = generate(model, RAGGED, 10, 7, generator=torch.Generator().manual_seed(1))
    for prompt, answer, logprobs in zip(RAGGED, out.responses, out.logprobs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + answer]))[0, len(prompt) - 1 : -1]
        again = logits.log_softmax(-1).gather(-1, torch.tensor(answer)[:, None])[:, 0]
        assert logprobs == pytest.approx(again.tolist(), abs=0.15)


# ------------------------------------------------------------------------------------- edges


def test_dropout_is_off_while_sampling_and_the_mode_comes_back():
    config = GPTConfig(VOCABULARY, CONTEXT, layers=2, heads=2, width=32, dropout=0.5)
    model = GPT(config)
    model.load_state_dict(tiny("gpt").state_dict())
    expected = [by_hand(model.eval(), p, 6, NEVER)[0] for p in RAGGED]
    assert generate(model.train(), RAGGED, 6, NEVER, temperature=0).responses == expected
    assert model.training
    with pytest.raises(ValueError, match="out of range"):
        generate(model, RAGGED, 6, NEVER, temperature=-1)
    assert model.training
    generate(model.eval(), RAGGED, 6, NEVER)
    assert not model.training


def test_no_prompts_no_answers():
    assert generate(tiny("gpt"), [], 5, 7) == Generation([], [], [])


def test_an_empty_prompt():
    with pytest.raises(ModelError, match="empty prompt"):
        generate(tiny("gpt"), [[1], []], 5, 7)


@pytest.mark.parametrize("kind", KINDS)
def test_prompt_and_answer_must_fit_the_context(kind):
    model = tiny(kind)
    generate(model, prompts_of([CONTEXT - 5, 3]), 5, 7)
    with pytest.raises(ModelError, match=f"{CONTEXT - 4} tokens and 5 new .* {CONTEXT}"):
        generate(model, prompts_of([CONTEXT - 4, 3]), 5, 7)
