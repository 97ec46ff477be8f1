"""Processes on a Ray cluster: placed together, watched while they work, and gone afterwards.

Nothing is ever repaired in place. When a process dies, or does not answer in time, every wait in
progress ends with `WorkerLost`; the controller then clears the cluster and builds it anew from the
last checkpoint. So no survivor goes on with a peer's half-finished collective or half-sent weights.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rlhf_course.distributed.engine import engine_environment
from rlhf_course.distributed.placement import balanced_chunks, place
from rlhf_course.distributed.settings import RayPPOConfig
from rlhf_course.errors import ConfigError, CourseError, TrainingError

POLL = 1.0
"""Seconds between two looks at whether all processes are alive."""
PACKAGE = str(Path(__file__).parents[2])


class WorkerLost(TrainingError):
    """A process of the cluster died or did not answer; the run can go on from its checkpoint."""


class Group:
    """The ranks of a role (or, colocated, of all), called together."""

    def __init__(self, cluster: Cluster, actors: list, roles: tuple[str, ...]):
        self.cluster, self.actors, self.roles = cluster, actors, roles

    def __len__(self) -> int:
        return len(self.actors)

    def start(self, method: str, *args) -> list:
        """Call a method on all ranks; returns the futures."""
        return [getattr(actor, method).remote(*args) for actor in self.actors]

    def scatter(self, method: str, parts: Sequence[tuple], *args) -> list:
        """Rank r is called with parts[r] and then `args`; returns the futures."""
        pairs = zip(self.actors, parts, strict=True)
        return [getattr(actor, method).remote(*part, *args) for actor, part in pairs]

    def call(self, method: str, *args) -> list:
        """Call all ranks and wait; returns what each returned."""
        return self.cluster.wait(self.start(method, *args), method)

    def chunks(self, lengths: Sequence[int], role: str) -> list[list[int]]:
        """Which rows go to which rank. Ranks that share their matrices out by AutoTP, which only
        models in training do, get the same."""
        alike = self.cluster.config.autotp if role in ("actor", "critic") else 1
        parts = balanced_chunks(lengths, len(self.actors) // alike)
        return [part for part in parts for _ in range(alike)]


class Cluster:
    """A connection to Ray, and the processes started through it. Use as a context manager."""

    def __init__(self, config: RayPPOConfig, roles: Sequence[str]):
        """roles: those that are needed, of actor, critic, reference and reward."""
        self.config, self.roles = config, tuple(roles)
        self.named: dict[str, Any] = {}
        self.placement = None

    def __enter__(self) -> Cluster:
        import ray

        # The last is 15 by default: any other program on the machine starves the whole cluster.
        for name in ("RAY_USAGE_STATS_ENABLED", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO",
                     "RAY_worker_niceness"):  # fmt: skip
            os.environ.setdefault(name, "0")
        for again in (True, False):  # on a busy machine its processes may take too long to start
            try:
                self._connect()
                break
            except Exception as error:
                ray.shutdown()
                if again and not self.config.ray_address:
                    continue
                where = self.config.ray_address or "this machine"
                raise ConfigError(
                    f"Ray does not start on {where}: {str(error).splitlines()[0]} With "
                    "--ray-address, see whether that cluster runs (ray status); without, whether "
                    "other programs take all cores or memory."
                ) from error
        self.gpus = int(ray.cluster_resources().get("GPU", 0))
        return self

    def _connect(self) -> None:
        import ray

        common = {"log_to_driver": False, "logging_level": "error"}
        if self.config.ray_address:
            _require_listener(self.config.ray_address)
            ray.init(self.config.ray_address, **common)
        else:  # CPUs are counted, not measured: as many as there are processes
            ray.init("local", num_cpus=self._processes(), object_store_memory=1 << 28,
                     include_dashboard=False, **common)  # fmt: skip

    def __exit__(self, *_) -> None:
        import ray

        self.clear()
        ray.shutdown()

    def _processes(self) -> int:
        ranks = [getattr(self.config, f"{role}_ranks") for role in self.roles]
        own = max(ranks) if self.config.colocate else sum(ranks)
        return own + self.config.engines * self.config.tensor_parallel

    # ---- start -----------------------------------------------------------------------------------

    def build(self, policy_dir: str, context: int) -> tuple[dict[str, Group], list]:
        """Reserve the bundles and start every process; returns (role -> group, engines)."""
        config = self.config
        ranks = {role: getattr(config, f"{role}_ranks") for role in self.roles}
        per_node = config.gpus_per_node if self.gpus else 0
        bundles = place(ranks | {"rollout": config.engines}, per_node, config.colocate,
                        config.tensor_parallel)  # fmt: skip
        self._reserve(bundles)
        groups = {}
        for roles in [self.roles] if config.colocate else [(role,) for role in self.roles]:
            actors = [
                self._worker(r, ranks[roles[0]], roles, bundles) for r in range(ranks[roles[0]])
            ]
            groups |= dict.fromkeys(roles, Group(self, actors, roles))
        engines = [self._engine(i, policy_dir, context, bundles) for i in range(config.engines)]
        return groups, engines

    def _reserve(self, bundles: list[dict]) -> None:
        """All bundles or none. Ray fills node after node, as `place` does, where nodes are empty;
        on nodes partly taken by others an engine's ranks may come to stand on two of them."""
        import ray
        from ray.util.placement_group import placement_group

        self.placement = placement_group([b["resources"] for b in bundles], strategy="PACK")
        if not self.placement.wait(min(self.config.timeout, 60)):
            kind, free = "GPU" if self.gpus else "CPU", ray.available_resources()
            raise ConfigError(
                f"the cluster has no room for {len(bundles)} {kind}s; {free.get(kind, 0):g} of "
                f"{ray.cluster_resources().get(kind, 0):g} are free. Ask for fewer ranks or "
                "engines, or wait."
            )

    def _options(self, bundle: int, share: float, environment: dict[str, str]) -> dict:
        """Where a process sits, what it takes of its bundle, and its environment."""
        from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

        path = os.pathsep.join(p for p in (PACKAGE, os.environ.get("PYTHONPATH", "")) if p)
        common = {"PYTHONPATH": path, "PYTHONWARNINGS": "ignore", "OMP_NUM_THREADS": "1"}
        return {
            "num_cpus": share, "num_gpus": share if self.gpus else 0, "max_restarts": 0,
            "scheduling_strategy": PlacementGroupSchedulingStrategy(self.placement, bundle),
            "runtime_env": {"env_vars": common | environment},
        }  # fmt: skip

    def _worker(self, rank: int, world: int, roles: tuple[str, ...], bundles: list[dict]):
        import ray

        from rlhf_course.distributed.worker import Worker

        index = next(i for i, b in enumerate(bundles) if b["ranks"].get(roles[0]) == rank)
        share = _share(bundles[index]["share"] * len(roles))
        options = self._options(index, share, {"DS_ACCELERATOR": "cuda" if self.gpus else "cpu"})
        actor = ray.remote(Worker).options(**options).remote(rank, world, roles, self.config)
        self.named["/".join(roles) + f" rank {rank}"] = actor
        return actor

    def _engine(self, number: int, policy_dir: str, context: int, bundles: list[dict]):
        import ray

        from rlhf_course.distributed.engine import RolloutEngine
        from rlhf_course.training import derive_seed

        config, size = self.config, self.config.tensor_parallel
        at = [i for i, b in enumerate(bundles) if b["ranks"].get("rollout", -1) // size == number]
        share = _share(bundles[at[0]]["share"])
        environment = engine_environment("cuda" if self.gpus else "cpu")
        if size > 1 and self.gpus:  # vLLM starts a process in each of these bundles
            environment |= {"VLLM_RAY_PER_WORKER_GPUS": str(share),
                            "VLLM_RAY_BUNDLE_INDICES": ",".join(map(str, at))}  # fmt: skip
            share = 0
        engine = ray.remote(RolloutEngine).options(**self._options(at[0], share, environment))
        engine = engine.remote(
            policy_dir, max_model_len=context, seed=derive_seed(config.seed, "engine", number),
            dtype="bfloat16" if self.gpus and config.dtype != "float32" else "float32",
            tensor_parallel=size, gpu_memory_utilization=config.gpu_memory_utilization,
            sleep=config.colocate, max_num_seqs=min(config.batch, 256),
        )  # fmt: skip
        self.named[f"engine {number}"] = engine
        return engine

    # ---- watch -----------------------------------------------------------------------------------

    def wait(self, futures: Sequence, what: str) -> list:
        """The futures' results, in order. Raises WorkerLost as soon as any process has died,
        whether or not it was asked, or when `timeout` has passed; a CourseError of theirs as it is.
        """
        import ray

        pending, deadline = list(futures), time.monotonic() + self.config.timeout
        while pending:
            ready, pending = ray.wait(pending, num_returns=len(pending), timeout=POLL)
            try:
                ray.get(ready)
            except ray.exceptions.RayActorError as error:
                raise self._lost(what, error) from error
            except ray.exceptions.RayTaskError as error:
                # A survivor's complaint about a peer that is gone is no mistake of its own.
                if self.dead(patience=5.0):
                    raise self._lost(what) from error
                raise (error.cause if isinstance(error.cause, CourseError) else error) from None
            if pending and self.dead():
                raise self._lost(what, self._first_error(pending))
            if pending and time.monotonic() > deadline:
                raise WorkerLost(
                    f"{what}: no answer within {self.config.timeout:g} s. If it works on something "
                    "large, give more seconds (--timeout)."
                )
        return ray.get(list(futures))

    @staticmethod
    def _first_error(futures: Sequence) -> Exception | None:
        """What the calls to a dead process say of its end."""
        import ray

        ready, _ = ray.wait(list(futures), num_returns=len(futures), timeout=2.0)
        for future in ready:
            try:
                ray.get(future)
            except ray.exceptions.RayActorError as error:
                return error
            except ray.exceptions.RayError:
                continue
        return None

    def _lost(self, what: str, error: Exception | None = None) -> TrainingError:
        who = ", ".join(self.dead(patience=2.0)) or "a process"
        if getattr(error, "_actor_init_failed", False):  # it would fail again
            return TrainingError(f"{who} does not start: {str(error).strip().splitlines()[-1]}")
        return WorkerLost(
            f"{who} died ({what}). Out of memory, or killed from outside? Where it happens again, "
            "look at the machine's log; a smaller --micro-batch or more ranks need less memory."
        )

    def dead(self, patience: float = 0.0) -> list[str]:
        """The names of processes that are gone, looked for during `patience` seconds."""
        from ray._private.state import state  # what `ray list actors` shows, without a dashboard

        until = time.monotonic() + patience
        while True:
            gone = [name for name, actor in self.named.items()
                    if state.actor_table(actor._actor_id.hex()).get("State") == "DEAD"]  # fmt: skip
            if gone or time.monotonic() >= until:
                return gone
            time.sleep(0.2)

    def clear(self) -> None:
        """End every process and free its bundle."""
        import ray
        from ray.util.placement_group import remove_placement_group

        for actor in self.named.values():
            with contextlib.suppress(Exception):
                ray.kill(actor)
        if self.placement is not None:
            with contextlib.suppress(Exception):
                remove_placement_group(self.placement)
        self.named, self.placement = {}, None


def _share(share: float) -> float:
    """Rounded down, since Ray counts in ten-thousandths and all shares of a bundle must fit."""
    return int(share * 1000 + 1e-6) / 1000


def _require_listener(address: str) -> None:
    """Raise OSError where nobody listens at "host:port": Ray itself would try for minutes."""
    host, _, port = address.removeprefix("ray://").rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host, int(port)), timeout=10).close()
