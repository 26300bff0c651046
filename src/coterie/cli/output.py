"""What commands print: text, notes, tables, progress bars and JSON documents."""

import csv
import io
import json
import os
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from types import ModuleType

from rich.console import Console, RenderableType
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Table

from coterie.errors import ConfigError, printable
from coterie.lab.journal import Journal
from coterie.lab.records import Measurement, make_record

Document = Mapping[str, object]
PIPE_WIDTH = 200  # columns of a table that goes to a file or a pipe
SCHEMA = 2  # version of the JSON documents; schema 1 has only the old keys
# Old name -> new name, by kind: of options, of their values, of keys of JSON, of fields.
OLD_NAMES = tomllib.loads(Path(__file__).with_name("old_names.toml").read_text("utf-8"))


def console(*, stderr: bool = False) -> Console:
    """A console of the terminal's width; wide where the output goes to a file or a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    is_terminal = stream is not None and stream.isatty()  # None: the shell closed it
    width, file = None if is_terminal else PIPE_WIDTH, io.StringIO() if stream is None else stream
    return Console(file=file, width=width, highlight=False, markup=False)


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A bar on stderr that disappears when it is done; silent where stderr is no terminal."""
    terminal = console(stderr=True)
    columns = (TextColumn("{task.description}"), BarColumn(), *columns)
    disable = not terminal.is_terminal
    return Progress(*columns, console=terminal, transient=True, disable=disable)


@contextmanager
def counted_progress(text: str, *columns: ProgressColumn) -> Iterator[Callable[[int, int], None]]:
    """Yields a callback for (done, total), which moves one bar."""
    with progress_bar(*columns) as progress:
        task = progress.add_task(text, total=None)
        yield lambda done, total: progress.update(task, completed=done, total=total)


def plain_table(
    *texts: str, numbers: Sequence[str] = (), rows: Iterable[Iterable[str]] = (),
    caption: str | None = None, unwrapped: Sequence[str] = (),
) -> Table:  # fmt: skip
    """A table without a frame; the columns ``numbers``, after those of text, are flush right.

    The columns ``unwrapped`` keep their width in a narrow terminal."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2), caption=caption)
    table.caption_justify = "left"
    for column in (*texts, *numbers):
        justify, no_wrap = "right" if column in numbers else "left", column in unwrapped
        table.add_column(column, justify=justify, no_wrap=no_wrap)
    for row in rows:
        table.add_row(*row)
    return table


def print_text(text: str, end: str = "\n") -> None:
    """Plain text on standard output, flushed, so that a full disk or a closed pipe is noticed.

    A terminal gets no control characters: they are a model's, or a file's.
    """
    with stdout_errors():
        print(printable(text) if sys.stdout.isatty() else text, end=end, flush=True)


def print_parts(*parts: RenderableType) -> None:
    """Tables and lines on standard output, one below the other."""
    with stdout_errors():
        console().print(*parts, sep="\n")


@contextmanager
def stdout_errors() -> Iterator[None]:
    """Errors of writing to standard output name it."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror, "standard output") from None


def print_note(note: str) -> None:
    """One line on stderr, unless the shell closed it."""
    if sys.stderr is not None:
        print(printable(f"coterie: {note}"), file=sys.stderr, flush=True)


def print_document(document: Document | Sequence[object]) -> None:
    """One JSON document on standard output, in ASCII; keys with a new name appear under both."""
    with_names = with_new_keys(document)
    if isinstance(with_names, dict):
        with_names = {"schema": SCHEMA, **with_names}
    print_text(json.dumps(with_names, indent=1, allow_nan=False))


def print_result(document: Document | Sequence[object], *parts: RenderableType, json: bool) -> None:
    """The document as JSON, or the parts of the text: tables and lines."""
    if json:
        print_document(document)
    else:
        print_parts(*parts)


def with_new_keys(value: object) -> object:
    """The same JSON value; each old key is followed by its new name with the same value."""
    if isinstance(value, Mapping):
        names = {key: [key, *filter(None, [OLD_NAMES["keys"].get(key)])] for key in value}
        return {name: with_new_keys(value[key]) for key in value for name in names[key]}
    return [with_new_keys(inner) for inner in value] if isinstance(value, list | tuple) else value


def format_csv(rows: Sequence[Document]) -> str:
    """CSV with one column for each key of any row."""
    text = io.StringIO()
    columns = dict.fromkeys(key for row in rows for key in row)
    writer = csv.DictWriter(text, list(columns), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def command_record(
    title: str, facts: Document, measures: Sequence[Measurement] = (), device: str = "cpu"
) -> dict[str, object]:
    """The record of this command."""
    return make_record(title, command_line(), measures, facts=facts, device=device)


@contextmanager
def resumable(journal: Journal) -> Iterator[Journal]:
    """The journal of a command; notes say what it had at the start, and has after an error."""
    with journal:
        if journal.path and journal.steps:
            print_note(f"going on after the {len(journal.steps)} measurements in {journal.path}")
        try:
            yield journal
        except BaseException as error:
            count = len(journal.steps)
            if journal.path and count:
                print_note(f"{journal.path} keeps {count} measurements; the same command goes on")
            elif count and isinstance(error, KeyboardInterrupt):
                print_note(f"{count} measurements are lost; --out would keep them")
            raise


def command_line() -> list[str]:
    """The command line of this process, as records keep it."""
    return ["coterie", *sys.argv[1:]]


def check_one_format(*, json: bool, csv: bool) -> None:
    """Raises for two formats on one standard output."""
    if json and csv:
        raise ConfigError("--json and --csv both write to standard output; give one of them")


def check_output_file(out: Path | None, *, new_folder: bool = False) -> None:
    """Raises for a file that could not be written, before hours of work."""
    if out is None:
        return
    folder = out.absolute().parent
    if new_folder:
        folder.mkdir(parents=True, exist_ok=True)
    if out.is_dir():
        raise ConfigError(f"{out}: a folder; name a file, such as {out / 'result.json'}")
    if out.exists() and not out.is_file():
        raise ConfigError(f"{out}: a device or a pipe; name a file")
    if not folder.is_dir():
        raise ConfigError(f"{out}: its folder does not exist")
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{out}: its folder cannot be written to")


def require_extra(module: str, purpose: str, extra: str = "lab") -> ModuleType:
    """Imports a module that needs an optional dependency; raises ConfigError that names it."""
    try:
        return import_module(module)
    except ModuleNotFoundError as error:
        raise ConfigError(
            f"{purpose} needs {error.name}, which is not installed: "
            f"pip install '.[{extra}]' in a clone of Coterie"
        ) from None
