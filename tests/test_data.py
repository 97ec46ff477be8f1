"""Real data in, one schema out; and what each kind of broken input is told."""

import gzip
import json
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
from rlhf_course.sources import load_rows

DROP = Reading(bad_rows="drop")
USER = {"role": "user", "content": "Why?"}
ASSISTANT = {"role": "assistant", "content": "Because."}
HH = "\n\nHuman: Hi\n\nAssistant: Hello. You?\n\nHuman: Well: and you?\n\nAssistant:"
HH_PROMPT = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello. You?"},
    {"role": "user", "content": "Well: and you?"},
]


@pytest.fixture
def write(tmp_path):
    """write(row, row, …) -> a JSON-lines file of them; a text stands as it is."""

    def write(*rows, name="rows.jsonl"):
        lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")
        return path

    return write


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
