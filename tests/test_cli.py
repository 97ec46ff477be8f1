"""The command line: what it offers, what its flags are called, and what it exits with."""

import ast
import dataclasses
import re
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf_course import cli
from rlhf_course.errors import CourseError, Interrupted
from rlhf_course.stages import settings

ROOT = Path(__file__).parents[1]
CONFIGS = [kind for kind, _ in cli.COMMANDS.values()]


def flag_of(name: str) -> str:
    return "--" + name.replace("_", "-")


def help_of(capsys, *arguments: str) -> str:
    with pytest.raises(SystemExit) as stopped:
        cli.main([*arguments, "--help"])
    assert stopped.value.code == 0
    return capsys.readouterr().out


def test_help_lists_every_command_with_a_line_about_it(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    told = help_of(capsys)
    for name, (kind, _) in cli.COMMANDS.items():
        assert re.search(rf"• {name}\s+{re.escape(kind.__doc__)}", told), name


@pytest.mark.parametrize("name", cli.COMMANDS)
def test_help_explains_every_flag(capsys, monkeypatch, name):
    monkeypatch.setenv("COLUMNS", "400")  # every explanation on one line
    told = help_of(capsys, name)
    kind = cli.COMMANDS[name][0]
    assert kind.__doc__ in told
    assert "None" not in told, "a default that says nothing"
    lines = [line.strip("│ ") for line in told.splitlines()]
    for field in dataclasses.fields(kind):
        named = [i for i, line in enumerate(lines) if re.match(f"{flag_of(field.name)}[ ,]", line)]
        # [[: it has no flag, but a place
        (i,) = named or [i for i, line in enumerate(lines) if re.match(r"\[\[|\[STR", line)]
        words = re.sub(r"^(\[\[.*\]\]|\[STR\]|--\S+( \S+|, --no-\S+)?)", "", lines[i]).strip()
        words = words if re.match(r"\w", words) else lines[i + 1]  # [...]]: a list's own form
        assert re.match(r"\w[^{}]{8,}", words), f"{field.name}: {words!r}"


def test_help_does_not_wait_for_torch():
    code = (
        "import sys\nfrom rlhf_course import cli\n"
        "try:\n    cli.main(['ppo', '--help'])\nexcept SystemExit: pass\n"
        "print(sorted({'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"


def test_a_reader_that_stops_reading_sees_no_traceback():
    command = f"{sys.executable} -m rlhf_course ppo --help"
    done = subprocess.run(
        f"{command} | head -n 3", shell=True, cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert "usage: rlhf-course ppo" in done.stdout
    assert not done.stderr


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_command_has_a_function(kind):
    assert callable(cli.command_for(kind))


def test_flags_become_the_configuration():
    given = "ppo --world reviews --size tiny --seed 3 --out runs/mine --kl-coef 0.5 --no-whiten"
    more = "--mdp sequence --sequence-ratio --micro-batch 8"
    config = cli.parse(f"{given} {more}".split(" "))
    expected = settings.PPOConfig(
        world="reviews", size="tiny", seed=3, out=Path("runs/mine"), kl_coef=0.5, whiten=False,
        mdp="sequence", sequence_ratio=True, micro_batch=8,
    )  # fmt: skip
    assert config == expected
    assert cli.parse(["sft", "--packing", "False"]).packing is False
    assert cli.parse(["demo", "--ablations"]).ablations == ()
    assert cli.parse(["demo", "--ablations", "ppo_no_kl", "ppo_no_ptx"]).ablations == (
        "ppo_no_kl", "ppo_no_ptx",
    )  # fmt: skip


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_setting_can_be_given(kind):
    """No flag's type is one that the parser cannot read back."""
    name = next(name for name, (k, _) in cli.COMMANDS.items() if k is kind)
    assert cli.parse([name]) == kind()


# --- exit codes ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raised", "code", "told"),
    [
        (CourseError("data [bold] in x[1], line 3"), 2, "error: data [bold] in x[1], line 3"),
        (Interrupted("stopped [after] step 3"), 130, "stopped [after] step 3"),
        (KeyboardInterrupt(), 130, "stopped"),
    ],
)
def test_exit_codes(monkeypatch, capsys, raised, code, told):
    def fail(config):
        raise raised

    monkeypatch.setattr(cli, "command_for", lambda kind: fail)
    assert cli.main(["pretrain"]) == code
    assert capsys.readouterr().err.strip() == told


def test_a_mistake_of_the_package_itself_keeps_its_traceback(monkeypatch):
    def fail(config):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "command_for", lambda kind: fail)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["pretrain"])


def test_the_module_exits_with_what_the_command_returns(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "rlhf_course", "world", "--size", "tiny", "--out", str(tmp_path)],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "demonstrations.jsonl").exists()
    again = subprocess.run(done.args, cwd=ROOT, capture_output=True, text=True)
    assert again.returncode == 2
    assert "exists and is not empty" in " ".join(again.stderr.split())


# --- names ---------------------------------------------------------------------------------------

# tensorboard's, tyro's, pip's; pytest's, its plugins'; the exercises' selftest; the builder's.
NOT_OURS = {"--logdir", "--help", "--quiet", "--exercise-seed", "--submission", "--junitxml"}
NOT_OURS |= {
    "--seeds",
    "--quick",
    "--no-deps",
    "--only-binary",
    "--no-build-isolation",
    "--force-reinstall",
}
NOT_OURS |= {"--extra-index-url", "--shm-size", "--install"}  # pip's, docker's, wsl's
NOT_OURS |= {"--module", "--standalone", "--nnodes", "--nproc"}  # deepspeed's, torchrun's


def flags() -> set[str]:
    names = {field.name for kind in CONFIGS for field in dataclasses.fields(kind)}
    return {flag_of(name) for name in names} | {flag_of("no_" + name) for name in names}


def texts(file: Path):
    """Every string in a source file, formatted ones with … for what is filled in."""
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_every_flag_that_is_spoken_of_exists():
    known, found = flags(), set()
    for file in sorted((ROOT / "rlhf_course").rglob("*.py")):
        if file.name == "page.py":  # style sheets have names with dashes too
            continue
        for text in texts(file):
            for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*[a-z]", text):
                found.add(flag)
                assert flag in known | NOT_OURS, f"{file.name} speaks of {flag}"
    assert len(found) > 20


def test_every_command_that_is_spoken_of_exists():
    found = set()
    files = [*(ROOT / "rlhf_course").rglob("*.py"), ROOT / "README.md", *ROOT.glob("examples/*")]
    for file in filter(Path.is_file, files):
        for name in re.findall(r"rlhf-course ([a-z][a-z-]+)", file.read_text(encoding="utf-8")):
            found.add(name)
            assert name in cli.COMMANDS, f"{file.name} speaks of rlhf-course {name}"
    assert set(cli.COMMANDS) - {"world"} <= found
