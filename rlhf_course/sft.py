"""Chapter 02: supervised fine-tuning, learning to answer by imitating demonstrations.

A dialogue becomes one row of tokens through the tokenizer's chat template. The model reads all of
it but is asked only for the answer: labels are the tokens themselves there and -100 elsewhere.

    tokens   <|user|>  where  does  she  live  <|assistant|>  in    oslo  <eos>  <pad>
    labels     -100    -100   -100  -100 -100      -100       in    oslo  <eos>  -100

The EOS that ends the answer is learned like any other token: it is how a model knows when to stop.
Labels stand on the tokens they name; the shift by one (position t predicts token t+1) is the
loss's business alone.

Rows of unequal length waste computation on padding. `pack` puts many dialogues into one row; with
`segment_mask` and restarted positions each gives the same loss and gradient as in a row of its own.

What this leaves out: no weight for a dialogue (a long answer counts more than a short one, since
the mean is over tokens), and no special kernel for packed rows, whose mask takes T^2 booleans.

Tested by `pytest tests/test_sft.py`.
"""

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rlhf_course.errors import DataError, ModelError
from rlhf_course.vocabulary import rows_at_a_time

IGNORE = -100
"""The label of a token that is read but not learned (the number that transformers uses)."""

# For a base model whose tokenizer brings no chat template, GPT-2's for example. It needs no new
# tokens: a label in words marks who speaks, and EOS ends a turn of the assistant.
PLAIN_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}User: {{ message['content'] }}\n"
    "{% elif message['role'] == 'assistant' %}"
    "Assistant: {{ message['content'] }}{{ eos_token }}"
    "{% else %}{{ raise_exception('the roles are user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% endif %}"
)

Messages = list[dict[str, str]]
Example = tuple[list[int], list[int]]
"""The tokens of a dialogue, and as many labels."""


# --------------------------------------------------------------------------- dialogues into tokens


def encode_prompt(tokenizer, prompt: str | Messages) -> list[int]:
    """The tokens of a prompt up to where the assistant begins to speak.

    prompt: a text, or messages {"role", "content"} where there were turns before.
    Raises ModelError (no chat template), DataError (the template refuses these messages).
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    return _render(tokenizer, messages, add_generation_prompt=True)


def encode_dialogue(tokenizer, prompt: str | Messages, response: str) -> tuple[list[int], int]:
    """A prompt and its answer as (tokens, prompt length): the answer's tokens are those behind.

    They end with exactly one EOS, the template's or one that is added, and what a template writes
    behind it is cut off, since nobody samples beyond EOS.
    Raises DataError (empty answer, EOS inside it), ModelError (no chat template, or one that
    writes a prompt differently once it is answered, so that SFT and sampling would disagree).
    """
    messages = [{"role": "user", "content": prompt}] if isinstance(prompt, str) else prompt
    turn, start = _answered(tokenizer, [*messages, {"role": "assistant", "content": response}])
    return _ended(turn, tokenizer.eos_token_id), start


def encode_messages(tokenizer, messages: Messages) -> Example:
    """A dialogue of any number of turns as (tokens, labels), with labels on EVERY answer in it.

    What follows the last answer is left out. Raises as `encode_dialogue`, and DataError when there
    is no answer at all. The template must write a turn in the same way whatever follows; those
    that drop earlier turns' reasoning do not, and get a ModelError.
    """
    turns = [
        _answered(tokenizer, messages[: i + 1])
        for i, message in enumerate(messages)
        if message["role"] == "assistant"
    ]
    if not turns:
        raise DataError("a dialogue without an answer: no message has the role 'assistant'.")
    tokens = _ended(turns[-1][0], tokenizer.eos_token_id)
    labels = [IGNORE] * len(tokens)
    for turn, start in turns:
        _require_prefix(turn, tokens)
        labels[start : len(turn)] = turn[start:]
    labels[-1] = tokens[-1]  # the EOS, if it had to be added
    return tokens, labels


def _render(tokenizer, messages: Messages, add_generation_prompt: bool = False) -> list[int]:
    """Messages as tokens, through the chat template."""
    from jinja2 import TemplateError

    if tokenizer.chat_template is None:
        raise ModelError(
            "the tokenizer has no chat template, so nothing says where an answer begins. "
            "Set tokenizer.chat_template; rlhf_course.sft.PLAIN_TEMPLATE needs no new tokens."
        )
    try:
        tokens = tokenizer.apply_chat_template(
            messages, add_generation_prompt=add_generation_prompt, tokenize=True, return_dict=False
        )
    except TemplateError as error:
        raise DataError(f"the chat template refuses these messages: {error}.") from error
    # Special tokens for which the model has no embedding: see pretrained_tokenizer.tokens_written.
    if unread := getattr(tokenizer, "unread", frozenset()).intersection(tokens):
        raise DataError(
            f"a text holds {tokenizer.decode(sorted(unread))!r}, which the tokenizer reads as a "
            "special token that the model has no embedding for. Remove it from the row."
        )
    return tokens


def _answered(tokenizer, messages: Messages) -> tuple[list[int], int]:
    """Tokens up to the end of the last message, which is an answer, and where that begins.

    Rendered with and without the answer: what the second adds to the first is the answer.
    """
    eos_id, answer = tokenizer.eos_token_id, messages[-1]["content"]
    if not answer.strip():
        raise DataError("an empty answer: there is nothing to learn from it. Remove the row.")
    if tokenizer.eos_token in answer:
        raise DataError(
            f"an answer contains the text {tokenizer.eos_token!r}, which is read as its end: "
            f"{answer[:60]!r}. Remove it from the row."
        )
    prompt = encode_prompt(tokenizer, messages[:-1])
    turn = _render(tokenizer, messages)
    _require_prefix(prompt, turn)
    start = len(prompt)
    if eos_id in turn[start:]:
        turn = turn[: turn.index(eos_id, start) + 1]
    return turn, start


def _ended(tokens: list[int], eos_id: int) -> list[int]:
    return tokens if tokens[-1] == eos_id else [*tokens, eos_id]


def _require_prefix(beginning: list[int], tokens: list[int]) -> None:
    if tokens[: len(beginning)] != beginning:
        raise ModelError(
            "the chat template writes the beginning of a dialogue differently once more is said, "
            "so the model would be trained on other tokens than it is later asked to go on from. "
            "Use a template that only appends."
        )


# --------------------------------------------------------------------------------- labels and loss


def mask_prompt(tokens: Tensor, prompt_lengths: Tensor, lengths: Tensor) -> Tensor:
    """Labels that ask for the answer alone.

    tokens (B, T) long, right-padded; prompt_lengths (B,) and lengths (B,) int, the latter of
    prompt and answer together, EOS included -> (B, T) long: the token itself where
    prompt_lengths[b] <= t < lengths[b], -100 on the prompt and on the pads. From the lengths and
    never from `token != pad`: where pad and EOS are one token that would hide the EOS.
    Raises ValueError where a prompt is longer than its row, or a row than T.
    """
    if (prompt_lengths > lengths).any() or (lengths > tokens.shape[1]).any():
        raise ValueError(f"prompt <= length <= T = {tokens.shape[1]} does not hold in every row")
    # BEGIN SOLUTION
    position = torch.arange(tokens.shape[1], device=tokens.device)  # (T,)
    answer = (position >= prompt_lengths[:, None]) & (position < lengths[:, None])  # (B, T)
    return torch.where(answer, tokens, IGNORE)
    # END SOLUTION


def sft_loss(logits: Tensor, labels: Tensor, denominator: float | Tensor | None = None) -> Tensor:
    """Mean negative log-likelihood of the labelled tokens, in nats per token: 0-dim.

    logits (B, T, V) float, labels (B, T) long, -100 where nothing is asked. Logits at position t
    answer for labels[:, t + 1]. Computed in float32 (float64 stays); logits that nobody is asked
    for may be anything, NaN included. `denominator` is the number of labelled tokens of the whole
    optimizer step, over micro-batches and ranks; None is this batch's own (0 / 0 is 0).
    """
    if logits.shape[:-1] != labels.shape:
        raise ValueError(f"logits {tuple(logits.shape)} do not fit labels {tuple(labels.shape)}")
    # BEGIN SOLUTION
    following = labels[:, 1:].flatten()  # (B (T-1),): what each position is to predict
    asked = (following != IGNORE).nonzero()[:, 0]  # (N,)
    predicted = logits[:, :-1].flatten(0, 1).index_select(0, asked)  # (N, V)
    if predicted.dtype != torch.float64:
        predicted = predicted.float()
    total = F.cross_entropy(predicted, following[asked], reduction="sum")
    return total / (max(len(asked), 1) if denominator is None else denominator)
    # END SOLUTION


def answer_loss(
    model: nn.Module,
    tokens: Tensor,
    labels: Tensor,
    attend: Tensor | None = None,
    positions: Tensor | None = None,
    denominator: float | Tensor | None = None,
) -> Tensor:
    """`sft_loss(model(tokens, attend, positions), labels)` without the logits nobody asks for.

    The product with the vocabulary is the largest of a small model, and on most rows the prompt is
    longer than the answer. tokens, labels, positions (B, T) long, attend (B, 1, T, T) bool. Where
    the answers have more than `vocabulary.LOGITS` logits, they exist a chunk at a time, in the
    backward pass too, which computes them once more.
    """
    following = F.pad(labels[:, 1:], (0, 1), value=IGNORE).flatten()  # (B T,): of the next token
    asked = (following != IGNORE).nonzero()[:, 0]  # (N,), before the model: a GPU waits here
    rows = model.hidden_states(tokens, attend, positions, places=asked)  # (N, D)
    wanted = following[asked]  # (N,)
    size = rows_at_a_time(model.vocab_size)
    if len(rows) <= size:
        return _rows_loss(model, rows, wanted, denominator)
    whole = len(rows) if denominator is None else denominator
    parts = [
        checkpoint(_rows_loss, model, *part, whole, use_reentrant=False, preserve_rng_state=False)
        for part in zip(rows.split(size), wanted.split(size), strict=True)
    ]
    return torch.stack(parts).sum()


def _rows_loss(model: nn.Module, rows: Tensor, wanted: Tensor, denominator) -> Tensor:
    """`sft_loss` of hidden states (N, D), each of which is asked for one token, (N,)."""
    # One text of N + 1 positions, so that the shift by one lands where it should. The last one is
    # asked for nothing; it joins before the product, since logits are wide to copy.
    logits = model.unembed(F.pad(rows, (0, 0, 0, 1)))[None]  # (1, N + 1, V)
    labels = F.pad(wanted, (1, 0), value=IGNORE)[None]  # (1, N + 1)
    return sft_loss(logits, labels, denominator)


# ----------------------------------------------------------------------------------------- packing


class Packed(NamedTuple):
    """Several dialogues in each row; all (rows, T) long, T the longest row."""

    tokens: Tensor
    labels: Tensor
    """As in `sft_loss`; -100 on the first token of each dialogue, which nothing predicts."""
    segments: Tensor
    """0, 1, 2 … for the dialogues of a row, -1 on pads."""
    positions: Tensor
    """0, 1, 2 … restarted with every dialogue, 0 on pads."""


def first_fit_decreasing(lengths: Sequence[int], context: int) -> list[list[int]]:
    """Which dialogues share a row: the longest first, each into the first row that has room.

    Needs at most 11/9 of the fewest possible rows + 6/9 (Dosa 2007). Returns indices into
    `lengths`, a list for each row. The search is quadratic: for a batch, not for a data set.
    """
    rows: list[list[int]] = []
    room: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        row = next((r for r, free in enumerate(room) if free >= lengths[i]), len(rows))
        if row == len(rows):
            rows.append([])
            room.append(context)
        rows[row].append(i)
        room[row] -= lengths[i]
    return rows


def pack(examples: Sequence[Example], context: int, pad_id: int) -> Packed:
    """Put dialogues side by side into rows of at most `context` tokens, `first_fit_decreasing`.

    To be used with `segment_mask` and `positions`; without them a dialogue would read the ones
    before it. Raises DataError when there is nothing to pack or a dialogue is too long.
    """
    lengths = [len(tokens) for tokens, _ in examples]
    longest = max(lengths, default=0)
    if not 0 < longest <= context:
        raise DataError(f"the longest dialogue has {longest} tokens, the context {context}.")
    rows = first_fit_decreasing(lengths, context)
    # BEGIN SOLUTION
    shape = (len(rows), max(sum(lengths[i] for i in row) for row in rows))  # (rows, T)
    tokens, labels = torch.full(shape, pad_id), torch.full(shape, IGNORE)
    segments, positions = torch.full(shape, -1), torch.zeros(shape, dtype=torch.long)
    for r, row in enumerate(rows):
        start = 0
        for segment, i in enumerate(row):
            ids, wanted = examples[i]
            here = slice(start, start + len(ids))
            tokens[r, here] = torch.tensor(ids)
            labels[r, here] = torch.tensor(wanted)
            labels[r, start] = IGNORE  # or the dialogue before it would be asked to predict it
            segments[r, here] = segment
            positions[r, here] = torch.arange(len(ids))
            start = here.stop
    return Packed(tokens, labels, segments, positions)
    # END SOLUTION


def segment_mask(segments: Tensor) -> Tensor:
    """Who may look at whom in a packed row: itself and what came before, in its own dialogue.

    segments (B, T) long, -1 on pads -> (B, 1, T, T) bool, [query, key], True = may look. The pads
    of a row look at each other: a query with nothing to look at would be 0 / 0.
    """
    same = segments[:, :, None] == segments[:, None, :]  # (B, T, T)
    return same.tril()[:, None]  # (B, 1, T, T)
