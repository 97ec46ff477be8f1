"""The check button: right, wrong, not written; what is shown; and `rlhf-course progress`."""

import json
import math
import os
import subprocess
import sys

import nbformat
import pytest
import torch
import torch.nn.functional as F

from rlhf_course import check
from rlhf_course.coursework import advance, extract, presentation
from rlhf_course.coursework.expect import Mismatch, agrees, equal, raises, same
from rlhf_course.coursework.source import blank, imports, solved
from rlhf_course.errors import ConfigError, DataError
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


def test_gradients_are_tested_where_the_notebook_has_them_switched_off(capsys):
    def pairwise_loss(chosen, rejected, margin=None, denominator=None):
        return right(chosen, rejected, margin, denominator).detach()

    with torch.no_grad():
        assert check(right)
        assert not check(pairwise_loss)
        assert not torch.is_grad_enabled()


def test_an_answer_cannot_switch_gradients_off_for_the_rest(capsys):
    def pairwise_loss(chosen, rejected, margin=None, denominator=None):
        torch.set_grad_enabled(False)
        return right(chosen, rejected, margin, denominator)

    check(pairwise_loss)
    assert torch.is_grad_enabled()
    assert check(right)


def test_an_answer_that_ends_the_program_does_not(capsys):
    def pairwise_loss(chosen, rejected, margin=None, denominator=None):
        sys.exit("no")

    assert not check(pairwise_loss)
    assert "SystemExit: no" in capsys.readouterr().out


def test_what_torch_cannot_do_is_an_error_and_not_unwritten(capsys):
    def pairwise_loss(chosen, rejected, margin=None, denominator=None):
        return F.logsigmoid((chosen - rejected).long())  # torch raises NotImplementedError, too

    result = check(pairwise_loss)
    assert not result.missing
    said = capsys.readouterr().out
    assert "not implemented for 'Long'" in said
    assert "\n    chosen" in said


def test_random_numbers_without_a_generator_do_not_change_the_verdict(capsys):
    def pairwise_loss(chosen, rejected, margin=None, denominator=None):
        return right(chosen, rejected, margin, denominator) + torch.rand(())

    torch.manual_seed(3)
    check(pairwise_loss)
    first = capsys.readouterr().out
    check(pairwise_loss)
    assert capsys.readouterr().out == first


def test_a_terminal_that_has_no_such_signs_gets_others():
    code = "from rlhf_course import check, reward_model as r; check(r.pairwise_loss)"
    environment = {**os.environ, "PYTHONIOENCODING": "cp1252", "PYTHONUTF8": "0"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr
    assert b"  + two equal rewards cost log 2" in done.stdout


def test_html_is_escaped_and_tells_the_same(capsys):
    result = check(named(lambda *a, **k: "<script>", "pairwise_loss"))
    html = presentation.as_html(result)
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert html.count("✗") == sum(not o.passed for o in result.outcomes)


# ------------------------------------------------------------------------------------ expectations


def spoil(held) -> int:
    """Change the innermost first thing."""
    key = next(iter(held)) if isinstance(held, dict) else len(held) - 1
    if isinstance(held[key], torch.Tensor):
        held[key].zero_()
    elif isinstance(held[key], list):
        spoil(held[key])
    else:
        held[key] = "other"
    return 1


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
    for held in ([3, [1, 2]], [x], {"a": [x]}, [True], ["a"]):
        same(lambda held: 1, (held,), 1)
        with pytest.raises(Mismatch, match="in place"):
            same(spoil, (held,), 1)
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


@pytest.mark.parametrize("text", ["[]", "null", "{}", '{"nbformat": 4, "cells": 3}', "", "\0"])
def test_what_is_json_but_no_notebook_is_said(tmp_path, text):
    file = tmp_path / "x.ipynb"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=r"x\.ipynb: not a notebook"):
        extract.cells(file)


def test_a_cell_that_was_never_run_needs_no_outputs(tmp_path):
    cell = {"cell_type": "code", "metadata": {}, "source": "x = 1", "outputs": [], "id": "a"}
    whole = {"cells": [cell], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}
    (tmp_path / "x.ipynb").write_text(json.dumps(whole), encoding="utf-8")
    assert extract.cells(tmp_path / "x.ipynb") == ["x = 1"]


def test_progress_says_nothing_but_how_far_it_is(tmp_path, capsys):
    noisy = solved("reward_model.pairwise_loss").replace(
        "# BEGIN SOLUTION", "print('noise', SIZE)\n    # BEGIN SOLUTION"
    )
    cells = ["SIZE: int = 3\nWIDTH: int\nclass Ends:\n    raise SystemExit", noisy]
    place = notebook(tmp_path / "x.ipynb", imports(["reward_model.pairwise_loss"]), *cells)
    assert advance.states(place) == {"reward_model.pairwise_loss": "done"}
    assert capsys.readouterr().out == ""


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
    found = extract.namespace(extract.statements(cells))
    assert found["f"]() == 6
    assert found["Y"] == math.pi
