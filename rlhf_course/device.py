"""Where and in which precision everything runs: one policy, asked once, printed at the start.

Measured with AVX-512-BF16 (tokens/s of training, width 128, 3 layers, batch 64 × 48): fp32 22,700
on one thread and 42,400 on two; bf16 matrix products with fp32 attention 37,100 and 68,500. At a
larger vocabulary, with bf16 attention too, one thread: 17,000 instead of 31,400. Hence, on a CPU:
one thread a core, bf16 products where the CPU has them, attention in fp32 (see `gpt.Attention`).
`torch.compile` is not used on a CPU: it needs a C++ compiler, which a laptop may lack.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

import torch

from rlhf_course.choices import DeviceName, DtypeName
from rlhf_course.errors import ConfigError

# Beyond this many threads the matrix products of a course-sized model stop gaining.
MAX_THREADS = 8


@dataclass(frozen=True)
class Device:
    """The choice: a torch device, the dtype of matrix products (None: fp32), CPU threads."""

    device: torch.device
    compute_dtype: torch.dtype | None
    threads: int

    def place(self, model: torch.nn.Module) -> torch.nn.Module:
        """Move a language or reward model there, and tell it in which dtype to multiply."""
        model.to(self.device)
        for module in model.modules():
            if hasattr(module, "compute_dtype"):
                module.compute_dtype = self.compute_dtype
        return model

    def lower(self, model: torch.nn.Module) -> torch.nn.Module:
        """Hold the matrices of a model that is never trained in the dtype that multiplies them, in
        place: half the memory, no copy made in every pass, and the same products to the last bit.
        Embeddings, norms, the output head and what is quantised stay as they are."""
        for part in model.modules():
            if self.compute_dtype is None or not hasattr(part, "compute_dtype"):
                continue
            for layer in getattr(part, "backbone", part).modules():  # without the output head
                if type(layer) is torch.nn.Linear and layer.weight.dtype == torch.float32:
                    layer.to(self.compute_dtype)
        return model

    def __str__(self) -> str:
        name = str(self.device)
        if self.device.type == "cuda":
            name += f" ({torch.cuda.get_device_name(self.device)})"
        dtype = "float32" if self.compute_dtype is None else "bfloat16 products, float32 weights"
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return f"{name}, {dtype}" + (f", {threads}" if self.device.type == "cpu" else "")


def choose_device(
    device: DeviceName = "auto", dtype: DtypeName = "auto", threads: int | None = None
) -> Device:
    """CUDA with bf16 where there is one, else Apple's MPS in fp32, else the CPU.

    threads: CPU threads; default OMP_NUM_THREADS when set, else one a core, at most 8. Sets
    torch's thread count for the process. Raises ConfigError for a device that is not there.
    """
    cuda, mps = torch.cuda.is_available(), torch.backends.mps.is_available()
    name = ("cuda" if cuda else "mps" if mps else "cpu") if device == "auto" else device
    if (name == "cuda" and not cuda) or (name == "mps" and not mps):
        raise ConfigError(
            f"--device {name}: this torch ({torch.__version__}) sees no such device. "
            "Use --device cpu, or install a torch built for it (see the README)."
        )
    if threads is None:
        from_environment = os.environ.get("OMP_NUM_THREADS", "")
        threads = int(from_environment) if from_environment.isdigit() else _cores()
    if threads < 1:
        raise ConfigError(f"--threads {threads}: give at least 1.")
    torch.set_num_threads(threads)
    compute_dtype = {"float32": None, "bfloat16": torch.bfloat16}.get(dtype)
    if dtype == "auto" and _fast_bf16(name):
        compute_dtype = torch.bfloat16
    if name == "cuda" and compute_dtype is not None:
        # What stays in fp32, the product with the vocabulary above all, in TF32 on the tensor
        # cores: a quarter of a small Qwen's arithmetic, and 8 times slower without. Its 10 bits of
        # mantissa are more than bf16's 7. NOT RUN.
        torch.set_float32_matmul_precision("high")
    return Device(torch.device(name), compute_dtype, threads)


@contextmanager
def casts_kept(model: torch.nn.Module) -> Iterator[None]:
    """Keep the low-precision copies of the trained weights from one pass to the next.

    Autocast makes them anew in every pass, and generation makes a pass for each token. They live
    here until the outermost autocast ends, and this one, which computes nothing, is it. For passes
    without gradient, between which no weight changes; under `torch.no_grad`, since autocast keeps
    nothing in `torch.inference_mode`.
    """
    with torch.autocast(next(model.parameters()).device.type, enabled=False):
        yield


def keep_freed_memory() -> None:
    """Have the C library keep what is freed, for the next step, which needs it again (glibc only).

    By default every tensor of more than some 100 kB is taken from the system and given back, and
    the system clears each page of it anew: an update of a model of 124 M parameters took 1.4 times
    as long. Most memory at a time grows by some per cent, since what is kept has gaps.
    """
    mmap_max, trim_threshold = -4, -1  # names and numbers of malloc.h
    with suppress(OSError, AttributeError):  # another C library
        c_library = ctypes.CDLL("libc.so.6")
        c_library.mallopt(mmap_max, 0)
        c_library.mallopt(trim_threshold, 2**31 - 1)


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):  # Linux: what a container or a scheduler left us
        return min(len(os.sched_getaffinity(0)), MAX_THREADS)
    return min(max((os.cpu_count() or 2) // 2, 1), MAX_THREADS)  # logical cores, two to a core


def _fast_bf16(device: str) -> bool:
    if device == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device == "cpu":
        told = getattr(torch.cpu, "get_capabilities", dict)()  # torch 2.6 does not tell
        return bool(told.get("avx512_bf16", False))
    return False
