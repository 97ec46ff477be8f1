"""The bank of hostile and broken submissions: each with what it tries and the score it deserves.

All of them answer `reward_model.pairwise_loss`, worth 3 points: a wrong answer deserves none of
them whatever it does besides, a right one all of them although it makes noise. The sources are
strings, written to a folder by the test; nothing of them runs outside of a player.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from rlhf_course.coursework import source
from rlhf_course.coursework.exercises import find

EXERCISE = find("reward_model.pairwise_loss")
FULL = float(EXERCISE.points)
NO_GRADIENT = 2.25
"""For the right value with a wrong gradient: 6 of 8 properties."""
FILE = "03_reward_model.py"

MARK = f"hostile-{os.getpid()}"
"""In the name of every file that an attack leaves, and of its processes and threads, which is cut
after 15 letters: so each run of the tests finds its own."""
SLEEP = f"98765.{os.getpid()}"
"""Seconds that a program started by an attack would sleep: so it is found again."""

HEAD = "def pairwise_loss(chosen, rejected, margin=None, denominator=None):\n"
MODULES = """\
import atexit, builtins, contextlib, ctypes, faulthandler, functools, gc, glob, importlib, inspect
import itertools, json, math, mmap, multiprocessing, os, pickle, random, resource, shutil, signal
import socket, stat, struct, subprocess, sys, tempfile, threading, time, types, urllib.request
import weakref
import torch
import torch.nn.functional as F
from torch import Tensor
"""
SOLUTION = f"{source.imports([EXERCISE.id], also=['torch'])}\n\n{source.solved(EXERCISE.id)}\n"
RIGHT = SOLUTION.replace("def pairwise_loss(", "def right(")
WRONG = "return torch.tensor(12345.0)"


@dataclass(frozen=True)
class Hostile:
    """One submission."""

    name: str
    tries: str
    """In words."""
    files: dict[str, str | bytes] = field(default_factory=dict, repr=False)
    """By their names below the submission's folder."""
    score: float = 0.0
    """What it deserves."""
    status: str = ""
    """What it must be called; "" where it does not matter."""
    hangs: bool = False
    """It ends with the patience of the referee, which is made short for it."""
    caged: bool = False
    """Only a system that grants every layer of the sandbox withstands it."""
    make: Callable[[Path], None] | None = None
    """Adds to the folder what is no regular file."""
    folder: str = ""
    """The submission's own name, if it matters."""


def wrong(name: str, tries: str, body: str, before: str = "", **more) -> Hostile:
    """A submission that does `body`, and answers 12345."""
    text = f"{MODULES}\n{dedent(before)}\n\n{HEAD}{indent(body)}\n    {WRONG}\n"
    return Hostile(name, tries, {FILE: text}, **more)


def noisy(name: str, tries: str, body: str, before: str = "", **more) -> Hostile:
    """A submission that does `body`, and answers what is right."""
    last = "return right(chosen, rejected, margin, denominator)"
    text = f"{MODULES}\n{RIGHT}\n{dedent(before)}\n\n{HEAD}{indent(body)}\n    {last}\n"
    return Hostile(name, tries, {FILE: text}, **{"score": FULL, "status": "right"} | more)


def dedent(text: str) -> str:
    return textwrap.dedent(text).strip("\n")


def indent(text: str) -> str:
    return textwrap.indent(dedent(text) or "pass", "    ")


def bank() -> list[Hostile]:
    """All of them."""
    from hostile import folders, forging, lies, processes, routes

    parts = (processes, lies, forging, routes, folders)
    return [hostile for part in parts for hostile in part.SUBMISSIONS]
