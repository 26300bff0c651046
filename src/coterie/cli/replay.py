"""``coterie replay``: what a machine with little fast memory would move, from a trace alone."""

from __future__ import annotations

import csv as writing
import io
import sys
from collections.abc import Mapping, Sequence
from importlib import import_module
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import typer
from rich.progress import MofNCompleteColumn, TimeElapsedColumn
from rich.table import Table

from coterie.cli import options as o
from coterie.cli.engine_options import canonical_policy
from coterie.cli.json_output import print_document
from coterie.cli.tables import console, format_bytes, plain_table, print_note, progress_bar
from coterie.errors import CoterieError
from coterie.lab.records import make_record, write_record
from coterie.lab.replay.cache_simulation import ReplayPolicy, TraceVotes, VoteArray
from coterie.lab.replay.hardware_model import HardwareModel, expert_sizes, parse_bandwidth
from coterie.lab.replay.overlap import StepOverlap
from coterie.lab.replay.replay import EVICTION_NAMES, ReplayGrid, ReplayPoint, ReplayResult, replay
from coterie.lab.replay.replay import decoding_only as only_decoding
from coterie.lab.replay.trace import KINDS, Trace, is_trace, read_trace
from coterie.loading.saved_votes import read_votes
from coterie.offload.capacity import Capacity
from coterie.routing import check_coreset_reuse, check_layers, parse_policy

RECORD_TITLE = "Replay"
REPLAY_PANEL = "What to replay"
HARDWARE_PANEL = "On what machine"

TraceFile = Annotated[Path, typer.Argument(metavar="TRACE", help="A file of `coterie trace`.")]
Evictions = Annotated[
    str,
    typer.Option(
        "--cache", help=f"Who leaves: of {', '.join(EVICTION_NAMES)}.", rich_help_panel=REPLAY_PANEL
    ),
]
Capacities = Annotated[
    str,
    typer.Option(
        "--capacity",
        help="Fast memory for experts: a share of them (35%), slots a layer (47) or bytes (6GiB).",
        rich_help_panel=REPLAY_PANEL,
    ),
]
ReuseTolerances = Annotated[
    str | None,
    typer.Option(
        "--drift",
        help="A block keeps its coreset until that has lost this share of the votes: 0.05,0.1.",
        rich_help_panel=REPLAY_PANEL,
        show_default=False,
    ),
]
WarmStart = Annotated[
    Path | None,
    typer.Option(
        "--warm",
        help="Another trace, or a file of `coterie trace --votes`: slots start with the experts "
        "most voted for there.",
        rich_help_panel=REPLAY_PANEL,
        show_default=False,
    ),
]
ExpertDtypes = Annotated[
    str, typer.Option("--precision", help="bf16, int8, int4.", rich_help_panel=HARDWARE_PANEL)
]
LinkBandwidths = Annotated[
    str,
    typer.Option(
        "--link", help="To where all experts lie: 25GB/s.", rich_help_panel=HARDWARE_PANEL
    ),
]
MemoryBandwidth = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="At which experts in fast memory are read: 60GB/s. Default: computing takes no time.",
        rich_help_panel=HARDWARE_PANEL,
        show_default=False,
    ),
]
OtherMilliseconds = Annotated[
    float,
    typer.Option(
        "--rest",
        min=0.0,
        help="Milliseconds of a forward for all else: attention, router, shared experts, logits.",
        rich_help_panel=HARDWARE_PANEL,
    ),
]
TransferLatency = Annotated[
    float,
    typer.Option(
        "--latency",
        min=0.0,
        help="Milliseconds that a layer's copies take beyond their bytes, where it has any.",
        rich_help_panel=HARDWARE_PANEL,
    ),
]
OverlapFactor = Annotated[
    float,
    typer.Option(
        "--overlap",
        min=0.0,
        max=1.0,
        help="How much of the shorter of computing and copying the longer hides: 1 beside a GPU's "
        "copy engine, less where the same cores check what comes.",
        rich_help_panel=HARDWARE_PANEL,
    ),
]
ExpertBytes = Annotated[
    str,
    typer.Option(
        "--expert-bytes",
        help="Of one expert; auto: as the trace knows.",
        rich_help_panel=HARDWARE_PANEL,
    ),
]
DecodingOnly = Annotated[
    bool,
    typer.Option(
        "--decoding-only",
        help="Leave out the forwards that only write keys: the prompt's, a finished block's.",
        rich_help_panel=REPLAY_PANEL,
    ),
]
CommitRouting = Annotated[
    Literal["vanilla", "policy"] | None,
    typer.Option(
        "--commit",
        help="Routing of the pass that stores a finished block; default as it was traced.",
        rich_help_panel=REPLAY_PANEL,
        show_default=False,
    ),
]
OutputFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="Folder for the record, a CSV and the figures.",
        rich_help_panel=o.OUTPUT_PANEL,
        show_default=False,
    ),
]
CsvOutput = Annotated[
    bool, typer.Option("--csv", help="CSV on standard output.", rich_help_panel=o.OUTPUT_PANEL)
]


def replay_command(
    path: TraceFile,
    *,
    policies: o.PolicySpecs = None,
    evictions: Evictions = "lru",
    capacities: Capacities = "25%,35%,50%",
    reuse_tolerances: ReuseTolerances = None,
    warm_start: WarmStart = None,
    commit_routing: CommitRouting = None,
    decoding_only: DecodingOnly = False,
    expert_dtypes: ExpertDtypes = "bf16",
    link_bandwidths: LinkBandwidths = "25GB/s",
    memory_bandwidth: MemoryBandwidth = None,
    other_ms: OtherMilliseconds = 0.0,
    latency_ms: TransferLatency = 0.0,
    overlap: OverlapFactor = 1.0,
    expert_bytes: ExpertBytes = "auto",
    out: OutputFolder = None,
    json: o.JsonOutput = False,
    csv: CsvOutput = False,
) -> None:
    """Predict hits, bytes and milliseconds where not all experts fit, without weights or GPU.

    Every policy with every cache, capacity, precision and link; lists are separated by commas. How
    alike the experts of one step and the next are is told beside it.

    A layer takes as long as what is there is computed, or as the copies take if that is longer,
    and then as long as computing what has come: max(hits / memory, latency + misses / link) +
    misses / memory, in bytes. With --overlap 0 it takes the sum of all three. The defaults are a
    PCIe 4 link and arithmetic that takes no time: ms are then the copies' alone. On a machine at
    hand `scripts/offload` learns all five.

    \b
    coterie replay mini.trace -p des-vote:beta=0.15 -p resident-vote:beta=0.15
    coterie replay mini.trace --cache lru,votes,belady --capacity 47 --link 12GB/s,25GB/s
    """
    if json and csv:
        raise CoterieError("--json and --csv both want standard output; give one of them")
    trace = read_trace(path)
    if trace.truncated:
        print_note(f"{path}: its last forward was cut off and is left out")
    if commit_routing is not None and (decoding_only or not policies):
        requirement = "without --decoding-only" if decoding_only else "with a --policy"
        raise CoterieError(f"--commit has an effect {requirement} only")
    trace = only_decoding(trace) if decoding_only else trace
    commits_routed = (commit_routing or trace.header.commit_routing) == "policy"
    grid = ReplayGrid(
        replay_policies(trace, policies or (), reuse_tolerances, commits_routed=commits_routed),
        _split_list(evictions),
        [Capacity.parse(text, "--capacity") for text in _split_list(capacities)],
        expert_sizes(trace.header.expert_bytes, _split_list(expert_dtypes), expert_bytes),
        hardware_models(
            link_bandwidths, memory_bandwidth, other_ms, latency_ms=latency_ms, overlap=overlap
        ),
        None if warm_start is None else warm_start_votes(warm_start, trace),
    )
    with progress_bar(MofNCompleteColumn(), TimeElapsedColumn()) as progress:
        task = progress.add_task("replaying", total=None)
        results = replay(
            trace, grid, lambda done, whole: progress.update(task, completed=done, total=whole)
        )
    print_results(trace, path, results, out=out, json=json, csv=csv)


def replay_policies(
    trace: Trace, specs: Sequence[str], reuse_tolerances: str | None, *, commits_routed: bool
) -> list[ReplayPolicy]:
    """vanilla, then the policies, each once, and each again with every drift."""
    tolerances = (
        [_parse_tolerance(text) for text in _split_list(reuse_tolerances)]
        if reuse_tolerances is not None
        else []
    )
    policy_specs = list(
        dict.fromkeys(
            canonical_policy(text) for text in specs if canonical_policy(text) != "vanilla"
        )
    )
    policies = [ReplayPolicy(parse_policy("vanilla"))]
    for spec in policy_specs:
        policy = parse_policy(spec)
        check_layers(policy, len(trace.header.layers))
        policies.append(ReplayPolicy(policy, routes_commits=commits_routed))
        if tolerances:
            check_coreset_reuse(policy)
        policies += [ReplayPolicy(policy, tolerance, commits_routed) for tolerance in tolerances]
    if tolerances and not policy_specs:
        raise CoterieError("--drift keeps coresets: give a --policy that elects one")
    return policies


def hardware_models(
    link_bandwidths: str,
    memory_bandwidth: str | None,
    other_ms: float,
    *,
    latency_ms: float,
    overlap: float,
) -> dict[str, HardwareModel]:
    """One for each link, by what was typed; milliseconds. Raises CoterieError for an overlap of
    copies with what takes no time."""
    if memory_bandwidth is None and overlap != 1:
        raise CoterieError(
            "--overlap has no effect where computing takes no time; give --memory as well"
        )
    bytes_per_second = (
        None if memory_bandwidth is None else parse_bandwidth(memory_bandwidth, "--memory")
    )
    return {
        text: HardwareModel(
            parse_bandwidth(text, "--link"),
            bytes_per_second,
            other_ms / 1e3,
            overlap,
            latency_ms / 1e3,
        )
        for text in _split_list(link_bandwidths)
    }


def warm_start_votes(path: Path, trace: Trace) -> VoteArray:
    """[L, E] of another trace, or of a file of votes; raises CoterieError for other sizes."""
    if is_trace(path):
        other_trace = read_trace(path)
        check_same_sizes(
            path,
            other_trace.header.model,
            (other_trace.header.layers, other_trace.header.experts),
            trace,
        )
        return TraceVotes.of(other_trace).mean_votes
    saved_votes = read_votes(path)
    check_same_sizes(
        path, saved_votes.model, (saved_votes.layers, len(saved_votes.votes[0])), trace
    )
    return np.array(saved_votes.votes)


def check_same_sizes(
    path: Path, model: str, sizes: tuple[tuple[int, ...], int], trace: Trace
) -> None:
    """Raises unless layers and experts are those of the trace."""
    about = trace.header
    if sizes != (about.layers, about.experts):
        raise CoterieError(
            f"{path}: of {model}, with {len(sizes[0])} layers of {sizes[1]} experts; "
            f"the trace is of {about.model}, with {len(about.layers)} of {about.experts}"
        )


def print_results(
    trace: Trace, path: Path, results: ReplayResult, *, out: Path | None, json: bool, csv: bool
) -> None:
    """On standard output, for people or for programs; in the folder, where there is one."""
    content = results_document(trace, path, results)
    if out is not None:
        save_results(out, content, results)
    if json:
        print_document(content)
    elif csv:
        sys.stdout.write(results_csv(results.points))
    else:
        console().print(
            results_table(results.points), "", overlap_table(results.overlaps), sep="\n"
        )


def results_document(trace: Trace, path: Path, results: ReplayResult) -> dict[str, object]:
    """All of it as JSON."""
    about = trace.header
    return {
        "trace": str(path),
        "torn": trace.truncated,
        "model": about.model,
        "traced_under": about.policy,
        "plan": about.plan,
        "unmask": about.unmask,
        "layers": list(about.layers),
        "experts": about.experts,
        "prompts": dict(about.prompts),
        "made": dict(about.provenance),
        "forwards": {
            kind: sum(forward.kind == kind for forward in trace.forwards) for kind in KINDS
        },
        "steps_per_block": results.steps_per_block,
        "points": [result.to_dict() for result in results.points],
        "overlap": {name: overlap.to_dict() for name, overlap in results.overlaps.items()},
    }


def save_results(out: Path, content: dict[str, object], results: ReplayResult) -> None:
    """The record, the CSV and the figures beside each other."""
    path = write_record(
        out, make_record(RECORD_TITLE, ["coterie", *sys.argv[1:]], [], facts=content)
    )
    path.with_suffix(".csv").write_text(results_csv(results.points), encoding="utf-8")
    try:
        plotting = import_module("coterie.lab.replay.plots")
    except ModuleNotFoundError as error:
        print_note(f"no figures without {error.name}: pip install 'coterie[lab]'")
        return
    figure_paths = plotting.write_figures(out, results)
    print_note(", ".join(str(file) for file in (path, *figure_paths)))


def results_table(results: Sequence[ReplayPoint]) -> Table:
    """One point a line."""
    number_columns = (
        "slots",
        "experts",
        "loads",
        "hits",
        "moved",
        "saved",
        "ms",
        "stall",
        "votes kept",
    )
    table = plain_table(
        "policy", "cache", "precision", "link", *number_columns, number_columns=number_columns
    )
    for result in results:
        values, traffic = result.to_dict(), result.traffic
        table.add_row(
            *(str(values[name]) for name in ("policy", "cache", "precision", "link")),
            f"{result.slots} ({result.case.capacity.text})",
            f"{result.experts:.1f}",
            f"{result.loads:.2f}",
            f"{traffic.hit_rate:.1%}",
            format_bytes(traffic.bytes_moved / traffic.forwards),
            "" if traffic.fraction_saved is None else f"{traffic.fraction_saved:.1%}",
            f"{1e3 * result.predicted_time.forward_seconds:.3g}",
            f"{1e3 * result.predicted_time.stall_seconds:.3g}",
            f"{result.vote_share:.3f}" + ("" if result.fidelity == "exact" else " ~"),
        )
    table.caption = (
        "experts and loads: of a layer in a forward that decodes; moved, ms, stall: of all "
        "forwards, laid on these; saved: against vanilla under lru in the same slots; ~: from "
        "votes in few bits"
    )
    table.caption_justify = "left"
    return table


def overlap_table(overlaps: Mapping[str, StepOverlap]) -> Table:
    """How alike consecutive forwards are, one policy a line."""
    columns = ("steps", "experts alike", "votes alike", "blocks", "experts", "votes")
    table = plain_table("policy", *columns, number_columns=columns)
    for name, overlap in overlaps.items():
        table.add_row(
            name,
            *(
                str(overlap.steps),
                _format_optional(overlap.mean("step_jaccard")),
                _format_optional(overlap.mean("step_cosine")),
            ),
            *(
                str(overlap.blocks),
                _format_optional(overlap.mean("block_jaccard")),
                _format_optional(overlap.mean("block_cosine")),
            ),
        )
    table.caption = (
        "alike from one step of a block to the next, and from a block's last step to the next "
        "block's first: experts by Jaccard's index, votes by their cosine"
    )
    table.caption_justify = "left"
    return table


def results_csv(results: Sequence[ReplayPoint]) -> str:
    """The points as CSV, with the names of the JSON."""
    rows = [result.to_dict() for result in results]
    output = io.StringIO()
    writer = writing.DictWriter(output, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return output.getvalue()


def _split_list(text: str) -> list[str]:
    """What commas separate, each once."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise CoterieError(f"{text!r} lists nothing")
    return parts


def _parse_tolerance(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise CoterieError(f"--drift {text!r}: say a share of the votes below 1, such as 0.05")
    return value


def _format_optional(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
