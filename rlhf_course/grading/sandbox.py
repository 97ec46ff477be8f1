"""The player's cage: what a stranger's code may do to the machine that grades it.

    isolate_network()                      # once, in the fork server, before torch is imported
    readable = readable_paths(hidden)      # once
    ... fork ...
    layers = confine(Limits(), readable)   # in each child; cannot be undone

The layers overlap on purpose, since hardly any system grants all of them: a container may forbid
namespaces, an old kernel has no Landlock, an ordinary user cannot change who it is. A layer that
is refused is left out of the list that `confine` returns, and is never an error.

| layer           | keeps the player from                                                        |
| limits          | using up processor time, memory, disk, files and threads                     |
| user nobody     | whatever other users' files and processes do not grant to everybody          |
| capabilities    | what only an administrator may do                                            |
| no_new_privs    | getting rights back through a setuid program                                 |
| Landlock        | reading anything but Python, writing, TCP, signals to others                 |
| seccomp         | new processes, programs, sockets, signals, writing; rare calls of the kernel |
| network         | reaching anybody, were it to get a socket                                    |

macOS has only the limits. Nothing but Python's standard library is needed here. Where reading is
all that keeps a player from the solutions (the same user, no Landlock), only they being elsewhere
can hide them.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import stat
import sys
import sysconfig
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from rlhf_course.grading import landlock, seccomp
from rlhf_course.grading.kernel import call

try:
    import resource
except ImportError:  # Windows, where there is no fork either
    resource = None

NOBODY = 65534
# From <linux/prctl.h>, <linux/capability.h> and <linux/sched.h>
PR_SET_KEEPCAPS, PR_SET_NO_NEW_PRIVS = 8, 38
CAPABILITIES_VERSION_3 = 0x20080522
CAP_READ, CAP_SETGID, CAP_SETUID = 1 << 2, 1 << 6, 1 << 7  # READ: "DAC_READ_SEARCH"
CLONE_NEWUSER, CLONE_NEWNET = 0x10000000, 0x40000000

DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
PROCESSOR = ("/proc/cpuinfo", "/sys/devices/system/cpu")  # torch chooses its kernels by these
LIBRARIES = ("lib", "lib64")


@dataclass(frozen=True)
class Limits:
    """How much of the machine a player may use."""

    cpu_seconds: int = 70
    """Of all its threads together; then it is killed."""
    memory: int = 2 << 30
    """Bytes of address space on top of what is mapped when it is confined (torch maps a lot)."""
    open_files: int = 64
    threads: int = 64
    """On top of the threads that the whole system has then; never fewer than these."""


def confine(limits: Limits, readable: Sequence[str]) -> list[str]:
    """Give up all rights that an answer does not need. Call it in a child with a single thread.

    readable: the files and folders that may be read, below which everything may be.
    Returns the layers in force, in words for the result file.
    """
    # Nothing may be imported from here on: the files may be out of reach already.
    _offer_to_the_oom_killer()
    steps: list[Callable[[], str]] = [
        lambda: _lose_privileges(readable),
        lambda: _set_limits(limits),
        _no_new_privileges,
        lambda: f"Landlock {landlock.restrict(readable)}",
    ]
    layers = [_tried(step) for step in steps]
    # Landlock knows /dev/null by its name; without it no file may be opened to be written.
    landlocked = layers[-1] != ""
    layers.append(_tried(lambda: _filter(writing=landlocked)))
    return [name for name in layers if name]


def _tried(step: Callable[[], str]) -> str:
    """What a step says; nothing where the system refuses it."""
    try:
        return step()
    except OSError:
        return ""


def isolate_network() -> str | None:
    """Move this process into a network of its own, without any device but a dead loopback.

    An ordinary user may do that only inside a "user namespace", where the system permits those.
    Call it before there are threads. Returns the layer's name, or None where it is refused.
    """
    if sys.platform != "linux":
        return None
    user, group = os.getuid(), os.getgid()
    try:
        if user == 0:
            call("unshare", CLONE_NEWNET)
        else:
            call("unshare", CLONE_NEWUSER | CLONE_NEWNET)
            # Keep one's name in there; the kernel wants the middle line before the last.
            _write("/proc/self/uid_map", f"{user} {user} 1")
            _write("/proc/self/setgroups", "deny")
            _write("/proc/self/gid_map", f"{group} {group} 1")
    except OSError:
        return None
    return "a network of its own"


# ------------------------------------------------------------------------ the layers of `confine`


def _offer_to_the_oom_killer() -> None:
    """When the machine's memory runs short, the kernel shall end the player, not the referee."""
    _write("/proc/self/oom_score_adj", "1000")


def _lose_privileges(readable: Sequence[str]) -> str:
    """Root becomes nobody; and whoever had capabilities, if only in a namespace, has none left."""
    if os.getuid() == 0:
        with contextlib.suppress(OSError):
            return _become_nobody(readable)
    _set_capabilities(0)
    return "no capabilities"


def _become_nobody(readable: Sequence[str]) -> str:
    """Root becomes a user to whom nothing belongs.

    Where Python's own files are private to somebody (a pyenv in /root), the right to read is taken
    along: without it a late `import` would fail in a right answer, and root had it before.
    Raises OSError, and changes nothing, where one of the rights that this takes is missing.
    """
    kept = 0 if open_to_all(readable) else CAP_READ
    _set_capabilities(CAP_SETGID | CAP_SETUID | kept)  # refused where one of them is missing
    call("prctl", PR_SET_KEEPCAPS, 1, 0, 0, 0)
    os.setgroups([])
    os.setresgid(NOBODY, NOBODY, NOBODY)
    os.setresuid(NOBODY, NOBODY, NOBODY)
    _set_capabilities(kept)
    return "user nobody, who may read" if kept else "user nobody"


def open_to_all(paths: Iterable[str]) -> bool:
    """Whether every user may read these files and list these folders."""
    needed, folders = {}, set()
    for path in paths:
        needed[path] = stat.S_IROTH
        while (path := os.path.dirname(path)) not in folders:
            folders.add(path)
    needed.update(dict.fromkeys(folders, 0))
    try:
        for path, bits in needed.items():
            mode = os.stat(path).st_mode
            if stat.S_ISDIR(mode):
                bits |= stat.S_IXOTH
            if mode & bits != bits:
                return False
    except OSError:
        return False
    return True


def _set_capabilities(kept: int) -> None:
    """Have these capabilities, a set of bits, in force and in reserve, and never more than these.

    Raises OSError where one of them was not held.
    """
    # For each half of 64 bits: those in force, those in reserve, those that a program inherits.
    header = (ctypes.c_uint32 * 2)(CAPABILITIES_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)(kept, kept, 0, 0, 0, 0)
    call("capset", header, sets)


def _set_limits(limits: Limits) -> str:
    """The system's own limits. Hard ones, so that the player cannot raise them again."""
    wanted = {
        "CPU time": ("RLIMIT_CPU", limits.cpu_seconds),
        "file size": ("RLIMIT_FSIZE", 0),  # no byte more in any file, whoever opened it
        "open files": ("RLIMIT_NOFILE", limits.open_files),
        "core dumps": ("RLIMIT_CORE", 0),
    }
    # What this process has mapped, and how many threads the system runs. The number of threads is
    # limited for all processes of a user together, which are at most all that there are; root's
    # is not limited at all.
    mapped, tasks = _read("/proc/self/statm"), _read("/proc/loadavg")
    if mapped:
        size = int(mapped.split()[0]) * resource.getpagesize()
        wanted["memory"] = ("RLIMIT_AS", size + limits.memory)
    if tasks and os.getuid() != 0:
        wanted["threads"] = ("RLIMIT_NPROC", int(tasks.split()[3].split("/")[1]) + limits.threads)
    held = [name for name, (limit, value) in wanted.items() if _limited(limit, value)]
    return "limits on " + ", ".join(held) if held else ""


def _limited(limit: str, value: int) -> bool:
    """Set one limit, unless a stricter one holds already; whether that could be done."""
    try:
        number = getattr(resource, limit)
        hard = resource.getrlimit(number)[1]
        value = value if hard == resource.RLIM_INFINITY else min(value, hard)
        resource.setrlimit(number, (value, value))
    except (AttributeError, OSError, ValueError):
        return False
    return True


def _no_new_privileges() -> str:
    call("prctl", PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    return "no new privileges"


def _filter(writing: bool) -> str:
    seccomp.install(writing)
    return "seccomp"


# ------------------------------------------------------------------------ what a player may read


def readable_paths(hidden: Sequence[str]) -> list[str]:
    """What Python needs to import its own and installed modules, and to load shared libraries.

    Folders of installed packages are listed entry by entry, without this course and what leads to
    it. hidden: files and folders that must not be read, wherever they are; a folder of Python's
    within a hidden one (an environment in the repository) stays readable. Links are resolved.
    """
    paths = sysconfig.get_paths()
    python = [paths[key] for key in ("stdlib", "platstdlib", "purelib", "platlib")]
    python += [path for path in sys.path if path.endswith("-packages")]
    # An environment's standard library is that of another Python, which has packages of its own.
    python += [os.path.join(paths["stdlib"], name) for name in ("site-packages", "dist-packages")]
    roots = sorted({os.path.realpath(path) for path in python})
    secret = [os.path.realpath(path) for path in hidden] + _leading_to_us(roots)
    found = [path for root in [*roots, *_libraries()] for path in _open_up(root, roots, secret)]
    return list(dict.fromkeys([*found, "/etc/ld.so.cache", *PROCESSOR, *DEVICES]))


def _leading_to_us(folders: Sequence[str]) -> list[str]:
    """Files that are this course, or tell where it is: an "editable" installation's, and *.pth."""
    found = []
    for folder in folders:
        for place in (folder, os.path.join(folder, "__pycache__")):
            for name in _listed(place):
                ours = "rlhf_course" in name.lower().replace("-", "_")
                if ours or name.endswith((".pth", ".egg-link")):
                    found.append(os.path.join(place, name))
    return found


def _libraries() -> list[str]:
    """Where shared libraries are; other Pythons lie there, too, perhaps with this course."""
    tops = ["/", "/usr", "/usr/local", sys.base_prefix, sys.prefix]
    folders = {os.path.realpath(os.path.join(top, name)) for top in tops for name in LIBRARIES}
    return [
        os.path.join(folder, name)
        for folder in sorted(folders)
        for name in _listed(folder)
        if not name.startswith(("python", "pypy"))
    ]


def _open_up(path: str, roots: Sequence[str], secret: Sequence[str]) -> list[str]:
    """[path], or what of it is not secret. Of nested roots and secrets the innermost decides."""
    path = os.path.realpath(path)
    if not os.path.exists(path) or _depth(path, secret) > _depth(path, roots):
        return []
    if not any(_within(other, path) for other in secret):
        return [path]
    if not any(_within(path, root) for root in roots):
        return []  # a link to some folder above a secret one
    entries = [os.path.join(path, name) for name in _listed(path)]
    return [found for entry in entries for found in _open_up(entry, roots, secret)]


def _depth(path: str, folders: Sequence[str]) -> int:
    """The length of the innermost of these folders that holds `path`; 0 if none does."""
    return max((len(folder) for folder in folders if _within(path, folder)), default=0)


def _within(path: str, folder: str) -> bool:
    return path == folder or path.startswith(folder.rstrip("/") + "/")


def _listed(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def _read(path: str) -> str:
    """A file of the kernel's; nothing where there is none."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except OSError:
        return ""


def _write(path: str, text: str) -> None:
    """Tell the kernel something that it may refuse."""
    with contextlib.suppress(OSError), open(path, "w", encoding="utf-8") as file:
        file.write(text)
