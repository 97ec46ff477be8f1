"""What a computation costs, counted instead of timed: products, forward passes, bytes, calls.

    pytest tests/test_operations.py    # the closed formulas here, beside what torch counts

A timing depends on the machine and on who else uses it; these numbers do not, so a test can ask
for them exactly. Each section has a meter, which counts what really happens, and the formulas that
say how much ought to. The formulas are those of our GPT: L blocks of width D, a vocabulary of V.

What is not counted: element-wise work (norms, GELU, softmax), and what a kernel allocates inside.
"""

from __future__ import annotations

import gc
import math
import weakref
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from rlhf_course.gpt import GPTConfig
from rlhf_course.padding import padded_length

FLOAT = 4
"""Bytes of a float32."""

# -------------------------------------------------------------------------------- matrix products

TRAINING = 3
"""A forward and a backward pass, in forward passes: behind y = x W a gradient needs two products
of the same size, one for x and one for W."""


def _attention_flops(query, key, value, *others, **named) -> int:
    """Of shapes: (B, H, T, d) queries, (B, H, S, d) keys, values -> 2 products of 2 B H T S d each.

    All T S pairs count, also those that a causal mask hides: the kernel may or may not skip them.
    """
    B, H, T, d = query
    return 2 * 2 * B * H * T * key[2] * d


def _attention_backward_flops(gradient, query, key, value, *others, **named) -> int:
    """Twice the forward pass. The kernel computes the scores once more (a fifth product), which is
    its own affair: the plain form keeps them, and either counts the same here."""
    return 2 * _attention_flops(query, key, value)


# torch 2.13 knows no formula for the CPU's fused attention and counts it as nothing.
_CPU_ATTENTION = {
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward_flops,
}


def flops(function: Callable[[], object]) -> int:
    """Floating-point operations of all matrix products in a call, a multiply-add being two."""
    with FlopCounterMode(display=False, custom_mapping=_CPU_ATTENTION) as counter:
        function()
    return counter.get_total_flops()


def trunk_flops(
    config: GPTConfig, rows: int, length: int, past: int = 0, asked: int | None = None
) -> int:
    """Of `hidden_states`: `rows` of `length` tokens, behind `past` cached ones.

    A block has 12 D² weights in its matrices (q, k, v and the projection 4 D², the MLP 8 D²), and
    each token meets each weight in one multiply-add: 2 · 12 · L · D². Attention takes 2 products,
    q kᵀ and the weights times v, of D multiply-adds for each pair of positions: 2 · 2 · L · D.
    Embeddings are looked up, not multiplied.

    asked: how many of the positions are asked for; None: all. At the others the last block stops
    behind attention, so the projection and the MLP, 9 D² weights, do not meet them.
    """
    L, D = config.layers, config.width
    others = 0 if asked is None else rows * length - asked
    matrices = 2 * 12 * L * D**2 * rows * length - 2 * 9 * D**2 * others
    pairs = rows * length * (past + length)
    return matrices + 2 * 2 * L * D * pairs


def logits_flops(config: GPTConfig, rows: int) -> int:
    """Of `unembed` at this many positions: 2 · V · D each."""
    return 2 * config.vocab_size * config.width * rows


def loss_rows(asked: int, chunks: int = 1) -> int:
    """Positions whose logits a loss makes: those asked for, and in each chunk one more, which ends
    the text that `sft_loss` and `token_logprobs` want and predicts nothing."""
    return asked + chunks


def generation_flops(config: GPTConfig, prompt: int, rows: list[int]) -> int:
    """Of `generate`, with prompts of `prompt` tokens each; rows: see `rows_read`.

    The first pass reads the prompts, each later one a token of every row. Logits are computed at
    the last position of each row alone, in every pass.
    """
    first = trunk_flops(config, rows[0], prompt)
    steps = enumerate(rows[1:])
    later = sum(trunk_flops(config, count, 1, past=prompt + step) for step, count in steps)
    return first + later + logits_flops(config, sum(rows))


# --------------------------------------------------------------------------------- forward passes


class Pass(NamedTuple):
    """One call of `hidden_states`: who read how many rows of how many tokens."""

    model: str
    rows: int
    tokens: int
    gradient: bool
    """Whether autograd recorded it."""


@contextmanager
def passes(**models: nn.Module) -> Iterator[list[Pass]]:
    """The forward passes of these models while the context lasts, in order.

    models: name -> whatever has `hidden_states`. Taken off again at the end.
    """
    seen: list[Pass] = []

    def watched(name: str, read: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def hidden_states(tokens: Tensor, *others, **named) -> Tensor:
            seen.append(Pass(name, *tokens.shape, torch.is_grad_enabled()))
            return read(tokens, *others, **named)

        return hidden_states

    for name, model in models.items():
        model.hidden_states = watched(name, model.hidden_states)
    try:
        yield seen
    finally:
        for model in models.values():
            del model.hidden_states  # the class's own shows again


def rows_read(lengths: list[int], new: int) -> list[int]:
    """Rows in each pass of `generate` over answers of these lengths, of at most `new` tokens.

    Nothing is read once all have ended; rows that have ended stay until they are half of those
    that are held, and then leave together.
    """
    held, rows = [min(length, new) for length in lengths], []
    for step in range(1, max(held) + 1):
        rows.append(len(held))
        running = [length for length in held if length > step]
        if len(running) <= len(held) // 2:
            held = running
    return rows


class Iteration(NamedTuple):
    """The sizes of an iteration of PPO in which no answer ends early."""

    answers: int
    prompt: int
    new: int
    minibatch: int
    micro_batch: int
    """It divides the minibatch, as that divides the answers."""
    epochs: int = 1
    ptx: tuple[int, int] | None = None
    """(rows, tokens) of pretraining text in each update."""


def ppo_passes(size: Iteration, context: int) -> Counter[Pass]:
    """How often each pass occurs in one iteration of PPO.

    The policy samples: the prompts once, then a token of every row in each of new - 1 passes. Then
    policy, reference, critic and reward model read each answer once, a micro-batch at a time,
    without a gradient. An update is the policy's and the critic's alone, again a micro-batch at a
    time; its pretraining rows are read at once.
    """
    length = padded_length(size.prompt + size.new, context)
    part = size.micro_batch, length
    updates = size.epochs * size.answers // size.minibatch
    found = Counter({
        Pass("policy", size.answers, size.prompt, False): 1,
        Pass("policy", size.answers, 1, False): size.new - 1,
    })  # fmt: skip
    for name in ("policy", "reference", "critic", "reward_model"):
        found[Pass(name, *part, False)] += size.answers // size.micro_batch
    for name in ("policy", "critic"):
        found[Pass(name, *part, True)] += updates * size.minibatch // size.micro_batch
    if size.ptx is not None:
        found[Pass("policy", *size.ptx, True)] += updates
    return found


# ------------------------------------------------------------------------------- bytes and calls


class Meter(TorchDispatchMode):
    """Sees every operator that torch runs while the context lasts, and what it allocates.

    `calls`: operator -> how often it ran; `kernels`: the same without views and other bookkeeping,
    of which one version of torch has more than another. `made`: shape -> how many storages were
    allocated with a tensor of that shape. `peak`: the most bytes of such storages at a time.

    Only what is made in the context counts, so parameters do not; views share a storage, which
    counts once. A storage is let go when nobody holds it any more, be it autograd, the caller, or a
    closure: `checkpoint` keeps its inputs in one, which saved-tensor hooks do not show.
    """

    def __init__(self):
        super().__init__()
        self.calls: Counter[str] = Counter()
        self.kernels: Counter[str] = Counter()
        self.made: Counter[tuple[int, ...]] = Counter()
        self.peak = 0
        self._held: dict[int, tuple[int, tuple[int, ...]]] = {}
        self._bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        self.calls[function.name()] += 1
        if function.namespace == "aten" and not _is_view(function):
            self.kernels[function.name()] += 1
        given = {t.untyped_storage()._cdata for t in _tensors((args, kwargs))}
        out = function(*args, **kwargs)
        for tensor in _tensors(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._held:
                self._hold(storage, tuple(tensor.shape))
        return out

    def _hold(self, storage: torch.UntypedStorage, shape: tuple[int, ...]) -> None:
        self.made[shape] += 1
        self._held[storage._cdata] = storage.nbytes(), shape
        self._bytes += storage.nbytes()
        self.peak = max(self.peak, self._bytes)
        # Not at the interpreter's exit, where nobody asks any more.
        weakref.finalize(storage, self._let_go, storage._cdata).atexit = False

    def _let_go(self, address: int) -> None:
        self._bytes -= self._held.pop(address)[0]

    def held(self) -> dict[tuple[int, ...], list[int]]:
        """What is held now: shape -> the bytes of each storage made with it."""
        gc.collect()  # a reference cycle is nobody's any more
        found: dict[tuple[int, ...], list[int]] = {}
        for size, shape in self._held.values():
            found.setdefault(shape, []).append(size)
        return found

    def held_bytes(self) -> int:
        """Bytes held now."""
        return sum(sum(sizes) for sizes in self.held().values())

    def rows_of(self, width: int) -> int:
        """Rows of the largest tensor (…, width) that was allocated; 0 where there was none."""
        found = (math.prod(shape[:-1]) for shape in self.made if shape[-1:] == (width,))
        return max(found, default=0)


def _is_view(function: torch._ops.OpOverload) -> bool:
    """Whether all that it returns shares the memory of its arguments, and it writes none."""
    shared = [value.alias_info for value in function._schema.returns]
    return bool(shared) and all(info is not None and not info.is_write for info in shared)


def _tensors(tree) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def block_bytes(config: GPTConfig, rows: int, length: int, recomputed: bool = False) -> int:
    """What a block keeps in fp32 for its backward pass on a CPU; recomputed: `checkpoint_blocks`.

    For each token, in numbers: the block's input D; the first norm's output D; q, k and v 3 D; the
    attention's output D and the logarithm of each head's denominator H; the stream between the two
    halves D; the second norm's output D; the MLP before and after GELU 8 D: 16 D + H in all; and
    mean and deviation of the two norms, 4. Recomputed, the input alone.
    """
    D = config.width
    return FLOAT * rows * length * (D if recomputed else 16 * D + config.heads + 4)
