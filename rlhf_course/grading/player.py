"""A player: the process in which one student's answer to one exercise lives.

Everything here runs beside the student's code, which may change any of it. That does not matter:
the referee believes nothing but the numbers that come back, and compares those itself.
"""

from __future__ import annotations

import linecache
import re
import sys
import traceback
from importlib import import_module
from importlib.abc import Loader, MetaPathFinder
from importlib.util import spec_from_loader
from types import ModuleType, SimpleNamespace
from typing import Any

import torch

from rlhf_course.coursework.expect import changed, own, tensors_of
from rlhf_course.coursework.extract import run
from rlhf_course.grading import wire

PACKAGE, STUDENT = "rlhf_course", "submission"
LONGEST = 300  # characters of an error's text
KEPT = 8  # results whose gradient can still be asked for


class Build(MetaPathFinder, Loader):
    """Imports the package from texts: {dotted name: text}. What is not there does not exist.
    Modules beside the package may be among them."""

    def __init__(self, texts: dict[str, str]):
        self.texts = texts

    def find_spec(self, name: str, path=None, target=None):
        """For the modules that there are texts of; other packages are left to the usual finders."""
        inner = f"{name}.__init__"
        if name not in self.texts and inner not in self.texts:
            if name.partition(".")[0] != PACKAGE:
                return None
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return spec_from_loader(name, self, is_package=inner in self.texts)

    def exec_module(self, module: ModuleType) -> None:
        """Run a module's text."""
        name = module.__name__
        text = self.texts.get(name) or self.texts.get(f"{name}.__init__", "")
        exec(compile(text, f"<{name}>", "exec", dont_inherit=True), vars(module))

    def install(self) -> None:
        """From now on the package is this one, and no other copy of it can be imported."""
        for name in [n for n in sys.modules if n.partition(".")[0] == PACKAGE]:
            del sys.modules[name]
        sys.meta_path.insert(0, self)


class Player:
    """One answer, and what the referee may ask of it."""

    def __init__(self, task: dict):
        """task: `modules` {name: text}, `drivers` {name: text}, `statements` [(text, cell, line,
        file)], `name` of the answer, `places` {exercise's name: its module}, `given` names of
        exercises that the package answers here, unless the statements define them."""
        Build(task["modules"] | task["drivers"]).install()
        self.name, self.places = task["name"], task["places"]
        module = sys.modules[STUDENT] = ModuleType(STUDENT)  # dataclasses look for it there
        self.student: dict[str, Any] = vars(module)
        self.kept: dict[int, tuple[list, list]] = {}
        self.calls = 0
        self.failed: list[tuple[str, BaseException]] = []
        texts = " ".join(text for text, *_ in task["statements"])
        named = set(re.findall(r"\w+", texts)) & set(task["given"])
        self.student.update({name: self._from_package(name) for name in named})
        for text, cell, line, file in task["statements"]:
            self._define(text, f"<{file} cell {cell}>" if cell else f"<{file}>", line)

    def _define(self, text: str, file: str, line: int) -> None:
        """Run one of the student's definitions; one that fails costs only what it defines."""
        try:
            run(text, line, file, self.student)
        except BaseException as error:  # noqa: BLE001 - whatever a student's text may raise
            self.failed.append((text, error))

    def _from_package(self, name: str) -> Any:
        """The package's own answer to another exercise."""
        return getattr(import_module(self.places[name]), name)

    def answer(self) -> Any:
        """The student's function or class. Raises what its definition raised."""
        if self.name not in self.student:
            if self.failed:
                raise self.failed[0][1]
            raise NameError(f"{self.name} is not defined")
        return self.student[self.name]

    def handle(self, request: dict) -> dict:
        """One request's reply; whatever the answer raises becomes a part of it."""
        try:
            return getattr(self, f"on_{request['op']}")(**request.get("with", {}))
        except BaseException as error:  # noqa: BLE001 - SystemExit and KeyboardInterrupt, too
            return {"error": described(error) | self._reason(error)}

    def _reason(self, error: BaseException) -> dict:
        """A better text where a name is missing because its own definition has failed."""
        name = getattr(error, "name", None) if type(error) is NameError else None
        for text, cause in self.failed if name else ():
            if re.search(rf"\b{re.escape(name)}\b", text):
                why = described(cause)
                kind, said, where = why["types"][0], why["text"], why["where"]
                place = f" ({where})" if where else ""
                said = f"{name!r} is missing: its definition fails{place}: {kind}: {said}"
                return {"text": said[:LONGEST]}
        return {}

    def on_start(self) -> dict:
        """Is the answer there?"""
        self.answer()
        return {}

    def on_seed(self, seed: int) -> dict:
        """Random numbers that are drawn without a generator begin anew, with gradients on."""
        torch.set_grad_enabled(True)
        torch.manual_seed(seed)
        return {}

    def on_call(self, args: list, kwargs: dict) -> dict:
        """The answer's result, and those inputs that it has changed in place."""
        before = own(args), own(kwargs)
        value = self.answer()(*args, **kwargs)
        self.calls += 1
        leaves = [x for x in tensors_of([args, kwargs]) if x.requires_grad]
        self.kept[self.calls] = leaves, list(tensors_of(value))
        self.kept.pop(self.calls - KEPT, None)
        others = {}
        if not leaves:  # a leaf cannot be changed
            pairs = list(zip(before[0], args, strict=True))
            others = {i: after for i, (old, after) in enumerate(pairs) if changed(old, after)}
            others |= {k: kwargs[k] for k, old in before[1].items() if changed(old, kwargs[k])}
        return {"value": value, "call": self.calls, "changed": others}

    def on_vjp(self, call: int, cotangents: list) -> dict:
        """The gradients of a call's inputs, given those of its results (None: not wanted)."""
        leaves, outs = self.kept[call]
        pairs = [(o, c) for o, c in zip(outs, cotangents, strict=True) if c is not None]
        found = torch.autograd.grad(
            [o for o, _ in pairs],
            leaves,
            [c for _, c in pairs],
            retain_graph=True,
            allow_unused=True,
        )
        return {"gradients": list(found)}

    def on_drive(self, module: str, driver: str, args: list) -> dict:
        """Run one of the tests' drivers here, on the answer."""
        return {"value": getattr(import_module(module), driver)(_Namespace(self), *args)}


class _Namespace(SimpleNamespace):
    """What a driver sees: the answer under its name, the package's for other exercises."""

    def __init__(self, player: Player):
        super().__init__(_player=player)

    def __getattr__(self, name: str) -> Any:
        player = self._player
        if name == player.name:
            return player.answer()
        return player._from_package(name)


def described(error: BaseException) -> dict:
    """An error in plain words: its type, the types it derives from, its text, where it was."""
    try:
        text = str(error)[:LONGEST]
    except BaseException:  # noqa: BLE001 - a __str__ of the student's
        text = ""
    frames = traceback.extract_tb(error.__traceback__)
    at = [f for f in frames if f.filename.startswith("<") and f.filename in linecache.cache]
    where = f"{at[-1].filename[1:-1]}, line {at[-1].lineno}: {at[-1].line}" if at else ""
    bases = [kind.__name__ for kind in type(error).__mro__]
    return {"types": bases, "text": text, "where": where[:LONGEST]}


def serve(fd: int) -> None:
    """Be a player until the other side hangs up: the task first, then request after request."""
    player = Player(wire.decode(wire.receive(fd), wire.LARGEST))
    while True:
        try:
            request = wire.decode(wire.receive(fd), wire.LARGEST)
        except wire.WireError:
            return
        try:
            data = wire.encode(player.handle(request))
            if len(data) > wire.LARGEST:
                raise ValueError(f"a result of {len(data)} bytes is too large")
        except BaseException as error:  # noqa: BLE001 - a result that cannot be put into bytes
            data = wire.encode({"error": described(error)})
        wire.send(fd, data)
