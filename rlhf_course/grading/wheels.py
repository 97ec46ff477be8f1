"""This very package as a wheel, from a clone or from an installation, without any build tool.

A grader on another machine has to be the one that was tried on this. The format is that of the
"Binary distribution format" of the Python Packaging User Guide: a zip of the package's files with
METADATA, WHEEL, RECORD and the entry points beside them.
"""

from __future__ import annotations

import base64
import hashlib
import io
import zipfile
from importlib import metadata
from pathlib import Path
from typing import Any

import rlhf_course
from rlhf_course.coursework import bank, project
from rlhf_course.errors import ConfigError

DISTRIBUTION = "rlhf_course"
LONG_AGO = (1980, 1, 1, 0, 0, 0)  # the same bytes every time
GENERATOR = "Wheel-Version: 1.0\nGenerator: rlhf-course\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def wheel_name() -> str:
    """The file's name, from which pip reads the version."""
    return f"{DISTRIBUTION}-{rlhf_course.__version__}-py3-none-any.whl"


def wheel() -> bytes:
    """The wheel's content. Raises ConfigError where nothing tells what the package needs."""
    files = package_files()
    info = f"{DISTRIBUTION}-{rlhf_course.__version__}.dist-info"
    about, commands = _about()
    files[f"{info}/METADATA"] = about.encode()
    files[f"{info}/WHEEL"] = GENERATOR.encode()
    files[f"{info}/entry_points.txt"] = commands.encode()
    files[f"{info}/licenses/LICENSE"] = _license()
    record = "".join(f"{name},{_hash(data)},{len(data)}\n" for name, data in files.items())
    files[f"{info}/RECORD"] = f"{record}{info}/RECORD,,\n".encode()
    return zipped({name: (data, 0o644) for name, data in files.items()})


def package_files() -> dict[str, bytes]:
    """Place in the wheel -> content, with the tests and mutants that grading needs."""
    package = Path(rlhf_course.__file__).parent
    found = {path: Path(DISTRIBUTION) / path.relative_to(package) for path in package.rglob("*")}
    place, tests = Path(DISTRIBUTION, "coursework", "bank"), bank.folder()
    patterns = ("exercises/*.py", "mutants/*.py", "data/golden.json")
    found |= {
        path: place / path.relative_to(tests)
        for pattern in patterns for path in tests.glob(pattern)
    }  # fmt: skip
    found[constraints()] = Path(DISTRIBUTION, "grading", "bundle", "constraints.txt")
    named = {
        target.as_posix(): path
        for path, target in found.items()
        if path.is_file() and "__pycache__" not in path.parts
    }
    return {name: named[name].read_bytes() for name in sorted(named)}


def constraints() -> Path:
    """The tested versions: beside the templates in an installation, else the clone's own file."""
    installed = Path(__file__).parent / "bundle" / "constraints.txt"
    return installed if installed.exists() else project.ROOT / "constraints.txt"


def _about() -> tuple[str, str]:
    """(METADATA, entry_points.txt): from pyproject.toml in a clone, else as they are installed."""
    clone = project.ROOT / "pyproject.toml"
    if clone.exists():
        return _written(project.written(clone))
    try:
        found = metadata.distribution(project.NAME)
    except metadata.PackageNotFoundError:
        raise ConfigError(
            f"{project.NAME} is neither installed nor a clone, so that no wheel can be made of it: "
            "run this from a clone of the repository."
        ) from None
    return found.read_text("METADATA") or "", found.read_text("entry_points.txt") or ""


def _license() -> bytes:
    clone = project.ROOT / "LICENSE"
    if clone.exists():
        return clone.read_bytes()
    return (metadata.distribution(project.NAME).read_text("licenses/LICENSE") or "").encode()


def _written(told: dict[str, Any]) -> tuple[str, str]:
    lines = ["Metadata-Version: 2.4", f"Name: {told['name']}"]
    lines += [f"Version: {rlhf_course.__version__}", f"Summary: {told['description']}"]
    lines += [f"License-Expression: {told['license']}", "License-File: LICENSE"]
    lines += [f"Requires-Python: {told['requires-python']}"]
    lines += [f"Project-URL: {name}, {place}" for name, place in told.get("urls", {}).items()]
    lines += [f"Requires-Dist: {needed}" for needed in told["dependencies"]]
    commands = [f"{name} = {place}" for name, place in told["scripts"].items()]
    return "\n".join(lines) + "\n", "\n".join(["[console_scripts]", *commands]) + "\n"


def _hash(data: bytes) -> str:
    digest = base64.urlsafe_b64encode(hashlib.sha256(data).digest())
    return "sha256=" + digest.decode("ascii").rstrip("=")


def zipped(files: dict[str, tuple[bytes, int]]) -> bytes:
    """A zip of {name: (content, permissions)}, the same bytes for the same files."""
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (data, mode) in files.items():
            entry = zipfile.ZipInfo(name, LONG_AGO)
            entry.external_attr = (0o100000 | mode) << 16  # a regular file
            entry.create_system = 3  # Unix: only then are the permissions read
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, data)
    return stream.getvalue()
