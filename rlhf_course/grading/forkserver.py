"""The fork server: a process that has imported torch, and forks a confined child for each task.

Importing torch takes seconds, forking a process that has it, milliseconds. The server itself never
runs a student's code and holds no answer. It is told over a socket what to do, and when the referee
is gone it ends, and its children with it.

    fork KIND   with a file descriptor: the child's channel   ->  {"pid": …, "problem": ""}
    end PID     kill the child's whole session                ->  {"status": …}
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import shutil
import signal
import socket
import sys
import tempfile
from collections.abc import Callable

LARGEST_REQUEST = 1000
PR_SET_PDEATHSIG = 1


def main(control: int, folder: str, hidden: list[str], cpu_seconds: int) -> None:
    """Serve the socket of this file descriptor until it is closed.

    folder: removed at the end, since the referee may have been killed; hidden: files and folders
    that no child may read; cpu_seconds: what a child may use of processor time.
    """
    from rlhf_course.grading import sandbox

    network = sandbox.isolate_network()  # while there is one thread only
    serve_child = _preload()
    cage = sandbox.Limits(cpu_seconds), sandbox.readable_paths(hidden), network
    channel = socket.socket(fileno=control)
    children: dict[int, str] = {}
    try:
        while True:
            data, fds, _, _ = socket.recv_fds(channel, LARGEST_REQUEST, 1)
            if not data:
                return
            verb, _, argument = data.decode().partition(" ")
            if verb == "fork":
                reply = _fork(serve_child[argument], fds[0], cage, children)
            else:
                reply = {"status": _end(int(argument), children)}
            channel.sendall(json.dumps(reply).encode())
    finally:
        for pid in list(children):
            _end(pid, children)
        shutil.rmtree(folder, ignore_errors=True)


def _preload() -> dict[str, Callable]:
    """What children need and is slow to import; what each kind of child does."""
    import matplotlib
    import numpy  # noqa: F401
    import torch
    import torch._dynamo  # the first optimizer imports it
    import torch.distributed

    from rlhf_course.grading import player, reader

    matplotlib.get_cachedir()  # makes a folder, which children cannot
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()  # pages that no collection touches stay shared with the children
    return {"player": player.serve, "reader": reader.serve}


def _fork(serve: Callable, fd: int, cage: tuple, children: dict[int, str]) -> dict:
    folder = tempfile.mkdtemp(prefix="player-")
    try:
        pid = os.fork()
    except OSError as error:  # too many processes, or no memory
        os.close(fd)
        shutil.rmtree(folder, ignore_errors=True)
        return {"problem": str(error)}
    if pid:
        os.close(fd)
        children[pid] = folder
        return {"pid": pid}
    try:
        _become_a_child(fd, folder, cage, serve)
    finally:
        os._exit(0)  # whatever happens, the child never returns into the server's loop


def _become_a_child(fd: int, folder: str, cage: tuple, serve: Callable) -> None:
    from rlhf_course.grading import sandbox, wire

    limits, readable, network = cage
    os.setsid()  # a group of its own, which can be killed as one
    kernel = ctypes.CDLL(None) if sys.platform == "linux" else None
    os.chdir(folder)
    nothing = os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(nothing, standard)
    os.dup2(fd, 3)
    os.closerange(4, 4096)
    layers = sandbox.confine(limits, readable)
    if kernel is not None:  # end with the server; changing the user would have cleared this
        kernel.prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    wire.send(3, wire.encode(layers + ([network] if network else [])))  # before any student can
    serve(3)


def _end(pid: int, children: dict[int, str]) -> int:
    """Kill a child with everything it started; returns its exit status as os.waitpid has it."""
    folder = children.pop(pid)
    for kill in (os.killpg, os.kill):  # it may not have come to setsid yet
        try:
            kill(pid, signal.SIGKILL)
        except (ProcessLookupError, PermissionError):
            continue
    _, status = os.waitpid(pid, 0)
    shutil.rmtree(folder, ignore_errors=True)
    return status
