"""Where the course lives on the web, and which version this is: both are written down once.

The address stands in pyproject.toml under [project.urls], the version in `rlhf_course`. An
installed package has the address in its metadata.
"""

from __future__ import annotations

import sys
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

import rlhf_course
from rlhf_course.errors import ConfigError

NAME = "rlhf-course"
ROOT = Path(rlhf_course.__file__).parents[1]
"""The clone, where there is one."""
COLAB = "https://colab.research.google.com"


@cache
def repository() -> str:
    """The repository's address, without a slash at its end: https://github.com/OWNER/REPO."""
    clone = ROOT / "pyproject.toml"
    urls = written(clone).get("urls", {}) if clone.exists() else _installed()
    if not urls.get("Repository", "").startswith("https://"):
        raise ConfigError(f"{clone}: [project.urls] names no Repository of the form https://…")
    return urls["Repository"].rstrip("/")


def written(file: Path) -> dict[str, Any]:
    """The table [project] of a pyproject.toml."""
    if sys.version_info >= (3, 11):
        import tomllib
    else:
        import tomli as tomllib
    return tomllib.loads(file.read_text(encoding="utf-8"))["project"]


def _installed() -> dict[str, str]:
    """ "Repository, https://…" -> {"Repository": "https://…"}"""
    lines = metadata.metadata(NAME).get_all("Project-URL") or []
    return dict(line.split(", ", 1) for line in lines)


def tag() -> str:
    """The git tag of this version, which badges and boot cells are pinned to."""
    return f"v{rlhf_course.__version__}"


def requirement() -> str:
    """What pip installs to get exactly this version."""
    return f"{NAME} @ git+{repository()}@{tag()}"


def file(path: str) -> str:
    """The address of a file of the repository, as it is in this version."""
    return f"{repository()}/blob/{tag()}/{path}"


def colab(file: str) -> str:
    """The address that opens a file of the repository in Colab."""
    slug = repository().removeprefix("https://github.com/")
    return f"{COLAB}/github/{slug}/blob/{tag()}/{file}"
