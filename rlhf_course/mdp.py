"""Chapter 04: an answer as a Markov decision process.

The state is the text so far, an action is the next token, an episode is one answer. This module
turns what the models say (logits, values, one score an answer) into what PPO learns from
(log-probabilities, rewards, advantages, returns). All of it lives on one axis, the action axis:

    tokens    x0   x1   x2   x3   x4   pad       prompt P = 2, response R = 3, length T = 6
    action         0    1    2    3    4         action a emits token a+1, so there are T-1
    mask           -    yes  yes  yes  -         mask[a] is True where P-1 <= a < P+R-1

What stands at action a was computed from tokens 0..a alone: logits[:, a] is the distribution that
token a+1 was drawn from, and value[a] is the worth of the state before it is known.

Three rules hold everywhere. Masks come from lengths, never from `token != pad`: where pad and EOS
are the same token, the latter hides the action that ends an answer and the model never learns to
stop. What stands outside the mask may be anything, NaN included, and changes nothing. Results are
exactly 0 outside the mask. Functions keep their input's dtype and never write into their inputs.

Tested by `pytest tests/test_mdp.py`.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

# exp(20) = 5e8 is far outside any clip range and finite when squared. A larger log-ratio says
# nothing more, but in float32 exp(89) is inf, and inf * 0 is NaN, which would end the training.
MAX_LOG_RATIO = 20.0

# ------------------------------------------------------------------------- masks and masked means


def require_same_shape(mask: Tensor, **tensors: Tensor) -> None:
    """Raise ValueError unless mask is bool and every tensor has its shape (none is broadcast)."""
    if mask.dtype != torch.bool:
        raise ValueError(f"mask must be torch.bool, not {mask.dtype}")
    for name, tensor in tensors.items():
        if tensor.shape != mask.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, mask {tuple(mask.shape)}")


def sequence_mask(lengths: Tensor, length: int) -> Tensor:
    """(B,) int lengths -> (B, length) bool, True on the first lengths[b] positions of row b."""
    return torch.arange(length, device=lengths.device) < lengths[:, None]  # (B, length)


def position_ids(attention_mask: Tensor) -> Tensor:
    """Positions that count real tokens only, so that left padding does not move a sequence.

    attention_mask (B, T), bool or 0/1 -> (B, T) long; pads get 1, a legal index nobody attends to.
    """
    real = attention_mask.bool()
    return torch.where(real, real.long().cumsum(dim=1) - 1, 1)  # (B, T)


def action_mask(prompt_lengths: Tensor, response_lengths: Tensor, length: int) -> Tensor:
    """True on the actions that emitted a response token (EOS among them).

    prompt_lengths, response_lengths (B,) int, length = T -> (B, T-1) bool.
    Raises ValueError where a prompt is empty or prompt and response do not fit into `length`.
    """
    if (prompt_lengths < 1).any():
        raise ValueError("every prompt needs at least one token: it predicts the first action")
    if (prompt_lengths + response_lengths > length).any():
        raise ValueError(f"prompt + response is longer than the sequence length {length}")
    # BEGIN SOLUTION
    actions = torch.arange(length - 1, device=prompt_lengths.device)
    first = prompt_lengths[:, None] - 1  # (B, 1)
    return (actions >= first) & (actions < first + response_lengths[:, None])  # (B, T-1)
    # END SOLUTION


def last_action(mask: Tensor) -> Tensor:
    """Index of each row's last action: (B, T-1) -> (B,) long. ValueError where a row has none."""
    empty = ~mask.any(dim=1)
    if empty.any():
        raise ValueError(f"empty answer: no action in rows {empty.nonzero().flatten().tolist()}")
    actions = torch.arange(mask.shape[1], device=mask.device)
    return (actions * mask).amax(dim=1)


def masked_sum(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Sum of x where mask is True. A product with the mask would let NaN * 0 = NaN through."""
    return torch.where(mask, x, 0.0).sum(dim)


def masked_mean(x: Tensor, mask: Tensor, dim: int | None = None) -> Tensor:
    """Mean of x where mask is True, over everything or along `dim`; 0 where nothing is valid."""
    return masked_sum(x, mask, dim) / mask.sum(dim).clamp(min=1)


def token_mean(x: Tensor, mask: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """The reduction of every loss here: the sum over valid entries, divided by `denominator`.

    `denominator` is the number of valid entries of the WHOLE optimizer step, over all its
    micro-batches and ranks; None takes this batch's own. With it the micro-batches' losses (and
    gradients) add up to the full batch's; a mean of means would give a micro-batch of 1 token the
    weight of one of 1000. An engine that itself divides by its g accumulation steps and averages
    over its d ranks is given N / (g * d).
    """
    if denominator is None:
        return masked_mean(x, mask)
    return masked_sum(x, mask) / denominator


# -------------------------------------------------------------- log-probabilities, entropy and KL


def _tempered(logits: Tensor, temperature: float) -> Tensor:
    """Logits of the distribution that was sampled from, in float32 (float64 stays); not divided in
    place, which would corrupt what autograd has saved."""
    if temperature <= 0:
        raise ValueError(f"temperature must be positive, not {temperature}")
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide if temperature == 1 else wide / temperature


def token_logprobs(logits: Tensor, tokens: Tensor, temperature: float = 1.0) -> Tensor:
    """log pi(token a+1 | tokens 0..a) of every action, in nats.

    logits (B, T, V) float, tokens (B, T) long -> (B, T-1), float32 or wider; prompt and pads are
    not masked yet. `temperature` must be that of the sampling, for the policy and the reference
    alike, or the ratio does not start at 1 and the KL is biased. Raises ValueError where the
    shapes disagree or temperature <= 0.
    """
    if logits.shape[:-1] != tokens.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit tokens {tuple(tokens.shape)}")
    # BEGIN SOLUTION
    # The shift by one: position a predicts token a+1, so the last position predicts nothing here.
    logp = _tempered(logits[:, :-1], temperature).log_softmax(dim=-1)  # (B, T-1, V)
    return logp.gather(-1, tokens[:, 1:, None])[..., 0]  # (B, T-1)
    # END SOLUTION


def token_entropy(logits: Tensor, temperature: float = 1.0) -> Tensor:
    """Entropy of each action's distribution, in nats: (B, T, V) -> (B, T-1), float32 or wider."""
    return _entropy(logits[:, :-1], temperature)  # (B, T-1)


def _entropy(logits: Tensor, temperature: float) -> Tensor:
    logits = _tempered(logits, temperature)
    # -sum p log p with log p = z - logsumexp(z)
    return logits.logsumexp(dim=-1) - (logits.softmax(dim=-1) * logits).sum(dim=-1)


def chunked_logprobs(
    hidden: Tensor,
    unembed: Callable[[Tensor], Tensor],
    targets: Tensor,
    temperature: float = 1.0,
    chunk_size: int = 4096,
) -> tuple[Tensor, Tensor]:
    """Log-probabilities and entropies without ever holding all logits.

    hidden (N, D): final hidden states of the wanted actions only; unembed maps (n, D) to logits
    (n, V); targets (N,) long: the token each of them emitted -> (logprobs (N,), entropy (N,)).
    With GPT-2's V = 50257 the logits of 32 x 1024 tokens take 6.6 GB in float32. Here they exist
    for `chunk_size` rows at a time, in the backward pass too, which computes them once more.
    """
    if hidden.shape[:1] != targets.shape:
        raise ValueError(f"hidden {tuple(hidden.shape)} do not fit targets {tuple(targets.shape)}")

    def score(rows: Tensor, emitted: Tensor) -> tuple[Tensor, Tensor]:
        # One text, so that the shift by one lands where it should: its last position, which is
        # asked for nothing, is a row more. (Two positions for each action would be twice the size.)
        logits = unembed(F.pad(rows, (0, 0, 0, 1)))[None]  # (1, n + 1, V)
        if logits.requires_grad:  # keep nothing for a gradient that few losses ask for
            entropy = checkpoint(token_entropy, logits, temperature, use_reentrant=False)
        else:
            entropy = token_entropy(logits, temperature)
        return token_logprobs(logits, F.pad(emitted, (1, 0))[None], temperature)[0], entropy[0]

    if len(targets) <= chunk_size:  # a single chunk: nothing is gained by computing it twice
        return score(hidden, targets)
    chunks = zip(hidden.split(chunk_size), targets.split(chunk_size), strict=True)
    scored = [checkpoint(score, *chunk, use_reentrant=False) for chunk in chunks]
    logprobs, entropy = zip(*scored, strict=True)
    return torch.cat(logprobs), torch.cat(entropy)  # (N,), (N,)


def kl_estimate(logprobs: Tensor, ref_logprobs: Tensor, kind: str = "k1") -> Tensor:
    """Per-action estimate of KL(pi || ref) from actions drawn from pi, in nats; any shape, kept.

    With d = log pi - log ref (Schulman 2020, "Approximating KL divergence"):

        k1 = d                   unbiased, may be negative    the one for the reward
        k2 = d^2 / 2             biased, low variance         the one for a loss
        k3 = exp(-d) - 1 + d     unbiased, never negative     the one for the logs

    As a loss on samples at hand their gradients by log pi are 1, d and 1 - exp(-d): k1's has
    expectation 0, k2's is the KL's own in expectation, k3's is not. A batch mean of k1 that stays
    negative says that the tokens were not drawn from `logprobs`. ValueError for another kind.
    """
    # BEGIN SOLUTION
    d = logprobs - ref_logprobs
    if kind == "k1":
        return d
    if kind == "k2":
        return d.square() / 2
    if kind == "k3":
        d = d.clamp(min=-MAX_LOG_RATIO)
        return torch.expm1(-d) + d  # expm1, because exp(-d) - 1 loses every digit of a small d
    # END SOLUTION
    raise ValueError(f"kind must be 'k1', 'k2' or 'k3', not {kind!r}")


# ------------------------------------------------------------------------- rewards and advantages


def score_with_eos(
    scores: Tensor, finished: Tensor, penalty: float = 1.0, override: float | None = None
) -> Tensor:
    """Make it cost something not to stop: change the scores of answers without an EOS.

    scores (B,), finished (B,) bool -> (B,). Subtracts `penalty` from the unfinished ones, or, where
    `override` is given, puts that in place of their score (Ziegler et al. 2019 used -1). A score
    that is also to be clipped is clipped before this: a clip afterwards can swallow the penalty.
    """
    require_same_shape(finished, scores=scores)
    unfinished = scores - penalty if override is None else torch.full_like(scores, override)
    return torch.where(finished, scores, unfinished)


@torch.no_grad()
def token_rewards(
    scores: Tensor, kl: Tensor, mask: Tensor, kl_coef: float, score_clip: float | None = None
) -> Tensor:
    """The token-level MDP's rewards: -kl_coef * kl on every action, the score on the last one.

    scores (B,), kl (B, T-1) in nats (k1 of `kl_estimate`), mask (B, T-1) bool -> (B, T-1).
    The score is clipped to [-score_clip, score_clip] first; the KL never is. The last action is the
    one that emitted EOS (or the last token that fitted): one later is a pad and is never trained.
    Ziegler et al. 2019, Eq. 2. Raises ValueError for an empty answer or shapes that disagree.
    """
    require_same_shape(mask, kl=kl)
    require_same_shape(mask[:, 0], scores=scores)
    # BEGIN SOLUTION
    if score_clip is not None:
        scores = scores.clamp(-score_clip, score_clip)
    penalty = torch.where(mask, -kl_coef * kl, 0.0)  # (B, T-1)
    return penalty.scatter_add(1, last_action(mask)[:, None], scores[:, None].to(kl.dtype))
    # END SOLUTION


@torch.no_grad()
def gae(
    rewards: Tensor, values: Tensor, mask: Tensor, gamma: float = 1.0, lam: float = 0.95
) -> tuple[Tensor, Tensor]:
    """Generalised advantage estimation (Schulman et al. 2016, Eq. 16), over valid actions only.

    rewards, values (B, T-1), mask (B, T-1) bool -> (advantages, returns), both (B, T-1):

        delta_t = r_t + gamma * V_{t+1} - V_t
        A_t     = delta_t + gamma * lam * A_{t+1}
        R_t     = A_t + V_t

    where t+1 is the next VALID action: in a dialogue of several turns A and V are carried over the
    tokens that somebody else wrote. After the last action both are 0, for truncated answers too.
    The results are constants to the update: no gradient passes.
    """
    require_same_shape(mask, rewards=rewards, values=values)
    # BEGIN SOLUTION
    # Going backwards; at an action that is not valid the two carried numbers stay as they are.
    next_value = next_advantage = torch.zeros_like(values[:, 0])  # (B,)
    advantages = torch.zeros_like(values)
    for t in reversed(range(mask.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        advantage = delta + gamma * lam * next_advantage
        next_value = torch.where(mask[:, t], values[:, t], next_value)
        next_advantage = torch.where(mask[:, t], advantage, next_advantage)
        advantages[:, t] = torch.where(mask[:, t], advantage, 0.0)
    return advantages, torch.where(mask, advantages + values, 0.0)
    # END SOLUTION


@torch.no_grad()
def sequence_advantages(
    scores: Tensor, kl: Tensor, values: Tensor, mask: Tensor, kl_coef: float, kl_reduction="sum"
) -> tuple[Tensor, Tensor]:
    """The sequence-level MDP: the whole answer is one action, with one reward and one value.

    scores (B,), kl (B, T-1) in nats, values (B,): V(prompt), mask (B, T-1) bool
    -> (advantages (B, T-1), returns (B,)) with R = score - kl_coef * KL and A = R - V, the same A
    on every token. With one ratio for the answer this is a contextual bandit; with a ratio for each
    token, every token is an agent and all share one payoff. kl_reduction "sum" is the answer's KL,
    "mean" is per token, so an equal kl_coef weighs less by the answer's length (ColossalChat's
    first version). Raises ValueError for another one.
    """
    require_same_shape(mask, kl=kl)
    require_same_shape(mask[:, 0], scores=scores, values=values)
    if kl_reduction not in ("sum", "mean"):
        raise ValueError(f"kl_reduction must be 'sum' or 'mean', not {kl_reduction!r}")
    # BEGIN SOLUTION
    reduce = masked_sum if kl_reduction == "sum" else masked_mean
    returns = scores - kl_coef * reduce(kl, mask, dim=1)  # (B,)
    return torch.where(mask, (returns - values)[:, None], 0.0), returns  # (B, T-1), (B,)
    # END SOLUTION


# -------------------------------------------------------- when another engine sampled the answers


@torch.no_grad()
def importance_weights(
    logprobs: Tensor,
    rollout_logprobs: Tensor,
    mask: Tensor,
    method: str = "none",
    low: float = 0.5,
    high: float = 5.0,
) -> tuple[Tensor, dict[str, Tensor]]:
    """Weights that correct for a sampler whose probabilities differ from the trainer's.

    logprobs: the trainer's, before the update; rollout_logprobs: the sampling engine's, of the
    distribution it drew from (after temperature and top-p); mask bool; all (B, T-1).
    With w = pi_trainer / pi_rollout for each token, the weights (B, T-1) are

        none       1
        tis        w, truncated to [low, high]
        icepop     w where low <= w <= high, else 0
        seq_mask   as tis, but the whole answer is dropped unless its geometric mean of w is inside

    They carry no gradient and multiply the policy loss. stats: `rollout_kl` (k1 of KL(rollout ||
    trainer), nats per token), `ratio_max`, `outside` (share of tokens with w not in [low, high]).
    """
    require_same_shape(mask, logprobs=logprobs, rollout_logprobs=rollout_logprobs)
    log_ratio = torch.where(mask, logprobs - rollout_logprobs, 0.0)
    ratio = log_ratio.clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO).exp()
    inside = (low <= ratio) & (ratio <= high)
    if method == "none":
        weights = torch.ones_like(ratio)
    elif method == "tis":
        weights = ratio.clamp(low, high)
    elif method == "icepop":
        weights = ratio * inside
    elif method == "seq_mask":
        geometric_mean = masked_mean(log_ratio, mask, dim=1).exp()  # (B,)
        keep = (low <= geometric_mean) & (geometric_mean <= high)
        weights = ratio.clamp(low, high) * keep[:, None]
    else:
        raise ValueError(f"method must be none, tis, icepop or seq_mask, not {method!r}")
    stats = {
        "rollout_kl": masked_mean(-log_ratio, mask),
        "ratio_max": torch.where(mask, ratio, 0.0).max(),
        "outside": masked_mean((~inside).to(ratio.dtype), mask),
    }
    return torch.where(mask, weights, 0.0), stats
