"""``coterie quantize``: writes a checkpoint with quantized or packed experts."""

from pathlib import Path
from typing import Annotated, Literal

import typer
from rich.progress import DownloadColumn, TimeRemainingColumn

from coterie.checkpoints import conversion as checkpoints
from coterie.cli import options as o
from coterie.cli.output import counted_progress, print_note, print_result
from coterie.quantization import FORMATS

LAYOUT_NAMES = {"packed": checkpoints.PANEL_LAYOUT, "plain": checkpoints.PLAIN_LAYOUT}
MODEL_HELP = "Folder in the official layout, or a hub id."
OUTPUT_HELP = "New folder, or one that this command did not finish."
FORMAT_HELP = (
    f"Format of the experts: {', '.join(FORMATS)}, or {checkpoints.BF16} to pack them only "
    "(wider ones are rounded)."
)
GROUP_HELP = "Weights that share a scale (default 64 in int8, 32 in int4)."
LAYOUT_HELP = (
    "Layout of the experts: packed for the kernels of a CPU, which map the file, or plain matrices "
    "(default packed; plain for other group sizes)."
)


def quantize(
    model: Annotated[str, typer.Argument(metavar="MODEL", help=MODEL_HELP)],
    output: Annotated[Path, typer.Argument(metavar="OUTPUT", help=OUTPUT_HELP)],
    *,
    expert_dtype: Annotated[str, typer.Option(help=FORMAT_HELP)],
    group_size: Annotated[int | None, typer.Option(help=GROUP_HELP, min=1)] = None,
    layout: Annotated[Literal["packed", "plain"] | None, typer.Option(help=LAYOUT_HELP)] = None,
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
    target = checkpoints.ConversionTarget.parse(expert_dtype, group_size, stored_layout)
    columns = (DownloadColumn(binary_units=True), TimeRemainingColumn())
    with counted_progress(f"experts to {target}", *columns) as on_progress:
        result = checkpoints.convert(model, output, target, on_progress, print_note)
    print_result(result.to_dict(), result.describe(), json=json)
