"""One rollout of PPO: prompts, answers, scores, log-probs, values, and the advantages of it all."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_course import mdp
from rlhf_course.beyond_ppo import (
    grpo_advantages,
    reinforce_plus_plus_advantages,
    rloo_advantages,
)
from rlhf_course.decoding import decode, pays
from rlhf_course.device import casts_kept
from rlhf_course.errors import TrainingError
from rlhf_course.padding import like_lengths, pad_rows, padded_length
from rlhf_course.ppo import whiten
from rlhf_course.ppo_ptx import PopArt, RunningMoments
from rlhf_course.rollout import Rollout, action_logprobs, action_values
from rlhf_course.sampling import Generation, generate, sample_token
from rlhf_course.stages.settings import PPOConfig


@dataclass
class Task:
    """A prompt as PPO uses it."""

    text: str
    tokens: list[int]
    row: dict = field(default_factory=dict)
    """The data set's own columns, for a reward function."""
    source: object = None
    """The world's Prompt, where there is one."""


@dataclass
class Answers:
    """Sampled answers as tensors: tokens (B, T), lengths (B,), finished (B,), texts."""

    tasks: list[Task]
    tokens: Tensor
    prompt_lengths: Tensor
    response_lengths: Tensor
    finished: Tensor
    texts: list[str]
    logprobs: Tensor | None = None
    """(B, T-1): of the engine that sampled them, where that is another than the trainer."""

    @property
    def mask(self) -> Tensor:
        """(B, T-1) bool: the actions."""
        return mdp.action_mask(self.prompt_lengths, self.response_lengths, self.tokens.shape[1])


def decode_answers(tokenizer, out: Generation) -> list[str]:
    """The answers' texts without the EOS that ends them. Other special tokens are kept: a policy
    that writes <|user|> should be seen to."""
    ids = [r[:-1] if end else r for r, end in zip(out.responses, out.finished, strict=True)]
    return [text.strip() for text in tokenizer.batch_decode(ids)]


def as_tensors(
    tasks: list[Task], out: Generation, tokenizer, device, context: int | None = None
) -> Answers:
    """Prompts and answers side by side, right-padded; lengths say what is real."""
    rows = [task.tokens + response for task, response in zip(tasks, out.responses, strict=True)]
    tokens = pad_rows(rows, limit=context).to(device)
    return Answers(
        tasks, tokens,
        torch.tensor([len(t.tokens) for t in tasks], device=device),
        torch.tensor([len(r) for r in out.responses], device=device),
        torch.tensor(out.finished, device=device),
        decode_answers(tokenizer, out),
    )  # fmt: skip


def engine_answers(
    tasks: list[Task], said: Mapping[str, list], tokenizer, device, context: int
) -> Answers:
    """What another engine sampled, as tensors, its log-probs beside it. said: its `responses`,
    `logprobs` and `finished`, a row for each task."""
    out = Generation(said["responses"], said["logprobs"], said["finished"])
    answers = as_tensors(tasks, out, tokenizer, device, context)
    logprobs = torch.tensor([x for row in out.logprobs for x in row], device=device)
    zeros = torch.zeros(answers.mask.shape, device=device)
    answers.logprobs = zeros.masked_scatter(answers.mask, logprobs)
    return answers


def engine_correction(
    rollout: Rollout, answers: Answers, method: str, low: float = 0.5, high: float = 5.0
) -> tuple[Tensor, dict[str, float]]:
    """(weights (B, T-1) for the difference between such an engine's probabilities and the
    trainer's, diagnostics of how large it was); see `mdp.importance_weights`."""
    weights, stats = mdp.importance_weights(
        rollout.logprobs, answers.logprobs, rollout.mask, method, low, high
    )
    gap = (rollout.logprobs - answers.logprobs)[rollout.mask].abs().max()
    return weights, {
        "rollout_logprob_gap": gap.item(), "rollout_kl": stats["rollout_kl"].item(),
        "rollout_outside": stats["outside"].item(),
    }  # fmt: skip


def _sampler(policy: nn.Module, config) -> Callable[..., Generation]:
    """`decode` where it is faster than `generate`; and always `generate` where a student has
    written it, or the draw that it makes."""
    own = {generate.__module__, sample_token.__module__} != {"rlhf_course.sampling"}
    if own or not pays(policy):
        return generate
    return partial(decode, record=getattr(config, "cuda_graphs", False))


def collect(
    policy: nn.Module,
    tasks: list[Task],
    tokenizer,
    config: PPOConfig,
    generator: torch.Generator,
    context: int,
) -> Answers:
    """Sample one answer to each task; `context` is the shortest of all models that will read them.

    Raises TrainingError when the policy's logits are NaN.
    """
    try:
        with torch.no_grad(), casts_kept(policy):
            out = _sampler(policy, config)(
                policy, [t.tokens for t in tasks], config.max_new_tokens, tokenizer.eos_token_id,
                config.temperature, generator=generator,
                batch_size=getattr(config, "generation_batch", None),
            )  # fmt: skip
    except RuntimeError as error:
        if "probability tensor" not in str(error):  # what torch.multinomial says of NaN
            raise
        raise TrainingError(
            "the policy's logits are NaN or infinite, so no answer could be sampled. The last "
            "checkpoint stands: lower the learning rate (--lr), and look at the metrics before it."
        ) from error
    device = next(policy.parameters()).device
    return as_tensors(tasks, out, tokenizer, device, context)


def in_parts(function, size: int, *tensors: Tensor) -> list[Tensor]:
    """Apply `function` to slices of `size` rows and join what it returns."""
    parts = [function(*(t[i : i + size] for t in tensors)) for i in range(0, len(tensors[0]), size)]
    return [torch.cat(columns) for columns in zip(*parts, strict=True)]


def by_length(function, size: int | None, answers: Answers) -> list[Tensor]:
    """The same for function(tokens (b, t), mask (b, t-1)) -> columns of (b, t-1), with answers of
    like length in a part (see `like_lengths`): its pads are cut off before, and filled up with 0
    after."""
    lengths, T = answers.prompt_lengths + answers.response_lengths, answers.tokens.shape[1]
    parts, order = [], []
    for rows in like_lengths(lengths.tolist(), size, answers.tokens.device, T):
        t = padded_length(int(lengths[rows].max()), T)
        columns = function(answers.tokens[rows, :t], answers.mask[rows, : t - 1])
        parts.append([F.pad(column, (0, T - t)) for column in columns])
        order += rows
    back = torch.tensor(order, device=answers.tokens.device).argsort()
    return [torch.cat(columns)[back] for columns in zip(*parts, strict=True)]


def rows_at_once(config: PPOConfig, device: torch.device) -> int | None:
    """How many answers are read at a time where nothing is learned."""
    return config.micro_batch or (None if device.type == "cpu" else config.minibatch)


@torch.no_grad()
def score_actions(
    policy: nn.Module,
    reference: nn.Module,
    critic: nn.Module | None,
    answers: Answers,
    config: PPOConfig,
    popart: PopArt | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(logprobs, reference logprobs, values), (B, T-1) each, 0 outside the actions; without a
    critic all values are 0."""

    def read(tokens: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        logprobs, _ = action_logprobs(policy, tokens, mask, config.temperature)
        ref_logprobs, _ = action_logprobs(reference, tokens, mask, config.temperature)
        if critic is None:
            return logprobs, ref_logprobs, torch.zeros_like(logprobs)
        return logprobs, ref_logprobs, action_values(critic, tokens, mask)

    size = rows_at_once(config, answers.tokens.device)
    with casts_kept(policy):
        logprobs, ref_logprobs, values = by_length(read, size, answers)
    if popart is not None:
        values = torch.where(answers.mask, popart.denormalize(values), 0.0)
    return logprobs, ref_logprobs, values


def shape_scores(
    scores: Tensor, finished: Tensor, config: PPOConfig, moments: RunningMoments | None
) -> Tensor:
    """The score that enters the return: normalised, clipped, then the penalty for a missing EOS,
    which a clip afterwards could swallow."""
    if moments is not None:
        moments.update(scores)
        scores = moments.normalize(scores)
    if config.reward_clip is not None:
        scores = scores.clamp(-config.reward_clip, config.reward_clip)
    return mdp.score_with_eos(scores, finished, config.eos_penalty, config.eos_override)


def assemble(
    answers: Answers,
    scores: Tensor,
    logprobs: Tensor,
    ref_logprobs: Tensor,
    values: Tensor,
    kl_coef: float,
    config: PPOConfig,
) -> tuple[Rollout, Tensor]:
    """The rollout ready for updates, and the KL of each answer, (B,) nats (k1 summed).

    scores: (B,), as `shape_scores` returns them.
    """
    mask = answers.mask
    kl = mdp.kl_estimate(logprobs, ref_logprobs, "k1") * mask  # (B, T-1)
    if config.advantages != "gae":
        advantages = critic_free_advantages(scores, kl, mask, kl_coef, config)
        nothing = torch.zeros_like(values), torch.zeros_like(mask)
        rollout = Rollout(
            answers.tokens, mask, logprobs, advantages, values, *nothing, ref_logprobs
        )
        return rollout, kl.sum(dim=1)
    value_mask = mask
    if config.mdp == "token":
        rewards = mdp.token_rewards(scores, kl, mask, kl_coef)
        advantages, returns = mdp.gae(rewards, values, mask, config.gamma, config.lam)
    else:
        first = mask.int().argmax(dim=1, keepdim=True)  # (B, 1): there stands V(prompt)
        baseline = values.gather(1, first)[:, 0]  # (B,)
        advantages, totals = mdp.sequence_advantages(scores, kl, baseline, mask, kl_coef)
        returns = totals[:, None] * mask  # (B, T-1), read at the first action only
        value_mask = torch.zeros_like(mask).scatter_(1, first, True)
    if config.whiten:
        advantages = whiten(advantages, mask)
    rollout = Rollout(answers.tokens, mask, logprobs, advantages, values, returns, value_mask)
    return rollout, kl.sum(dim=1)


def critic_free_advantages(
    scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, config: PPOConfig
) -> Tensor:
    """(B, T-1), by the setting `advantages`; the answers to one prompt stand side by side.

    RLOO and REINFORCE++ pay for the KL in the reward, as their papers do; GRPO's price is a term of
    the loss (`PPOSettings.kl_loss_coef`), so its advantages come from the scores alone.
    """
    if config.advantages == "reinforce_plus_plus":
        return reinforce_plus_plus_advantages(scores, kl, mask, kl_coef)
    if config.advantages == "rloo":
        rewards = (scores - kl_coef * kl.sum(dim=1)).view(-1, config.answers_per_prompt)  # (N, G)
        advantages = rloo_advantages(rewards)
    else:
        advantages = grpo_advantages(scores.view(-1, config.answers_per_prompt))
    return torch.where(mask, advantages.flatten()[:, None], 0.0)
