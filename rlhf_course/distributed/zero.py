"""One model under DeepSpeed ZeRO, behind the few methods that a training worker needs.

ZeRO (Rajbhandari et al. 2020) is data parallelism without copies. Stage 1 shares the optimizer's
state out over the ranks, stage 2 the gradients too, stage 3 the parameters as well: there a layer
is whole only while it computes. The numbers stay those of one process; see `updates.py`.

Every rank calls the same methods in the same order: those that came wait for the others.

Tested by `pytest tests/test_zero.py`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from rlhf_course.distributed.shares import Shares
from rlhf_course.errors import ConfigError, TrainingError
from rlhf_course.gpt import GPT
from rlhf_course.recompute import checkpoint_blocks
from rlhf_course.training import make_optimizer, set_learning_rate


def join(
    rank: int, world: int, address: str, port: int, device: str = "cpu", timeout_s: float = 600
) -> None:
    """Make this process rank `rank` of `world`, which all meet at address:port. Once in a process.

    device: "cpu" (gloo) or "cuda" (NCCL, on the first GPU that the process sees). Where a rank does
    not enter a collective within `timeout_s`, it raises in the others.
    """
    meeting = {"RANK": rank, "LOCAL_RANK": 0, "WORLD_SIZE": world, "MASTER_PORT": port}
    os.environ.update({key: str(value) for key, value in meeting.items()})
    os.environ.update(MASTER_ADDR=address, DS_ACCELERATOR=device)
    import deepspeed
    import deepspeed.ops

    if device == "cpu":
        # It would compile shared-memory collectives for minutes at its first start; gloo serves.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        torch.set_num_threads(1)
    backend = "gloo" if device == "cpu" else "nccl"
    deepspeed.init_distributed(backend, False, verbose=False, timeout=timedelta(seconds=timeout_s))


@dataclass(frozen=True)
class ZeroSettings:
    """How a model is shared out over the ranks."""

    stage: int = 3  # see above
    offload: str = "none"  # to the host's memory: "none", "optimizer", "parameters" (both)
    bf16: bool = False  # compute and communicate in bf16, beside fp32 master weights; else fp32
    max_grad_norm: float = 1.0  # gradients longer than this are shortened to it
    gradient_checkpointing: bool = False  # compute blocks again instead of keeping activations
    autotp: int = 1  # ranks that share each matrix (DeepSpeed's AutoTP), given the same data
    deepcompile: bool = False  # DeepSpeed's compiler, on CUDA alone
    extra: dict[str, Any] = field(default_factory=dict)  # into DeepSpeed's configuration, last


def deepspeed_config(settings: ZeroSettings) -> dict[str, Any]:
    """DeepSpeed's configuration. Raises ConfigError for settings that contradict each other."""
    stage, offload = settings.stage, settings.offload
    if stage not in (1, 2, 3) or offload not in ("none", "optimizer", "parameters"):
        raise ConfigError(f"ZeRO stage {stage}, offload {offload!r}: choose stage 1, 2 or 3, and "
                          "offload none, optimizer or parameters.")  # fmt: skip
    if offload == "parameters" and stage < 3:
        raise ConfigError(f"ZeRO stage {stage} holds whole parameters and cannot offload them: "
                          "choose stage 3, or offload the optimizer.")  # fmt: skip
    if settings.autotp > 1 and settings.deepcompile:
        raise ConfigError("AutoTP and DeepCompile do not go together: choose one of them.")
    zero: dict[str, Any] = {"stage": stage, "reduce_bucket_size": 1 << 24}  # numbers, not bytes
    if stage == 3:
        # DeepSpeed's default holds parameters of up to 100,000 numbers whole on every rank.
        zero |= {"stage3_param_persistence_threshold": 0, "stage3_prefetch_bucket_size": 1 << 24}
    if offload != "none":
        zero["offload_optimizer"] = {"device": "cpu"}
    if offload == "parameters":
        zero["offload_param"] = {"device": "cpu"}
    config = {
        # `backward` is told which call is an update's last, and the losses count the tokens.
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1,
        "gradient_clipping": settings.max_grad_norm, "bf16": {"enabled": settings.bf16},
        "zero_optimization": zero, "steps_per_print": 1 << 62,
        "zero_force_ds_cpu_optimizer": False,  # it is compiled at its first use; torch's serves
    }  # fmt: skip
    if settings.autotp > 1:
        config["tensor_parallel"] = {"autotp_size": settings.autotp}
    if settings.deepcompile:
        config["compile"] = {"deepcompile": True}
    return _merged(config, settings.extra)


def _merged(base: dict, more: Mapping) -> dict:
    """`more` over `base`, and so for the dictionaries inside."""
    inside = {k: _merged(base[k], v) for k, v in more.items() if isinstance(base.get(k), dict)}
    return {**base, **more, **inside}


class _Job(nn.Module):
    """The model as the engine knows it; its forward pass is whatever is to be computed.

    Ours compute through several methods, and `unembed` reads the weight of another module.
    DeepSpeed gathers what is touched inside engine.forward alone.
    """

    def __init__(self, model: nn.Module):
        super().__init__()
        self.model, self.compute = model, None

    def forward(self) -> Any:
        return self.compute()


class ZeroModel(Shares):
    """A model of ours, shared out over the ranks that called `join`.

    model: GPT, HuggingFaceLM or ScalarModel, the same on every rank, whole until now; it is taken
    over. betas None: for inference alone, shared out as by stage 3, without an optimizer.
    """

    def __init__(self, model: nn.Module, settings: ZeroSettings, betas=None, eps: float = 1e-6):
        import deepspeed

        if settings.autotp > 1 and any(isinstance(module, GPT) for module in model.modules()):
            raise ConfigError("AutoTP cuts transformers' models and not our own GPT: leave it out.")
        if settings.deepcompile and not torch.cuda.is_available():
            raise ConfigError("DeepCompile needs a CUDA device: leave it out.")
        if betas is None:
            settings = replace(settings, stage=3)
            model.requires_grad_(False)
        optimizer = make_optimizer(model, 0.0, betas, eps) if betas else None
        super().__init__(model, settings.stage, optimizer)
        if settings.gradient_checkpointing:
            checkpoint_blocks(model)
        config, job = deepspeed_config(settings), _Job(model)
        self.start(deepspeed.initialize(model=job, optimizer=optimizer, config=config)[0])
        if settings.deepcompile:
            self.engine.compile()
        self.engine.train(betas is not None)

    def __call__(self, function: Callable, *args: Any) -> Any:
        """function(model, *args), every parameter that it touches gathered and freed again. A loss
        among the tensors that it returns, in tuples or dicts, may be given to `backward`."""
        job = self.engine.module
        job.compute = partial(function, self.model, *args)
        try:
            return self.engine()
        finally:
            job.compute = None

    def backward(self, loss: Tensor, last: bool) -> None:
        """Add the gradient of `loss`, averaged over the ranks, to those since the last step; they
        are not divided by their number. last: `step` comes next. As many calls on every rank."""
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)
        self.note_gradients()

    def step(self, lr: float) -> float:
        """Clip and update; returns the norm of the whole gradient before clipping.

        Raises TrainingError on all ranks when it is not finite; nothing is updated then.
        """
        set_learning_rate(self.zero, lr)
        self.engine.step()
        if not self.engine.was_step_applied():
            raise TrainingError(
                "a gradient is NaN or infinite. Nothing was updated in this step, and the last "
                "checkpoint is good: lower the learning rate (--lr) or the largest gradient norm "
                "(--max-grad-norm), and look at the data of this step."
            )
        return float(self.engine.get_global_grad_norm())
