"""Contestants for the tests of benchmarks/peers/arena.py, which runs them in processes."""

import os
import time

import torch


def waits(case, turn, seconds: float, log: str) -> None:
    """Works for so long; writes its name, process, threads and time into a file."""
    turn()
    while True:
        began = time.time()
        time.sleep(seconds)
        with open(log, "a") as file:
            file.write(f"{seconds} {os.getpid()} {torch.get_num_threads()} {began} {time.time()}\n")
        turn(tokens=10)


def prefers_one_thread(case, turn) -> None:
    """Is slower with more threads."""
    turn()
    while True:
        time.sleep(0.02 * torch.get_num_threads())
        turn(tokens=10)


def calls_back(case, turn) -> None:
    """A trainer that catches every Exception around its callback."""
    turn()
    while True:
        try:
            turn(tokens=1)
        except Exception:  # noqa: BLE001  that is what it is for
            continue


def fails(case, turn) -> None:
    """Ends with an error in its second turn."""
    turn()
    turn(tokens=1)
    raise ValueError("out of luck")
