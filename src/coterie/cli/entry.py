"""The program: runs a command line; bad input ends in one line on stderr and status 2."""

import io
import os
import re
import signal
import sys
from collections.abc import Mapping, Sequence
from contextlib import suppress
from functools import cache

import typer
from typer.core import TyperGroup, TyperOption

from coterie.cli.app import COMMANDS, app
from coterie.cli.interrupts import INTERRUPTED, install_handler, interrupt
from coterie.cli.old_names import with_new_names
from coterie.cli.output import OLD_NAMES, print_note, stdout_errors
from coterie.errors import WORD_CHARACTERS, ConfigError, clip, shorten
from coterie.loading.memory_errors import is_out_of_memory, out_of_memory_message

BAD_INPUT, BROKEN_PIPE = 2, 1
RESUMES = "stopped; the same command continues from what it has kept"
STOP_NOTES = {"study": RESUMES, "quantize": RESUMES}  # others say themselves what they have kept
USAGE_ERRORS = {  # of the library that reads the command line
    r"Unable to parse input string as an integer, exceeded maximum size": "must have fewer digits",
    r"(No such command .*)\.": r"\1; `coterie --help` lists them",
    r"Input should be (.*?)(, unable to parse .*)?$": r"must be \1",
}
FIELD = re.compile(r"`(\w+)(?:=([^`]*))?`")


def main() -> None:
    """Runs the command line of this process; never returns."""
    install_handler()
    if isinstance(sys.stdin, io.TextIOWrapper):
        # Without a byte order mark; what is not UTF-8 is reported where it is used.
        sys.stdin.reconfigure(encoding="utf-8-sig", errors="surrogateescape")
    status = run(sys.argv[1:])
    failure = _flush()
    if status == 0 and failure is not None:
        # A reader that closes the pipe early made no mistake: no message.
        closed = isinstance(failure, BrokenPipeError)
        status = BROKEN_PIPE if closed else _print_error(_error_message(failure))
    if status != 0:
        os._exit(status)  # Python would wait for threads, and they for the programs they grade
    if signal.getsignal(signal.SIGINT) is interrupt:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # nothing to clean up: end without a traceback
    sys.exit(0)


def run(arguments: Sequence[str]) -> int:
    """The exit status: 0, 2 with one line on stderr for bad input, 130 when interrupted."""
    if sys.stdout is None:
        return _print_error("standard output is closed")
    try:
        arguments = with_imports_first(with_new_names([utf8_text(each) for each in arguments]))
        check_repeats(arguments)
        status = root_command()(arguments, prog_name="coterie", standalone_mode=False)
        command = next((each for each in arguments if each in COMMANDS), "")
        if status == INTERRUPTED:
            print_note(STOP_NOTES.get(command, "stopped"))
        return status if isinstance(status, int) else 0
    except KeyboardInterrupt:  # before the command ran
        print_note("stopped")
        return INTERRUPTED
    except typer.TyperException as error:
        return _print_error(_usage_message(error))
    # The library raises a ValueError for wrong arguments; COTERIE_DEBUG shows its traceback.
    except (ValueError, OSError, MemoryError, RuntimeError) as error:
        is_expected = isinstance(error, ValueError | OSError) or is_out_of_memory(error)
        if os.environ.get("COTERIE_DEBUG") or not is_expected:
            raise
        message = out_of_memory_message(error) if is_out_of_memory(error) else _error_message(error)
        return _print_error(name_flags(message, command_flags(arguments)))


def with_imports_first(arguments: Sequence[str]) -> list[str]:
    """The same command line with each --import FILE before the command, where it is an option."""
    end = arguments.index("--") if "--" in arguments else len(arguments)
    imports, others, rest = [], [], iter(arguments[:end])
    for argument in rest:
        name, equals, _ = argument.partition("=")
        if name != "--import":
            others.append(argument)
        elif equals:
            imports.append(argument)
        elif (path := next(rest, None)) is not None:
            imports += [argument, path]
        else:
            raise ConfigError("--import needs a Python file")
    return [*imports, *others, *arguments[end:]]


def name_flags(message: str, flags: Mapping[str, str]) -> str:
    """The message with options in place of fields: `host_memory` becomes --host-memory."""

    def flag(match: re.Match[str]) -> str:
        field, value = match.groups()
        name = flags.get(field) or flags.get(OLD_NAMES["fields"].get(field, ""))
        return match[0] if name is None else name if value is None else f"{name} {value}"

    return FIELD.sub(flag, message)


def utf8_text(argument: str) -> str:
    """The argument read as UTF-8, also where the locale is another; as it was if it is no UTF-8."""
    try:
        return os.fsencode(argument).decode()
    except UnicodeDecodeError:
        return argument


def check_repeats(arguments: Sequence[str]) -> None:
    """Raises ConfigError for an option with one value that is given twice."""
    counts: dict[str, int] = {}
    options = command_options(arguments)
    rest = iter(arguments[: arguments.index("--")] if "--" in arguments else arguments)
    for argument in rest:
        option = options.get(argument.partition("=")[0])
        if option is None or option.multiple or option.is_flag:
            continue
        flag = max(option.opts, key=len)
        counts[flag] = counts.get(flag, 0) + 1
        if counts[flag] > 1:
            raise ConfigError(f"{flag} is given twice; it takes one value")
        if "=" not in argument:
            next(rest, None)


def command_flags(arguments: Sequence[str]) -> dict[str, str]:
    """The flag of each option of the command on this command line, by parameter."""
    options = command_options(arguments).values()
    flags = {option.name: max(option.opts, key=len) for option in options}
    return {field: flag for field, flag in flags.items() if field and flag.startswith("--")}


def command_options(arguments: Sequence[str]) -> dict[str, TyperOption]:
    """The options of the command on this command line, by flag."""
    command = root = root_command()
    for name in arguments:
        subcommand = getattr(command, "commands", {}).get(name)
        if subcommand is None and command is not root:
            break
        command = subcommand or command
    options = (each for each in command.params if isinstance(each, TyperOption))
    return {flag: option for option in options for flag in option.opts}


@cache
def root_command() -> TyperGroup:
    """The tree of all commands and options; making it takes longer than many a command."""
    root = typer.main.get_command(app)
    assert isinstance(root, TyperGroup)
    return root


def _error_message(error: Exception) -> str:
    """The error as a line; an error of the system without its number: ``runs: Not a directory``."""
    if not isinstance(error, OSError) or error.strerror is None:
        return str(error)
    name = clip(str(error.filename), WORD_CHARACTERS)
    if isinstance(error, FileExistsError):  # from a folder that is to be made
        return f"{name}: exists, and is no folder"
    return error.strerror if error.filename is None else f"{name}: {error.strerror}"


def _usage_message(error: typer.TyperException) -> str:
    """The error of a command line, in our words where the library's are those of a program."""
    message = error.format_message()
    for pattern, problem in USAGE_ERRORS.items():
        message = re.sub(pattern, problem, message)
    return message


def _print_error(message: str) -> int:
    line = shorten(" ".join(message.split()))
    # Where stderr cannot be written to, the exit status still reports the error.
    with suppress(OSError):
        print_note(line)
    return BAD_INPUT


def _flush() -> OSError | None:
    """Writes what is buffered; returns the error where that fails."""
    if sys.stdout is None:
        return None
    try:
        with stdout_errors():
            sys.stdout.flush()
    except OSError as error:
        # The interpreter flushes once more when it ends: send that to the null device.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return error
    return None
