"""`rlhf-course ppo-ray`: PPO-ptx on Ray, vLLM and DeepSpeed.

    rlhf-course ppo-ray --size small                          on this machine, CPUs suffice
    rlhf-course ppo-ray --ray-address auto --actor-ranks 8    on a cluster that is there

The flags are those of `ppo`, and the cluster's. Killed or broken anywhere, the run goes on from its
last checkpoint: by itself where a process of the cluster was lost, by the same command otherwise.
"""

from __future__ import annotations

from pathlib import Path

from rlhf_course.distributed.cluster import Cluster, WorkerLost
from rlhf_course.distributed.controller import RayTrainer, models_of
from rlhf_course.distributed.settings import (
    NOT_IDENTITY,
    RayPPOConfig,
    check_cluster,
    check_devices,
)
from rlhf_course.errors import ConfigError
from rlhf_course.planning.doctor import distributed_missing
from rlhf_course.progress import console
from rlhf_course.runs import Run
from rlhf_course.stages.cards import Provenance
from rlhf_course.stages.checks import check_settings
from rlhf_course.stages.loading import write_report
from rlhf_course.stages.presets import identity, resolve, workspace
from rlhf_course.stages.setup import complete, conclude


def announce_cluster(config: RayPPOConfig, cluster: Cluster) -> None:
    """Two lines saying what begins, where, and into which folder."""
    where = f"{cluster.gpus} GPUs" if cluster.gpus else "CPU"
    how = "colocated" if config.colocate else "separate"
    console.print(f"[bold]ppo-ray[/bold]  {where}, {how}  →  {config.out}", soft_wrap=True)
    ranks = ", ".join(f"{role} {getattr(config, role + '_ranks')}" for role in cluster.roles)
    console.print(f"ranks: {ranks}; engines: {config.engines}; ZeRO-{config.zero_stage}")


def ppo_ray(config: RayPPOConfig) -> Path:
    """Run (or finish) the stage on a cluster; returns the policy's directory."""
    if missing := distributed_missing():
        raise ConfigError(missing)
    config.out = config.out or workspace(config) / "ppo_ray"
    check_settings(resolve(config, "ppo"))
    check_cluster(config)
    kept = {k: v for k, v in identity(config).items() if k not in NOT_IDENTITY}
    total = config.critic_warmup + config.iterations
    run = Run(config.out, kept, total, config.out.name,
              config.overwrite, config.checkpoint_every, config.track)  # fmt: skip
    if complete(run):
        return run.model_dir
    models_of(config)
    roles = ["actor", "reference"] + ["critic"] * (config.advantages == "gae")
    roles += ["reward"] * (not config.reward)
    with Cluster(config, roles) as cluster:
        check_devices(config, cluster.gpus)
        announce_cluster(config, cluster)
        trainer = RayTrainer(config, cluster)
        with run:
            write_report(trainer.prompts.report, run.path)
            _train(run, trainer, cluster)
    return run.model_dir


def _finish(run: Run, trainer: RayTrainer) -> None:
    """Behind the last iteration: the held-out reward, the curves and the model."""
    summary, config = {}, trainer.config
    if trainer.prompts.held:
        summary["held_out_reward_after"] = trainer.held_out_reward()
    kl_target = config.kl_target if config.kl_coef else None
    where = f"{trainer.cluster.gpus} GPUs" if trainer.cluster.gpus else "CPU"
    made = Provenance("ppo", config, f"a Ray cluster, {where}", *trainer.prompts.provenance())
    conclude(run, made, trainer.export, summary, kl_target)


def _train(run: Run, trainer: RayTrainer | None, cluster: Cluster) -> None:
    """To the end. Where a process is lost, everything is built anew from the last checkpoint.
    Raises WorkerLost when it happens too often."""
    for attempt in range(cluster.config.restarts + 1):
        try:
            trainer = trainer or RayTrainer(cluster.config, cluster)
            for step in run.steps(trainer.state()):
                run.log(step, *trainer.iterate(step))
            return _finish(run, trainer)
        except WorkerLost as lost:
            trainer = None
            cluster.clear()
            if attempt == cluster.config.restarts:
                raise
            said = f"[yellow]{lost}[/yellow] Starting anew from the last checkpoint."
            console.print(said, soft_wrap=True)
    raise AssertionError("unreachable")
