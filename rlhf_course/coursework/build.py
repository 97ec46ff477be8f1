"""Build the notebooks: `python -m rlhf_course.coursework.build`, or `make notebooks`.

Student notebooks are written at once. A solution is executed only where its code, or a function of
the package that the code names, is not the one that its outputs came from; where only prose has
changed, the outputs are kept. A build of unchanged text changes no byte.
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import tyro

from rlhf_course.coursework import execute, manuscript, notebook, project, variants
from rlhf_course.errors import EXIT_CODE, ConfigError, CourseError

if TYPE_CHECKING:
    from nbformat import NotebookNode

QUICK = {"RLHF_COURSE_QUICK": "1"}


@dataclass(frozen=True)
class BuildConfig:
    """Build student notebooks and executed solutions from the manuscripts."""

    chapters: Annotated[tuple[int, ...], tyro.conf.Positional] = ()
    """Which ones, by number; all of them when none is named."""
    execute: bool = True
    """Execute the solutions that are out of date."""
    force: bool = False
    """Execute them all."""
    quick: bool = False
    """Execute all in quick mode, to see whether they run; solutions/ is left as it is."""
    root: Path = field(default=project.ROOT)
    """The folder with manuscript/, chapters/ and solutions/."""
    variants: int | None = None
    """Print the chapters for graded use instead, with other variants of some exercises: any number,
    and the one to grade with. The solutions are not executed, unless --quick tries them."""
    out: Path | None = None
    """The folder for these chapters and their solutions."""


def manuscripts(root: Path, chapters: tuple[int, ...] = ()) -> list[Path]:
    """The manuscripts' files in the order of the chapters."""
    files = sorted((root / "manuscript").glob("[0-9][0-9]_*.py"))
    chosen = [file for file in files if not chapters or int(file.name[:2]) in chapters]
    if not chosen or len(chosen) < len(set(chapters)):
        raise ConfigError(f"{root / 'manuscript'}: there are only {[f.name for f in files]}.")
    return chosen


def target(root: Path, edition: str, stem: str) -> Path:
    """Where a built notebook stands."""
    return root / edition / f"{stem}.ipynb"


def put(file: Path, content: bytes) -> bool:
    """Write a file unless it holds these bytes already; True when it was written."""
    if file.exists() and file.read_bytes() == content:
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_name(f".{file.name}.part")
    part.write_bytes(content)
    part.replace(file)
    return True


def build_student(root: Path, file: Path) -> bool:
    """Write one student notebook; True when it has changed."""
    text = manuscript.read(file)
    built = notebook.build(text, notebook.CHAPTERS)
    return put(target(root, notebook.CHAPTERS, text.stem), notebook.write(built))


def build_solution(root: Path, file: Path, config: BuildConfig) -> str:
    """Write one solution; returns in a word what was done. Raises ConfigError when it fails."""
    text = manuscript.read(file)
    built = notebook.build(text, notebook.SOLUTIONS)
    place = target(root, notebook.SOLUTIONS, text.stem)
    if not config.force and not config.quick and take_outputs(built, place):
        return "refreshed" if put(place, notebook.write(built)) else "unchanged"
    if not config.execute:
        return "out of date"
    print(f"{notebook.SOLUTIONS}/{text.stem}: executing …", file=sys.stderr, flush=True)
    began = time.perf_counter()
    execute.execute(built, QUICK if config.quick else None)
    seconds = time.perf_counter() - began
    content = finish(built, text.stem)
    if not config.quick:
        put(place, content)
    return f"executed in {seconds:.0f} s, {len(content) / 1e6:.2f} MB{peak_memory()}"


def take_outputs(built: NotebookNode, place: Path) -> bool:
    """Fill a notebook with the outputs of the file that it would replace, if those are its own."""
    import nbformat

    return place.exists() and execute.take_outputs(built, nbformat.read(place, as_version=4))


def finish(executed: NotebookNode, stem: str) -> bytes:
    """An executed notebook as its file. Raises ConfigError where it must not be published."""
    execute.clean(executed)
    notes = {"fingerprint": execute.fingerprint(executed)}
    executed.metadata = type(executed)(notebook.METADATA | {execute.OURS: notes})
    found, content = execute.problems(executed), notebook.write(executed)
    if len(content) > execute.LARGEST:
        found.append(f"{len(content) / 1e6:.2f} MB, at most {execute.LARGEST / 1e6} are allowed")
    if found:
        raise ConfigError(f"{stem}: the executed notebook cannot be kept.\n" + "\n".join(found))
    return content


def peak_memory() -> str:
    """The largest memory of a notebook's process so far, where the system tells it."""
    try:
        import resource
    except ImportError:  # Windows
        return ""
    size = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    return f", at most {size / (1e9 if sys.platform == 'darwin' else 1e6):.1f} GB of memory so far"


def build_variants(config: BuildConfig, file: Path) -> str:
    """Write a chapter for graded use and its solution; returns in words what stands in it.

    Raises ConfigError when the solution fails in quick mode, where that is asked for.
    """
    text = manuscript.read(file)
    chosen = variants.choose(config.variants, [exercise.id for exercise in text.exercises])
    for edition in (notebook.CHAPTERS, notebook.SOLUTIONS):
        built = notebook.build(text, edition, chosen)
        put(target(config.out, edition, text.stem), notebook.write(built))
    told = [f"{id} {variant.name}" for id, variant in chosen.items() if variant]
    if config.quick:
        execute.execute(built, QUICK)
    return ", ".join(told or ["as it is published"]) + ("; it runs" if config.quick else "")


def build(config: BuildConfig) -> bool:
    """Build what the configuration asks for; False when a notebook failed."""
    files = manuscripts(config.root, config.chapters)
    if (config.variants is None) != (config.out is None):
        raise ConfigError("--variants and --out go together: a number, and a folder for them.")
    if config.out is not None and config.out.resolve() == config.root.resolve():
        raise ConfigError(f"{config.out}: the published chapters stand there. Name another folder.")
    steps = [(notebook.CHAPTERS, file) for file in files]
    steps += [(notebook.SOLUTIONS, file) for file in files]
    if config.variants is not None:
        steps = [("variants", file) for file in files]
    good = True
    for edition, file in steps:
        try:
            if edition == "variants":
                done = build_variants(config, file)
            elif edition == notebook.CHAPTERS:
                done = "written" if build_student(config.root, file) else "unchanged"
            else:
                done = build_solution(config.root, file, config)
        except CourseError as error:
            good, done = False, f"FAILED\n{error}"
        print(f"{edition}/{file.stem}: {done}", flush=True)
    return good


def main() -> int:
    """The command line; returns the exit code."""
    try:
        return 0 if build(tyro.cli(BuildConfig, description=__doc__)) else 1
    except CourseError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_CODE


if __name__ == "__main__":
    sys.exit(main())
