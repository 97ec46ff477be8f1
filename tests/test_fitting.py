"""What becomes of rows that do not fit a model's context, and tokens in 4 bytes each."""

import tracemalloc

import pytest
import torch

from rlhf_course.data import Read, read
from rlhf_course.data_report import DataReport, quantile
from rlhf_course.errors import DataError
from rlhf_course.sft import encode_dialogue, encode_prompt
from rlhf_course.stages import loading
from rlhf_course.stages.corpus import Corpus, words_of
from rlhf_course.stages.fitting import Encoder, Fitter, TokenTable, shorter
from rlhf_course.stages.settings import SFTConfig
from rlhf_course.stages.sft import as_example
from rlhf_course.world import make_world
from rlhf_course.world.tokenizer import train_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_world("town", "tiny").tokenizer


def turns(*texts):
    roles = ("user", "assistant")
    return [{"role": roles[i % 2], "content": text} for i, text in enumerate(texts)]


def fitted(tokenizer, rows, context, policy, reserve=0, limit=None):
    """(rows of the table as lists, or None for those left out; fitter) of (prompt, answers)."""
    report = DataReport("set", "comparisons")
    fitter = Fitter(TokenTable(lambda *lists: list(lists)), Encoder(tokenizer, report),
                    limit or context, reserve)  # fmt: skip
    for i, (prompt, answers) in enumerate(rows):
        fitter.add(f"line {i + 1}", prompt, answers)
    kept = fitter.fit(context, policy, lambda i: rows[i])
    return [fitter.table[kept[i]] if i in kept else None for i in range(len(rows))], fitter


LONG = turns("where does she live", "in oslo", "and he", "in rome", "and the child")


def test_what_fits_is_what_sft_writes(tokenizer):
    rows = [("where is she", ["in oslo", "in rome or so"]), (LONG, ["here"])]
    table, fitter = fitted(tokenizer, rows, 200, "stop")
    for (prompt, answers), lists in zip(rows, table, strict=True):
        assert lists[0] == encode_prompt(tokenizer, prompt)
        for answer, tokens in zip(answers, lists[1:], strict=True):
            assert lists[0] + tokens == encode_dialogue(tokenizer, prompt, answer)[0]
    assert fitter.report.used == 2
    assert not fitter.report.dropped and not fitter.report.changed


def test_stop_names_the_longest_row_and_counts_them(tokenizer):
    rows = [("a", ["b"]), ("a b c " * 9, ["b"]), ("a " * 99, ["b"])]
    with pytest.raises(
        DataError, match=r"line 3: \d+ tokens, exceed the context of 16; 2 of 3 rows"
    ):
        fitted(tokenizer, rows, 16, "stop")


def test_drop_counts_and_keeps_the_others(tokenizer):
    table, fitter = fitted(tokenizer, [("a", ["b"]), ("a " * 99, ["b"])], 16, "drop")
    assert table[0] is not None and table[1] is None
    (reason, count), = fitter.report.dropped.items()  # fmt: skip
    assert (reason, count.first) == ("longer than the context of 16 tokens", ["line 2"])
    with pytest.raises(DataError, match=r"no row is left.*1 longer than the context"):
        fitted(tokenizer, [("a " * 99, ["b"])], 16, "drop")


def test_cut_leaves_out_the_oldest_turns_first_and_no_more_than_needed(tokenizer):
    answer = ["in bergen"]
    whole = len(encode_dialogue(tokenizer, LONG, answer[0])[0])
    two = encode_dialogue(tokenizer, LONG[2:], answer[0])[0]
    for context in range(len(two), whole):
        (lists,), fitter = fitted(tokenizer, [(LONG, answer)], context, "cut")
        assert lists[0] + lists[1] == two, context
        assert fitter.prompts[0] == LONG[2:]
        assert list(fitter.report.changed) == ["oldest turns of the prompt left out"]
    (lists,), fitter = fitted(tokenizer, [(LONG, answer)], len(two) - 1, "cut")
    assert fitter.prompts[0] == "and the child"
    assert lists[0] + lists[1] == encode_dialogue(tokenizer, "and the child", answer[0])[0]


def test_only_then_the_answers_end_is_cut_and_has_no_eos(tokenizer):
    start = encode_prompt(tokenizer, "and the child")
    answer = "in bergen with her and him"
    full = encode_dialogue(tokenizer, "and the child", answer)[0][len(start) :]
    context = len(start) + 3
    (lists,), fitter = fitted(tokenizer, [(LONG, [answer])], context, "cut")
    assert lists == [start, full[:3]]
    assert tokenizer.eos_token_id not in lists[1]
    assert set(fitter.report.changed) == {
        "oldest turns of the prompt left out", "end of an answer cut off"}  # fmt: skip
    rows = [(LONG, [answer]), ("a", ["b"])]
    (gone, there), fitter = fitted(tokenizer, rows, len(start), "cut")
    assert gone is None and there is not None
    assert list(fitter.report.dropped) == [f"prompt fills the context of {len(start)} tokens"]


def test_a_system_message_stays_when_turns_are_left_out():
    system = {"role": "system", "content": "be kind"}
    assert list(shorter([system, *LONG])) == [[system, *LONG[2:]], [system, LONG[4]]]
    assert list(shorter(LONG)) == [LONG[2:], "and the child"]
    assert list(shorter("alone")) == []


def test_two_answers_that_become_one_are_no_comparison(tokenizer):
    same = "in the house of her mother"
    rows = [("a", [f"{same} yes", f"{same} no"]), ("a", ["b", "c"])]
    room = len(encode_prompt(tokenizer, "a")) + 5
    (gone, there), fitter = fitted(tokenizer, rows, room, "cut")
    assert gone is None and there is not None
    assert list(fitter.report.dropped) == ["answers the same once they are cut"]


def test_an_answer_to_be_sampled_needs_room(tokenizer):
    size = len(encode_prompt(tokenizer, LONG))
    (lists,), _ = fitted(tokenizer, [(LONG, ())], size + 8, "stop", reserve=8)
    assert lists == [encode_prompt(tokenizer, LONG)]
    with pytest.raises(DataError, match=rf"{size} tokens, and with 9 for the answer they exceed"):
        fitted(tokenizer, [(LONG, ())], size + 8, "stop", reserve=9)
    (lists,), _ = fitted(tokenizer, [(LONG, ())], size + 8, "cut", reserve=9)
    assert lists == [encode_prompt(tokenizer, LONG[2:])]


@pytest.mark.parametrize("policy", ["drop", "cut"])
def test_a_megabyte_is_not_tokenized(tokenizer, policy, monkeypatch):
    read_characters = []
    original = type(tokenizer).__call__
    monkeypatch.setattr(type(tokenizer), "__call__", lambda self, text, **more: (
        read_characters.append(len(text)), original(self, text, **more))[1])  # fmt: skip
    huge = "x" * 1_000_000
    rows = [("a", ["b"]), (huge, ["b"]), ("a", [huge]), (turns(huge, "b", "c"), ["d"])]
    table, fitter = fitted(tokenizer, rows, 32, policy)
    assert max(read_characters) <= 20_000
    assert table[1] is None
    assert (table[2] is None) == (table[3] is None) == (policy == "drop")
    if policy == "cut":
        assert len(table[2][0]) + len(table[2][1]) == 32
        assert table[3][0] == encode_prompt(tokenizer, "c")
    assert fitter.report.lengths()["answer"]["max"] > 100_000


def test_a_context_is_chosen_from_what_the_rows_need(tokenizer):
    lengths = [10] * 95 + [300] * 5
    fitter = Fitter(TokenTable(list), Encoder(tokenizer, DataReport("set", "dialogues")), 1024)
    for n in lengths:
        fitter._measured(n, n // 2, [])
    assert fitter.choose_context("drop", 4) == 64
    assert fitter.choose_context("drop", 64) == 128  # room for an answer behind each prompt
    assert fitter.choose_context("stop", 4) == 320
    fitter._measured(5000, 10, [])
    assert fitter.choose_context("stop", 4) == 1024


def test_quantiles_are_lengths_that_occur():
    values = list(range(1, 101))
    assert [quantile(values, q) for q in (0.0, 0.5, 0.95, 1.0)] == [1, 50, 95, 100]
    assert quantile([7], 0.95) == 7


def test_a_table_gives_back_what_it_was_given_in_4_bytes_a_token():
    rows = [([1, 2], [3]), ([], [2**31 - 1]), ([5], [6, 7, 8])]
    table = TokenTable(as_example)
    for row in rows:
        table.append(*row)
    assert [table[i] for i in range(3)] == [as_example(*row) for row in rows]
    assert list(table) == table[:] == [table[-3], table[-2], table[-1]]
    part = table.take([2, 0])
    assert (len(part), part[0], part[1:]) == (2, table[2], [table[0]])
    assert part.take([1])[0] == table[0]
    for i in (3, -4):
        with pytest.raises(IndexError):
            table[i]
    tracemalloc.start()
    large = TokenTable(as_example)
    for i in range(1000):
        large.append(range(i, i + 900), range(100))
    used = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert used < 1000 * 1000 * 4 * 1.3


def test_the_held_out_rows_do_not_depend_on_how_many_fit(tokenizer):
    items = [(f"a {i}", ("b " * (40 if i % 3 else 1),)) for i in range(40)]
    parts = []
    for context in (20, 200):
        data = Read(items, list(range(40)), DataReport("set", "comparisons"))
        fitter = Fitter(TokenTable(lambda *x: x), Encoder(tokenizer, data.report), context)
        for i, item in enumerate(items):
            fitter.add(f"line {i}", *item)
        kept = fitter.fit(context, "drop", lambda i: items[i])
        config = SFTConfig(validation=0.25, seed=1)
        *_, held, train = loading.split_table(config, data, fitter, kept)
        parts.append((set(held), set(train)))
    (held, train), (all_held, all_train) = parts
    assert held < all_held and train < all_train and not all_held & all_train


def test_a_corpus_is_the_same_whether_listed_or_streamed(tokenizer):
    documents = [f"she lives in oslo {i} " * (i % 7 + 1) for i in range(700)]
    corpus = Corpus(documents, tokenizer, 16)
    ids = tokenizer(documents, add_special_tokens=False)["input_ids"]
    stream = [token for row in ids for token in (*row, tokenizer.eos_token_id)]
    assert corpus.stream.tolist() == stream
    assert corpus.rows(4, 0, "a").dtype == corpus.every_row(2).dtype == torch.long
    streamed = Corpus(iter(documents), tokenizer, 16)
    assert torch.equal(streamed.rows(64, 3, "x"), corpus.rows(64, 3, "x"))
    assert torch.equal(streamed.every_row(9), corpus.every_row(9))


def test_a_tokenizer_is_not_trained_on_words_without_end():
    long = ["x" * 1_000_000, "ab" * 500_000, " " * 500_000 + "end", "?!" * 99_999]
    cut = list(words_of([*long, "unchanged text, 12 words."]))
    assert [len(text) for text in cut] == [200, 200, 203, 200, 25]
    tokenizer = train_tokenizer(words_of([*long, "a b c"] * 3), 300, whole_words=False)
    assert len(tokenizer) == 300


def test_a_row_that_the_template_refuses_is_a_bad_row_with_its_line(tokenizer, write):
    good = {"prompt": "a", "response": "b"}
    system = {"messages": [{"role": "system", "content": "s"}, *turns("a", "b")]}
    data = read(write(good, system), "dialogues")
    report = data.report
    for policy in ("stop", "drop"):
        fitter = Fitter(TokenTable(as_example), Encoder(tokenizer, report, policy), 64)
        fitter.add(data.places[0], "a", ["b"])
        prompt, response = data.items[1]
        if policy == "stop":
            with pytest.raises(DataError, match="line 2: the chat template refuses"):
                fitter.add(data.places[1], prompt, [response])
            continue
        fitter.add(data.places[1], prompt, [response])
        assert list(fitter.fit(64, "stop", lambda i: data.items[i])) == [0]
        assert report.dropped["not to be written by the chat template"].count == 1
