"""`rlhf-course grade`: many submissions side by side, reports, and a table of the class.

rlhf-course grade submissions/*.ipynb --chapters 3
rlhf-course grade class/ --out grades --format markdown csv junit
rlhf-course grade --bundle gradescope --out autograder.zip
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from multiprocessing import active_children, get_context, parent_process
from pathlib import Path

from rich.markup import escape

from rlhf_course.coursework.exercises import STEMS
from rlhf_course.errors import ConfigError, DataError, GradingError, Interrupted
from rlhf_course.files import read_json, replacing, require_writable, write_json
from rlhf_course.grading import reports, submission
from rlhf_course.grading.results import SubmissionResult
from rlhf_course.grading.settings import GradeConfig
from rlhf_course.progress import Bar, console

RULES = "grading.json"
"""In --out: the seed and the chapters that all its results have in common."""


def grade(config: GradeConfig) -> None:
    """Grade, print the table, write the files. Raises GradingError when the grader itself failed
    for a submission (everything is written all the same)."""
    check(config)
    if config.bundle:
        write_bundle(config)
        return
    paths = meant(config)
    found = dict(zip(submission.names(paths), paths, strict=True))
    require_writable(config.out)
    seed = settle(config)
    results = {} if config.force else finished(config, found, seed)
    left = {name: path for name, path in found.items() if name not in results}
    try:
        for result in graded(config, left, seed):
            write_one(config, result)
            results[result.name] = result
    except KeyboardInterrupt:
        raise Interrupted(
            f"stopped: {len(results)} of {len(found)} are graded, in {config.out}. The same "
            "command goes on from there."
        ) from None
    finally:
        write_summary(config, [results[name] for name in found if name in results])
    failed = [result.name for result in results.values() if result.failure]
    if failed:
        raise GradingError(
            f"the grader itself failed for {', '.join(failed)}: see `failure` in their "
            "result.json. Their scores say nothing; the same command tries them again."
        )


def check(config: GradeConfig) -> None:
    """Raise ConfigError for settings that cannot be meant."""
    wrong = [c for c in config.chapters if not 1 <= c < len(STEMS)]
    if wrong:
        raise ConfigError(f"--chapters {wrong[0]}: there are 1 to {len(STEMS) - 1}.")
    if config.jobs < 0:
        raise ConfigError(f"--jobs {config.jobs}: 1 or more, or 0 for one each processor core.")
    if config.seed is not None and not 0 <= config.seed < 1 << 31:
        raise ConfigError(f"--seed {config.seed}: 0 to {(1 << 31) - 1}.")
    if not 0 < config.seconds_per_call <= config.seconds_per_exercise:
        raise ConfigError("--seconds-per-call: more than 0, at most --seconds-per-exercise.")
    if config.bundle and config.submissions:
        raise ConfigError("--bundle grades nothing: name no submissions, or leave it out.")
    if not config.bundle and not config.submissions:
        raise ConfigError("what is to be graded? Name notebooks, or a folder for each student.")
    if not hasattr(os, "fork"):
        raise ConfigError(
            "grading needs Linux or macOS, where a process can be forked and confined. On Windows "
            "use the Windows Subsystem for Linux."
        )


def write_bundle(config: GradeConfig) -> None:
    """What a platform needs to grade by itself."""
    from rlhf_course.grading import bundles

    place = bundles.write(config.bundle, config.out, config.chapters, config.variants)
    console.print(f"written to {place}")


# ---------------------------------------------------------------------------------- what is there


def meant(config: GradeConfig) -> list[Path]:
    """The submissions; --out is none, although it may lie among them. Raises DataError for none,
    and where --out itself is named."""
    out = config.out.resolve()
    paths = [path for path in submission.expand(config.submissions) if path.resolve() != out]
    if not paths or out in (path.resolve() for path in config.submissions):
        raise DataError(f"{config.out}: grades go there. Name another --out, or what is to grade.")
    for path in filter(Path.is_dir, paths):
        files = [file.name for file in path.iterdir()]
        for number, stem in enumerate(STEMS):
            several = sum(f"{number:02d}_{stem}" in name for name in files)
            if several > 1:
                console.print(
                    f"note: {escape(str(path))} is graded as one student's, with {several} files "
                    f"of chapter {number}. If they are of several students, name the files."
                )
    return paths


def settle(config: GradeConfig) -> int:
    """The seed of this class's random inputs: the given one, that of --out, or a new one.

    Raises ConfigError where --out holds results of other rules, unless all is graded again.
    """
    from rlhf_course.grading.referee import fresh_seed

    file = config.out / RULES
    before = read_json(file) if file.exists() else {}
    before = before if isinstance(before, dict) else {"damaged": True}
    seed = config.seed if config.seed is not None else before.get("seed", fresh_seed())
    chapters = sorted(set(config.chapters))
    rules = {"chapters": chapters, "variants": config.variants, "seed": seed}
    if before and before != rules and not config.force:
        raise ConfigError(
            f"{config.out} holds grades of another seed, other chapters or variants. Choose "
            "another --out, or grade all of it again with --force."
        )
    write_json(file, rules)
    return seed


def finished(config: GradeConfig, found: dict[str, Path], seed: int) -> dict:
    """Name -> result, of the submissions in --out that have not changed since."""
    import rlhf_course
    from rlhf_course.grading.referee import digest

    done = {}
    for name, path in found.items():
        try:
            text = (config.out / name / "result.json").read_text(encoding="utf-8")
            result = SubmissionResult.from_json(text)
        except (OSError, DataError):
            continue
        each = submission.find(path, name)
        same = (result.digest, result.seed, result.version, result.failure) == (
            digest(each), seed, rlhf_course.__version__, "",
        )  # fmt: skip
        if same and tuple(result.problems[: len(each.problems)]) == tuple(each.problems):
            done[name] = result
            write_one(config, result, only_missing=True)  # of a format that was not asked for then
    if done:
        console.print(f"{len(done)} of {len(found)} are graded already, in {config.out}")
    return done


# ---------------------------------------------------------------------------------------- grading


def graded(config: GradeConfig, found: dict[str, Path], seed: int) -> Iterator[SubmissionResult]:
    """The results, in the order in which they are ready."""
    from rlhf_course.grading.referee import Patience, Rules

    if not found:
        return
    rules = Rules(
        seed, config.chapters, config.variants,
        Patience(config.seconds_per_call, config.seconds_per_exercise),
    )  # fmt: skip
    jobs = min(config.jobs or os.cpu_count() or 1, len(found))
    bar = Bar("grading", len(found))
    bar.start()
    try:
        for number, result in enumerate(_in_processes(found, rules, jobs), 1):
            bar.metrics = f"{escape(result.name)} {result.score:g}/{result.max_score:g}"
            bar.advance(number, result.seconds)
            yield result
    finally:
        bar.close()


def _in_processes(found: dict[str, Path], rules, jobs: int) -> Iterator[SubmissionResult]:
    """Grade in `jobs` processes, each with a fork server of its own; one job needs none."""
    if jobs == 1:
        yield from _one_by_one(found, rules)
        return
    left = dict(found)
    for processes in (jobs, 1):  # what a dying process leaves is tried once more
        pool = ProcessPoolExecutor(processes, get_context("spawn"), _prepare, (rules.patience,))
        waiting = {pool.submit(_grade, path, name, rules): name for name, path in left.items()}
        try:
            for future in as_completed(waiting):
                with suppress(BrokenProcessPool):
                    yield future.result()
                    del left[waiting[future]]
        except BaseException:  # Ctrl-C, a full disk: nobody waits for what is being graded
            for process in active_children():
                process.terminate()
            raise
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        if not left:
            return
    yield from (failure(name, rules, "a process of the grader died") for name in left)


def _one_by_one(found: dict[str, Path], rules) -> Iterator[SubmissionResult]:
    _start(rules.patience)
    try:
        for name, path in found.items():
            yield _grade(path, name, rules)
    finally:
        _server.close()


def failure(name: str, rules, why: str) -> SubmissionResult:
    """The result of a submission for which the grader itself failed."""
    import rlhf_course

    return SubmissionResult(
        name=name, files=(), problems=(), exercises=(),
        seed=rules.seed, variant=rules.variants, isolation=(), version=rlhf_course.__version__,
        seconds=0.0, failure=why,
    )  # fmt: skip


_server = None


def _prepare(patience) -> None:
    """Once a process: one thread, and a fork server that ends with the process."""
    import atexit
    import signal
    from threading import Thread

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the first process's affair
    Thread(target=_end_with_the_first, daemon=True).start()
    _start(patience)
    atexit.register(lambda: _server.close())


def _end_with_the_first() -> None:
    """Where the first process was killed, nobody tells this one that there is no more to do. Its
    fork server ends with it."""
    parent_process().join()
    os._exit(1)


def _start(patience) -> None:
    import torch

    from rlhf_course.grading.children import ForkServer

    global _server
    torch.set_num_threads(1)  # small tensors, and other processes beside this one
    if _server is not None:
        _server.close()
    _server = ForkServer(patience)


def _grade(path: Path, name: str, rules) -> SubmissionResult:
    """Grade one submission; once more, with a new fork server, when the grader failed."""
    from rlhf_course.grading.referee import grade

    result = grade(_server, submission.find(path, name), rules)
    if result.failure:
        _start(rules.patience)
        result = grade(_server, submission.find(path, name), rules)
    return result


# ---------------------------------------------------------------------------------------- writing


def write_one(config: GradeConfig, result: SubmissionResult, only_missing: bool = False) -> None:
    """A student's folder: result.json last, for it says that the others are complete."""
    for name, make in makers_of(config).items():
        file = config.out / result.name / name
        if only_missing and file.exists():
            continue
        with replacing(file) as part:
            part.write_text(make(result), encoding="utf-8")


def makers_of(config: GradeConfig) -> dict[str, Callable[[SubmissionResult], str]]:
    """Name of each file of a student -> what makes its text."""
    from rlhf_course.grading import exports, github, gradescope

    makers: dict[str, tuple[str, Callable[[SubmissionResult], str]]] = {
        "markdown": ("report.md", reports.markdown),
        "html": ("report.html", reports.html),
        "gradescope": (
            "results.json",
            lambda each: json.dumps(gradescope.results_json(each), indent=2),
        ),
        "junit": ("junit.xml", lambda each: exports.junit([each])),
        "github": ("github.txt", github.payload),
    }
    chosen = dict(makers[kind] for kind in makers if kind in config.format)
    return chosen | {"result.json": SubmissionResult.to_json}


def write_summary(config: GradeConfig, results: list[SubmissionResult]) -> None:
    """The table of the class, on the screen and in files."""
    from rlhf_course.grading import exports

    if not results:
        return
    console.print(reports.summary_table(results))
    texts = {"csv": ("summary.csv", reports.csv), "junit": ("junit.xml", exports.junit)}
    for kind, (name, make) in texts.items():
        if kind in config.format:
            with replacing(config.out / name) as part:
                part.write_text(make(results), encoding="utf-8")
    console.print(f"written to {config.out}")
