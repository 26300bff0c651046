"""The edge between the program and the shell: one line for bad input, and the right exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch
import typer

from coterie.cli.app import app
from coterie.cli.tables import remark

BAD_INPUT, BROKEN_PIPE = 2, 1


def main() -> None:
    """Runs the command that the shell asked for; never returns."""
    status = run(sys.argv[1:])
    # What is still buffered goes to a pipe that may be closed: that is no failure of ours.
    sys.exit(status if _flushed() else BROKEN_PIPE)


def run(arguments: Sequence[str]) -> int:
    """The exit status: 0, 2 with one line on stderr for bad input, 130 when interrupted."""
    if sys.stdout is None:
        return _complain("standard output is closed")
    try:
        status = app(list(arguments), prog_name="coterie", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except typer.TyperException as error:
        return _complain(error.format_message())
    # Every room raises a ValueError for what it was given; COTERIE_DEBUG shows where.
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("COTERIE_DEBUG"):
            raise
        return _complain(_told(error))


def _told(error: Exception) -> str:
    """The system's errors as people say them: ``results: Not a directory``."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _complain(message: str) -> int:
    line = " ".join(message.split())
    # Where the complaint cannot be written either, the status has to say it.
    with suppress(OSError):
        remark(line)
    return BAD_INPUT


def _flushed() -> bool:
    if sys.stdout is None:
        return True
    try:
        sys.stdout.flush()
        return True
    except OSError:
        # The interpreter flushes once more on its way out: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return False
