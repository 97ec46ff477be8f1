"""One process of the cluster that trains and scores: a rank, with the models of one or more roles.

A role's group of ranks shares its model out by ZeRO. Separate roles have groups of their own;
colocated, one process holds a rank of every role (verl's hybrid engine does so too), and they take
turns. The mathematics are those of the laptop: `ppo.policy_terms`, `rollout.action_logprobs` …
"""

from __future__ import annotations

import copy
import socket
from collections.abc import Callable
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from rlhf_course import checkpoints
from rlhf_course.distributed.channels import Call, make_channel
from rlhf_course.distributed.engine import verify_greedy
from rlhf_course.distributed.settings import RayPPOConfig, deepspeed_file
from rlhf_course.distributed.updates import update_critic, update_policy
from rlhf_course.distributed.weight_sync import sync_weights
from rlhf_course.distributed.zero import ZeroModel, ZeroSettings, join
from rlhf_course.gpt import GPT
from rlhf_course.gpt2_format import huggingface_tensor
from rlhf_course.huggingface import HuggingFaceLM
from rlhf_course.ppo_ptx import PTXSettings
from rlhf_course.rollout import PPOSettings, Rollout, action_logprobs, action_values
from rlhf_course.runs import read_tensors
from rlhf_course.stages.rewards import model_scores
from rlhf_course.stages.setup import (
    device_of,
    frozen,
    load_policy,
    load_reward_model,
    start_critic,
)

BETAS = (0.9, 0.95)


def zero_settings(config: RayPPOConfig, bf16: bool) -> ZeroSettings:
    """What the flags say of DeepSpeed. Raises ConfigError for what contradicts itself."""
    return ZeroSettings(
        config.zero_stage, config.offload, bf16, config.max_grad_norm,
        config.gradient_checkpointing, config.autotp, config.deepcompile, deepspeed_file(config),
    )  # fmt: skip


def equal_parts(count: int, parts: int) -> list[Tensor]:
    """0 … count-1 in exactly `parts` pieces; where they do not suffice a piece is row 0 again.

    Every rank has to make as many forward passes as the others, or ZeRO-3's gathers never end.
    """
    return [p if len(p) else torch.zeros(1).long() for p in torch.arange(count).tensor_split(parts)]


class Worker:
    """A rank. Ray makes an actor of it; `load` first, then anything."""

    def __init__(self, rank: int, world: int, roles: tuple[str, ...], config: RayPPOConfig):
        self.rank, self.world, self.roles, self.config = rank, world, roles, config
        self.models: dict[str, ZeroModel] = {}
        self.channel = None

    def endpoint(self) -> tuple[str, int]:
        """(address, free port) of this process's machine, for the group's meeting."""
        import ray

        with closing(socket.socket()) as probe:
            probe.bind(("", 0))
            return ray.util.get_node_ip_address(), probe.getsockname()[1]

    def load(self, address: str, port: int, policy: str, reward: str | None) -> None:
        """Meet the other ranks, load the models of this process's roles, and share them out.

        policy, reward: directories or hub names.
        """
        config = self.config
        device = device_of(config)
        host = replace(device, device=torch.device("cpu"))  # its GPU sees no more than its share
        join(self.rank, self.world, address, port, device.device.type, config.timeout)
        bf16 = device.device.type == "cuda" and config.dtype != "float32"
        settings = zero_settings(config, bf16)
        language_model, tokenizer = load_policy(policy, host)
        if isinstance(language_model, HuggingFaceLM):  # the engines draw from every row's logit
            language_model.written = language_model.vocab_size
        scorer = load_reward_model(reward, tokenizer, host) if reward else None
        made: dict[str, Callable[[], torch.nn.Module]] = {
            "actor": lambda: copy.deepcopy(language_model).train(),
            "reference": lambda: frozen(copy.deepcopy(language_model)),
            "critic": lambda: host.place(start_critic(scorer, language_model, config.seed)),
            "reward": lambda: scorer,
        }
        for role in self.roles:
            model = made[role]()
            for module in model.modules():
                if bf16 and hasattr(module, "compute_dtype"):
                    module.compute_dtype = None  # the parameters themselves are bf16
            trained = role in ("actor", "critic")
            how = settings if trained else replace(settings, autotp=1, deepcompile=False)
            self.models[role] = ZeroModel(model, how, BETAS if trained else None)

    # ---- scores ----------------------------------------------------------------------------------

    def score(
        self, role: str, tokens: Tensor, mask: Tensor, lengths: Tensor, passes: int
    ) -> Tensor:
        """What a role says of these rows, on the CPU, in `passes` forward passes on every rank.

        tokens (B, T), mask (B, T-1), lengths (B, 2): of prompts and responses -> (B, T-1), 0
        outside the mask: log-probs of actor or reference, values of the critic; or (B,): rewards.
        """
        model, temperature = self.models[role], self.config.temperature

        def read(module: torch.nn.Module, rows: Tensor) -> Tensor:
            t, m = tokens[rows].to(model.device), mask[rows].to(model.device)
            if role == "reward":
                return model_scores(module, t, *lengths[rows].to(model.device).unbind(dim=1))
            if role == "critic":
                return action_values(module, t, m)
            return action_logprobs(module, t, m, temperature)[0]

        with torch.no_grad():
            parts = [model(read, rows).float().cpu() for rows in equal_parts(len(tokens), passes)]
        return torch.cat(parts)[: len(tokens)]

    def verify(self, tokens: Tensor, mask: Tensor, tolerance: float) -> None:
        """Raise StaleWeights unless the masked tokens, an engine's greedy ones, are the actor's,
        or within `tolerance` nats of them."""
        actor = self.models["actor"]
        tokens, mask = tokens.to(actor.device), mask.to(actor.device)
        with torch.no_grad():
            verify_greedy(actor(lambda model: model(tokens)), tokens, mask, tolerance)

    # ---- updates ---------------------------------------------------------------------------------

    def update_actor(
        self,
        part: Rollout,
        corpus: Tensor | None,
        settings: PPOSettings,
        ptx: PTXSettings,
        lr: float,
    ) -> dict[str, float]:
        """This rank's share of one update of the policy; diagnostics of the whole of it."""
        actor = self.models["actor"]
        part, rows = part.to(actor.device), None if corpus is None else corpus.to(actor.device)
        return update_policy(actor, part, rows, settings, ptx, lr, actor.group)

    def update_critic(self, part: Rollout, settings: PPOSettings, lr: float) -> dict[str, float]:
        """This rank's share of one update of the critic, whose targets are normalised already."""
        critic = self.models["critic"]
        return update_critic(critic, part.to(critic.device), settings, lr, critic.group)

    def head(self) -> tuple[Tensor, Tensor]:
        """Weight and bias of the critic's head, whole and in fp32."""
        critic = self.models["critic"]
        return critic.master("head.weight").cpu(), critic.master("head.bias").cpu()

    def set_head(self, weight: Tensor, bias: Tensor) -> None:
        """Put them back, PopArt's rescaling done."""
        self.models["critic"].set_parameters({"head.weight": weight, "head.bias": bias})

    # ---- weights and checkpoints -----------------------------------------------------------------

    def connect(self, engines: list, kind: str, tensor_parallel: int, timeout: float) -> None:
        """Meet the rollout engines, whose actors are given to the leading rank."""
        if self.rank == 0 or kind == "ipc":
            calls = [ray_call(engine, timeout) for engine in engines]
            self.channel = make_channel(
                kind, calls, tensor_parallel=tensor_parallel, host=self.endpoint()[0],
                timeout_s=timeout, group=self.models["actor"].group if kind == "ipc" else None,
            )  # fmt: skip

    def sync(self, version: int) -> int:
        """Send the policy's weights to the engines; returns the number of tensors."""
        return sync_weights(self._huggingface_parameters(), version, self.channel)

    def _huggingface_parameters(self):
        """(Hugging Face's name, gathering function) of every parameter of the policy."""
        actor = self.models["actor"]
        ours = isinstance(actor.model, GPT)
        for name, gather in actor.parameters_whole():
            if ours:
                their_name, _ = huggingface_tensor(name, torch.empty(0, 0))
                yield their_name, lambda n=name, g=gather: huggingface_tensor(n, g())[1]
            else:
                yield name.removeprefix("model."), gather

    def save(self, folder: Path) -> None:
        """Write weights and optimizers of actor and critic, ROLE.safetensors each."""
        for role in ("actor", "critic"):
            if role in self.models:
                tensors = self.models[role].state_tensors(role)
                if self.rank == 0:
                    save_file(tensors, folder / f"{role}.safetensors")

    def restore(self, folder: Path) -> None:
        """Read what `save` wrote, on any number of ranks. Raises CheckpointError."""
        for role in ("actor", "critic"):
            if role in self.models:
                tensors = None
                if self.rank == 0:
                    tensors = read_tensors(folder / f"{role}.safetensors")
                self.models[role].load_state(role, tensors)

    def export(self, folder: Path, tokenizer) -> None:
        """Write the policy as a Hugging Face model; the leading rank does."""
        tensors = {n: g().cpu() for n, g in self._huggingface_parameters()}
        if self.rank:
            return
        model = self.models["actor"].model
        special = checkpoints.write_tokenizer(folder, tokenizer)
        if isinstance(model, GPT):
            checkpoints.write_model(folder, model.to_huggingface()[1] | special, tensors)
        else:
            model.model.save_pretrained(folder, state_dict=tensors, safe_serialization=True)

    def offload(self) -> None:
        """Leave the GPU to the engines."""
        for model in self.models.values():
            model.offload()

    def reload(self) -> None:
        """Come back."""
        for model in self.models.values():
            model.reload()


def ray_call(engine, timeout: float) -> Call:
    """An engine's actor as `channels` calls it."""
    import ray

    def call(method: str, *args):
        future = getattr(engine, method).remote(*args)
        return lambda: ray.get(future, timeout=timeout)

    return call
