"""PPO-ptx in one process: rollout → scores → advantages → updates, again and again.

    rlhf-course ppo --world town --size small
    rlhf-course ppo --data prompts.jsonl --model DIR --reward my_rewards:valid_sql

The algorithm is `ppo_loop.PPOLoop`; here are the models.
"""

from __future__ import annotations

import copy
from pathlib import Path

import torch
from torch import nn

from rlhf_course.beyond_ppo import policy_step
from rlhf_course.errors import ConfigError, check_finite
from rlhf_course.ppo import critic_backward
from rlhf_course.ppo_ptx import PopArt, ppo_ptx_step, pretraining_gradient
from rlhf_course.progress import console
from rlhf_course.rollout import Rollout
from rlhf_course.runs import Run, State
from rlhf_course.stages.cards import Provenance
from rlhf_course.stages.checks import check_settings
from rlhf_course.stages.loading import write_report
from rlhf_course.stages.lora import (
    adapted,
    lora_of,
    save_activations,
    weights_of,
    write_adapter_beside,
)
from rlhf_course.stages.ppo_loop import PPOLoop
from rlhf_course.stages.presets import identity, resolve
from rlhf_course.stages.rewards import load_reward_function, model_scores
from rlhf_course.stages.rollouts import Answers, collect, in_parts, score_actions
from rlhf_course.stages.settings import PPOConfig
from rlhf_course.stages.setup import (
    announce,
    before,
    complete,
    conclude,
    device_of,
    frozen,
    load_policy,
    load_reward_model,
    start_critic,
)
from rlhf_course.training import make_optimizer, set_learning_rate, torch_generator


class PPOTrainer(PPOLoop):
    """PPO with all models in this process, on one device."""

    rollout = "own"
    """What this class does of the setting `rollout`."""

    def __init__(self, config: PPOConfig, device):
        self.device = device
        self.source = config.model or before(config, "sft")
        how, lora = weights_of(config, device), lora_of(config)
        self.policy, tokenizer = load_policy(self.source, device, how)
        self.reward_model = None
        if config.reward:
            self.reward_function = load_reward_function(
                config.reward, config.reward_timeout, config.reward_retries
            )
        else:
            folder = config.reward_model or before(config, "reward_model")
            self.reward_model = load_reward_model(folder, tokenizer, device, how)
        self.critic = None
        if config.advantages == "gae":
            critic = start_critic(self.reward_model, self.policy, config.seed, lora)
            self.critic = device.place(critic).train()
        # The policy before any update: a copy, or the policy without its adapter.
        self.reference = adapted(config, self.policy, "policy")
        self.reference = self.reference or frozen(copy.deepcopy(self.policy))
        save_activations(config, self.policy, self.critic)
        if lora is None:
            for scorer in filter(None, (self.reference, self.reward_model)):
                device.lower(scorer)
        self.policy.train()
        readers = [m.backbone for m in (self.reward_model, self.critic) if m is not None]
        context = min(model.context for model in (self.policy, *readers))
        super().__init__(config, tokenizer, context, device.compute_dtype)
        betas, eps = (0.9, 0.95), 1e-6
        self.policy_optimizer = make_optimizer(self.policy, config.lr, betas, eps)
        if self.critic is not None:
            self.critic_optimizer = make_optimizer(self.critic, config.critic_lr, betas, eps)
        self.popart = PopArt(self.critic.head) if config.value_norm == "popart" else None

    def state(self) -> State:
        """What a checkpoint holds. The reference and the reward model never change."""
        modules, optimizers = {"policy": self.policy}, {"policy": self.policy_optimizer}
        if self.critic is not None:
            modules["critic"], optimizers["critic"] = self.critic, self.critic_optimizer
        return State(modules, optimizers, self.counters())

    def collect(self, step: int) -> Answers:
        """The policy's answers to the prompts of this step."""
        self._free_gradients()
        generator = torch_generator(self.config.seed, "rollout", step, device=self.device.device)
        tasks = self.prompts(step)
        return collect(self.policy, tasks, self.tokenizer, self.config, generator, self.context)

    def _free_gradients(self) -> None:
        """The last update's make room for keys and values."""
        for model in (self.policy, self.critic):
            if model is not None:
                model.zero_grad(set_to_none=True)

    def read(self, answers: Answers) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Log-probs, the reference's, and values of the answers; see `score_actions`."""
        return score_actions(
            self.policy, self.reference, self.critic, answers, self.config, self.popart
        )

    def model_scores(self, answers: Answers) -> torch.Tensor:
        """The reward model's scores, (B,) float32."""
        size = self.config.micro_batch or self.config.minibatch
        (scores,) = in_parts(
            lambda *part: (model_scores(self.reward_model, *part),), size,
            answers.tokens, answers.prompt_lengths, answers.response_lengths,
        )  # fmt: skip
        return scores

    def held_out_reward(self, model: nn.Module, most: int = 256) -> float:
        """Mean reward of one answer to each of the data set's held-out prompts."""
        generator = torch_generator(self.config.seed, "held out", device=self.device.device)
        tasks = self.prompts.held[:most]
        answers = collect(model, tasks, self.tokenizer, self.config, generator, self.context)
        return self.score(answers).mean().item()

    def rescale_critic(self, rollout: Rollout) -> None:
        """See `PopArt.update`."""
        self.popart.update(rollout.returns, rollout.value_mask)

    def set_learning_rates(self, policy: float, critic: float) -> None:
        """For the updates that follow."""
        set_learning_rate(self.policy_optimizer, policy)
        if self.critic is not None:
            set_learning_rate(self.critic_optimizer, critic)

    def policy_step(self, batch: Rollout, corpus: torch.Tensor | None, measure: bool) -> dict:
        """One update of the policy, and of the critic where there is one."""
        rows = None if corpus is None else corpus.to(batch.tokens.device)
        if self.critic is None:
            more = pretraining_gradient(self.policy, rows, self.ptx, measure)
            return policy_step(self.policy, batch, self.policy_optimizer, self.settings, more)
        return ppo_ptx_step(
            self.policy, self.critic, batch, rows, self.policy_optimizer, self.critic_optimizer,
            self.settings, self.ptx, self.popart.normalize if self.popart else None, measure,
        )  # fmt: skip

    def critic_step(self, batch: Rollout) -> dict[str, float]:
        """One update of the critic alone."""
        self.critic_optimizer.zero_grad(set_to_none=True)
        normalize = self.popart.normalize if self.popart else None
        stats = critic_backward(self.critic, batch, self.settings, normalize)
        norm = nn.utils.clip_grad_norm_(self.critic.parameters(), self.config.max_grad_norm)
        stats["value_grad_norm"] = norm.item()
        check_finite(stats, "critic warm-up")
        self.critic_optimizer.step()
        return stats


def ppo(config: PPOConfig, kind: type[PPOTrainer] = PPOTrainer) -> Path:
    """Run (or finish) the stage; returns the policy's directory. kind: who samples the answers."""
    check_settings(resolve(config, "ppo"))
    if config.rollout != kind.rollout:
        raise ConfigError(
            "--rollout vllm: the command line starts it (rlhf-course ppo --rollout vllm), or "
            "rlhf_course.distributed.one_process.ppo_vllm."
        )
    device = device_of(config)
    if config.cuda_graphs and device.device.type != "cuda":
        raise ConfigError(f"--cuda-graphs needs a CUDA device, and this runs on {device.device}.")
    announce("ppo", config, device)
    total = config.critic_warmup + config.iterations
    run = Run(config.out, identity(config), total, config.out.name,
              config.overwrite, config.checkpoint_every, config.track)  # fmt: skip
    if complete(run):
        return run.model_dir
    trainer = kind(config, device)
    with run:
        write_report(trainer.prompts.report, run.path)
        for step in run.steps(trainer.state()):
            run.log(step, *trainer.iterate(step))
        summary = {}
        if trainer.prompts.held:
            models = {"before": trainer.reference, "after": trainer.policy}
            for name, model in models.items():
                summary[f"held_out_reward_{name}"] = trainer.held_out_reward(model)
            console.print("held-out prompts: reward {:.3f} → {:.3f}".format(*summary.values()))
        write_adapter_beside(
            run, config, trainer.source,
            lambda folder, base: trainer.policy.save_adapter(folder, base, trainer.tokenizer),
        )  # fmt: skip
        conclude(
            run, Provenance("ppo", config, str(device), *trainer.prompts.provenance()),
            lambda d: trainer.policy.save_pretrained(d, trainer.tokenizer), summary,
            config.kl_target if config.kl_coef else None,
        )  # fmt: skip
    return run.model_dir
