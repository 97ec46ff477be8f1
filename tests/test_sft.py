"""Chapter 02: labels, the loss on answers alone, chat templates, packing."""

import math
import random

import pytest
import torch
from tiny_models import CONTEXT, KINDS, VOCABULARY, tiny
from torch.autograd import gradcheck

from rlhf_course import sft
from rlhf_course.errors import DataError, ModelError
from rlhf_course.sft import IGNORE
from rlhf_course.world.tokenizer import train_tokenizer

NAN = float("nan")
DOUBLE = torch.float64


def close(actual, expected, tol=1e-12):
    expected = torch.as_tensor(expected, dtype=actual.dtype)
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol)


def dialogues(count, seed, longest=20, vocabulary=VOCABULARY):
    """(tokens, labels) of random dialogues, 2 to `longest` tokens, the answer at the end."""
    rng = random.Random(seed)
    examples = []
    for _ in range(count):
        tokens = [rng.randrange(vocabulary) for _ in range(rng.randint(2, longest))]
        prompt = rng.randrange(1, len(tokens))
        examples.append((tokens, [IGNORE] * prompt + tokens[prompt:]))
    return examples


def right_padded(examples, pad_id=0, extra=0):
    """(tokens, labels), (B, T) each."""
    longest = max(len(tokens) for tokens, _ in examples) + extra

    def rows(part, fill):
        return torch.tensor([e[part] + [fill] * (longest - len(e[part])) for e in examples])

    return rows(0, pad_id), rows(1, IGNORE)


# ------------------------------------------------------------------------------------------ labels


def test_labels_stand_on_the_answer_and_its_eos_alone():
    tokens = torch.tensor([[5, 6, 7, 8, 2, 0], [5, 9, 2, 0, 0, 0], [4, 4, 4, 4, 4, 4]])
    labels = sft.mask_prompt(tokens, torch.tensor([2, 1, 5]), torch.tensor([5, 3, 6]))
    i = IGNORE
    assert labels.tolist() == [[i, i, 7, 8, 2, i], [i, 9, 2, i, i, i], [i, i, i, i, i, 4]]
    assert labels.dtype == torch.long


def test_labels_keep_the_eos_where_pad_and_eos_are_one_token():
    tokens = torch.tensor([[5, 6, 7, 2, 2, 2]])  # EOS and pad are both 2
    labels = sft.mask_prompt(tokens, torch.tensor([2]), torch.tensor([4]))
    assert labels.tolist() == [[IGNORE, IGNORE, 7, 2, IGNORE, IGNORE]]


def test_labels_leave_the_tokens_as_they_are():
    tokens = torch.tensor([[5, 6, 7]])
    sft.mask_prompt(tokens, torch.tensor([1]), torch.tensor([3]))
    assert tokens.tolist() == [[5, 6, 7]]


@pytest.mark.parametrize(("prompt", "length"), [(3, 2), (1, 4)])
def test_labels_of_impossible_lengths_are_refused(prompt, length):
    with pytest.raises(ValueError, match="T = 3"):
        sft.mask_prompt(torch.ones(1, 3).long(), torch.tensor([prompt]), torch.tensor([length]))


# -------------------------------------------------------------------------------------------- loss


@pytest.fixture
def batch():
    """Logits (3, 6, 7) that are NaN where nobody asks, labels with 1, 4 and 2 answers' tokens."""
    logits = torch.randn(3, 6, 7, generator=torch.Generator().manual_seed(0), dtype=DOUBLE) * 2
    labels = torch.full((3, 6), IGNORE)
    labels[0, 5], labels[1, 1:5], labels[2, 3:5] = 3, torch.tensor([0, 6, 6, 2]), 5
    asked = torch.zeros(3, 6, dtype=torch.bool)
    asked[:, :-1] = labels[:, 1:] != IGNORE
    return torch.where(asked[..., None], logits, NAN), labels, asked


def loop_nll(logits, labels):
    """Every labelled token's loss, one by one."""
    out = []
    for row, wanted in zip(logits.tolist(), labels.tolist(), strict=True):
        for t in range(1, len(wanted)):
            if wanted[t] != IGNORE:
                total = sum(math.exp(z) for z in row[t - 1])
                out.append(math.log(total) - row[t - 1][wanted[t]])
    return out


def test_loss_is_the_mean_over_labelled_tokens(batch):
    logits, labels, _ = batch
    each = loop_nll(logits, labels)
    assert len(each) == 7
    close(sft.sft_loss(logits, labels), sum(each) / 7)
    close(sft.sft_loss(logits, labels, denominator=20), sum(each) / 20)


def test_loss_asks_position_t_for_token_t_plus_1():
    logits = torch.zeros(1, 3, 4, dtype=DOUBLE)
    logits[0, 0, 2], logits[0, 1, 3] = 50, 50  # sure of 2, then of 3
    close(sft.sft_loss(logits, torch.tensor([[IGNORE, 2, 3]])), 0.0)
    assert sft.sft_loss(logits, torch.tensor([[2, 3, IGNORE]])) > 20  # as if there were no shift


def test_loss_ignores_a_label_on_the_first_token(batch):
    logits, labels, _ = batch
    with_first = labels.clone()
    with_first[:, 0] = 1
    close(sft.sft_loss(logits, with_first), sft.sft_loss(logits, labels).item(), tol=0)


def test_loss_gradient(batch):
    logits, labels, asked = batch
    logits = logits.nan_to_num(0.5).requires_grad_()
    assert gradcheck(lambda z: sft.sft_loss(z, labels), logits)
    assert gradcheck(lambda z: sft.sft_loss(z, labels, denominator=3.0), logits)
    (gradient,) = torch.autograd.grad(sft.sft_loss(logits, labels), logits)
    assert (gradient[asked].abs().sum(-1) > 1e-3).all()
    assert (gradient[~asked] == 0).all()


def test_loss_gradient_is_not_spoilt_by_nan_outside(batch):
    logits, labels, asked = batch
    logits.requires_grad_()
    sft.sft_loss(logits, labels).backward()
    assert torch.isfinite(logits.grad).all() and (logits.grad[asked] != 0).all()


def test_loss_of_micro_batches_adds_up(batch):
    logits, labels, _ = batch
    logits = logits.nan_to_num(0.0)
    whole = logits.clone().requires_grad_()
    full = sft.sft_loss(whole, labels)
    full.backward()
    count = (labels[:, 1:] != IGNORE).sum()
    parts = logits.clone().requires_grad_()
    losses = [sft.sft_loss(parts[rows], labels[rows], count) for rows in ([0], [1, 2])]
    sum(losses).backward()
    close(sum(losses), full.item())
    close(parts.grad, whole.grad)
    naive = sum(sft.sft_loss(logits[rows], labels[rows]) for rows in ([0], [1, 2])) / 2
    assert abs(naive - full) > 0.05  # a mean of means is another number


def test_loss_does_not_depend_on_row_order_or_pads(batch):
    logits, labels, _ = batch
    expected = sft.sft_loss(logits, labels).item()
    order = torch.tensor([2, 0, 1])
    close(sft.sft_loss(logits[order], labels[order]), expected)
    padded = torch.nn.functional.pad(logits, (0, 0, 0, 2), value=NAN)
    close(sft.sft_loss(padded, torch.nn.functional.pad(labels, (0, 2), value=IGNORE)), expected)


def test_loss_of_nothing_is_zero_and_of_half_precision_is_float32():
    logits = torch.randn(1, 3, 5).bfloat16().requires_grad_()
    nothing = sft.sft_loss(logits, torch.full((1, 3), IGNORE))
    nothing.backward()
    assert nothing == 0 and (logits.grad == 0).all()
    loss = sft.sft_loss(logits, torch.tensor([[IGNORE, 1, 4]]))
    assert loss.dtype == torch.float32
    close(loss.double(), sum(loop_nll(logits.double(), torch.tensor([[IGNORE, 1, 4]]))) / 2, 1e-6)


def test_loss_refuses_labels_of_another_shape():
    with pytest.raises(ValueError, match="do not fit"):
        sft.sft_loss(torch.zeros(2, 3, 5), torch.zeros(2, 4).long())


@pytest.mark.parametrize("kind", KINDS)
def test_answer_loss_is_the_loss_of_the_answers_logits_alone(kind, monkeypatch):
    model = tiny(kind)
    tokens, labels = right_padded(dialogues(5, seed=1))
    expected = sft.sft_loss(model(tokens), labels)
    expected.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    rows, unembed = [], model.unembed
    monkeypatch.setattr(model, "unembed", lambda h: rows.append(h.shape[:-1]) or unembed(h))
    loss = sft.answer_loss(model, tokens, labels)
    loss.backward()
    asked = int((labels[:, 1:] != IGNORE).sum())
    assert rows == [(asked + 1,)]  # one more ends the text
    close(loss, expected.item(), tol=1e-5)
    assert max(g.abs().max() for g in gradients) > 0.01
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        close(parameter.grad, gradient, tol=1e-5)
    close(
        sft.answer_loss(model, tokens, labels, denominator=10.0) * 10,
        loss.item() * asked,
        1e-4,
    )


# ----------------------------------------------------------------------------------- chat templates

# As Qwen's: a line break behind the end of a turn.
CHATML = (
    "{% for m in messages %}<|user|>{{ m['role'] }} {{ m['content'] }}<|endoftext|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|user|>assistant{% endif %}"
)
NO_EOS = (
    "{% for m in messages %}{{ '<|user|>' if m['role'] == 'user' else '<|assistant|>' }}"
    "{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# As templates for reasoning models: an answer is shortened once the dialogue goes on.
FORGETFUL = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|user|>{{ m['content'] }}{% else %}"
    "<|assistant|>{{ m['content'] if loop.last else 'in' }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
# An answered question is written otherwise than an open one.
TWO_FACED = (
    "{% for m in messages %}{% if m['role'] == 'user' %}"
    "{{ '<|user|>' if loop.last else '<|assistant|>' }}{{ m['content'] }}{% else %}"
    "<|assistant|>{{ m['content'] }}<|endoftext|>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def tokenizer():
    return train_tokenizer(["where does she live in oslo", "and he in bonn user assistant"], 512)


def say(*contents):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(contents)]


def test_dialogue_is_prompt_then_answer_then_one_eos(tokenizer):
    tokens, prompt = sft.encode_dialogue(tokenizer, "where does she live", "in oslo")
    pieces = tokenizer.convert_ids_to_tokens(tokens)
    head = ["<|user|>", "Ġwhere", "Ġdoes", "Ġshe", "Ġlive", "<|assistant|>"]
    assert pieces == [*head, "Ġin", "Ġoslo", "<|endoftext|>"]
    assert prompt == 6
    assert tokens[:prompt] == sft.encode_prompt(tokenizer, "where does she live")


def test_dialogue_with_turns_before(tokenizer):
    before = say("where does she live", "in oslo", "and he")
    tokens, prompt = sft.encode_dialogue(tokenizer, before, "in bonn")
    assert before == say("where does she live", "in oslo", "and he")
    assert tokens[:prompt] == sft.encode_prompt(tokenizer, before)
    assert tokenizer.decode(tokens[prompt:]) == "in bonn<|endoftext|>"
    assert tokens.count(tokenizer.eos_token_id) == 2


def test_what_a_template_writes_behind_eos_is_cut_off(tokenizer):
    tokenizer.chat_template = CHATML
    tokens, prompt = sft.encode_dialogue(tokenizer, "she", "in oslo")
    assert tokenizer.decode(tokens[prompt:]) == "in oslo<|endoftext|>"
    assert tokens[-1] == tokenizer.eos_token_id and tokens[prompt:].count(tokens[-1]) == 1


def test_eos_is_added_where_the_template_has_none(tokenizer):
    tokenizer.chat_template = NO_EOS
    tokens, prompt = sft.encode_dialogue(tokenizer, "she", "in oslo")
    assert tokenizer.convert_ids_to_tokens(tokens[prompt:]) == ["Ġin", "Ġoslo", "<|endoftext|>"]
    assert tokens.count(tokenizer.eos_token_id) == 1
    tokens, labels = sft.encode_messages(tokenizer, say("she", "in oslo", "he", "in bonn"))
    assert tokens.count(tokenizer.eos_token_id) == 1 and labels[-1] == tokens[-1]


def test_the_plain_template_makes_a_base_model_talk(tokenizer):
    tokenizer.chat_template = sft.PLAIN_TEMPLATE
    tokens, prompt = sft.encode_dialogue(tokenizer, "where does she live", "in oslo")
    assert tokenizer.decode(tokens[:prompt]) == "User: where does she live\nAssistant:"
    assert tokenizer.decode(tokens[prompt:]).strip() == "in oslo<|endoftext|>"
    with pytest.raises(DataError, match="the roles are user and assistant"):
        sft.encode_prompt(tokenizer, [{"role": "system", "content": "be kind"}])


@pytest.mark.parametrize("template", [None, CHATML, sft.PLAIN_TEMPLATE])
def test_every_answer_of_a_dialogue_is_labelled(tokenizer, template):
    if template:
        tokenizer.chat_template = template
    messages = say("where does she live", "in oslo", "and he", "in bonn", "and she")
    tokens, labels = sft.encode_messages(tokenizer, messages)
    learned = [t for t, label in zip(tokens, labels, strict=True) if label != IGNORE]
    assert all(label in (IGNORE, t) for t, label in zip(tokens, labels, strict=True))
    said = tokenizer.decode(learned).split("<|endoftext|>")
    assert [text.strip() for text in said] == ["in oslo", "in bonn", ""]
    assert tokens[-1] == labels[-1] == tokenizer.eos_token_id  # the open question is left out
    rendered = tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)
    assert tokens == rendered[: len(tokens)]


def test_a_dialogue_of_one_turn_is_the_same_either_way(tokenizer):
    tokens, prompt = sft.encode_dialogue(tokenizer, "where does she live", "in oslo")
    expected = (tokens, [IGNORE] * prompt + tokens[prompt:])
    assert sft.encode_messages(tokenizer, say("where does she live", "in oslo")) == expected


def test_templates_that_rewrite_the_past_are_refused(tokenizer):
    tokenizer.chat_template = FORGETFUL
    assert sft.encode_messages(tokenizer, say("she", "in oslo"))
    with pytest.raises(ModelError, match="only appends"):
        sft.encode_messages(tokenizer, say("she", "in oslo", "he", "in bonn"))
    tokenizer.chat_template = TWO_FACED
    with pytest.raises(ModelError, match="only appends"):
        sft.encode_dialogue(tokenizer, "she", "in oslo")


def test_dialogues_nothing_can_be_learned_from_are_refused(tokenizer):
    with pytest.raises(DataError, match="empty answer"):
        sft.encode_dialogue(tokenizer, "she", " \n")
    with pytest.raises(DataError, match="without an answer"):
        sft.encode_messages(tokenizer, say("she"))
    with pytest.raises(DataError, match=r"<\|endoftext\|>"):
        sft.encode_dialogue(tokenizer, "she", "in<|endoftext|> oslo")
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="PLAIN_TEMPLATE"):
        sft.encode_dialogue(tokenizer, "she", "in oslo")


# ----------------------------------------------------------------------------------- the context


# ----------------------------------------------------------------------------------------- packing


def unpacked(packed):
    """The dialogues of the rows, as (tokens, labels)."""
    found = []
    for tokens, labels, segments in zip(*(t.tolist() for t in packed[:3]), strict=True):
        for segment in range(max(segments) + 1):
            here = [i for i, s in enumerate(segments) if s == segment]
            assert here == list(range(here[0], here[-1] + 1))
            found.append(([tokens[i] for i in here], [labels[i] for i in here]))
    return found


@pytest.mark.parametrize("seed", range(5))
def test_packing_loses_and_invents_nothing(seed):
    examples = dialogues(30, seed, longest=24)
    packed = sft.pack(examples, CONTEXT, pad_id=VOCABULARY - 1)
    assert sorted(unpacked(packed)) == sorted(examples)
    assert packed.tokens.shape[1] <= CONTEXT
    used = (packed.segments >= 0).sum(dim=1)
    assert used.max() == packed.tokens.shape[1]  # no column of pads alone
    pads = packed.segments < 0
    assert (packed.tokens[pads] == VOCABULARY - 1).all() and (packed.labels[pads] == IGNORE).all()
    assert (packed.positions[pads] == 0).all()
    starts = packed.segments.diff(dim=1, prepend=torch.full((len(used), 1), -2)) != 0
    assert (packed.positions[starts] == 0).all()
    steps = packed.positions.diff(dim=1)[~starts[:, 1:] & ~pads[:, 1:]]
    assert (steps == 1).all()
    fewest = math.ceil(sum(len(tokens) for tokens, _ in examples) / CONTEXT)
    assert len(packed.tokens) <= 11 / 9 * fewest + 1


def test_packing_is_first_fit_decreasing():
    examples = [([n] * n, [IGNORE] + [n] * (n - 1)) for n in (2, 3, 1, 5, 2, 3, 4)]
    packed = sft.pack(examples, 7, pad_id=0)
    rows = [[5] * 5 + [2] * 2, [4] * 4 + [3] * 3, [3] * 3 + [2] * 2 + [1, 0]]
    assert packed.tokens.tolist() == rows
    assert packed.segments.tolist() == [
        [0] * 5 + [1] * 2,
        [0] * 4 + [1] * 3,
        [0, 0, 0, 1, 1, 2, -1],
    ]
    assert packed.positions.tolist()[2] == [0, 1, 2, 0, 1, 0, 0]


def test_packed_rows_are_as_long_as_the_fullest_of_them():
    examples = [([1] * n, [1] * n) for n in (6, 5, 5)]
    packed = sft.pack(examples, 15, pad_id=0)
    assert [t.shape for t in packed] == [(2, 11)] * 4
    assert all(t.dtype == torch.long for t in packed)


def test_packing_refuses_what_does_not_fit():
    with pytest.raises(DataError, match="9 tokens, the context 8"):
        sft.pack([([1] * 9, [1] * 9)], 8, 0)
    with pytest.raises(DataError, match="0 tokens"):
        sft.pack([], 8, 0)


def test_segment_mask_looks_back_within_its_dialogue():
    mask = sft.segment_mask(torch.tensor([[0, 0, 1, 1, -1, -1]]))
    assert mask.shape == (1, 1, 6, 6) and mask.dtype == torch.bool
    assert mask[0, 0].int().tolist() == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [0, 0, 1, 0, 0, 0],
        [0, 0, 1, 1, 0, 0],
        [0, 0, 0, 0, 1, 0],
        [0, 0, 0, 0, 1, 1],
    ]


def packed_batch(seed=3):
    """Dialogues whose first tokens are labelled too, as those of a corpus row would be."""
    examples = dialogues(9, seed)
    examples = [(tokens, [tokens[0], *labels[1:]]) for tokens, labels in examples]
    packed = sft.pack(examples, CONTEXT, pad_id=0)
    assert len(packed.tokens) < len(examples) / 2
    return examples, packed


@pytest.mark.parametrize("kind", KINDS)
def test_packed_logits_loss_and_gradient_are_the_unpacked_ones(kind):
    model = tiny(kind)
    examples, packed = packed_batch()
    tokens, labels = right_padded(examples)
    alone = sft.sft_loss(model(tokens), labels)
    alone.backward()
    gradients = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()

    attend = sft.segment_mask(packed.segments)
    logits = model(packed.tokens, attend, packed.positions)
    together = sft.sft_loss(logits, packed.labels)
    together.backward()
    assert torch.isfinite(logits).all()
    close(together, alone.item(), tol=1e-5)
    assert max(g.abs().max() for g in gradients) > 0.01
    for parameter, gradient in zip(model.parameters(), gradients, strict=True):
        close(parameter.grad, gradient, tol=1e-5)
    for row, segments in enumerate(packed.segments):
        for segment in range(int(segments.max()) + 1):
            here = segments == segment
            single = model(packed.tokens[row, here][None])[0]
            close(logits[row, here], single.detach(), tol=2e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_packing_needs_mask_and_positions(kind):
    model = tiny(kind)
    examples, packed = packed_batch()
    attend = sft.segment_mask(packed.segments)
    # Given as a mask: from restarted positions alone transformers guesses that rows are packed.
    causal = torch.ones(attend.shape[-2:], dtype=torch.bool).tril()[None, None]
    with torch.no_grad():
        right = sft.answer_loss(model, packed.tokens, packed.labels, attend, packed.positions)
        leaking = sft.answer_loss(model, packed.tokens, packed.labels, causal, packed.positions)
        close(right, sft.answer_loss(model, *right_padded(examples)).item(), tol=1e-5)
        assert abs(leaking - right) > 1e-2
        if kind == "gpt":  # rotary positions are relative, so only learned ones have to restart
            shifted = sft.answer_loss(model, packed.tokens, packed.labels, attend)
            assert abs(shifted - right) > 1e-2


@pytest.mark.parametrize("kind", KINDS)
def test_no_dialogue_of_a_row_feels_another(kind):
    model = tiny(kind)
    _, packed = packed_batch()
    attend = sft.segment_mask(packed.segments)
    changed = torch.where(packed.segments == 0, packed.tokens, (packed.tokens + 1) % VOCABULARY)
    with torch.no_grad():
        before = model(packed.tokens, attend, packed.positions)
        after = model(changed, attend, packed.positions)
    first, others = packed.segments == 0, packed.segments > 0
    assert torch.equal(before[first], after[first])
    assert (before[others] - after[others]).abs().max(dim=-1).values.min() > 1e-2


def test_the_stage_takes_its_labels_from_mask_prompt(monkeypatch):
    from rlhf_course.stages import sft as stage

    examples = [([7, 8, 9], [IGNORE, 8, 9]), ([7, 8], [IGNORE, 8])]
    tokens, labels = stage.padded(examples, context=64)
    assert tokens[:, :3].tolist() == [[7, 8, 9], [7, 8, 0]]
    assert labels[:, :3].tolist() == [[IGNORE, 8, 9], [IGNORE, 8, IGNORE]]
    assert (labels[:, 3:] == IGNORE).all()
    seen = []
    monkeypatch.setattr(stage, "mask_prompt", lambda *given: seen.append(given) or given[0])
    assert torch.equal(stage.padded(examples, context=64)[1], tokens)
    assert [part.tolist() for part in seen[0][1:]] == [[1, 1], [3, 2]]
