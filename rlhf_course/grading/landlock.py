"""Landlock: a Linux process gives up the file system, but for the paths that it names.

    version = landlock.restrict(["/usr/lib/python3.12"])

It needs no privilege, holds for every thread and child made later, and cannot be taken back. What
it can forbid grew over the years, so the kernel is asked first for its version:
https://docs.kernel.org/userspace-api/landlock.html
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
from collections.abc import Iterable

from rlhf_course.grading.kernel import call

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # the same on all processors
ASK_VERSION = 1
PATH_BENEATH = 1

WRITE_FILE, READ_FILE, READ_FOLDER = 1 << 1, 1 << 2, 1 << 3
TRUNCATE = 1 << 14
# The bits in order: execute, write, read, list, nine ways to make or remove an entry; move one to
# another folder, truncate a file, command a device.
FILE_RIGHTS = {1: 13, 2: 14, 3: 15, 4: 15}  # version: how many of the bits it knows
ALL_FILE_RIGHTS = 16
TCP = 0b11  # bind, connect; from version 4
SCOPES = 0b11  # abstract sockets of, and signals to, a process outside; from version 6


class _Ruleset(ctypes.Structure):
    """What is forbidden unless a rule allows it."""

    _fields_ = (("files", ctypes.c_uint64), ("tcp", ctypes.c_uint64), ("scopes", ctypes.c_uint64))


class _Rule(ctypes.Structure):
    """The rights in one file, or in a folder and all that is below it."""

    _pack_ = 1
    _fields_ = (("rights", ctypes.c_uint64), ("file", ctypes.c_int32))


def version() -> int:
    """What this kernel's Landlock can do, as a number; 0 where there is none."""
    try:
        return call("syscall", CREATE_RULESET, 0, 0, ASK_VERSION)
    except OSError:
        return 0


def restrict(readable: Iterable[str]) -> int:
    """From now on this thread reads only below `readable`, and writes to nothing but /dev/null.

    No program can be started, no TCP port opened, nobody outside signalled, as far as the kernel's
    version goes, which is returned. What is open already stays open. A path that is not there is
    passed over. Raises OSError where the kernel refuses; `no_new_privs` must have been set.
    """
    known = version()
    if not known:
        raise OSError("this kernel has no Landlock")
    files = (1 << FILE_RIGHTS.get(known, ALL_FILE_RIGHTS)) - 1
    rules = _Ruleset(files, TCP if known >= 4 else 0, SCOPES if known >= 6 else 0)
    size = 8 if known < 4 else 16 if known < 6 else 24  # older kernels know a shorter structure
    ruleset = call("syscall", CREATE_RULESET, rules, size, 0)
    try:
        for path in readable:
            _allow(ruleset, path, READ_FILE | READ_FOLDER)
        _allow(ruleset, os.devnull, (READ_FILE | WRITE_FILE | TRUNCATE) & files)
        call("syscall", RESTRICT_SELF, ruleset, 0)
    finally:
        os.close(ruleset)
    return known


def _allow(ruleset: int, path: str, rights: int) -> None:
    with contextlib.suppress(FileNotFoundError, PermissionError):
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        try:
            if not stat.S_ISDIR(os.fstat(file).st_mode):
                rights &= ~READ_FOLDER  # refused for a file
            call("syscall", ADD_RULE, ruleset, PATH_BENEATH, _Rule(rights, file), 0)
        finally:
            os.close(file)
