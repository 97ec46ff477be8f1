"""Everything that a platform needs to grade with this package: `rlhf-course grade --bundle KIND`.

    gradescope    a zip with setup.sh and run_autograder (Gradescope's "Autograder Specifications")
    github        .github/workflows/classroom.yml and the grader, for GitHub Classroom's templates
    nbgrader      a course folder, see `rlhf_course.grading.nbgrader`
    otter         see `rlhf_course.grading.otter`

The templates stand in the folder `bundle`. The package itself travels as a wheel, with the versions
of its dependencies that were tested, so nothing but those has to be fetched.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory

import rlhf_course
from rlhf_course.coursework.exercises import EXERCISES
from rlhf_course.errors import ConfigError
from rlhf_course.files import replacing
from rlhf_course.grading import github, gradescope
from rlhf_course.grading.results import ABSENT, ExerciseResult, SubmissionResult
from rlhf_course.grading.wheels import constraints, wheel, wheel_name, zipped

TEMPLATES = Path(__file__).parent / "bundle"
KINDS = ("gradescope", "github", "nbgrader", "otter")
EXECUTABLE = ("setup.sh", "run_autograder", "grade.sh")
UNFINISHED = "the grader was ended before it had a result"
NOTHING = "No notebook (.ipynb) and no .py file was handed in."


def write(kind: str, out: Path, chapters: Sequence[int] = (), variants: int | None = None) -> Path:
    """Write the bundle to `out`, a zip where it is named so, else a folder; returns `out`.

    chapters: those that are graded; none: those that a submission contains. variants: the seed of
    the exercises' variants. Raises ConfigError for an unknown kind or chapter.
    """
    known = sorted({exercise.chapter for exercise in EXERCISES})
    if unknown := sorted(set(chapters) - set(known)):
        raise ConfigError(
            f"--chapters {' '.join(map(str, unknown))}: no such chapter with exercises. There are "
            f"{known[0]} to {known[-1]}."
        )
    if kind in ("nbgrader", "otter"):
        return _course_folder(kind, out, chapters, variants)
    files = _files(kind, chapters, variants)
    if out.suffix == ".zip":
        with replacing(out) as part:
            part.write_bytes(zipped(files))
        return out
    for name, (data, mode) in files.items():
        with replacing(out / name) as part:
            part.write_bytes(data)
            part.chmod(mode)
    return out


def _course_folder(kind: str, out: Path, chapters: Sequence[int], variants: int | None) -> Path:
    """What nbgrader or otter prints students' notebooks from; those of variants are made first."""
    make = import_module(f"rlhf_course.grading.{kind}").write
    if variants is None:
        return make(out, chapters)
    if kind == "otter":
        raise ConfigError(
            "--bundle otter: there are no variants for it. Use another platform, or leave "
            "--variants out."
        )
    from rlhf_course.coursework.build import BuildConfig, build

    with TemporaryDirectory() as printed:
        if not build(BuildConfig(tuple(chapters), variants=variants, out=Path(printed))):
            raise ConfigError("the variants could not be printed: see above.")
        return make(out, chapters, Path(printed), variants)


def _files(
    kind: str, chapters: Sequence[int], variants: int | None
) -> dict[str, tuple[bytes, int]]:
    """Place in the bundle -> (content, permissions)."""
    if kind == "gradescope":
        place, workflows, suffix = "", "", ".json"
    elif kind == "github":
        place, workflows, suffix = ".github/grader/", ".github/workflows/", ".txt"
    else:
        raise ConfigError(f"--bundle {kind}: unknown. There are {', '.join(KINDS)}.")
    extra = {}
    for name, result in _without_grader(chapters, variants).items():
        written = json.dumps(gradescope.results_json(result), indent=2) + "\n"
        text = written if kind == "gradescope" else github.payload(result)
        extra[name + suffix] = text.encode()
    extra |= {"constraints.txt": constraints().read_bytes(), wheel_name(): wheel()}
    words = _words(chapters, variants)
    files = {}
    for file in sorted((TEMPLATES / kind).iterdir()):
        text = file.read_text(encoding="utf-8")
        for word, value in words.items():
            text = text.replace(f"@{word}@", value)
        folder = workflows if file.suffix == ".yml" else place
        mode = 0o755 if file.name in EXECUTABLE else 0o644
        files[folder + file.name] = (text.encode(), mode)
    return files | {place + name: (data, 0o644) for name, data in extra.items()}


def _without_grader(chapters: Sequence[int], variants: int | None) -> dict[str, SubmissionResult]:
    """The results that need no grader: where it is ended, and where there is nothing to grade."""
    absent = tuple(
        ExerciseResult(e.id, e.chapter, e.points, 0.0, ABSENT, NOTHING, "", (), 0.0)
        for e in EXERCISES if e.chapter in chapters
    )  # fmt: skip
    unfinished = SubmissionResult(
        name="submission", files=(), problems=(), exercises=(), seed=0, variant=variants,
        isolation=(), version=rlhf_course.__version__, seconds=0.0, failure=UNFINISHED,
    )  # fmt: skip
    nothing = replace(unfinished, failure="", exercises=absent, problems=(NOTHING,))
    return {"unfinished": unfinished, "nothing": nothing}


def _words(chapters: Sequence[int], variants: int | None) -> dict[str, str]:
    """What stands for @WORD@ in a template."""
    options = ["--chapters", *map(str, sorted(set(chapters)))] if chapters else []
    options += [] if variants is None else ["--variants", str(variants)]
    counted = [e.points for e in EXERCISES if not chapters or e.chapter in chapters]
    return {
        "VERSION": rlhf_course.__version__,
        "WHEEL": wheel_name(),
        "OPTIONS": " ".join(options),
        "POINTS": str(sum(counted)),
    }
