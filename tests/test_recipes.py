"""Known data sets: a few rows of our own in each set's public schema, and what they become."""

import pytest

from rlhf_course import recipes
from rlhf_course.data import (
    Dialogue,
    Preference,
    PromptRow,
    Reading,
    read,
    read_comparisons,
    read_dialogues,
    read_prompts,
)
from rlhf_course.errors import ConfigError, DataError

HH = [
    {"chosen": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who are you?\n\nAssistant: A model.",
     "rejected": "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: Who are you?\n\nAssistant: Guess."},
    {"chosen": "\n\nHuman: Is it late?\n\nAssistant: It is.",
     "rejected": "\n\nHuman: Is it late?\n\nAssistant: "},
    {"chosen": "\n\nHuman: Is it late?\n\nAssistant: It is.",
     "rejected": "\n\nHuman: Is it late?\n\nAssistant: It is."},
    {"chosen": "\n\nHuman: Is it late?\n\nAssistant: It is.",
     "rejected": "\n\nHuman: Is it early?\n\nAssistant: No."},
    {"chosen": "\n\nHuman: One.\n\nHuman: Two.\n\nAssistant: Three?\n\nAssistant: Four.",
     "rejected": "\n\nHuman: One.\n\nHuman: Two.\n\nAssistant: Five."},
]  # fmt: skip
TURNS = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."},
         {"role": "user", "content": "Who are you?"}]  # fmt: skip

POST = {"id": "t3_a", "post": "I lost my hat.", "title": "Hat?", "subreddit": "advice"}
FRAMED = "SUBREDDIT: r/advice\n\nTITLE: Hat?\n\nPOST: I lost my hat.\n\nTL;DR:"


def feedback(choice, texts=(" Lost hat.", " My hat is gone, help.")):
    """A row of openai/summarize_from_feedback, configuration comparisons."""
    return {
        "info": POST | {"site": None, "article": None},
        "summaries": [{"text": t, "policy": "sup1", "note": None} for t in texts],
        "choice": choice, "worker": "w", "batch": "batch3", "split": "train",
        "extra": {"confidence": 7},
    }  # fmt: skip


def imdb(*kinds):
    """Rows of stanfordnlp/imdb; review number i has words i0 i1 i2 … and ends with its kind."""
    return [
        {"text": " ".join(f"r{i}w{j}" for j in range(14)) + f"<br /><br />{['bad', 'good'][k]}",
         "label": k}
        for i, k in enumerate(kinds)
    ]  # fmt: skip


ULTRA = {
    "prompt": "Name a colour.", "prompt_id": "ab12",
    "chosen": [{"content": "Name a colour.", "role": "user"},
               {"content": "Blue.", "role": "assistant"}],
    "rejected": [{"content": "Name a colour.", "role": "user"},
                 {"content": "Seven.", "role": "assistant"}],
    "messages": [{"content": "Name a colour.", "role": "user"},
                 {"content": "Blue.", "role": "assistant"}],
    "score_chosen": 8.5, "score_rejected": 3.0,
}  # fmt: skip
TABLE = "CREATE TABLE head (age INTEGER)"
SQL = [
    {"answer": f"SELECT COUNT(*) FROM head WHERE age > {n}", "context": TABLE,
     "question": f"How many heads are older than {n}?"}
    for n in (56, 60, 70)
]  # fmt: skip


def test_hh_rlhf_splits_at_the_last_answer_and_counts_what_cannot_be_used(write):
    path = write(*HH)
    done = read(path, "comparisons")
    assert done.items == [
        Preference(TURNS, ("A model.", "Guess.")),
        Preference("One.\n\nTwo.", ("Three?\n\nFour.", "Five.")),  # turns of one speaker are joined
    ]
    assert done.report.recipe == "hh-rlhf"
    assert {name: (c.count, c.first) for name, c in done.report.dropped.items()} == {
        "empty text": (1, [f"{path}, line 2"]),
        "identical answers": (1, [f"{path}, line 3"]),
        "different prompts": (1, [f"{path}, line 4"]),
    }
    assert [item.response for item in read_dialogues(path)] == [
        "A model.", "It is.", "It is.", "It is.", "Three?\n\nFour."]  # fmt: skip
    with pytest.raises(DataError, match=r"line 2: \"rejected\" is empty.*--bad-rows drop"):
        read_comparisons(path, Reading(bad_rows="stop"))
    with pytest.raises(DataError, match="line 2"):  # a set like any other: it stops
        read_comparisons(path, Reading(recipe="none"))


def test_a_transcript_that_ends_with_the_human_holds_no_answer(write):
    row = {side: HH[0][side] + "\n\nHuman: Bye." for side in HH[0]}
    done = read(write(HH[0], row), "comparisons")
    assert len(done.items) == 1
    assert list(done.report.dropped) == ["no answer at the end"]


def test_summaries_in_the_order_of_the_choice(write):
    path = write(feedback(0), feedback(1), feedback(1, ("Same.", " Same.")))
    done = read(path, "comparisons")
    assert done.items == [
        Preference(FRAMED, ("Lost hat.", "My hat is gone, help.")),
        Preference(FRAMED, ("My hat is gone, help.", "Lost hat.")),
    ]
    assert done.report.recipe == "summarize-from-feedback"
    assert done.report.contradictory.count == 2
    assert list(done.report.dropped) == ["identical answers"]
    assert read_dialogues(path)[1] == Dialogue(FRAMED, "My hat is gone, help.")
    assert read_prompts(path)[0] == PromptRow(FRAMED, feedback(0))
    article = feedback(0) | {
        "info": {"post": None, "title": "T", "article": "News.", "site": "cnn"}
    }
    assert read_prompts(write(article))[0].prompt == "ARTICLE: News.\n\nTL;DR:"


@pytest.mark.parametrize("choice", [2, None, "1", True])
def test_a_choice_that_names_no_summary(write, choice):
    with pytest.raises(DataError, match="does not name one of two summaries"):
        read_comparisons(write(feedback(choice)))


@pytest.mark.parametrize("row", [
    POST | {"summary": "Hat gone."},
    {"prompt": FRAMED, "completion": " Hat gone."},
    {"prompt": FRAMED, "label": "Hat gone."},
])  # fmt: skip
def test_the_posts_for_sft_in_their_three_forms(write, row):
    assert read_dialogues(write(row), Reading(recipe="tldr")) == [Dialogue(FRAMED, "Hat gone.")]


def test_reviews_begin_a_prompt_and_go_on_as_its_answer(write):
    path = write(*imdb(0, 1), {"text": "Short.", "label": 1})
    done = read(path, "dialogues")
    assert done.items[0] == Dialogue(
        " ".join(f"r0w{j}" for j in range(8)), " ".join(f"r0w{j}" for j in range(8, 14)) + "\nbad"
    )
    assert (len(done.items), list(done.report.dropped)) == (2, ["too short"])


def test_of_reviews_only_the_sentiment_decides(write):
    kinds = [0, 1, 0, 1, 0, 1, -1]
    rows = imdb(*[max(k, 0) for k in kinds])
    rows[-1]["label"] = -1  # unsupervised: it may be a prompt, and no answer
    path = write(*rows)
    items = read_comparisons(path)
    assert len(items) == 7
    for i, (prompt, answers) in enumerate(items):
        assert prompt.startswith(f"r{i}w0 ")
        numbers = [int(answer[1]) for answer in answers]
        assert [kinds[n] for n in numbers] == [1, 0]  # a positive one is chosen
        assert i not in numbers  # of a third and a fourth review
        assert len({len(answer.split(" ")) for answer in answers}) == 1
    assert read_comparisons(path) == items
    assert read_comparisons(path, Reading(seed=1)) != items


def test_reviews_of_one_kind_cannot_be_compared(write):
    with pytest.raises(DataError, match=r"0 positive and 3 negative reviews.*sorted by its label"):
        read_comparisons(write(*imdb(0, 0, 0)))


def test_ultrafeedback_takes_each_stage_from_its_own_split(tmp_path, write):
    for split, answer in (("train_sft", "Red."), ("train_prefs", "Blue."), ("test_prefs", "No.")):
        turns = [ULTRA["messages"][0], {"content": answer, "role": "assistant"}]
        write(ULTRA | {"messages": turns, "chosen": turns}, name=f"data/{split}-00000.jsonl")
    named = Reading(recipe="ultrafeedback")
    assert read_dialogues(tmp_path, named) == [Dialogue("Name a colour.", "Red.")]
    assert read_comparisons(tmp_path, named) == [Preference("Name a colour.", ("Blue.", "Seven."))]
    assert read_dialogues(tmp_path) == [Dialogue("Name a colour.", "Red.")]  # by the names alone


def test_the_tables_stand_in_the_prompt(write):
    path = write(*SQL)
    assert read_dialogues(path)[0] == Dialogue(
        f"{TABLE}\n\nHow many heads are older than 56?", SQL[0]["answer"]
    )
    assert read_prompts(path)[0].row == SQL[0]
    flat = {"prompt": f"context= {TABLE} question= How many?", "response": "SELECT 1 FROM head"}
    done = read(write(flat), "dialogues")
    assert done.items == [Dialogue(flat["prompt"], flat["response"])]
    assert done.report.recipe == "sql-create-context"


def test_queries_are_compared_with_those_of_other_rows(write):
    items = read_comparisons(write(*SQL))
    answers = [row["answer"] for row in SQL]
    assert [item.responses[0] for item in items] == answers
    assert all(item.responses[1] in set(answers) - {item.responses[0]} for item in items)
    with pytest.raises(DataError, match="all answers are the same"):
        read_comparisons(write(SQL[0], SQL[0]))


def test_comparisons_of_any_other_set_are_made_only_when_asked_for(write):
    path = write({"prompt": "a", "response": "A"}, {"prompt": "b", "response": "B"})
    with pytest.raises(DataError, match=r"1: one answer and nothing.*--rejected shuffled.*--rew"):
        read_comparisons(path)
    done = read(path, "comparisons", Reading(rejected="shuffled"))
    assert done.items == [Preference("a", ("A", "B")), Preference("b", ("B", "A"))]
    assert "another row's" in done.report.notes[0]


def test_the_rows_that_a_sql_reward_scores(write):
    from examples.sql_reward import executable

    rows = read_prompts(write(*SQL))
    prompts, answers = [row.prompt for row in rows], [row["answer"] for row in SQL]
    assert executable(prompts, answers, [row.row for row in rows]) == [1.0] * 3
    assert executable(prompts, ["SELECT COUNT(*) FROM body"] * 3, [{}] * 3) == [0.0] * 3


@pytest.mark.parametrize("row", [
    {"prompt": "a", "response": "b"}, {"text": "a"}, {"text": "a", "label": 7},
    {"question": "a", "context": "b", "answer": "c"}, {"chosen": "a", "rejected": "b"},
    {"prompt": "CREATE TABLE", "chosen": "a", "rejected": "b", "response": "a"},
])  # fmt: skip
def test_other_rows_are_taken_for_no_known_set(row):
    assert recipes.of_row(row) is None


def test_every_recipe_has_a_name_a_licence_and_a_place_on_the_hub():
    names = [name for recipe in recipes.RECIPES for name in {recipe.name, *recipe.hub}]
    assert len(set(names)) == len(names)
    for recipe in recipes.RECIPES:
        assert recipe.licence and recipe.hub
        assert recipes.find(recipe.name) is recipes.of_hub(recipe.hub[0]) is recipe
    with pytest.raises(DataError, match=r"there are hh-rlhf, .*, and none"):
        recipes.find("tulu")


@pytest.mark.parametrize(("name", "kind", "asked"), [
    ("Anthropic/hh-rlhf", "comparisons", [(None, "train", {})]),
    ("Anthropic/hh-rlhf:harmless-base@test", "comparisons",
     [(None, "test", {"data_dir": "harmless-base"})]),
    ("Anthropic/hh-rlhf:test", "comparisons", [(None, "test", {})]),
    ("openai/summarize_from_feedback", "comparisons",
     [(None, "train", {"data_dir": "comparisons", "revision": "refs/convert/parquet"})]),
    ("HuggingFaceH4/ultrafeedback_binarized", "dialogues", [(None, "train_sft", {})]),
    ("HuggingFaceH4/ultrafeedback_binarized", "comparisons", [(None, "train_prefs", {})]),
    ("stanfordnlp/imdb:test[:5%]", "dialogues", [(None, "test[:5%]", {})]),
])  # fmt: skip
def test_what_the_hub_is_asked_for(monkeypatch, name, kind, asked):
    import datasets

    heard = []

    def load_dataset(name, config, split, **more):
        heard.append((config, split, more))
        rows = {"Anthropic/hh-rlhf": HH, "stanfordnlp/imdb": imdb(0, 1),
                "openai/summarize_from_feedback": [feedback(1)]}  # fmt: skip
        return datasets.Dataset.from_list(rows.get(name, [ULTRA]))

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert read(name, kind).items
    assert heard == asked


def test_columns_rename_the_fields_of_a_recipe(write):
    rows = [{"q": row["question"], "tables": TABLE, "sql": row["answer"]} for row in SQL]
    columns = "question=q,context=tables,answer=sql"
    reading = Reading(recipe="sql-create-context", columns=columns)
    assert read_dialogues(write(*rows), reading) == read_dialogues(write(*SQL))
    with pytest.raises(ConfigError, match=r"'prompts' is no field of ours.*context"):
        read_dialogues(write(*rows), Reading(recipe="sql-create-context", columns="prompts=q"))
