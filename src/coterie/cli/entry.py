"""The program: runs a command line; bad input ends in one line on stderr and status 2."""

import os
import re
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress

import torch
import typer

from coterie.cli.app import app
from coterie.cli.old_names import with_new_names
from coterie.cli.output import print_note

BAD_INPUT, BROKEN_PIPE = 2, 1
FIELD = re.compile(r"`(\w+)(?:=([^`]*))?`")
OTHER_FIELDS = {  # from field of the library to option
    "capacity": "expert_memory", "simulated": "simulate_expert_memory",
    "low_precision": "fallback_model", "experts": "expert_dtype", "plan": "kv_cache",
    "commit": "commit_routing", "prefill": "prefill_routing", "reuse_tolerance": "coreset_reuse",
    "drift": "coreset_reuse", "items": "num_problems", "count": "num_problems",
    "prompts": "prompt_file", "precision": "expert_dtype", "baselines": "baseline",
    "python": "baseline_python", "reset_every": "reset_cache_every",
}  # fmt: skip


def main() -> None:
    """Runs the command line of this process; never returns."""
    status = run(sys.argv[1:])
    failure = _flush()
    if status == 0 and failure is not None:
        # A reader that closes the pipe early made no mistake: no message.
        closed = isinstance(failure, BrokenPipeError)
        status = BROKEN_PIPE if closed else _print_error(_error_message(failure))
    sys.exit(status)


def run(arguments: Sequence[str]) -> int:
    """The exit status: 0, 2 with one line on stderr for bad input, 130 when interrupted."""
    if sys.stdout is None:
        return _print_error("standard output is closed")
    arguments = with_new_names(arguments)
    try:
        status = app(arguments, prog_name="coterie", standalone_mode=False)
        return status if isinstance(status, int) else 0
    except typer.TyperException as error:
        return _print_error(error.format_message())
    # The library raises a ValueError for wrong arguments; COTERIE_DEBUG shows its traceback.
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        if os.environ.get("COTERIE_DEBUG"):
            raise
        return _print_error(name_flags(_error_message(error), command_flags(arguments)))


def name_flags(message: str, flags: Mapping[str, str]) -> str:
    """The message with options in place of fields: `host_memory` becomes --host-memory."""

    def flag(match: re.Match[str]) -> str:
        field, value = match.groups()
        name = flags.get(field) or flags.get(OTHER_FIELDS.get(field, ""))
        return match[0] if name is None else name if value is None else f"{name} {value}"

    return FIELD.sub(flag, message)


def command_flags(arguments: Sequence[str]) -> dict[str, str]:
    """The flag of each option of the command on this command line, by parameter."""
    command = typer.main.get_command(app)
    for name in arguments:
        subcommands = getattr(command, "commands", {})
        if name not in subcommands:
            break
        command = subcommands[name]
    names = {option.name: max(option.opts, key=len) for option in command.params}
    return {field: flag for field, flag in names.items() if field and flag.startswith("--")}


def _error_message(error: Exception) -> str:
    """The error as a line; an error of the system without its number: ``runs: Not a directory``."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    return error.strerror if error.filename is None else f"{error.filename}: {error.strerror}"


def _print_error(message: str) -> int:
    line = " ".join(message.split())
    # Where stderr cannot be written to, the exit status still reports the error.
    with suppress(OSError):
        print_note(line)
    return BAD_INPUT


def _flush() -> OSError | None:
    """Writes what is buffered; returns the error where that fails."""
    if sys.stdout is None:
        return None
    try:
        sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes once more when it ends: send that to the null device.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None
