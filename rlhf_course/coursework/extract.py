"""What a notebook defines: its imports, functions, classes and constants, without running the rest.

Taken by name through the syntax tree, so that cell ids and metadata do not matter. Of several
definitions of a name the last one counts, as if the cells had been run from top to bottom.

`statements` lists all definitions, `needed` those that one function needs, `namespace` runs them.
"""

from __future__ import annotations
import __future__

import ast
import linecache
import symtable
import sys
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import zip_longest
from pathlib import Path
from types import ModuleType
from typing import Any

from rlhf_course.coursework.cells import UNPARSED, cells_of, parse
from rlhf_course.coursework.light import ALIAS, BLOCKS, DEFINITIONS, IMPORTS, Names, inside, names
from rlhf_course.errors import DataError

MODULE = "answers"
"""The name of the module that `namespace` makes."""
STAR = "*"


@dataclass(frozen=True)
class Statement:
    """A definition at the top of a cell."""

    text: str
    """As it is written; in an if, with or try, `pass` in the place of what is no definition."""
    cell: int
    """Its number among all cells of the notebook, from 1."""
    line: int
    """Its first line in the cell, from 1."""
    binds: frozenset[str]
    """The names that it binds, or changes; "*" for `from torch import *`."""
    reads: frozenset[str]
    """The global names that it reads, its functions' bodies included."""
    defines: frozenset[str] = frozenset()
    """Those of `binds` that stand for a function or class then, as far as the text tells."""
    imported: bool = False
    """An import: it binds what another module defines."""


def cells(file: Path) -> list[str]:
    """The code cells of a notebook, or of a .py file.

    Raises DataError where the file is missing or no notebook.
    """
    try:
        found = cells_of(file.read_bytes(), file.suffix)
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror}). Name a notebook.") from None
    except DataError as error:
        raise DataError(f"{file}: {error}") from None
    return [cell for cell in found if cell is not None]


def statements(cells: Sequence[str | None]) -> list[Statement]:
    """Every definition at the top of the cells, in order; None stands for a cell without code.

    Lines of IPython and the notebook's work are left out, and a cell that cannot be parsed is, too.
    """
    return read(cells)[0]


def read(cells: Sequence[str | None]) -> tuple[list[Statement], list[tuple[int, str]]]:
    """As `statements`, and (number, reason) of every cell that cannot be parsed."""
    parsed: list[tuple[int, str, ast.Module]] = []
    broken: list[tuple[int, str]] = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of "\d" in a student's string
        for number, source in enumerate(cells, 1):
            try:
                parsed.append((number, *parse(source or "")))
            except UNPARSED as error:
                broken.append((number, _reason(error)))
        known = Names([tree for *_, tree in parsed], _read_by_functions(parsed))
        found = [s for number, text, tree in parsed for s in _of_cell(number, text, tree, known)]
    return found, broken


def _reason(error: BaseException) -> str:
    if isinstance(error, SyntaxError) and error.lineno:
        return f"line {error.lineno}: {error.msg}"
    if isinstance(error, (RecursionError, MemoryError)):
        return "it is nested too deeply"
    return str(error).partition("\n")[0]


def _read_by_functions(parsed: list[tuple[int, str, ast.Module]]) -> dict[str, set[str]]:
    """Name of each function and class -> the global names that its definitions read."""
    reads: dict[str, set[str]] = {}
    for _, text, tree in parsed:
        lines = Lines(text)
        todo = list(tree.body)
        while todo:
            node = todo.pop()
            if isinstance(node, BLOCKS):
                todo += inside(node)
            elif isinstance(node, DEFINITIONS):
                read = reads.setdefault(node.name, set())
                with suppress(*UNPARSED):
                    read |= _names(lines.apart(node))[1]
    return reads


def _of_cell(number: int, text: str, tree: ast.Module, known: Names) -> Iterator[Statement]:
    lines = Lines(text)
    for node in tree.body:
        try:
            if not known.admit(node):
                continue
            first = lines.first(node)
            for written in _written(node, lines, known):
                binds, reads = _names(written)
                changed = _changed(node) if not isinstance(node, IMPORTS) else set()
                if isinstance(node, ast.ImportFrom) and node.names[0].name == STAR:
                    binds = {STAR}
                yield Statement(
                    written,
                    number,
                    first,
                    frozenset(binds | changed),
                    frozenset(reads),
                    frozenset(known.defined(node)),
                    isinstance(node, IMPORTS),
                )
        except UNPARSED:  # nested too deeply to be looked through
            continue


def _written(node: ast.stmt, lines: Lines, known: Names) -> list[str]:
    """The text of a definition; each name of an import by itself, lest one miss cost the others."""
    if isinstance(node, ast.Import):
        return [f"import {_spelled(alias)}" for alias in node.names]
    if isinstance(node, ast.ImportFrom):
        where = "." * node.level + (node.module or "")
        if where == "__future__":
            return []  # `run` sees to what it is for
        return [f"from {where} import {_spelled(alias)}" for alias in node.names]
    if isinstance(node, BLOCKS):
        return [lines.blanked(node, list(_work(node, known)))]
    return [lines.text(node)]


def _spelled(alias: ast.alias) -> str:
    return f"{alias.name} as {alias.asname}" if alias.asname else alias.name


def _work(block: ast.stmt, known: Names) -> Iterator[ast.stmt]:
    """What is no definition in a block, however deep."""
    for node in inside(block):
        if isinstance(node, BLOCKS) and known.opens(node):
            yield from _work(node, known)
        elif not known.admit(node):
            yield node


def _changed(node: ast.stmt) -> set[str]:
    """The names of which a part is assigned: `table[3] = 1`, `Controller.update = update`; and
    those within a comprehension that `:=` binds outside."""
    if isinstance(node, BLOCKS):
        return {name for inner in inside(node) for name in _changed(inner)}
    if isinstance(node, (*DEFINITIONS, *((ALIAS,) if ALIAS else ()))):
        return set()
    parts = [
        part for part in ast.walk(node)
        if isinstance(part, (ast.Attribute, ast.Subscript)) and isinstance(part.ctx, ast.Store)
    ]  # fmt: skip
    walrus = {part.target.id for part in ast.walk(node) if isinstance(part, ast.NamedExpr)}
    return walrus | {name.id for part in parts for name in names(part.value)}


def _names(text: str) -> tuple[set[str], set[str]]:
    """What a statement binds at the top, and the global names that it reads."""
    top = symtable.symtable(text, "cell", "exec")
    binds = {s.get_name() for s in top.get_symbols() if s.is_assigned() or s.is_imported()}
    reads, tables = set(), [top]
    while tables:
        table = tables.pop()
        tables += table.get_children()
        reads |= {
            s.get_name() for s in table.get_symbols()
            if s.is_declared_global() or (s.is_referenced() and (table is top or s.is_global()))
        }  # fmt: skip
    return binds, reads


class Lines:
    """The text of a cell, cut by the places that the tree names: columns count bytes."""

    def __init__(self, text: str):
        self.lines = text.encode().split(b"\n")

    def first(self, node: ast.stmt) -> int:
        """The line that a statement begins on, its decorators included."""
        return min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])

    def text(self, node: ast.stmt) -> str:
        """A statement as it is written."""
        first = self.first(node)
        lines = self.lines[first - 1 : node.end_lineno]
        lines[-1] = lines[-1][: node.end_col_offset]
        lines[0] = lines[0][node.col_offset :]  # a decorator's @ stands in this column, too
        return b"\n".join(lines).decode()

    def apart(self, node: ast.stmt) -> str:
        """A function or class, such that it can be parsed by itself also where a block has it."""
        if not node.col_offset:
            return self.text(node)
        return b"\n".join([b"if 1:", *self.lines[self.first(node) - 1 : node.end_lineno]]).decode()

    def blanked(self, block: ast.stmt, work: Sequence[ast.stmt]) -> str:
        """A block with `pass` for some of its statements; its lines stay where they are."""
        lines = self.lines[block.lineno - 1 : block.end_lineno]
        for node in reversed(work):
            first, last = self.first(node) - block.lineno, node.end_lineno - block.lineno
            before, after = lines[first][: node.col_offset], lines[last][node.end_col_offset :]
            lines[first : last + 1] = [before + b"pass" + after] + [b""] * (last - first)
        return b"\n".join(lines).decode()


# ------------------------------------------------------------------------------------- one function


def needed(
    statements: Sequence[Statement], name: str, given: Collection[str] = ()
) -> list[Statement]:
    """What the definition of `name` needs, directly or not, in the notebook's order.

    Every statement that binds a needed name is in it, so that the last one wins; only what binds
    `name` itself to no function once it has been defined is a slip, and left out. The names in
    `given` are there without the notebook: of them, no more than imports are taken.
    """
    binding: dict[str, list[int]] = {}
    for i, statement in enumerate(statements):
        for bound in statement.binds:
            binding.setdefault(bound, []).append(i)
    first = next((i for i, s in enumerate(statements) if name in s.defines), len(statements))
    taken: set[int] = set()
    todo, seen = [name, STAR], {name, STAR}
    while todo:
        wanted = todo.pop()
        for i in binding.get(wanted, ()):
            statement = statements[i]
            slip = wanted == name and i > first and name not in statement.defines
            if i in taken or slip or (wanted in given and not statement.imported):
                continue
            taken.add(i)
            more = statement.reads - seen
            seen |= more
            todo += more
    return [statements[i] for i in sorted(taken)]


def run(text: str, line: int, file: str, namespace: dict[str, Any]) -> None:
    """Run one definition, which begins in this line of its cell. Raises whatever it raises.

    Where it fails it is tried once more with its annotations left alone: they name what only the
    student's machine has, or what `from __future__ import annotations` has in its notebook.
    file: what tracebacks call the cell.
    """
    padded = "\n" * (line - 1) + text
    lines = padded.splitlines(keepends=True)  # beside those of the cell's other definitions
    known = linecache.getlines(file) if file in linecache.cache else []
    merged = [a if a.strip() else b for a, b in zip_longest(lines, known, fillvalue="\n")]
    linecache.cache[file] = (len(padded), None, merged, file)
    try:
        exec(compile(padded, file, "exec", dont_inherit=True), namespace)
    except Exception as error:  # noqa: BLE001 - any mistake of a student's
        flags = __future__.annotations.compiler_flag
        try:
            exec(compile(padded, file, "exec", flags, dont_inherit=True), namespace)
        except Exception:  # noqa: BLE001
            raise error from None


def namespace(statements: Sequence[Statement]) -> dict[str, Any]:
    """Run definitions one by one; one that fails costs only what it defines."""
    module = ModuleType(MODULE)
    sys.modules[MODULE] = module  # dataclasses look there for the names in their annotations
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", SyntaxWarning)
        for statement in statements:
            try:
                run(statement.text, statement.line, f"<cell {statement.cell}>", vars(module))
            except (Exception, SystemExit):  # noqa: BLE001 - any mistake of a student's
                continue
    return vars(module)
