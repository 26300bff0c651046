"""``coterie quantize``: a smaller checkpoint, its routed experts in 8 or 4 bits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import DownloadColumn, TimeRemainingColumn

from coterie.cli import options as o
from coterie.cli.document import print_document
from coterie.cli.tables import bar, console, readable
from coterie.engine.convert import Converted, convert
from coterie.quant import FORMATS, parse_format

Source = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder in the official layout, or a hub id.")
]
Out = Annotated[Path, typer.Argument(help="A folder that is new, or was begun by this command.")]
Kept = Annotated[
    str, typer.Option("--experts", help=f"What the experts become: {' or '.join(FORMATS)}.")
]
Group = Annotated[
    int | None,
    typer.Option(
        "--group",
        min=1,
        help="Weights that share a scale; default 64 in int8 and 32 in int4, "
        "which the fast kernels take.",
        show_default=False,
    ),
]


def quantize(
    model: Source, out: Out, *, experts: Kept, group: Group = None, json: o.Json = False
) -> None:
    """Make a smaller model: its routed experts in 8 or 4 bits, all else as it is.

    \b
    coterie quantize inclusionAI/LLaDA2.0-mini ./mini-int8 --experts int8
    coterie generate "..." --model ./mini-int8

    \b
    Killed or interrupted, the same command goes on where it stopped.
    """
    form = parse_format(experts, group)
    with bar(DownloadColumn(binary_units=True), TimeRemainingColumn()) as shown:
        task = shown.add_task(f"quantising to {form.name}", total=None)
        made = convert(
            model, out, form, lambda done, whole: shown.update(task, completed=done, total=whole)
        )
    if json:
        print_document(document(made))
    else:
        console().print(told(made))


def told(made: Converted) -> str:
    """One line of what came of it."""
    kept = f", {made.found} of them finished before" if made.found else ""
    return (
        f"{made.folder}: experts in {made.form}; {readable(made.bytes_before)} became "
        f"{readable(made.bytes_after)} in {made.files} files{kept}"
    )


def document(made: Converted) -> dict[str, object]:
    """The same as JSON."""
    return {
        "folder": str(made.folder),
        "experts": made.form.name,
        "group": made.form.group,
        "bytes_before": made.bytes_before,
        "bytes_after": made.bytes_after,
        "files": made.files,
        "found": made.found,
    }
