"""The package without its answers, as the text that a player imports it from.

For one exercise: its own answer and all later ones are blank, earlier ones are there. So nothing
that would earn the points can be imported, and a mistake in chapter 1 costs nothing in chapter 5.
"""

from __future__ import annotations

import ast
from functools import cache

from rlhf_course.coursework import source
from rlhf_course.coursework.exercises import EXERCISES, Exercise, find

LEFT_OUT = ("coursework", "grading")
"""Sub-packages that no player has: the tests, the wrong answers with their corrections, and us."""


@cache
def given(exercise: Exercise) -> frozenset[str]:
    """Ids of the exercises whose answers a player of this one has.

    All earlier ones, and those that a solution up to here builds on although its chapter is a later
    one (`ppo.whiten` calls `ppo_ptx.masked_moments`, which the student imports).
    """
    upto = EXERCISES[: EXERCISES.index(exercise) + 1]
    named = set().union(*(source.free_names(source.solved(e.id)) for e in upto))
    ids = {e.id for e in EXERCISES if e in upto or (e.name in named and not e.method)}
    return frozenset(ids - {exercise.id})


@cache
def package(exercise: Exercise) -> dict[str, str]:
    """Dotted name of each module -> its text; that of a package ends in ".__init__"."""
    keep = given(exercise)
    return {name: text if parts is None else _without(text, parts - keep)
            for name, text, parts in _modules()}  # fmt: skip


@cache
def _modules() -> list[tuple[str, str, frozenset[str] | None]]:
    """(dotted name, text, ids of the exercises it holds or None) of every module a player gets."""
    places: dict[str, set[str]] = {}
    for exercise in EXERCISES:
        places.setdefault(source.definition(exercise.id).module, set()).add(exercise.id)
    found = []
    for file in sorted(source.ROOT.rglob("*.py")):
        parts = file.relative_to(source.ROOT).with_suffix("").parts
        if parts[0] in LEFT_OUT:
            continue
        name = ".".join((source.PACKAGE, *parts))
        held = frozenset(places.get(name, ())) or None
        found.append((name, file.read_text(encoding="utf-8"), held))
    return found


def _without(text: str, ids: frozenset[str]) -> str:
    """A module's text with the answers to these exercises blank."""
    wanted = {find(id).qualname for id in ids}
    lines = text.split("\n")
    for first, last in reversed(_functions(ast.parse(text), wanted)):
        begin = next(i for i in range(first, last) if lines[i].strip() == source.BEGIN)
        end = next(i for i in range(begin, last) if lines[i].strip() == source.END)
        indent = lines[begin][: len(lines[begin]) - len(lines[begin].lstrip())]
        lines[begin : end + 1] = [indent + source.BLANK]
    return "\n".join(lines)


def _functions(tree: ast.Module, wanted: set[str]) -> list[tuple[int, int]]:
    """(first, last) line, from 0, of these functions and methods, in the order of the text.

    A comment behind the last statement belongs to no node; the next definition ends it.
    """
    found, nodes = [], []
    for node in tree.body:
        nodes.append((getattr(node, "name", ""), node))
        if isinstance(node, ast.ClassDef):
            nodes += [(f"{node.name}.{getattr(m, 'name', '')}", m) for m in node.body]
    starts = sorted(node.lineno for _, node in nodes)
    for name, node in nodes:
        if name in wanted:
            after = [line for line in starts if line > node.end_lineno]
            found.append((node.lineno - 1, after[0] - 1 if after else node.end_lineno + 2))
    return sorted(found)
