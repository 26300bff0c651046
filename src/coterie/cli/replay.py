"""``coterie replay``: predicts traffic and time with a small expert memory, from a trace."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from rich.progress import MofNCompleteColumn, TimeElapsedColumn
from rich.table import Table

from coterie.cli import options as o
from coterie.cli import output
from coterie.cli.engine_options import VANILLA, check_reuse, distinct_policies, load_votes
from coterie.errors import ConfigError
from coterie.files import atomic_write
from coterie.lab.records import write_record
from coterie.lab.replay.cache_simulation import ReplayPolicy, VoteArray
from coterie.lab.replay.hardware_model import expert_sizes, hardware_models
from coterie.lab.replay.replay import ReplayGrid, ReplayPoint, ReplayResult, StepOverlap, replay
from coterie.lab.replay.replay import decoding_only as only_decoding
from coterie.lab.replay.trace import Trace
from coterie.lab.replay.trace_file import read_trace
from coterie.offload.capacity import Capacity, format_bytes
from coterie.routing import check_layers, parse_policy

RESULTS_CAPTION = (
    "experts and loads: of a layer in a decoding forward; moved, ms and stall: of all forwards, "
    "per decoding one; saved: against vanilla with lru and the same slots; ~: from rounded votes"
)
OVERLAP_CAPTION = (
    "similarity of one step of a block and the next, and of a block's last step and the next "
    "block's first: experts by Jaccard index, votes by cosine"
)


@dataclass(frozen=True)
class HardwareOptions:
    """The machine of a replay."""

    expert_dtype: str = "bf16"
    link_bandwidth: str = "25GB/s"
    memory_bandwidth: str | None = None
    transfer_latency_ms: float = 0.0
    other_ms: float = 0.0
    overlap: float = 1.0
    expert_bytes: str = "auto"


def replay_command(
    path: Path, *, policies: list[str] | None = None, eviction: str = "lru",
    expert_memory: str = "25%,35%,50%", coreset_reuse: str | None = None,
    warm_start: Path | None = None, commit_routing: o.RoutingMode | None = None,
    decoding_only: bool = False, machine: HardwareOptions, out: Path | None = None,
    json: bool = False, csv: bool = False,
) -> None:  # fmt: skip
    """Predict hit rate, bytes and milliseconds with a small expert memory, without the model.

    Replays every policy with every eviction policy, memory, format and link. A layer takes
    max(hits / memory, latency + misses / link) + misses / memory, in bytes; with --overlap 0 the
    sum of all three. By default computing takes no time: ms are those of a PCIe 4 link.

    \b
    coterie replay mini.trace -p des-vote:beta=0.15 -p resident-vote:beta=0.15
    coterie replay mini.trace --eviction lru,votes,belady --expert-memory 47
    """
    output.check_one_format(json=json, csv=csv)
    if out is not None:
        output.check_output_file(out / "replay.csv", new_folder=True)
    trace = read_trace(path)
    if trace.truncated:
        output.print_note(f"{path}: its last forward is incomplete and left out")
    if commit_routing is not None and (decoding_only or not policies):
        requirement = "without --decoding-only" if decoding_only else "with a --policy"
        raise ConfigError(f"--commit-routing has an effect {requirement} only")
    trace = only_decoding(trace) if decoding_only else trace
    commits_routed = (commit_routing or trace.header.commit_routing) == "policy"
    header, formats = trace.header, _split_list(machine.expert_dtype)
    grid = ReplayGrid(
        replay_policies(trace, policies or (), coreset_reuse, commits_routed=commits_routed),
        _split_list(eviction),
        [Capacity.parse(text, "--expert-memory") for text in _split_list(expert_memory)],
        expert_sizes(header.expert_bytes, formats, machine.expert_bytes),
        hardware_models(
            _split_list(machine.link_bandwidth), machine.memory_bandwidth, machine.other_ms,
            latency_ms=machine.transfer_latency_ms, overlap=machine.overlap,
        ),
        None if warm_start is None else warm_start_votes(warm_start, trace),
    )  # fmt: skip
    columns = (MofNCompleteColumn(), TimeElapsedColumn())
    with output.counted_progress("replaying", *columns) as on_progress:
        results = replay(trace, grid, on_progress)
    content = results.to_dict(trace, path)
    table = output.format_csv([point.to_dict() for point in results.points])
    if csv:
        output.print_text(table, end="")
    else:
        tables = (results_table(results.points), "", overlap_table(results.overlaps))
        output.print_result(content, *tables, json=json)
    if out is not None:
        _save_results(out, content, table, results)


def replay_policies(
    trace: Trace, specs: Sequence[str], coreset_reuse: str | None, *, commits_routed: bool
) -> list[ReplayPolicy]:
    """Vanilla and the policies, each once, and each again for every share of --coreset-reuse."""
    shares = [] if coreset_reuse is None else [_parse_share(s) for s in _split_list(coreset_reuse)]
    others = [spec for spec in distinct_policies(specs) if spec != VANILLA]
    replay_list = [ReplayPolicy(parse_policy(VANILLA))]
    for policy in map(parse_policy, others):
        check_layers(policy, len(trace.header.layers))
        replay_list.append(ReplayPolicy(policy, routes_commits=commits_routed))
        replay_list += [ReplayPolicy(policy, share, commits_routed) for share in shares]
    if shares:
        check_reuse(others)
    return replay_list


def warm_start_votes(path: Path, trace: Trace) -> VoteArray:
    """[L, E] of another trace or of a file of votes; raises ConfigError for other sizes."""
    saved, header = load_votes(path), trace.header
    layers, experts = saved.layers, len(saved.votes[0])
    if (tuple(layers), experts) != (tuple(header.layers), header.experts):
        raise ConfigError(
            f"{path}: of {saved.model}, with {len(layers)} layers of {experts} experts; "
            f"the trace is of {header.model}, with {len(header.layers)} of {header.experts}"
        )
    return np.array(saved.votes)


def _save_results(out: Path, content: output.Document, table: str, results: ReplayResult) -> None:
    """The record, the CSV, and the figures where matplotlib is installed."""
    path = write_record(out, output.command_record("Replay", content))
    atomic_write(path.with_suffix(".csv"), table.encode())
    try:
        plots = output.require_extra("coterie.lab.replay.plots", "a figure")
        output.print_note(", ".join(map(str, (path, *plots.write_figures(out, results)))))
    except ConfigError as error:
        output.print_note(f"{path}; {error}")


def results_table(points: Sequence[ReplayPoint]) -> Table:
    """One point a line."""
    rows = []
    for point in points:
        values, traffic, saved = point.to_dict(), point.traffic, point.traffic.fraction_saved
        rows.append((
            *(str(values[name]) for name in ("policy", "cache", "precision", "link")),
            f"{point.slots} ({point.case.capacity.text})", f"{point.experts:.1f}",
            f"{point.loads:.2f}", f"{traffic.hit_rate:.1%}",
            format_bytes(traffic.bytes_moved / traffic.forwards),
            "" if saved is None else f"{saved:.1%}", f"{values['ms']:.3g}",
            f"{values['stall_ms']:.3g}",
            f"{point.vote_share:.3f}" + ("" if point.fidelity == "exact" else " ~"),
        ))  # fmt: skip
    counts = ("slots", "experts", "loads", "hit rate", "moved", "bytes saved")
    return output.plain_table(
        "policy", "eviction", "format", "link", numbers=(*counts, "ms", "stall", "votes kept"),
        rows=rows, caption=RESULTS_CAPTION,
    )  # fmt: skip


def overlap_table(overlaps: Mapping[str, StepOverlap]) -> Table:
    """The similarity of consecutive forwards, one policy a line."""
    rows = []
    for name, overlap in overlaps.items():
        keys = ("step_jaccard", "step_cosine", "block_jaccard", "block_cosine")
        means = ["" if (mean := overlap.mean(key)) is None else f"{mean:.3f}" for key in keys]
        rows.append((name, str(overlap.steps), *means[:2], str(overlap.blocks), *means[2:]))
    numbers = ("steps", "experts alike", "votes alike", "blocks", "experts", "votes")
    return output.plain_table("policy", numbers=numbers, rows=rows, caption=OVERLAP_CAPTION)


def _split_list(text: str) -> list[str]:
    """The parts between commas, each once."""
    parts = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not parts:
        raise ConfigError(f"{text!r} is an empty list")
    return parts


def _parse_share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        reason = "not a share of the votes below 1, such as 0.05"
        raise ConfigError(f"--coreset-reuse {text!r}: {reason}")
    return value
