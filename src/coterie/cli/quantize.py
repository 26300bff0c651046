"""``coterie quantize``: a checkpoint with its routed experts in 8 or 4 bits, or packed only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import DownloadColumn, TimeRemainingColumn

from coterie.cli import options as o
from coterie.cli.document import print_document
from coterie.cli.tables import bar, console, readable
from coterie.engine.convert import LAYOUTS, PANELS, PLAIN, WHOLE, Aim, Converted, convert
from coterie.engine.verify import Verified, verify
from coterie.quant import FORMATS

Source = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder in the official layout, or a hub id.")
]
Out = Annotated[Path, typer.Argument(help="A folder that is new, or was begun by this command.")]
Kept = Annotated[
    str,
    typer.Option(
        "--experts",
        help=f"What the experts become: {', '.join(FORMATS)}, or {WHOLE} to pack them only "
        "(wider ones are rounded to it).",
    ),
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
Layout = Annotated[
    str | None,
    typer.Option(
        "--layout",
        help=f"{' or '.join(LAYOUTS)}: experts packed as the kernels of a CPU read them, which "
        "load by mapping the file; or as matrices. Default: panels, plain for other groups.",
        show_default=False,
    ),
]


def quantize(
    model: Source,
    out: Out,
    *,
    experts: Kept,
    group: Group = None,
    layout: Layout = None,
    json: o.Json = False,
) -> None:
    """Make a smaller model: its routed experts in 8 or 4 bits, all else as it is.

    \b
    coterie quantize inclusionAI/LLaDA2.0-mini ./mini-int8 --experts int8
    coterie generate "..." --model ./mini-int8

    \b
    Killed or interrupted, the same command goes on where it stopped.
    `coterie inspect ./mini-int8 --verify` reads all of it and says
    whether it still is what was written.
    """
    aim = Aim.of(experts, group, layout)
    with bar(DownloadColumn(binary_units=True), TimeRemainingColumn()) as shown:
        task = shown.add_task(f"experts to {aim}", total=None)
        made = convert(
            model, out, aim, lambda done, whole: shown.update(task, completed=done, total=whole)
        )
    if json:
        print_document(document(made))
    else:
        console().print(told(made))


def told(made: Converted) -> str:
    """One line of what came of it."""
    kept = f", {made.found} of them finished before" if made.found else ""
    return (
        f"{made.folder}: experts in {made.aim}; {readable(made.bytes_before)} became "
        f"{readable(made.bytes_after)} in {made.files} files{kept}"
    )


def document(made: Converted) -> dict[str, object]:
    """The same as JSON."""
    return {
        "folder": str(made.folder),
        "experts": made.aim.stated["format"],
        "group": made.aim.stated["group"],
        "layout": PANELS if made.aim.panels else PLAIN,
        "bytes_before": made.bytes_before,
        "bytes_after": made.bytes_after,
        "files": made.files,
        "found": made.found,
    }


def verify_shown(folder: Path) -> Verified:
    """Compares a folder with its manifest, with a bar meanwhile."""
    with bar(DownloadColumn(binary_units=True), TimeRemainingColumn()) as shown:
        task = shown.add_task("verifying", total=None)
        return verify(folder, lambda done, whole: shown.update(task, completed=done, total=whole))


def verified_line(found: Verified) -> str:
    experts = f", among them {found.experts} packed experts" if found.experts else ""
    return (
        f"verified: {found.tensors} tensors{experts} ({readable(found.bytes)}) are what was written"
    )
