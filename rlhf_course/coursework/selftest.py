"""Do the exercises' tests tell right from wrong? For authors of exercises.

python -m rlhf_course.coursework.selftest                   every exercise
python -m rlhf_course.coursework.selftest ppo.whiten mdp    one exercise, one module
python -m rlhf_course.coursework.selftest --seeds 200       does the solution ever fail?
"""

from __future__ import annotations

import argparse
import sys
import time

from rich.console import Console

from rlhf_course.coursework.exercises import EXERCISES, Exercise
from rlhf_course.coursework.mutants import alike, mutants_of
from rlhf_course.coursework.source import blank, solved
from rlhf_course.coursework.subject import answer_from
from rlhf_course.coursework.trial import Outcome, properties, try_answer

console = Console(soft_wrap=True, highlight=False)


def faults(exercise: Exercise, seeds: int = 1) -> list[str]:
    """What is wrong with an exercise's tests and mutants; nothing is the aim.

    The blank must be "not implemented", the solution pass under every seed, and every mutant fail
    in a way of its own.
    """
    found = []
    if not properties(exercise):
        return ["no tests"]
    outcomes = try_answer(exercise, answer_from(exercise, blank(exercise.id)))
    if not all(outcome.missing for outcome in outcomes):
        found.append("the blank is not told from a wrong answer in every property")
    solution = answer_from(exercise, solved(exercise.id))
    for seed in range(seeds):
        wrong = [o for o in try_answer(exercise, solution, seed) if not o.passed]
        found += [f"the solution fails with seed {seed}: {o.title}\n{o.mismatch}" for o in wrong]
    seen: dict[str, list[Outcome]] = {}
    for mutant in mutants_of(exercise):
        outcomes = try_answer(exercise, mutant.answer())
        if all(outcome.passed for outcome in outcomes):
            found.append(f"mutant {mutant.name!r} survives")
        if any(unknown(outcome) for outcome in outcomes):
            found.append(f"mutant {mutant.name!r} uses a name that its imports do not bring")
        twins = [name for name, theirs in seen.items() if alike(theirs, outcomes)]
        found += [f"mutant {mutant.name!r} cannot be told from {twin!r}" for twin in twins]
        seen[mutant.name] = outcomes
    return found


def unknown(outcome: Outcome) -> bool:
    """True where a mutant died of a missing name, and not of its mistake."""
    got = outcome.mismatch.got if outcome.mismatch else None
    return isinstance(got, str) and got.startswith(("NameError", "ImportError"))


def report(exercise: Exercise, seeds: int) -> bool:
    """Print what kills which mutant, and the faults; True without any."""
    began = time.perf_counter()
    outcomes = try_answer(exercise, answer_from(exercise, solved(exercise.id)))
    seconds = time.perf_counter() - began
    console.print(f"[bold]{exercise.id}[/bold]: {len(outcomes)} properties, {seconds:.2f} s")
    for mutant in mutants_of(exercise):
        failed = [o for o in try_answer(exercise, mutant.answer()) if not o.passed]
        died = "; ".join(f"{o.title} ({o.mismatch.what if o.mismatch else 'missing'})"
                         for o in failed) or "SURVIVES"  # fmt: skip
        console.print(f"  {mutant.name}: {died}", markup=False)
    found = faults(exercise, seeds)
    for fault in found:
        console.print(f"  FAULT {fault}", style="red", markup=False)
    return not found


def main(arguments: list[str] | None = None) -> int:
    """Exit code 1 where an exercise has faults."""
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("which", nargs="*", help="ids or modules [default: all]")
    parser.add_argument("--seeds", type=int, default=1, help="seeds tried with the solution")
    chosen = parser.parse_args(arguments)
    which = chosen.which or [exercise.module for exercise in EXERCISES]
    picked = [e for e in EXERCISES if e.id in which or e.module in which or e.name in which]
    sound = [report(e, chosen.seeds) for e in picked]
    return 0 if sound and all(sound) else 1


if __name__ == "__main__":
    sys.exit(main())
