"""PPO-ptx but for the models: what is asked, how answers become advantages, when who is updated.

Read `PPOLoop.iterate` first: it is the algorithm. `stages.ppo` runs it with models in this process,
chapter 9 (`rlhf_course.distributed`) with models on a cluster.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace

import torch

from rlhf_course.data import Documents
from rlhf_course.errors import TrainingError, check_finite
from rlhf_course.kl_control import PIKLController
from rlhf_course.mdp import last_action, masked_mean
from rlhf_course.moments import explained_variance
from rlhf_course.ppo import AdaptiveKLController, FixedKLController
from rlhf_course.ppo_ptx import EMAMoments, PopArt, PTXSettings, RunningMoments
from rlhf_course.reader import Reading
from rlhf_course.rollout import PPOSettings, Rollout
from rlhf_course.stages.corpus import Corpus
from rlhf_course.stages.prompts import Prompts, judged
from rlhf_course.stages.rewards import call_reward_function
from rlhf_course.stages.rollouts import Answers, assemble, shape_scores
from rlhf_course.stages.settings import PPOConfig
from rlhf_course.training import learning_rate, torch_generator

# Diagnostics of a rollout's first update alone, and those that are no mean over updates.
MEASURED_FIRST = ("grad_norm_ppo", "grad_norm_ptx")
NOT_AVERAGED = (*MEASURED_FIRST, "ratio_max", "log_ratio_max")
# Largest |log-ratio| that rounding alone can cause before the first update of a rollout.
RATIO_TOLERANCE = {None: 1e-3, torch.bfloat16: 0.25}


class PPOLoop:
    """One iteration of PPO. A subclass has the models: it answers, scores, reads and updates."""

    reward_function = None
    """Gives the score in place of a reward model."""
    popart: PopArt | None = None
    """Normalises the critic's targets."""

    def __init__(self, config: PPOConfig, tokenizer, context: int, compute_dtype=None):
        """context: the shortest of all models that will read the answers, in tokens."""
        self.config, self.tokenizer, self.context = config, tokenizer, context
        self.compute_dtype = compute_dtype
        self.prompts = Prompts(config, tokenizer, context)
        self.corpus = self._corpus() if config.ptx_coef else None
        self.settings = PPOSettings(
            config.clip, config.clip, config.dual_clip, config.value_clip,
            config.mdp == "sequence" and config.sequence_ratio, config.entropy_coef,
            config.temperature, config.max_grad_norm, config.micro_batch,
        )  # fmt: skip
        self.ptx = PTXSettings(config.ptx_coef, config.ptx_reduction)
        self.controller = self._controller()
        kinds = {"none": None, "running": RunningMoments, "ema": lambda: EMAMoments(0.99)}
        kind = kinds[config.reward_norm]
        self.moments = kind() if kind else None

    def _controller(self) -> FixedKLController:
        config = self.config
        if config.kl_controller == "fixed" or config.kl_coef == 0:
            return FixedKLController(config.kl_coef)
        common = (config.kl_coef, config.kl_target, config.kl_horizon, config.kl_floor)
        if config.kl_controller == "adaptive":
            return AdaptiveKLController(*common)
        return PIKLController(*common, gain=config.kl_gain)

    def _corpus(self) -> Corpus:
        window = min(48, self.context)
        if self.config.ptx_data:
            text = Documents(self.config.ptx_data, Reading(bad_rows=self.config.bad_rows))
            return Corpus(text, self.tokenizer, window)
        return Corpus(self.prompts.world.documents("train"), self.tokenizer, window)

    def counters(self) -> dict:
        """What a checkpoint holds beside weights and optimisers."""
        counters = {"controller": self.controller, "reward_norm": self.moments,
                    "value_norm": self.popart}  # fmt: skip
        return {name: counter for name, counter in counters.items() if counter is not None}

    # ---- what a subclass does with its models ----------------------------------------------------

    def collect(self, step: int) -> Answers:
        """The policy's answers to the prompts of this step."""
        raise NotImplementedError

    def model_scores(self, answers: Answers) -> torch.Tensor:
        """The reward model's scores of the answers, (B,) float32."""
        raise NotImplementedError

    def read(self, answers: Answers) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probs, the reference's, and values of the answers; see `rollouts.score_actions`."""
        raise NotImplementedError

    def correct(self, rollout: Rollout, answers: Answers) -> dict[str, float]:
        """Where another engine sampled the answers: the rollout's weights, and diagnostics."""
        return {}

    def rescale_critic(self, rollout: Rollout) -> None:
        """Take the rollout's returns into `popart`, and rescale the critic's head to match."""
        raise NotImplementedError

    def set_learning_rates(self, policy: float, critic: float) -> None:
        """For the updates that follow."""
        raise NotImplementedError

    def policy_step(self, batch: Rollout, corpus: torch.Tensor | None, measure: bool) -> dict:
        """One update of the policy, and of the critic where there is one; returns the diagnostics.

        corpus: (R, T) rows of pretraining text; measure: also the norms of both losses' gradients.
        """
        raise NotImplementedError

    def critic_step(self, batch: Rollout) -> dict[str, float]:
        """One update of the critic alone."""
        raise NotImplementedError

    # ---- the algorithm ---------------------------------------------------------------------------

    def iterate(self, step: int) -> tuple[dict, dict]:
        """One iteration: answers, scores, advantages, updates. Returns (metrics, timing).

        The first `critic_warmup` steps train the critic alone: until it predicts the answers'
        returns, the advantages are mostly its own error.
        """
        began = time.perf_counter()
        answers = self.collect(step)
        seconds = time.perf_counter() - began
        metrics, timing = self.learn(step, answers)
        timing = {"rollout_seconds": seconds, **timing}
        timing["episodes_per_second"] = len(answers.tasks) / (time.perf_counter() - began)
        return metrics, timing

    def learn(self, step: int, answers: Answers) -> tuple[dict, dict]:
        """Scores, advantages and updates from these answers. Returns (metrics, timing)."""
        config, clock = self.config, [time.perf_counter()]
        iteration = step - config.critic_warmup  # negative while the critic warms up
        raw = self.score(answers)  # (B,)
        scores = shape_scores(raw, answers.finished, config, self.moments)  # (B,)
        actions = self.read(answers)
        kl_coef = self.controller.value
        rollout, kl = assemble(answers, scores, *actions, kl_coef, config)
        if self.popart is not None:
            self.rescale_critic(rollout)
        clock.append(time.perf_counter())

        metrics = {"score": scores.mean().item(), "reward": raw.mean().item(),
                   "kl": kl.mean().item(), "kl_coef": kl_coef}  # fmt: skip
        metrics |= self.describe(answers, rollout) | self.correct(rollout, answers)
        values = masked_mean(rollout.values, rollout.value_mask)
        check_finite({**metrics, "values": values}, f"ppo step {step}, before any update")
        if config.advantages == "grpo":
            self.settings = replace(self.settings, kl_loss_coef=kl_coef)
        metrics |= self.update(rollout, step, iteration)
        if iteration >= 0:
            self.controller.update(metrics["kl"], len(rollout))
        clock.append(time.perf_counter())
        names = ("scoring_seconds", "update_seconds")
        return metrics, {n: b - a for n, a, b in zip(names, clock, clock[1:], strict=False)}

    def score(self, answers: Answers) -> torch.Tensor:
        """Scores (B,) of the reward model, or of the reward function."""
        if self.reward_function is None:
            return self.model_scores(answers)
        prompts, rows = [t.text for t in answers.tasks], [t.row for t in answers.tasks]
        scores = call_reward_function(self.reward_function, prompts, answers.texts, rows)
        return scores.to(answers.tokens.device)

    def describe(self, answers: Answers, rollout: Rollout) -> dict[str, float]:
        """Diagnostics of the rollout; in a world also the gold utility, which no learner sees."""
        lengths = answers.response_lengths.float()
        out = {
            "length": lengths.mean().item(),
            "eos_rate": answers.finished.float().mean().item(),
        }
        if self.config.advantages == "gae":
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
        warm = iteration < 0
        self.set_learning_rates(lr, config.critic_warmup_lr if warm else config.critic_lr)
        sums, largest, first, updates = Counter(), 0.0, {}, 0
        ends = last_action(rollout.mask)  # (B,)
        for epoch in range(config.epochs):
            generator = torch_generator(config.seed, "minibatches", step, epoch)
            order = torch.randperm(len(rollout), generator=generator).to(rollout.tokens.device)
            for rows in order.split(config.minibatch):
                if config.micro_batch:  # answers of like length share a forward pass
                    rows = rows[ends[rows].argsort(stable=True)]
                batch = rollout.select(rows)
                if warm:
                    stats = self.critic_step(batch)
                else:
                    corpus = self.corpus_rows(step, updates)
                    stats = self.policy_step(batch, corpus, measure=updates == 0)
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

    def corpus_rows(self, step: int, update: int) -> torch.Tensor | None:
        """(R, T) long: pretraining text for one update; None where there is no such term."""
        if self.corpus is None:
            return None
        return self.corpus.rows(self.config.ptx_rows, self.config.seed, "ptx", step, update)

    def check_ratio(self, log_ratio_max: float) -> None:
        """Before the first update of a rollout, new and old policy are one: every ratio is 1."""
        allowed = RATIO_TOLERANCE[self.compute_dtype]
        if log_ratio_max > allowed:
            raise TrainingError(
                f"the first update of a rollout has a log-ratio of {log_ratio_max:.3g}, where 0 is "
                f"due (rounding explains {allowed}). Rollout and update disagree about the same "
                "tokens: check temperature, dropout and padding."
            )
