"""`rlhf-course data`: what a set is, and what each stage could learn from it."""

import json

import pytest

from rlhf_course import cli
from rlhf_course.world import make_world

PAIRS = [
    {"prompt": "Why?", "chosen": "Because.", "rejected": "No."},
    {"prompt": "Why?", "chosen": "", "rejected": "No."},
    {"prompt": "Why?", "chosen": "No.", "rejected": "Because."},
    {"prompt": "Who?", "chosen": "Somebody of the town.", "rejected": "Me."},
]


@pytest.fixture
def look(capsys):
    """look(*arguments) -> (exit code, what was printed, what went to stderr)."""

    def look(*arguments):
        code = cli.main(["data", *map(str, arguments)])
        return code, *capsys.readouterr()

    return look


def test_what_each_stage_could_learn(look, write):
    path = write(*PAIRS)
    code, out, _ = look(path, "--json")
    found = json.loads(out)
    assert code == 0
    assert set(found["stages"]) == {"sft", "reward-model, dpo", "ppo"}
    assert set(found["not_for"]) == {"pretrain"}
    pairs = found["stages"]["reward-model, dpo"]
    assert (pairs["read"], pairs["used"]) == (4, 3)
    assert pairs["dropped"]["empty text"] == {
        "count": 1, "first": [f"{path}, line 2"],
        "told": '"chosen" is empty. Fill it in or remove the row.'}  # fmt: skip
    assert pairs["contradictory"]["count"] == 2
    assert pairs["lengths"]["answer"] == {"min": 1, "median": 1, "p95": 4, "max": 4}  # words
    assert found["examples"] == [
        {"kind": "comparisons", "prompt": row["prompt"],
         "responses": [row["chosen"], row["rejected"]]}
        for row in PAIRS if row["chosen"]
    ]  # fmt: skip


def test_the_same_for_a_reader(look, write):
    code, out, _ = look(write(*PAIRS))
    assert code == 0
    for words in ("reward-model, dpo (comparisons)", "4 rows read, 3 used",
                  "left out 1: empty text (line 2)", "contradictory comparisons 2, kept (line 1, ",
                  "not for pretrain", "words of answers: 1 to 4, median 1",
                  'responses: ["Because.", "No."]'):  # fmt: skip
        assert words in out, words


def test_tokens_are_counted_where_a_tokenizer_is_named(look, write, tmp_path):
    tokenizer = make_world("town", "tiny").tokenizer
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    _, out, _ = look(write(*PAIRS), "--tokenizer", tmp_path / "tokenizer", "--json")
    lengths = json.loads(out)["stages"]["sft"]["lengths"]["answer"]
    ids = [len(tokenizer(row["chosen"], add_special_tokens=False)["input_ids"])
           for row in PAIRS if row["chosen"]]  # fmt: skip
    assert (lengths["min"], lengths["max"]) == (min(ids), max(ids))


def test_long_texts_are_not_shown_whole(look, write):
    _, out, _ = look(write({"text": "x" * 1_000_000}))
    assert len(out) < 2000
    assert "(1000000 characters)" in out


@pytest.mark.parametrize(("row", "arguments", "told"), [
    ({"a": "b"}, [], "all 1 rows are unusable.*Found: a"),
    ("{", [], "all 1 rows are unusable.*not valid JSON"),
    (PAIRS[0], ["--columns", "prompt=p"], "there is no column 'p'. Found: prompt, chosen"),
    (PAIRS[0], ["--columns", "p=prompt"], "'p' is no field of ours"),
    (PAIRS[0], ["--recipe", "none-such"], "--recipe none-such: there are"),
    (PAIRS[1], ["--bad-rows", "stop"], "line 1"),
])  # fmt: skip
def test_what_no_stage_can_use_is_an_error(look, write, row, arguments, told):
    import re

    if row == PAIRS[1]:
        row = {"prompt": ""}
    code, out, err = look(write(row), *arguments)
    assert (code, out) == (2, "")
    assert re.search(told, " ".join(err.split())), err


def test_a_hub_that_cannot_be_reached_is_told_with_the_mirrors_variable(look):
    code, _, err = look("nobody/nothing-of-that-name")
    assert code == 2
    assert "HF_ENDPOINT" in err and "nobody/nothing-of-that-name" in err
