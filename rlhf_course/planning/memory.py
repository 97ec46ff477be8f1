"""Where the memory goes: weights, gradients, optimizer, activations, logits, KV cache.

Bytes as they are, not rounded; B bytes of an element are 2 (bf16) or 4 (fp32).
"""

from __future__ import annotations

from rlhf_course.errors import ConfigError
from rlhf_course.planning.shapes import ModelShape
from rlhf_course.vocabulary import rows_at_a_time

LOGIT_ROWS = 4096
"""Rows of logits that exist at a time (`mdp.chunked_logprobs`)."""
LOGIT_COPIES = {True: 5, False: 3}
"""How many fp32 tensors of that size there are at its peak, with and without a backward pass."""
LIVE_PARAMETERS = 10**9
"""Most parameters that ZeRO-3 holds whole at a time: DeepSpeed's stage3_max_live_parameters."""
SUB_GROUP = 10**9
"""Most parameters that ZeRO-3 updates at a time: DeepSpeed's sub_group_size."""


def zero_bytes(
    parameters: int,
    stage: int,
    ranks: int,
    *,
    training: bool = True,
    parameter_bytes: int = 2,
) -> dict[str, int]:
    """Bytes of a model's state that each rank holds: {"parameters", "gradients", "optimizer"}.

    ZeRO (Rajbhandari et al. 2020, section 5) takes from every rank what another one holds already:
    stage 0 shares nothing out, 1 the optimizer's state, 2 the gradients too, 3 the parameters too.
    A share is 1 / ranks of the numbers, rounded up, since shares are padded to one length.

    parameter_bytes: 2 (bf16) or 4 (fp32), of the weights that compute, and of the gradients.
    optimizer: for each number an fp32 master copy (DeepSpeed keeps one even where the weights are
    fp32 already) and Adam's two fp32 moments. training False is a model that only scores: it has
    weights, and nothing else. Raises ConfigError for a stage or a number of ranks that is none.
    """
    if stage not in (0, 1, 2, 3):
        raise ConfigError(f"ZeRO stage {stage}: choose 0, 1, 2 or 3.")
    if ranks < 1:
        raise ConfigError(f"{ranks} ranks: at least 1 has to hold the model.")
    # BEGIN SOLUTION
    share = -(-parameters // ranks)
    held = {"parameters": parameter_bytes, "gradients": 0, "optimizer": 0}  # bytes of each number
    if training:
        held |= {"gradients": parameter_bytes, "optimizer": 4 + 4 + 4}
    since = {"optimizer": 1, "gradients": 2, "parameters": 3}  # the stage that shares it out
    return {
        name: each * (share if stage >= since[name] else parameters) for name, each in held.items()
    }
    # END SOLUTION


def kv_cache_bytes(shape: ModelShape, tokens: int, element_bytes: int = 2) -> int:
    """Keys and values of this many tokens in all layers."""
    return 2 * shape.layers * shape.kv_width * tokens * element_bytes


def activation_bytes(
    shape: ModelShape, tokens: int, element_bytes: int = 2, checkpointing: bool = False
) -> int:
    """What the backward pass needs of this many tokens, logits apart.

    Per layer and token: the inputs and outputs of both norms (RMSNorm computes in fp32 and keeps
    its input so), queries, keys, values, what attention returns (flash attention keeps no T x T
    weights), and the MLP's inner vectors: 4 where it is gated, else 2. checkpointing keeps each
    layer's input alone, and one layer at a time in full while it is computed again.
    """
    B, D = element_bytes, shape.width
    norms = 2 * D * (4 + 2 * B) if shape.gated else 2 * D * 2 * B
    attention = B * (2 * shape.attention_width + 2 * shape.kv_width)
    layer = norms + attention + B * shape.inner * (4 if shape.gated else 2)
    kept = shape.layers * D * B + layer if checkpointing else shape.layers * layer
    return tokens * kept


def logit_bytes(shape: ModelShape, actions: int, training: bool) -> int:
    """Logits in fp32 at the answers' tokens, and the fp32 copy of a bf16 output head."""
    rows = min(actions, rows_at_a_time(shape.vocabulary, LOGIT_ROWS))
    head = 4 * shape.vocabulary * shape.width * (2 if training else 1)  # and its gradient
    return 4 * shape.vocabulary * rows * LOGIT_COPIES[training] + head


def working_bytes(
    shape: ModelShape,
    sequences: int,
    prompt: int,
    answer: int,
    *,
    stage: int,
    ranks: int,
    training: bool,
    scalar: bool,
    checkpointing: bool,
    host_update: bool = False,
) -> int:
    """What one rank needs beside a bf16 model's state, at its worst moment.

    That is a micro-batch of `sequences` with ZeRO-3's gathered parameters, or, in the update, the
    fp32 copy of the gradients, unless the host makes it. scalar: a critic or reward model, which
    has no logits.
    """
    tokens, parameters = sequences * (prompt + answer), shape.parameters
    passes = activation_bytes(shape, tokens, 2, checkpointing)
    if not training:
        passes = activation_bytes(shape, tokens) // shape.layers  # one layer after the other
    if not scalar:
        passes += logit_bytes(shape, sequences * answer, training)
    if stage == 3:
        passes += 2 * min(parameters, LIVE_PARAMETERS)
    if not training or host_update:
        return passes
    share = -(-parameters // ranks) if stage else parameters
    return max(passes, 4 * (min(share, SUB_GROUP) if stage == 3 else share))
