"""``coterie inspect``: the sizes of a model, from its config alone."""

from typing import Annotated

import typer
from rich.progress import DownloadColumn, TimeRemainingColumn
from rich.table import Table

from coterie.checkpoints import verification as manifests
from coterie.checkpoints.model_info import GIB
from coterie.checkpoints.model_info import inspect as read_model_info
from coterie.checkpoints.source import find_folder
from coterie.cli import options as o
from coterie.cli.output import counted_progress, print_note, print_result
from coterie.errors import ConfigError
from coterie.keys import to_json
from coterie.loading.load import DTYPES

DEFAULT_LENGTH = 2048
DEFAULT_FIT_GIB = (8.0, 16.0, 24.0)
DTYPE_HELP = "Data type that sizes are given for."
LENGTH_HELP = "Sequence length; its KV cache must fit too."
FIT_HELP = "Memory in GiB to fit into; may be repeated (default 8, 16, 24)."
VERIFY_HELP = "Compare all weights with the folder's manifest."


def inspect(
    model: o.ModelArgument = None,
    *,
    dtype: Annotated[str, typer.Option(help=DTYPE_HELP)] = "bf16",
    length: Annotated[int, typer.Option(help=LENGTH_HELP, min=1)] = DEFAULT_LENGTH,
    fit_gib: Annotated[
        list[float] | None, typer.Option(help=FIT_HELP, min=0.0, max=float(1 << 30))
    ] = None,
    verify: Annotated[bool, typer.Option("--verify", help=VERIFY_HELP)] = False,
    json: o.Json = False,
) -> None:
    """Print a model's family, sizes and experts, and how much of it fits into memory.

    Reads the config alone. With --verify, also the weights of a folder that `coterie quantize`
    wrote: a damaged expert or tensor is named, and the exit status is 2.

    \b
    coterie inspect inclusionAI/LLaDA2.0-mini --fit-gib 12
    coterie inspect ./mini-int8 --verify
    """
    if dtype not in DTYPES:
        raise ConfigError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    sizes = tuple(round(gib * GIB) for gib in fit_gib or DEFAULT_FIT_GIB)
    info = read_model_info(model, dtype=DTYPES[dtype], kv_length=length, memory_sizes=sizes)
    if info.kv_length < length != DEFAULT_LENGTH:
        print_note(f"the model has {info.kv_length} positions, fewer than --length {length}")
    verification = None
    if verify:
        columns = (DownloadColumn(binary_units=True), TimeRemainingColumn())
        with counted_progress("verifying", *columns) as on_progress:
            verification = manifests.verify(find_folder(model), on_progress)
    verified = {} if verification is None else {"verified": to_json(verification)}
    table = Table.grid(padding=(0, 2))
    for row in info.describe():
        table.add_row(*row)
    lines = [] if verification is None else [verification.describe()]
    print_result({**info.to_dict(), **verified}, table, *lines, json=json)
