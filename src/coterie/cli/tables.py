"""Tables and bars for people; the same facts go out as JSON through ``document``."""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Sequence

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TextColumn
from rich.table import Table

from coterie.checkpoints.model_info import MemoryFit, ModelInfo
from coterie.cli.json_output import saved_share
from coterie.engine.events import Result
from coterie.keys import to_json
from coterie.model.spec import UNQUANTISED, ModelSpec
from coterie.offload.traffic import Traffic
from coterie.routing import POLICIES
from coterie.specs import spec_options

NON_TERMINAL_WIDTH = 200  # columns where nobody's terminal says how many there are
BYTE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def console(*, stderr: bool = False) -> Console:
    """Prints at the terminal's width; wide where the output goes to a file or a pipe."""
    stream = sys.stderr if stderr else sys.stdout
    is_terminal = stream is not None and stream.isatty()  # None: the shell closed it
    return Console(
        file=stream if stream is not None else io.StringIO(),
        width=None if is_terminal else NON_TERMINAL_WIDTH,
        highlight=False,
        markup=False,
    )


def progress_bar(*columns: ProgressColumn) -> Progress:
    """A bar on stderr that is gone when done; where stderr is no terminal, nothing."""
    terminal = console(stderr=True)
    return Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        *columns,
        console=terminal,
        transient=True,
        disable=not terminal.is_terminal,
    )


def plain_table(*columns: str, number_columns: tuple[str, ...] = ()) -> Table:
    """A table without frame; the columns named in ``numbers`` are flush right."""
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2))
    for column in columns:
        table.add_column(column, justify="right" if column in number_columns else "left")
    return table


def policy_table() -> Table:
    """Every policy: how it is spelled, what it means, where it comes from, what else it takes."""
    table = plain_table("policy", "meaning", "source", "options")
    for name, cls in POLICIES.items():
        policy_options = spec_options(cls).values()
        meaning, source = split_source(" ".join((cls.__doc__ or "").split()))
        required = ",".join(f"{o.name}=.." for o in policy_options if o.default == "required")
        optional = " ".join(o.name for o in policy_options if o.default != "required")
        table.add_row(f"{name}:{required}" if required else name, meaning, source, optional)
    return table


def option_table() -> Table:
    """Every option of every policy, once, with the values it takes."""
    table = plain_table("option", "values")
    values_by_option: dict[str, dict[str, None]] = {}
    for option in (o for cls in POLICIES.values() for o in spec_options(cls).values()):
        values = str(option)
        values += " (or one for each layer: 0.3/0.2/0.25)" if option.accepts_list else ""
        values_by_option.setdefault(option.name, {})[values] = None
    for name, values in values_by_option.items():
        table.add_row(name, ", or ".join(values))
    return table


def policy_documents() -> list[dict[str, object]]:
    """The same as JSON."""
    return [
        {
            "name": name,
            "meaning": " ".join((cls.__doc__ or "").split()),
            "options": {o.name: o.default for o in spec_options(cls).values()},
        }
        for name, cls in POLICIES.items()
    ]


def split_source(text: str) -> tuple[str, str]:
    """A docstring without its first parenthesis, which holds the source, and that source."""
    match = re.search(r" \(([^()]*)\)", text)
    if match is None:
        return text.replace("``", ""), ""
    meaning = text[: match.start()] + text[match.end() :]
    return meaning.replace("``", ""), match[1]


def comparison_table(results: Sequence[Result]) -> Table:
    """One policy a line; the first is vanilla, which texts and traffic are compared with."""
    columns = ("experts", "max", "bytes", "votes kept", "forwards", "tokens", "tokens/s")
    has_reuse = any(result.coreset_reuse_rate is not None for result in results)
    columns += ("coresets kept", "votes lost") if has_reuse else ()
    columns += () if results[0].traffic is None else ("hits", "moved", "saved")
    table = plain_table("policy", "text", *columns, number_columns=columns)
    for result in results:
        same = result.tokens == results[0].tokens
        table.add_row(
            result.policy,
            "as vanilla" if same else "differs",
            f"{result.experts.mean:.1f} of {result.experts.total}",
            str(result.experts.max),
            format_bytes(result.expert_bytes),
            f"{result.vote_mass_kept:.3f}",
            str(result.forwards),
            str(result.new_tokens),
            f"{result.tokens_per_second:.1f}",
            *(_reuse_cells(result) if has_reuse else ()),
            *_traffic_cells(result, results[0]),
        )
    table.caption = "experts (unique) and their bytes are means over layers and decoding forwards"
    if results[0].traffic is not None:
        table.caption += "; moved: by all forwards, and the share of vanilla's saved by it"
    table.caption_justify = "left"
    return table


def _reuse_cells(result: Result) -> tuple[str, str]:
    """What a policy that keeps coresets kept and lost; of others nothing."""
    if result.coreset_reuse_rate is None or result.reuse_vote_loss is None:
        return "", ""
    return f"{result.coreset_reuse_rate:.1%}", f"{result.reuse_vote_loss:.2%}"


def _traffic_cells(result: Result, vanilla: Result) -> tuple[str, ...]:
    """Hits, bytes, and the share of vanilla's that was saved; nothing where all are in memory."""
    traffic = result.traffic
    if traffic is None:
        return ()
    saved = saved_share(result, vanilla)
    saved_cell = "" if saved is None else f"{saved:.1%}"
    return f"{traffic.hit_rate:.1%}", format_bytes(traffic.bytes_moved), saved_cell


def result_summary(result: Result, *, timed: bool) -> str:
    """One line under an answer; ``timed`` False where something else took time too."""
    speed = f"{result.seconds:.2f} s, {result.tokens_per_second:.1f} tokens/s, " if timed else ""
    return (
        f"{result.new_tokens} tokens in {result.forwards} forwards, {speed}"
        f"{result.experts.mean:.1f} of {result.experts.total} experts a layer ({result.policy})"
        f"{'' if result.traffic is None else describe_traffic(result.traffic)}"
    )


def describe_traffic(traffic: Traffic) -> str:
    """What was there, what came from where, and what was waited for it."""
    sources = (
        f"{format_bytes(transfer.bytes)} from {tier}"
        for tier, transfer in traffic.transfers.items()
    )
    stall = f", {traffic.stall_seconds:.2f} s waited" if traffic.stall_seconds else ""
    return f"; {traffic.hit_rate:.1%} were there, {' and '.join(sources) or 'none moved'}{stall}"


def print_text(text: str) -> None:
    """Plain text on standard output, flushed, so that a full disk or a closed pipe is noticed."""
    print(text, flush=True)


def print_note(note: str) -> None:
    """One line beside the output: on stderr, where the shell left it open."""
    if sys.stderr is not None:
        print(f"coterie: {note}", file=sys.stderr, flush=True)


def facts_table(facts: ModelInfo) -> Table:
    """What ``coterie inspect`` says, one fact a line."""
    table = Table.grid(padding=(0, 2))
    for name, value in fact_rows(facts):
        table.add_row(name, value)
    return table


def fact_rows(facts: ModelInfo) -> list[tuple[str, str]]:
    spec, size, router = facts.spec, facts.size, facts.spec.router
    dtype_name = str(facts.dtype).removeprefix("torch.")
    facts_so_far = [
        ("model", facts.name),
        ("family", f"{facts.family.title} ({facts.family.architecture})"),
        ("parameters", f"{size.parameters:,}, of which a token uses {size.active_parameters:,}"),
        ("layers", f"{spec.layers}, of which {len(spec.moe_layers)} have experts"),
        ("experts", f"{router.experts} a layer, {router.k} a token{_racing_note(spec)}"),
        ("hidden, expert, shared", f"{spec.hidden}, {spec.expert_width}, {spec.shared_width}"),
        ("heads", f"{spec.heads} of {spec.head_dim}, {spec.kv_heads} for keys and values"),
        ("vocabulary", f"{spec.vocabulary:,}"),
        ("mask id, end ids", f"{facts.mask_id}, {' '.join(map(str, facts.eos_ids)) or 'none'}"),
        (
            "experts kept in",
            spec.expert_storage if spec.expert_storage != UNQUANTISED else dtype_name,
        ),
        (f"weights in {dtype_name}", f"{format_bytes(size.bytes)} ({size.bytes:,} bytes)"),
        ("one expert", f"{format_bytes(size.expert_bytes)} ({size.expert_bytes:,} bytes)"),
        ("a layer's experts", format_bytes(size.layer_expert_bytes)),
        ("keys and values", f"{format_bytes(size.kv_bytes_per_token)} a position"),
    ]
    return facts_so_far + [
        (f"in {format_bytes(fit.memory)}", describe_fit(fit, router.experts, facts.kv_length))
        for fit in facts.fits
    ]


def _racing_note(spec: ModelSpec) -> str:
    """Of a model trained to route by block (LLaDA2.2); nothing chooses its policy by itself."""
    if not spec.capacity:
        return ""
    return f", trained with {spec.capacity} a block (--policy racing:m={spec.capacity})"


def describe_fit(fit: MemoryFit, num_experts: int, length: int) -> str:
    """What of a model fits beside one row of ``length`` positions."""
    if fit.experts < 0:
        return "does not fit, even without its experts"
    if fit.experts >= num_experts:
        return f"all of it, with a row of {length} positions"
    return f"all but the experts, and {fit.experts} of {num_experts} experts a layer"


def facts_document(facts: ModelInfo) -> dict[str, object]:
    """The same as JSON; sizes in bytes."""
    spec, size = facts.spec, facts.size
    return {
        "model": facts.name,
        "family": facts.family.name,
        "architecture": facts.family.architecture,
        "parameters": size.parameters,
        "active_parameters": size.active_parameters,
        "layers": spec.layers,
        "moe_layers": len(spec.moe_layers),
        "hidden": spec.hidden,
        "vocabulary": spec.vocabulary,
        "experts": spec.router.experts,
        "experts_per_token": spec.router.k,
        "expert_width": spec.expert_width,
        "shared_width": spec.shared_width,
        "mask_id": facts.mask_id,
        "eos_ids": list(facts.eos_ids),
        "dtype": str(facts.dtype).removeprefix("torch."),
        "expert_format": None if spec.expert_format is None else to_json(spec.expert_format),
        "experts_packed": spec.panels,
        "bytes": size.bytes,
        "expert_bytes": size.expert_bytes,
        "layer_expert_bytes": size.layer_expert_bytes,
        "cache_bytes_per_position": size.kv_bytes_per_token,
        "fits": [{"memory": fit.memory, "experts_per_layer": fit.experts} for fit in facts.fits],
    }


def format_bytes(size: float) -> str:
    """Bytes with three figures and a unit: 6291456 -> "6.00 MiB"."""
    unit = 0
    while size >= 1024 and unit < len(BYTE_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    if unit == 0:
        return f"{size:.0f} B"
    decimals = 2 if size < 10 else 1 if size < 100 else 0
    return f"{size:.{decimals}f} {BYTE_UNITS[unit]}"
