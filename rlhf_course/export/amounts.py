"""What the settings amount to where another library counts in other units."""

from __future__ import annotations

import math
from dataclasses import dataclass

from rlhf_course.export.source import Source


def largest_divisor(whole: int, most: int) -> int:
    """The largest number up to `most` that divides `whole`: so many passes make it exactly."""
    return next(part for part in range(min(most, whole), 0, -1) if whole % part == 0)


@dataclass
class Amounts:
    """Of a supervised stage: updates, rows an update and a forward pass, and warm-up updates."""

    steps: int
    batch: int
    micro: int
    warmup: int

    @classmethod
    def of(cls, source: Source) -> Amounts:
        """A reward model's batch counts prompts, elsewhere it counts pairs."""
        config = source.config
        each = source.per_prompt if source.stage == "reward_model" else 1.0
        if source.stage == "reward_model" and config.loss == "pairwise":
            each = 1.0
        batch = max(round(config.batch * each), 1)
        epochs = getattr(config, "epochs", None) or 1
        steps = config.steps or epochs * math.ceil(len(source.train) / batch)
        micro = largest_divisor(batch, getattr(config, "micro_batch", None) or batch)
        return cls(steps, batch, micro, min(config.warmup, steps - 1))

    def epochs(self, rows: int) -> int:
        """Whole passes over the rows that reach the steps."""
        return max(math.ceil(self.steps * self.batch / rows), 1)


@dataclass
class Rollouts:
    """Of PPO: prompts a rollout, answers to each, answers an update and a forward pass, updates a
    rollout's epoch, and all updates."""

    prompts: int
    answers: int
    minibatch: int
    micro: int
    an_epoch: int
    updates: int

    @classmethod
    def of(cls, source: Source) -> Rollouts:
        """A minibatch that does not divide the rollout becomes the next smaller one that does."""
        config = source.config
        minibatch = largest_divisor(config.batch, config.minibatch)
        micro = largest_divisor(minibatch, config.micro_batch or minibatch)
        each = config.answers_per_prompt
        an_epoch = config.batch // minibatch
        updates = an_epoch * config.epochs * config.iterations
        return cls(config.batch // each, each, minibatch, micro, an_epoch, updates)

    def passes(self, source: Source, rollouts: int) -> int:
        """Whole passes over the prompts that reach so many rollouts."""
        return max(math.ceil(rollouts * self.prompts / len(source.train)), 1)


def length_of(source: Source) -> float:
    """Tokens of a usual answer: as the run measured them, or half of what is allowed."""
    return source.answer_length or source.config.max_new_tokens / 2


def target_a_token(source: Source) -> float:
    """Our controllers' target is nats a sequence, elsewhere it is nats a token."""
    return source.config.kl_target / length_of(source)


def controlled(source: Source) -> bool:
    """Whether the price of the KL adapts."""
    return source.config.kl_controller != "fixed" and source.config.kl_coef > 0
