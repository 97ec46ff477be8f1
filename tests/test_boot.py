"""The notebooks' first cell: what it adds to a session, what it leaves alone, and Google Drive.

Packages are those of a made-up session, and pip and google.colab are stand-ins that take notes.
"""

import os
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from types import ModuleType, SimpleNamespace

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from rlhf_course.coursework import boot, notebook, project
from rlhf_course.errors import ConfigError
from rlhf_course.planning.installed import CORE

COLAB = {  # of googlecolab/backend-info, pip-freeze.gpu.txt, February 2026
    "torch": "2.10.0+cu128", "numpy": "2.0.2", "transformers": "5.0.0", "tokenizers": "0.22.2",
    "datasets": "4.0.0", "safetensors": "0.7.0", "tensorboard": "2.19.0", "rich": "13.9.4",
    "httpx": "0.28.1", "filelock": "3.24.3", "jinja2": "3.1.6", "matplotlib": "3.10.0",
    "torchvision": "0.25.0+cu128", "triton": "3.6.0", "pandas": "2.2.2", "gradio": "5.50.0",
}  # fmt: skip
PIP_WOULD_TAKE = {"tyro": "1.0.17", "shtab": "1.7.2", "transformers": "5.19.0"}


class Session:
    """Installed packages, and a pip that heeds its constraints and its requirements."""

    def __init__(self, packages):
        self.packages, self.calls, self.constraints, self.fails = dict(packages), [], {}, ""

    def version(self, name):
        if name.lower() not in self.packages:
            raise metadata.PackageNotFoundError(name)
        return self.packages[name.lower()]

    def distributions(self):
        return [SimpleNamespace(metadata={"Name": n}, version=v) for n, v in self.packages.items()]

    def run(self, command, **settings):
        self.calls.append(command)
        assert command[:4] == [sys.executable, "-m", "pip", "install"]
        if self.fails:
            return SimpleNamespace(returncode=1, stdout="", stderr=self.fails)
        lines = Path(command[command.index("-c") + 1]).read_text(encoding="utf-8").split()
        self.constraints = dict(line.split("==") for line in lines)
        for wanted in map(Requirement, command[command.index("-c") + 2 :]):
            have = self.packages.get(wanted.name)
            if have is None or not wanted.specifier.contains(have):
                assert wanted.name not in self.constraints, "pip: no such versions together"
                self.packages[wanted.name] = PIP_WOULD_TAKE[wanted.name]
        return SimpleNamespace(returncode=0, stdout="", stderr="")


@pytest.fixture
def session(monkeypatch):
    """session(torch="2.5.1", tyro=None …): Colab's packages, changed."""

    def make(**changed):
        packages = {n: v for n, v in (COLAB | changed).items() if v is not None}
        made = Session(packages)
        monkeypatch.setattr(boot, "imported", lambda name: False)
        monkeypatch.setattr(boot.metadata, "version", made.version)
        monkeypatch.setattr(boot.metadata, "distributions", made.distributions)
        lines = [f"{name}>={bound}" for name, bound in CORE.items()]
        lines += ['ruff>=0.12; extra == "dev"', 'tomli>=2; python_version < "3"']
        monkeypatch.setattr(boot.metadata, "requires", lambda name: lines)
        monkeypatch.setattr(boot.subprocess, "run", made.run)
        return made

    monkeypatch.setenv(boot.HOME, "")  # so that what a test sets is taken back behind it
    monkeypatch.delenv(boot.HOME)
    return make


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """Google's module, whose Drive is a folder of this test; returns where it was mounted."""
    mounts = []
    package, drive = ModuleType("google"), ModuleType("google.colab.drive")
    module = ModuleType("google.colab")
    package.colab, module.drive, drive.mount = module, drive, mounts.append
    for name, each in (("google", package), ("google.colab", module), (drive.__name__, drive)):
        each.__spec__ = SimpleNamespace(name=name)
        monkeypatch.setitem(sys.modules, name, each)
    monkeypatch.setattr(boot, "MOUNT", tmp_path / "drive")
    monkeypatch.setattr(boot, "KEPT", tmp_path / "drive" / "MyDrive" / "rlhf-course")
    return mounts


# ------------------------------------------------------------------------------------- packages


def test_where_nothing_is_missing_it_does_and_says_nothing(session, capsys):
    made = session(tyro="1.0.17")
    boot.start()
    assert made.calls == []
    assert capsys.readouterr().out == ""
    assert boot.HOME not in os.environ


def test_what_is_missing_is_added_around_the_sessions_own_packages(session, capsys):
    made = session()
    boot.start()
    assert made.packages == COLAB | {"tyro": "1.0.17"}
    kept = ("torch", "numpy", "torchvision", "triton", "pandas")
    assert made.constraints == {name: COLAB[name] for name in kept}, "gradio may move"
    (command,) = made.calls
    assert command[command.index("--only-binary") + 1] == ":all:", "there may be no compiler"
    said = capsys.readouterr().out
    assert said == "Kept torch 2.10.0+cu128 and numpy 2.0.2. Installed tyro 1.0.17 (0 s).\n"


def test_a_package_that_is_too_old_is_replaced_and_named(session, capsys):
    made = session(transformers="4.57.1")
    boot.start()
    assert made.packages["transformers"] == "5.19.0"
    assert "needs newer ones: transformers 4.57.1 -> 5.19.0." in capsys.readouterr().out


@pytest.mark.parametrize(("name", "old"), [("torch", "2.5.1+cu121"), ("numpy", "1.25.2")])
def test_torch_and_numpy_are_never_replaced(session, name, old):
    made = session(**{name: old})
    told = rf"has {name} {old.replace('+', '.')}, and the course needs \"{name}>={CORE[name]}\""
    with pytest.raises(ConfigError, match=told) as error:
        boot.start()
    assert "Runtime version: Latest" in str(error.value)
    assert f'%pip install -U "{name}>={CORE[name]}"' in str(error.value)
    assert made.calls == []


def test_without_torch_pip_brings_it(session, monkeypatch):
    monkeypatch.setitem(PIP_WOULD_TAKE, "torch", "2.13.0")
    made = session(torch=None, torchvision=None)
    boot.start()
    assert made.packages["torch"] == "2.13.0"
    assert set(made.constraints) == {"numpy", "triton", "pandas"}


def test_what_this_kernel_has_imported_in_its_old_version_needs_a_restart(session, monkeypatch):
    session(transformers="4.57.1")
    monkeypatch.setattr(boot, "imported", lambda name: name in ("transformers", "torch"))
    with pytest.raises(ConfigError, match=r"^transformers had been imported .* Restart session"):
        boot.start()


def test_pips_last_words_are_told(session):
    session().fails = "one\ntwo\nERROR: No matching distribution found for tyro"
    with pytest.raises(ConfigError, match=r"torch 2\.10\.0\+cu128.*No matching distribution"):
        boot.start()


def test_a_pip_that_did_nothing_is_noticed(session, monkeypatch):
    made = session()
    monkeypatch.setattr(made, "packages", dict(COLAB))
    monkeypatch.setattr(boot, "install", lambda wanted, kept: None)
    with pytest.raises(ConfigError, match=r"tyro.* is still missing"):
        boot.start()


@pytest.mark.parametrize(
    ("have", "good"), [("2.6.0", True), ("2.11.0a0+git1", True), ("2.10.0+cu128", True),
                       ("2.5.9", False), (None, False)],
)  # fmt: skip
def test_which_versions_will_do(session, have, good):
    session(torch=have)
    assert boot.fits(Requirement("torch>=2.6")) == good


def test_a_clone_on_the_path_needs_nothing(session, monkeypatch):
    def missing(name):
        raise metadata.PackageNotFoundError(name)

    session()
    monkeypatch.setattr(boot.metadata, "requires", missing)
    assert boot.requirements() == []


def test_the_bounds_admit_what_colab_has():
    """Otherwise each session in Colab would begin with a replaced package."""
    for name, bound in CORE.items():
        assert name == "tyro" or SpecifierSet(f">={bound}").contains(COLAB[name])


def test_it_imports_nothing_that_may_still_be_missing():
    code = (
        "import sys\nbefore = set(sys.modules)\nfrom rlhf_course.coursework import boot\n"
        "tops = {name.partition('.')[0] for name in set(sys.modules) - before}\n"
        "print(sorted(tops - set(sys.stdlib_module_names) - {'rlhf_course', 'tomli'}))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=project.ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


# ----------------------------------------------------------------------------------- Google Drive


def test_drive_is_mounted_and_becomes_the_courses_home(session, colab, capsys, tmp_path):
    session(tyro="1.0.17")
    boot.start(drive=True)
    home = tmp_path / "drive" / "MyDrive" / "rlhf-course"
    assert colab == [str(tmp_path / "drive")]
    assert os.environ[boot.HOME] == str(home)
    assert home.is_dir()
    assert capsys.readouterr().out == (
        f"What you train is kept in {home}: the next session goes on from there.\n"
    )
    boot.start(drive=True)  # the cell is run again
    assert os.environ[boot.HOME] == str(home)


def test_a_home_within_drive_is_mounted_without_being_asked(session, colab, monkeypatch, tmp_path):
    session(tyro="1.0.17")
    place = tmp_path / "drive" / "MyDrive" / "term 2"
    monkeypatch.setenv(boot.HOME, str(place))
    boot.start()
    assert colab and place.is_dir()
    assert os.environ[boot.HOME] == str(place)


def test_two_homes_are_one_too_many(session, colab, monkeypatch, tmp_path):
    session(tyro="1.0.17")
    monkeypatch.setenv(boot.HOME, str(tmp_path / "elsewhere"))
    with pytest.raises(ConfigError, match="two places"):
        boot.start(drive=True)
    boot.start()
    assert colab == []


def test_drive_is_refused_outside_colab(session, monkeypatch):
    session(tyro="1.0.17")
    monkeypatch.setattr(boot, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match="Colab only"):
        boot.start(drive=True)
    assert boot.HOME not in os.environ


def test_a_drive_that_is_not_allowed_is_said(session, colab, monkeypatch):
    def mount(place):
        raise ValueError("mount failed")

    session(tyro="1.0.17")
    monkeypatch.setattr(sys.modules["google.colab.drive"], "mount", mount)
    with pytest.raises(ConfigError, match=r"not mounted \(mount failed\).*DRIVE = False"):
        boot.start(drive=True)
    assert boot.HOME not in os.environ


# --------------------------------------------------------------------------------------- the cell


def cell(drive: bool = False, there: bool = True) -> str:
    """The cell's text, with notes in the place of pip; there: the course can be imported."""
    text = notebook.BOOT.format(requirement="THE COURSE")
    line = '%pip install --quiet --no-deps "THE COURSE"'
    assert text.count(line) == text.count("DRIVE = False") == 1
    text = text.replace(line, "installed.append('THE COURSE')")
    text = text.replace("DRIVE = False", f"DRIVE = {drive}")
    return text if there else text.replace('find_spec("rlhf_course")', 'find_spec("no_such")')


@pytest.mark.parametrize("there", [True, False])
def test_the_cell_installs_the_course_only_where_it_is_missing(session, there):
    made, namespace = session(), {"installed": []}
    exec(cell(there=there), namespace)
    assert namespace["installed"] == ([] if there else ["THE COURSE"])
    assert "tyro" in made.packages, "what the course needs is seen to either way"
    assert callable(namespace["check"])
    assert namespace["lab"].__name__ == "rlhf_course.coursework.lab"


def test_the_cells_flag_is_drive(session, colab, monkeypatch):
    session(tyro="1.0.17")
    exec(cell(drive=True), {"installed": []})
    from rlhf_course import lab

    assert lab.home() == boot.KEPT
    assert len(colab) == 1


def test_the_cell_stops_where_torch_is_too_old(session):
    session(torch="2.4.0")
    namespace = {"installed": []}
    with pytest.raises(ConfigError, match=r"torch 2\.4\.0"):
        exec(cell(), namespace)
    assert "lab" not in namespace, "the chapter does not begin"
