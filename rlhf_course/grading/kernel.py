"""Calls of Linux that Python has no name for; a refusal is an OSError."""

from __future__ import annotations

import ctypes
import functools
import os
import sys


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)  # None: what this process has loaded already


def call(name: str, *arguments: int | ctypes.Array | ctypes.Structure) -> int:
    """Call the C library's function `name`; a structure or an array is passed by its address.

    Returns what it returns. Raises OSError when that is -1, where there is no such function, and
    on other systems than Linux, whose calls have other numbers.
    """
    if sys.platform != "linux":
        raise OSError(f"{name}() is asked for as Linux knows it")
    passed = [ctypes.c_long(a) if isinstance(a, int) else ctypes.byref(a) for a in arguments]
    try:
        result = getattr(_libc(), name)(*passed)
    except AttributeError:
        raise OSError(f"this system has no {name}()") from None
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number), name)
    return result
