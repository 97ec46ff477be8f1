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
from rlhf_course.padding import like_lengths, pad_rows, padded_length
from rlhf_course.progress import console
from rlhf_course.runs import Run, State
from rlhf_course.schemas import Dialogue
from rlhf_course.sft import (
    IGNORE,
    Example,
    answer_loss,
    mask_prompt,
    pack,
    segment_mask,
)
from rlhf_course.stages.cards import Provenance
from rlhf_course.stages.checks import check_settings
from rlhf_course.stages.corpus import Corpus, words_of
from rlhf_course.stages.fitting import LARGEST, Encoder, Fitter, TokenTable
from rlhf_course.stages.loading import bad_rows, read_data, tell, too_long, write_report
from rlhf_course.stages.lora import (
    adapted,
    save_activations,
    weights_of,
    write_adapter_beside,
)
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
    plain_template,
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
        source = config.model or before(config, "pretrain")
        model, tokenizer = load_policy(source, device, weights_of(config, device))
        if tokenizer.chat_template is None:  # a base model: it is saved with the new one
            console.print("[yellow]the tokenizer gets a chat template: User: Assistant:[/yellow]")
            tokenizer.chat_template = plain_template(tokenizer)
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


Batch = tuple[Tensor, Tensor, Tensor | None, Tensor | None]
"""(tokens, labels, attend, positions), as `answer_loss` takes them."""


def as_batch(examples: Sequence[Example], context: int, pad_id: int, packing: bool) -> Batch:
    """A row for each dialogue, or as few rows as they fit into."""
    if not packing:
        return *padded(examples, context), None, None
    packed = pack(examples, context, pad_id)
    return packed.tokens, packed.labels, segment_mask(packed.segments), packed.positions


class Batches:
    """Batch number `step` as (tokens, labels, attend, positions); a function of the step alone."""

    def __init__(self, config: SFTConfig, data: SFTData, context: int, pad_id: int):
        self.config, self.data, self.context, self.pad_id = config, data, context, pad_id

    def __call__(self, step: int) -> Batch:
        config = self.config
        picked = epoch_batch(len(self.data.train), config.batch, step, config.seed, "sft")
        examples = [self.data.train[i] for i in picked]
        batch = as_batch(examples, self.context, self.pad_id, config.packing)
        if self.data.corpus is not None and not config.packing:
            tokens, labels, *_ = batch
            rows = self.data.corpus.rows(config.corpus_rows, config.seed, "sft corpus", step)
            width = max(tokens.shape[1], rows.shape[1])
            fill = nn.functional.pad
            tokens = torch.cat([fill(t, (0, width - t.shape[1])) for t in (tokens, rows)])
            labels = torch.cat(
                [fill(t, (0, width - t.shape[1]), value=IGNORE) for t in (labels, rows)]
            )
            return tokens, labels, None, None
        return batch


def micro_batches(batch: Batch, size: int | None, device: torch.device) -> list[Batch]:
    """The batch in parts of at most `size` rows (None: see `like_lengths`). Rows of like length
    share a part, which ends where its longest row does: less to compute, the same gradient."""
    tokens, labels, attend, positions = batch
    places = torch.arange(1, tokens.shape[1] + 1)
    lengths = torch.where(labels != IGNORE, places, 1).amax(dim=1)  # behind it nothing is asked
    rows_of_parts = like_lengths(lengths.tolist(), size, device, tokens.shape[1])
    if len(rows_of_parts) == 1:
        return [batch]
    parts = []
    for rows in rows_of_parts:
        T = padded_length(int(lengths[rows].max()), tokens.shape[1])
        seen = None if attend is None else attend[rows, :, :T, :T]
        counted = None if positions is None else positions[rows, :T]
        parts.append((tokens[rows, :T], labels[rows, :T], seen, counted))
    return parts


def backward(model: nn.Module, batch: Batch, size: int | None, device: torch.device) -> Tensor:
    """Add the gradient of the mean loss over the batch's answers; returns that mean, 0-dim."""
    parts = micro_batches(batch, size, device)
    # A single part counts for itself, as it did before there were several.
    count = (batch[1][:, 1:] != IGNORE).sum().item() if len(parts) > 1 else None
    losses = []
    for part in parts:
        there = (None if t is None else t.to(device, non_blocking=True) for t in part)
        loss = answer_loss(model, *there, count)
        loss.backward()
        losses.append(loss.detach())
    return torch.stack(losses).sum()


@torch.no_grad()
def evaluate(
    model: nn.Module, tokenizer, held: Sequence[Example], answers: int = 64, size: int | None = None
) -> dict:
    """Loss on held-out answers, and the share of greedy answers that equal them exactly. size: rows
    a forward pass, and answers that are written at a time (None: 32, and all)."""
    if not held:
        return {}
    device = next(model.parameters()).device
    total = count = 0.0
    for start in range(0, len(held), size or 32):
        part = held[start : start + (size or 32)]
        tokens, labels = (t.to(device) for t in padded(part, model.context))
        wanted = float((labels[:, 1:] != IGNORE).sum())
        total += answer_loss(model, tokens, labels).item() * wanted
        count += wanted
    some = held[:answers]
    starts = [prompt_length(example) for example in some]
    prompts = [tokens[:start] for (tokens, _), start in zip(some, starts, strict=True)]
    wanted_ids = [tokens[start:] for (tokens, _), start in zip(some, starts, strict=True)]
    longest = max(map(len, wanted_ids))
    room = model.context - max(map(len, prompts))
    said = generate(
        model, prompts, min(longest + 8, room), tokenizer.eos_token_id, 0, batch_size=size
    )
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
    adapted(config, model, "policy")
    save_activations(config, model)
    batches = Batches(config, data, model.context, tokenizer.pad_token_id or 0)
    optimizer = make_optimizer(model, config.lr, (0.9, 0.98), weight_decay=config.weight_decay)
    with run:
        write_report(data.report, run.path)
        for step in run.steps(State({"model": model}, {"adam": optimizer})):
            began = time.perf_counter()
            lr = learning_rate(config.lr, step, config.steps, config.schedule, config.warmup,
                               config.lr_floor)  # fmt: skip
            set_learning_rate(optimizer, lr)
            optimizer.zero_grad(set_to_none=True)  # before the activations need the room
            batch = batches(step)
            loss = backward(model, batch, config.micro_batch, device.device)
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            metrics = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr}
            check_finite(metrics, f"sft step {step}")
            optimizer.step()
            seconds = time.perf_counter() - began
            if (step + 1) % config.eval_every == 0 or step + 1 == config.steps:
                metrics |= evaluate(model, tokenizer, data.held, size=config.micro_batch)
            timing = {"seconds": seconds, "tokens_per_second": batch[0].numel() / seconds}
            run.log(step, metrics, timing)
        if config.lora is not None:  # a model that is new stands beside no run of pretraining
            write_adapter_beside(
                run, config, config.model or before(config, "pretrain"),
                lambda folder, base: model.save_adapter(folder, base, tokenizer),
            )  # fmt: skip
        conclude(
            run,
            Provenance(
                "sft",
                config,
                str(device),
                {"dialogues": len(data.train), "held out": len(data.held)},
                data.report,
            ),
            lambda folder: model.save_pretrained(folder, tokenizer),
            evaluate(model, tokenizer, data.held, 256, config.micro_batch),
        )
    return run.model_dir
