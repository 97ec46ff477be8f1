"""Counted operations: exact, on any machine and beside any other load. No timings.

What is counted stands in benchmarks/operations.py, and beside it the formulas. Sizes are primes or
otherwise unlike each other, so that no term can stand in for another.
"""

import importlib.util
import sys
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from rlhf_course import vocabulary
from rlhf_course.device import choose_device
from rlhf_course.gpt import GPT, GPTConfig
from rlhf_course.padding import padded_length
from rlhf_course.ppo import policy_backward
from rlhf_course.recompute import checkpoint_blocks
from rlhf_course.reward_model import ScalarModel
from rlhf_course.rollout import PPOSettings, Rollout, action_logprobs
from rlhf_course.sampling import generate
from rlhf_course.sft import IGNORE, answer_loss, mask_prompt
from rlhf_course.stages import ppo as ppo_stage
from rlhf_course.stages import ppo_loop
from rlhf_course.stages.rollouts import Answers, Task
from rlhf_course.training import make_optimizer

ROOT = Path(__file__).parents[1]


def benchmark(name: str):
    """A file of benchmarks/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


operations, memory = benchmark("operations"), benchmark("memory")
flops, passes, Meter, Pass = (
    operations.flops, operations.passes, operations.Meter, operations.Pass
)  # fmt: skip

SHAPE = GPTConfig(vocab_size=101, context=48, layers=3, heads=2, width=22)
ROWS, LENGTH = 5, 17


def model_of(config: GPTConfig = SHAPE) -> GPT:
    torch.manual_seed(0)
    return GPT(config)


def dialogues(prompts: list[int], vocabulary: int = SHAPE.vocab_size):
    """(tokens, labels), (B, T) long: rows without pads whose prompts have these lengths."""
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(0, vocabulary, (len(prompts), LENGTH), generator=generator)
    return tokens, mask_prompt(
        tokens, torch.tensor(prompts), torch.full((len(prompts),), LENGTH)
    )  # fmt: skip


def sft_update(model, tokens, labels):
    answer_loss(model, tokens, labels).backward()


def policy_update(model, tokens, labels):
    action_logprobs(model, tokens, labels[:, 1:] != IGNORE, temperature=0.7)[0].sum().backward()


UPDATES = pytest.mark.parametrize("update", [sft_update, policy_update])

# ------------------------------------------------------------------------------- matrix products

# Prompts from nearly nothing to nearly everything; unequal in a batch in the last two.
SHARES = [[1] * ROWS, [9] * ROWS, [16] * ROWS, [3, 5, 8, 13, 16], [16, 1, 16, 16, 2]]


@UPDATES
@pytest.mark.parametrize("prompts", SHARES, ids=str)
def test_logits_are_computed_where_a_token_is_asked_for_and_nowhere_else(update, prompts):
    tokens, labels = dialogues(prompts)
    asked = sum(LENGTH - prompt for prompt in prompts)
    forward = operations.trunk_flops(SHAPE, ROWS, LENGTH, asked=asked)
    forward += operations.logits_flops(SHAPE, operations.loss_rows(asked))
    model = model_of()
    assert flops(lambda: update(model, tokens, labels)) == operations.TRAINING * forward


@UPDATES
def test_each_further_token_of_the_prompt_saves_its_logits_and_the_last_block_behind_attention(
    update,
):
    model = model_of()
    counts = [flops(lambda p=p: update(model, *dialogues([p] * ROWS))) for p in range(1, LENGTH)]
    saved = {before - after for before, after in pairwise(counts)}
    assert saved == {operations.TRAINING * 2 * (101 * 22 + 9 * 22**2) * ROWS}


@UPDATES
def test_chunks_of_logits_are_computed_once_more_and_the_blocks_are_not(update, monkeypatch):
    tokens, labels = dialogues([7] * ROWS)
    asked, model = ROWS * (LENGTH - 7), model_of()
    monkeypatch.setattr(vocabulary, "LOGITS", 8 * SHAPE.vocab_size)
    expected = operations.TRAINING * operations.trunk_flops(SHAPE, ROWS, LENGTH, asked=asked)
    rows = operations.loss_rows(asked, chunks=-(-asked // 8))
    expected += (operations.TRAINING + 1) * operations.logits_flops(SHAPE, rows)
    assert flops(lambda: update(model, tokens, labels)) == expected


def test_scoring_takes_one_forward_pass():
    tokens, labels = dialogues([7] * ROWS)
    model = model_of().requires_grad_(False)
    mask = labels[:, 1:] != IGNORE
    asked = int(mask.sum())
    expected = operations.trunk_flops(SHAPE, ROWS, LENGTH, asked=asked)
    expected += operations.logits_flops(SHAPE, operations.loss_rows(asked))
    assert flops(lambda: action_logprobs(model, tokens, mask)) == expected


@pytest.mark.parametrize(("pooling", "read"), [("last", 1), ("mean", 13), ("sum", 13)])
def test_a_reward_model_has_no_logits(pooling, read):
    """Its head is one vector, read where the pooling reads: at one token or at all 13."""
    model = ScalarModel.from_language_model(model_of(), pooling).requires_grad_(False)
    tokens, lengths = dialogues([1] * ROWS)[0], torch.full((ROWS,), 4)
    expected = operations.trunk_flops(SHAPE, ROWS, LENGTH, asked=ROWS * read)
    expected += 2 * SHAPE.width * ROWS * read
    assert flops(lambda: model.rewards(tokens, lengths, lengths + 9)) == expected


def test_a_packed_mask_changes_no_product():
    tokens, labels = dialogues([7] * ROWS)
    attend = torch.ones(ROWS, 1, LENGTH, LENGTH, dtype=torch.bool).tril()
    model = model_of()
    counts = [flops(lambda a=a: answer_loss(model, tokens, labels, a)) for a in (None, attend)]
    assert counts[0] == counts[1] > 0


# ------------------------------------------------------------------------------------ generation

PROMPT = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3], [5, 8, 9, 7, 9]]
NEVER = -1
"""An EOS that no model writes."""


def tokens_of(new: int, prompts=PROMPT, model=None, eos=NEVER):
    return generate(model or model_of(), prompts, new, eos, temperature=0)


@pytest.mark.parametrize("new", [1, 2, 11])
def test_sampling_reads_prompts_once_and_then_a_token_of_each_row(new):
    model = model_of()
    with passes(policy=model) as seen:
        tokens_of(new, model=model)
    later = [Pass("policy", 3, 1, False)] * (new - 1)
    assert seen == [Pass("policy", 3, 5, False), *later]


@pytest.mark.parametrize("new", [1, 2, 11])
def test_products_of_a_whole_answer(new):
    model = model_of()
    expected = operations.generation_flops(SHAPE, 5, [3] * new)
    assert flops(lambda: tokens_of(new, model=model)) == expected


def test_products_of_one_more_token():
    """Its own matrices, attention to all that came before it and to itself, and its logits."""
    model = model_of()
    counts = [flops(lambda n=n: tokens_of(n, model=model)) for n in (7, 8)]
    one = 24 * 3 * 22**2 + 4 * 3 * 22 * (5 + 7) + 2 * 101 * 22
    assert counts[1] - counts[0] == 3 * one


def test_a_prompt_of_another_length_costs_its_pads_and_nothing_else():
    model, ragged = model_of(), [[4, 2], *PROMPT[1:]]
    assert flops(lambda: tokens_of(9, ragged, model)) == flops(lambda: tokens_of(9, model=model))


class Countdown(GPT):
    """Writes the number below the last one, down to 0, its EOS: after k it writes k tokens. The
    blocks run, cache included, but their result is not used."""

    def hidden_states(self, tokens, attend=None, positions=None, cache=None, places=None):
        super().hidden_states(tokens, attend, positions, cache, places)
        hidden = F.one_hot((tokens - 1).clamp(min=0), self.vocab_size).float()  # (B, T, V)
        return hidden if places is None else hidden.flatten(0, 1)[places]

    def unembed(self, hidden):
        return hidden


LEAVING = [  # lengths of the answers, the longest that is allowed, rows in each pass
    ([1, 2, 3, 4, 5, 6, 7, 8], 20, [8, 8, 8, 8, 4, 4, 2, 1]),
    ([8, 1, 1, 1, 1], 20, [5, 1, 1, 1, 1, 1, 1, 1]),
    ([6, 6, 6, 2, 2], 20, [5, 5, 5, 5, 5, 5]),  # three of five are more than half
    ([6, 6, 2, 2, 2], 20, [5, 5, 2, 2, 2, 2]),
    ([9, 3, 9, 3], 5, [4, 4, 4, 2, 2]),
    ([2, 2, 2], 20, [3, 3]),
]


@pytest.mark.parametrize(("lengths", "new", "rows"), LEAVING, ids=lambda x: str(x))
def test_rows_leave_when_half_have_ended(lengths, new, rows):
    model = Countdown(SHAPE).requires_grad_(False)
    prompts = [[50, length] for length in lengths]
    with passes(policy=model) as seen:
        out = tokens_of(new, prompts, model, eos=0)
    assert [len(answer) for answer in out.responses] == [min(n, new) for n in lengths]
    assert [found.rows for found in seen] == rows == operations.rows_read(lengths, new)
    assert [found.tokens for found in seen] == [2] + [1] * (len(rows) - 1)
    expected = operations.generation_flops(SHAPE, 2, rows)
    expected -= operations.logits_flops(SHAPE, sum(rows))  # this model has none
    assert flops(lambda: tokens_of(new, prompts, model, eos=0)) == expected


# ------------------------------------------------------------------------- one iteration of PPO


def trainer_of(monkeypatch, size):
    """A PPO trainer on random prompts that samples answers of full length."""
    for owner, name in [
        (ppo_stage, "load_policy"), (ppo_stage, "load_reward_model"), (ppo_loop, "Prompts"),
        (ppo_loop.PPOLoop, "_corpus"),
    ]:  # fmt: skip
        monkeypatch.setattr(owner, name, getattr(owner, name))  # the benchmark sets them: undone
    torch.manual_seed(0)
    case = memory.Case(
        "ppo", layers=1, width=64, vocabulary=53, prompt=size.prompt, answer=size.new,
        rows=size.minibatch, micro_batch=size.micro_batch, generated=size.answers,
        epochs=size.epochs, ptx_rows=size.ptx[0] if size.ptx else 0, dtype="float32",
    )  # fmt: skip
    return memory.ppo(case, choose_device("cpu", "float32", 1))


def watched(trainer):
    """Its four models, by the names that `ppo_passes` gives them."""
    return passes(
        policy=trainer.policy, reference=trainer.reference, critic=trainer.critic.backbone,
        reward_model=trainer.reward_model.backbone,
    )  # fmt: skip


ITERATIONS = [
    operations.Iteration(8, 7, 6, minibatch=4, micro_batch=4),
    operations.Iteration(8, 7, 6, minibatch=4, micro_batch=2),
    operations.Iteration(12, 7, 6, minibatch=6, micro_batch=3, epochs=3),
    operations.Iteration(8, 7, 6, minibatch=4, micro_batch=2, epochs=2, ptx=(5, 13)),
    operations.Iteration(8, 9, 1, minibatch=8, micro_batch=8, ptx=(3, 10)),
]


@pytest.mark.parametrize("size", ITERATIONS, ids=lambda size: str(tuple(size)))
def test_forward_passes_of_an_iteration(monkeypatch, size):
    trainer = trainer_of(monkeypatch, size)
    with watched(trainer) as seen:
        trainer.iterate(0)
    assert Counter(seen) == operations.ppo_passes(size, trainer.context)


def test_the_numbers_of_one_iteration_by_hand(monkeypatch):
    """12 answers in 4 parts of 3; 3 epochs of 2 minibatches of 2 micro-batches."""
    trainer = trainer_of(monkeypatch, ITERATIONS[2])
    with watched(trainer) as seen:
        trainer.iterate(0)
    found = Counter((one.model, one.gradient) for one in seen)
    assert found == {
        ("policy", False): 6 + 4, ("policy", True): 12, ("critic", False): 4, ("critic", True): 12,
        ("reference", False): 4, ("reward_model", False): 4,
    }  # fmt: skip
    first = next(i for i, one in enumerate(seen) if one.gradient)
    assert not any(one.gradient for one in seen[:first])
    assert {one.model for one in seen[first:]} == {"policy", "critic"}  # the updates' own


def answers_of(trainer, prompt: int, lengths: list[int]) -> Answers:
    """Answers of these lengths to different prompts, in the order given."""
    rows, T = len(lengths), padded_length(prompt + max(lengths), trainer.context)
    tokens = torch.randint(1, 53, (rows, T), generator=torch.Generator().manual_seed(3))
    tasks = [Task("", row[:prompt].tolist()) for row in tokens]
    return Answers(
        tasks, tokens, torch.full((rows,), prompt), torch.tensor(lengths),
        torch.ones(rows, dtype=torch.bool), [""] * rows,
    )  # fmt: skip


def test_answers_of_like_length_share_a_pass_that_ends_where_they_do(monkeypatch):
    size = operations.Iteration(8, 4, 44, minibatch=8, micro_batch=2)
    trainer = trainer_of(monkeypatch, size)
    answers = answers_of(trainer, 4, [44, 3, 9, 20, 2, 43, 21, 11])
    with watched(trainer) as seen:
        trainer.learn(0, answers)
    # 4 + [44, 43], [21, 20], [11, 9], [3, 2] tokens, up to the next multiple of 8.
    widths = [48, 32, 16, 8]
    for name in ("policy", "reference", "critic"):
        found = [(one.rows, one.tokens) for one in seen if one[0] == name and not one.gradient]
        assert found == [(2, width) for width in widths], name
    for name in ("policy", "critic"):
        found = [(one.rows, one.tokens) for one in seen if one[0] == name and one.gradient]
        assert Counter(found) == Counter((2, width) for width in widths), name


# ------------------------------------------------------------------------------ bytes that are kept


def kept(function):
    """(what the function returns, which holds its graph; the meter that watched it)"""
    with Meter() as meter:
        out = function()
    return out, meter


def kept_bytes(config: GPTConfig, recomputed: bool) -> int:
    """What the forward pass of a loss leaves behind."""
    model = model_of(config).train()
    if recomputed:
        checkpoint_blocks(model)
    _loss, meter = kept(lambda: answer_loss(model, *dialogues([7] * ROWS)))
    return meter.held_bytes()


@pytest.mark.parametrize("recomputed", [False, True])
@pytest.mark.parametrize(("width", "heads"), [(22, 2), (24, 6)])
def test_what_a_block_keeps(recomputed, width, heads):
    one, two, five = (
        kept_bytes(replace(SHAPE, layers=n, width=width, heads=heads), recomputed)
        for n in (1, 2, 5)
    )
    config = replace(SHAPE, width=width, heads=heads)
    block = operations.block_bytes(config, ROWS, LENGTH, recomputed)
    assert (two - one, five - two) == (block, 3 * block)


def logits_kept(meter, rows: int) -> int:
    """How many tensors of this many rows of logits are held."""
    numbers = rows * SHAPE.vocab_size
    return sum(sizes.count(4 * numbers) for sizes in meter.held().values())


ASKED = ROWS * (LENGTH - 7)
CHUNK = 6


def test_a_loss_keeps_logits_once_and_in_chunks_not_at_all(monkeypatch):
    batch, model = dialogues([7] * ROWS), model_of()
    _loss, whole = kept(lambda: answer_loss(model, *batch))
    assert logits_kept(whole, ASKED) == 1
    monkeypatch.setattr(vocabulary, "LOGITS", CHUNK * SHAPE.vocab_size)
    _loss_in_parts, parts = kept(lambda: answer_loss(model, *batch))
    assert not any(shape[-1:] == (SHAPE.vocab_size,) for shape in parts.held())
    assert whole.held_bytes() - parts.held_bytes() >= 4 * ASKED * SHAPE.vocab_size


def test_action_logprobs_keep_logits_once_and_once_more_for_the_entropy(monkeypatch):
    (tokens, labels), model = dialogues([7] * ROWS), model_of()
    mask = labels[:, 1:] != IGNORE
    both, meter = kept(lambda: action_logprobs(model, tokens, mask))
    assert logits_kept(meter, ASKED) == logits_kept(meter, ASKED + 1) == 1
    _logprobs = both[0]
    del both  # a loss without an entropy bonus
    assert logits_kept(meter, ASKED) == 1 and logits_kept(meter, ASKED + 1) == 0
    monkeypatch.setattr(vocabulary, "LOGITS", CHUNK * SHAPE.vocab_size)
    _both, meter = kept(lambda: action_logprobs(model, tokens, mask))
    assert not any(shape[-1:] == (SHAPE.vocab_size,) for shape in meter.held())


@UPDATES
def test_in_chunks_no_more_logits_than_that_ever_exist(update, monkeypatch):
    """In one tensor, their gradient's included; a row more ends the text of a chunk."""
    batch, model = dialogues([7] * ROWS), model_of()
    _, whole = kept(lambda: update(model, *batch))
    assert whole.rows_of(SHAPE.vocab_size) == ASKED + 1
    monkeypatch.setattr(vocabulary, "LOGITS", CHUNK * SHAPE.vocab_size)
    _, parts = kept(lambda: update(model, *batch))
    assert parts.rows_of(SHAPE.vocab_size) == CHUNK + 1


def ppo_update(entropy_coef: float):
    """The policy's part of a PPO update, whose entropy is reported and perhaps in the loss."""

    def update(model, tokens, labels):
        mask = labels[:, 1:] != IGNORE
        ones = torch.ones(mask.shape)
        batch = Rollout(tokens, mask, -ones, ones, ones, ones, mask)
        policy_backward(model, batch, PPOSettings(entropy_coef=entropy_coef))

    return update


@pytest.mark.parametrize(
    "update", [sft_update, policy_update, ppo_update(0.0), ppo_update(0.1)],
    ids=["sft", "logprobs", "ppo", "ppo with entropy"],
)  # fmt: skip
def test_the_peak_is_that_of_a_chunk(update, monkeypatch):
    """With 80 rows of logits, all else is small: the blocks, a chunk of 2 rows, and the embedding's
    gradient, which is as large as 8 rows and exists three times while two are added. A bound,
    since the order in which a version of torch lets go of tensors is its own affair."""
    config = replace(SHAPE, layers=1, width=8, vocab_size=4001)
    batch, model = dialogues([1] * ROWS), model_of(config)
    logits = 4 * ROWS * (LENGTH - 1) * config.vocab_size
    _, whole = kept(lambda: update(model, *batch))
    assert whole.peak > 3 * logits
    model.zero_grad(set_to_none=True)
    monkeypatch.setattr(vocabulary, "LOGITS", 2 * config.vocab_size)
    _, parts = kept(lambda: update(model, *batch))
    assert parts.peak < logits / 2


def test_the_meter_by_hand():
    """Two matrices of 20 numbers and a view; one of them is let go."""
    given = torch.ones(4, 5)
    with Meter() as meter:
        first = given + 1
        view = first.t()
        second = first * 2
        del second
        first.add_(1)
    assert meter.held() == {(4, 5): [80]} and view.shape == (5, 4)
    assert (meter.peak, meter.held_bytes(), meter.rows_of(5)) == (160, 80, 4)
    assert meter.made == {(4, 5): 2}
    kernels = {"aten::add.Tensor": 1, "aten::mul.Tensor": 1, "aten::add_.Tensor": 1}
    assert meter.kernels == kernels
    assert meter.calls == {**kernels, "aten::t": 1}


# ------------------------------------------------------------------------------------- operators

PRODUCTS = ("aten::addmm", "aten::mm", "aten::bmm", "aten::baddbmm")
ATTENTION = "aten::_scaled_dot_product_flash_attention_for_cpu"


def products(calls: Counter) -> int:
    return sum(calls[name] for name in PRODUCTS)


def step_calls(layers: int, new: int, prompts) -> Counter:
    """The kernels of the step that writes token number `new`: those of `new` tokens without those
    of `new` - 1."""
    model = model_of(replace(SHAPE, layers=layers))
    meters = [kept(lambda n=n: generate(model, prompts, n, NEVER))[1] for n in (new - 1, new)]
    return meters[1].kernels - meters[0].kernels


RAGGED = [[4, 2], *PROMPT[1:]]


@pytest.mark.parametrize(
    ("prompts", "of_block", "others"), [(PROMPT, 12, 12), (RAGGED, 15, 14)], ids=["equal", "ragged"]
)
@pytest.mark.parametrize("layers", [1, 2, 4])
def test_calls_of_one_step_of_sampling(layers, prompts, of_block, others):
    calls = step_calls(layers, 6, prompts)
    assert products(calls) == 4 * layers + 1  # qkv, project, expand, contract; logits
    assert calls[ATTENTION] == layers
    assert calls["aten::copy_"] == 2 * layers  # keys and values, written in their place
    assert calls["aten::cat"] == 0
    assert calls.total() <= of_block * layers + others  # equal with torch 2.13
    assert step_calls(layers, 30, prompts) == calls  # whatever came before
    assert step_calls(layers, 6, prompts * 3) == calls  # and however many rows there are


@pytest.mark.parametrize("layers", [1, 2, 4])
def test_calls_of_one_update_of_sft(layers):
    model = model_of(replace(SHAPE, layers=layers)).train()
    batch, optimizer = dialogues([7] * ROWS), make_optimizer(model, 1e-3)

    def update():
        optimizer.zero_grad(set_to_none=True)
        sft_update(model, *batch)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    update()  # the optimizer's state is made once
    calls = kept(update)[1].kernels
    assert products(calls) == 3 * (4 * layers + 1)
    assert calls[ATTENTION] == calls[ATTENTION + "_backward"] == layers
    assert calls["aten::_fused_adamw_"] == 2  # what decays and what does not, not each parameter
    assert calls.total() <= 31 * layers + 53  # equal with torch 2.13
