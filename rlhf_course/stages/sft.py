"""Supervised fine-tuning: imitate demonstrations, with the loss on the answers alone.

rlhf-course sft --world town --size small
rlhf-course sft --data dialogues.jsonl --model small
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_course.data import Read, split_rows
from rlhf_course.data_report import DataReport
from rlhf_course.errors import check_finite
from rlhf_course.evaluation import exact_match
from rlhf_course.gpt import generate
from rlhf_course.padding import pad_rows
from rlhf_course.progress import console
from rlhf_course.runs import Run, State
from rlhf_course.schemas import Dialogue
from rlhf_course.sft import (
    IGNORE,
    PLAIN_TEMPLATE,
    Example,
    answer_loss,
    mask_prompt,
    pack,
    segment_mask,
)
from rlhf_course.stages.checks import check_settings
from rlhf_course.stages.corpus import Corpus, words_of
from rlhf_course.stages.fitting import LARGEST, Encoder, Fitter, TokenTable
from rlhf_course.stages.loading import bad_rows, read_data, tell, too_long, write_report
from rlhf_course.stages.presets import DATA_DEFAULTS, SHAPES, identity, resolve
from rlhf_course.stages.settings import SFTConfig
from rlhf_course.stages.setup import (
    announce,
    before,
    complete,
    conclude,
    device_of,
    load_policy,
    new_model,
    world_for,
)
from rlhf_course.training import epoch_batch, learning_rate, make_optimizer, set_learning_rate
from rlhf_course.world.tokenizer import train_tokenizer


@dataclass
class SFTData:
    """Encoded dialogues (tokens, labels), and the corpus rows mixed in against forgetting."""

    train: Sequence[Example]
    held: Sequence[Example]
    corpus: Corpus | None
    report: DataReport | None


def prepare(config: SFTConfig, device):
    """(model, tokenizer, data)."""
    corpus_texts = tokenizer = None
    if config.data:
        data, share = read_data(config, "dialogues"), config.validation
    else:
        world, share = world_for(config), 0.05
        dialogues = [Dialogue(d.prompt.text, d.response) for d in world.demonstrations()]
        data = Read(dialogues, range(len(dialogues)), DataReport(config.world, "dialogues"))
        tokenizer, corpus_texts = world.tokenizer, world.documents("train")
    held, train = split_rows(range(len(data.items)), share, config.seed)
    model = None
    if config.model in SHAPES or (config.data and config.model is None):
        if tokenizer is None:
            texts = (text for i in train for text in data.items[i].texts())
            tokenizer = train_tokenizer(words_of(texts), config.vocab_size, whole_words=False)
    else:
        model, tokenizer = load_policy(config.model or before(config, "pretrain"), device)
        if tokenizer.chat_template is None:  # a base model: it is saved with the new one
            console.print("[yellow]the tokenizer gets a chat template: User: Assistant:[/yellow]")
            tokenizer.chat_template = PLAIN_TEMPLATE
    table, kept, context = fit_dialogues(config, data, tokenizer, model)
    if model is None:
        model = new_model(config.model or config.size, tokenizer, context, config.seed)
    held, train = (table.take([kept[i] for i in part if i in kept]) for part in (held, train))
    data.report.held_out = len(held)
    if config.data:
        tell(data.report)
    corpus = None
    if config.corpus_rows and corpus_texts:
        corpus = Corpus(corpus_texts, tokenizer, min(48, model.context))
    report = data.report if config.data else None
    return device.place(model), tokenizer, SFTData(train, held, corpus, report)


def as_example(prompt: list[int], answer: list[int]) -> Example:
    """Tokens and labels of a dialogue, the loss on the answer alone."""
    return prompt + answer, [IGNORE] * len(prompt) + answer


def fit_dialogues(
    config: SFTConfig, data: Read, tokenizer, model: nn.Module | None
) -> tuple[TokenTable, dict[int, int], int]:
    """(the dialogues as tokens, dialogue -> its row there, the context), which is the model's, or
    is chosen for a new one. Raises DataError as --too-long says."""
    policy = too_long(config, data)
    encoder = Encoder(tokenizer, data.report, bad_rows(config, data))
    context = config.context if model is None else model.context
    fitter = Fitter(TokenTable(as_example), encoder, context or LARGEST)
    for place, (prompt, response) in zip(data.places, data.items, strict=True):
        fitter.add(place, prompt, [response])
    if context is None:
        context = fitter.choose_context(policy, DATA_DEFAULTS["ppo"]["max_new_tokens"])
        data.report.notes.append(f"context chosen for the new model: {context} tokens (--context)")
    kept = fitter.fit(context, policy, lambda i: (data.items[i].prompt, [data.items[i].response]))
    return fitter.table, kept, context


def prompt_length(example: Example) -> int:
    """How many tokens come before the one answer that a dialogue of this stage has."""
    return sum(label == IGNORE for label in example[1])


def padded(examples: Sequence[Example], context: int) -> tuple[Tensor, Tensor]:
    """(tokens, labels), (B, T) long each, right-padded."""
    tokens = pad_rows([list(ids) for ids, _ in examples], 0, context)  # (B, T)
    prompts = torch.tensor([prompt_length(example) for example in examples])  # (B,)
    lengths = torch.tensor([len(ids) for ids, _ in examples])  # (B,)
    return tokens, mask_prompt(tokens, prompts, lengths)


class Batches:
    """Batch number `step` as (tokens, labels, attend, positions); a function of the step alone."""

    def __init__(self, config: SFTConfig, data: SFTData, context: int, pad_id: int):
        self.config, self.data, self.context, self.pad_id = config, data, context, pad_id

    def __call__(self, step: int) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        config = self.config
        picked = epoch_batch(len(self.data.train), config.batch, step, config.seed, "sft")
        examples = [self.data.train[i] for i in picked]
        if config.packing:
            packed = pack(examples, self.context, self.pad_id)
            attend = segment_mask(packed.segments)  # (B, 1, T, T)
            return packed.tokens, packed.labels, attend, packed.positions
        tokens, labels = padded(examples, self.context)
        if self.data.corpus is not None:
            rows = self.data.corpus.rows(config.corpus_rows, config.seed, "sft corpus", step)
            width = max(tokens.shape[1], rows.shape[1])
            fill = nn.functional.pad
            tokens = torch.cat([fill(t, (0, width - t.shape[1])) for t in (tokens, rows)])
            labels = torch.cat(
                [fill(t, (0, width - t.shape[1]), value=IGNORE) for t in (labels, rows)]
            )
        return tokens, labels, None, None


@torch.no_grad()
def evaluate(model: nn.Module, tokenizer, held: Sequence[Example], answers: int = 64) -> dict:
    """Loss on held-out answers, and the share of greedy answers that equal them exactly."""
    if not held:
        return {}
    device = next(model.parameters()).device
    total = count = 0.0
    for start in range(0, len(held), 32):
        tokens, labels = (t.to(device) for t in padded(held[start : start + 32], model.context))
        wanted = float((labels[:, 1:] != IGNORE).sum())
        total += answer_loss(model, tokens, labels).item() * wanted
        count += wanted
    some = held[:answers]
    starts = [prompt_length(example) for example in some]
    prompts = [tokens[:start] for (tokens, _), start in zip(some, starts, strict=True)]
    wanted_ids = [tokens[start:] for (tokens, _), start in zip(some, starts, strict=True)]
    longest = max(map(len, wanted_ids))
    room = model.context - max(map(len, prompts))
    said = generate(model, prompts, min(longest + 8, room), tokenizer.eos_token_id, temperature=0)
    texts = [tokenizer.batch_decode(ids, skip_special_tokens=True)
             for ids in (said.responses, wanted_ids)]  # fmt: skip
    return {"eval_loss": total / count, "eval_exact_match": exact_match(*texts)}


def sft(config: SFTConfig) -> Path:
    """Run (or finish) the stage; returns the model's directory."""
    check_settings(resolve(config, "sft"))
    device = device_of(config)
    announce("sft", config, device)
    run = Run(config.out, identity(config), config.steps, "sft",
              config.overwrite, config.checkpoint_every)  # fmt: skip
    if complete(run):
        return run.model_dir
    model, tokenizer, data = prepare(config, device)
    batches = Batches(config, data, model.context, tokenizer.pad_token_id or 0)
    optimizer = make_optimizer(model, config.lr, (0.9, 0.98), weight_decay=config.weight_decay)
    with run:
        write_report(data.report, run.path)
        for step in run.steps(State({"model": model}, {"adam": optimizer})):
            began = time.perf_counter()
            lr = learning_rate(config.lr, step, config.steps, config.schedule, config.warmup,
                               config.lr_floor)  # fmt: skip
            set_learning_rate(optimizer, lr)
            tokens, labels, attend, positions = (
                None if t is None else t.to(device.device) for t in batches(step)
            )
            loss = answer_loss(model, tokens, labels, attend, positions)
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            metrics = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr}
            check_finite(metrics, f"sft step {step}")
            optimizer.step()
            seconds = time.perf_counter() - began
            if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                metrics |= evaluate(model, tokenizer, data.held)
            timing = {"seconds": seconds, "tokens_per_second": tokens.numel() / seconds}
            run.log(step, metrics, timing)
        conclude(
            run,
            "sft",
            lambda folder: model.save_pretrained(folder, tokenizer),
            evaluate(model, tokenizer, data.held, answers=256),
        )
    return run.model_dir
