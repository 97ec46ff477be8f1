"""Which of the package's functions and classes a notebook's code names, and their text."""

from __future__ import annotations

import ast
from collections.abc import Iterable

from rlhf_course.coursework import source


def texts(cells: Iterable[str]) -> list[str]:
    """The definitions that these cells import or reach through a module, sorted by their names.

    `from rlhf_course.ppo import gae` names one; `from rlhf_course import gpt` names what is used
    as `gpt.Block`. What those call in turn, `check` and `lab` are left out.
    """
    trees = [ast.parse(text) for text in cells]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    named, modules = set(), {}
    for node in nodes:
        if isinstance(node, ast.ImportFrom) and str(node.module).split(".")[0] == source.PACKAGE:
            for alias in node.names:
                if source.exists(f"{node.module}.{alias.name}"):
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
                elif node.module != source.PACKAGE:
                    named.add((node.module, alias.name))
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            place = modules.get(node.value.id)
            if place:
                named.add((place, node.attr))
    return [_text(*pair) for pair in sorted(named)]


def _text(module: str, name: str) -> str:
    """A definition's text, followed through re-exports within the package."""
    written = source.module(module)
    node = written.find(name)
    if isinstance(node, ast.ImportFrom) and node.module.startswith(source.PACKAGE):
        return _text(node.module, name)
    return f"{module}.{name}\n{written.text(node) if node else ''}"
