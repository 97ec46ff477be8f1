"""The memory of a stage on one device: what is held all the time, and its worst moments.

What stands here is what the stages do. Weights that are trained are fp32, with fp32 gradients and
Adam's two fp32 moments: 16 bytes a number. Matrices multiply in bf16 under autocast, which makes a
bf16 copy of each layer's matrices in a forward pass; the backward pass needs those copies, so they
live as long as the activations. PPO's reference and reward model, which are only read, hold their
matrices in bf16. The base under a LoRA adapter is held once, in bf16 on a GPU and in fp32 on a CPU,
and is the reference (or the reward model) too. Attention keeps no T × T matrix.

Tested against measured peaks by `pytest tests/test_one_gpu.py`; `benchmarks/memory.py` measures
more of them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from rlhf_course.planning.memory import LOGIT_ROWS, kv_cache_bytes
from rlhf_course.planning.shapes import ModelShape
from rlhf_course.shared_prefix import costs_less
from rlhf_course.vocabulary import rows_at_a_time

SFT_LOGITS, PPO_LOGITS, READ_LOGITS, SAMPLE_LOGITS = 3, 5, 3, 4
"""fp32 tensors of the size of a chunk of logits that live together: in SFT's loss, in the policy's
and its entropy, where they are only scored, and where a token is drawn."""
QUANTISED = {"8bit": 1.0 + 4 / 4096, "4bit": 0.5 + 4 / 64}
"""Bytes of a number of a quantised matrix: with one fp32 scale a row, or one for each 64."""

Stage = Literal["sft", "reward-model", "ppo"]


@dataclass(frozen=True)
class Job:
    """One stage with all that decides its memory. Every row has prompt and answer in full."""

    stage: Stage
    shape: ModelShape
    prompt: int
    answer: int
    rows: int
    """Rows of an update: dialogues, comparisons, or PPO's minibatch."""
    micro_batch: int
    """Of them in one pass."""
    answers: int = 2
    """Of each comparison."""
    generated: int = 64
    """Answers that PPO samples at a time."""
    ptx_tokens: int = 0
    """Tokens of pretraining text in one of PPO's updates."""
    products: int = 2
    """Bytes of an element of a matrix product: 2 for bf16, 4 for fp32."""
    attention: int = 2
    """The same of queries, keys and values. Our GPT on a CPU: 4, whatever the products are."""
    lora: int | None = None
    """Rank of the adapters; None: every weight is trained."""
    base: int = 2
    """Bytes of a number of the base under the adapters: 2 on a GPU, 4 on a CPU."""
    quantize: Literal["8bit", "4bit"] | None = None
    """How the matrices of that base are held instead."""
    checkpointing: bool = False
    """Gradient checkpointing: each layer is computed once more in the backward pass."""

    @property
    def length(self) -> int:
        """Tokens of a prompt and one answer."""
        return self.prompt + self.answer

    @property
    def compared(self) -> int:
        """Tokens that the reward model reads of a comparison: the prompt once, where that costs
        less."""
        together, alone = self.prompt + self.answers * self.answer, self.length
        shared = costs_less(together, self.answers, alone, self.shape.width)
        return together if shared else self.answers * alone


# ------------------------------------------------------------------------------ one model at a time


def layer_bytes(job: Job) -> int:
    """What the backward pass needs of one token in one layer.

    The residual stream and the norms are fp32. Autocast casts the input of every product by itself,
    so what q, k and v read, or both inner matrices of a gated MLP, is kept once for each of them.
    """
    shape, B = job.shape, job.products
    D, A, K, F = shape.width, shape.attention_width, shape.kv_width, shape.inner
    low = B == 2
    heads = job.attention * (2 * A + 2 * K)  # queries, keys, values, and what attention returns
    heads += B * A if job.attention != B else 0  # cast for the product behind it
    if not shape.gated:  # both norms keep their input; the product behind keeps its own
        return 2 * D * 4 + 2 * D * B + heads + 2 * B * F
    norms = 2 * (4 + 4) * D  # input, and input / rms
    if shape.family in ("gemma2", "gemma3"):
        norms *= 2
    return norms + (B * 5 * D if low else 2 * B * D) + heads + 4 * B * F


def activations(job: Job, tokens: int) -> int:
    """What the backward pass keeps of this many tokens in all layers, the low-precision copies of
    the matrices included; logits apart."""
    shape, one = job.shape, layer_bytes(job)
    ends = tokens * shape.width * 4 * 2  # the final norm's input and output
    copied = not job.quantize and not (job.lora and job.base == job.products)
    copies = shape.layers * shape.layer_matrices * 2 if copied and job.products == 2 else 0
    if job.checkpointing:  # every layer's input, and one layer at a time in full
        # Behind the forward pass all copies are there, in the backward pass one layer's.
        again = max(tokens * one + copies // shape.layers, 0 if job.lora else copies)
        return tokens * shape.layers * shape.width * 4 + again + ends
    return tokens * shape.layers * one + copies + ends


def passing(job: Job, tokens: int, copies: bool) -> int:
    """A pass without gradient: a layer at a time. copies: autocast's of all matrices are kept."""
    shape = job.shape
    low = shape.layers * shape.layer_matrices * 2 if copies and job.products == 2 else 0
    return tokens * (layer_bytes(job) + 2 * 4 * shape.width) + low


def logits(job: Job, wanted: int, tensors: int, most: int = 1 << 62) -> int:
    """`tensors` fp32 tensors of the logits that exist at a time of the `wanted` rows."""
    rows = min(wanted, rows_at_a_time(job.shape.vocabulary, most))
    head = 4 * job.shape.vocabulary * job.shape.width  # an fp32 copy of a head in bf16
    return 4 * tensors * rows * job.shape.vocabulary + (head if job.lora and job.base < 4 else 0)


def adapters(job: Job) -> int:
    """Numbers of a LoRA adapter of this rank beside every matrix of every layer."""
    shape = job.shape
    D, A, K, F = shape.width, shape.attention_width, shape.kv_width, shape.inner
    sides = (D + A) + 2 * (D + K) + (A + D) + (3 if shape.gated else 2) * (D + F)
    return shape.layers * (job.lora or 0) * sides


def frozen_bytes(job: Job, scalar: bool) -> int:
    """A model that is only read: matrices in the dtype that multiplies and the rest (embeddings,
    norms, output head) in fp32; under an adapter all in one dtype, or the matrices quantised."""
    shape = job.shape
    count = shape.scalar_parameters if scalar else shape.parameters
    matrices, rest = shape.layers * shape.layer_matrices, job.base if job.lora else 4
    each = rest if job.lora else job.products
    if job.quantize:
        each = QUANTISED[job.quantize]
    return int(matrices * each) + rest * (count - matrices)


@dataclass(frozen=True)
class Held:
    """Bytes of one trained model, whether or not it is being computed with."""

    weights: int
    gradients: int
    optimizer: int


def trained(job: Job, scalar: bool) -> Held:
    """Policy (or critic, or reward model): 16 bytes a number, or with LoRA the base once and 16
    bytes for each number of the adapter."""
    if job.lora:
        count = adapters(job) + (job.shape.width + 1 if scalar else 0)
        return Held(frozen_bytes(job, scalar) + 4 * count, 4 * count, 8 * count)
    count = job.shape.scalar_parameters if scalar else job.shape.parameters
    return Held(4 * count, 4 * count, 8 * count)


def head_gradient(job: Job) -> int:
    """The embedding's gradient, which a pass makes anew and then adds; 0 where it is frozen."""
    return 0 if job.lora else 4 * job.shape.vocabulary * job.shape.width


def pass_peak(job: Job, model: Held, tokens: int, wanted: int, tensors: int, more: bool) -> int:
    """Forward and backward of `tokens` tokens beside a model's weights: the worst of two moments.

    At the first the activations are whole and the logits are there; at the last the gradients are.
    wanted: rows of logits, 0 for a scalar head. more: other micro-batches came before, so all
    gradients are there from the beginning.
    """
    kept = activations(job, tokens)
    ours, vd = 0, head_gradient(job)
    if wanted:
        chunk = rows_at_a_time(job.shape.vocabulary, LOGIT_ROWS if job.stage == "ppo" else 1 << 62)
        ours = logits(job, wanted, tensors, chunk) + (vd if wanted > chunk else 0)
    first = kept + ours + (model.gradients if more else 0)
    # A tied embedding is both ends of the network: its gradient's two parts, and their sum.
    tied = wanted > 0 and job.shape.tied
    last = model.gradients + vd * (int(more) + 2 * tied)
    if job.checkpointing:  # the first layer is computed again when all others have gradients
        lacking = 0 if more or tied else vd
        last = max(last, model.gradients - lacking + tokens * layer_bytes(job))
    return max(first, last)


# --------------------------------------------------------------------------------------- the stages


@dataclass(frozen=True)
class Estimate:
    """What a job takes."""

    state: dict[str, int]
    """Bytes that are there all the time, by name."""
    moments: dict[str, int]
    """Bytes of everything together, at each bad moment."""

    @property
    def peak(self) -> int:
        """At the worst of them."""
        return max(self.moments.values())

    @property
    def worst(self) -> str:
        """Which that is."""
        return max(self.moments, key=self.moments.__getitem__)


def estimate(job: Job) -> Estimate:
    """The memory of a stage from its second update on, when the optimizer has its moments."""
    return _ppo(job) if job.stage == "ppo" else _supervised(job)


def _supervised(job: Job) -> Estimate:
    scalar = job.stage == "reward-model"
    model = trained(job, scalar)
    tokens = job.micro_batch * (job.compared if scalar else job.length)
    wanted = 0 if scalar else job.micro_batch * job.answer
    state = {"weights": model.weights, "Adam": model.optimizer}
    peak = pass_peak(job, model, tokens, wanted, SFT_LOGITS, job.micro_batch < job.rows)
    return Estimate(state, {"an update": sum(state.values()) + peak})


def _ppo(job: Job) -> Estimate:
    policy, critic = trained(job, False), trained(job, True)
    state = {
        "policy": policy.weights, "critic": critic.weights,
        "Adam": policy.optimizer + critic.optimizer,
    }  # fmt: skip
    if not job.lora:  # else they are the bases, with the adapters switched off
        state |= {"reference": frozen_bytes(job, False), "reward model": frozen_bytes(job, True)}
    rows, B, V = job.micro_batch, job.generated, job.shape.vocabulary
    copies, more = not (job.lora and (job.quantize or job.base == 2)), rows < job.rows
    tokens = rows * job.length
    cache = kv_cache_bytes(job.shape, B * job.length, job.attention)
    prompts = passing(job, B * job.prompt, copies)
    moments = {
        "generation": cache + max(prompts, prompts // 8 + 4 * SAMPLE_LOGITS * B * V),
        "scoring": passing(job, tokens, copies)
        + logits(job, rows * job.answer, READ_LOGITS, LOGIT_ROWS),
        "update of the policy": pass_peak(job, policy, tokens, rows * job.answer, PPO_LOGITS, more),
        "update of the critic": policy.gradients + pass_peak(job, critic, tokens, 0, 0, more),
    }
    if job.ptx_tokens:  # the gradients of PPO are there, and a copy of them is measured
        moments["pretraining text"] = (
            2 * policy.gradients
            + activations(job, job.ptx_tokens)
            + logits(job, job.ptx_tokens, PPO_LOGITS, LOGIT_ROWS)
        )
    held = sum(state.values())
    return Estimate(state, {name: held + more for name, more in moments.items()})
