"""Chapter 03: the reward model, a language model that has learned which answer people prefer.

The backbone is a copy of the SFT model; in place of the output matrix stands one vector, which
turns every position's hidden state into a number. An answer's reward is the number at its last
token, EOS included, or the mean or the sum over its tokens:

    tokens         x0   x1   x2   x3   x4   pad       prompt P = 2, response R = 3
    token_scores   s0   s1   s2   s3   s4    -        last: s4, mean: (s2 + s3 + s4) / 3

It is trained on comparisons alone, so rewards mean something only in their differences; a constant
added to all of them changes nothing. `normalize_rewards` fixes the constant afterwards. PPO's
critic is a `ScalarModel` too, read at every token. Tested by `pytest tests/test_reward_model.py`.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable
from typing import Literal, get_args

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from rlhf_course import checkpoints
from rlhf_course.adapters import LoRA
from rlhf_course.errors import ConfigError
from rlhf_course.gpt import GPT
from rlhf_course.huggingface import HuggingFaceLM
from rlhf_course.mdp import masked_mean, masked_sum, sequence_mask
from rlhf_course.pretrained_model import PLAIN, WeightFormat
from rlhf_course.sequence_classifier import (
    read_classifier,
    write_classifier,
    write_reward_adapter,
)

Pooling = Literal["last", "mean", "sum"]
Method = Literal["bias", "gain_bias"]


# ----------------------------------------------------------------- from token scores to one reward


def last_token_reward(token_scores: Tensor, lengths: Tensor) -> Tensor:
    """The score at each row's last token: there the model has read the whole answer, EOS too.

    token_scores (B, T) float, right-padded; lengths (B,) int, prompt and response together -> (B,).
    Pads may hold anything, NaN included. Raises ValueError where a length is not in 1 … T.
    """
    if ((lengths < 1) | (lengths > token_scores.shape[1])).any():
        raise ValueError(f"lengths must be in 1 … {token_scores.shape[1]}: {lengths.tolist()}")
    # BEGIN SOLUTION
    return token_scores.gather(1, lengths[:, None] - 1)[:, 0]  # (B,)
    # END SOLUTION


def mean_reward(token_scores: Tensor, prompt_lengths: Tensor, response_lengths: Tensor) -> Tensor:
    """The mean score of the response's tokens, P … P+R-1; prompt and pads do not count, even NaN.

    token_scores (B, T) float; prompt_lengths, response_lengths (B,) int -> (B,).
    Raises ValueError where a response is empty or does not fit.
    """
    response = _response_mask(token_scores, prompt_lengths, response_lengths)
    # BEGIN SOLUTION
    return masked_mean(token_scores, response, dim=1)  # (B,)
    # END SOLUTION


def sum_reward(token_scores: Tensor, prompt_lengths: Tensor, response_lengths: Tensor) -> Tensor:
    """The sum of the response's scores. It counts faults that a mean dilutes, and can learn to pay
    for length alone. Arguments as in `mean_reward`."""
    response = _response_mask(token_scores, prompt_lengths, response_lengths)
    return masked_sum(token_scores, response, dim=1)  # (B,)


def _response_mask(token_scores: Tensor, prompt_lengths: Tensor, response_lengths: Tensor):
    """(B, T) bool, True on the tokens of the response."""
    length, end = token_scores.shape[1], prompt_lengths + response_lengths
    if (response_lengths < 1).any():
        raise ValueError("empty answer: a response needs at least one token to be rewarded")
    if (end > length).any():
        raise ValueError(f"prompt + response is longer than the row of {length} tokens")
    return sequence_mask(end, length) & ~sequence_mask(prompt_lengths, length)  # (B, T)


# ------------------------------------------------------------------------------------------ losses


def pairwise_loss(
    chosen: Tensor,
    rejected: Tensor,
    margin: float | Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """-log σ(chosen - rejected - margin), averaged over pairs: 0-dim.

    The negative log-likelihood of the labels under Bradley and Terry's model, in which the better
    answer is preferred with probability σ(difference) (Ouyang et al. 2022, Eq. 1 for K = 2).
    chosen, rejected (N,) float: rewards of the two answers. margin, a number or (N,): how far
    apart they should be (Touvron et al. 2023, Eq. 2), for labels that say how much better.
    `denominator` is the number of pairs of the whole optimizer step; None is N (0 / 0 is 0).
    """
    if chosen.shape != rejected.shape or chosen.dim() != 1:
        raise ValueError(
            f"not (N,): chosen {tuple(chosen.shape)}, rejected {tuple(rejected.shape)}"
        )
    if isinstance(margin, Tensor) and margin.shape not in ((), chosen.shape):
        raise ValueError(f"margin {tuple(margin.shape)} for {len(chosen)} pairs")  # no broadcasting
    # BEGIN SOLUTION
    difference = chosen - rejected
    if margin is not None:
        difference = difference - margin
    total = -F.logsigmoid(difference).sum()  # log(sigmoid(x)) would be -inf from x = -104 on
    return total / (max(len(chosen), 1) if denominator is None else denominator)
    # END SOLUTION


def kwise_loss(
    scores: Tensor,
    ranks: Tensor,
    mask: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """All pairs of K ranked answers to one prompt as ONE batch element: 0-dim.

    The mean of -log σ(s_i - s_j) over the prompt's pairs with rank_i < rank_j, then the mean over
    prompts (Ouyang et al. 2022, Eq. 1 and §3.5). Each answer is read once, not K - 1 times, and
    because its pairs share one gradient step the model does not overfit to them. Ties say nothing
    and are left out; so is a prompt without any pair.
    scores (B, K) float; ranks (B, K), lower is better; mask (B, K) bool, False where a prompt has
    fewer than K answers (anything may stand there, NaN too). `denominator` is the number of prompts
    with a pair of the whole optimizer step; None is this batch's own (0 / 0 is 0).
    """
    if scores.dim() != 2 or scores.shape != ranks.shape:
        raise ValueError(f"scores {tuple(scores.shape)}, ranks {tuple(ranks.shape)}: not (B, K)")
    # BEGIN SOLUTION
    pairs = ranks[:, :, None] < ranks[:, None, :]  # (B, K, K): i is better than j
    if mask is not None:
        pairs = pairs & mask[:, :, None] & mask[:, None, :]
    difference = scores[:, :, None] - scores[:, None, :]  # (B, K, K)
    losses = -F.logsigmoid(torch.where(pairs, difference, 0.0))
    of_prompt = masked_mean(losses.flatten(1), pairs.flatten(1), dim=1)  # (B,): 0 without a pair
    if denominator is None:
        denominator = pairs.flatten(1).any(dim=1).sum().clamp(min=1)
    return of_prompt.sum() / denominator
    # END SOLUTION


# ----------------------------------------------------------------------------------- normalisation


def normalize_rewards(rewards: Tensor, method: Method = "bias") -> tuple[float, float]:
    """(gain, bias) that bring these rewards to a known place: gain * r + bias.

    "bias": mean 0, gain 1, measured on demonstrations (Stiennon et al. 2020; Ouyang et al. 2022).
    "gain_bias": mean 0 and standard deviation 1 (the population's), measured on answers of the
    reference policy (Ziegler et al. 2019), so that a KL coefficient means the same under any model.
    rewards (N,) float. Raises ValueError where one is not finite or they do not vary as needed.
    """
    if rewards.numel() == 0 or not torch.isfinite(rewards).all():
        raise ValueError("rewards must be finite, and at least one")
    if method not in get_args(Method):
        raise ConfigError(f"normalisation {method!r}: it must be one of {get_args(Method)}.")
    # BEGIN SOLUTION
    rewards = rewards.detach().cpu().double()
    mean = rewards.mean().item()
    if method == "bias":
        return 1.0, -mean
    std = rewards.std(correction=0).item()
    if std == 0:
        raise ValueError("the rewards are all equal, so no gain can bring their deviation to 1")
    return 1 / std, -mean / std
    # END SOLUTION


# ------------------------------------------------------------------------------------------- model


class ScalarModel(nn.Module):
    """A backbone and one number for every position: a reward model, or a critic.

    backbone: GPT or HuggingFaceLM. The buffers `gain` and `bias`, filled from `normalize_rewards`,
    are applied to the pooled reward and not to `token_scores`.
    """

    def __init__(self, backbone: nn.Module, pooling: Pooling = "last"):
        super().__init__()
        if pooling not in get_args(Pooling):
            raise ConfigError(f"pooling {pooling!r}: it must be one of {get_args(Pooling)}.")
        self.backbone, self.pooling = backbone, pooling
        self.head = nn.Linear(backbone.width, 1)
        self.register_buffer("gain", torch.ones(()))
        self.register_buffer("bias", torch.zeros(()))

    @classmethod
    def from_language_model(
        cls, language_model: GPT | HuggingFaceLM, pooling: Pooling = "last", seed: int = 0
    ) -> ScalarModel:
        """A copy of the language model's backbone under a new head; a function of the seed.

        The head is drawn with variance 1 / (D + 1) (Stiennon et al. 2020, App. B.1): behind the
        final norm a hidden state has length √D, so scores begin near unit variance. Its bias is 0.
        """
        if isinstance(language_model, HuggingFaceLM):  # without the output matrix
            backbone = HuggingFaceLM(copy.deepcopy(language_model.backbone))
            backbone.compute_dtype = language_model.compute_dtype
        else:
            backbone = copy.deepcopy(language_model)
        for parameter in backbone.parameters():
            parameter.requires_grad_(parameter.is_floating_point())  # not what was rounded to bits
        model = cls(backbone, pooling)
        generator = torch.Generator().manual_seed(seed)
        nn.init.normal_(model.head.weight, std=(backbone.width + 1) ** -0.5, generator=generator)
        nn.init.zeros_(model.head.bias)
        return model.to(next(language_model.parameters()).device)

    def token_scores(
        self,
        tokens: Tensor,
        attend: Tensor | None = None,
        positions: Tensor | None = None,
        asked: Tensor | None = None,
    ) -> Tensor:
        """tokens (B, T) long, right-padded -> (B, T) float32: what the head says at each position,
        having read the tokens up to there. What stands on pads means nothing. attend, positions:
        see `GPT.hidden_states`. asked (B, T) bool: only there, and 0 elsewhere."""
        places = None if asked is None else asked.flatten().nonzero()[:, 0]  # (N,)
        hidden = self.backbone.hidden_states(tokens, attend, positions, places=places)
        hidden = hidden.to(torch.promote_types(hidden.dtype, torch.float32))  # float64 stays
        weight, bias = self.head.weight.to(hidden.dtype), self.head.bias.to(hidden.dtype)
        scores = F.linear(hidden, weight, bias)[..., 0]  # (B, T) or (N,)
        return (
            scores if asked is None else scores.new_zeros(asked.shape).masked_scatter(asked, scores)
        )

    def rewards(self, tokens: Tensor, prompt_lengths: Tensor, response_lengths: Tensor) -> Tensor:
        """The normalised reward of each answer, (B,): gain * pooled token scores + bias.

        tokens (B, T) long: prompt, response (its EOS included), pads on the right; lengths (B,).
        """
        asked = self.pools(prompt_lengths, response_lengths, tokens.shape[1])
        scores = self.token_scores(tokens, asked=asked)
        return self.pooled(scores, prompt_lengths, response_lengths)

    @property
    def pool(self) -> Callable[..., Tensor]:
        """`last_token_reward`, `mean_reward` or `sum_reward`: ours, or a student's in its place."""
        return {"last": last_token_reward, "mean": mean_reward, "sum": sum_reward}[self.pooling]

    @property
    def pools_elsewhere(self) -> bool:
        """Whether the pooling may read any token score: a student wrote it."""
        return getattr(self.pool, "__module__", None) != __name__

    def pools(self, prompt_lengths: Tensor, response_lengths: Tensor, length: int) -> Tensor | None:
        """(B, length) bool: where `pooled` reads the token scores of rows of this length; None:
        anywhere."""
        if self.pools_elsewhere:
            return None
        end = prompt_lengths + response_lengths
        before = end - 1 if self.pooling == "last" else prompt_lengths
        return sequence_mask(end, length) & ~sequence_mask(before, length)

    def pooled(self, scores: Tensor, prompt_lengths: Tensor, response_lengths: Tensor) -> Tensor:
        """`rewards` from the token scores (B, T), (B,)."""
        last = self.pooling == "last"
        where = [prompt_lengths + response_lengths] if last else [prompt_lengths, response_lengths]
        pooled = self.pool(scores, *where)
        return self.gain * pooled + self.bias

    def _folded(self) -> tuple[Tensor, Tensor, Tensor]:
        """(weight, bias) of a head with gain and bias in it, and the bias that is left: that of a
        sum, since it cannot be shared out over tokens whose number varies."""
        weight, token_bias = self.gain * self.head.weight, self.gain * self.head.bias
        if self.pooling == "sum":
            return weight, token_bias, self.bias.clone()
        return weight, token_bias + self.bias, torch.zeros_like(self.bias)

    @torch.no_grad()
    def as_critic(self) -> ScalarModel:
        """A trainable copy to begin a critic from, with gain and bias in its head: its token scores
        have the reward's own scale, since it has to predict what PPO is paid."""
        critic = copy.deepcopy(self).requires_grad_(True)
        weight, token_bias, bias = self._folded()
        critic.head.load_state_dict({"weight": weight, "bias": token_bias})
        critic.gain.fill_(1.0)
        critic.bias.copy_(bias)
        return critic

    # ---- with an adapter -------------------------------------------------------------------------

    @torch.no_grad()
    def adapter_critic(self, lora: LoRA, seed: int = 0) -> ScalarModel:
        """A critic that shares this reward model's backbone: an adapter over it, and a head of its
        own that begins as this one's, gain and bias in it. This model goes on with the adapter
        switched off, so its rewards stay what they are. The backbone has to be a HuggingFaceLM."""
        weight, token_bias, bias = self._folded()
        critic = ScalarModel(self.backbone, self.pooling).to(weight.device)
        critic.head.load_state_dict({"weight": weight, "bias": token_bias})
        critic.bias.copy_(bias)
        self.requires_grad_(False)
        self.backbone = critic.backbone.adapt(lora, seed)
        return critic

    # ---- Hugging Face's format -------------------------------------------------------------------

    @torch.no_grad()
    def save_pretrained(self, directory: str | os.PathLike, tokenizer=None) -> None:
        """Write a directory that `AutoModelForSequenceClassification.from_pretrained` opens; where
        pooling is "last", its one logit is the reward.

        The gain goes into the weights, an adapter too. transformers' head has no bias, so the
        constant goes into the final norm's where it has one (GPT-2, Pythia); else into config.json
        as `reward_token_bias`, and transformers' logit lacks it: `sequence_classifier` says why.

        transformers pools at the last token that is not `pad_token_id`, the tokenizer's. Where pad
        and EOS are one token it reads the one before EOS, and its logit is not our reward; where
        there is no pad token it takes one row at a time.
        Raises ModelError when transformers has no such classifier for the backbone.
        """
        weight, token_bias, bias = self._folded()
        more = {"reward_pooling": self.pooling, "reward_bias": bias.item()}
        write_classifier(directory, self.backbone, weight, token_bias, more, tokenizer)

    @torch.no_grad()
    def save_adapter(self, directory: str | os.PathLike, base: str) -> None:
        """Write adapter and head as a peft directory; base: what the training started from."""
        weight, token_bias, bias = self._folded()
        more = {"reward_pooling": self.pooling, "reward_token_bias": token_bias.item(),
                "reward_bias": bias.item()}  # fmt: skip
        write_reward_adapter(directory, self.backbone, weight, base, more)

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | os.PathLike, how: WeightFormat = PLAIN
    ) -> ScalarModel:
        """Read what `save_pretrained` wrote, or any sequence classifier with one label.

        Rewards are as they were; gain and bias have become part of the weights. Raises ModelError
        (not found), CheckpointError (another architecture, more labels, missing tensors: named).
        """
        directory, where = checkpoints.resolve(name_or_dir), str(name_or_dir)
        backbone, weight, config = read_classifier(directory, where, how)
        model = cls(backbone, config.get("reward_pooling", "last"))
        token_bias = torch.tensor([config.get("reward_token_bias", 0.0)])
        checkpoints.load_into(model.head, {"weight": weight, "bias": token_bias}, where)
        model.bias.fill_(config.get("reward_bias", 0.0))
        return model
