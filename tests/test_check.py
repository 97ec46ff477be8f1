"""The check button: right, wrong, not written; what is shown; and `rlhf-course progress`."""

import subprocess
import sys

import nbformat
import pytest
import torch
import torch.nn.functional as F

from rlhf_course import check
from rlhf_course.coursework import extract, presentation
from rlhf_course.coursework.expect import Mismatch, agrees, equal, raises, same
from rlhf_course.coursework.source import blank, imports, solved
from rlhf_course.errors import ConfigError
from rlhf_course.ppo import AdaptiveKLController
from rlhf_course.reward_model import pairwise_loss as right


def wrong(chosen, rejected, margin=None, denominator=None):
    return -F.logsigmoid(rejected - chosen).mean()


def named(function, name):
    function.__name__ = name
    return function


def test_a_right_answer(capsys):
    result = check(right)
    said = capsys.readouterr().out
    assert result
    assert said.count("✓") == len(result.outcomes) >= 4
    assert "✗" not in said
    assert (
        repr(result) == f"<pairwise_loss: {len(result.outcomes)} of {len(result.outcomes)} right>"
    )


def test_a_wrong_answer_shows_input_expected_and_got_and_names_the_mistake(capsys):
    result = check(named(wrong, "pairwise_loss"))
    said = capsys.readouterr().out
    assert not result
    assert "✗" in said
    for label in ("chosen", "rejected", "expected", "got", "looks like"):
        assert f"\n    {label}" in said
    assert "subtracted" in said


def test_not_written_yet_is_said_kindly(capsys):
    def pairwise_loss(chosen, rejected, margin=None, denominator=None):
        raise NotImplementedError

    result = check(pairwise_loss)
    said = capsys.readouterr().out
    assert result.missing
    assert "not written yet" in said
    assert "Traceback" not in said
    assert "✗" not in said


def test_an_error_is_shown_with_the_students_own_line(capsys):
    def pairwise_loss(chosen, rejected, margin=None, denominator=None):
        return chosen.no_such_thing

    assert not check(pairwise_loss)
    said = capsys.readouterr().out
    assert "AttributeError" in said
    assert "return chosen.no_such_thing" in said


def test_a_method_is_checked_by_its_class(capsys):
    class Mine(AdaptiveKLController):
        def update(self, kl, episodes):
            self.value *= 1.1
            return self.value

    assert check(AdaptiveKLController)
    assert not check(named(Mine, "AdaptiveKLController"))
    with pytest.raises(ConfigError, match="hand over the class"):
        check(named(lambda: None, "AdaptiveKLController"))


@pytest.mark.parametrize("answer", [3, "pairwise_loss", None, torch.ones(1)])
def test_what_is_no_function_is_refused(answer):
    with pytest.raises(ConfigError, match="without calling it"):
        check(answer)


def test_a_function_that_is_no_exercise_is_refused():
    with pytest.raises(ConfigError, match="'named' is not an exercise"):
        check(named)


def test_nbgrader_sees_a_wrong_answer_as_a_failing_cell(monkeypatch):
    monkeypatch.setenv("NBGRADER_EXECUTION", "validate")
    assert check(right)
    with pytest.raises(AssertionError):
        check(named(wrong, "pairwise_loss"))


def test_random_numbers_of_the_student_are_left_alone():
    torch.manual_seed(3)
    check(right)
    after = torch.rand(1)
    torch.manual_seed(3)
    assert torch.equal(after, torch.rand(1))


def test_html_is_escaped_and_tells_the_same(capsys):
    result = check(named(lambda *a, **k: "<script>", "pairwise_loss"))
    html = presentation.as_html(result)
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert html.count("✗") == sum(not o.passed for o in result.outcomes)


# ------------------------------------------------------------------------------------ expectations


def test_what_expectations_see():
    x = torch.tensor([1.0, 2.0])
    same(torch.exp, (x,), x.exp())
    agrees(torch.exp, lambda x: x.exp(), (x,), wrt=(0,))
    for expected in (x.exp() + 1e-3, x.exp()[:1], x.exp().long(), [x, x], 1.0):
        with pytest.raises(Mismatch):
            same(torch.exp, (x,), expected)
    with pytest.raises(Mismatch, match="in place"):
        same(torch.exp_, (x,), x.exp())
    assert torch.equal(x, torch.tensor([1.0, 2.0])), "an answer gets copies"
    with pytest.raises(Mismatch, match="gradient"):
        agrees(lambda x: x.detach().exp(), torch.exp, (x,), wrt=(0,))
    with pytest.raises(Mismatch, match="gradient"):
        agrees(lambda x: 2 * x.exp() - x.detach().exp(), torch.exp, (x,), wrt=(0,))
    with pytest.raises(Mismatch, match="refuse"):
        raises(torch.exp, (x,))
    raises(lambda x: int("x"), (x,))
    with pytest.raises(Mismatch, match="not finite"):
        equal(torch.tensor(float("nan")), torch.tensor(1.0))
    with pytest.raises(NotImplementedError):
        raises(named(lambda x: (_ for _ in ()).throw(NotImplementedError), "f"), (x,))


# ---------------------------------------------------------------------------------------- progress


def notebook(path, *cells):
    nbformat.write(
        nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(c) for c in cells]), path
    )
    return path


def test_progress_over_a_students_notebook(tmp_path):
    place = notebook(
        tmp_path / "03_reward_model.ipynb",
        "%matplotlib inline\n!ls\n" + imports(["reward_model.pairwise_loss"]),
        blank("reward_model.pairwise_loss"),
        solved("reward_model.pairwise_loss"),  # the last definition counts
        "def broken(:",
        blank("reward_model.kwise_loss"),
        solved("reward_model.last_token_reward").replace("- 1", "- 2"),
        "while True: pass",  # not run
    )
    command = [sys.executable, "-m", "rlhf_course", "progress", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)
    lines = {line.split("│")[2].strip(): line for line in done.stdout.splitlines() if "│" in line}
    assert "done" in lines["pairwise_loss"]
    assert "not written" in lines["kwise_loss"]
    assert " of " in lines["last_token_reward"]
    assert "no notebook" in lines["gae"]
    assert "3 of " in done.stdout.splitlines()[-1]


@pytest.mark.parametrize("what", ["missing", "empty folder", "garbage"])
def test_progress_says_what_is_wrong(tmp_path, what):
    place = tmp_path / {"missing": "x.ipynb", "empty folder": ".", "garbage": "g.ipynb"}[what]
    if what == "garbage":
        place.write_bytes(b"\xff\xfe no json")
    command = [sys.executable, "-m", "rlhf_course", "progress", str(place)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 2
    assert str(place.name) in done.stderr.replace("\n", "")
    assert "Traceback" not in done.stderr


def test_definitions_are_taken_without_running_the_rest():
    cells = [
        "import math\nX = 3\nY = math.pi\nprint(1/0)\ndef f(): return X",
        "def f(): return 2 * X",
    ]
    found = extract.namespace(extract.definitions(cells))
    assert found["f"]() == 6
    assert "Y" not in found
