"""A byte-level BPE tokenizer trained on a world's own texts, as a Hugging Face fast tokenizer.

Byte-level: any string can be written, what the world never says in more tokens. Training stops
by itself when no pair is left to merge, which is when every word is one token. A space is put
before the first word, so that a word is the same token at the start of a text, after a
special token and inside a sentence; decoding takes that space away again.
"""

from __future__ import annotations

from collections.abc import Iterable

from rlhf_course.errors import ConfigError

EOS, PAD, USER, ASSISTANT = "<|endoftext|>", "<|pad|>", "<|user|>", "<|assistant|>"

# No system role: the worlds have none, and a template that swallows one in silence would lie.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'user' %}<|user|>{{ message['content'] }}"
    "{% elif message['role'] == 'assistant' %}"
    "<|assistant|>{{ message['content'] }}<|endoftext|>"
    "{% else %}{{ raise_exception('the roles are user and assistant') }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def train_tokenizer(texts: Iterable[str], max_vocabulary: int = 1024, whole_words: bool = True):
    """Train byte-level BPE until every word of `texts` is one token.

    Args:
        texts: the text to learn from.
        max_vocabulary: the most tokens, the 4 special and 256 byte tokens among them.
        whole_words: whether it is an error when they do not suffice. Real text has more words
            than that; the rare ones are then several tokens.

    Returns:
        transformers.PreTrainedTokenizerFast with EOS, PAD and the chat template
        "<|user|>...<|assistant|>...<|endoftext|>", any number of turns.

    Raises:
        ConfigError: the words do not fit into `max_vocabulary`, or not even the bytes do.
    """
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    special = [PAD, EOS, USER, ASSISTANT]
    if max_vocabulary < len(alphabet) + len(special):
        raise ConfigError(
            f"a vocabulary of {max_vocabulary}: give at least {len(alphabet) + len(special)}, one "
            "token for each byte and the special ones."
        )
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    bpe.decoder = decoders.Sequence([decoders.ByteLevel(), decoders.Strip(" ", 1, 0)])
    trainer = trainers.BpeTrainer(
        vocab_size=max_vocabulary,
        special_tokens=special,
        initial_alphabet=alphabet,
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    if whole_words and bpe.get_vocab_size() >= max_vocabulary:
        raise ConfigError(
            f"the words do not fit into {max_vocabulary} tokens; allow more, or use fewer words"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        eos_token=EOS,
        pad_token=PAD,
        additional_special_tokens=[USER, ASSISTANT],
        chat_template=CHAT_TEMPLATE,
        padding_side="right",
        clean_up_tokenization_spaces=False,
    )
