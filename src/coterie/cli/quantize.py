"""``coterie quantize``: writes a checkpoint with quantized or packed experts."""

from pathlib import Path
from typing import Literal

from rich.progress import DownloadColumn, TimeRemainingColumn

from coterie.checkpoints import conversion as checkpoints
from coterie.cli.output import counted_progress, print_note, print_result

LAYOUT_NAMES = {"packed": checkpoints.PANEL_LAYOUT, "plain": checkpoints.PLAIN_LAYOUT}


def quantize(
    model: str,
    output: Path,
    *,
    expert_dtype: str,
    dense_dtype: str | None = None,
    group_size: int | None = None,
    layout: Literal["packed", "plain"] | None = None,
    json: bool = False,
) -> None:
    """Write a model with its routed experts in 8 or 4 bits; --dense-dtype adds dense matrices.

    The same command continues a run that was stopped. `coterie inspect OUTPUT --verify` compares
    the result with its manifest.

    \b
    coterie quantize inclusionAI/LLaDA2.0-mini ./mini-int8 --expert-dtype int8
    coterie generate "..." --model ./mini-int8
    """
    stored_layout = None if layout is None else LAYOUT_NAMES[layout]
    target = checkpoints.ConversionTarget.parse(
        expert_dtype, group_size, stored_layout, dense_dtype
    )
    columns = (DownloadColumn(binary_units=True), TimeRemainingColumn())
    with counted_progress(f"experts to {target}", *columns) as on_progress:
        result = checkpoints.convert(model, output, target, on_progress, print_note)
    print_result(result.to_dict(), result.describe(), json=json)
