"""Reward model: the SFT model with a scalar head, trained on comparisons.

rlhf-course reward-model --world town --size small
rlhf-course reward-model --data preferences.jsonl --model runs/…/sft/model
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from rlhf_course.data_report import DataReport
from rlhf_course.errors import DataError, TrainingError, check_finite
from rlhf_course.evaluation import (
    expected_calibration_error,
    preference_accuracy,
    reward_margin,
)
from rlhf_course.padding import like_lengths, pad_rows
from rlhf_course.reward_model import ScalarModel, kwise_loss, normalize_rewards, pairwise_loss
from rlhf_course.runs import Run, State
from rlhf_course.sft import encode_prompt
from rlhf_course.shared_prefix import SharedRows, shared_rewards, side_by_side, worth_sharing
from rlhf_course.stages.cards import Provenance
from rlhf_course.stages.checks import check_settings
from rlhf_course.stages.comparisons import read_comparisons_run
from rlhf_course.stages.fitting import Encoder, Fitter, TokenTable
from rlhf_course.stages.loading import (
    bad_rows,
    read_data,
    split_table,
    tell,
    too_long,
    write_report,
)
from rlhf_course.stages.lora import (
    adapted,
    save_activations,
    weights_of,
    write_adapter_beside,
)
from rlhf_course.stages.presets import identity, resolve, workspace
from rlhf_course.stages.settings import DPOConfig, RewardModelConfig
from rlhf_course.stages.setup import (
    announce,
    before,
    complete,
    conclude,
    device_of,
    load_policy,
    world_for,
)
from rlhf_course.training import (
    epoch_batch,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    shuffled,
)  # fmt: skip
from rlhf_course.world import World

PART = 128  # prompts a forward pass where nothing is learnt, and no --micro-batch is given


@dataclass
class Ranked:
    """One prompt's answers as tokens, best first."""

    prompt: list[int]
    answers: list[list[int]]
    source: object = None  # the world's Comparison, where there is one


def encode_ranked(
    tokenizer, prompt: str, responses, finished, source=None, context: int = 1 << 20
) -> Ranked:
    """Tokens of the prompt (chat template) and of each answer, EOS added where it ended."""
    ids = tokenizer(list(responses), add_special_tokens=False)["input_ids"]
    ends = [[tokenizer.eos_token_id] if end else [] for end in finished]
    # An answer of no token at all has nothing to be scored at: it is read as its end.
    answers = [a + e or [tokenizer.eos_token_id] for a, e in zip(ids, ends, strict=True)]
    start = encode_prompt(tokenizer, prompt)
    # Text that is no words can take more tokens than it was sampled with: what exceeds is cut off.
    return Ranked(start, [a[: context - len(start)] for a in answers], source)


def score_table(model: ScalarModel, part: list[Ranked]) -> tuple[Tensor, Tensor]:
    """(scores (prompts, K), mask (prompts, K)): every answer is read once, and where that costs
    less (`worth_sharing`) so is every prompt.

    A prompt with fewer than K answers repeats its first, which the mask leaves out.
    """
    prompts, answers = [r.prompt for r in part], [r.answers for r in part]
    device = next(model.parameters()).device
    if worth_sharing(prompts, answers, model):
        rows = SharedRows(*(t.to(device) for t in side_by_side(prompts, answers)))
        scores = shared_rewards(model, rows)  # (prompts, K)
    else:
        scores = separate_rewards(model, prompts, answers)  # (prompts, K)
    there = torch.tensor([len(said) for said in answers])  # (prompts,)
    mask = torch.arange(scores.shape[1]) < there[:, None]  # (prompts, K)
    return scores, mask.to(device)


def separate_rewards(
    model: ScalarModel, prompts: list[list[int]], answers: list[list[list[int]]]
) -> Tensor:
    """(prompts, K): rewards from a row of prompt and answer for each answer.

    Repeated answers make the table full, and every batch of the same shape (see `padding`).
    """
    width = max(map(len, answers))
    filled = [said + said[:1] * (width - len(said)) for said in answers]
    rows = [p + a for p, said in zip(prompts, filled, strict=True) for a in said]
    starts = torch.tensor([len(p) for p in prompts for _ in range(width)])  # (N,)
    lengths = torch.tensor([len(a) for said in filled for a in said])  # (N,)
    device = next(model.parameters()).device
    tokens = pad_rows(rows, limit=model.backbone.context)  # (N, T), N = prompts × K
    scores = model.rewards(*(t.to(device) for t in (tokens, starts, lengths)))
    return scores.view(len(prompts), width)


@torch.no_grad()
def evaluate(model: ScalarModel, held: Sequence[Ranked], world=None, size: int = PART) -> dict:
    """Accuracy on held-out pairs (ties count half), the world's best possible, calibration."""
    if not held:
        return {}
    chosen, rejected = [], []
    for start in range(0, len(held), size):
        scores, mask = score_table(model, held[start : start + size])
        better, worse = torch.triu_indices(mask.shape[1], mask.shape[1], 1)
        both = mask[:, better] & mask[:, worse]  # (prompts, pairs)
        chosen.append(scores[:, better][both])
        rejected.append(scores[:, worse][both])
    chosen, rejected = torch.cat(chosen).cpu(), torch.cat(rejected).cpu()
    # Every other pair is asked the wrong way round, so that there is something to calibrate on.
    asked = torch.arange(len(chosen), device=chosen.device) % 2  # 1: as labelled
    probabilities = torch.where(asked == 1, chosen - rejected, rejected - chosen).sigmoid()
    out = {
        "eval_accuracy": preference_accuracy(chosen, rejected).accuracy,
        "eval_margin": reward_margin(chosen, rejected),
        "eval_calibration_error": expected_calibration_error(probabilities, asked),
    }
    if world is not None:
        bayes = world.bayes_accuracy([r.source for r in held])
        out |= {"bayes_full": bayes["full"], "bayes_closed_book": bayes["closed_book"]}
        out["ratio_closed_book"] = out["eval_accuracy"] / bayes["closed_book"]
        out["ratio_full"] = out["eval_accuracy"] / bayes["full"]
    return out


class Comparisons(NamedTuple):
    """What there is to learn from, and the world or the report of --data it comes from."""

    train: Sequence[Ranked]
    held: Sequence[Ranked]
    world: World | None = None
    report: DataReport | None = None


def ranked_answers(config: RewardModelConfig | DPOConfig, tokenizer, context: int) -> Comparisons:
    """From --data, or from the comparisons run that stands beside this stage's."""
    if config.data:
        return _from_data(config, tokenizer, context)
    folder = workspace(config) / "comparisons"
    if not (folder / "done.json").exists():
        raise DataError(
            f"{folder / 'comparisons.jsonl'}: not there or not complete; this stage learns "
            "from it. Run `rlhf-course comparisons` with the same --world, --size and --seed "
            "first, or give comparisons with --data."
        )
    train, held = (
        [encode_ranked(tokenizer, c.prompt.text, c.responses, c.finished, c, context)
         for c in read_comparisons_run(folder / name)]
        for name in ("comparisons.jsonl", "heldout.jsonl")
    )  # fmt: skip
    return Comparisons(train, held, world_for(config))


def _from_data(config, tokenizer, context: int) -> Comparisons:
    """Written by the chat template as SFT writes dialogues. Raises DataError naming the row."""
    data = read_data(config, "comparisons")
    policy = too_long(config, data)
    encoder = Encoder(tokenizer, data.report, bad_rows(config, data))
    table = TokenTable(lambda prompt, *answers: Ranked(prompt, list(answers)))
    fitter = Fitter(table, encoder, context)
    for place, item in zip(data.places, data.items, strict=True):
        fitter.add(place, item.prompt, item.responses)
    kept = fitter.fit(context, policy, lambda i: tuple(data.items[i]))
    held, train, *_ = split_table(config, data, fitter, kept)
    tell(data.report)
    return Comparisons(train, held, report=data.report)


def prepare(config: RewardModelConfig, device):
    """(model, tokenizer, comparisons)."""
    source = config.model or before(config, "sft")
    language_model, tokenizer = load_policy(source, device, weights_of(config, device))
    model = device.place(
        ScalarModel.from_language_model(language_model, config.pooling, config.seed)
    )
    adapted(config, model.backbone, "reward model")
    save_activations(config, model)
    return model, tokenizer, ranked_answers(config, tokenizer, model.backbone.context)


def loss_of(
    config: RewardModelConfig, model: ScalarModel, part: list[Ranked], denominator: int | None
) -> Tensor:
    """K-wise (each prompt's pairs averaged first) or over single pairs; denominator: how many
    prompts with a pair, or pairs, the whole update has (None: those given here)."""
    scores, mask = score_table(model, part)
    if config.loss == "kwise":
        ranks = torch.arange(mask.shape[1], device=mask.device).expand_as(scores)  # best first
        return kwise_loss(scores, ranks, mask, denominator)
    better, worse = torch.triu_indices(mask.shape[1], mask.shape[1], 1)
    both = mask[:, better] & mask[:, worse]
    pairs = scores[:, better][both], scores[:, worse][both]
    return pairwise_loss(*pairs, denominator=denominator)


def backward(config: RewardModelConfig, model: ScalarModel, part: list[Ranked]) -> Tensor:
    """Add the gradient of the loss over these comparisons, by `micro_batch` prompts at a time, of
    like length (None: see `like_lengths`); the head's bias gets none. Returns the loss, 0-dim."""
    lengths = [len(r.prompt) + sum(map(len, r.answers)) for r in part]
    device, count = next(model.parameters()).device, None
    parts = like_lengths(lengths, config.micro_batch, device)
    if len(parts) > 1:
        pairs = [len(r.answers) * (len(r.answers) - 1) // 2 for r in part]
        count = max(sum(map(bool, pairs)) if config.loss == "kwise" else sum(pairs), 1)
    losses = []
    for rows in parts:
        loss = loss_of(config, model, [part[i] for i in rows], count)
        loss.backward()
        losses.append(loss.detach())
    # No difference of rewards knows the head's bias: its gradient is 0, in floating point nearly 0,
    # of which Adam would make steps. It stays, so that transformers' logit, without it, is equal.
    model.head.bias.grad = None
    return torch.stack(losses).sum()


def as_pairs(ranked: Sequence[Ranked], seed: int) -> list[Ranked]:
    """Every pair of every prompt as a comparison of its own, shuffled."""
    pairs = [
        Ranked(r.prompt, [r.answers[i], r.answers[j]], r.source)
        for r in ranked for i in range(len(r.answers)) for j in range(i + 1, len(r.answers))
    ]  # fmt: skip
    return [pairs[i] for i in shuffled(len(pairs), seed, "pairs")]


@torch.no_grad()
def normalize(
    config: RewardModelConfig, model: ScalarModel, train: Sequence[Ranked], world, tokenizer
):
    """Set the bias on demonstrations (with --data: on chosen answers), or gain and bias on all
    answers of the training comparisons."""
    if config.normalize == "none":
        return
    some = train[:512]
    if config.normalize == "bias" and world is not None:
        some = [encode_ranked(tokenizer, d.prompt.text, [d.response], [True])
                for d in world.demonstrations()[:512]]  # fmt: skip
    elif config.normalize == "bias":
        some = [Ranked(r.prompt, r.answers[:1]) for r in some]
    size = config.micro_batch or PART
    scores = [score_table(model, some[i : i + size]) for i in range(0, len(some), size)]
    rewards = torch.cat([table[mask] for table, mask in scores])
    try:
        gain, bias = normalize_rewards(rewards, config.normalize)
    except ValueError as error:
        raise TrainingError(
            f"the reward model cannot be normalised: {error}. It has learned nothing, or has "
            "diverged: change --lr or --steps, or give --normalize none."
        ) from error
    model.gain.fill_(gain)
    model.bias.fill_(bias)


def train_reward_model(config: RewardModelConfig) -> Path:
    """Run (or finish) the stage; returns the model's directory."""
    check_settings(resolve(config, "reward_model"))
    device = device_of(config)
    announce("reward_model", config, device)
    run = Run(config.out, identity(config), 0, "reward_model",
              config.overwrite, config.checkpoint_every, config.track)  # fmt: skip
    if complete(run):
        return run.model_dir
    model, tokenizer, (train, held, world, report) = prepare(config, device)
    if config.loss == "pairwise":
        train = as_pairs(train, config.seed)
    run.total = steps = config.steps or config.epochs * math.ceil(len(train) / config.batch)
    optimizer = make_optimizer(model, config.lr, (0.9, 0.98), weight_decay=config.weight_decay)
    summary: dict = {}
    with run:
        write_report(report, run.path)
        for step in run.steps(State({"model": model}, {"adam": optimizer})):
            began = time.perf_counter()
            lr = learning_rate(config.lr, step, steps, config.schedule, config.warmup,
                               config.lr_floor)  # fmt: skip
            set_learning_rate(optimizer, lr)
            part = [
                train[i] for i in epoch_batch(len(train), config.batch, step, config.seed, "rm")
            ]
            optimizer.zero_grad(set_to_none=True)  # before the activations need the room
            loss = backward(config, model, part)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            metrics = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr}
            check_finite(metrics, f"reward_model step {step}")
            optimizer.step()
            seconds = time.perf_counter() - began
            if (step + 1) % 100 == 0 or step + 1 == steps:
                summary = evaluate(model, held, world, config.micro_batch or PART)
                metrics |= summary
            run.log(step, metrics, {"seconds": seconds, "prompts_per_second": len(part) / seconds})
        # Where it was resumed behind the last step, nothing has been measured yet.
        summary = summary or evaluate(model, held, world, config.micro_batch or PART)
        normalize(config, model, train, world, tokenizer)
        write_adapter_beside(run, config, config.model or before(config, "sft"), model.save_adapter)
        rows = {"comparisons": len(train), "held out": len(held)}
        conclude(run, Provenance("reward_model", config, str(device), rows, report),
                 lambda folder: model.save_pretrained(folder, tokenizer), summary)  # fmt: skip
    return run.model_dir
