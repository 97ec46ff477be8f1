"""What every training stage shares: seeds, optimiser, learning-rate schedules.

Nothing here knows what is trained. The run folder (checkpoints, metrics, progress) is `runs.py`.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from rlhf_course.choices import Schedule
from rlhf_course.errors import ConfigError


def derive_seed(seed: int, *purpose: str | int) -> int:
    """A seed (63 bits) for one purpose, such as derive_seed(0, "rollout", iteration).

    Every random draw of a stage comes from a generator seeded so. Nothing random is carried from
    step to step, hence a resumed run draws what the interrupted one would have drawn.
    """
    text = "/".join(map(str, (seed, *purpose)))
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") >> 1


def torch_generator(seed: int, *purpose: str | int, device="cpu") -> torch.Generator:
    """A torch generator for one purpose; see `derive_seed`."""
    return torch.Generator(device).manual_seed(derive_seed(seed, *purpose))


def shuffled(count: int, seed: int, *purpose: str | int) -> list[int]:
    """0 … count-1 in a random order that depends on the purpose alone."""
    return torch.randperm(count, generator=torch_generator(seed, *purpose)).tolist()


def epoch_batch(count: int, batch: int, step: int, seed: int, purpose: str) -> list[int]:
    """The indices of batch number `step`, over as many reshuffled epochs as it takes.

    A function of `step` alone: the data loader has no state to save. In an epoch every index
    comes once at most: the count % batch that fill no batch are left out, others in each epoch.
    """
    per_epoch = max(count // batch, 1)
    epoch, position = divmod(step, per_epoch)
    order = shuffled(count, seed, purpose, "epoch", epoch)
    return order[position * batch : (position + 1) * batch]


def make_optimizer(
    module: nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.95),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
) -> torch.optim.AdamW:
    """AdamW (Loshchilov & Hutter 2019); only matrices decay, never biases or norms.

    The fused form updates all parameters in one call, on a GPU and on a CPU.
    """
    trained = [p for p in module.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in trained if p.dim() >= 2], "weight_decay": weight_decay},
        {"params": [p for p in trained if p.dim() < 2], "weight_decay": 0.0},
    ]
    fused = trained[0].device.type in ("cpu", "cuda")
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, fused=fused)


def tensorflow_eps(eps: float, beta2: float, step: int) -> float:
    """The PyTorch epsilon that makes step number `step` (1, 2, …) equal TensorFlow 1's Adam.

    PyTorch: m̂ / (√v / √(1-β₂ᵗ) + ε). TensorFlow 1, with which OpenAI's 2019 models were trained:
    m̂ √(1-β₂ᵗ) / (√v + ε), which is PyTorch's with ε / √(1-β₂ᵗ). At the first step and β₂ = 0.999
    that is 32 times larger: PyTorch's form moves rarely used parameters more boldly at the start.
    """
    return eps / math.sqrt(1.0 - beta2**step)


def learning_rate(
    peak: float,
    step: int,
    total: int,
    schedule: Schedule = "linear",
    warmup: int = 0,
    floor: float = 0.0,
    warmup_from: float = 0.0,
) -> float:
    """Learning rate of update `step` (0 … total-1).

    Warm-up rises in a straight line from `warmup_from` · peak at update 0 to the peak at update
    `warmup`. Then: "linear" falls to floor · peak, which would be reached at update `total`
    (Ziegler et al. 2019: floor 0); "cosine" falls there along half a cosine; "constant" stays
    (InstructGPT, App. C.4: 10 iterations of warm-up from 0.1).
    """
    if schedule not in ("constant", "linear", "cosine"):
        raise ConfigError(f"schedule {schedule!r}: choose constant, linear or cosine.")
    if step < warmup:
        return peak * (warmup_from + (1 - warmup_from) * step / warmup)
    done = min((step - warmup) / max(total - warmup, 1), 1.0)
    if schedule == "linear":
        return peak * (floor + (1 - floor) * (1 - done))
    if schedule == "cosine":
        return peak * (floor + (1 - floor) * (1 + math.cos(math.pi * done)) / 2)
    return peak


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every parameter group this learning rate."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def gradient_norm(parameters: Iterable[Tensor]) -> float:
    """Euclidean norm of all gradients together; 0 when there is none."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return float(torch.nn.utils.get_total_norm(grads)) if grads else 0.0
