"""A fingerprint of a student's functions, the same in another session.

An interrupted run is gone on with only by the functions that began it.
"""

from __future__ import annotations

import hashlib
import uuid
from collections.abc import Iterator, Sequence
from types import CodeType, FunctionType, ModuleType
from typing import Any

PLAIN = (bool, int, float, complex, str, bytes, type(None), type(...))
"""Values that are told by how they are written."""
WRAPPED = {staticmethod: "__func__", classmethod: "__func__", property: "fget"}


def fingerprint(own: Sequence[Any]) -> str:
    """What tells these functions and classes from others; "" for none.

    It is made of their compiled code and of everything in their notebook that they name: other
    functions, constants. What cannot be told by a text, as a tensor or a list that some cell has
    filled, is another one each time, and so are compiled programs of another Python.
    """
    told = [text for answer in own for text in _texts(answer, answer.__module__, [])]
    return hashlib.sha256("\n".join(told).encode()).hexdigest() if own else ""


def _texts(value: Any, home: str, seen: list[Any]) -> Iterator[str]:
    """The texts of a value and of what it names. home: the module that is the notebook."""
    if isinstance(value, PLAIN):
        yield repr(value)
    elif isinstance(value, tuple):
        yield f"{len(value)} of"
        for part in value:
            yield from _texts(part, home, seen)
    elif type(value) in WRAPPED:
        yield type(value).__name__
        yield from _texts(getattr(value, WRAPPED[type(value)]), home, seen)
    elif isinstance(value, ModuleType):
        yield value.__name__
    elif not callable(value):
        yield uuid.uuid4().hex
    else:
        yield f"{getattr(value, '__module__', '')}.{getattr(value, '__qualname__', '')}"
        if getattr(value, "__module__", None) != home or any(value is other for other in seen):
            return
        seen.append(value)
        if isinstance(value, type):
            yield from _texts_of_class(value, home, seen)
        elif isinstance(value, FunctionType):
            yield from _texts_of_function(value, home, seen)
        else:  # an object that can be called
            yield uuid.uuid4().hex


def _texts_of_class(value: type, home: str, seen: list[Any]) -> Iterator[str]:
    yield from _texts(value.__bases__, home, seen)
    for name, part in vars(value).items():
        if not name.startswith("__") or isinstance(part, (FunctionType, *WRAPPED)):
            yield name
            yield from _texts(part, home, seen)


def _texts_of_function(value: FunctionType, home: str, seen: list[Any]) -> Iterator[str]:
    codes = list(_codes(value.__code__))
    for code in codes:
        constants = [c for c in code.co_consts if not isinstance(c, CodeType)]
        constants = [sorted(map(repr, c)) if isinstance(c, frozenset) else c for c in constants]
        yield f"{code.co_code.hex()} {constants} {code.co_names} {code.co_varnames}"
    yield from _texts(value.__defaults__ or (), home, seen)
    yield from _texts(tuple(sorted((value.__kwdefaults__ or {}).items())), home, seen)
    for cell in value.__closure__ or ():
        yield from _texts(cell.cell_contents, home, seen)
    for name in sorted({name for code in codes for name in code.co_names}):
        if name in value.__globals__:
            yield name
            yield from _texts(value.__globals__[name], home, seen)


def _codes(code: CodeType) -> Iterator[CodeType]:
    """A function's code and that of the functions and comprehensions inside."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _codes(constant)
