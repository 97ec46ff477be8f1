"""The controller of PPO on a cluster. It holds no model, only what PPO decides.

`stages.ppo_loop.PPOLoop` is the algorithm, the same as on a laptop: prompts, scores, advantages
over all ranks, the KL's price over all episodes, minibatches. Here are the hands: every method
below sends tensors to the cluster's processes and waits for what they say.
"""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rlhf_course.checkpoints import context_of
from rlhf_course.checkpoints import resolve as resolve_model
from rlhf_course.distributed.cluster import Cluster, Group
from rlhf_course.distributed.pipeline import pipeline_step
from rlhf_course.distributed.placement import balanced_chunks
from rlhf_course.distributed.settings import RayPPOConfig
from rlhf_course.distributed.state import ClusterState, Pending
from rlhf_course.huggingface import load_tokenizer
from rlhf_course.ppo_ptx import PopArt
from rlhf_course.progress import console
from rlhf_course.rollout import Rollout
from rlhf_course.sampling import Generation
from rlhf_course.stages.ppo_loop import RATIO_TOLERANCE, PPOLoop
from rlhf_course.stages.rewards import load_reward_function
from rlhf_course.stages.rollouts import (
    Answers,
    Task,
    as_tensors,
    engine_answers,
    engine_correction,
)
from rlhf_course.stages.setup import before
from rlhf_course.training import derive_seed


def models_of(config: RayPPOConfig) -> tuple[Path, Path | None]:
    """Directories of the policy and of the reward model, None where a function gives the score.

    Raises ModelError, before anything is started, where one is not there.
    """
    policy = resolve_model(config.model or before(config, "sft")).absolute()
    if config.reward:
        return policy, None
    return policy, resolve_model(config.reward_model or before(config, "reward_model")).absolute()


class RayTrainer(PPOLoop):
    """PPO with the models on a cluster."""

    def __init__(self, config: RayPPOConfig, cluster: Cluster):
        self.cluster, self.engines_hold = cluster, None
        policy, reward = models_of(config)
        if config.reward:
            self.reward_function = load_reward_function(
                config.reward, config.reward_timeout, config.reward_retries
            )
        context = min(context_of(d) for d in (policy, reward) if d is not None)
        super().__init__(config, load_tokenizer(policy), context)
        self.last = config.critic_warmup + config.iterations - 1
        self.pending = Pending(self.gather)
        self._start(policy, reward)
        if config.value_norm == "popart":
            weight, _ = self.groups["critic"].call("head")[0]
            self.popart = PopArt(nn.Linear(weight.shape[1], 1))

    def _start(self, policy: Path, reward: Path | None) -> None:
        """Bring up every process, and connect the trainer with the engines."""
        config, held = self.config, [*self.prompts.held, *self.prompts.pool]
        longest = max((len(t.tokens) for t in held), default=self.context) + config.max_new_tokens
        self.groups, self.engines = self.cluster.build(str(policy), min(self.context, longest))
        console.print(f"starting {len(self.cluster.named)} processes: half a minute or more")
        gpu = self.cluster.gpus > 0
        self.hybrid = gpu and config.colocate
        if gpu and config.dtype != "float32":
            self.compute_dtype = torch.bfloat16
        futures = [engine.info.remote() for engine in self.engines]
        if self.hybrid:  # one after the other: vLLM measures what its GPU has left when it starts
            self.cluster.wait(futures, "start")
            self._engines("sleep")
        for group in self._distinct():
            address, port = self.cluster.wait([group.actors[0].endpoint.remote()], "start")[0]
            futures += group.start("load", address, port, str(policy), reward and str(reward))
        self.cluster.wait(futures, "start")
        kind = config.channel
        if kind == "auto":
            kind = "gloo" if not gpu else "ipc" if config.colocate else "nccl"
        limit = min(config.timeout, 600.0)
        self.groups["actor"].call("connect", self.engines, kind, config.tensor_parallel, limit)

    def _distinct(self) -> list[Group]:
        """Colocated, all roles are one group."""
        return list(dict.fromkeys(self.groups.values()))

    @property
    def trained(self) -> dict[str, Group]:
        """The groups whose models change."""
        return {role: g for role, g in self.groups.items() if role in ("actor", "critic")}

    def state(self) -> ClusterState:
        """What a checkpoint holds."""
        return ClusterState(self)

    def export(self, folder: Path) -> None:
        """Write the policy as a Hugging Face model."""
        self.groups["actor"].call("export", folder.absolute(), self.tokenizer)

    def counters(self) -> dict:
        """Those of every PPO, and the rollouts that ran ahead."""
        return super().counters() | {"pending": self.pending}

    # ---- one iteration ---------------------------------------------------------------------------

    def iterate(self, step: int) -> tuple[dict, dict]:
        """Rollout, scores, updates, sync, as `pipeline_step` orders them: (metrics, timing)."""
        clock = {"begun": time.perf_counter()}
        if self.engines_hold != step:  # at the start, and when the run goes on after a loss
            self.sync(step)

        def finish(handle) -> dict:
            out = self.gather(handle)
            clock["answered"] = time.perf_counter()
            return out

        def train(step: int, out: dict):
            self._trainers_turn()
            result = self.learn(step, self.answers(self.prompts(step), out))
            clock["trained"] = time.perf_counter()
            return result, out

        (metrics, timing), out = pipeline_step(
            step, self.last, self.pending, self.start, finish, train, self.sync,
            self.config.staleness,
        )  # fmt: skip
        end = time.perf_counter()
        tokens = sum(map(len, out["responses"]))
        metrics["staleness"] = step - out["version"]
        timing = {
            "rollout_seconds": clock["answered"] - clock["begun"], **timing,
            "sync_seconds": end - clock["trained"], "engine_seconds": out["seconds"],
            "generated_tokens_per_second": tokens / out["seconds"],
            "trained_tokens_per_second": tokens * self.config.epochs / timing["update_seconds"],
            "generation_share": (clock["answered"] - clock["begun"]) / (end - clock["begun"]),
            "episodes_per_second": len(out["responses"]) / (end - clock["begun"]),
        }  # fmt: skip
        return metrics, timing

    def start(self, step: int) -> dict:
        """Let the engines begin the answers of this step; returns at once."""
        self._engines_turn()
        return self.ask(self.prompts(step), derive_seed(self.config.seed, "rollout", step))

    def ask(self, tasks: list[Task], seed: int) -> dict:
        """Share the prompts out among the engines; what is returned goes to `gather`."""
        config = self.config
        chunks = balanced_chunks([len(t.tokens) for t in tasks], len(self.engines))
        futures = [
            engine.generate.remote(
                [tasks[i].tokens for i in chunk], config.max_new_tokens, config.temperature,
                self.tokenizer.eos_token_id, seed, self.engines_hold,
            )
            for engine, chunk in zip(self.engines, chunks, strict=True)
        ]  # fmt: skip
        return {"futures": futures, "chunks": chunks}

    def gather(self, handle: dict) -> dict:
        """Wait for the engines; their answers in the order of the prompts."""
        if "futures" not in handle:
            return handle  # here already: it ran ahead, and a checkpoint was made
        parts = self.cluster.wait(handle["futures"], "rollout")
        rows = [i for chunk in handle["chunks"] for i in chunk]
        order = sorted(range(len(rows)), key=rows.__getitem__)
        joined = {key: [x for part in parts for x in part[key]]
                  for key in ("responses", "logprobs", "finished")}  # fmt: skip
        out = {key: [values[i] for i in order] for key, values in joined.items()}
        return out | {"version": parts[0]["version"], "seconds": max(p["seconds"] for p in parts)}

    def answers(self, tasks: list[Task], out: dict) -> Answers:
        """What the engines said, as tensors, their log-probs beside it."""
        return engine_answers(tasks, out, self.tokenizer, "cpu", self.context)

    def sync(self, version: int) -> None:
        """Give the engines the policy's weights."""
        self.pending.settle()  # an engine that still answers would let the trainer wait
        if self.hybrid:
            self._engines("wake", "weights")
        self.engines_hold = None
        self.groups["actor"].call("sync", version)
        self.engines_hold = version
        if self.config.verify_sync:
            self.verify(version)

    def verify(self, version: int) -> None:
        """Raise StaleWeights unless the engines' greedy answers are the trainer's."""
        tasks = self.prompts(0)[: self.config.verify_sync]
        prompts, new = [t.tokens for t in tasks], self.config.max_new_tokens
        self._engines_turn()
        futures = [engine.greedy.remote(prompts, new, version) for engine in self.engines]
        greedy = self.cluster.wait(futures, "greedy")
        self._trainers_turn()
        tolerance = RATIO_TOLERANCE[self.compute_dtype]
        for said in greedy:
            out = Generation(said, [], [False] * len(said))
            answers = as_tensors(tasks, out, self.tokenizer, "cpu", self.context)
            self.groups["actor"].call("verify", answers.tokens, answers.mask, tolerance)

    def _engines_turn(self) -> None:
        """Where both share GPUs: the trainer leaves the memory to the engines."""
        if self.hybrid:
            self._all("offload")
            self._engines("wake")

    def _trainers_turn(self) -> None:
        """And takes it back."""
        if self.hybrid:
            self._engines("sleep")
            self._all("reload")

    def _engines(self, method: str, *args) -> None:
        self.cluster.wait([getattr(e, method).remote(*args) for e in self.engines], method)

    def _all(self, method: str) -> None:
        for group in self._distinct():
            group.call(method)

    # ---- what PPOLoop asks for -------------------------------------------------------------------

    def _score(self, answers: Answers, *roles: str) -> list[Tensor]:
        """What each role says of the answers; separate groups work at the same time."""
        lengths = torch.stack([answers.prompt_lengths, answers.response_lengths], dim=1)
        size, started = self.config.micro_batch or self.config.minibatch, []
        for role in roles:
            group = self.groups[role]
            chunks = group.chunks(lengths.sum(dim=1).tolist(), role)
            passes = -(-max(map(len, chunks)) // size)
            parts = [(role, answers.tokens[c], answers.mask[c], lengths[c], passes) for c in chunks]
            started.append((chunks, group.scatter("score", parts)))
        out = []
        for chunks, futures in started:
            said = self.cluster.wait(futures, "scores")
            whole = torch.empty(len(lengths), *said[0].shape[1:])
            for chunk, part in zip(chunks, said, strict=True):
                whole[chunk] = part
            out.append(whole)
        return out

    def model_scores(self, answers: Answers) -> Tensor:
        """The reward model's scores, (B,) float32."""
        return self._score(answers, "reward")[0]

    def read(self, answers: Answers) -> tuple[Tensor, Tensor, Tensor]:
        """Log-probs, the reference's, and values, (B, T-1) each."""
        roles = ["actor", "reference"] + (["critic"] if "critic" in self.groups else [])
        said = self._score(answers, *roles)
        values = said[2] if len(said) == 3 else torch.zeros_like(said[0])
        if self.popart is not None:
            values = torch.where(answers.mask, self.popart.denormalize(values), 0.0)
        return said[0], said[1], values

    def correct(self, rollout: Rollout, answers: Answers) -> dict[str, float]:
        """How far the engines' probabilities were from the trainer's, and what to do about it."""
        config = self.config
        weights, stats = engine_correction(
            rollout, answers, config.importance, config.importance_low, config.importance_high
        )
        if config.importance != "none":
            rollout.weights = weights
        return stats

    def rescale_critic(self, rollout: Rollout) -> None:
        """See `PopArt.update`: it is done here, on a copy of the head."""
        weight, bias = self.groups["critic"].call("head")[0]
        self.popart.head.load_state_dict({"weight": weight, "bias": bias})
        self.popart.update(rollout.returns, rollout.value_mask)
        head = self.popart.head
        self.groups["critic"].call("set_head", head.weight.detach(), head.bias.detach())

    def set_learning_rates(self, policy: float, critic: float) -> None:
        """They travel with each update."""
        self.rates = {"actor": policy, "critic": critic}

    def _critic_update(self, batch: Rollout) -> list:
        if self.popart is not None:
            values, returns = map(self.popart.normalize, (batch.values, batch.returns))
            batch = replace(batch, values=values, returns=returns)
        group = self.groups["critic"]
        parts = [(p,) for p in self._parts(batch, group, "critic")]
        return group.scatter("update_critic", parts, self.settings, self.rates["critic"])

    def _parts(self, batch: Rollout, group: Group, role: str) -> list[Rollout]:
        chunks = group.chunks(batch.mask.sum(dim=1).tolist(), role)
        return [batch.select(torch.tensor(chunk)) for chunk in chunks]

    def policy_step(self, batch: Rollout, corpus: Tensor | None, measure: bool) -> dict:
        """One update of actor and critic, side by side where they are separate. The norms of the
        two losses' gradients apart (`measure`) are not taken: it would be a second backward pass
        through the shards."""
        group = self.groups["actor"]
        shares: list[Tensor | None] = [None] * len(group)  # with few rows, some ranks get none
        if corpus is not None:
            chunks = group.chunks([1] * max(len(corpus), len(group)), "actor")
            held = [[i for i in chunk if i < len(corpus)] for chunk in chunks]
            shares = [corpus[c] if c else None for c in held]
        parts = list(zip(self._parts(batch, group, "actor"), shares, strict=True))
        args = self.settings, self.ptx, self.rates["actor"]
        futures = [group.scatter("update_actor", parts, *args)]
        futures += [self._critic_update(batch)] if "critic" in self.groups else []
        stats: dict[str, float] = {}
        for started in futures:
            stats |= self.cluster.wait(started, "update")[0]
        return stats

    def critic_step(self, batch: Rollout) -> dict[str, float]:
        """One update of the critic alone."""
        return self.cluster.wait(self._critic_update(batch), "update of the critic")[0]

    def held_out_reward(self, most: int = 256) -> float:
        """Mean reward of one answer to each of the data set's held-out prompts."""
        if self.engines_hold != self.last + 1:  # the run had ended before, and goes on from there
            self.sync(self.last + 1)
        held, config = self.prompts.held[:most], self.config
        least = max(len(self.engines), config.reward_ranks)  # each of them must get one
        tasks = held + held[:1] * (least - len(held))
        self._engines_turn()
        out = self.gather(self.ask(tasks, derive_seed(config.seed, "held out")))
        self._trainers_turn()
        return self.score(self.answers(tasks, out))[: len(held)].mean().item()
