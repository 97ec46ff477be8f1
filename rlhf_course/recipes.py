"""Known data sets: how their rows are read, which part of them a stage takes, what may be wrong.

A recipe is taken by the set's name on the Hugging Face hub, by `--recipe`, or because the fields of
the first row are the set's, so that a local copy is read like the original. `--recipe none`
switches all of them off.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

from rlhf_course import schemas
from rlhf_course.errors import DataError
from rlhf_course.schemas import BadRow, Dialogue, Preference, Prompt
from rlhf_course.sources import USUAL, Hub, Place, Row

Pairs = Iterator[tuple[Place, Preference | BadRow]]


@dataclass(frozen=True)
class Recipe:
    """One data set. Where a parser is not given, that of `schemas` reads the row."""

    name: str
    hub: tuple[str, ...]
    licence: str
    about: str
    fields: tuple[str, ...]
    """The fields that the parsers read; `--columns` may name them."""
    recognise: Callable[[Row], bool]
    dialogue: Callable[[Row], Dialogue] = schemas.dialogue
    preference: Callable[[Row], Preference] = schemas.preference
    prompt: Callable[[Row], Prompt] = schemas.prompt
    document: Callable[[Row], str] = schemas.document
    pairs: Callable[[Iterable[tuple[Place, Row]], int], Pairs] | None = None
    """Comparisons made of many rows and a seed, where a row alone holds none."""
    splits: dict[str, str] = field(default_factory=dict)
    """What is learned -> the split it is learned from, if not "train"."""
    layout: Hub = USUAL
    bad_rows: str = "drop"
    too_long: str = "drop"


def find(name: str) -> Recipe:
    """The recipe of this name. Raises DataError listing all of them."""
    for recipe in RECIPES:
        if name == recipe.name or name in recipe.hub:
            return recipe
    names = ", ".join(recipe.name for recipe in RECIPES)
    raise DataError(f"--recipe {name}: there are {names}, and none, which switches them off.")


def of_hub(name: str | None) -> Recipe | None:
    """The recipe of a data set on the hub."""
    return next((r for r in RECIPES if name in r.hub), None)


def of_row(row: Row) -> Recipe | None:
    """The recipe whose fields these are."""
    return next((recipe for recipe in RECIPES if recipe.recognise(row)), None)


def _texts(row: Row, *names: str) -> bool:
    return all(isinstance(row.get(name), str) for name in names)


# --- Anthropic/hh-rlhf ---------------------------------------------------------------------------


def _is_hh(row: Row) -> bool:
    return set(row) == {"chosen", "rejected"} and _texts(row, "chosen", "rejected") and all(
        schemas.TURN.match(text.lstrip("\n")) or not text.strip() for text in row.values()
    )  # fmt: skip


# --- openai/summarize_from_feedback, and the TL;DR posts for SFT ---------------------------------


def post_prompt(row: Row) -> str:
    """A Reddit post, or a news article, as Stiennon et al. 2020 ask for its summary."""
    if row.get("post") is None and row.get("article") is not None:  # CNN/DM, among the evaluations
        return f"ARTICLE: {schemas.text_of(row['article'], 'article')}\n\nTL;DR:"
    subreddit, title, post = (
        schemas.text_of(row.get(name), name) for name in ("subreddit", "title", "post")
    )
    return f"SUBREDDIT: r/{subreddit}\n\nTITLE: {title}\n\nPOST: {post}\n\nTL;DR:"


def _info(row: Row) -> Row:
    if not isinstance(row.get("info"), dict):
        raise BadRow("wrong type", f'"info" holds {schemas.short(row.get("info"))}, not an object.')
    return row["info"]


def feedback_preference(row: Row) -> Preference:
    """Two `summaries` of the post in `info`, of which `choice` (0 or 1) was preferred."""
    start, summaries, choice = post_prompt(_info(row)), row.get("summaries"), row.get("choice")
    two = isinstance(summaries, list) and len(summaries) == 2
    named = choice in (0, 1) and not isinstance(choice, bool)
    if not two or not all(isinstance(s, dict) for s in summaries) or not named:
        told = f"choice {schemas.short(choice)} does not name one of two summaries."
        raise BadRow("wrong type", told)
    best, worst = (
        schemas.text_of(summaries[i].get("text"), f"summaries[{i}].text").strip()
        for i in (choice, 1 - choice)
    )
    schemas.require_different((best, worst))
    return Preference(start, (best, worst))


def feedback_dialogue(row: Row) -> Dialogue:
    """The post and the summary that was preferred."""
    start, (best, _) = feedback_preference(row)
    return Dialogue(start, best)


def tldr_dialogue(row: Row) -> Dialogue:
    """subreddit/title/post/summary (the filtered TL;DR), prompt/completion (trl-lib/tldr), or
    prompt/label (CarperAI's)."""
    answer = next((name for name in ("summary", "completion", "label") if name in row), "summary")
    return Dialogue(tldr_prompt(row), schemas.text_of(row.get(answer), answer).strip())


def tldr_prompt(row: Row) -> Prompt:
    """The post with its frame."""
    return schemas.prompt(row) if "prompt" in row else post_prompt(row)


# --- stanfordnlp/imdb ----------------------------------------------------------------------------

PROMPT_WORDS = 8
CONTINUATION_WORDS = 32
SENTIMENT = {0: 0, 1: 1, "0": 0, "1": 1, "neg": 0, "pos": 1, "negative": 0, "positive": 1}


def review(row: Row) -> tuple[str, str]:
    """(the first words of a review, the rest of it); HTML's line breaks become line breaks."""
    text = schemas.text_of(row.get("text"), "text")
    words = re.sub(r"\s*(?:<br\s*/?>\s*)+", "\n", text).split(" ")
    if len(words) < PROMPT_WORDS + 4:
        raise BadRow("too short", f"a review of {len(words)} words cannot be begun and gone on.")
    return " ".join(words[:PROMPT_WORDS]), " ".join(words[PROMPT_WORDS:])


def review_pairs(rows: Iterable[tuple[Place, Row]], seed: int) -> Pairs:
    """Behind the beginning of every review, how a positive one goes on against how a negative one
    does, both taken from other reviews and of one length: only the sentiment decides. After
    Ziegler et al. 2019, whose classifier stood in for the human there."""
    begun: list[tuple[Place, str, str, int | None]] = []
    sides: tuple[list[int], list[int]] = ([], [])
    for place, row in rows:
        try:
            start, rest = review(row)
        except BadRow as bad:
            yield place, bad
            continue
        label = SENTIMENT.get(row.get("label"))  # None: the hub's unsupervised part
        if label is not None:
            sides[label].append(len(begun))
        begun.append((place, start, rest, label))
    if min(map(len, sides)) < 2:
        raise DataError(
            f"{len(sides[1])} positive and {len(sides[0])} negative reviews are too few to compare "
            "them. The set is sorted by its label: read all of it (without --rows)."
        )
    draw = random.Random(f"{seed} reviews")
    for i, (place, start, _, _) in enumerate(begun):
        picked = []
        for side in (sides[1], sides[0]):
            j = draw.choice(side)
            while j == i:
                j = draw.choice(side)
            picked.append(begun[j][2].split(" ")[:CONTINUATION_WORDS])
        length = min(map(len, picked))
        answers = tuple(" ".join(words[:length]) for words in picked)
        try:
            schemas.require_different(answers)
        except BadRow as bad:
            yield place, bad
            continue
        yield place, Preference(start, answers)


# --- b-mc2/sql-create-context --------------------------------------------------------------------


def _is_sql(row: Row) -> bool:
    tables = row.get("context" if "question" in row else "prompt")
    answer = "answer" if "question" in row else "response"
    asks = isinstance(tables, str) and "CREATE TABLE" in tables and _texts(row, answer)
    return asks and not {"chosen", "responses", "messages"} & set(row)


def sql_prompt(row: Row) -> Prompt:
    """The tables, then the question; a prompt that holds both already is taken as it is."""
    if "question" not in row:
        return schemas.prompt(row)
    tables = schemas.text_of(row.get("context"), "context")
    return f"{tables}\n\n{schemas.text_of(row['question'], 'question')}"


def sql_dialogue(row: Row) -> Dialogue:
    """The tables with the question, and the query."""
    if "question" not in row:
        return schemas.dialogue(row)
    return Dialogue(sql_prompt(row), schemas.text_of(row.get("answer"), "answer"))


# --- comparisons of a set that has none ----------------------------------------------------------


def shuffled_pairs(
    parse: Callable[[Row], Dialogue], rows: Iterable[tuple[Place, Row]], seed: int
) -> Pairs:
    """A row's own answer against the answer of another row, drawn by the seed.

    Nobody has compared anything here: what can be learned from it is whether an answer belongs to
    its prompt, not which of two fitting answers is better.
    """
    dialogues: list[tuple[Place, Dialogue]] = []
    for place, row in rows:
        try:
            dialogues.append((place, parse(row)))
        except BadRow as bad:
            yield place, bad
    answers = sorted({dialogue.response for _, dialogue in dialogues})
    if dialogues and len(answers) < 2:
        raise DataError("all answers are the same: none can stand against another row's.")
    draw = random.Random(f"{seed} shuffled")
    for place, (start, own) in dialogues:
        other = draw.choice(answers)
        while other == own:
            other = draw.choice(answers)
        yield place, Preference(start, (own, other))


# --- all of them -----------------------------------------------------------------------------

RECIPES = (
    Recipe(
        "hh-rlhf", ("Anthropic/hh-rlhf",), "MIT",
        "two transcripts that differ in the assistant's last turn (Bai et al. 2022)",
        ("chosen", "rejected"), _is_hh, layout=Hub(folders=True),
    ),
    Recipe(
        "summarize-from-feedback",
        ("openai/summarize_from_feedback",), "modified MIT (the posts are Reddit's)",
        "two summaries of a post, one of them preferred (Stiennon et al. 2020)",
        ("info", "summaries", "choice"),
        lambda row: {"info", "summaries", "choice"} <= set(row),
        feedback_dialogue, feedback_preference, lambda row: post_prompt(_info(row)),
        # On the main branch is a loading script, which `datasets` no longer runs.
        layout=Hub("comparisons", True, "refs/convert/parquet"),
    ),
    Recipe(
        "tldr",
        ("trl-lib/tldr", "vwxyzjn/summarize_from_feedback_tldr_3_filtered",
         "CarperAI/openai_summarize_tldr"),
        "CC-BY-4.0 (Webis-TLDR-17, of Reddit's posts)",
        "Reddit posts with their authors' summaries (Völske et al. 2017), for SFT",
        ("subreddit", "title", "post", "summary", "prompt", "completion", "label"),
        lambda row: _texts(row, "subreddit", "title", "post", "summary"),
        tldr_dialogue, prompt=tldr_prompt,
    ),
    Recipe(
        "imdb", ("stanfordnlp/imdb", "imdb"), "none stated; for research (Maas et al. 2011)",
        "film reviews to be continued; comparisons of a positive and a negative continuation",
        ("text", "label"),
        lambda row: set(row) == {"text", "label"} and row["label"] in (-1, *SENTIMENT)
        and _texts(row, "text"),
        lambda row: Dialogue(*review(row)), prompt=lambda row: review(row)[0], pairs=review_pairs,
        too_long="cut",
    ),
    Recipe(
        "ultrafeedback",
        ("HuggingFaceH4/ultrafeedback_binarized",), "MIT",
        "the best and another of four models' answers (Cui et al. 2023, Tunstall et al. 2023)",
        ("prompt", "prompt_id", "chosen", "rejected", "messages"),
        lambda row: {"prompt_id", "chosen", "rejected", "messages", "score_chosen"} <= set(row),
        splits={"dialogues": "train_sft", "comparisons": "train_prefs", "prompts": "train_prefs"},
    ),
    Recipe(
        "sql-create-context", ("b-mc2/sql-create-context",), "CC-BY-4.0",
        "tables and a question in, the query out; comparisons against another row's query",
        ("question", "context", "answer", "prompt", "response"), _is_sql,
        sql_dialogue, prompt=sql_prompt,
        pairs=lambda rows, seed: shuffled_pairs(sql_dialogue, rows, seed),
    ),
)  # fmt: skip
