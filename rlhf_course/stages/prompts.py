"""What PPO asks: an embedded world's prompts, or a data set's; and what a world says of answers."""

from __future__ import annotations

from collections import Counter

from rlhf_course.data import read_prompts, split_rows
from rlhf_course.errors import DataError
from rlhf_course.sft import encode_prompt
from rlhf_course.stages.rollouts import Answers, Task
from rlhf_course.stages.settings import PPOConfig
from rlhf_course.stages.setup import world_for
from rlhf_course.training import derive_seed, epoch_batch


def world_tasks(tokenizer, prompts) -> list[Task]:
    """A world's prompts as tasks."""
    return [Task(p.text, encode_prompt(tokenizer, p.text), source=p) for p in prompts]


def grouped(tasks: list[Task], size: int) -> list[Task]:
    """Every task `size` times, side by side."""
    return [task for task in tasks for _ in range(size)]


def judged(world, answers: Answers) -> dict[str, float]:
    """The world's own utility of the answers, which no learner sees, and the share of each kind."""
    said = list(zip(answers.tasks, answers.texts, answers.finished.tolist(), strict=True))
    gold = [world.utility(task.source, text, end) for task, text, end in said]
    kinds = Counter(world.verdict(task.source, text, end) for task, text, end in said)
    shares = {f"share_{kind}": kinds[kind] / len(said) for kind in sorted(world.verdicts)}
    return {"gold": sum(gold) / len(gold), **shares}


class Prompts:
    """The tasks of iteration i: from the world, fresh each time, or from a data set, shuffled.

    The answers to one prompt (`answers_per_prompt`) are tasks that stand side by side.
    """

    def __init__(self, config: PPOConfig, tokenizer, context: int):
        self.config, self.tokenizer = config, tokenizer
        self.world = None if config.data else world_for(config)
        self.pool: list[Task] = []
        self.held: list[Task] = []
        if config.data:
            tasks = self.encode(context)
            self.held, self.pool = split_rows(tasks, config.validation, config.seed)

    def encode(self, context: int) -> list[Task]:
        """Every prompt of the data set. Raises DataError when one leaves no room for an answer."""
        rows, room = read_prompts(self.config.data), context - self.config.max_new_tokens
        tasks = [Task(text, encode_prompt(self.tokenizer, text), row) for text, row in rows]
        sizes = [len(task.tokens) for task in tasks]
        if max(sizes) > room:
            raise DataError(
                f"{self.config.data}: {sum(s > room for s in sizes)} of {len(sizes)} prompts are "
                f"too long; the longest, number {sizes.index(max(sizes)) + 1}, has {max(sizes)} "
                f"tokens and with --max-new-tokens {self.config.max_new_tokens} exceeds the "
                f"context of {context}. Lower --max-new-tokens, or drop the long prompts."
            )
        return tasks

    def rows(self) -> dict[str, int]:
        """How many prompts the data set gave; a world makes new ones for every iteration."""
        if self.world is not None:
            return {"answers": self.config.iterations * self.config.batch}
        return {"prompts": len(self.pool), "held out": len(self.held)}

    def __call__(self, iteration: int) -> list[Task]:
        config = self.config
        count = config.batch // config.answers_per_prompt
        if self.world is None:
            size = min(count, len(self.pool))
            picked = epoch_batch(len(self.pool), size, iteration, config.seed, "ppo prompts")
            return grouped([self.pool[i] for i in picked], config.answers_per_prompt)
        seed = derive_seed(config.seed, "ppo prompts", iteration)
        extra = {} if config.known_share is None else {"known_share": config.known_share}
        prompts = self.world.prompts("ppo", count, seed, **extra)
        tasks = world_tasks(self.tokenizer, prompts)
        return grouped(tasks, config.answers_per_prompt)
