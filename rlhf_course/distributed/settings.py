"""The flags of `rlhf-course ppo-ray`: those of `ppo`, and the cluster's."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Literal

from rlhf_course.errors import ConfigError
from rlhf_course.stages.flags import LORA_FLAGS, Count, Folder, Name
from rlhf_course.stages.settings import PPOConfig


@dataclass
class RayPPOConfig(PPOConfig):
    """PPO-ptx on a cluster: Ray places, vLLM answers, DeepSpeed's ZeRO trains."""

    checkpoint_every: int = 1
    """Iterations between two checkpoints: what a lost process can cost."""
    ray_address: Name = None
    """A running cluster's address, or "auto" [default: start Ray on this machine]."""
    colocate: bool = True
    """All roles and the engines share the same GPUs and take turns; else each has its own."""
    actor_ranks: int = 2
    """Processes that share the policy out; colocated, every role has as many."""
    critic_ranks: Count = None
    """Of the critic [default: --actor-ranks]."""
    reference_ranks: Count = None
    """Of the reference [default: --actor-ranks]."""
    reward_ranks: Count = None
    """Of the reward model [default: --actor-ranks]."""
    engines: int = 1
    """vLLM engines that answer."""
    tensor_parallel: int = 1
    """Devices of each engine."""
    zero_stage: Literal[1, 2, 3] = 3
    """1 shares the optimizer's state out, 2 the gradients too, 3 the parameters too."""
    offload: Literal["none", "optimizer", "parameters"] = "none"
    """What stays in the host's memory; "parameters" means the optimizer too."""
    autotp: int = 1
    """Ranks that share each matrix in training (DeepSpeed's AutoTP)."""
    deepcompile: bool = False
    """DeepSpeed's compiler (CUDA)."""
    deepspeed: Folder = None
    """A JSON file that is merged into DeepSpeed's configuration."""
    staleness: int = 0
    """Rollouts that may run ahead of the training: 0 in step, 1 one step off. Above 0 it needs
    --no-colocate."""
    importance: Literal["none", "tis", "icepop", "seq_mask"] = "none"
    """Correction for answers that the engine drew with other probabilities than the trainer's."""
    importance_low: float = 0.5
    """The correction's weights are cut, or dropped, below this."""
    importance_high: float = 5.0
    """The same above."""
    channel: Literal["auto", "gloo", "nccl", "ipc"] = "auto"
    """How weights travel to the engines: gloo on CPUs, on GPUs ipc if colocated, else nccl."""
    verify_sync: int = 0
    """Prompts that are answered greedily after each sync; each token must be the trainer's too."""
    gpu_memory_utilization: float = 0.4
    """An engine's share of its GPU's memory."""
    gpus_per_node: int = 8
    """GPUs of one machine of the cluster."""
    restarts: int = 3
    """How often lost processes may be started anew, from the last checkpoint."""
    timeout: float = 1800.0
    """Seconds after which a process that does not answer counts as lost."""

    def __post_init__(self) -> None:
        for role in ("critic", "reference", "reward"):
            if getattr(self, f"{role}_ranks") is None:
                setattr(self, f"{role}_ranks", self.actor_ranks)


NOT_IDENTITY = tuple(
    field.name
    for field in fields(RayPPOConfig)
    if field.name not in {f.name for f in fields(PPOConfig)}
    and field.name not in ("staleness", "importance", "importance_low", "importance_high")
)
"""Where a run runs. Its checkpoints fit any number of ranks and any stage, so it may go on
elsewhere; the last digits will be others."""


def deepspeed_file(config: RayPPOConfig) -> dict:
    """What --deepspeed holds, {} without. Raises ConfigError where it is not a JSON object."""
    if config.deepspeed is None:
        return {}
    try:
        found = json.loads(config.deepspeed.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"--deepspeed {config.deepspeed}: cannot be read ({error}).") from None
    if not isinstance(found, dict):
        raise ConfigError(f"--deepspeed {config.deepspeed}: give a JSON object, {{…}}.")
    return found


def check_devices(config: RayPPOConfig, gpus: int) -> None:
    """Set device and dtype to what the cluster has. Raises ConfigError where a flag says else."""
    device, wrong = "cuda" if gpus else "cpu", None
    if config.device not in ("auto", device):
        wrong = f"--device {config.device}: with {gpus} GPUs in the cluster all work on {device}."
    if not gpus and config.dtype == "bfloat16":
        wrong = "--dtype bfloat16: without GPUs trainer and engines compute in float32."
    if not gpus and config.channel in ("ipc", "nccl"):
        wrong = f"--channel {config.channel} needs GPUs, and the cluster has none."
    if wrong:
        raise ConfigError(f"{wrong} Leave the flag out.")
    config.device, config.dtype = device, config.dtype if gpus else "float32"


def _one_process_alone(config: RayPPOConfig) -> dict[str, bool]:
    """Message -> whether it is due: flags of `ppo` that a cluster does not honour."""
    return {
        "--rollout, --generation-batch, --cuda-graphs and --profile belong to `rlhf-course ppo`: "
        "vLLM answers here, as many prompts at a time as its memory holds. Leave them out.":
            config.rollout != "own"
            or bool(config.generation_batch or config.profile or config.cuda_graphs),
        "--lora and --quantize belong to `rlhf-course ppo`: on a cluster all weights are trained, "
        "and ZeRO shares them out. Leave them out.":
            any(getattr(config, name) is not None for name in LORA_FLAGS),
    }  # fmt: skip


def check_cluster(config: RayPPOConfig) -> None:
    """Raise ConfigError for numbers out of range and flags that contradict each other."""
    at_least_1 = ("actor_ranks", "critic_ranks", "reference_ranks", "reward_ranks", "engines",
                  "tensor_parallel", "autotp", "gpus_per_node")  # fmt: skip
    for name in (*at_least_1, "staleness", "verify_sync", "restarts"):
        least, value = int(name in at_least_1), getattr(config, name)
        if value < least:
            raise ConfigError(f"--{name.replace('_', '-')} {value}: give at least {least}.")
    stage = deepspeed_file(config).get("zero_optimization", {}).get("stage", config.zero_stage)
    last = config.batch % config.minibatch or config.minibatch
    smallest = min(config.batch, config.minibatch, last)
    ranks = max(config.actor_ranks, config.critic_ranks) // config.autotp
    others = {config.critic_ranks, config.reference_ranks, config.reward_ranks}
    contradictions = {
        f"--staleness {config.staleness} and --colocate: colocated engines sleep while the trainer "
        "works, so nothing can run ahead. Add --no-colocate.": config.staleness and config.colocate,
        "--colocate holds one rank of every role in one process, so all have --actor-ranks. Leave "
        "the other ranks out, or add --no-colocate.":
            config.colocate and others != {config.actor_ranks},
        f"--importance-low {config.importance_low} must be above 0 and below --importance-high "
        f"{config.importance_high}.": not 0 < config.importance_low < config.importance_high,
        f"--gpu-memory-utilization {config.gpu_memory_utilization}: give a share above 0, up to 1.":
            not 0 < config.gpu_memory_utilization <= 1,
        f"--timeout {config.timeout}: give seconds above 0.": not config.timeout > 0,
        "--advantages grpo and --importance: GRPO here takes no correction. Leave one out.":
            config.advantages == "grpo" and config.importance != "none",
        f"--actor-ranks or --critic-ranks: {ranks} ranks share out a minibatch of {smallest} "
        "answers (--batch, --minibatch), and each needs one. Take fewer ranks.": smallest < ranks,
        f"--batch {config.batch}: the ranks of a role and the engines need an answer each. Give "
        "more answers, or fewer ranks and engines.":
            config.batch < max(config.reference_ranks, config.reward_ranks, config.engines),
        "--importance and --sequence-ratio: the weights are those of single tokens. Leave one out.":
            config.importance != "none" and config.mdp == "sequence" and config.sequence_ratio,
        "--channel ipc needs trainers and engines on the same GPUs (--colocate).":
            config.channel == "ipc" and not config.colocate,
        "--channel nccl needs GPUs of their own for the engines (--no-colocate).":
            config.channel == "nccl" and config.colocate,
        f"--zero-stage {config.zero_stage}: {config.deepspeed} says stage {stage}. Say the same.":
            stage != config.zero_stage,
        f"--autotp {config.autotp} must divide --actor-ranks {config.actor_ranks} and "
        f"--critic-ranks {config.critic_ranks}.":
            bool(config.actor_ranks % config.autotp or config.critic_ranks % config.autotp),
        "--autotp and --colocate: a process that has cut one model by AutoTP can make no whole one "
        "beside it. Add --no-colocate.": config.autotp > 1 and config.colocate,
        **_one_process_alone(config),
    }  # fmt: skip
    for message, wrong in contradictions.items():
        if wrong:
            raise ConfigError(message)
