"""The referee's side of a player: a subject whose answer lives in another process.

`subject.whiten(x, mask)` asks the player for the value. Where an input requires a gradient, the
result does too, and differentiating it asks the player for the vector-Jacobian product: so the
exercises' tests need not know on which side of the wire the answer lives.
"""

from __future__ import annotations

import builtins
import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from rlhf_course.coursework import bank
from rlhf_course.coursework.exercises import EXERCISES, Exercise, find
from rlhf_course.coursework.expect import tensors_of
from rlhf_course.coursework.subject import Subject, scrambled
from rlhf_course.errors import ConfigError
from rlhf_course.grading import build
from rlhf_course.grading.children import Child, ForkServer, Stopped

LONGEST, MOST_BASES = 300, 30
"""Characters of an error's text, and types that it derives from."""
PARTS = {
    "start": set(), "seed": set(), "call": {"value", "call", "changed"}, "vjp": {"gradients"},
    "drive": {"value"},
}  # fmt: skip
"""What a reply to each request holds."""
OURS = {"ConfigError": ConfigError}
"""The package's own errors that an exercise promises; no other may a player raise on this side."""
PATHS = re.compile(r"(?<![\w)\]])(?:/[\w.+~-]+){2,}/?")
"""What looks like a path of the machine in an error's text; `a / b`, and a/b/c, are divided."""


class RemoteSubject(Subject):
    """One exercise's answer, in a player of its own."""

    def __init__(self, server: ForkServer, exercise: Exercise, statements: Sequence[Sequence]):
        """statements: (text, cell, line, file) of each definition that the answer needs.

        Raises Stopped when they hang or crash, and what the answer's own definition raises.
        """
        super().__init__(exercise, _Function(self, exercise))
        self._player = Child(server, "player")
        try:
            self._player.ask(_task(exercise, statements), reply=False)
            self._request("start")
        except BaseException:
            self._player.end()
            raise

    def _request(self, op: str, **arguments) -> dict:
        reply = self._player.ask({"op": op, "with": arguments})
        if isinstance(reply, dict) and "error" in reply:
            raise _error(reply["error"])
        if not isinstance(reply, dict) or reply.keys() != PARTS[op]:
            raise Stopped("Its result cannot be read.")
        return reply

    def begin(self, seed: int) -> None:
        """A new property: random numbers begin anew, there too."""
        super().begin(seed)
        self._request("seed", seed=scrambled(seed))

    def drive(self, driver: Callable, *args) -> Any:
        """The driver runs beside the answer."""
        reply = self._request(
            "drive", module=driver.__module__, driver=driver.__name__, args=list(args)
        )
        return _map(reply.get("value"), Tensor.detach)

    def end(self) -> None:
        """End the player."""
        self._player.end()


def _task(exercise: Exercise, statements: Sequence[Sequence]) -> dict:
    folder = bank.folder() / "exercises"
    return {
        "name": exercise.name,
        "modules": build.package(exercise),
        "drivers": {f.stem: f.read_text(encoding="utf-8") for f in folder.glob("drivers_*.py")},
        "places": {e.name: f"rlhf_course.{e.module}" for e in EXERCISES},
        "given": [find(id).name for id in sorted(build.given(exercise))],
        "statements": [list(statement) for statement in statements],
    }  # fmt: skip


class _Function:
    """Stands for the answer: called, it asks the player."""

    def __init__(self, subject: RemoteSubject, exercise: Exercise):
        self.subject, self.__name__ = subject, exercise.name
        self.__signature__ = inspect.signature(find(exercise.id).reference())

    def __call__(self, *args, **kwargs) -> Any:
        reply = self.subject._request("call", args=list(args), kwargs=kwargs)
        try:
            _write_back(reply["changed"], args, kwargs)
        except Exception:  # noqa: BLE001 - of what a player may make up, nothing fits
            raise Stopped("Its result cannot be read.") from None
        value = reply["value"]
        leaves = [x for x in tensors_of([args, kwargs]) if x.requires_grad]
        outs = list(tensors_of(value))
        if not leaves or not any(out.requires_grad for out in outs):
            return _map(value, Tensor.detach)
        linked = iter(_Link.apply(self.subject, reply["call"], outs, *leaves))
        return _map(value, lambda _: next(linked))


class _Link(torch.autograd.Function):
    """Results that have been computed elsewhere, tied to the inputs they were computed from."""

    @staticmethod
    def forward(ctx, subject, call, outs, *leaves):
        ctx.subject, ctx.call, ctx.leaves = subject, call, leaves
        ctx.wanted = [out.requires_grad for out in outs]
        plain = tuple(out.detach() for out in outs)
        ctx.mark_non_differentiable(
            *(o for o, wanted in zip(plain, ctx.wanted, strict=True) if not wanted)
        )
        return plain

    @staticmethod
    def backward(ctx, *cotangents):
        asked = [c if wanted else None for c, wanted in zip(cotangents, ctx.wanted, strict=True)]
        reply = ctx.subject._request("vjp", call=ctx.call, cotangents=asked)
        found, shapes = reply["gradients"], [leaf.shape for leaf in ctx.leaves]
        fits = isinstance(found, list) and len(found) == len(shapes) and all(
            x is None or (isinstance(x, Tensor) and x.shape == shape)
            for x, shape in zip(found, shapes, strict=True)
        )  # fmt: skip
        if not fits:
            raise Stopped("Its gradient cannot be read.")
        return None, None, None, *found


def _map(value: Any, change: Callable) -> Any:
    """The tree with every tensor changed, in the order in which they cross."""
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, dict):
        return {key: _map(item, change) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return type(value)(_map(item, change) for item in value)
    return value


def _write_back(changed: dict, args: Sequence, kwargs: dict) -> None:
    """Do to the caller's arguments what the answer did to its own in place."""
    for key, new in changed.items():
        old = kwargs[key] if isinstance(key, str) else args[key]
        if isinstance(old, Tensor):
            with torch.no_grad():
                old.set_(new.detach())
        elif isinstance(old, list):
            old[:] = new
        elif isinstance(old, dict):
            old.clear()
            old.update(new)


def told(text: Any, longest: int = LONGEST) -> str:
    """What a player says, as a student may read it: short, without paths, fit for any file."""
    printable = str(text)[:longest].encode("utf-8", "replace").decode().replace("\0", "?")
    return PATHS.sub("…", printable)


def _error(said: Any) -> BaseException:
    """The error that the answer raised, made anew on this side from its description."""
    try:
        name, *bases = [told(kind, 80) for kind in said["types"][:MOST_BASES]]
        text, where = told(said["text"]), told(said["where"])
    except (KeyError, TypeError, ValueError):
        return Stopped("Its result cannot be read.")
    known = (getattr(builtins, kind, OURS.get(kind)) for kind in (name, *bases))
    base = next((k for k in known if isinstance(k, type) and issubclass(k, Exception)), Exception)
    group = base.__name__ == "ExceptionGroup"  # from Python 3.11
    if group or issubclass(base, (UnicodeError, OSError)):  # these take other arguments
        base = Exception
    error = type(name, (base,), {"__str__": lambda self: text})(text)
    error.where = where
    return error
