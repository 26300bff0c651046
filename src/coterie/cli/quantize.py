"""``coterie quantize``: a checkpoint with its routed experts in 8 or 4 bits, or packed only."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.progress import DownloadColumn, TimeRemainingColumn

from coterie.checkpoints.conversion import (
    BF16,
    LAYOUTS,
    PANEL_LAYOUT,
    PLAIN_LAYOUT,
    ConversionResult,
    ConversionTarget,
    convert,
)
from coterie.checkpoints.verification import VerifyResult, verify
from coterie.cli import options as o
from coterie.cli.json_output import print_document
from coterie.cli.tables import console, format_bytes, progress_bar
from coterie.quantization import FORMATS

SourceModel = Annotated[
    str, typer.Argument(metavar="MODEL", help="A folder in the official layout, or a hub id.")
]
OutputFolder = Annotated[
    Path, typer.Argument(help="A folder that is new, or was begun by this command.")
]
ExpertFormat = Annotated[
    str,
    typer.Option(
        "--experts",
        help=f"What the experts become: {', '.join(FORMATS)}, or {BF16} to pack them only "
        "(wider ones are rounded to it).",
    ),
]
GroupSize = Annotated[
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
    model: SourceModel,
    output: OutputFolder,
    *,
    expert_format: ExpertFormat,
    group_size: GroupSize = None,
    layout: Layout = None,
    json: o.JsonOutput = False,
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
    target = ConversionTarget.parse(expert_format, group_size, layout)
    with progress_bar(DownloadColumn(binary_units=True), TimeRemainingColumn()) as progress:
        task = progress.add_task(f"experts to {target}", total=None)
        conversion = convert(
            model,
            output,
            target,
            lambda done, whole: progress.update(task, completed=done, total=whole),
        )
    if json:
        print_document(conversion_document(conversion))
    else:
        console().print(conversion_line(conversion))


def conversion_line(conversion: ConversionResult) -> str:
    """One line of what came of it."""
    resumed = (
        f", {conversion.files_resumed} of them finished before" if conversion.files_resumed else ""
    )
    return (
        f"{conversion.folder}: experts in {conversion.target}; {format_bytes(conversion.bytes_before)} became "
        f"{format_bytes(conversion.bytes_after)} in {conversion.files} files{resumed}"
    )


def conversion_document(conversion: ConversionResult) -> dict[str, object]:
    """The same as JSON."""
    return {
        "folder": str(conversion.folder),
        "experts": conversion.target.manifest_entry["format"],
        "group": conversion.target.manifest_entry["group"],
        "layout": PANEL_LAYOUT if conversion.target.packed else PLAIN_LAYOUT,
        "bytes_before": conversion.bytes_before,
        "bytes_after": conversion.bytes_after,
        "files": conversion.files,
        "found": conversion.files_resumed,
    }


def verify_with_progress(folder: Path) -> VerifyResult:
    """Compares a folder with its manifest, with a bar meanwhile."""
    with progress_bar(DownloadColumn(binary_units=True), TimeRemainingColumn()) as progress:
        task = progress.add_task("verifying", total=None)
        return verify(
            folder, lambda done, whole: progress.update(task, completed=done, total=whole)
        )


def describe_verification(verification: VerifyResult) -> str:
    experts = f", among them {verification.experts} packed experts" if verification.experts else ""
    return f"verified: {verification.tensors} tensors{experts} ({format_bytes(verification.bytes)}) are what was written"
