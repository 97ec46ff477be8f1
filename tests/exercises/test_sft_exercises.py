"""Chapter 2's exercises: labels, the loss on answers alone, packing."""

import math

import torch
from drivers_sft import packed_from
from torch import tensor

from rlhf_course.coursework.expect import agrees, equal, exercise, same
from rlhf_course.sft import first_fit_decreasing

NAN = float("nan")
I = -100  # noqa: E741 - the label that asks for nothing


def randint(rng, low, high, *shape):
    """Integers, low … high."""
    return torch.randint(low, high + 1, shape, generator=rng)


# ------------------------------------------------------------------------------------ mask_prompt


@exercise("sft.mask_prompt", core=True)
def test_the_answer_keeps_its_tokens(subject):
    """the answer's tokens are their own labels, the prompt is -100"""
    args = (tensor([[5, 6, 7, 8]]), tensor([2]), tensor([4]))
    same(subject.mask_prompt, args, tensor([[I, I, 7, 8]]))


@exercise("sft.mask_prompt", core=True)
def test_pads_ask_for_nothing(subject):
    """the pads are -100, the EOS before them is a label"""
    args = (tensor([[5, 6, 7, 2, 0, 0]]), tensor([1]), tensor([4]))
    same(subject.mask_prompt, args, tensor([[I, 6, 7, 2, I, I]]))


@exercise("sft.mask_prompt")
def test_pad_and_eos_may_be_one_token(subject):
    """where pad and EOS are one token, the first is a label and the rest is not"""
    args = (tensor([[5, 6, 2, 2, 2]]), tensor([1]), tensor([3]))
    same(subject.mask_prompt, args, tensor([[I, 6, 2, I, I]]))


@exercise("sft.mask_prompt")
def test_every_row_has_its_own_lengths(subject):
    """every row has its own prompt and its own end"""
    tokens = tensor([[5, 6, 7, 8, 9, 9]] * 3)
    expected = tensor([[I, 6, 7, 8, I, I], [I, I, 7, I, I, I], [I, I, I, 8, I, I]])
    same(subject.mask_prompt, (tokens, tensor([1, 2, 3]), tensor([4, 3, 4])), expected)


@exercise("sft.mask_prompt")
def test_no_token_is_special(subject):
    """no token is special: token 0 in an answer is a label, the prompt may hold the EOS"""
    args = (tensor([[2, 0, 0, 4, 0]]), tensor([2]), tensor([5]))
    same(subject.mask_prompt, args, tensor([[I, I, 0, 4, 0]]))


@exercise("sft.mask_prompt")
def test_rows_without_prompt_or_answer(subject):
    """an empty answer asks for nothing, an empty prompt hides nothing"""
    tokens = tensor([[5, 6, 7]])
    same(subject.mask_prompt, (tokens, tensor([2]), tensor([2])), tensor([[I, I, I]]))
    same(subject.mask_prompt, (tokens, tensor([0]), tensor([2])), tensor([[5, 6, I]]))


@exercise("sft.mask_prompt")
def test_labels_of_any_batch(subject, rng):
    """any batch, and the tokens stay as they are"""
    for b, t in ((1, 3), (2, 5), (5, 9)):
        tokens = randint(rng, 0, 6, b, t)
        lengths = randint(rng, 1, t, b)
        prompts = torch.stack([randint(rng, 0, int(n), 1)[0] for n in lengths])
        expected = torch.full((b, t), I)
        for row, (p, n) in enumerate(zip(prompts.tolist(), lengths.tolist(), strict=True)):
            for position in range(p, n):
                expected[row, position] = tokens[row, position]
        same(subject.mask_prompt, (tokens, prompts, lengths), expected)


# --------------------------------------------------------------------------------------- sft_loss


def loss_by_loops(logits, labels, denominator=None):
    """Token by token: log Σ exp(z) - z of the wanted one."""
    total, count = torch.zeros((), dtype=torch.float64), 0
    for row, wanted in zip(logits, labels.tolist(), strict=True):
        for position, label in enumerate(wanted):
            if position > 0 and label != I:
                z = row[position - 1]
                top = z.detach().max()
                total = total + top + (z - top).exp().sum().log() - z[label]
                count += 1
    return total / (max(count, 1) if denominator is None else denominator)


def batch_of(rng, b, t, vocabulary, share=0.5):
    """Logits (b, t, V), and labels with about this share of the tokens."""
    asked = torch.rand(b, t, generator=rng) < share
    labels = torch.where(asked, randint(rng, 0, vocabulary - 1, b, t), I)
    return 2 * torch.randn(b, t, vocabulary, generator=rng), labels


@exercise("sft.sft_loss", core=True)
def test_even_odds_cost_log_of_the_vocabulary(subject):
    """a model that knows nothing pays log V on the answer's tokens, whatever their number"""
    same(subject.sft_loss, (torch.zeros(1, 3, 4), tensor([[I, 2, 3]])), tensor(math.log(4)))
    same(subject.sft_loss, (torch.zeros(1, 4, 4), tensor([[I, I, I, 3]])), tensor(math.log(4)))


@exercise("sft.sft_loss", core=True)
def test_position_t_answers_for_token_t_plus_1(subject):
    """logits at position t answer for the label at t + 1"""
    logits = torch.zeros(1, 3, 3)
    logits[0, 0, 1] = logits[0, 1, 2] = 20.0  # sure of token 1, then of token 2
    same(subject.sft_loss, (logits, tensor([[I, 1, 2]])), tensor(0.0))
    same(subject.sft_loss, (logits, tensor([[I, 2, 1]])), tensor(20.0))


@exercise("sft.sft_loss")
def test_the_mean_over_tokens_of_the_batch(subject):
    """the mean over all labelled tokens, not of the rows' means"""
    logits = torch.zeros(2, 4, 2)
    logits[1, 2, 0] = 3.0
    labels = tensor([[I, 0, 1, 0], [I, I, I, 1]])
    expected = (3 * math.log(2) + 3 + math.log1p(math.exp(-3))) / 4
    same(subject.sft_loss, (logits, labels), tensor(expected))


@exercise("sft.sft_loss")
def test_what_nobody_asks_for_may_be_nan(subject, rng):
    """logits that nobody is asked for may be NaN"""
    logits = torch.full((1, 4, 2), NAN)
    logits[0, 1] = 0.0
    same(subject.sft_loss, (logits, tensor([[I, I, 1, I]])), tensor(math.log(2)))
    logits, labels = batch_of(rng, 3, 6, 5)
    asked = torch.nn.functional.pad(labels[:, 1:] != I, (0, 1))
    args = (torch.where(asked[..., None], logits, NAN), labels)
    agrees(subject.sft_loss, loss_by_loops, args)


@exercise("sft.sft_loss")
def test_nothing_predicts_the_first_token(subject):
    """a label on the first token is not counted, since nothing predicts it"""
    logits = torch.zeros(1, 3, 4)
    logits[0, 1, 1] = 2.0
    expected = math.log(3 + math.exp(2.0)) - 2.0
    same(subject.sft_loss, (logits, tensor([[3, I, 1]])), tensor(expected))


@exercise("sft.sft_loss")
def test_no_label_costs_nothing(subject):
    """without any label the loss is 0"""
    same(subject.sft_loss, (torch.zeros(1, 3, 4), tensor([[I, I, I]])), tensor(0.0))


@exercise("sft.sft_loss")
def test_the_denominator_of_the_whole_step(subject, rng):
    """a given denominator takes the place of the count, so micro-batches add up"""
    args = (torch.zeros(1, 3, 4), tensor([[I, 2, 3]]))
    same(subject.sft_loss, args, tensor(math.log(4) / 4), {"denominator": 8})
    logits, labels = batch_of(rng, 3, 6, 5, share=0.6)
    count = (labels[:, 1:] != I).sum().clamp(min=1)
    parts = [subject.sft_loss(logits[n : n + 1], labels[n : n + 1], count) for n in range(3)]
    equal(sum(parts), loss_by_loops(logits.double(), labels), "rows one by one do not add up")


@exercise("sft.sft_loss")
def test_half_precision_is_computed_in_float32(subject):
    """bfloat16 logits give a float32 loss, float64 ones a float64 loss"""
    labels = tensor([[I, 1, 2]])
    for kind, result in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        logits = tensor([[[1.0, 2.5, -1.0], [0.5, 0.25, 3.0], [0.0, 0.0, 0.0]]], dtype=kind)
        expected = loss_by_loops(logits.double(), labels)
        same(subject.sft_loss, (logits, labels), expected, dtype=result)


@exercise("sft.sft_loss")
def test_loss_and_gradient_on_any_batch(subject, rng):
    """value and gradient on any batch, large logits too"""
    args = (tensor([[[1.0, 0.0], [0.0, 2.0]]]), tensor([[I, 1]]))
    agrees(subject.sft_loss, loss_by_loops, args, wrt=(0,))
    for b, t in ((1, 4), (3, 5), (5, 8)):
        agrees(subject.sft_loss, loss_by_loops, batch_of(rng, b, t, 6), wrt=(0,))
    args = (tensor([[[-200.0, 100.0], [0.0, 0.0]]]), tensor([[I, 0]]))
    agrees(subject.sft_loss, loss_by_loops, args, wrt=(0,))


# ------------------------------------------------------------------------------------------- pack


TWO = [([5, 6, 7], [I, 6, 7]), ([8, 9], [I, 9])]
THREE = [([5, 6], [5, 6]), ([7, 8, 9], [7, 8, 9]), ([4, 3], [I, 3])]  # with context 5: two rows


def parts(number):
    """Which of the four tensors is looked at."""
    return lambda packed: packed[number]


@exercise("sft.pack", core=True)
def test_dialogues_stand_side_by_side(subject):
    """dialogues stand side by side, without a gap, pads at the end of the row"""
    same(subject.pack, (TWO, 8, 0), tensor([[5, 6, 7, 8, 9]]), pick=parts(0))
    expected = tensor([[7, 8, 9, 5, 6], [4, 3, 1, 1, 1]])
    same(subject.pack, (THREE, 5, 1), expected, pick=parts(0))


@exercise("sft.pack")
def test_labels_go_along(subject):
    """labels stand on their tokens, -100 on the pads"""
    examples = [([5, 6, 7], [I, I, 7]), ([8, 9], [I, 9]), ([4, 3], [I, 3])]
    expected = tensor([[I, I, 7, I, 9], [I, 3, I, I, I]])
    same(subject.pack, (examples, 5, 0), expected, pick=parts(1))


@exercise("sft.pack")
def test_nothing_predicts_a_dialogues_first_token(subject):
    """the first token of every dialogue is -100, even if it had a label"""
    expected = tensor([[I, 8, 9, I, 6], [I, 3, I, I, I]])
    same(subject.pack, (THREE, 5, 1), expected, pick=parts(1))


@exercise("sft.pack", core=True)
def test_segments_number_the_dialogues_of_a_row(subject):
    """segments count 0, 1, 2 … anew in every row, -1 on the pads"""
    expected = tensor([[0, 0, 0, 1, 1], [0, 0, -1, -1, -1]])
    same(subject.pack, (THREE, 5, 1), expected, pick=parts(2))


@exercise("sft.pack", core=True)
def test_positions_restart(subject):
    """positions restart with every dialogue, 0 on the pads"""
    expected = tensor([[0, 1, 2, 0, 1], [0, 1, 0, 0, 0]])
    same(subject.pack, (THREE, 5, 1), expected, pick=parts(3))


@exercise("sft.pack")
def test_no_column_of_pads_alone(subject):
    """rows are as long as the fullest of them, not as the context"""
    shapes = [tensor(part.shape) for part in subject.pack([([5, 6], [I, 6])], 9, 0)]
    equal(shapes, [tensor([1, 2])] * 4, "the shapes", {"dialogue": [5, 6], "context": 9})


@exercise("sft.pack")
def test_the_examples_stay_as_they_are(subject):
    """the dialogues that are handed in stay as they are"""
    _, after = subject.drive(packed_from, THREE, 5, 0)
    equal([list(x) for x in after], [list(x) for x in THREE], "it changed a dialogue in place")


@exercise("sft.pack")
def test_many_dialogues(subject, rng):
    """many dialogues in many rows: nothing is lost, nothing invented"""
    examples = []
    for _ in range(12):
        n = int(randint(rng, 1, 9, 1))
        ids = randint(rng, 1, 40, n).tolist()
        asked = randint(rng, 0, 1, n).tolist()
        examples.append((ids, [x if a else I for x, a in zip(ids, asked, strict=True)]))
    for count in (1, 2, 12):
        expected = pack_by_loops(examples[:count], 15, 41)
        for number in range(4):
            same(subject.pack, (examples[:count], 15, 41), expected[number], pick=parts(number))


def pack_by_loops(examples, context, pad_id):
    """Row by row as lists, filled up to the longest."""
    rows = []
    for row in first_fit_decreasing([len(ids) for ids, _ in examples], context):
        columns = []  # (token, label, segment, position)
        for segment, index in enumerate(row):
            for position, (token, label) in enumerate(zip(*examples[index], strict=True)):
                columns.append((token, label if position else I, segment, position))
        rows.append(columns)
    longest = max(map(len, rows))
    rows = [columns + [(pad_id, I, -1, 0)] * (longest - len(columns)) for columns in rows]
    return tensor(rows).unbind(-1)
