"""What a notebook defines: its imports, functions, classes and constants, without running the rest.

Taken by name through the syntax tree, so that cell ids and metadata do not matter. Of several
definitions of a name the last one counts, as if the cells had been run from top to bottom.
"""

from __future__ import annotations

import ast
from pathlib import Path
from typing import Any

from rlhf_course.errors import DataError

KEPT = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
ASSIGNED = (ast.Assign, ast.AnnAssign)


def cells(file: Path) -> list[str]:
    """The code cells of a notebook, or the whole text of a .py file.

    Raises DataError where the file is missing or no notebook.
    """
    import nbformat

    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".py":
            return [text]
        notebook = nbformat.reads(text, as_version=4)
        return [cell.source for cell in notebook.cells if cell.cell_type == "code"]
    except Exception as error:  # noqa: BLE001 - of JSON that is no notebook nbformat says anything
        reason = str(error).partition("\n")[0]
        raise DataError(f"{file}: not a notebook that can be read ({reason}).") from None


def definitions(sources: list[str]) -> list[str]:
    """Every import, function, class and assignment of a constant at the top of the cells.

    Lines of IPython (magics, shell commands) are left out; a cell that cannot be parsed is, too.
    """
    found = []
    for source in sources:
        plain = "\n".join(
            "" if line.lstrip().startswith(("%", "!")) else line for line in source.splitlines()
        )
        try:
            tree = ast.parse(plain)
        except (SyntaxError, ValueError):  # a null byte, before Python 3.12
            continue
        found += [ast.unparse(node) for node in tree.body if isinstance(node, KEPT)
                  or (isinstance(node, ASSIGNED) and _constant(node.value))]  # fmt: skip
    return found


def _constant(node: ast.expr | None) -> bool:
    """True for a literal: nothing is computed to have it."""
    if node is None:  # `size: int`
        return False
    try:
        ast.literal_eval(node)
    except (ValueError, TypeError, SyntaxError):
        return False
    return True


def namespace(statements: list[str]) -> dict[str, Any]:
    """Run definitions one by one; one that fails costs only what it defines."""
    out: dict[str, Any] = {"__name__": "notebook"}
    for text in statements:
        try:
            exec(compile(text, "<notebook>", "exec"), out)
        except (Exception, SystemExit):  # noqa: BLE001 - any mistake of a student's
            continue
    return out
