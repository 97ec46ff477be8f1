"""The work that everybody gets: shapes, rows of tokens, and the files that all read."""

from __future__ import annotations

import math
import random
from dataclasses import asdict, dataclass
from pathlib import Path

EOS, PAD, FIRST = 0, 1, 3
"""Special tokens, and the first of the others."""
PPO_BATCHES = 8
"""Rollouts whose prompts differ; then they come again."""


@dataclass(frozen=True)
class Shape:
    """A GPT-2."""

    layers: int
    heads: int
    width: int
    vocabulary: int
    context: int = 512

    @property
    def matrices(self) -> int:
        """Numbers in the blocks' matrices: what every token is multiplied with."""
        return 12 * self.layers * self.width**2

    @property
    def numbers(self) -> int:
        """All parameters."""
        vectors = self.layers * 13 * self.width + 2 * self.width
        return self.matrices + (self.vocabulary + self.context) * self.width + vectors


SHAPES = {
    "0.8M": Shape(3, 2, 128, 1280),
    "10M": Shape(6, 5, 320, 8192),
    "124M": Shape(12, 12, 768, 50257, 1024),
    # Models that grow and are alike otherwise: heads of 64, one small vocabulary, a long context.
    "0.2M long": Shape(2, 1, 64, 512, 1024),
    "0.8M long": Shape(3, 2, 128, 512, 1024),
    "3.6M long": Shape(4, 4, 256, 512, 1024),
    "11M long": Shape(6, 6, 384, 512, 1024),
    "29M long": Shape(9, 8, 512, 512, 1024),
}


@dataclass(frozen=True)
class Case:
    """One kind of work on one model."""

    size: str
    rows: int
    """Dialogues, pairs or prompts an update or a rollout."""
    prompt: int
    """Mean tokens of a prompt: from half of it to one and a half; with `even` each has as many."""
    answer: int
    """Mean tokens of an answer, exponentially distributed; with `even` each has as many."""
    dtype: str = "float32"
    updates: int = 4
    """Updates (SFT, reward model) of one turn."""
    packing: bool = False
    even: bool = False
    most: int = 256
    """No answer is longer; nor than four times the mean."""
    minibatch: int = 0
    """Answers an update of PPO."""
    epochs: int = 4
    folder: str = ""
    """Where `write_models` has put the models."""

    @property
    def shape(self) -> Shape:
        """The model's."""
        return SHAPES[self.size]

    @property
    def longest(self) -> int:
        """The longest answer."""
        return self.answer if self.even else min(4 * self.answer, self.most)

    def lengths(self, count: int, seed: int = 0) -> list[tuple[int, int]]:
        """(tokens of the prompt, of the answer) of `count` dialogues."""
        if self.even:
            return [(self.prompt, self.answer)] * count
        draw = random.Random(f"lengths {seed}")
        prompts = (draw.randint(self.prompt // 2, self.prompt * 3 // 2) for _ in range(count))
        answers = (1 + int(draw.expovariate(1 / self.answer)) for _ in range(count))
        return [(p, min(a, self.longest)) for p, a in zip(prompts, answers, strict=True)]

    def dialogues(self, count: int, seed: int = 0) -> list[tuple[list[int], list[int]]]:
        """Prompts and answers of random tokens."""
        draw = random.Random(f"tokens {seed}")

        def text(length: int) -> list[int]:
            return [draw.randrange(FIRST, self.shape.vocabulary) for _ in range(length)]

        return [(text(p), text(a)) for p, a in self.lengths(count, seed)]

    def pairs(self, count: int) -> list[tuple[list[int], list[int], list[int]]]:
        """Prompts with two answers each."""
        other = self.dialogues(count, seed=1)
        return [(p, a, b) for (p, a), (_, b) in zip(self.dialogues(count), other, strict=True)]

    def model(self, kind: str = "policy") -> Path:
        """The directory of a model: "policy", "reward", or "ending", a policy whose answers end."""
        return Path(self.folder) / self.size / kind

    def told(self) -> dict:
        """For the results."""
        return {k: v for k, v in asdict(self).items() if k != "folder"}


def write_models(folder: Path, sizes, ending: dict[str, int] | None = None) -> None:
    """A policy and a reward model of every size, random but the same for all, and a tokenizer.

    ending: sizes that get a policy with this mean length of its answers, too.
    """
    import torch

    from rlhf_course.gpt import GPT, GPTConfig
    from rlhf_course.reward_model import ScalarModel

    for size in sizes:
        shape = SHAPES[size]
        torch.manual_seed(0)
        config = GPTConfig(shape.vocabulary, shape.context, shape.layers, shape.heads, shape.width)
        policy, tokenizer = GPT(config), _tokenizer(shape.vocabulary)
        policy.save_pretrained(folder / size / "policy", tokenizer)
        ScalarModel.from_language_model(policy).save_pretrained(folder / size / "reward", tokenizer)
        if ending and size in ending:
            end_answers(policy, ending[size])
            policy.save_pretrained(folder / size / "ending", tokenizer)


def end_answers(policy, mean: float) -> None:
    """Give EOS the probability 1 / mean, whatever came before it, in a policy of random weights.

    The final norm adds a constant vector, along which the embedding of EOS lies: their product is
    the logit of EOS, beside those of V - 1 tokens that differ by little.
    """
    import torch

    logit, share = math.log((policy.vocab_size - 1) / (mean - 1)), 0.1
    with torch.no_grad():
        direction = torch.zeros(policy.width)
        direction[0] = 1.0
        policy.token_embedding.weight[:, 0] = 0.0  # the constant is to move no other logit
        policy.token_embedding.weight[EOS] = share * direction
        policy.final_norm.bias.copy_(logit / share * direction)


def _tokenizer(vocabulary: int):
    """One word a token; TRL wants a tokenizer even where rows are tokens already."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<eos>", "<pad>", "<unk>", *(f"w{i}" for i in range(3, vocabulary))]
    words = {word: i for i, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>", unk_token="<unk>"
    )
