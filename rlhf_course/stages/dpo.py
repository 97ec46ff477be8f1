"""DPO: the SFT model, trained on comparisons directly. No reward model, no sampling, no critic.

    rlhf-course dpo --world town --size small
    rlhf-course dpo --data preferences.jsonl --model runs/…/sft/model

The reference never changes, so its log-probabilities are computed once, before the first update.
Every `eval_every` updates the policy answers prompts that it is not trained on: that costs what DPO
saves, but only so are the KL and the gold reward known beside those of PPO.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_course.beyond_ppo import dpo_loss
from rlhf_course.errors import check_finite
from rlhf_course.evaluation import preference_accuracy, reward_margin
from rlhf_course.mdp import action_mask, masked_sum
from rlhf_course.padding import pad_rows
from rlhf_course.rollout import action_logprobs
from rlhf_course.runs import Run, State
from rlhf_course.stages.cards import Provenance
from rlhf_course.stages.checks import check_settings
from rlhf_course.stages.evaluate import kl_to
from rlhf_course.stages.loading import write_report
from rlhf_course.stages.lora import (
    adapted,
    save_activations,
    weights_of,
    write_adapter_beside,
)
from rlhf_course.stages.presets import PRESETS, identity, resolve
from rlhf_course.stages.prompts import judged, world_tasks
from rlhf_course.stages.reward_model import Ranked, ranked_answers
from rlhf_course.stages.rollouts import Task, collect
from rlhf_course.stages.settings import DPOConfig
from rlhf_course.stages.setup import (
    announce,
    before,
    complete,
    conclude,
    device_of,
    frozen,
    load_policy,
)
from rlhf_course.training import (
    derive_seed,
    epoch_batch,
    learning_rate,
    make_optimizer,
    set_learning_rate,
    torch_generator,
)

PART = 256  # answers a forward pass where nothing is learnt


@dataclass
class Pair:
    """Two answers to a prompt as tokens, and what the reference thinks of them."""

    prompt: list[int]
    chosen: list[int]
    rejected: list[int]
    reference: tuple[float, float]


def answer_logprobs(model: nn.Module, rows: list[tuple[list[int], list[int]]]) -> Tensor:
    """log pi(answer given prompt) of (prompt, answer) token lists, summed: (N,) nats."""
    device = next(model.parameters()).device
    tokens = pad_rows([prompt + answer for prompt, answer in rows], limit=model.context)
    starts, lengths = (torch.tensor([len(row[i]) for row in rows]) for i in (0, 1))
    mask = action_mask(starts, lengths, tokens.shape[1]).to(device)
    logprobs, _ = action_logprobs(model, tokens.to(device), mask)
    return masked_sum(logprobs, mask, dim=1)


@torch.no_grad()
def scored(model: nn.Module, ranked: Sequence[Ranked], size: int = PART) -> list[Tensor]:
    """`answer_logprobs` of every prompt's answers, (K,) each; every answer is read once, `size` in
    a forward pass."""
    rows = [(r.prompt, answer) for r in ranked for answer in r.answers]
    parts = [answer_logprobs(model, rows[i : i + size]) for i in range(0, len(rows), size)]
    return list(torch.cat(parts).split([len(r.answers) for r in ranked])) if parts else []


def make_pairs(
    reference: nn.Module, ranked: Sequence[Ranked], kind: str, size: int = PART
) -> list[Pair]:
    """The pairs of all prompts: "best_worst" takes one of each, "all" K(K-1)/2."""
    pairs = []
    for r, logprobs in zip(ranked, scored(reference, ranked, size), strict=True):
        last, known = len(r.answers) - 1, logprobs.tolist()
        wanted = [(0, last)] if kind == "best_worst" else combinations(range(last + 1), 2)
        pairs += [
            Pair(r.prompt, r.answers[i], r.answers[j], (known[i], known[j])) for i, j in wanted
        ]
    return pairs


def policy_logprobs(policy: nn.Module, pairs: list[Pair]) -> tuple[Tensor, ...]:
    """(policy's of the chosen, of the rejected, reference's of both), (N,) each."""
    rows = [(p.prompt, p.chosen) for p in pairs] + [(p.prompt, p.rejected) for p in pairs]
    chosen, rejected = answer_logprobs(policy, rows).split(len(pairs))
    reference = torch.tensor([p.reference for p in pairs], device=chosen.device)  # (N, 2)
    return chosen, rejected, *reference.unbind(dim=1)


class DPOTrainer:
    """What DPO holds, one update, and what is measured between the updates."""

    def __init__(self, config: DPOConfig, device):
        self.config, self.device = config, device
        self.source = config.model or before(config, "sft")
        how = weights_of(config, device)
        self.policy, self.tokenizer = load_policy(self.source, device, how)
        # The policy before any update: a copy, or the policy without its adapter.
        self.reference = adapted(config, self.policy, "policy")
        self.reference = self.reference or frozen(copy.deepcopy(self.policy))
        save_activations(config, self.policy)
        context = self.policy.context
        found = ranked_answers(config, self.tokenizer, context)
        train, self.held, self.world, self.report = found
        # As many answers in a pass as an update's micro-batch has, where one was asked for.
        self.size = 2 * config.micro_batch if config.micro_batch else PART
        self.pairs = make_pairs(self.reference, train, config.pairs, self.size)
        self.held_reference = scored(self.reference, self.held, self.size)
        self.tasks = self._tasks()
        self.policy.train()
        self.optimizer = make_optimizer(
            self.policy, config.lr, (0.9, 0.98), weight_decay=config.weight_decay
        )
        self.total = config.steps or config.epochs * math.ceil(len(self.pairs) / config.batch)

    def _tasks(self) -> list[Task]:
        """The prompts to answer: those that PPO would be asked, or the held-out comparisons'."""
        config = self.config
        if self.world is None:
            room = self.policy.context - config.max_new_tokens
            tasks = [Task("", r.prompt) for r in self.held if len(r.prompt) <= room]
            return tasks[: config.eval_prompts]
        known = PRESETS[config.world, config.size]["ppo"].get("known_share")
        seed = derive_seed(config.seed, "dpo prompts")
        extra = {} if known is None else {"known_share": known}
        return world_tasks(
            self.tokenizer, self.world.prompts("ppo", config.eval_prompts, seed, **extra)
        )

    def update(self, step: int) -> dict[str, float]:
        """One update on a batch of pairs; returns the diagnostics."""
        config = self.config
        lr = learning_rate(config.lr, step, self.total, config.schedule, config.warmup,
                           config.lr_floor)  # fmt: skip
        set_learning_rate(self.optimizer, lr)
        picked = epoch_batch(len(self.pairs), config.batch, step, config.seed, "dpo")
        batch = [self.pairs[i] for i in picked]
        self.optimizer.zero_grad(set_to_none=True)
        metrics: dict[str, float] = {}
        size = config.micro_batch or len(batch)
        for start in range(0, len(batch), size):
            four = policy_logprobs(self.policy, batch[start : start + size])
            loss, stats = dpo_loss(*four, beta=config.beta, denominator=len(batch))
            loss.backward()
            for name, value in {"loss": loss, **stats}.items():
                metrics[name] = metrics.get(name, 0.0) + value.item()
        norm = nn.utils.clip_grad_norm_(self.policy.parameters(), config.max_grad_norm)
        metrics |= {"grad_norm": norm.item(), "lr": lr}
        check_finite(metrics, f"dpo step {step}")
        self.optimizer.step()
        return metrics

    @torch.no_grad()
    def measure(self) -> dict[str, float]:
        """Held-out pairs in the implicit reward's order, and the policy's own answers: KL to the
        reference (k1, nats a sequence), length, and in a world their gold utility."""
        out = self._held_out()
        if not self.tasks:
            return out
        # The same draws each time: what changes is the policy.
        generator = torch_generator(self.config.seed, "dpo answers", device=self.device.device)
        self.policy.eval()
        answers = collect(
            self.policy, self.tasks, self.tokenizer, self.config, generator, self.policy.context
        )
        kl = kl_to(self.policy, self.reference, answers, self.config.temperature, self.size)
        self.policy.train()
        out |= {
            "kl": kl,
            "length": answers.response_lengths.float().mean().item(),
            "eos_rate": answers.finished.float().mean().item(),
        }
        return out if self.world is None else out | judged(self.world, answers)

    def _held_out(self) -> dict[str, float]:
        if not self.held:
            return {}
        chosen, rejected = [], []
        both = zip(scored(self.policy, self.held, self.size), self.held_reference, strict=True)
        for ours, theirs in both:
            rewards = self.config.beta * (ours - theirs)  # (K,), best first
            better, worse = torch.triu_indices(len(rewards), len(rewards), 1)
            chosen.append(rewards[better])
            rejected.append(rewards[worse])
        pairs = torch.cat(chosen), torch.cat(rejected)
        return {
            "eval_accuracy": preference_accuracy(*pairs).accuracy,
            "eval_margin": reward_margin(*pairs),
        }


def dpo(config: DPOConfig) -> Path:
    """Run (or finish) the stage; returns the policy's directory."""
    check_settings(resolve(config, "dpo"))
    device = device_of(config)
    announce("dpo", config, device)
    run = Run(config.out, identity(config), 0, config.out.name,
              config.overwrite, config.checkpoint_every, config.track)  # fmt: skip
    if complete(run):
        return run.model_dir
    trainer = DPOTrainer(config, device)
    run.total = trainer.total
    summary: dict = {}
    with run:
        write_report(trainer.report, run.path)
        for step in run.steps(State({"policy": trainer.policy}, {"adam": trainer.optimizer})):
            began = time.perf_counter()
            metrics = trainer.update(step)
            seconds = time.perf_counter() - began
            if (step + 1) % config.eval_every == 0 or step + 1 == trainer.total:
                summary = trainer.measure()
                metrics |= summary
            run.log(step, metrics, {"seconds": seconds, "pairs_per_second": config.batch / seconds})
        write_adapter_beside(
            run, config, trainer.source,
            lambda folder, base: trainer.policy.save_adapter(folder, base, trainer.tokenizer),
        )  # fmt: skip
        conclude(
            run,
            Provenance(
                "dpo",
                config,
                str(device),
                {"pairs": len(trainer.pairs), "held-out prompts": len(trainer.held)},
                trainer.report,
            ),
            lambda folder: trainer.policy.save_pretrained(folder, trainer.tokenizer),
            summary or trainer.measure(),  # measured here where it was resumed behind the last step
        )
    return run.model_dir
