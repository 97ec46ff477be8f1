"""Where the scores of PPO's answers come from: a reward model, a Python function, or a server."""

from __future__ import annotations

import importlib
import math
import os
import sys
import traceback
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from rlhf_course.errors import ConfigError, TrainingError
from rlhf_course.reward_model import ScalarModel
from rlhf_course.stages.remote_reward import RemoteReward, short

RewardFunction = Callable[[list[str], list[str], list[dict]], Sequence[float]]


def load_reward_function(name: str, timeout: float = 60, retries: int = 3) -> RewardFunction:
    """The function behind "module:function", also of the current folder, or a server's, by its URL.

    timeout (seconds) and retries: of requests to a server. Raises ConfigError when the name has
    another form, the module cannot be imported, or the function is not there.
    """
    if name.startswith(("http://", "https://")):
        return RemoteReward(name, timeout, retries)
    module_name, _, function_name = name.partition(":")
    if not (module_name and function_name) or module_name.startswith("."):
        raise ConfigError(
            f"--reward {name!r}: give module:function, such as my_rewards:valid_sql, "
            "or http://host:port/path."
        )
    if os.getcwd() not in sys.path:
        sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except Exception as error:  # whatever a user's module may do when it is imported
        raise ConfigError(
            f"--reward {name!r}: cannot import {module_name!r} ({_told(error)}). Run from the "
            "folder that holds it, or install it; if it is found but broken, mend it."
        ) from error
    function = getattr(module, function_name, None)
    if not callable(function):
        what = "no" if function is None else "something that is not a function called"
        raise ConfigError(f"--reward {name!r}: module {module_name!r} has {what} {function_name}.")
    return function


def _told(error: Exception) -> str:
    """The error and where it was raised: 'ValueError: no such table (my_rewards.py, line 12)'."""
    text = f"{type(error).__name__}: {error}"
    if isinstance(error, SyntaxError):  # names the place itself
        return text
    frames = traceback.extract_tb(error.__traceback__)
    own = [f for f in frames if "importlib" not in f.filename and f.filename != __file__]
    return f"{text} ({Path(own[-1].filename).name}, line {own[-1].lineno})" if own else text


def call_reward_function(
    function: RewardFunction, prompts: list[str], responses: list[str], rows: list[dict]
) -> Tensor:
    """Its scores, (B,) float32, checked.

    Raises TrainingError when the function raises, returns another number of scores than answers,
    or something that is not a finite number; names the first answer concerned.
    """
    try:
        returned = function(prompts, responses, rows)
        plain = isinstance(returned, str | bytes | dict) or not isinstance(returned, Iterable)
        scores = None if plain else list(returned)
    except TrainingError:  # a server's, which says it all
        raise
    except Exception as error:  # whatever a user's function may raise
        raise TrainingError(
            f"the reward function raised {_told(error)}. It got {len(prompts)} prompts; the first "
            f"is {short(prompts[0])} with the answer {short(responses[0])}. "
            "Mend it and start the same command again: the run goes on from its last checkpoint."
        ) from error
    if scores is None:
        raise TrainingError(
            f"the reward function returned {short(returned)}, a {type(returned).__name__}. "
            "It must return a list of numbers, one for each answer, in their order."
        )
    if len(scores) != len(prompts):
        raise TrainingError(
            f"the reward function returned {len(scores)} scores for {len(prompts)} answers. "
            "It must return one number for each, in their order."
        )
    out = torch.tensor([_number(score) for score in scores], dtype=torch.float32)
    for prompt, response, score, number in zip(prompts, responses, scores, out, strict=True):
        if not torch.isfinite(number):
            raise TrainingError(
                f"the reward function returned {short(score)}, which is not a finite number "
                f"(float32), for the answer {short(response)} to {short(prompt)}. Mend it and "
                "start the same command again: the run goes on from its last checkpoint."
            )
    return out


def _number(score: object) -> float:
    """The score as a float; NaN for what is none, a text that looks like a number included."""
    try:
        return math.nan if isinstance(score, str | bytes) else float(score)
    except (TypeError, ValueError, OverflowError, RuntimeError):  # the last: a tensor of several
        return math.nan


@torch.no_grad()
def model_scores(
    model: ScalarModel, tokens: Tensor, prompt_lengths: Tensor, response_lengths: Tensor
) -> Tensor:
    """The reward model's scores, (B,) float32; TrainingError when one is not finite."""
    scores = model.rewards(tokens, prompt_lengths, response_lengths)
    if not bool(torch.isfinite(scores).all()):
        raise TrainingError(
            "the reward model gives NaN or infinite scores, so nothing was updated and the last "
            "checkpoint stands. Train it again with a lower learning rate, or name another one "
            "with --reward-model."
        )
    return scores
