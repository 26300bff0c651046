"""The edge between the program and the shell: one line for bad input, and the right exit status."""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from contextlib import suppress

import torch
import typer

from coterie.cli.app import app
from coterie.cli.tables import print_note

BAD_INPUT, BROKEN_PIPE = 2, 1


def main() -> None:
    """Runs the command that the shell asked for; never returns."""
    status = run(sys.argv[1:])
    failure = _flush()
    if status == 0 and failure is not None:
        # A closed pipe is somebody's wish, not worth a line.
        closed = isinstance(failure, BrokenPipeError)
        status = BROKEN_PIPE if closed else _print_error(_error_message(failure))
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """The exit status: 0, 2 with one line on stderr for bad input, 130 when interrupted."""
    if sys.stdout is None:
        return _print_error("standard output is closed")
    try:
        status = app(list(arguments), prog_name="coterie", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except typer.TyperException as error:
        return _print_error(error.format_message())
    # Every room raises a ValueError for what it was given; COTERIE_DEBUG shows where.
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("COTERIE_DEBUG"):
            raise
        return _print_error(_error_message(error))


def _error_message(error: Exception) -> str:
    """The system's errors as people say them: ``results: Not a directory``."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _print_error(message: str) -> int:
    line = " ".join(message.split())
    # Where the complaint cannot be written either, the status has to say it.
    with suppress(OSError):
        print_note(line)
    return BAD_INPUT


def _flush() -> OSError | None:
    """Write what is still buffered; what cannot be written is let go, and why is returned."""
    if sys.stdout is None:
        return None
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes once more on its way out: let that go nowhere.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None
