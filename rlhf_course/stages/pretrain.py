"""Pretraining: the next token of every document.

rlhf-course pretrain --world town --size small
rlhf-course pretrain --data my_text.jsonl --size tiny
"""

from __future__ import annotations

import time
from pathlib import Path

from torch import nn

from rlhf_course.errors import ConfigError, check_finite
from rlhf_course.evaluation import corpus_perplexity
from rlhf_course.gpt import next_token_loss
from rlhf_course.runs import Run, State
from rlhf_course.stages.cards import Provenance
from rlhf_course.stages.checks import check_settings
from rlhf_course.stages.corpus import Corpus, words_of
from rlhf_course.stages.loading import read_text, tell, write_report
from rlhf_course.stages.presets import SHAPES, identity, resolve
from rlhf_course.stages.settings import PretrainConfig
from rlhf_course.stages.setup import (
    announce,
    complete,
    conclude,
    device_of,
    load_policy,
    new_model,
    world_for,
)
from rlhf_course.training import learning_rate, make_optimizer, set_learning_rate
from rlhf_course.world.tokenizer import train_tokenizer


def prepare(config: PretrainConfig, device):
    """(model, tokenizer, training corpus, validation corpus, report of --data or None)."""
    report = tokenizer = None
    if config.data:
        documents, held, texts = read_text(config)
        held, texts, report = documents.part(held), documents.part(texts), documents.report
        tell(report)
    else:
        world = world_for(config)
        texts, held = world.documents("train"), world.documents("validation")
        tokenizer = world.tokenizer
    if config.model and config.model not in SHAPES:
        model, tokenizer = load_policy(config.model, device)
    else:
        tokenizer = tokenizer or train_tokenizer(
            words_of(texts), config.vocab_size, whole_words=False
        )
        model = new_model(config.model or config.size, tokenizer, config.context, config.seed)
    if config.window > model.context:
        raise ConfigError(
            f"--window {config.window}: a row must fit the context of the model, {model.context}."
        )
    train = Corpus(texts, tokenizer, config.window, "the training part of the text")
    validation = Corpus(held, tokenizer, config.window, "the held-out part of the text")
    return device.place(model), tokenizer, train, validation, report


def perplexity_of(model: nn.Module, corpus: Corpus, limit: int = 512) -> float:
    """Perplexity on held-out rows of the corpus."""
    rows = corpus.every_row(limit).to(next(model.parameters()).device)
    return corpus_perplexity(model, rows)


def pretrain(config: PretrainConfig) -> Path:
    """Run (or finish) the stage; returns the model's directory."""
    check_settings(resolve(config, "pretrain"))
    device = device_of(config)
    announce("pretrain", config, device)
    run = Run(config.out, identity(config), config.steps, "pretrain",
              config.overwrite, config.checkpoint_every, config.track)  # fmt: skip
    if complete(run):
        return run.model_dir
    model, tokenizer, corpus, validation, report = prepare(config, device)
    optimizer = make_optimizer(model, config.lr, (0.9, 0.98), weight_decay=config.weight_decay)
    with run:
        write_report(report, run.path)
        for step in run.steps(State({"model": model}, {"adam": optimizer})):
            began = time.perf_counter()
            lr = learning_rate(config.lr, step, config.steps, config.schedule, config.warmup,
                               config.lr_floor)  # fmt: skip
            set_learning_rate(optimizer, lr)
            rows = corpus.rows(config.batch, config.seed, "pretrain", step).to(device.device)
            optimizer.zero_grad(set_to_none=True)  # before the activations need the room
            loss = next_token_loss(model(rows), rows)
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), config.max_grad_norm)
            metrics = {"loss": loss.item(), "grad_norm": norm.item(), "lr": lr}
            check_finite(metrics, f"pretrain step {step}")
            optimizer.step()
            if (step + 1) % 100 == 0 or step + 1 == config.steps:
                metrics["validation_perplexity"] = perplexity_of(model, validation)
            seconds = time.perf_counter() - began
            timing = {"seconds": seconds, "tokens_per_second": rows.numel() / seconds}
            run.log(step, metrics, timing)
        conclude(
            run,
            Provenance("pretrain", config, str(device), {"tokens": len(corpus.stream)}, report),
            lambda folder: model.save_pretrained(folder, tokenizer),
            {"validation_perplexity": perplexity_of(model, validation)},
        )
    return run.model_dir
