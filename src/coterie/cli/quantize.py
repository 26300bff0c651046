"""``coterie quantize``: writes a checkpoint with quantized or packed experts."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import DownloadColumn, TimeRemainingColumn

from coterie.checkpoints.conversion import (
    BF16,
    PANEL_LAYOUT,
    PLAIN_LAYOUT,
    ConversionResult,
    ConversionTarget,
    convert,
)
from coterie.cli import options as o
from coterie.cli.output import console, counted_progress, print_document
from coterie.offload.capacity import format_bytes
from coterie.quantization import FORMATS

LAYOUT_NAMES = {"packed": PANEL_LAYOUT, "plain": PLAIN_LAYOUT}


def quantize(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", help="Folder in the official layout, or a hub id.")
    ],
    output: Annotated[
        Path, typer.Argument(help="New folder, or one that this command did not finish.")
    ],
    *,
    expert_dtype: Annotated[
        str,
        typer.Option(
            help=f"Format of the experts: {', '.join(FORMATS)}, or {BF16} to pack them only "
            "(wider ones are rounded)."
        ),
    ],
    group_size: Annotated[
        int | None,
        typer.Option(help="Weights that share a scale (default 64 in int8, 32 in int4).", min=1),
    ] = None,
    layout: Annotated[
        Literal["packed", "plain"] | None,
        typer.Option(
            help="Layout of the experts: packed for the kernels of a CPU, which map the file, or "
            "plain matrices (default packed; plain for other group sizes)."
        ),
    ] = None,
    json: o.Json = False,
) -> None:
    """Write a model with its routed experts in 8 or 4 bits; other weights stay as they are.

    The same command continues a run that was stopped. `coterie inspect OUTPUT --verify` compares
    the result with its manifest.

    \b
    coterie quantize inclusionAI/LLaDA2.0-mini ./mini-int8 --expert-dtype int8
    coterie generate "..." --model ./mini-int8
    """
    stored_layout = None if layout is None else LAYOUT_NAMES[layout]
    target = ConversionTarget.parse(expert_dtype, group_size, stored_layout)
    columns = (DownloadColumn(binary_units=True), TimeRemainingColumn())
    with counted_progress(f"experts to {target}", *columns) as on_progress:
        conversion = convert(model, output, target, on_progress)
    if json:
        print_document(conversion.to_dict())
    else:
        console().print(conversion_line(conversion))


def conversion_line(conversion: ConversionResult) -> str:
    resumed = conversion.files_resumed
    finished_before = f", {resumed} of them finished before" if resumed else ""
    return (
        f"{conversion.folder}: experts in {conversion.target}; "
        f"{format_bytes(conversion.bytes_before)} became {format_bytes(conversion.bytes_after)} in "
        f"{conversion.files} files{finished_before}"
    )
