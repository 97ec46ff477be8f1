"""PPO-ptx: rollout → scores → advantages → updates, again and again.

    rlhf-course ppo --world town --size small
    rlhf-course ppo --data prompts.jsonl --model DIR --reward my_rewards:valid_sql

Read `PPOTrainer.iterate` first: it is the algorithm.
"""

from __future__ import annotations

import copy
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from rlhf_course.beyond_ppo import policy_step
from rlhf_course.data import read_documents
from rlhf_course.errors import TrainingError, check_finite
from rlhf_course.kl_control import PIKLController
from rlhf_course.mdp import masked_mean
from rlhf_course.ppo import (
    AdaptiveKLController,
    FixedKLController,
    critic_backward,
    explained_variance,
)  # fmt: skip
from rlhf_course.ppo_ptx import (
    EMAMoments,
    PopArt,
    PTXSettings,
    RunningMoments,
    ppo_ptx_step,
    pretraining_gradient,
)
from rlhf_course.progress import console
from rlhf_course.reward_model import ScalarModel
from rlhf_course.rollout import PPOSettings, Rollout
from rlhf_course.runs import Run, State
from rlhf_course.stages.checks import check_settings
from rlhf_course.stages.corpus import Corpus
from rlhf_course.stages.presets import identity, resolve
from rlhf_course.stages.prompts import Prompts, judged
from rlhf_course.stages.rewards import call_reward_function, load_reward_function, model_scores
from rlhf_course.stages.rollouts import (
    Answers,
    assemble,
    collect,
    in_parts,
    score_actions,
    shape_scores,
)
from rlhf_course.stages.settings import PPOConfig
from rlhf_course.stages.setup import (
    announce,
    before,
    complete,
    conclude,
    device_of,
    frozen,
    load_policy,
    load_reward_model,
)
from rlhf_course.training import (
    learning_rate,
    make_optimizer,
    set_learning_rate,
    torch_generator,
)  # fmt: skip

# Diagnostics of a rollout's first update alone, and those that are no mean over updates.
MEASURED_FIRST = ("grad_norm_ppo", "grad_norm_ptx")
NOT_AVERAGED = (*MEASURED_FIRST, "ratio_max", "log_ratio_max")
# Largest |log-ratio| that rounding alone can cause before the first update of a rollout.
RATIO_TOLERANCE = {None: 1e-3, torch.bfloat16: 0.25}


class PPOTrainer:
    """Everything that PPO holds, and one iteration of it."""

    def __init__(self, config: PPOConfig, device):
        self.config, self.device = config, device
        source = config.model or before(config, "sft")
        self.policy, self.tokenizer = load_policy(source, device)
        self.reference = frozen(copy.deepcopy(self.policy))
        self.reward_model = self.reward_function = None
        if config.reward:
            self.reward_function = load_reward_function(config.reward)
        else:
            folder = config.reward_model or before(config, "reward_model")
            self.reward_model = load_reward_model(folder, self.tokenizer, device)
        self.critic = self._critic() if config.advantages == "gae" else None
        self.policy.train()
        readers = [m.backbone for m in (self.reward_model, self.critic) if m is not None]
        self.context = min(model.context for model in (self.policy, *readers))
        self.prompts = Prompts(config, self.tokenizer, self.context)
        self.corpus = self._corpus() if config.ptx_coef else None
        self.settings = PPOSettings(
            config.clip, config.clip, config.dual_clip, config.value_clip,
            config.mdp == "sequence" and config.sequence_ratio, config.entropy_coef,
            config.temperature, config.max_grad_norm, config.micro_batch,
        )  # fmt: skip
        betas, eps = (0.9, 0.95), 1e-6
        self.policy_optimizer = make_optimizer(self.policy, config.lr, betas, eps)
        if self.critic is not None:
            self.critic_optimizer = make_optimizer(self.critic, config.critic_lr, betas, eps)
        self.controller = self._controller()
        kinds = {"none": None, "running": RunningMoments, "ema": lambda: EMAMoments(0.99)}
        kind = kinds[config.reward_norm]
        self.moments = kind() if kind else None
        self.popart = PopArt(self.critic.head) if config.value_norm == "popart" else None

    def _critic(self) -> ScalarModel:
        """It starts as the reward model, or, where a function gives the score, as the policy."""
        if self.reward_model is not None:
            critic = self.reward_model.as_critic()
        else:
            critic = ScalarModel.from_language_model(self.policy, "last", self.config.seed)
            nn.init.zeros_(critic.head.weight)
        return self.device.place(critic).train()

    def _controller(self) -> FixedKLController:
        config = self.config
        if config.kl_controller == "fixed" or config.kl_coef == 0:
            return FixedKLController(config.kl_coef)
        common = (config.kl_coef, config.kl_target, config.kl_horizon, config.kl_floor)
        if config.kl_controller == "adaptive":
            return AdaptiveKLController(*common)
        return PIKLController(*common, gain=config.kl_gain)

    def _corpus(self) -> Corpus:
        window = min(48, self.policy.context)
        if self.config.ptx_data:
            return Corpus(read_documents(self.config.ptx_data), self.tokenizer, window)
        return Corpus(self.prompts.world.documents("train"), self.tokenizer, window)

    def state(self) -> State:
        """What a checkpoint holds. The reference and the reward model never change."""
        counters = {"controller": self.controller, "reward_norm": self.moments,
                    "value_norm": self.popart}  # fmt: skip
        modules, optimizers = {"policy": self.policy}, {"policy": self.policy_optimizer}
        if self.critic is not None:
            modules["critic"], optimizers["critic"] = self.critic, self.critic_optimizer
        counters = {name: counter for name, counter in counters.items() if counter is not None}
        return State(modules, optimizers, counters)

    def iterate(self, step: int) -> tuple[dict, dict]:
        """One iteration: answers, scores, advantages, updates. Returns (metrics, timing).

        The first `critic_warmup` steps train the critic alone: until it predicts the answers'
        returns, the advantages are mostly its own error.
        """
        config, clock = self.config, [time.perf_counter()]
        iteration = step - config.critic_warmup  # negative while the critic warms up
        generator = torch_generator(config.seed, "rollout", step, device=self.device.device)
        tasks = self.prompts(step)
        answers = collect(self.policy, tasks, self.tokenizer, config, generator, self.context)
        clock.append(time.perf_counter())
        raw = self.score(answers)  # (B,)
        scores = shape_scores(raw, answers.finished, config, self.moments)  # (B,)
        actions = score_actions(
            self.policy, self.reference, self.critic, answers, config, self.popart
        )
        kl_coef = self.controller.value
        rollout, kl = assemble(answers, scores, *actions, kl_coef, config)
        if self.popart is not None:
            self.popart.update(rollout.returns, rollout.value_mask)
        clock.append(time.perf_counter())

        metrics = {"score": scores.mean().item(), "reward": raw.mean().item(),
                   "kl": kl.mean().item(), "kl_coef": kl_coef}  # fmt: skip
        metrics |= self.describe(answers, rollout)
        values = masked_mean(rollout.values, rollout.value_mask)
        check_finite({**metrics, "values": values}, f"ppo step {step}, before any update")
        if config.advantages == "grpo":
            self.settings = replace(self.settings, kl_loss_coef=kl_coef)
        metrics |= self.update(rollout, step, iteration)
        if iteration >= 0:
            self.controller.update(metrics["kl"], len(rollout))
        clock.append(time.perf_counter())
        names = ("rollout_seconds", "scoring_seconds", "update_seconds")
        timing = {n: b - a for n, a, b in zip(names, clock, clock[1:], strict=False)}
        timing["episodes_per_second"] = len(rollout) / (clock[-1] - clock[0])
        return metrics, timing

    def score(self, answers: Answers) -> torch.Tensor:
        """Scores (B,) of the reward model, or of the reward function."""
        if self.reward_function is None:
            size = self.config.micro_batch or self.config.minibatch
            (scores,) = in_parts(
                lambda *part: (model_scores(self.reward_model, *part),), size,
                answers.tokens, answers.prompt_lengths, answers.response_lengths,
            )  # fmt: skip
            return scores
        prompts, rows = [t.text for t in answers.tasks], [t.row for t in answers.tasks]
        scores = call_reward_function(self.reward_function, prompts, answers.texts, rows)
        return scores.to(answers.tokens.device)

    def held_out_reward(self, model: nn.Module, most: int = 256) -> float:
        """Mean reward of one answer to each of the data set's held-out prompts."""
        generator = torch_generator(self.config.seed, "held out", device=self.device.device)
        tasks = self.prompts.held[:most]
        answers = collect(model, tasks, self.tokenizer, self.config, generator, self.context)
        return self.score(answers).mean().item()

    def describe(self, answers: Answers, rollout: Rollout) -> dict[str, float]:
        """Diagnostics of the rollout; in a world also the gold utility, which no learner sees."""
        lengths = answers.response_lengths.float()
        out = {
            "length": lengths.mean().item(),
            "eos_rate": answers.finished.float().mean().item(),
        }
        if self.critic is not None:
            targets = rollout.values, rollout.returns, rollout.value_mask
            out["explained_variance"] = explained_variance(*targets).item()
        world = self.prompts.world
        return out if world is None else out | judged(world, answers)

    def update(self, rollout: Rollout, step: int, iteration: int) -> dict[str, float]:
        """`epochs` passes over the rollout in random minibatches; returns the mean diagnostics."""
        config = self.config
        total = config.iterations
        lr = learning_rate(config.lr, max(iteration + 1, 0), total, "linear", config.warmup,
                           config.lr_floor)  # fmt: skip
        set_learning_rate(self.policy_optimizer, lr)
        warm = iteration < 0
        if self.critic is not None:
            critic_lr = config.critic_warmup_lr if warm else config.critic_lr
            set_learning_rate(self.critic_optimizer, critic_lr)
        sums, largest, first, updates = Counter(), 0.0, {}, 0
        for epoch in range(config.epochs):
            generator = torch_generator(config.seed, "minibatches", step, epoch)
            order = torch.randperm(len(rollout), generator=generator).to(rollout.tokens.device)
            for rows in order.split(config.minibatch):
                batch = rollout.select(rows)
                stats = self.critic_step(batch) if warm else self.policy_step(batch, step, updates)
                if not warm and updates == 0:
                    self.check_ratio(stats["log_ratio_max"])
                    first = {name: stats[name] for name in MEASURED_FIRST if name in stats}
                largest = max(largest, stats.get("ratio_max", 0.0))
                for name, value in stats.items():
                    if name not in NOT_AVERAGED:
                        sums[name] += value
                updates += 1
        means = {name: value / updates for name, value in sums.items()}
        return means if warm else {**means, "ratio_max": largest, "lr": lr, **first}

    def policy_step(self, batch: Rollout, step: int, update: int) -> dict[str, float]:
        """One update of the policy, and of the critic where there is one; the norms of both losses'
        gradients are measured at a rollout's first."""
        config, rows = self.config, None
        if self.corpus is not None:
            rows = self.corpus.rows(config.ptx_rows, config.seed, "ptx", step, update)
            rows = rows.to(batch.tokens.device)
        ptx, measure = PTXSettings(config.ptx_coef, config.ptx_reduction), update == 0
        if self.critic is None:
            more = pretraining_gradient(self.policy, rows, ptx, measure)
            return policy_step(self.policy, batch, self.policy_optimizer, self.settings, more)
        return ppo_ptx_step(
            self.policy, self.critic, batch, rows, self.policy_optimizer, self.critic_optimizer,
            self.settings, ptx, self.popart.normalize if self.popart else None, measure,
        )  # fmt: skip

    def critic_step(self, batch: Rollout) -> dict[str, float]:
        """One update of the critic alone."""
        self.critic_optimizer.zero_grad(set_to_none=True)
        normalize = self.popart.normalize if self.popart else None
        stats = critic_backward(self.critic, batch, self.settings, normalize)
        norm = nn.utils.clip_grad_norm_(self.critic.parameters(), self.config.max_grad_norm)
        stats["value_grad_norm"] = norm.item()
        check_finite(stats, "critic warm-up")
        self.critic_optimizer.step()
        return stats

    def check_ratio(self, log_ratio_max: float) -> None:
        """Before the first update of a rollout, new and old policy are one: every ratio is 1."""
        allowed = RATIO_TOLERANCE[self.policy.compute_dtype]
        if log_ratio_max > allowed:
            raise TrainingError(
                f"the first update of a rollout has a log-ratio of {log_ratio_max:.3g}, where 0 is "
                f"due (rounding explains {allowed}). Rollout and update disagree about the same "
                "tokens: check temperature, dropout and padding."
            )


def ppo(config: PPOConfig) -> Path:
    """Run (or finish) the stage; returns the policy's directory."""
    check_settings(resolve(config, "ppo"))
    device = device_of(config)
    announce("ppo", config, device)
    total = config.critic_warmup + config.iterations
    run = Run(config.out, identity(config), total, config.out.name,
              config.overwrite, config.checkpoint_every)  # fmt: skip
    if complete(run):
        return run.model_dir
    trainer = PPOTrainer(config, device)
    with run:
        for step in run.steps(trainer.state()):
            run.log(step, *trainer.iterate(step))
        summary = {}
        if trainer.prompts.held:
            models = {"before": trainer.reference, "after": trainer.policy}
            for name, model in models.items():
                summary[f"held_out_reward_{name}"] = trainer.held_out_reward(model)
            console.print("held-out prompts: reward {:.3f} → {:.3f}".format(*summary.values()))
        conclude(
            run, "ppo", lambda d: trainer.policy.save_pretrained(d, trainer.tokenizer), summary,
            config.kl_target if config.kl_coef else None,
        )  # fmt: skip
    return run.model_dir
