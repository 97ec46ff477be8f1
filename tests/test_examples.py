"""The examples' reward function: what it pays for, and what no answer may do."""

import importlib.util
import time
from pathlib import Path

import pytest

from rlhf_course.stages.rewards import call_reward_function, load_reward_function

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("sql_reward", ROOT / "examples" / "sql_reward.py")
sql_reward = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(sql_reward)

PROMPT = "context= CREATE TABLE head (age INTEGER, name VARCHAR(20), PRIMARY KEY (age, name)) Who?"


def schema(prompt: str = PROMPT):
    return sql_reward.Schema(prompt)


@pytest.mark.parametrize(
    "answer",
    [
        "SELECT name FROM head WHERE age > 56",
        "select COUNT(*) from HEAD",
        "SELECT h.name FROM head AS h JOIN head AS g ON h.age = g.age GROUP BY h.name ORDER BY 1",
        'SELECT name FROM head WHERE name = "Ann" -- double quotes, as data sets do',
        "WITH old AS (SELECT * FROM head WHERE age > 56) SELECT round(avg(age), 1) FROM old;",
        "SELECT name FROM head WHERE age IN (SELECT max(age) FROM head)",
    ],
)
def test_a_query_that_runs_is_paid(answer):
    assert schema().run(answer)
    assert sql_reward.executable([PROMPT], [answer], [{}]) == [1.0]


@pytest.mark.parametrize(
    ("answer", "reason"),
    [
        ("", "not a query"),
        ("I do not know.", "not a query"),
        ("SELECT 1", "reads no table"),
        ("SELECT name FROM head WHERE", "incomplete input"),
        ("SELECT FROM name head", "syntax error"),
        ("SELECT nose FROM head", "no such column: nose"),
        ("SELECT name FROM heads", "no such table: heads"),
        ("SELECT name FROM head; SELECT age FROM head", "one statement"),
        ("SELECT name FROM head WHERE age = ?", "bindings"),
        ("SELECT \x00name FROM head", "null character"),
        ("SELECT name FROM head WHERE name = '\ud800'", "utf-8"),
        ("SELECT name FROM head" + " " * 10_000, "at most 10000 characters"),
    ],
)
def test_any_other_answer_is_not(answer, reason):
    judge = schema()
    assert not judge.run(answer)
    assert reason in judge.error
    assert sql_reward.executable([PROMPT], [answer], [{}]) == [0.0]


@pytest.mark.parametrize(
    "answer",
    [
        "ATTACH DATABASE 'stolen.db' AS stolen",
        "PRAGMA writable_schema = 1",
        "EXPLAIN SELECT name FROM head",
        "SELECT load_extension('evil') FROM head",
        "SELECT zeroblob(1000000000) FROM head",
        "SELECT printf('%1000000000d', age) FROM head",
        "SELECT name FROM head UNION SELECT sql FROM sqlite_master",
        "WITH t AS (SELECT 1) INSERT INTO head SELECT 1, 'Ann'",
        "INSERT INTO head VALUES (1, 'Ann')",
        "DROP TABLE head",
        "CREATE TABLE more (age INTEGER)",
        "VACUUM INTO 'stolen.db'",
    ],
)
def test_the_cage_holds(answer, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    judge = schema()
    assert not judge.run(answer)
    assert judge.run("SELECT name FROM head"), "the database is as it was"
    assert not list(tmp_path.iterdir())


def test_the_steps_are_bounded():
    many = ", ".join(f"c{i}" for i in range(40))
    judge = schema(f"CREATE TABLE t ({many})")
    judge.database.set_authorizer(None)
    judge.database.execute(f"INSERT INTO t VALUES ({', '.join(['1'] * 40)})")
    for _ in range(10):
        judge.database.execute("INSERT INTO t SELECT * FROM t")  # 1024 rows
    judge.database.set_authorizer(judge._allow)
    began = time.perf_counter()
    assert not judge.run("SELECT count(*) FROM t AS a, t AS b, t AS c, t AS d")  # 10^12 rows
    assert judge.error == "interrupted"
    assert time.perf_counter() - began < 5


def test_the_tables_of_a_prompt():
    text = """CREATE TABLE IF NOT EXISTS `a` (x INTEGER, "order" VARCHAR(10, 2), z)
    CREATE TABLE B (u INT CHECK (u > 0), v TEXT, FOREIGN KEY (u) REFERENCES a (x)); and
    create table b (v TEXT, w TEXT) question= How many ( are there, and why?"""
    assert sql_reward.tables_of(text) == {"a": ["x", "order", "z"], "B": ["u", "v", "w"]}
    assert sql_reward.tables_of("no table at all") == {}
    judge = schema(text)
    assert judge.run('SELECT "order" FROM a JOIN b ON a.x = b.u WHERE w IS NULL')
    assert sql_reward.executable(["no table at all"], ["SELECT 1"], [{}]) == [0.0]


def test_no_sql_of_the_prompt_is_executed():
    judge = schema('CREATE TABLE t (x); DROP TABLE t; CREATE TABLE "u" (y DEFAULT (1/0)) ')
    assert judge.tables == {"t": ["x"], "u": ["y"]}
    assert judge.run("SELECT x, y FROM t, u")


def test_the_last_message_of_a_conversation_is_read():
    turns = [{"role": "user", "content": "Hello."}, {"role": "user", "content": PROMPT}]
    assert sql_reward.executable([turns], ["SELECT name FROM head"], [{}]) == [1.0]


def test_a_wrong_name_is_worth_a_little_when_graded():
    answers = ["SELECT name FROM head", "SELECT nose FROM head", "SELECT FROM head", "SELECT 1"]
    assert sql_reward.graded([PROMPT] * 4, answers, [{}] * 4) == [1.0, 0.3, 0.0, 0.0]


def test_it_is_found_by_the_name_that_its_docstring_gives(monkeypatch):
    monkeypatch.chdir(ROOT)
    function = load_reward_function("examples.sql_reward:executable")
    scores = call_reward_function(function, [PROMPT] * 2, ["SELECT name FROM head", "no"], [{}] * 2)
    assert scores.tolist() == [1.0, 0.0]
