"""The settings of `rlhf-course grade`; nothing heavy is imported for `--help`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from rlhf_course.stages.flags import Count

Format = Literal["markdown", "html", "csv", "gradescope", "junit", "github"]
Bundle = Annotated[
    Literal["gradescope", "github", "nbgrader", "otter"] | None,
    tyro.conf.arg(metavar="{gradescope,github,nbgrader,otter}", help_behavior_hint=""),
]


@dataclass
class GradeConfig:
    """Grade submissions. Their code is not trusted: it runs in confined processes."""

    submissions: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Notebooks, .py files, or folders of them, one a student. A folder that holds only folders is
    a class: each of them is one."""
    out: Path = Path("grades")
    """Where the results go: a folder a student, and summary.csv. The same command goes on from
    what is there: what has been graded and has not changed is not graded again."""
    format: tuple[Format, ...] = ("markdown", "html", "csv")
    """What is written besides result.json."""
    chapters: tuple[int, ...] = ()
    """The chapters that count. Nothing: for each student those that the submission touches."""
    jobs: int = 0
    """Submissions graded side by side. 0: one for each processor core."""
    seed: Count = None
    """Of the random inputs; it is recorded. Nothing: a new secret one, or that of --out."""
    variants: Count = None
    """The number with which the students' chapters were printed as variants."""
    seconds_per_call: float = 10.0
    """How long one call of a student's function may take."""
    seconds_per_exercise: float = 60.0
    """How long all calls of one exercise may take."""
    force: bool = False
    """Grade again what is in --out already."""
    bundle: Bundle = None
    """Grade nothing, but write to --out what this platform needs to grade by itself."""
