"""What an installed wheel holds: beside the package, the exercises' tests that `check` runs."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    """The package as a wheel would lay it out, with no clone beside it."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "setup.py", "-q", "egg_info", "--egg-base", str(folder)]
    command += ["build_py", "--build-lib", str(folder / "lib")]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    return folder / "lib"


def test_the_bank_is_that_of_the_repository(installed):
    bank = installed / "rlhf_course" / "coursework" / "bank"
    there = {file.relative_to(bank) for file in bank.rglob("*") if file.is_file()}
    tests = ROOT / "tests"
    files = [*tests.glob("exercises/*.py"), *tests.glob("mutants/*.py"), tests / "data/golden.json"]
    assert there == {file.relative_to(tests) for file in files}
    assert len(there) > 5
    for file in there:
        assert (bank / file).read_bytes() == (tests / file).read_bytes()


def test_the_bank_needs_nothing_that_is_for_developers_only():
    for file in [*(ROOT / "tests/exercises").glob("*.py"), *(ROOT / "tests/mutants").glob("*.py")]:
        assert "import pytest" not in file.read_text(encoding="utf-8"), file.name


def test_what_doctor_has_pip_install_travels_too(installed):
    name = "rlhf_course/planning/engines-cpu.txt"
    assert (installed / name).read_bytes() == (ROOT / name).read_bytes()


def test_check_works_without_a_clone(installed, tmp_path):
    code = (
        "from rlhf_course import check\n"
        "from rlhf_course.coursework import bank\n"
        "def pairwise_loss(chosen, rejected, margin=None, denominator=None):\n"
        "    raise NotImplementedError\n"
        "print(bank.folder())\n"
        "check(pairwise_loss)\n"
        "from rlhf_course.reward_model import pairwise_loss\n"
        "print(bool(check(pairwise_loss)))\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(installed), "PYTHONUTF8": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert Path(first) == installed / "rlhf_course" / "coursework" / "bank"
    assert "not written yet" in rest[0]
    assert rest[-1] == "True"
