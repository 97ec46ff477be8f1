"""The code cells of a notebook or a .py file, as Python that can be parsed.

Notebooks are read as the JSON that they are, so that one without ids or metadata, of format 2, 3 or
4, from Colab or VS Code, or written by hand will do. A .py file is cut where jupytext and VS Code
("# %%") or nbconvert ("# In[3]:") mark a cell.

Standard library only: the bytes are a stranger's, and are read where nothing else is at hand.
"""

from __future__ import annotations

import ast
import codecs
import json
import re
import warnings
from importlib.util import decode_source
from typing import Any

from rlhf_course.errors import DataError

UNPARSED = (SyntaxError, ValueError, RecursionError, MemoryError)
"""What `ast.parse` raises: ValueError for a null byte, the last two for what is nested too deep."""

MARK = re.compile(r"# ?%%(?P<title>[ \[].*)?\s*$|# ?In ?\[[ \d]*\]:?\s*$")
PROSE = re.compile(r".*\[(markdown|md|raw)\]")

# What IPython reads otherwise than Python, where a statement begins.
IPYTHON = re.compile(
    r"""\s*(?:
        [%!?]                                           # %matplotlib inline, !ls, ?help
        | [A-Za-z_][\w., ]*=\s*[%!]                     # files = !ls
        | [\w.*]+\?{1,2}\s*(?:\#.*)?$                   # help?
    )""",
    re.VERBOSE,
)
# Cells of these magics define nothing in the notebook: they are not Python, or run elsewhere.
ELSEWHERE = {
    "!", "R", "HTML", "SVG", "bash", "cmd", "cython", "file", "html", "javascript", "js", "latex",
    "markdown", "perl", "pypy", "python", "python2", "python3", "ruby", "script", "sh", "sql",
    "svg", "sx", "system", "timeit", "writefile",
}  # fmt: skip

TOKEN = re.compile(r"""\#.*|\"{3}|'{3}|"(?:\\.|[^"\\])*"?|'(?:\\.|[^'\\])*'?|[()\[\]{}]""")
CLOSE = {mark: re.compile(rf"(?:\\.|[^\\])*?{mark}") for mark in ('"""', "'''")}

# Where a statement at the top of a file is likely to begin.
BEGINS = re.compile(r"(?:def|class|async|import|from|if|try|with|for|while)\b|@|[A-Za-z_][\w.]*\W")


def cells_of(data: bytes, suffix: str) -> list[str | None]:
    """The source of every cell of a file, None for one that is no code.

    suffix: ".py" for a Python file, which is one cell where it marks none. A notebook is recognised
    under that name, too. Raises DataError, without the file's name, for what is neither.
    """
    try:
        if suffix.lower() != ".py":
            return _notebook(json.loads(data))
        if data.lstrip().startswith(b"{"):  # renamed
            try:
                return _notebook(json.loads(data))
            except ValueError:
                pass
        return _pieces(_text(data))
    except RecursionError:
        reason = "it is nested too deeply"
    except MemoryError:
        reason = "it is too large"
    except (ValueError, SyntaxError, LookupError) as error:  # the last two of `coding: nonsense`
        reason = str(error).partition("\n")[0]
    kind = "Python file" if suffix.lower() == ".py" else "notebook"
    raise DataError(f"not a {kind} that can be read ({reason}).")


def fault(data: bytes, suffix: str) -> SyntaxError | None:
    """The first mistake of a .py file without cells, of which `cells_of` leaves out only the
    stretch where it stands; None for any other file."""
    if suffix.lower() != ".py" or any(map(MARK.match, (lines := _text(data).split("\n")))):
        return None
    try:
        parse("\n".join(lines))
    except SyntaxError as error:
        return error
    return None


def _notebook(whole: Any) -> list[str | None]:
    """The cells of a notebook's JSON; before format 4 they stand in worksheets."""
    sheets = whole.get("worksheets") if isinstance(whole, dict) else None
    sheets = sheets if isinstance(sheets, list) else [whole]
    held = [sheet.get("cells") for sheet in sheets if isinstance(sheet, dict)]
    if not held or not all(isinstance(cells, list) for cells in held):
        raise ValueError("it has no list of cells")
    return [_source(cell) for cells in held for cell in cells]


def _source(cell: Any) -> str | None:
    if not isinstance(cell, dict) or cell.get("cell_type") != "code":
        return None
    source = cell.get("source", cell.get("input", ""))
    if not isinstance(source, list):
        return source if isinstance(source, str) else ""
    lines = [line for line in source if isinstance(line, str)]
    ended = any(line.endswith("\n") for line in lines)  # written by hand, they may lack their ends
    return ("" if ended else "\n").join(lines)


def _text(data: bytes) -> str:
    """A Python file's text, also with the marks that Windows puts in front."""
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        return data.decode("utf-16")
    return decode_source(data)  # heeds `coding: latin-1`


def _pieces(text: str) -> list[str | None]:
    """A Python file cut at its marks, which are left out; what is before the first counts if it
    holds more than comments."""
    cells: list[str | None] = []
    current: list[str] = []
    prose, marked = False, False
    for line in [*text.split("\n"), None]:
        mark = MARK.match(line) if line is not None else None
        if line is not None and mark is None:
            current.append(line)
            continue
        if marked or any(x.strip() and not x.startswith("#") for x in current):
            cells.append(None if prose else "\n".join(current))
        prose, marked = bool(mark and mark["title"] and PROSE.match(mark["title"])), True
        current = []
    return cells if len(cells) > 1 else [_salvaged(cell) for cell in cells]


def _salvaged(text: str | None) -> str | None:
    """A file without cells, the parts that are not Python blanked, so that they cost no others."""
    if text is None:
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            parse(text)
            return text
        except UNPARSED:
            pass
        parts: list[list[str]] = [[]]
        for line in text.split("\n"):
            after_decorator = parts[-1] and parts[-1][-1].startswith("@")
            if BEGINS.match(line) and not after_decorator:
                parts.append([])
            parts[-1].append(line)
        for part in parts:
            try:
                parse("\n".join(part))
            except UNPARSED:
                part[:] = [""] * len(part)
    return "\n".join(line for part in parts for line in part)


# -------------------------------------------------------------------------------------- IPython


def parse(source: str) -> tuple[str, ast.Module]:
    """A cell's Python text and its tree. Raises one of UNPARSED where it is no Python.

    Only what does not parse as it stands is searched for lines of IPython, so that a line of a
    string or an expression that begins with % stays what it is. The text keeps its lines.
    """
    source = source.replace("\r\n", "\n").replace("\r", "\n")
    try:
        return source, ast.parse(source)
    except SyntaxError:
        plain = without_ipython(source)
        if plain == source:
            raise
    return plain, ast.parse(plain)


def without_ipython(source: str) -> str:
    """The cell with `pass` for every magic, shell line and question, and without the indentation
    that its first line has; empty where a cell magic says that it is no Python of this notebook."""
    lines = _dedented(source.split("\n"))
    for i, line in enumerate(lines):  # cell magics come first, maybe several
        if line.startswith("%%"):
            if (line[2:].split() or [""])[0] in ELSEWHERE:
                return "\n" * (len(lines) - 1)
            lines[i] = ""
        elif line.strip() and not line.startswith("#"):
            break
    out: list[str] = []
    quote, depth, joined, magic = "", 0, False, False
    for line in lines:
        if magic:  # the line before it ended in a backslash
            out.append("")
        elif not (quote or depth or joined) and IPYTHON.match(line):
            out.append(line[: len(line) - len(line.lstrip())] + "pass")
            magic = True
        else:
            out.append(line)
            quote, depth, joined = _after(line, quote, depth)
        magic = magic and line.endswith("\\")
    return "\n".join(out)


def _dedented(lines: list[str]) -> list[str]:
    first = next((line for line in lines if line.strip()), "")
    indent = first[: len(first) - len(first.lstrip())]
    return [line[len(indent) :] if line.startswith(indent) else line for line in lines]


def _after(line: str, quote: str, depth: int) -> tuple[str, int, bool]:
    """What is open behind a line: a triple quote, so many brackets, a backslash."""
    at, comment = 0, False
    while at < len(line):
        found = (CLOSE[quote] if quote else TOKEN).search(line, at)
        if found is None:
            break
        at, token = found.end(), found.group()
        if quote:
            quote = ""
        elif token in CLOSE:
            quote = token
        elif token in "([{":
            depth += 1
        elif token in ")]}":
            depth = max(depth - 1, 0)
        else:
            comment = token.startswith("#")
    return quote, depth, line.endswith("\\") and not comment
