"""Where the scores of PPO's answers come from: a reward model, a Python function, or the world."""

from __future__ import annotations

import importlib
import math
import os
import sys
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from rlhf_course.errors import ConfigError, TrainingError
from rlhf_course.reward_model import ScalarModel

RewardFunction = Callable[[list[str], list[str], list[dict]], Sequence[float]]


def load_reward_function(name: str) -> RewardFunction:
    """The function behind "module:function"; the current folder is searched too.

    Raises ConfigError when the name has another form, or module or function are not there.
    """
    module_name, colon, function_name = name.partition(":")
    if not colon or not function_name:
        raise ConfigError(f"--reward {name!r}: give module:function, such as my_rewards:valid_sql.")
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        function = getattr(importlib.import_module(module_name), function_name)
    except ImportError as error:
        raise ConfigError(
            f"--reward {name!r}: cannot import {module_name!r} ({error}). "
            "Run from the folder that holds it, or install it."
        ) from error
    except AttributeError:
        raise ConfigError(
            f"--reward {name!r}: module {module_name!r} has no {function_name!r}."
        ) from None
    return function


def call_reward_function(
    function: RewardFunction, prompts: list[str], responses: list[str], rows: list[dict]
) -> Tensor:
    """Its scores, (B,) float32, checked.

    Raises TrainingError when the function raises, returns another number of scores than answers,
    or something that is not a finite number; names the first answer concerned.
    """
    try:
        scores = list(function(prompts, responses, rows))
    except Exception as error:
        raise TrainingError(
            f"the reward function raised {type(error).__name__}: {error}. It got {len(prompts)} "
            f"prompts; the first is {prompts[0]!r} with answer {responses[0]!r}. "
            "Mend it and start the same command again: the run goes on from its last checkpoint."
        ) from error
    if len(scores) != len(prompts):
        raise TrainingError(
            f"the reward function returned {len(scores)} scores for {len(prompts)} answers. "
            "It must return one number for each, in their order."
        )
    for prompt, response, score in zip(prompts, responses, scores, strict=True):
        try:
            finite = math.isfinite(score)
        except TypeError:
            finite = False
        if not finite:
            raise TrainingError(
                f"the reward function returned {score!r}, which is not a finite number, for the "
                f"answer {response!r} to {prompt!r}."
            )
    return torch.tensor([float(s) for s in scores])


@torch.no_grad()
def model_scores(
    model: ScalarModel, tokens: Tensor, prompt_lengths: Tensor, response_lengths: Tensor
) -> Tensor:
    """The reward model's scores, (B,) float32; TrainingError when one is not finite."""
    scores = model.rewards(tokens, prompt_lengths, response_lengths)
    if not bool(torch.isfinite(scores).all()):
        raise TrainingError(
            "the reward model gives NaN or infinite scores, so nothing was updated. "
            "Train it again with a lower learning rate, or name another one with --reward-model."
        )
    return scores
