"""The package's functions as text: solved, blanked, and with the imports that they need.

An exercise's solution is the function in the package. Two comments in it enclose what the student
writes; everything else, the checks before it and the statistics after it, is given:

    # BEGIN SOLUTION
    # END SOLUTION

Read with `ast`, `symtable` and `tokenize`; no module is imported for it.
"""

from __future__ import annotations

import ast
import builtins
import io
import symtable
import sys
import textwrap
import tokenize
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from rlhf_course.coursework import exercises
from rlhf_course.errors import ConfigError

BEGIN, END = "# BEGIN SOLUTION", "# END SOLUTION"
BLANK = "raise NotImplementedError"
WIDTH = 88  # of a line in a notebook
PACKAGE = "rlhf_course"
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Module:
    """A module of the package as it is written."""

    name: str
    """Dotted, in full: "rlhf_course.ppo"."""
    lines: tuple[str, ...]
    tree: ast.Module

    def find(self, name: str) -> ast.stmt | None:
        """The statement that defines or imports a name at the top of the module."""
        for node in self.tree.body:
            if name in bound(node):
                return node
        return None

    def text(self, node: ast.AST) -> str:
        """A definition's lines, its decorators and the comments at its end included."""
        decorators = getattr(node, "decorator_list", [])
        first = min([node.lineno, *(d.lineno for d in decorators)])
        last = node.end_lineno  # of the last statement; a comment behind it belongs to no node
        for number, line in enumerate(self.lines[last:], last + 1):
            if line.strip() and len(line) - len(line.lstrip()) <= node.col_offset:
                break
            last = number if line.strip() else last
        return "\n".join(self.lines[first - 1 : last])


@cache
def module(name: str) -> Module:
    """Read a module of the package by its dotted name."""
    file = _file(name)
    text = file.read_text(encoding="utf-8")
    return Module(name, tuple(text.splitlines()), ast.parse(text, str(file)))


def exists(name: str) -> bool:
    """True where a dotted name is a module of the package."""
    return _file(name).exists()


def _file(name: str) -> Path:
    place = ROOT.joinpath(*name.split(".")[1:])
    return place / "__init__.py" if place.is_dir() else place.with_suffix(".py")


def bound(node: ast.stmt) -> set[str]:
    """The names that a statement at the top of a module binds."""
    if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return {node.name}
    if isinstance(node, (ast.Import, ast.ImportFrom)):
        return {alias.asname or alias.name.partition(".")[0] for alias in node.names}
    if isinstance(node, (ast.Assign, ast.AnnAssign)):
        targets = node.targets if isinstance(node, ast.Assign) else [node.target]
        return {n.id for target in targets for n in ast.walk(target) if isinstance(n, ast.Name)}
    return set()


# ------------------------------------------------------------------------------- one definition


@dataclass(frozen=True)
class Definition:
    """An exercise's function, cut where the student's part begins and ends."""

    exercise: exercises.Exercise
    module: str
    """Where it is written, which is not always where students import it from."""
    head: str
    """Up to the line `# BEGIN SOLUTION`, that included."""
    answer: str
    """What stands between the two markers, indented as it is there."""
    tail: str
    """From the line `# END SOLUTION` on."""

    @property
    def indent(self) -> str:
        """What stands before each line of the answer."""
        last = self.head.rpartition("\n")[2]
        return last[: len(last) - len(last.lstrip())]

    def with_answer(self, body: str) -> str:
        """The definition with another text (dedented) between the markers."""
        body = textwrap.indent(textwrap.dedent(body).strip("\n"), self.indent)
        return "\n".join([self.head, body, self.tail])


def definition(id: str, variant: Any = None) -> Definition:
    """Find an exercise in the package, or what a variant of it asks for (`variant_texts`).

    Raises ConfigError where it has no solution markers.
    """
    found = _definition(id)
    return found if variant is None else variant.asked(found)


def _definition(id: str) -> Definition:
    exercise = exercises.find(id)
    written, node = _locate(f"{PACKAGE}.{exercise.module}", exercise.name, id)
    text = written.text(node)
    if exercise.method:
        methods = [n for n in node.body if exercise.method in bound(n)]
        if not methods:
            raise ConfigError(f"{id}: {written.name}.{exercise.name} has no such method.")
        text = _subclass(exercise, written.text(methods[0]))
    lines = text.split("\n")
    first, last = _markers(text, f"{id} in {written.name}")
    return Definition(
        exercise,
        written.name,
        "\n".join(lines[: first + 1]),
        "\n".join(lines[first + 1 : last]),
        "\n".join(lines[last:]),
    )


def _locate(name: str, wanted: str, id: str) -> tuple[Module, ast.stmt]:
    """Module and statement that define a name, followed through re-exports."""
    written = module(name)
    node = written.find(wanted)
    if isinstance(node, ast.ImportFrom) and node.module.partition(".")[0] == PACKAGE:
        return _locate(node.module, wanted, id)
    if not isinstance(node, (ast.FunctionDef, ast.ClassDef)):
        raise ConfigError(f"{id}: {name} defines no function or class {wanted}.")
    return written, node


def _subclass(exercise: exercises.Exercise, method: str) -> str:
    """A method printed as a class of its own, which takes the rest from the package's."""
    base = f"{exercise.module}.{exercise.name}"
    story = f'    """The package\'s `{base}` with your own `{exercise.method}`."""'
    return "\n".join([f"class {exercise.name}({base}):", story, "", method])


def _markers(text: str, where: str) -> tuple[int, int]:
    """Line numbers, from 0, of the two markers: one pair, in this order, at one depth."""
    readable = io.StringIO(textwrap.dedent(text)).readline
    comments = [t for t in tokenize.generate_tokens(readable) if t.type == tokenize.COMMENT]
    found = [t for t in comments if t.string in (BEGIN, END)]
    if [t.string for t in found] != [BEGIN, END] or found[0].start[1] != found[1].start[1]:
        raise ConfigError(f"{where}: needs one pair of lines {BEGIN!r} and {END!r}, at one depth.")
    return found[0].start[0] - 1, found[1].start[0] - 1


def solved(id: str, variant: Any = None) -> str:
    """The exercise as a notebook cell with the package's own answer, markers kept."""
    found = definition(id, variant)
    return "\n".join([found.head, found.answer, found.tail])


def blank(id: str, variant: Any = None) -> str:
    """The exercise as a student gets it: `raise NotImplementedError` between the markers."""
    return definition(id, variant).with_answer(BLANK)


def edited(text: str, edits: Sequence[tuple[str, str]], whose: str) -> str:
    """The text with each (old, new) replaced. ValueError where an old one stands there not once."""
    for old, new in edits:
        if text.count(old) != 1:
            raise ValueError(
                f"{whose}: {old!r} stands {text.count(old)} times in the solution, not once. "
                "Fit the edit to the solution."
            )
        text = text.replace(old, new)
    return text


# -------------------------------------------------------------------------------------- imports


def free_names(code: str) -> set[str]:
    """The names that a piece of code reads and does not define, builtins left out."""
    top = symtable.symtable(code, "cell", "exec")
    defined = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    read, tables = set(), [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        outside = table is top
        read |= {
            s.get_name()
            for s in table.get_symbols()
            if s.is_referenced() and (outside or s.is_global())
        }
    return read - defined - set(dir(builtins))


def imports(
    ids: Sequence[str], also: Iterable[str] = (), chosen: Mapping[str, Any] | None = None
) -> str:
    """The import lines that the cells of these exercises need, in the order of the cells.

    What the defining module imports is imported in the same way, what it defines from there. An
    exercise that stands before the one using it is not imported: there the student's own is meant.
    One that comes later is, until the student's takes its name. `also`: modules to import besides,
    as "torch.nn.functional as F". chosen: id -> variant, where not the usual form is asked for.
    """
    plain = set(also)
    members: dict[str, set[str]] = {}
    written: set[str] = set()
    for id in ids:
        found = definition(id)
        name = found.exercise.name
        text = solved(id, (chosen or {}).get(id))
        for needed in free_names(text) - written - {name}:
            where, member = origin(found.module, needed)
            if member:
                members.setdefault(where, set()).add(member)
            else:
                plain.add(where)
        written.add(name)
    return _import_lines(plain, members)


def origin(name: str, needed: str) -> tuple[str, str]:
    """Where a module has a name from: ("torch", "Tensor"), or ("torch.nn as nn", "").

    The package's own modules may be named by a class that is printed as a subclass.
    """
    node = module(name).find(needed)
    if node is None:
        if exists(f"{PACKAGE}.{needed}"):
            return PACKAGE, needed
        raise ConfigError(f"{name}: {needed} is used in a solution, but not bound at the top.")
    if not isinstance(node, (ast.Import, ast.ImportFrom)):
        return name, needed
    alias = next(a for a in node.names if needed == (a.asname or a.name.partition(".")[0]))
    spelled = f"{alias.name} as {alias.asname}" if alias.asname else alias.name
    return (node.module, spelled) if isinstance(node, ast.ImportFrom) else (spelled, "")


def _import_lines(plain: Iterable[str], members: dict[str, set[str]]) -> str:
    """Sorted as ruff sorts: the standard library, other packages, this one; `import` first."""
    groups: list[list[tuple[bool, str, str]]] = [[], [], []]
    for where in plain:
        groups[_group(where)].append((False, where.lower(), f"import {where}"))
    for where, names in members.items():
        line = f"from {where} import "
        ordered = ", ".join(sorted(names, key=_kind))
        if len(line + ordered) > WIDTH:
            inner = textwrap.fill(ordered + ",", WIDTH - 4)
            ordered = "(\n" + textwrap.indent(inner, "    ") + "\n)"
        groups[_group(where)].append((True, where.lower(), line + ordered))
    blocks = ["\n".join(line for *_, line in sorted(group)) for group in groups if group]
    return "\n\n".join(blocks)


def _group(where: str) -> int:
    top = where.partition(".")[0].partition(" ")[0]
    return 0 if top in sys.stdlib_module_names else 2 if top == PACKAGE else 1


def _kind(name: str) -> tuple[int, str, str]:
    """Constants, then classes, then the rest, each by its letters: ruff's order of members."""
    kind = 0 if name.isupper() and len(name) > 1 else 1 if name[:1].isupper() else 2
    return kind, name.lower(), name
