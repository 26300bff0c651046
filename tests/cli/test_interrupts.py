"""Ctrl-C ends the program, wherever it arrives."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

MORE_PLACES = ("caught", "cleaning_up", "thread_at_work", "second_time")
PROGRAM = """
import os, signal, threading
from concurrent.futures import ThreadPoolExecutor
from coterie.cli import entry, interrupts

def stop():
    os.kill(os.getpid(), signal.SIGINT)

class Dropped:
    def __del__(self):
        stop()

def destructor():
    Dropped()

def caught():
    try:
        stop()
    except BaseException:
        pass

def cleaning_up():
    try:
        stop()
    finally:
        threading.Event().wait()

def lock_of_a_future():
    enter = threading.Condition.__enter__

    def interrupted(condition):
        threading.Condition.__enter__ = enter
        enter(condition)
        stop()

    with ThreadPoolExecutor(1) as pool:
        future = pool.submit(threading.Barrier(2).wait, 0.05)
        threading.Condition.__enter__ = interrupted
        future.result()

def thread_at_work():
    ThreadPoolExecutor(1).submit(threading.Event().wait)
    stop()

def second_time():
    interrupts.GRACE_SECONDS = 1e6
    try:
        stop()
    finally:
        stop()

def command(*arguments, **options):
    NAME()
    threading.Event().wait()

interrupts.GRACE_SECONDS = 0.1
entry.root_command, entry.check_repeats = lambda: command, lambda arguments: None
entry.main()
"""


@pytest.mark.parametrize(
    "place",
    [
        "destructor",
        "lock_of_a_future",
        *(pytest.param(name, marks=pytest.mark.slow) for name in MORE_PLACES),
    ],
)
def test_one_interrupt_ends_the_program_wherever_it_arrives(place: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM.replace("NAME", place)],
        env={**os.environ, "PYTHONPATH": "src", "OMP_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2], check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "coterie: stopped\n")
