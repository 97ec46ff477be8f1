"""A reward function for PPO: is the answer SQL that runs on the tables named in the prompt?

    rlhf-course sft --data text_to_sql.jsonl --model small
    rlhf-course ppo --data text_to_sql.jsonl --reward examples.sql_reward:executable

Start both from the repository's folder (or put this file beside your data and write
`--reward sql_reward:executable`). A prompt holds its tables as text, anywhere in it:

    … CREATE TABLE head (age INTEGER, name VARCHAR) … How many heads are older than 56? …

A reward function takes the prompts, the answers and the data set's rows, and returns a number for
each answer. What it asks for is all that PPO will give: `SELECT 1` runs on every schema, so an
answer must also read one of the tables. It need not answer the question; see `Schema.run`.

Answers are written by a model and then executed, so they run in a cage: an empty database in
memory, of which they may read the tables and use a few harmless functions, and nothing else: no
files, no ATTACH, no PRAGMA, no extensions, no writing, a bounded number of steps.
"""

from __future__ import annotations

import re
import sqlite3
from collections.abc import Sequence

CREATE = re.compile(r"CREATE\s+TABLE\s+(?:IF\s+NOT\s+EXISTS\s+)?[\"`]?(\w+)[\"`]?\s*\(", re.I)
QUERY = re.compile(r"\s*(SELECT|WITH)\b", re.I)
CONSTRAINTS = {"primary", "foreign", "unique", "check", "constraint", "key"}
# Every function that may be called. Others can build a string of a gigabyte in a single step.
FUNCTIONS = {
    "abs", "avg", "coalesce", "count", "date", "datetime", "ifnull", "instr", "julianday", "length",
    "like", "lower", "ltrim", "max", "min", "nullif", "round", "rtrim", "strftime", "substr",
    "substring", "sum", "time", "total", "trim", "upper",
}  # fmt: skip
STEPS = 1_000_000  # of sqlite's virtual machine; a query on empty tables takes some hundreds
LONGEST = 10_000  # characters of an answer


def executable(prompts: Sequence, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
    """1.0 for an answer that runs and reads a table of its prompt, 0.0 for any other.

    prompts: texts, or lists of messages, of which the last is read; responses: the answers; rows:
    the data set's rows, not needed here. The mean over answers is the rate of executable queries.
    """
    return [float(runs(_text(p), answer)) for p, answer in zip(prompts, responses, strict=True)]


def graded(prompts: Sequence, responses: Sequence[str], rows: Sequence[dict]) -> list[float]:
    """As `executable`, but 0.3 for well-formed SQL whose only fault is a name that is not there.

    A model that hardly ever hits the mark learns nothing from zeros alone.
    """
    out = []
    for prompt, answer in zip(prompts, responses, strict=True):
        schema = Schema(_text(prompt))
        ran = schema.run(answer)
        out.append(1.0 if ran else 0.3 if schema.error.startswith("no such") else 0.0)
        schema.close()
    return out


def runs(prompt: str, answer: str) -> bool:
    """Whether `answer` is one query that runs on the tables of `prompt` and reads one of them."""
    schema = Schema(prompt)
    try:
        return schema.run(answer)
    finally:
        schema.close()


def tables_of(prompt: str) -> dict[str, list[str]]:
    """Table -> its columns, from the CREATE TABLE statements in a text.

    Names alone are read and no SQL of the prompt is executed. A table that is named twice has the
    columns of both: data sets made by cutting down real schemas do that.
    """
    tables: dict[str, dict[str, str]] = {}
    spelled: dict[str, str] = {}
    for match in CREATE.finditer(prompt):
        table = spelled.setdefault(match[1].lower(), match[1])
        columns = tables.setdefault(table, {})
        for part in _split(prompt[match.end() :]):
            words = part.split()
            if words and words[0].lower().partition("(")[0] not in CONSTRAINTS:
                column = words[0].strip('"`[]')
                columns.setdefault(column.lower(), column)
    return {table: list(columns.values()) for table, columns in tables.items() if columns}


def _split(text: str) -> list[str]:
    """What stands between the commas up to the bracket that closes; inner brackets are skipped."""
    parts, depth = [""], 0
    for letter in text:
        if letter == ")" and depth == 0:
            break
        depth += (letter == "(") - (letter == ")")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    return parts


class Schema:
    """The prompt's tables, empty, in a database that lets nothing but queries pass."""

    def __init__(self, prompt: str):
        self.tables = tables_of(prompt)
        self.names = {table.lower() for table in self.tables}
        self.read: set[str] = set()
        self.error = ""
        self.database = sqlite3.connect(":memory:", isolation_level=None)
        for table, columns in self.tables.items():
            names = ", ".join(_quoted(column) for column in columns)
            self.database.execute(f"CREATE TABLE {_quoted(table)} ({names})")
        self.database.set_authorizer(self._allow)

    def _allow(self, action, first, second, database, trigger) -> int:
        """sqlite asks for every single thing that a statement wants to do."""
        if action == sqlite3.SQLITE_READ and first.lower() in self.names:
            self.read.add(first.lower())
            return sqlite3.SQLITE_OK
        if action == sqlite3.SQLITE_FUNCTION and second and second.lower() in FUNCTIONS:
            return sqlite3.SQLITE_OK
        return sqlite3.SQLITE_OK if action == sqlite3.SQLITE_SELECT else sqlite3.SQLITE_DENY

    def run(self, answer: str) -> bool:
        """Whether the answer is one query that runs and reads a table; `error` says why not.

        The tables are empty, so nothing is said about what the query would find: whether it
        answers the question is left open. A reward for that would need rows, or a right query to
        compare with (a column of the data set, say).
        """
        self.error, self.read = "", set()
        if len(answer) > LONGEST or not QUERY.match(answer):
            self.error = f"not a query of at most {LONGEST} characters"
            return False
        self.database.set_progress_handler(lambda: 1, STEPS)  # 1: stop
        try:
            self.database.execute(answer).fetchone()
        except (sqlite3.Error, sqlite3.Warning, ValueError) as error:  # ValueError: a NUL in it
            self.error = str(error)
            return False
        finally:
            self.database.set_progress_handler(None, 0)
        if not self.read:
            self.error = "reads no table of the prompt"
        return bool(self.read)

    def close(self) -> None:
        """Give the database's memory back."""
        self.database.close()


def _quoted(name: str) -> str:
    return '"' + name.replace('"', '""') + '"'


def _text(prompt) -> str:
    return prompt if isinstance(prompt, str) else prompt[-1]["content"]
