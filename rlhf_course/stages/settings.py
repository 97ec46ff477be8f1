"""The settings of every stage: one dataclass each, whose fields tyro turns into flags.

A field that is None takes its value from `presets`, by world and size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from tyro.conf import arg

from rlhf_course.stages.flags import (
    Common,
    Count,
    DataFlags,
    ModelFlags,
    Name,
    Normalization,
    Number,
    Optimization,
    Pooling,
    ProfileFlag,
    Rejected,
    YesNo,
)


@dataclass
class PretrainConfig(Optimization, DataFlags, Common):
    """GPT: learn the corpus, token by token."""

    model: Name = None
    """Size, directory or hub name to go on from [default: a new one of --size]."""
    data: Name = None
    """Text: file, folder or hub name (field text) [default: the world]."""
    context: Count = None
    """Longest sequence in tokens [by world; with --data 256]."""
    window: Count = None
    """Tokens in a training row [by world]."""
    vocab_size: int = 2048
    """Size of the tokenizer trained on --data."""


@dataclass
class SFTConfig(ProfileFlag, ModelFlags, Optimization, DataFlags, Common):
    """Supervised fine-tuning: imitate demonstrations."""

    model: Name = None
    """Directory, hub name, or a size for a new model, without weights [default: the pretraining
    run beside --out; with --data a new model of --size]."""
    data: Name = None
    """Dialogues: file, folder or hub name; messages or prompt/response [default: the world]."""
    validation: float = 0.2
    """Share of --data held out."""
    corpus_rows: Count = None
    """Rows of pretraining text in each batch, against forgetting [by world]."""
    packing: YesNo = None
    """Several dialogues in a row, without attention between them [by world]."""
    context: Count = None
    """Longest sequence of a new model [by world; with --data what 95 % of its rows need]."""
    vocab_size: int = 2048
    """Size of the tokenizer trained on --data."""
    eval_every: int = 50
    """Updates between two evaluations on held-out dialogues."""
    micro_batch: Count = None
    """Rows a forward pass, of like length [default: on a CPU some 2,000 tokens, else the whole
    batch]; changes memory and time, not the result."""


@dataclass
class ComparisonsConfig(Common):
    """Let the SFT model answer, and the world's labeler rank the answers."""

    model: Name = None
    """Directory or hub name of the policy that answers [default: the SFT run beside --out]."""
    prompts: Count = None
    """Prompts to compare answers to [by size]."""
    answers: Count = None
    """K: answers a prompt, the injected one included [by world]."""
    heldout: int = 500
    """Further prompts whose comparisons measure the reward model."""
    hot_answers: Count = None
    """How many of the K are sampled at temperature 1.4 [by world]."""


@dataclass
class RewardModelConfig(ProfileFlag, ModelFlags, Optimization, DataFlags, Common):
    """Reward model: learn which answer people prefer."""

    model: Name = None
    """Directory or hub name to start from [default: the SFT run beside --out]."""
    data: Name = None
    """Comparisons: prompt/chosen/rejected or ranked responses [default: the comparisons run]."""
    validation: float = 0.1
    """Share of --data held out."""
    rejected: Rejected = None
    """Of --data without comparisons make some: each answer against another row's."""
    pooling: Pooling = None
    """Reward read at the EOS, or as mean or sum over the answer's tokens [by world]."""
    epochs: Count = None
    """Passes over the comparisons, when --steps is not given [by world]."""
    loss: Literal["kwise", "pairwise"] = "kwise"
    """All pairs of a prompt as one batch element, or pairs shuffled on their own."""
    micro_batch: Count = None
    """Prompts a forward pass, all answers of each [default: on a CPU some 2,000 tokens, else
    --batch]; changes memory and time, not the result."""
    normalize: Normalization = None
    """Afterwards: mean 0 on demonstrations, or mean 0, deviation 1 on all answers [by world]."""


@dataclass
class PPOConfig(ProfileFlag, ModelFlags, DataFlags, Common):
    """PPO-ptx: improve the policy by the reward, near the reference, without forgetting."""

    checkpoint_every: int = 5
    """Iterations between two checkpoints."""
    model: Name = None
    """Policy to start from, and reference [default: the SFT run beside --out]."""
    reward_model: Name = None
    """Reward model; the critic starts from it too [default: the run beside --out]."""
    reward: Name = None
    """module:function scoring (prompts, responses, rows) instead of a reward model, or the URL of a
    server that does."""
    reward_timeout: float = 60
    """Seconds for each request to such a server."""
    reward_retries: int = 3
    """How often a request that failed is sent again, after 0.5, 1, 2, … seconds."""
    data: Name = None
    """Prompts: file, folder or hub name [default: the world]."""
    ptx_data: Name = None
    """Text for the pretraining term [default: the world; with --data none]."""
    validation: float = 0.2
    """Share of --data held out, not used for training."""
    iterations: Count = None
    """Rollouts [by world]."""
    batch: Count = None
    """Episodes a rollout [by world]."""
    epochs: int = 2
    """Passes over each rollout."""
    minibatch: int = 64
    """Episodes an update."""
    micro_batch: Count = None
    """Episodes a forward pass [default: on a CPU some 2,000 tokens, else --minibatch]."""
    lr: Number = None
    """Peak learning rate of the policy [by world]."""
    lr_floor: float = 0.2
    """The linear schedule ends at this share of the peak."""
    warmup: int = 5
    """Iterations of warm-up of the policy's learning rate."""
    critic_lr: Number = None
    """Learning rate of the critic [by world]."""
    critic_warmup: Count = None
    """Rollouts before the first, on which the critic alone is trained [by world]."""
    critic_warmup_lr: Number = None
    """Learning rate of the critic during its warm-up [by size]."""
    max_new_tokens: Count = None
    """Longest answer [by world; with --data 64]."""
    generation_batch: Count = None
    """Answers sampled at a time; fewer take less memory for keys and values [default: all]."""
    cuda_graphs: bool = False
    """Record a step of the sampling once and replay it for each token (CUDA; not measured yet)."""
    rollout: Literal["own", "vllm"] = "own"
    """Who samples: this package, or vLLM in the same process, given the weights after each step."""
    temperature: float = 1.0
    """Of the sampling, and of every log-probability of the policy and the reference."""
    mdp: Literal["token", "sequence"] = "token"
    """Token-level: each token an action with its own advantage. Sequence-level: one advantage."""
    sequence_ratio: bool = False
    """With --mdp sequence: one clipped ratio for the answer instead of one a token."""
    gamma: float = 1.0
    """Discount."""
    lam: float = 0.95
    """GAE's lambda."""
    clip: float = 0.2
    """Clip range of the ratio."""
    dual_clip: Number = None
    """Bound of the loss for negative advantages, in multiples of the advantage."""
    value_clip: Number = None
    """Clip range of the critic [default: none]."""
    entropy_coef: float = 0.0
    """Weight of the entropy bonus."""
    max_grad_norm: float = 1.0
    """Longer gradients are shortened to this norm."""
    whiten: bool = True
    """Normalise the advantages over the rollout."""
    advantages: Literal["gae", "rloo", "grpo", "reinforce_plus_plus"] = "gae"
    """GAE needs a critic, the others have none. GRPO's KL is in the loss, else in the reward."""
    answers_per_prompt: Count = None
    """Answers to each prompt; --batch counts answers [default: 1; with rloo and grpo 4]."""
    kl_coef: Number = None
    """First price of the KL to the reference; 0: none at all [by world]."""
    kl_controller: Literal["pi", "adaptive", "fixed"] = "pi"
    """Ziegler's controller with a proportional term, Ziegler's, or a constant price."""
    kl_gain: Number = None
    """Strength of the proportional term [by world]."""
    kl_target: Number = None
    """The controllers' target, nats a sequence [by world]."""
    kl_horizon: Number = None
    """Episodes over which the price adapts [by world]."""
    kl_floor: Number = None
    """The price never falls below this [by world]."""
    reward_norm: Literal["none", "running", "ema"] = "none"
    """Divide rewards by their standard deviation so far."""
    value_norm: Literal["none", "popart"] = "none"
    """Train the critic on normalised returns, preserving its outputs."""
    reward_clip: Number = None
    """Scores are clipped to ± this, before the penalty for a missing EOS."""
    eos_penalty: Number = None
    """Subtracted from the score of an answer that never ended [by world]."""
    eos_override: Number = None
    """Score of an answer that never ended, instead of the penalty [by world]."""
    ptx_coef: Number = None
    """Weight of the pretraining loss; 0: none [by world]."""
    ptx_reduction: Literal["token_mean", "seq_sum"] = "token_mean"
    """Mean over tokens, or sum over each row's tokens."""
    ptx_rows: int = 16
    """Rows of pretraining text in each update."""
    known_share: Number = None
    """Town: share of prompts about known people [by world]."""


@dataclass
class DPOConfig(ProfileFlag, ModelFlags, Optimization, DataFlags, Common):
    """DPO: learn from comparisons directly, without a reward model and without sampling."""

    model: Name = None
    """Policy to start from, and reference [default: the SFT run beside --out]."""
    data: Name = None
    """Comparisons: prompt/chosen/rejected or ranked responses [default: the comparisons run]."""
    validation: float = 0.1
    """Share of --data held out."""
    rejected: Rejected = None
    """Of --data without comparisons make some: each answer against another row's."""
    pairs: Literal["best_worst", "all"] = "best_worst"
    """Of K ranked answers: the best against the worst, or all K(K-1)/2 pairs."""
    beta: Number = None
    """Price of the distance to the reference [by world; with --data 0.1]."""
    epochs: Count = None
    """Passes over the pairs, when --steps is not given [by world]."""
    micro_batch: Count = None
    """Pairs a forward pass [default: --batch]."""
    eval_every: int = 20
    """Updates between two measurements of the policy's own answers."""
    eval_prompts: int = 256
    """Prompts answered for that."""
    max_new_tokens: Count = None
    """Longest of those answers [by world; with --data 64]."""
    temperature: float = 1.0
    """Of those answers."""


@dataclass
class EvaluateConfig(Common):
    """Judge a policy by the world's own utility, beside a baseline."""

    model: Name = None
    """The policy [default: the PPO run beside --out]."""
    baseline: Name = None
    """The policy to win against, and to measure the KL to [default: the SFT run beside --out]."""
    reward_model: Name = None
    """Gives the proxy reward [default: the reward-model run beside --out, when it is there]."""
    temperature: float = 1.0
    """Of the answers."""
    split: Literal["evaluation", "validation"] = "evaluation"
    """Who is asked about: validation has the people on whom settings may be chosen."""


Ablation = Literal["ppo_no_ptx", "ppo_no_kl", "ppo_no_kl_no_ptx", "ppo_sequence"]
Ablations = Annotated[
    tuple[Ablation, ...] | None,
    arg(metavar="{ppo_no_ptx,ppo_no_kl,ppo_no_kl_no_ptx,ppo_sequence}…", help_behavior_hint=""),
]


@dataclass
class DemoConfig(Common):
    """Everything, from nothing to report.html."""

    ablations: Ablations = None
    """More PPO runs beside the main one [default: town ppo_no_ptx; reviews the first three]."""
    compare_poolings: bool = True
    """Also train a reward model that reads the reward in another way."""
