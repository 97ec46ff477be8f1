"""Files that are written whole or not at all, whatever happens meanwhile.

A file or folder is made under a temporary name beside its place and then renamed. A process that
is killed leaves at most such a temporary name (`LEFTOVER`) behind.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from rlhf_course.errors import CheckpointError

LEFTOVER = re.compile(r"\..+\.(part|old)-\d+")  # the names that `replacing` makes


@contextlib.contextmanager
def writing(path: Path) -> Iterator[None]:
    """A full disk or a missing permission becomes a CheckpointError that names `path`."""
    try:
        yield
    except Exception as error:
        # safetensors wraps the system's errors, tokenizers raises a bare "… (os error 28)"
        if not isinstance(error, OSError | SafetensorError) and "(os error" not in str(error):
            raise
        reason = getattr(error, "strerror", None) or error
        raise CheckpointError(
            f"cannot write {path}: {reason}. Free some space or choose another folder with --out; "
            "what was complete before is untouched."
        ) from error


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there and can be removed."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Write to a temporary sibling of `path`, which takes its place when the block succeeds.

    Whatever is raised inside, `path` is as before; CheckpointError when it cannot be written.
    """
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    old = path.with_name(f".{path.name}.old-{os.getpid()}")
    remove(part)  # left by a process that was killed, and had our number
    try:
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            yield part
            if not path.is_dir():
                os.replace(part, path)
                return
            os.rename(path, old)  # a directory cannot be renamed over another
            try:
                os.rename(part, path)
            except OSError:
                os.rename(old, path)
                raise
    finally:
        remove(part)
        if path.exists():
            remove(old)


def write_json(path: Path, content: Any) -> None:
    """Write JSON atomically."""
    with replacing(path) as part:
        part.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON; a damaged file is a CheckpointError."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path}: cannot be read ({error}). Remove it and run again."
        ) from None


def require_writable(folder: Path) -> None:
    """Raise CheckpointError unless `folder`, or the nearest one above it that is there, can be
    written to; asked before hours are spent on what is to be saved."""
    try:
        there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
        good = there.is_dir() and os.access(there, os.W_OK | os.X_OK)
    except PermissionError:  # not even to be looked into
        there, good = folder, False
    if not good:
        raise CheckpointError(
            f"cannot write {folder}: {there} is no folder that may be written to. "
            "Choose another folder with --out."
        )
