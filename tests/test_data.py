"""Real data in, one schema out; and what each kind of broken input is told."""

import gzip
import json
import math
import os
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest

from rlhf_course.data import (
    Dialogue,
    Preference,
    PromptRow,
    Reading,
    read,
    read_comparisons,
    read_dialogues,
    read_documents,
    read_prompts,
    split_rows,
)
from rlhf_course.errors import ConfigError, DataError
from rlhf_course.sources import load_rows, short_name
from rlhf_course.world import make_world

DROP = Reading(bad_rows="drop")
USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "Because."}
HH = "\n\nHuman: Hi\n\nAssistant: Hello. You?\n\nHuman: Well: and you?\n\nAssistant:"
HH_PROMPT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello. You?"},
    {"role": "user", "content": "Well: and you?"},
]


# --- sources ---------------------------------------------------------------------------------


def test_every_file_format_holds_the_same_rows(tmp_path, write):
    rows = [{"text": "Grüße, 世界", "n": 1}, {"text": "a\nb", "n": 2}]
    lines = write(*rows)
    (tmp_path / "list.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (tmp_path / "lines.json").write_bytes(lines.read_bytes())
    (tmp_path / "rows.jsonl.gz").write_bytes(gzip.compress(lines.read_bytes()))
    (tmp_path / "marked.jsonl").write_bytes(b"\xef\xbb\xbf" + lines.read_bytes() + b"\r\n\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "rows.parquet")
    files = [file for file in tmp_path.iterdir() if file.is_file()]
    assert len(files) == 6
    for file in files:
        assert load_rows(file) == rows, file.name
        assert load_rows(str(file)) == rows


def test_a_line_separator_inside_a_text_does_not_end_the_row(write):
    assert load_rows(write('{"text": "a\u2028b\u0085c"}', name="x.json")) == [
        {"text": "a\u2028b\u0085c"}
    ]
    assert load_rows(write('{"text": "a\u2028b\u0085c"}')) == [{"text": "a\u2028b\u0085c"}]


def test_a_folder_is_read_in_the_order_of_its_names(tmp_path, write):
    write({"text": "c"}, name="b.jsonl")
    write({"text": "a"}, {"text": "b"}, name="a.jsonl")
    write("not data", name="README.md")
    assert read_documents(tmp_path) == ["a", "b", "c"]


@pytest.mark.parametrize("pattern", ["{}-00000-of-00001.jsonl", "data/{}.jsonl", "{}/rows.jsonl"])
def test_of_a_split_folder_only_one_part_is_read(tmp_path, write, pattern):
    for part in ("test", "train", "validation"):
        write({"text": part}, name=pattern.format(part))
    assert load_rows(tmp_path) == [{"text": "train"}]
    assert load_rows(tmp_path, "test") == [{"text": "test"}]
    with pytest.raises(DataError, match=r"no file of the eval split. Found: .*train"):
        load_rows(tmp_path, "eval")


def test_a_word_that_merely_begins_like_a_split_names_none(tmp_path, write):
    write({"text": "a"}, name="training.jsonl")
    write({"text": "b"}, name="testimony.jsonl")
    assert sorted(read_documents(tmp_path)) == ["a", "b"]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.jsonl", b'{"text": "x"}\n{"text": \n', r"a\.jsonl, line 2: not valid JSON"),
        ("a.jsonl", b'{"text": "x"}\n\n["x"]\n', r"a\.jsonl, line 3: not a row"),
        ("a.json", b'[{"text": "x"},\n {"text": }]', r"a\.json: not valid JSON .*line 2"),
        ("a.json", b'[{"text": "x"}, 3]', r"a\.json, row 2: not a row"),
        ("a.jsonl", b"", r"a\.jsonl: no row in it"),
        ("a.jsonl", b"\n \n", r"a\.jsonl: no row in it"),
        ("a.json", b"[]", r"a\.json: no row in it"),
        ("a.jsonl", b'{"text": "\xff"}', r"a\.jsonl: not UTF-8"),
        ("a.jsonl.gz", b"not gzip", r"a\.jsonl\.gz: cannot be read"),
        ("a.parquet", b"not parquet", r"a\.parquet: not a readable parquet file"),
        ("a.xlsx", b"", r"a\.xlsx: not a known kind of data file\. Read are \.jsonl"),
    ],
)
def test_a_broken_file_is_named_with_its_line(tmp_path, name, content, told):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=told):
        load_rows(tmp_path / name)


def test_a_truncated_gzip_file_is_an_error_not_a_short_data_set(tmp_path):
    whole = gzip.compress(b'{"text": "a"}\n' * 1000)
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):
        load_rows(tmp_path / "a.jsonl.gz")


@pytest.mark.parametrize("name", ["gone.jsonl", "./gone", "gone/", "a/b/c", r"C:\data", "~/gone.x"])
def test_a_missing_path_is_told_as_such_and_no_hub_is_asked(name):
    with pytest.raises(DataError, match="no such file or folder"):
        load_rows(name)


def test_an_empty_folder_says_what_it_looked_for(tmp_path):
    with pytest.raises(DataError, match=r"no data file in this folder.*\.parquet"):
        load_rows(tmp_path)


def test_a_hub_name_while_offline_names_the_switches():
    code = (
        "from rlhf_course.errors import DataError\n"
        "from rlhf_course.sources import load_rows\n"
        "try: load_rows('nobody/nothing-of-that-name:main@test')\n"
        "except DataError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    for words in ("nobody/nothing-of-that-name", "HF_HUB_OFFLINE", "HF_ENDPOINT", "CONFIG@SPLIT"):
        assert words in done.stdout


def test_a_hub_name_is_split_into_name_configuration_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        return datasets.Dataset.from_list([{"text": "x"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows("owner/name:conf-1@test[:5%]") == [{"text": "x"}]
    load_rows("name")
    load_rows("owner/name@train_prefs")
    assert asked == [
        ("owner/name", "conf-1", "test[:5%]"),
        ("name", None, "train"),
        ("owner/name", None, "train_prefs"),
    ]


@pytest.mark.parametrize(("asked", "ways"), [
    ("owner/set:test", [(None, "test")]),
    ("owner/set:train_prefs", [(None, "train_prefs")]),
    ("owner/set:validation[:10]", [(None, "validation[:10]")]),
    ("owner/set:main", [("main", "train")]),
    ("owner/set:part_b", [("part_b", "train"), (None, "part_b")]),
    ("owner/set:dev", [(None, "dev"), ("dev", "train")]),
])  # fmt: skip
def test_behind_the_colon_stands_a_split_or_a_configuration(monkeypatch, asked, ways):
    import datasets

    heard = []

    def load_dataset(name, config, split, **more):
        heard.append((config, split))
        if heard[-1] != ways[-1]:
            raise ValueError("no such configuration, or no such split")
        return datasets.Dataset.from_list([{"text": "x"}])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert load_rows(asked) == [{"text": "x"}]
    assert heard == ways


def test_of_a_hub_name_no_more_rows_are_fetched_than_asked_for(monkeypatch):
    import datasets

    fetched = []

    def load_dataset(name, config, split, streaming=False):
        assert streaming
        for n in range(1000):
            fetched.append(n)
            yield {"text": f"row {n}"}

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert len(read(("owner/set"), "prompts", Reading(rows=3, columns="prompt=text")).items) == 3
    assert len(fetched) == 3


@pytest.mark.parametrize(("source", "name"), [
    ("a/b/hh.jsonl.gz", "hh"), ("hh.json", "hh"), ("x.y.csv.gz", "x.y"), ("data/sets/", "sets"),
    ("Anthropic/hh-rlhf", "hh-rlhf"), ("openai/gsm8k:main@test", "gsm8k-main"),
    ("stanfordnlp/imdb:test[:5%]", "imdb"), ("name:train_sft", "name"),
])  # fmt: skip
def test_what_a_workspace_is_called_after(source, name):
    assert short_name(source) == name


# --- schemas ---------------------------------------------------------------------------------

DIALOGUES = [
    ({"prompt": "Why?", "response": "Because."}, Dialogue("Why?", "Because.")),
    ({"prompt": "Why?", "completion": "Because."}, Dialogue("Why?", "Because.")),
    ({"prompt": [USER], "completion": [ASSISTANT]}, Dialogue("Why?", "Because.")),
    ({"question": "Why?", "answer": "Because."}, Dialogue("Why?", "Because.")),
    ({"messages": [USER, ASSISTANT]}, Dialogue("Why?", "Because.")),
    (
        {"messages": [USER, ASSISTANT, USER, ASSISTANT | {"content": "No."}]},
        Dialogue([USER, ASSISTANT, USER], "No."),
    ),
    (
        {"messages": [{"role": "system", "content": "Be kind."}, USER, ASSISTANT]},
        Dialogue([{"role": "system", "content": "Be kind."}, USER], "Because."),
    ),
    ({"instruction": "Add.", "input": "1 2", "output": "3"}, Dialogue("Add.\n\n1 2", "3")),
    ({"instruction": "Sing.", "input": "", "output": "La"}, Dialogue("Sing.", "La")),
    ({"chosen": HH + " Fine.", "rejected": HH + " No."}, Dialogue(HH_PROMPT, "Fine.")),
]


@pytest.mark.parametrize(("row", "expected"), DIALOGUES)
def test_dialogues_in_every_schema(write, row, expected):
    assert read_dialogues(write(row)) == [expected]
    assert read_prompts(write(row)) == [PromptRow(expected.prompt, row)]


def test_the_texts_of_a_dialogue():
    assert Dialogue("a", "b").texts() == ["a", "b"]
    assert Dialogue([USER, ASSISTANT, USER], "c").texts() == ["Why?", "Because.", "Why?", "c"]


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (
            {"prompt": "Why?", "chosen": "A", "rejected": "B"},
            Preference("Why?", ("A", "B")),
        ),
        (
            {
                "prompt": [USER],
                "chosen": [ASSISTANT],
                "rejected": [ASSISTANT | {"content": "No."}],
            },
            Preference("Why?", ("Because.", "No.")),
        ),
        (
            {
                "prompt": "Why?",  # as in ultrafeedback_binarized, the dialogues hold it once more
                "chosen": [USER, ASSISTANT],
                "rejected": [USER, ASSISTANT | {"content": "No."}],
            },
            Preference("Why?", ("Because.", "No.")),
        ),
        (
            {"chosen": HH + " Fine.", "rejected": HH + " No."},
            Preference(HH_PROMPT, ("Fine.", "No.")),
        ),
        ({"prompt": "Why?", "responses": ["A", "B", "C"]}, Preference("Why?", ("A", "B", "C"))),
    ],
)
def test_comparisons_in_every_schema(write, row, expected):
    assert read_comparisons(write(row)) == [expected]


def test_prompts_may_stand_alone_and_keep_their_columns(write):
    row = {"prompt": "How many?", "schema": "CREATE TABLE t (a INTEGER)", "gold": 3}
    assert read_prompts(write(row)) == [PromptRow("How many?", row)]
    waiting = {"messages": [USER, ASSISTANT, USER]}
    assert read_prompts(write(waiting))[0].prompt == [USER, ASSISTANT, USER]


GOOD = {"prompt": "p", "response": "r", "chosen": "c", "rejected": "d", "text": "t"}


@pytest.mark.parametrize(
    ("read", "row", "told"),
    [
        (read_dialogues, {"query": "a", "reply": "b"}, "Found: query, reply. Needed: messages"),
        (read_dialogues, {"prompt": "a"}, "Found: prompt. Needed: .*prompt/response"),
        (read_dialogues, {"prompt": "a", "response": 3}, '"response" holds a number, 3'),
        (read_dialogues, {"prompt": "a", "response": None}, r'"response" holds nothing \(null\)'),
        (read_dialogues, {"prompt": "a", "response": " \n"}, '"response" is empty'),
        (read_dialogues, {"prompt": "", "response": "b"}, '"prompt" is empty'),
        (read_dialogues, {"messages": []}, '"messages" holds a list of 0'),
        (read_dialogues, {"messages": [USER]}, "must end with an answer .* its turns are: user"),
        (read_dialogues, {"messages": [ASSISTANT]}, "must end with an answer"),
        (read_dialogues, {"messages": [USER, {"role": "assistant"}]}, "message 2, is .* it needs"),
        (read_dialogues, {"messages": [USER, ASSISTANT | {"content": ""}]}, '"messages" is empty'),
        (read_comparisons, {"prompt": "a", "chosen": "b"}, "Needed: chosen and rejected"),
        (read_comparisons, {"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        (read_comparisons, {"prompt": "a", "chosen": "b", "rejected": ""}, '"rejected" is empty'),
        (read_comparisons, {"prompt": "a", "responses": ["b"]}, "not two or more answers"),
        (read_comparisons, {"prompt": "a", "responses": ["b", "c", "b"]}, "are the same"),
        (
            read_comparisons,
            {"prompt": "a", "responses": ["b", 1]},
            r'"responses\[1\]" holds a number',
        ),
        (read_comparisons, {"chosen": "b", "rejected": "c"}, 'no "prompt", and "chosen" is not'),
        (
            read_comparisons,
            {"chosen": HH + " Fine.", "rejected": HH.replace("Hi", "Hoi") + " No."},
            "answer different prompts",
        ),
        (read_comparisons, {"chosen": HH + " ", "rejected": HH + " No."}, '"chosen" is empty'),
        (read_prompts, {"answer": "42"}, "Found: answer. Needed: prompt, question"),
        (read_prompts, {"prompt": {"a": 1}}, '"prompt" holds an object'),
        (read_documents, {"body": "a"}, "Found: body. Needed: text"),
        (read_documents, {"text": ["a"]}, '"text" holds a list of 1'),
        (read_documents, {"text": " "}, '"text" is empty'),
    ],
)
def test_a_bad_row_is_named_with_its_line_and_field(write, read, row, told):
    path = write(GOOD, "", row)
    with pytest.raises(DataError, match=told) as error:
        read(path)
    assert str(error.value).startswith(f"{path}, line 3: ")


def test_bad_rows_are_left_out_only_when_asked_and_then_counted(write):
    same = {"prompt": "a", "chosen": "b", "rejected": "b"}
    path = write(GOOD, same, GOOD, same)
    done = read(path, "comparisons", DROP)
    assert done.items == [Preference("p", ("c", "d"))] * 2
    assert (done.report.read, done.report.used) == (4, 2)
    (told,) = done.report.dropped.values()
    assert told.first == [f"{path}, line 2", f"{path}, line 4"]
    with pytest.raises(DataError, match=r"all 1 rows are unusable. .*line 1: .*the same"):
        read_comparisons(write(same), DROP)


@pytest.mark.parametrize(("field", "values"), [("ranks", [2, 3, 1]), ("scores", [0.5, -1, 7])])
def test_ranked_answers_stand_in_the_order_of_their_ranks_or_scores(write, field, values):
    row = {"prompt": "Why?", "responses": ["B", "C", "A"], field: values}
    assert read_comparisons(write(row)) == [Preference("Why?", ("A", "B", "C"))]
    assert read_dialogues(write(row)) == [Dialogue("Why?", "A")]
    for wrong, told in (([1, 1, 2], "one value"), ([1, 2], "needs 3 numbers"),
                        ([1, 2, "3"], "needs 3 numbers"), (None, "needs 3"),
                        ([1, 2, math.nan], "needs 3 numbers"),
                        ([0, 1, True], "needs")):  # fmt: skip
        with pytest.raises(DataError, match=told):
            read_comparisons(write(row | {field: wrong}))


# --- columns, rows, duplicates ---------------------------------------------------------------


def test_columns_say_which_is_which_and_no_other_is_read(write):
    row = {"q": "Why?", "meta": {"a.b": "Because."}, "messages": [USER], "answer": "no"}
    path = write(row)
    asked = Reading(columns="prompt=q, response=meta.a.b")
    assert read_dialogues(path, asked) == [Dialogue("Why?", "Because.")]
    assert read_prompts(path, asked) == [PromptRow("Why?", row)]  # a reward sees the whole row
    assert read_documents(path, Reading(columns="text=answer")) == ["no"]
    with pytest.raises(DataError, match=r"Found: prompt, answer\."):
        read_dialogues(path, Reading(columns="prompt=q,answer"))  # bare: under its own name


@pytest.mark.parametrize(("columns", "error", "told"), [
    ("prompt=question", DataError, r"line 1: --columns prompt=question: there is no column "
                                   r"'question'\. Found: q, a\."),
    ("prompt=q.deep", DataError, "no column 'q.deep'"),
    ("promt=q", ConfigError, "'promt' is no field of ours.*ours are messages, prompt"),
    ("prompt=q,prompt=a", ConfigError, "stands there twice"),
    ("", ConfigError, None),
])  # fmt: skip
def test_a_wrong_column_map_lists_what_was_found(write, columns, error, told):
    path = write({"q": "Why?", "a": "Because."})
    if told is None:  # nothing given: as without
        with pytest.raises(DataError, match="Found: q, a"):
            read_dialogues(path, Reading(columns=columns))
        return
    with pytest.raises(error, match=told):
        read_dialogues(path, Reading(columns=columns, bad_rows="drop"))


def test_a_column_that_only_some_rows_lack_makes_bad_rows_of_them(write):
    path = write({"q": "a", "response": "b"}, {"response": "b"})
    asked = Reading(columns="prompt=q,response", bad_rows="drop")
    done = read(path, "dialogues", asked)
    assert done.items == [Dialogue("a", "b")]
    assert done.report.dropped["missing column"].first == [f"{path}, line 2"]


def test_only_the_first_rows_are_read_when_asked(write):
    path = write({"text": "a"}, {"text": "b"}, "{broken")
    assert read_documents(path, Reading(rows=2)) == ["a", "b"]


def test_equal_rows_are_always_counted_and_left_out_when_asked(write):
    a, b = {"prompt": "p", "response": "r"}, {"prompt": "p", "response": "s"}
    path = write(a, b, a, a | {"id": 7})
    kept = read(path, "dialogues")
    assert len(kept.items) == 4
    assert (kept.report.duplicates.count, kept.report.dropped) == (2, {})
    assert kept.report.duplicates.first == [f"{path}, line 3", f"{path}, line 4"]
    left = read(path, "dialogues", Reading(duplicates="drop"))
    assert left.items == [Dialogue("p", "r"), Dialogue("p", "s")]
    assert left.report.dropped["duplicates"].count == 2
    assert (left.report.read, left.report.used) == (4, 2)
    texts = write({"text": "a"}, {"text": "b"}, {"text": "a"}, name="t.jsonl")
    assert read_documents(texts, Reading(duplicates="drop")) == ["a", "b"]
    assert len(read(path, "prompts", Reading(duplicates="drop")).items) == 1  # one prompt


def test_comparisons_that_contradict_each_other_are_counted_and_both_left_out(write):
    one, other = {"prompt": "p", "chosen": "a", "rejected": "b"}, GOOD
    against = {"prompt": "p", "chosen": "b", "rejected": "a"}
    path = write(one, other, against, one, other | {"prompt": "q"})
    kept = read(path, "comparisons")
    assert kept.report.contradictory.count == 3
    assert kept.report.contradictory.first == [f"{path}, line {n}" for n in (1, 3, 4)]
    left = read(path, "comparisons", Reading(duplicates="drop"))
    assert [item.prompt for item in left.items] == ["p", "q"]  # GOOD's p has other answers
    assert left.report.dropped["contradictory comparisons"].count == 3
    with pytest.raises(DataError, match="contradicts another"):
        read(write(one, against), "comparisons", Reading(duplicates="drop"))


# --- what files hold -------------------------------------------------------------------------


def test_csv_in_all_its_forms(tmp_path):
    plain = 'prompt,response\r\n"a, b","two\nlines, ""quoted"""\r\n\r\nc,d\r\n'
    rows = [
        {"prompt": "a, b", "response": 'two\nlines, "quoted"'},
        {"prompt": "c", "response": "d"},
    ]
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbf" + plain.encode())
    (tmp_path / "a.csv.gz").write_bytes(gzip.compress(plain.encode()))
    (tmp_path / "a.tsv").write_text('prompt\tresponse\na, b\t"two\nlines, ""quoted"""\nc\td\n')
    (tmp_path / "a.json.gz").write_bytes(gzip.compress(json.dumps(rows).encode()))
    for name in ("a.csv", "a.csv.gz", "a.tsv", "a.json.gz"):
        assert load_rows(tmp_path / name) == rows, name
    long = "x" * 300_000  # the csv module stops at 131,072 characters unless told
    (tmp_path / "b.csv").write_text(f"text\n{long}\n")
    assert load_rows(tmp_path / "b.csv") == [{"text": long}]


@pytest.mark.parametrize(("content", "told"), [
    ("a,b\n1,2\n3\n", r"line 3: 1 columns where the header has 2"),
    ('a,b\n"1\n1",2\n3,4,5\n', r"line 4: 3 columns where the header has 2"),
    ("a,a\n1,2\n", "two columns have one name"),
    ('a,b\n"1,2\n', "not readable as CSV"),
    ("a,b\n", "no row in it"),
])  # fmt: skip
def test_ragged_and_broken_csv(tmp_path, content, told):
    (tmp_path / "a.csv").write_text(content)
    with pytest.raises(DataError, match=told):
        load_rows(tmp_path / "a.csv")


def test_ragged_and_unreadable_lines_are_bad_rows_like_others(tmp_path, write):
    (tmp_path / "a.csv").write_text("prompt,response\na,b\nc\nd,e\n")
    done = read(tmp_path / "a.csv", "dialogues", DROP)
    assert done.items == [Dialogue("a", "b"), Dialogue("d", "e")]
    done = read(write(GOOD, "{", "3", GOOD), "dialogues", DROP)
    assert (done.report.read, len(done.items)) == (4, 2)
    assert done.report.dropped["not readable"].count == 2
    whole = gzip.compress(b"\n".join(json.dumps(GOOD | {"n": n}).encode() for n in range(9999)))
    (tmp_path / "a.jsonl.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match="cannot be read"):  # a broken file is no bad row
        read(tmp_path / "a.jsonl.gz", "dialogues", DROP)


@pytest.mark.parametrize("text", ['[{"a": 1}', '[{"a": 1},]', '[{"a": 1}] x', '[{"a": 1} {"a": 2}]',
                                  "[", '[{"a": 1}]]'])  # fmt: skip
def test_a_broken_list_is_an_error_wherever_it_breaks(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(DataError, match=r"a\.json: not valid JSON"):
        load_rows(tmp_path / "a.json")


def test_nested_values_of_parquet(tmp_path):
    turns = [USER, ASSISTANT]
    rows = [{"messages": turns, "n": 1}, {"messages": None, "n": None}, {"messages": [], "n": 2}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), tmp_path / "a.parquet")
    done = read(tmp_path / "a.parquet", "dialogues", DROP)
    assert done.items == [Dialogue("Why?", "Because.")]
    assert done.report.dropped["wrong type"].first == [
        f"{tmp_path / 'a.parquet'}, row {n}" for n in (2, 3)]  # fmt: skip


@pytest.mark.parametrize("text", [
    "\U0001f600 \u0915\u094d\u0937 e\u0301", "a\0b", "\ufeffmarked", "\u202eright to left",
])  # fmt: skip
def test_every_unicode_text_goes_through_the_tokenizer_and_back(write, text):
    (item,) = read_dialogues(write({"prompt": text, "response": text}))
    tokenizer = make_world("town", "tiny").tokenizer
    ids = tokenizer(item.response, add_special_tokens=False)["input_ids"]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize(("text", "reason"), [
    ("half \ud83d of it", "half a character"), ("\udc00", "half a character"),
    ("\ufeff", "empty text"), ("\u200b \u00a0\0", "empty text"), ("\t\r\n", "empty text"),
])  # fmt: skip
def test_text_that_no_tokenizer_can_read_or_that_holds_nothing(write, text, reason):
    messages = {"messages": [USER, ASSISTANT | {"content": text}]}
    path = write(GOOD, {"prompt": "a", "response": text}, messages)
    done = read(path, "dialogues", DROP)
    assert (len(done.items), done.report.dropped[reason].count) == (1, 2)
    with pytest.raises(DataError, match="line 2"):
        read_dialogues(path)


def test_mixed_schemas_in_one_file_are_read_and_told(write):
    path = write({"prompt": "a", "response": "b"}, {"messages": [USER, ASSISTANT]},
                 {"question": "a", "answer": "c"}, {"messages": [USER, ASSISTANT]})  # fmt: skip
    done = read(path, "dialogues")
    assert len(done.items) == 4
    told = "\n".join(done.report.lines())
    assert (
        "different fields: prompt, response (1, first line 1); messages (2, first line 2)" in told
    )


def test_a_row_of_a_megabyte_is_never_shown_whole(write):
    long = "x" * 1_000_000
    for row in ({"prompt": [long], "response": "b"}, {"prompt": "a", "response": [long]},
                {"prompt": "a", "response": {"a": long}}, {long: "a"},
                {"prompt": "a", "chosen": long, "rejected": long}, {"messages": long},
                {"messages": [{"role": "user", "content": [long]}]}):  # fmt: skip
        with pytest.raises(DataError) as error:
            read_comparisons(write(row))
        assert len(str(error.value)) < 1500


def test_the_report_counts_every_row_once(write):
    rows = [GOOD, "{", {"prompt": "a"}, {"prompt": "", "response": "b"}, GOOD, GOOD]
    done = read(write(*rows), "dialogues", Reading(bad_rows="drop", duplicates="drop"))
    report = done.report.as_dict()
    assert (
        report["read"] == 6 == report["used"] + sum(c["count"] for c in report["dropped"].values())
    )
    assert json.loads(json.dumps(report)) == report


# --- splitting -------------------------------------------------------------------------------


def test_a_split_is_a_partition_in_order_and_a_function_of_the_seed():
    rows = list(range(1000))
    held, rest = split_rows(rows, 0.2, seed=3)
    assert len(held) == 200
    assert held == sorted(held)
    assert rest == sorted(rest)
    assert sorted(held + rest) == rows
    assert split_rows(rows, 0.2, seed=3) == (held, rest)
    assert split_rows(rows, 0.2, seed=4)[0] != held
    assert 80 <= sum(row < 500 for row in held) <= 120  # drawn from everywhere, 3 deviations
    assert split_rows(rows, 0.0, seed=0) == ([], rows)


def test_a_split_is_the_same_on_every_platform():
    assert split_rows(list(range(12)), 0.25, seed=0)[0] == [0, 6, 11]


@pytest.mark.parametrize("fraction", [-0.1, 1.0, float("nan")])
def test_a_fraction_out_of_range_is_refused(fraction):
    with pytest.raises(ConfigError, match="from 0 to below 1"):
        split_rows([1, 2, 3], fraction, 0)


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.2), (2, 0.1), (2, 0.9)])
def test_a_split_with_an_empty_part_is_refused(count, fraction):
    with pytest.raises(DataError, match="too few"):
        split_rows(list(range(count)), fraction, 0)
