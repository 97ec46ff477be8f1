"""Answers side by side behind one prompt: the scores and gradients of rows of their own."""

from unittest import mock

import pytest
import torch
from tiny_models import CONTEXT, KINDS, VOCABULARY, WIDTH, tiny

from rlhf_course.errors import ModelError
from rlhf_course.huggingface import HuggingFaceLM
from rlhf_course.reward_model import ScalarModel
from rlhf_course.shared_prefix import (
    PAD,
    shared_mask,
    shared_rewards,
    side_by_side,
    unshared,
    worth_sharing,
)
from rlhf_course.stages import reward_model as stage
from rlhf_course.stages.reward_model import Ranked, score_table, separate_rewards
from rlhf_course.stages.settings import RewardModelConfig

POOLINGS = ("last", "mean", "sum")
WINDOW = 6
WINDOWED = ("Mistral", "Gemma2", "Gemma3Text")  # one mask for all layers; two kinds of layers
RAGGED = {1: (1, 1, 1), 2: (2, 1, 2), 5: (3, 5, 1, 4)}
"""Answers of each prompt, for K = 1, 2 and 5."""


def language_model(kind):
    """One of tiny_models, or of transformers' with a window of 6 tokens."""
    if kind in KINDS:
        return tiny(kind)
    import transformers

    config = getattr(transformers, f"{kind}Config")(
        vocab_size=VOCABULARY, max_position_embeddings=CONTEXT, hidden_size=WIDTH, head_dim=16,
        intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
        bos_token_id=None, eos_token_id=None, pad_token_id=None, sliding_window=WINDOW,
        **{"layer_types": ["sliding_attention", "full_attention"]} if "Gemma" in kind else {},
    )  # fmt: skip
    torch.manual_seed(0)
    name = "Gemma3ForCausalLM" if kind == "Gemma3Text" else f"{kind}ForCausalLM"
    model = getattr(transformers, name)(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(0.1 * torch.randn_like(parameter))
    return HuggingFaceLM(model)


def reward_model(kind="gpt", pooling="last"):
    """One whose head's bias, gain and bias all count."""
    model = ScalarModel.from_language_model(language_model(kind), pooling, seed=7)
    with torch.no_grad():
        model.head.bias.fill_(0.4)
        model.gain.fill_(1.7)
        model.bias.fill_(-2.3)
    return model


def draw(counts, prompt=9, answer=8, seed=0):
    """(prompts, answers), random and ragged: prompts of `prompt` tokens and up to 5 more."""
    generator = torch.Generator().manual_seed(seed)

    def some(least, most):
        n = int(torch.randint(least, most + 1, (), generator=generator))
        return torch.randint(1, VOCABULARY, (n,), generator=generator).tolist()

    prompts = [some(prompt, prompt + 5) for _ in counts]
    return prompts, [[some(1, answer) for _ in range(count)] for count in counts]


def there(answers):
    """(B, K) bool, True where there is an answer."""
    counts = torch.tensor([len(said) for said in answers])
    return torch.arange(int(counts.max())) < counts[:, None]


def same(actual, expected, tol):
    torch.testing.assert_close(actual, expected, rtol=0, atol=tol)


# ---------------------------------------------------------------------------------------- the rows


def test_the_rows_are_those_of_the_picture():
    rows = side_by_side([[11, 12, 13], [21]], [[[14, 15], [16, 17, 18]], [[22, 23]]])
    assert rows.tokens.tolist() == [[11, 12, 13, 14, 15, 16, 17, 18], [21, 22, 23] + [0] * 5]
    assert rows.segments.tolist() == [[0, 0, 0, 1, 1, 2, 2, 2], [0, 1, 1] + [PAD] * 5]
    assert rows.positions.tolist() == [[0, 1, 2, 3, 4, 3, 4, 5], [0, 1, 2] + [0] * 5]
    assert rows.prompt_lengths.tolist() == [[3, 3], [1, 1]]
    assert rows.starts.tolist() == [[3, 5], [1, 1]]  # what is not there is the first once more
    assert rows.lengths.tolist() == [[2, 3], [2, 2]]
    assert all(t.dtype == torch.long for t in rows)


def test_an_answer_sees_the_prompt_and_itself():
    segments = torch.tensor([[0, 0, 1, 1, 2, 2, PAD, PAD]])
    mask = shared_mask(segments)
    assert mask.shape == (1, 1, 8, 8) and mask.dtype == torch.bool
    expected = "1....... 11...... 111..... 1111.... 11..1... 11..11.. 11....1. 11....11"
    assert ["".join(".1"[v] for v in row) for row in mask[0, 0].tolist()] == expected.split()
    assert shared_mask(torch.tensor([[0, PAD, 1]]))[0, 0].int().tolist()[2] == [1, 0, 1]


@pytest.mark.parametrize("counts", RAGGED.values())
def test_scores_go_back_into_rows_of_one_answer(counts):
    prompts, answers = draw(counts)
    rows = side_by_side(prompts, answers)
    back = unshared(rows.tokens, rows).tolist()  # tokens in place of their scores
    filled = [said + said[:1] * (max(counts) - len(said)) for said in answers]
    wanted = [p + a for p, said in zip(prompts, filled, strict=True) for a in said]
    assert [row[: len(w)] for row, w in zip(back, wanted, strict=True)] == wanted


def test_a_short_answer_at_the_end_of_a_full_row():
    rows = side_by_side([[1] * 10], [[[2] * 5, [3]]])
    assert rows.tokens.shape == (1, 16)
    assert unshared(rows.tokens, rows)[1, :11].tolist() == [1] * 10 + [3]


# ---------------------------------------------------------------------------- scores and gradients


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("kind", [*KINDS, *WINDOWED])
@pytest.mark.parametrize("most", RAGGED)
def test_rewards_are_those_of_separate_rows(kind, pooling, most):
    model, (prompts, answers) = reward_model(kind, pooling), draw(RAGGED[most])
    assert min(map(len, prompts)) > WINDOW  # so that windows end within them
    with torch.no_grad():
        expected = separate_rewards(model, prompts, answers)
        rewards = shared_rewards(model, side_by_side(prompts, answers))
    assert rewards.shape == (len(prompts), most) and rewards.dtype == torch.float32
    assert expected.std() > 0.1
    same(rewards, expected, 1e-5 * max(1, expected.abs().max().item()))


def gradients(model, loss):
    model.zero_grad(set_to_none=True)
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def loss_of(model, part, config, shared):
    with mock.patch.object(stage, "worth_sharing", lambda *_: shared):
        return stage.loss_of(config, model, part, None)


@pytest.mark.parametrize("loss", ["kwise", "pairwise"])
@pytest.mark.parametrize("pooling", POOLINGS)
def test_gradients_are_those_of_separate_rows(pooling, loss):
    model, config = reward_model("gpt", pooling).double(), RewardModelConfig(loss=loss)
    part = [Ranked(p, said) for p, said in zip(*draw(RAGGED[5]), strict=True)]
    losses = [loss_of(model, part, config, shared) for shared in (True, False)]
    assert losses[0].dtype == torch.float64
    same(*losses, 1e-12)
    ours, expected = (gradients(model, one) for one in losses)
    assert ours.keys() == expected.keys() and len(ours) == len(list(model.parameters()))
    for name, gradient in expected.items():
        if name not in ("head.bias", "backbone.final_norm.bias"):  # constants: no pair sees them
            assert gradient.abs().max() > 1e-4, name
        same(ours[name], gradient, 1e-10)


@pytest.mark.parametrize("kind", ["qwen2", "Gemma3Text"])
def test_gradients_through_transformers(kind):
    model, config = reward_model(kind, "mean"), RewardModelConfig()
    part = [Ranked(p, said) for p, said in zip(*draw(RAGGED[5]), strict=True)]
    ours, expected = (
        gradients(model, loss_of(model, part, config, shared)) for shared in (True, False)
    )
    largest = max(g.abs().max().item() for g in expected.values())
    assert ours.keys() == expected.keys() and largest > 1e-2
    for name, gradient in expected.items():
        same(ours[name], gradient, 1e-5 * largest)


@pytest.mark.parametrize("size", [None, 3])
def test_no_step_is_made_of_the_rounding_in_a_constants_gradient(size):
    model = reward_model("llama")
    part = [Ranked(p, said) for p, said in zip(*draw((5,) * 16), strict=True)]
    optimizer, before = torch.optim.AdamW(model.parameters()), model.head.bias.item()
    weight = model.head.weight.clone()
    for _ in range(3):
        optimizer.zero_grad()
        stage.backward(RewardModelConfig(micro_batch=size), model, part)
        assert model.head.bias.grad is None
        optimizer.step()
    assert model.head.bias.item() == before
    assert (model.head.weight - weight).abs().min() > 1e-4


@pytest.mark.parametrize("pooling", POOLINGS)
@pytest.mark.parametrize("changed", [0, 1, 2])
def test_an_answer_changes_no_reward_but_its_own(pooling, changed):
    model = reward_model("gpt", pooling).double()
    prompts, answers = draw((3, 3))
    before = shared_rewards(model, side_by_side(prompts, answers))
    answers[0][changed] = [(t + 7) % VOCABULARY for t in answers[0][changed]]
    after = shared_rewards(model, side_by_side(prompts, answers))
    moved = torch.zeros(2, 3, dtype=torch.bool)
    moved[0, changed] = True
    assert ((after - before)[moved].abs() > 1e-3).all()
    same(after[~moved], before[~moved], 1e-12)


def test_the_gradient_of_one_reward_reaches_no_other_answer():
    model = reward_model().double()
    rows = side_by_side(*draw((3,)))
    reached = []
    model.backbone.token_embedding.register_forward_hook(
        lambda module, inputs, out: reached.append(out.detach().requires_grad_()) or reached[-1]
    )
    shared_rewards(model, rows)[0, 1].backward()
    touched = reached[0].grad[0].abs().amax(dim=1) > 0  # (T,)
    assert torch.equal(touched, (rows.segments[0] == 0) | (rows.segments[0] == 2))


# ----------------------------------------------------------------------------- which rows are made


def read(model, part):
    """(scores, mask, shape of the tokens that the model read)."""
    shapes = []
    hook = model.backbone.token_embedding.register_forward_hook(
        lambda module, inputs, out: shapes.append(tuple(inputs[0].shape))
    )
    table = score_table(model, part)
    hook.remove()
    (shape,) = shapes
    return *table, shape


def ranked(*sizes):
    """Ranked of each (P, A, K): K answers of A tokens."""
    out = []
    for i, (prompt, answer, count) in enumerate(sizes):
        said = [[(3 * i + 5 * k + j) % 60 + 1 for j in range(answer)] for k in range(count)]
        out.append(Ranked([i + 1] * prompt, said))
    return out


@pytest.mark.parametrize(
    ("sizes", "shape"),
    [
        ([(30, 2, 5), (29, 2, 5)], (2, 40)),  # 30 + 5·2, where separate rows read (10, 32)
        ([(20, 6, 2)], (1, 32)),  # not (2, 32)
        ([(30, 2, 5), (29, 2, 3)], (2, 40)),
        ([(30, 9, 1)], (1, 40)),  # one answer has nobody to share with
        ([(1, 40, 5)], (5, 48)),  # 201 tokens with 208² pairs, for 205 with 5·48²/2
    ],
)
def test_a_prompt_is_read_once_where_that_costs_less(sizes, shape):
    model, part = reward_model(), ranked(*sizes)
    with torch.no_grad():
        scores, mask, found = read(model, part)
        prompts, answers = [r.prompt for r in part], [r.answers for r in part]
        expected = separate_rewards(model, prompts, answers)
    assert found == shape
    assert torch.equal(mask, there(answers))
    same(scores, expected, 2e-5)  # those that the mask leaves out too: the first answer's


@pytest.mark.parametrize(
    ("prompt", "answer", "count", "width"),
    [
        (24, 8, 2, 5),  # 40 (6 D + 40) < 64 (6 D + 16): D > 4
        (8, 24, 5, 73),  # 128 (6 D + 128) < 160 (6 D + 16): D > 72
    ],
)
def test_the_rule_weighs_tokens_against_pairs(prompt, answer, count, width):
    """width: the narrowest model for which fewer tokens are worth the longer row's attention."""
    model = reward_model()
    for model.backbone.width in (width - 1, width):
        worth = worth_sharing([[1] * prompt], [[[1] * answer] * count], model)
        assert worth == (model.backbone.width == width)


def test_the_rule_counts_the_separate_rows_as_they_are_padded():
    """Two cases that are shared for what the pads cost otherwise, and for that alone."""
    model = reward_model()
    answers = [[[2] * 23] * 2]  # a row of 66, padded to 72, or two of 43, padded to 48 …
    assert worth_sharing([[1] * 20], answers, model)
    model.backbone.context = 43  # … but not beyond the context
    assert not worth_sharing([[1] * 20], answers, model)
    # Where one of two prompts has two answers, the other's only one is read twice: four rows.
    assert worth_sharing([[1] * 25] * 2, [[[2] * 14] * 2, [[2] * 14]], reward_model())


def test_positions_and_not_the_row_must_fit_the_context():
    model, part = reward_model(), ranked((CONTEXT - 6, 6, 4))
    with torch.no_grad():
        scores, _, shape = read(model, part)
        expected = separate_rewards(model, [part[0].prompt], [part[0].answers])
    assert shape == (1, 72) and shape[1] > CONTEXT
    same(scores, expected, 2e-5)
    with pytest.raises(ModelError, match=f"{CONTEXT + 1} tokens does not fit the context"):
        score_table(model, ranked((CONTEXT - 6, 7, 4)))
