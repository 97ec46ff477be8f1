"""The settings of `rlhf-course plan`; nothing heavy is imported for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_course.stages.flags import Count, Folder, Quantize


@dataclass
class PlanConfig:
    """Plan a run before it starts: what fits one GPU, or a cluster, and how long a step takes."""

    model: str = "7b"
    """Llama 2's 7b, 13b or 70b, another public model (gpt2, qwen2.5-0.5b, …), or a directory with a
    config.json: policy, critic and reward model."""
    stage: Literal["cluster", "sft", "reward-model", "ppo", "all"] = "cluster"
    """Plan ppo-ray on a cluster, or a stage on one GPU: what fits 8 to 80 GiB, by which flags."""
    lora: Count = None
    """On one GPU: only with an adapter of this rank [default: with and without, rank 16]."""
    quantize: Quantize = None
    """On one GPU: only with the base under --lora in 8 or 4 bits."""
    dtype: Literal["bfloat16", "float32"] = "bfloat16"
    """On one GPU: precision of matrix products."""
    gpus: int = 8
    """GPUs of the cluster."""
    gpu_memory: float = 80.0
    """Memory of each, in GiB."""
    gpu: Literal["a100", "h100", "h200"] = "a100"
    """What they compute and read a second."""
    gpus_per_node: int = 8
    """GPUs of one machine."""
    colocate: bool = True
    """All roles and the engines share the same GPUs and take turns; else each has its own."""
    actor_ranks: Count = None
    """Ranks of the actor [default: colocated all GPUs, else what makes a step fastest]."""
    critic_ranks: Count = None
    """Of the critic [default: the same]."""
    reference_ranks: Count = None
    """Of the reference [default: the same]."""
    reward_ranks: Count = None
    """Of the reward model [default: the same]."""
    engines: Count = None
    """vLLM engines [default: as many as the GPUs that are left hold]."""
    tensor_parallel: Count = None
    """GPUs of each engine [default: what makes a step fastest]."""
    zero_stage: Literal[1, 2, 3] = 3
    """1 shares the optimizer's state out, 2 the gradients too, 3 the parameters too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What stays in the host's memory; "parameters" means the optimizer too."""
    gradient_checkpointing: bool = False
    """Compute activations once more in the backward pass instead of keeping them."""
    prompt_length: int = 512
    """Tokens of a prompt."""
    max_new_tokens: int = 512
    """Tokens of an answer."""
    batch: int = 512
    """Episodes a rollout."""
    minibatch: int = 128
    """Episodes an update."""
    micro_batch: int = 4
    """Sequences of a forward pass on one GPU."""
    epochs: int = 2
    """Passes over each rollout."""
    ptx_rows: int = 16
    """Rows of pretraining text in each update, as long as prompt and answer."""
    json: Folder = None
    """Also write the plan to this file."""
