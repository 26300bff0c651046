"""``coterie inspect``: the sizes of a model, from its config alone."""

from rich.progress import DownloadColumn, TimeRemainingColumn
from rich.table import Table

from coterie.checkpoints import verification as manifests
from coterie.checkpoints.model_info import GIB
from coterie.checkpoints.model_info import inspect as read_model_info
from coterie.checkpoints.source import find_folder
from coterie.cli.output import counted_progress, print_note, print_result
from coterie.errors import ConfigError
from coterie.keys import to_json
from coterie.loading.load import DTYPES

DEFAULT_LENGTH = 2048
DEFAULT_FIT_GIB = (8.0, 16.0, 24.0)


def inspect(
    model: str | None = None,
    *,
    dtype: str = "bf16",
    length: int = DEFAULT_LENGTH,
    fit_gib: list[float] | None = None,
    verify: bool = False,
    json: bool = False,
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
