"""``coterie inspect``: the sizes of a model, from its config alone."""

from typing import Annotated

import typer
from rich.progress import DownloadColumn, TimeRemainingColumn
from rich.table import Table

from coterie.checkpoints import verification as manifests
from coterie.checkpoints.model_info import GIB, MemoryFit, ModelInfo
from coterie.checkpoints.model_info import inspect as read_model_info
from coterie.checkpoints.source import find_folder
from coterie.cli import options as o
from coterie.cli.output import counted_progress, print_note, print_result
from coterie.errors import ConfigError
from coterie.keys import to_json
from coterie.loading.load import DTYPES
from coterie.model.spec import UNQUANTISED
from coterie.offload.capacity import format_bytes

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
    for row in model_rows(info):
        table.add_row(*row)
    lines = [] if verification is None else [describe_verification(verification)]
    print_result({**info.to_dict(), **verified}, table, *lines, json=json)


def describe_verification(verification: manifests.VerifyResult) -> str:
    experts = f", among them {verification.experts} packed experts" if verification.experts else ""
    size = format_bytes(verification.bytes)
    return f"verified: {verification.tensors} tensors{experts} ({size}) are what was written"


def model_rows(info: ModelInfo) -> list[tuple[str, str]]:
    spec, size, router = info.spec, info.size, info.spec.router
    dtype = str(info.dtype).removeprefix("torch.")
    # A model that routes by block (LLaDA2.2).
    by_block = (
        f", of {spec.capacity} that a block of {router.block} admits" if spec.capacity else ""
    )
    mask = "none" if info.mask_id is None else info.mask_id
    quantised = spec.expert_storage != UNQUANTISED
    return [
        ("model", info.name),
        ("family", f"{info.family.title} ({info.family.architecture})"),
        ("parameters", f"{size.parameters:,}, of which a token uses {size.active_parameters:,}"),
        ("layers", f"{spec.layers}, of which {len(spec.moe_layers)} have experts"),
        ("experts", f"{router.experts} a layer, {router.k} a token{by_block}"),
        ("hidden, expert, shared", f"{spec.hidden}, {spec.expert_width}, {spec.shared_width}"),
        ("heads", f"{spec.heads} of {spec.head_dim}, {spec.kv_heads} for keys and values"),
        ("vocabulary", f"{spec.vocabulary:,}"),
        ("mask id, end ids", f"{mask}, {' '.join(map(str, info.eos_ids)) or 'none'}"),
        *([("experts stored in", spec.expert_storage)] if quantised else []),
        (f"weights in {dtype}", f"{format_bytes(size.bytes)} ({size.bytes:,} bytes)"),
        ("one expert", f"{format_bytes(size.expert_bytes)} ({size.expert_bytes:,} bytes)"),
        ("a layer's experts", format_bytes(size.layer_expert_bytes)),
        ("keys and values", f"{format_bytes(size.kv_bytes_per_token)} a position"),
        *((f"in {format_bytes(fit.memory)}", describe_fit(fit, info)) for fit in info.fits),
    ]


def describe_fit(fit: MemoryFit, info: ModelInfo) -> str:
    """How much of a model fits with the KV cache of one sequence."""
    num_experts = info.spec.router.experts
    if fit.experts < 0:
        return "does not fit, even without its experts"
    if fit.experts >= num_experts:
        return f"all of it, with a sequence of {info.kv_length} positions"
    return f"all but the experts, and {fit.experts} of {num_experts} experts a layer"
