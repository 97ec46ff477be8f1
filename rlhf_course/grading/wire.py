"""What crosses between referee and player: tensors, numbers, strings, and what is made of them.

A message is a tree of plain values. Its tensors travel as safetensors, the rest as JSON in their
metadata; nothing is unpickled. Both sides bound what they read: its size, and on the referee's side
the time it takes.
"""

from __future__ import annotations

import json
import os
import select
import struct
import time
from functools import lru_cache
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

LARGEST = 64 << 20
"""Bytes of one message."""
LARGEST_HEADER = 2 << 20
"""Bytes of what a message holds beside its tensors' numbers; a few of them may make an object."""
DTYPES = (
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64,
    torch.float16, torch.bfloat16, torch.float32, torch.float64,
)  # fmt: skip
HEAD = struct.Struct("<Q")


UNREADABLE = (
    ValueError, LookupError, TypeError, RuntimeError, MemoryError, SafetensorError, struct.error,
)  # fmt: skip
"""What reading damaged bytes raises; RuntimeError of torch, for a size beyond all numbers."""


class WireError(Exception):
    """What came is no message: too large, damaged, or cut off."""


class Closed(WireError):
    """The other side is gone."""


class Late(WireError):
    """The deadline has passed."""


# ------------------------------------------------------------------------------------------- trees


def encode(value: Any) -> bytes:
    """A tree of plain values as bytes; for what cannot cross stands the name of its type."""
    tensors: dict[str, Tensor] = {}
    tree = _flatten(value, tensors)
    return save(tensors, {"tree": json.dumps(tree)})


def _flatten(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        if value.dtype not in DTYPES or value.layout != torch.strided:
            return {"other": "Tensor"}
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"tensor": key, "grad": bool(value.requires_grad)}
    if value is None or isinstance(value, (bool, str)):
        return value
    if isinstance(value, int):
        return int(value) if abs(int(value)) < 1 << 63 else {"other": "int"}
    if isinstance(value, float):
        return float(value)
    if isinstance(value, dict):
        pairs = [[_flatten(k, tensors), _flatten(v, tensors)] for k, v in value.items()]
        return {"dict": pairs}
    if isinstance(value, (tuple, list)):
        kind = "tuple" if isinstance(value, tuple) else "list"
        return {kind: [_flatten(item, tensors) for item in value]}
    return {"other": type(value).__name__[:60]}


def decode(data: bytes, largest_header: int = LARGEST_HEADER) -> Any:
    """The tree that `encode` made. Raises WireError for bytes it did not make.

    largest_header: bytes of what is no tensor. Parsing costs many times that in memory and time.
    """
    try:
        size = HEAD.unpack_from(data)[0]  # safetensors begins with the length of its own header
        if size > largest_header:
            raise ValueError("too much of it")
        head = json.loads(data[HEAD.size : HEAD.size + size])
        return _rebuild(json.loads(head["__metadata__"]["tree"]), load(data))
    except UNREADABLE as bad:
        raise WireError(f"not a message: {type(bad).__name__}") from None


def _rebuild(tree: Any, tensors: dict[str, Tensor]) -> Any:
    if not isinstance(tree, dict):
        if isinstance(tree, list):
            raise ValueError("a bare list")
        if isinstance(tree, int) and abs(tree) >= 1 << 63:
            raise ValueError("a number that `encode` would not have sent")
        return tree
    if "tensor" in tree:
        tensor = tensors[tree["tensor"]]
        if tensor.dtype not in DTYPES:
            raise ValueError("a tensor that `encode` would not have sent")
        return tensor.requires_grad_() if tree["grad"] is True and _smooth(tensor) else tensor
    if "tuple" in tree:
        return tuple(_rebuild(item, tensors) for item in tree["tuple"])
    if "list" in tree:
        return [_rebuild(item, tensors) for item in tree["list"]]
    if "dict" in tree:
        return {_rebuild(k, tensors): _rebuild(v, tensors) for k, v in tree["dict"]}
    return stand_in(tree["other"])


def _smooth(tensor: Tensor) -> bool:
    return tensor.is_floating_point()


def stand_in(name: str) -> Any:
    """In place of what cannot cross: an object that is nothing but an instance of a type so named,
    so that "a tensor, not ndarray" can be said of it."""
    return _type_of_name(str(name)[:60] or "object")()


@lru_cache(maxsize=1000)
def _type_of_name(name: str) -> type:
    return type(name, (), {})


# ---------------------------------------------------------------------------------------- messages


def send(fd: int, data: bytes, deadline: float | None = None) -> None:
    """Write one message. Raises Closed, Late."""
    rest = memoryview(HEAD.pack(len(data)) + data)
    while rest:
        _wait(fd, deadline, to_write=True)
        try:
            rest = rest[os.write(fd, rest[:65536]) :]
        except BlockingIOError:  # full again since
            continue
        except OSError as error:
            raise Closed("the other side is gone") from error


def receive(fd: int, deadline: float | None = None, largest: int = LARGEST) -> bytes:
    """Read one message. Raises Closed, Late, or WireError for one that is too large."""
    (size,) = HEAD.unpack(_read(fd, HEAD.size, deadline))
    if size > largest:
        raise WireError(f"a message of {size} bytes, more than {largest}")
    return _read(fd, size, deadline)


def _read(fd: int, size: int, deadline: float | None) -> bytes:
    found = bytearray()
    while len(found) < size:
        _wait(fd, deadline)
        try:
            part = os.read(fd, min(size - len(found), 1 << 20))
        except BlockingIOError:
            continue
        except OSError as error:
            raise Closed("the other side is gone") from error
        if not part:
            raise Closed("the other side is gone")
        found += part
    return bytes(found)


def _wait(fd: int, deadline: float | None, to_write: bool = False) -> None:
    """Return when `fd` can be used; Late after the deadline, a time of time.monotonic."""
    if deadline is None:
        return
    poll = select.poll()
    poll.register(fd, select.POLLOUT if to_write else select.POLLIN)
    if not poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
        raise Late("no answer in time")
