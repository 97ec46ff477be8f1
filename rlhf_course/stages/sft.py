"""Supervised fine-tuning: imitate demonstrations, with the loss on the answers alone.

rlhf-course sft --world town --size small
rlhf-course sft --data dialogues.jsonl --model small
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_course.data import Dialogue, read_dialogues, split_rows
from rlhf_course.errors import DataError, check_finite
from rlhf_course.evaluation import exact_match
from rlhf_course.gpt import generate
from rlhf_course.padding import pad_rows
from rlhf_course.progress import console
from rlhf_course.runs import Run, State
from rlhf_course.sft import (
    IGNORE,
    PLAIN_TEMPLATE,
    Example,
    answer_loss,
    encode_dialogue,
    fit_context,
    mask_prompt,
    pack,
    segment_mask,
)
from rlhf_course.stages.cards import Provenance
from rlhf_course.stages.checks import check_settings
from rlhf_course.stages.corpus import Corpus
from rlhf_course.stages.presets import SHAPES, identity, resolve
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

    train: list[Example]
    held: list[Example]
    corpus: Corpus | None


def prepare(config: SFTConfig, device):
    """(model, tokenizer, data)."""
    corpus_texts = tokenizer = None
    if config.data:
        dialogues, share = read_dialogues(config.data), config.validation
    else:
        world, share = world_for(config), 0.05
        dialogues = [Dialogue(d.prompt.text, d.response) for d in world.demonstrations()]
        tokenizer, corpus_texts = world.tokenizer, world.documents("train")
    if config.model in SHAPES or (config.data and config.model is None):
        if tokenizer is None:
            _, train = split_rows(dialogues, share, config.seed)
            texts = [text for dialogue in train for text in dialogue.texts()]
            tokenizer = train_tokenizer(texts, config.vocab_size, whole_words=False)
        model = new_model(config.model or config.size, tokenizer, config.context, config.seed)
    else:
        model, tokenizer = load_policy(config.model or before(config, "pretrain"), device)
        if tokenizer.chat_template is None:  # a base model: it is saved with the new one
            console.print("[yellow]the tokenizer gets a chat template: User: Assistant:[/yellow]")
            tokenizer.chat_template = PLAIN_TEMPLATE
    examples = encode_all(dialogues, tokenizer, model.context, config.truncate)
    held, train = split_rows(examples, share, config.seed)
    corpus = None
    if config.corpus_rows and corpus_texts:
        corpus = Corpus(corpus_texts, tokenizer, min(48, model.context))
    return device.place(model), tokenizer, SFTData(train, held, corpus)


def encode_all(dialogues: list[Dialogue], tokenizer, context: int, truncate: bool) -> list[Example]:
    """Every dialogue as (tokens, labels); says how many were cut when that was asked for."""
    examples = []
    for number, (prompt, response) in enumerate(dialogues, 1):
        try:
            tokens, start = encode_dialogue(tokenizer, prompt, response)
        except DataError as error:
            raise DataError(f"dialogue {number}: {error}") from None
        examples.append((tokens, [IGNORE] * start + tokens[start:]))
    fitted = fit_context(examples, context, truncate)
    if fitted.cut or fitted.dropped:
        console.print(
            f"[yellow]{fitted.cut} dialogues cut to {context} tokens, {fitted.dropped} dropped "
            f"because nothing of the answer was left, of {len(examples)}[/yellow]"
        )
    return fitted.examples


def prompt_length(example: Example) -> int:
    """How many tokens come before the one answer that a dialogue of this stage has."""
    return sum(label == IGNORE for label in example[1])


def padded(examples: list[Example], context: int) -> tuple[Tensor, Tensor]:
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
def evaluate(model: nn.Module, tokenizer, held: list[Example], answers: int = 64) -> dict:
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
              config.overwrite, config.checkpoint_every, config.track)  # fmt: skip
    if complete(run):
        return run.model_dir
    model, tokenizer, data = prepare(config, device)
    batches = Batches(config, data, model.context, tokenizer.pad_token_id or 0)
    optimizer = make_optimizer(model, config.lr, (0.9, 0.98), weight_decay=config.weight_decay)
    with run:
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
            Provenance(
                "sft",
                config,
                str(device),
                {"dialogues": len(data.train), "held out": len(data.held)},
            ),
            lambda folder: model.save_pretrained(folder, tokenizer),
            evaluate(model, tokenizer, data.held, answers=256),
        )
    return run.model_dir
