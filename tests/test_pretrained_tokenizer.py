"""Which token ends an answer, where BOS stands, and which tokens a model has embeddings for."""

import pytest
import tiny_families
import torch
from tiny_families import CHATML, FAMILIES, GEMMA, tokenizer_of

from rlhf_course import pretrained_tokenizer as pretrained
from rlhf_course.errors import DataError, ModelError
from rlhf_course.gpt import GPT, GPTConfig
from rlhf_course.huggingface import HuggingFaceLM, load_fitted, load_language_model
from rlhf_course.sampling import generate
from rlhf_course.sft import PLAIN_TEMPLATE, encode_dialogue, encode_messages, encode_prompt
from rlhf_course.stages.corpus import Corpus

TALK = [
    {"role": "user", "content": "Who?"},
    {"role": "assistant", "content": "She."},
    {"role": "user", "content": "Where?"},
    {"role": "assistant", "content": "Here."},
]


# ---------------------------------------------------------------------------- the end of an answer


@pytest.mark.parametrize("name", [n for n, f in FAMILIES.items() if f.template])
def test_the_token_behind_an_answer_is_found(name):
    assert pretrained.turn_end(tokenizer_of(FAMILIES[name])) == FAMILIES[name].ends


@pytest.mark.parametrize(
    ("template", "end"),
    [
        (None, None),
        ("{% for m in messages %}{{ m['content'] }}\n{% endfor %}", None),
        (PLAIN_TEMPLATE, "<|endoftext|>"),  # by the name eos_token
        ("{% for m in messages %}{{ m['content'] }} <|im_end|><|endoftext|>{% endfor %}",
         "<|im_end|>"),
        ("{{ raise_exception('none of this') }}", None),
        (CHATML.replace("<|im_end|>\n", "</think><|im_end|>\n"), "</think>"),
    ],
)  # fmt: skip
def test_templates_of_other_kinds(template, end):
    tokenizer = tokenizer_of(FAMILIES["qwen2.5"])
    tokenizer.chat_template = template
    assert pretrained.turn_end(tokenizer) == end


def saved(tokenizer, folder):
    tokenizer.save_pretrained(folder)
    return pretrained.load_tokenizer(folder)


def test_it_becomes_the_eos_and_the_template_writes_what_it_wrote(tmp_path):
    before = tokenizer_of(FAMILIES["qwen2.5"])
    before.chat_template = CHATML + "{{ eos_token }}"  # the former, behind everything
    written = before.apply_chat_template(TALK, tokenize=False)
    assert written.endswith("<|endoftext|>")
    tokenizer = saved(before, tmp_path)
    assert (tokenizer.eos_token, before.eos_token) == ("<|im_end|>", "<|endoftext|>")
    assert tokenizer.apply_chat_template(TALK, tokenize=False) == written
    again = saved(tokenizer, tmp_path / "again")
    assert again.eos_token == "<|im_end|>"
    assert again.apply_chat_template(TALK, tokenize=False) == written
    assert again.get_vocab() == before.get_vocab()


def test_every_turn_of_a_dialogue_ends_with_it(tmp_path):
    tokenizer = saved(tokenizer_of(FAMILIES["llama3"]), tmp_path)
    tokens, labels = encode_messages(tokenizer, TALK)
    learned = [t for t, label in zip(tokens, labels, strict=True) if label != -100]
    assert learned.count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(learned) == "She.<|eot_id|>Here.<|eot_id|>"


def test_a_tokenizer_without_eos_gets_the_templates(tmp_path):
    tokenizer = tokenizer_of(FAMILIES["qwen2.5"])
    tokenizer.eos_token = None
    assert saved(tokenizer, tmp_path).eos_token == "<|im_end|>"
    tokenizer.chat_template = None
    with pytest.raises(ModelError, match="no EOS token"):
        saved(tokenizer, tmp_path / "base")


# ---------------------------------------------------------------------------------------- its begin


@pytest.mark.parametrize("name", FAMILIES)
def test_bos_is_written_once_or_never(name):
    family = FAMILIES[name]
    tokenizer = tokenizer_of(family)
    assert pretrained.begins_with_bos(tokenizer) == family.adds_bos
    begun = pretrained.begun(["ab", "c"], tokenizer)
    corpus = Corpus(["ab", "c"] * 4, tokenizer, 3)
    bos = tokenizer.bos_token_id if family.adds_bos else None
    assert corpus.stream.tolist().count(bos) == (8 if family.adds_bos else 0)
    assert begun == ([family.bos + "ab", family.bos + "c"] if family.adds_bos else ["ab", "c"])
    assert tokenizer(begun, add_special_tokens=False)["input_ids"][1] == tokenizer("c")["input_ids"]


# ------------------------------------------------------------------------------------- embeddings


def test_a_tokenizer_with_more_tokens_than_the_model_is_refused(tmp_path):
    family = FAMILIES["qwen3"]
    tokenizer = tokenizer_of(family)
    size = len(tokenizer)
    assert pretrained.tokens_written(tokenizer, size, "here") == size
    assert pretrained.tokens_written(tokenizer, size + 100, "here") == size
    HuggingFaceLM(tiny_families.model_of(family, size - 1)).save_pretrained(tmp_path, tokenizer)
    with pytest.raises(ModelError, match=f"{size} tokens up to id {size - 1}, and the model"):
        load_fitted(tmp_path)


def test_a_placeholder_without_embedding_is_no_error_until_a_text_holds_it(tmp_path):
    family = FAMILIES["gemma3"]
    tokenizer = tokenizer_of(family)
    size = len(tokenizer)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image_soft_token>"]})
    HuggingFaceLM(tiny_families.model_of(family, size)).save_pretrained(tmp_path, tokenizer)
    model, read = load_fitted(tmp_path)
    assert len(read) == size + 1 and model.written == size
    encode_dialogue(read, "What is here?", "Nothing.")
    with pytest.raises(DataError, match=r"'<image_soft_token>'.*no embedding"):
        encode_prompt(read, "What is <image_soft_token>?")
    read.chat_template = GEMMA.replace("<end_of_turn>", "<image_soft_token>")
    with pytest.raises(ModelError, match="'<image_soft_token>' has none"):
        read.eos_token = "<image_soft_token>"
        pretrained.tokens_written(read, size, "here")


@pytest.mark.parametrize("name", ["pythia", "qwen2.5", "gpt2"])
def test_ids_without_a_token_are_never_sampled(name, tmp_path):
    family = FAMILIES[name]._replace(padding=9)
    tokenizer = tokenizer_of(family)
    size = len(tokenizer)
    if name == "gpt2":  # our own: wrapped where its embedding is padded
        theirs = GPT(GPTConfig(size + 9, 96, layers=1, heads=2, width=64))
        embedding = theirs.token_embedding.weight
    else:
        theirs = HuggingFaceLM(tiny_families.model_of(family, size + 9))
        embedding = theirs.model.get_output_embeddings().weight
    with torch.no_grad():  # one direction, in which the rows without a token are likeliest
        embedding[size:] = 5 * embedding[7] + 5
    theirs.save_pretrained(tmp_path, tokenizer)
    prompts = [[7, 8], [9, 10, 11]] * 20
    drawn = generate(load_language_model(tmp_path)[0], prompts, 6, -1).responses
    assert max(map(max, drawn)) >= size, "else this test shows nothing"
    model, _ = load_fitted(tmp_path)
    assert isinstance(model, HuggingFaceLM)
    said = generate(model, prompts, 6, -1)
    assert max(map(max, said.responses)) < size
    tokens = torch.tensor([[7, 8, 9, 10]])
    with torch.no_grad():
        torch.testing.assert_close(model(tokens), theirs(tokens)[..., :size], atol=1e-5, rtol=0)
    model.save_pretrained(tmp_path / "again", tokenizer)
    assert load_fitted(tmp_path / "again")[0].vocab_size == size + 9  # nothing was resized
