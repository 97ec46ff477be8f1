"""The exercises: which functions students write, in which chapter, and what they are worth.

An exercise's name is its module and qualified name below `rlhf_course`, as students import it:
"gpt.sample_token", "ppo.AdaptiveKLController.update", "distributed.placement.place". A module's
name begins small, a class's does not. Its text, its signature and its solution are the package's
own source; its hints stand in the manuscript.
"""

from __future__ import annotations

from dataclasses import dataclass
from importlib import import_module

from rlhf_course.errors import ConfigError

STEMS = (
    "tour", "gpt", "sft", "reward_model", "mdp", "ppo", "ppo_ptx", "why_rlhf", "beyond_ppo",
    "distributed",
)  # fmt: skip
"""The chapters in their order: chapter 3 is `chapters/03_reward_model.ipynb`."""


@dataclass(frozen=True)
class Exercise:
    """One function or method that a student writes."""

    id: str
    """Module and qualified name below `rlhf_course`."""
    chapter: int
    difficulty: int
    """1: a line that follows from the formula; 5: several ideas have to work together."""
    importance: int
    """1: nice to know; 5: the rest of the course stands on it."""
    minutes: int
    """What a student who follows the chapter needs."""
    points: int
    """What a full solution is worth."""

    @property
    def module(self) -> str:
        """The module below `rlhf_course` that students import it from."""
        *parts, _ = self.id.split(".")
        return ".".join(part for part in parts if not part[0].isupper())

    @property
    def qualname(self) -> str:
        """Its name in the module: "whiten", "Block.forward"."""
        return self.id.removeprefix(f"{self.module}.")

    @property
    def file(self) -> str:
        """The module's name in those of its tests, drivers and mutants: "distributed_placement"."""
        return self.module.replace(".", "_")

    @property
    def name(self) -> str:
        """What a student defines and hands to `check`: the function, or the method's class."""
        return self.qualname.partition(".")[0]

    @property
    def method(self) -> str | None:
        """The method's name, where the exercise is one."""
        return self.qualname.partition(".")[2] or None

    @property
    def stem(self) -> str:
        """The chapter's stem: "reward_model"."""
        return STEMS[self.chapter]

    def reference(self):
        """The package's own function, or the method's class."""
        return getattr(import_module(f"rlhf_course.{self.module}"), self.name)


EXERCISES = tuple(
    Exercise(*row)
    for row in [
        #  id                                        chapter  difficulty  importance  min  points
        ("gpt.causal_attention",                     1, 3, 5, 20, 4),
        ("gpt.Block.forward",                        1, 2, 4, 10, 2),
        ("gpt.next_token_loss",                      1, 2, 5, 10, 3),
        ("gpt.sample_token",                         1, 3, 4, 25, 4),
        ("gpt.generate",                             1, 4, 4, 30, 5),
        ("sft.mask_prompt",                          2, 2, 5, 10, 3),
        ("sft.sft_loss",                             2, 2, 5, 15, 3),
        ("sft.pack",                                 2, 4, 3, 25, 4),
        ("reward_model.pairwise_loss",               3, 1, 5, 10, 3),
        ("reward_model.kwise_loss",                  3, 4, 4, 25, 5),
        ("reward_model.last_token_reward",           3, 2, 5, 10, 2),
        ("reward_model.mean_reward",                 3, 2, 3, 10, 2),
        ("reward_model.normalize_rewards",           3, 2, 4, 10, 2),
        ("mdp.action_mask",                          4, 2, 5, 10, 3),
        ("mdp.token_logprobs",                       4, 2, 5, 10, 3),
        ("mdp.kl_estimate",                          4, 2, 4, 15, 3),
        ("mdp.token_rewards",                        4, 3, 5, 15, 3),
        ("mdp.gae",                                  4, 4, 5, 30, 6),
        ("mdp.sequence_advantages",                  4, 2, 3, 10, 2),
        ("ppo.policy_loss",                          5, 4, 5, 30, 6),
        ("ppo.whiten",                               5, 2, 4, 15, 3),
        ("ppo.value_loss",                           5, 3, 4, 15, 3),
        ("ppo.AdaptiveKLController.update",          5, 2, 4, 10, 2),
        ("ppo.ppo_step",                             5, 4, 5, 25, 5),
        ("ppo_ptx.ptx_loss",                         6, 2, 5, 15, 3),
        ("ppo_ptx.RunningMoments.update",            6, 4, 3, 25, 4),
        ("ppo_ptx.PopArt.update",                    6, 4, 3, 25, 4),
        ("ppo_ptx.masked_moments",                   6, 4, 4, 25, 5),
        ("evaluation.win_rate",                      7, 1, 4, 10, 2),
        ("evaluation.expected_calibration_error",    7, 2, 3, 15, 2),
        ("evaluation.best_of_n",                     7, 4, 4, 30, 5),
        ("beyond_ppo.dpo_loss",                      8, 3, 5, 20, 4),
        ("beyond_ppo.rloo_advantages",               8, 2, 4, 10, 2),
        ("beyond_ppo.grpo_advantages",               8, 2, 4, 10, 2),
        ("beyond_ppo.reinforce_plus_plus_advantages", 8, 3, 3, 15, 3),
        ("planning.memory.zero_bytes",               9, 2, 4, 15, 3),
        ("distributed.weight_sync.gather_zero3_parameters", 9, 2, 5, 15, 3),
        ("distributed.placement.place",              9, 4, 3, 30, 4),
        ("distributed.placement.balanced_chunks",    9, 3, 4, 20, 4),
        ("distributed.weight_sync.sync_weights",     9, 2, 5, 15, 3),
        ("distributed.pipeline.pipeline_step",       9, 3, 4, 20, 4),
    ]
)  # fmt: skip


def find(id_or_name: str) -> Exercise:
    """The exercise of this id, or of this name. Raises ConfigError listing those there are."""
    for exercise in EXERCISES:
        if id_or_name in (exercise.id, exercise.name):
            return exercise
    names = ", ".join(exercise.name for exercise in EXERCISES)
    raise ConfigError(f"{id_or_name!r} is not an exercise of this course. There are: {names}.")
