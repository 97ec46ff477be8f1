"""Reports, exports and bundles: what people and platforms read, whatever a student wrote."""

import base64
import csv
import dataclasses
import importlib.metadata
import io
import json
import os
import re
import stat
import subprocess
import sys
import time
import unittest
import zipfile
from html.parser import HTMLParser
from pathlib import Path
from xml.etree import ElementTree

import pytest
import yaml
from markdown_it import MarkdownIt
from rich.console import Console

import rlhf_course
from rlhf_course.coursework.exercises import EXERCISES
from rlhf_course.errors import ConfigError
from rlhf_course.grading import bundles, exports, github, gradescope, reports, wheels
from rlhf_course.grading.results import ExerciseResult, PropertyResult, SubmissionResult
from rlhf_course.grading.wording import FAILED, account, line, plain, points, sentences

ROOT = Path(__file__).parents[1]
SECRET = "FileNotFoundError: /secret/place/oracle.py, line 7"
NASTY = [
    "<script>alert(1)</script><img src=x onerror=y>",
    "</div></li></p><h1>full points",
    "[link](http://evil.example) ![image](http://evil.example/x.png) <http://evil.example>",
    "``` `` ` '' \" *bold* _it_ ~~no~~ # heading | cell | \\",
    "`",
    "a `code` b ``",
    "=HYPERLINK(\"http://evil.example\";\"x\")",
    "+1", "-1", "@SUM(A1)", "\t=1+1", "  =1+1",
    "[red]markup[/red] [/] [bold",
    "::error::no ::set-output name=x::y ##[group]z",
    "null \x00, bell \x07, escape \x1b[31m, delete \x7f, surrogate \ud800, not a letter \ufffe",
    "turned \u202e round \u2066 and \u200f round, a tag \U000e0041",
    "&lt;b&gt; &#96; &copy; ]]> <!-- <?xml <![CDATA[",
    "x" * 50_000,
    "\u00e9\u4e2d\U0001f600" * 2_000,
]  # fmt: skip
LINES = "one\n# two\n```\n~~~\n- three\n| a | b |\n> four\n\u2028five\r\nsix\n\n<h1>seven</h1>"


def property_(title, passed, says="", core=False, weight=1.0):
    return PropertyResult(title, core, weight, passed, says, 0.25)


def exercise(id, score, status, properties=(), says="", mistake=""):
    told = next(each for each in EXERCISES if each.id == id)
    return ExerciseResult(
        id, told.chapter, told.points, score, status, says, mistake, tuple(properties), 1.5
    )


def submission(word="plain words", mistake="eps belongs under the root", **changes):
    """Everything that can happen, with `word` wherever a student's own words may stand."""
    exercises = (
        exercise("mdp.gae", 0.0, "absent", says=word),
        exercise("mdp.kl_estimate", 0.0, "blank", says=word),
        exercise("ppo.whiten", 2.5, "wrong", [
            property_("two numbers become -1 and 1", True, core=True),
            property_("eps is added to the variance", False, word),
        ], mistake=mistake),
        exercise("ppo.policy_loss", 0.0, "stopped", [property_("the first", True)], says=word),
        exercise("ppo.value_loss", 3.0, "right", [property_("half the square", True, core=True)]),
        exercise("ppo.ppo_step", 0.0, "broken", says=word),
        exercise("ppo_ptx.ptx_loss", 0.0, "wrong", [
            property_("the core", False, word, core=True), property_("the rest", True),
        ]),
    )  # fmt: skip
    result = SubmissionResult(
        name=word, files=(word, "05_ppo.ipynb"), problems=(word,), exercises=exercises, seed=4711,
        variant=None, isolation=("limits", "landlock"), version="0.1.0", seconds=12.345, failure="",
    )  # fmt: skip
    return dataclasses.replace(result, **changes)


FAILURE = submission(failure=SECRET)


# ------------------------------------------------------------------------------------------- words


def test_plain_text_prints_and_is_not_endless():
    assert plain("a\tb\r\nc\u2028d") == "a    b\nc\nd"
    assert plain("\x1b[31m\x00\u202e\ud800\ufffe") == "\ufffd[31m\ufffd\ufffd\ufffd\ufffd"
    assert plain("é中😀 naïve") == "é中😀 naïve"
    assert plain("x" * 30, 10) == "x" * 10 + " …"
    assert plain("x" * 10, 10) == "x" * 10
    assert line(" a\n\n  b ") == "a b"


def test_points_are_written_as_people_write_them():
    assert [points(x) for x in (0.0, 2.0, 2.5, 1.67, 10.0)] == ["0", "2", "2.5", "1.67", "10"]


def test_an_account_tells_what_holds_what_does_not_and_the_known_mistake():
    told = {each.exercise: account(each).splitlines() for each in submission().exercises}
    assert told["ppo.whiten"] == [
        "2.5 of 3 points.",
        "1 of 2 properties hold.",
        "✓ two numbers become -1 and 1",
        "✗ eps is added to the variance",
        "    plain words",
        "It looks like a known mistake: eps belongs under the root",
    ]
    assert told["mdp.gae"] == ["0 of 6 points.", "plain words"]
    assert "needed for any points" in told["ppo_ptx.ptx_loss"][1]
    assert told["ppo_ptx.ptx_loss"][2] == "✗ the core (needed for any points)"
    assert told["ppo.value_loss"][1] == "Every property holds."


def test_what_has_just_been_said_is_not_said_again():
    told = ("first", "first", "second", "", "second", "own")
    properties = [property_(f"p{i}", says == "", says) for i, says in enumerate(told)]
    found = exercise("ppo.whiten", 0.0, "stopped", properties, says="own")
    assert [said for _, said in sentences(found)] == ["first", "", "second", "", "", "own"]
    assert account(found).count("first") == 1


@pytest.mark.parametrize("status", ["blank", "absent", "broken"])
def test_properties_are_listed_only_where_there_was_something_to_try(status):
    found = exercise("ppo.whiten", 0.0, status, [property_("p", False, "not tried")], says="own")
    assert account(found).splitlines() == ["0 of 3 points.", "own"]
    one = submission(exercises=(found,))
    for text in (reports.markdown(one), reports.html(one), exports.junit([one])):
        assert "not tried" not in text
    assert exports.junit([one]).count("<testcase") == 1


# ----------------------------------------------------------------------------- what a student reads


def tokens(text: str) -> list[str]:
    """What a Markdown text consists of, without the words."""
    found = []
    for token in MarkdownIt("commonmark").enable("table").parse(text):
        found += [token.type + token.tag] + [child.type for child in token.children or []]
    # Adjacent texts, and the words behind an escape, are one text.
    return [kind for i, kind in enumerate(found) if kind != "text" or found[i - 1 : i] != ["text"]]


class Tags(HTMLParser):
    """The tags of a page and their attributes, without the words."""

    def __init__(self, text: str):
        super().__init__()
        self.found: list[tuple] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, *attrs))

    def handle_endtag(self, tag):
        self.found.append((tag,))

    def handle_comment(self, data):
        self.found.append(("comment",))


def visible(page: str) -> str:
    """The words of a page."""
    body = re.sub(r"<[^>]*>", "", page.split("</style>")[1])
    return body.replace("&lt;", "<").replace("&gt;", ">").replace("&quot;", '"').replace(
        "&#x27;", "'").replace("&amp;", "&")  # fmt: skip


@pytest.mark.parametrize("word", NASTY, ids=range(len(NASTY)))
def test_no_word_of_a_student_becomes_markup(word):
    assert tokens(reports.markdown(submission(word))) == tokens(reports.markdown(submission()))
    mistaken = submission(mistake=word)
    assert tokens(reports.markdown(mistaken)) == tokens(reports.markdown(submission()))
    page, usual = Tags(reports.html(submission(word))), Tags(reports.html(submission()))
    assert page.found == usual.found
    assert len(page.found) > 100


def test_several_lines_stay_within_their_block():
    kinds = tokens(reports.markdown(submission(LINES)))
    usual = tokens(reports.markdown(submission()))
    assert kinds.count("fencecode") == 6  # says: four of exercises, two of properties
    for kind in ("heading_openh1", "heading_openh2", "heading_openh3", "table_opentable"):
        assert kinds.count(kind) == usual.count(kind), kind
    assert not {kind for kind in kinds if "html" in kind or "link" in kind or "quote" in kind}
    assert Tags(reports.html(submission(LINES))).found == Tags(reports.html(submission())).found


@pytest.mark.parametrize("word", [w for w in NASTY if w.isprintable() and len(w) < 1000])
def test_a_student_still_reads_the_very_words(word):
    assert " ".join(word.split()) in visible(reports.html(submission(word)))
    rendered = MarkdownIt("commonmark").enable("table").parse(reports.markdown(submission(word)))
    inside = [child.content for token in rendered for child in token.children or []]
    assert any(word.strip() == content.strip() for content in inside)


@pytest.mark.parametrize("write", [reports.markdown, reports.html])
def test_a_report_shows_points_properties_sentences_and_files(write):
    text = write(submission())
    text = visible(text) if write is reports.html else text
    for part in (
        "5.5 of 29 points", "ppo.whiten", "2.5 of 3 points", "1 of 2 properties hold",
        "✓", "✗", "eps is added to the variance", "plain words", "eps belongs under the root",
        "needed for any points", "Chapter 6: ppo ptx", "05_ppo.ipynb", "Problem", "0.1.0",
    ):  # fmt: skip
        assert part in text, part
    assert "4711" not in text  # with the seed the inputs could be drawn again
    assert "landlock" not in text


def test_the_page_is_one_file_and_says_its_signs_aloud():
    text = reports.html(submission())
    assert 'lang="en"' in text
    assert not re.search(r'(src|href)="(?!#)', text)
    assert text.count('aria-label="does not hold"') == 2
    anchors = set(re.findall(r'id="([^"]*)"', text))
    assert set(re.findall(r'href="#([^"]*)"', text)) <= anchors


def test_a_failed_grader_says_so_and_keeps_its_reasons_to_itself():
    shown = {
        "markdown": reports.markdown(FAILURE),
        "html": visible(reports.html(FAILURE)),
        "gradescope": json.dumps(gradescope.results_json(FAILURE)),
        "github": json.dumps(github.content(FAILURE)),
    }
    for kind, text in shown.items():
        assert "secret" not in text, kind
        assert "grader itself failed" in text, kind
    assert "0 of 29 points" in shown["markdown"]
    assert "2.5" not in shown["markdown"] + shown["html"]


# ------------------------------------------------------------------------- what an instructor reads


def rows(results) -> list[list[str]]:
    return list(csv.reader(io.StringIO(reports.csv(results))))


def test_csv_is_one_row_a_student_with_points_and_statuses():
    other = submission(name="bob", exercises=(exercise("gpt.generate", 5.0, "right"),), variant=3)
    head, first, second = rows([submission(name="ann"), other])
    ann, bob = dict(zip(head, first, strict=True)), dict(zip(head, second, strict=True))
    assert head[:7] == ["student", "score", "max_score"] + [f"chapter {n}" for n in (1, 4, 5, 6)]
    assert (ann["student"], ann["score"], ann["max_score"]) == ("ann", "5.5", "29.0")
    assert (ann["chapter 5"], ann["chapter 1"], ann["gpt.generate"]) == ("5.5", "", "")
    assert (ann["ppo.whiten"], ann["ppo.whiten status"]) == ("2.5", "wrong")
    assert (ann["seed"], ann["isolation"], ann["variant"]) == ("4711", "limits, landlock", "")
    assert (bob["chapter 1"], bob["gpt.generate status"], bob["variant"]) == ("5.0", "right", "3")
    assert bob["ppo.whiten"] == ""
    assert head.index("gpt.generate") < head.index("mdp.gae") < head.index("ppo.whiten")


@pytest.mark.parametrize("word", [*NASTY, LINES, "\n=1", "\r@x"], ids=lambda word: ascii(word)[:20])
def test_no_cell_is_a_formula_and_no_word_makes_a_cell(word):
    found = rows([submission(word), submission()])
    assert {len(row) for row in found} == {len(found[0])}
    assert len(found) == 3
    assert not [cell for row in found[1:] for cell in row if cell[:1] in "=+-@\t\r" and cell]
    assert not any("\n" in cell for row in found for cell in row)


def test_a_failed_grader_has_no_score_in_the_csv_but_its_reason():
    head, row = rows([FAILURE])
    found = dict(zip(head, row, strict=True))
    assert found["score"] == ""
    assert found["failure"] == SECRET


def table(results, width: int) -> list[str]:
    """The lines of the table on a terminal of this width."""
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(reports.summary_table(results))
    return console.export_text().splitlines()


def test_the_table_shows_students_by_chapters_and_takes_no_markup():
    lines = table([submission("[red]ann[/red]"), FAILURE], 200)
    (ann,) = [text for text in lines if "[red]ann[/red]" in text]
    assert ann.split() == ["[red]ann[/red]", "0", "5.5", "0", "5.5", "of", "29"]
    head = next(i for i, text in enumerate(lines) if "student" in text)
    assert lines[head - 1].split() == ["4", "5", "6"]
    assert lines[head].split() == ["student", "/9", "/17", "/3", "total"]
    assert any(text.rstrip().endswith("not graded") for text in lines)
    assert f"plain words: {SECRET}" in " ".join(" ".join(lines).split())


def test_a_table_of_all_chapters_fits_a_terminal():
    every = tuple(exercise(each.id, each.points / 3, "wrong") for each in EXERCISES)
    lines = table([submission("a-student", exercises=every)], 80)
    (row,) = [text for text in lines if "a-student" in text]
    assert "…" not in "".join(lines)
    assert len(row.split()) == 1 + 9 + 3


# -------------------------------------------------------------------------------------- Gradescope


def json_test_runner() -> dict:
    """What gradescope-utils itself writes for a right, a wrong and a half right test."""
    needs = "gradescope_utils.autograder_utils."
    decorators = pytest.importorskip(needs + "decorators", reason="gradescope-utils is not there")
    runner = importlib.import_module(needs + "json_test_runner")

    class Sample(unittest.TestCase):
        @decorators.weight(2.0)
        @decorators.number("5.1")
        @decorators.tags("a", "b")
        @decorators.visibility("visible")
        def test_right(self):
            """right"""

        @decorators.weight(3.0)
        def test_wrong(self):
            """wrong"""
            self.fail("so it is")

        @decorators.partial_credit(4.0)
        def test_half(self, set_score=None):
            """half"""
            set_score(2.0)

        @decorators.leaderboard("points", "desc")
        def test_leaderboard(self, set_leaderboard_value=None):
            set_leaderboard_value(5.5)

    stream = io.StringIO()
    suite = unittest.defaultTestLoader.loadTestsFromTestCase(Sample)
    runner.JSONTestRunner(
        visibility="visible", stdout_visibility="hidden", stream=stream, verbosity=0
    ).run(suite)
    return json.loads(stream.getvalue())


def types(found: dict) -> dict:
    """Field -> its JSON type; a whole number is a number like any other."""
    return {key: float if type(value) is int else type(value) for key, value in found.items()}


def test_gradescope_fields_have_the_types_of_gradescopes_own_package():
    theirs = json_test_runner()
    ours = json.loads(json.dumps(gradescope.results_json(submission(), leaderboard=True)))
    float(theirs.pop("execution_time"))  # a string there; the specifications ask for seconds
    assert isinstance(ours["execution_time"], float)
    assert types(theirs).items() <= types(ours).items()
    known = {key: kind for test in theirs["tests"] for key, kind in types(test).items()}
    assert set(known) == {
        "name", "score", "max_score", "status", "tags", "output", "visibility", "number",
    }  # fmt: skip
    for test in ours["tests"]:
        assert known.items() <= types(test).items()
    statuses = {(test["score"] >= test["max_score"], test["status"]) for test in theirs["tests"]}
    assert statuses == {(True, "passed"), (False, "failed")}
    assert types(theirs["leaderboard"][0]) == types(ours["leaderboard"][0])


def test_gradescope_gets_one_test_an_exercise():
    found = gradescope.results_json(submission())
    assert found["score"] == 5.5 == sum(test["score"] for test in found["tests"])
    assert "leaderboard" not in found
    whiten = next(test for test in found["tests"] if test["name"] == "ppo.whiten")
    assert (whiten["score"], whiten["max_score"], whiten["status"]) == (2.5, 3.0, "failed")
    assert (whiten["number"], whiten["tags"]) == ("5.2", ["chapter 5", "wrong"])
    value = next(test for test in found["tests"] if test["name"] == "ppo.value_loss")
    assert (value["status"], value["number"]) == ("passed", "5.3")
    formats = {found[key] for key in ("output_format", "test_output_format", "test_name_format")}
    assert formats == {"text"} == {test["output_format"] for test in found["tests"]}
    assert found["stdout_visibility"] == "hidden"
    late = gradescope.results_json(submission(), visibility="after_due_date")
    assert {late["visibility"], late["tests"][0]["visibility"]} == {"after_due_date"}


@pytest.mark.parametrize("word", [*NASTY, LINES], ids=range(len(NASTY) + 1))
def test_gradescopes_database_takes_every_text(word):
    text = json.dumps(gradescope.results_json(submission(word)))
    assert not re.search(r"\\u(0000|ud[89a-f])", re.sub(r"\\ud83d\\ude00", "", text))
    assert len(text) < 200_000


def test_a_failed_grader_gives_gradescope_a_valid_file_of_0_points():
    found = gradescope.results_json(FAILURE)
    assert types(found) == types(gradescope.results_json(submission()))
    assert (found["score"], found["tests"], found["output"]) == (0.0, [], FAILED)


# ------------------------------------------------------------------------------------------ GitHub


def reported(payload: str) -> tuple[float, float, str]:
    """(points, out of, status) as the reporter reads and adds them up."""
    results = json.loads(base64.b64decode(payload, validate=True).decode("utf-8"))
    assert set(results) == {"version", "status", "max_score", "tests"}
    for test in results["tests"]:
        assert test["status"] in ("pass", "fail", "error")
        assert all(isinstance(test[key], str) for key in ("name", "message", "test_code"))
    return sum(test["score"] for test in results["tests"]), results["max_score"], results["status"]


def test_githubs_reporter_adds_up_the_points():
    assert reported(github.payload(submission())) == (5.5, 29.0, "fail")
    right = submission(exercises=(exercise("ppo.value_loss", 3.0, "right"),))
    assert reported(github.payload(right)) == (3.0, 3.0, "pass")
    assert reported(github.payload(submission(exercises=()))) == (0.0, 0.0, "fail")
    assert reported(github.payload(FAILURE))[::2] == (0.0, "error")


@pytest.mark.parametrize("word", [*NASTY, LINES], ids=range(len(NASTY) + 1))
def test_githubs_payload_fits_an_environment_variable(word):
    every = [exercise(e.id, 0.0, "broken", [property_(word, False, word)] * 20, word, word)
             for e in EXERCISES]  # fmt: skip
    payload = github.payload(submission(exercises=tuple(every)))
    assert len("GRADE_RESULTS=" + payload) < 2**17
    environment = {"GRADE_RESULTS": payload}  # execve refuses what is too long
    command = [sys.executable, "-I", "-c", "import os; print(len(os.environ['GRADE_RESULTS']))"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    assert int(done.stdout) == len(payload)
    assert reported(payload)[2] == "fail"


def test_the_log_holds_nothing_that_the_runner_obeys():
    for test in github.content(submission("::error::a\n ::set-output name=b::c ##[d]"))["tests"]:
        assert "::" not in test["message"]
        assert "##[" not in test["message"]


# ------------------------------------------------------------------------------------------- JUnit

SCHEMA = {
    "testsuites": {"name", "time", "tests", "failures", "errors"},
    "testsuite": {
        "name", "tests", "failures", "errors", "group", "time", "skipped", "timestamp", "hostname",
        "id", "package", "file", "log", "url",
    },
    "properties": set(),
    "property": {"name", "value"},
    "testcase": {"name", "time", "classname", "group"},
    "failure": {"type", "message"},
    "error": {"type", "message"},
}  # fmt: skip
"""The elements and attributes of junit-10.xsd that are used here."""


@pytest.mark.parametrize("word", [*NASTY, LINES], ids=range(len(NASTY) + 1))
def test_junit_is_well_formed_and_knows_only_what_the_schema_knows(word):
    root = ElementTree.fromstring(exports.junit([submission(word), FAILURE]).encode("utf-8"))
    for element in root.iter():
        assert set(element.attrib) <= SCHEMA[element.tag], element.tag
    for element in root.iter("testsuite"):
        assert {"name", "tests", "failures", "errors"} <= set(element.attrib)
        assert re.fullmatch(r"\d+\.\d{3}", element.get("time"))


def test_junitparser_reads_the_counts():
    junitparser = pytest.importorskip("junitparser", reason="junitparser is not installed")
    found = junitparser.JUnitXml.fromstring(
        exports.junit([submission(name="a.b"), FAILURE]).encode("utf-8")
    )
    suite, failed = list(found)
    cases = list(suite)
    bad = [case for case in cases if not case.is_passed]
    assert (found.tests, found.failures, found.errors) == (11, 6, 1)
    assert (suite.tests, suite.failures, suite.errors) == (len(cases), len(bad), 0) == (10, 6, 0)
    assert {each.name: each.value for each in suite.properties()}["score"] == "5.5"
    by_title = {case.name: case for case in cases}
    whiten = by_title["eps is added to the variance"]
    assert whiten.classname == "a_b.ppo.whiten"  # servers split it at the dots
    assert whiten.result[0].message == "plain words"
    assert "eps belongs under the root" in whiten.result[0].text
    assert by_title["two numbers become -1 and 1"].is_passed
    assert by_title["the core"].result[0].type == "core"
    (case,) = failed
    assert case.result[0].message == SECRET


# ----------------------------------------------------------------------------------------- bundles


@pytest.fixture(scope="module")
def gradescope_zip(tmp_path_factory) -> Path:
    return bundles.write("gradescope", tmp_path_factory.mktemp("b") / "g.zip", (5, 3))


@pytest.fixture(scope="module")
def github_folder(tmp_path_factory) -> Path:
    return bundles.write("github", tmp_path_factory.mktemp("b") / "template", (), variants=7)


def test_gradescopes_zip_has_its_two_scripts_at_the_root(gradescope_zip):
    with zipfile.ZipFile(gradescope_zip) as archive:
        modes = {info.filename: info.external_attr >> 16 for info in archive.infolist()}
        texts = {name: archive.read(name).decode("utf-8") for name in modes if "whl" not in name}
    assert set(modes) == {
        "setup.sh", "run_autograder", "README.txt", "unfinished.json", "nothing.json",
        "constraints.txt", wheels.wheel_name(),
    }  # fmt: skip
    programs = {name for name, mode in modes.items() if mode & stat.S_IXUSR}
    assert programs == {"setup.sh", "run_autograder"}
    assert texts["constraints.txt"] == (ROOT / "constraints.txt").read_text(encoding="utf-8")
    assert "--chapters 3 5" in texts["run_autograder"]
    assert "31 points" not in texts["README.txt"]
    assert '"Autograder points": 33' in texts["README.txt"]
    for name, text in texts.items():
        assert not re.search(r"@[A-Z]+@", text), name
    found = json.loads(texts["unfinished.json"])
    assert (found["score"], found["output"]) == (0.0, FAILED)


def test_the_same_bundle_is_the_same_bytes(gradescope_zip, tmp_path):
    again = bundles.write("gradescope", tmp_path / "again.zip", (3, 5))
    assert again.read_bytes() == gradescope_zip.read_bytes()


def test_a_bundle_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ConfigError, match="no such chapter"):
        bundles.write("gradescope", tmp_path / "g.zip", (3, 10))
    with pytest.raises(ConfigError, match="no such chapter"):
        bundles.write("nbgrader", tmp_path / "n", (0,))
    with pytest.raises(ConfigError, match="gradescope, github"):
        bundles.write("moodle", tmp_path / "m.zip")
    assert not list(tmp_path.iterdir())


def test_githubs_workflow_hands_the_result_to_the_reporter(github_folder):
    files = {
        p.relative_to(github_folder).as_posix() for p in github_folder.rglob("*") if p.is_file()
    }
    grader = {"grade.sh", "unfinished.txt", "nothing.txt", "constraints.txt"}
    grader.add(wheels.wheel_name())
    assert files == {".github/workflows/classroom.yml", *(f".github/grader/{f}" for f in grader)}
    text = (github_folder / ".github/workflows/classroom.yml").read_text(encoding="utf-8")
    assert not re.search(r"@[A-Z]+@", text)
    (job,) = yaml.safe_load(text)["jobs"].values()
    *_, install, grade, report = job["steps"]
    assert wheels.wheel_name() in install["run"]
    assert "--variants 7" in grade["run"]
    assert "--chapters" not in grade["run"]
    runner = report["with"]["runners"]
    assert grade["id"] == runner
    assert report["env"] == {
        f"{runner.upper()}_RESULTS": "${{ steps." + runner + ".outputs.result }}"
    }
    assert grade["if"] == report["if"] == "always()"  # also when the installation failed
    unfinished = (github_folder / ".github/grader/unfinished.txt").read_text(encoding="utf-8")
    assert reported(unfinished)[2] == "error"


def test_the_wheel_holds_what_the_build_holds(tmp_path):
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(tmp_path)]
    command += ["build_py", "--build-lib", str(tmp_path / "lib")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    built = {p.relative_to(tmp_path / "lib").as_posix(): p.read_bytes()
             for p in (tmp_path / "lib").rglob("*") if p.is_file()}  # fmt: skip
    ours = wheels.package_files()
    assert set(ours) == set(built)
    assert ours == built
    assert "rlhf_course/grading/bundle/gradescope/run_autograder" in ours
    assert "rlhf_course/grading/bundle/constraints.txt" in ours


def test_pip_installs_the_wheel_and_it_can_bundle_itself(tmp_path):
    # Not even looked for by import: whoever does that gets another distutils, and setuptools, and
    # with it nbgrader, cannot be imported any more.
    try:
        importlib.metadata.version("pip")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("pip is not installed here")
    (tmp_path / wheels.wheel_name()).write_bytes(wheels.wheel())
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-index"]
    command += ["--no-compile", "--target", str(tmp_path / "lib")]
    subprocess.run([*command, str(tmp_path / wheels.wheel_name())], check=True, cwd=tmp_path)
    code = (
        "import sys, rlhf_course; from pathlib import Path; from importlib.metadata import *\n"
        "from rlhf_course.grading import bundles, wheels\n"
        "told = distribution('rlhf-course')\n"
        "assert str(told.locate_file('')) == sys.argv[1] in rlhf_course.__file__\n"
        "bundles.write('gradescope', Path('again.zip'))\n"
        "print(told.version, *(entry.value for entry in told.entry_points))\n"
        "print(*told.requires, sep=';')\n"
    )
    lib = str(tmp_path / "lib")
    done = subprocess.run(
        [sys.executable, "-c", code, lib], cwd=tmp_path, env={**os.environ, "PYTHONPATH": lib},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, requires = done.stdout.splitlines()
    assert first == f"{rlhf_course.__version__} rlhf_course.cli:main"
    assert "torch>=2.6" in requires
    with zipfile.ZipFile(tmp_path / "again.zip") as archive:
        again = zipfile.ZipFile(io.BytesIO(archive.read(wheels.wheel_name())))
    there = {name for name in again.namelist() if ".dist-info/" not in name}
    assert there == set(wheels.package_files())
    (license_,) = [
        name for name in again.namelist() if name.endswith(".dist-info/licenses/LICENSE")
    ]
    assert again.read(license_) == (ROOT / "LICENSE").read_bytes()


# ------------------------------------------------------------------- the scripts, with a stand-in
#
# The real ones were run in a bare Debian; here a stand-in takes the grader's place, and misbehaves.

CPU_INDEX = "https://download.pytorch.org/whl/cpu"
STAND_IN = """#!{python}
import os, signal, sys, time
arguments = sys.argv[1:]
with open({log!r}, "a") as log:
    print(*arguments, file=log)
if "grade" not in arguments and "-c" in arguments and "json" in arguments[-2]:
    os.execv({python!r}, [{python!r}, *arguments])
if "grade" in arguments:
    out = arguments[arguments.index("--out") + 1]
    os.makedirs(out + "/submission", exist_ok=True)
    def write(text, name):
        with open(out + "/submission/" + name, "w") as file:
            file.write(text)
{body}
"""
GOOD = """
    write('{"score": 1.0}', "results.json")
    write("Z29vZA==", "github.txt")
    write("# report", "report.md")
"""


def scripted(path: Path, body: str, log: Path) -> None:
    """Put the stand-in in a Python's place."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(STAND_IN.format(python=sys.executable, log=str(log), body=body))
    path.chmod(0o755)


@pytest.fixture
def autograder(gradescope_zip, tmp_path):
    """Gradescope's /autograder as it is when a submission is to be graded."""
    root = tmp_path / "autograder"
    for name in ("source", "submission", "results"):
        (root / name).mkdir(parents=True)
    with zipfile.ZipFile(gradescope_zip) as archive:
        archive.extractall(root / "source")
    (root / "submission" / "05_ppo.ipynb").write_text("{}")
    (root / "results" / "results.json").write_text("left by the last run")
    return root


def run_autograder(root: Path, body: str, seconds: str = "20") -> tuple[int, dict]:
    scripted(root / "venv" / "bin" / "python", body, root / "log")
    script = root / "source" / "run_autograder"
    environment = {**os.environ, "AUTOGRADER": str(root), "GRADER_SECONDS": seconds}
    done = subprocess.run(["bash", str(script)], env=environment, capture_output=True, text=True)
    assert [path.name for path in (root / "results").iterdir()] == ["results.json"]
    return done.returncode, json.loads((root / "results" / "results.json").read_text())


def test_the_result_of_the_grader_is_gradescopes(autograder):
    assert run_autograder(autograder, GOOD) == (0, {"score": 1.0})
    asked = (autograder / "log").read_text().splitlines()[0]
    assert asked.startswith(f"-I -m rlhf_course grade {autograder}/submission --format gradescope")
    assert asked.endswith(" --chapters 3 5")
    out = asked.split("--out ")[1].split()[0]
    assert not Path(out).exists()  # nothing is left behind
    for name in ("source", "submission", "results"):
        assert not (autograder / name).stat().st_mode & stat.S_IRWXO, name


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ("    sys.exit(3)", 3),
        ("    sys.exit(0)", 1),  # no result, and yet content
        ("    os.kill(os.getpid(), signal.SIGKILL)", 137),
        ("    write('{\"score\": 1', 'results.json'); sys.exit(0)", 1),
        ("    write('', 'results.json'); sys.exit(4)", 4),
        ("    write('\"score\"', 'results.json')", 1),
        ("    write('{}', 'results.json')", 1),
    ],
    ids=["exits", "says nothing", "is killed", "writes half", "nothing", "a string", "no score"],
)
def test_whatever_happens_to_the_grader_there_is_a_valid_result(autograder, body, status):
    code, found = run_autograder(autograder, body)
    assert code == status
    assert (found["score"], found["output"]) == (0.0, FAILED)


def test_who_handed_in_nothing_to_grade_is_told_so(autograder):
    (autograder / "submission" / "05_ppo.ipynb").rename(autograder / "submission" / "essay.pdf")
    code, found = run_autograder(autograder, "    sys.exit(2)")
    assert (code, found["score"]) == (0, 0.0)
    assert "0 of 33 points" in found["output"]
    assert "No notebook" in found["output"]
    assert {test["max_score"] for test in found["tests"]} == {2.0, 3.0, 5.0, 6.0}


def test_a_grader_that_hangs_is_ended(autograder):
    began = time.monotonic()
    code, found = run_autograder(autograder, "    time.sleep(60)", seconds="1")
    assert time.monotonic() - began < 20
    assert (code, found["output"]) == (124, FAILED)


@pytest.mark.parametrize(("body", "status"), [(GOOD, 0), ("    sys.exit(3)", 3), ("    pass", 1)])
def test_githubs_step_always_has_a_result(github_folder, tmp_path, body, status):
    scripted(tmp_path / "bin" / "python", body, tmp_path / "log")
    environment = {
        **os.environ, "PATH": f"{tmp_path / 'bin'}:{os.environ['PATH']}",
        "GITHUB_OUTPUT": str(tmp_path / "output"), "GITHUB_WORKSPACE": str(tmp_path / "repository"),
        "GITHUB_STEP_SUMMARY": str(tmp_path / "summary"),
    }  # fmt: skip
    (tmp_path / "repository").mkdir()
    (tmp_path / "repository" / "05_ppo.ipynb").write_text("{}")
    script = github_folder / ".github" / "grader" / "grade.sh"
    done = subprocess.run(["bash", str(script), "--variants", "7"], env=environment)
    assert done.returncode == status
    (output,) = (tmp_path / "output").read_text().splitlines()
    found = base64.b64decode(output.removeprefix("result=")).decode("utf-8")
    assert (found == "good") if status == 0 else (json.loads(found)["status"] == "error")
    assert (tmp_path / "summary").exists() == (status == 0)
    assert (tmp_path / "log").read_text().rstrip().endswith("--variants 7")


def test_githubs_step_says_that_there_is_nothing_to_grade(github_folder, tmp_path):
    hidden = tmp_path / "repository" / ".hidden"
    hidden.mkdir(parents=True)
    (hidden / "05_ppo.ipynb").write_text("{}")
    output = tmp_path / "output"
    environment = {**os.environ, "GITHUB_OUTPUT": str(output)}
    environment["GITHUB_WORKSPACE"] = str(tmp_path / "repository")
    script = github_folder / ".github" / "grader" / "grade.sh"
    subprocess.run(["bash", str(script)], env=environment, check=True)
    assert reported(output.read_text().removeprefix("result=").strip()) == (0.0, 0.0, "fail")


def test_setup_names_what_is_missing_where_no_python_fits(autograder, tmp_path):
    tools = tmp_path / "tools"  # no apt-get among them
    tools.mkdir()
    done = subprocess.run(
        ["/bin/bash", str(autograder / "source" / "setup.sh")], capture_output=True, text=True,
        env={"PATH": str(tools), "AUTOGRADER": str(autograder), "PYTHON": "python-of-my-own"},
    )  # fmt: skip
    assert done.returncode == 1
    assert "No Python 3.10 to 3.13" in done.stderr


def test_setup_installs_the_wheel_under_the_tested_versions(autograder, tmp_path):
    place = autograder / "venv" / "bin" / "python"
    scripted(tmp_path / "like-pythons-own", "", tmp_path / "log")
    maker = tmp_path / "python"  # whose `-m venv` copies the stand-in
    maker.write_text(
        f"#!{sys.executable}\nimport os, shutil, sys\n"
        f"if 'venv' in sys.argv:\n    os.makedirs({str(place.parent)!r})\n"
        f"    os.makedirs({str(autograder / 'venv/lib/python3.11/site-packages/rlhf_course')!r})\n"
        f"    shutil.copy({str(tmp_path / 'like-pythons-own')!r}, {str(place)!r})\n"
    )
    maker.chmod(0o755)
    environment = {**os.environ, "AUTOGRADER": str(autograder), "PYTHON": str(maker)}
    subprocess.run(["bash", autograder / "source" / "setup.sh"], env=environment, check=True)
    torch, package, look = (tmp_path / "log").read_text().splitlines()
    constraint = f"-c {autograder}/source/constraints.txt"
    assert torch.endswith(
        f"{constraint} --extra-index-url https://download.pytorch.org/whl/cpu torch"
    )
    assert package.endswith(f"{constraint} {autograder}/source/{wheels.wheel_name()}")
    assert "rlhf_course.__version__" in look
    for closed in ("source", "venv/lib/python3.11/site-packages/rlhf_course"):
        assert not (autograder / closed).stat().st_mode & 0o077, closed
