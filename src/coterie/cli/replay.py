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
from coterie.cli.document import print_document
from coterie.cli.request import policy_of
from coterie.cli.tables import bar, console, plain_table, readable, remark
from coterie.engine.warm import read_votes
from coterie.experts.capacity import Capacity
from coterie.naming import CoterieError
from coterie.planning.booking import Memory, Play, Votes
from coterie.planning.machine import Machine, rate_of, sizes
from coterie.planning.overlap import Overlap
from coterie.planning.replay import CACHES, Grid, Replay, Replayed, replay
from coterie.planning.replay import decoding_only as only_decoding
from coterie.planning.trace import KINDS, Trace, is_trace, read
from coterie.results import record, write_record
from coterie.routing import check_keeps, check_layers, parse_policy

TITLE = "Replay"
ASKED = "What to replay"
MACHINE = "On what machine"

Traced = Annotated[Path, typer.Argument(metavar="TRACE", help="A file of `coterie trace`.")]
Caches = Annotated[
    str,
    typer.Option("--cache", help=f"Who leaves: of {', '.join(CACHES)}.", rich_help_panel=ASKED),
]
Capacities = Annotated[
    str,
    typer.Option(
        "--capacity",
        help="Fast memory for experts: a share of them (35%), slots a layer (47) or bytes (6GiB).",
        rich_help_panel=ASKED,
    ),
]
Drifts = Annotated[
    str | None,
    typer.Option(
        "--drift",
        help="A block keeps its coreset until that has lost this share of the votes: 0.05,0.1.",
        rich_help_panel=ASKED,
        show_default=False,
    ),
]
Warm = Annotated[
    Path | None,
    typer.Option(
        "--warm",
        help="Another trace, or a file of `coterie trace --votes`: slots start with the experts "
        "most voted for there.",
        rich_help_panel=ASKED,
        show_default=False,
    ),
]
Precisions = Annotated[
    str, typer.Option("--precision", help="bf16, int8, int4.", rich_help_panel=MACHINE)
]
Links = Annotated[
    str,
    typer.Option("--link", help="To where all experts lie: 25GB/s.", rich_help_panel=MACHINE),
]
Reads = Annotated[
    str | None,
    typer.Option(
        "--memory",
        help="At which experts in fast memory are read: 60GB/s. Default: computing takes no time.",
        rich_help_panel=MACHINE,
        show_default=False,
    ),
]
Rest = Annotated[
    float,
    typer.Option(
        "--rest",
        min=0.0,
        help="Milliseconds of a forward for all else: attention, router, shared experts, logits.",
        rich_help_panel=MACHINE,
    ),
]
Latency = Annotated[
    float,
    typer.Option(
        "--latency",
        min=0.0,
        help="Milliseconds that a layer's copies take beyond their bytes, where it has any.",
        rich_help_panel=MACHINE,
    ),
]
Beside = Annotated[
    float,
    typer.Option(
        "--overlap",
        min=0.0,
        max=1.0,
        help="How much of the shorter of computing and copying the longer hides: 1 beside a GPU's "
        "copy engine, less where the same cores check what comes.",
        rich_help_panel=MACHINE,
    ),
]
Weight = Annotated[
    str,
    typer.Option(
        "--expert-bytes", help="Of one expert; auto: as the trace knows.", rich_help_panel=MACHINE
    ),
]
Decoding = Annotated[
    bool,
    typer.Option(
        "--decoding-only",
        help="Leave out the forwards that only write keys: the prompt's, a finished block's.",
        rich_help_panel=ASKED,
    ),
]
Commits = Annotated[
    Literal["vanilla", "policy"] | None,
    typer.Option(
        "--commit",
        help="Routing of the pass that stores a finished block; default as it was traced.",
        rich_help_panel=ASKED,
        show_default=False,
    ),
]
Out = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="Folder for the record, a CSV and the figures.",
        rich_help_panel=o.SHOWING,
        show_default=False,
    ),
]
Csv = Annotated[
    bool, typer.Option("--csv", help="CSV on standard output.", rich_help_panel=o.SHOWING)
]


def replay_command(
    trace: Traced,
    *,
    policies: o.Policies = None,
    cache: Caches = "lru",
    capacity: Capacities = "25%,35%,50%",
    drift: Drifts = None,
    warm: Warm = None,
    commits: Commits = None,
    decoding_only: Decoding = False,
    precision: Precisions = "bf16",
    link: Links = "25GB/s",
    memory: Reads = None,
    rest: Rest = 0.0,
    latency: Latency = 0.0,
    overlap: Beside = 1.0,
    expert_bytes: Weight = "auto",
    out: Out = None,
    json: o.Json = False,
    csv: Csv = False,
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
    found = read(trace)
    if found.torn:
        remark(f"{trace}: its last forward was cut off and is left out")
    if commits is not None and (decoding_only or not policies):
        wanted = "without --decoding-only" if decoding_only else "with a --policy"
        raise CoterieError(f"--commit has an effect {wanted} only")
    found = only_decoding(found) if decoding_only else found
    routed = (commits or found.about.commit) == "policy"
    grid = Grid(
        plays(found, policies or (), drift, commits=routed),
        _listed(cache),
        [Capacity.parse(text, "--capacity") for text in _listed(capacity)],
        sizes(found.about.expert_bytes, _listed(precision), expert_bytes),
        machines(link, memory, rest, latency=latency, overlap=overlap),
        None if warm is None else warm_votes(warm, found),
    )
    with bar(MofNCompleteColumn(), TimeElapsedColumn()) as shown:
        task = shown.add_task("replaying", total=None)
        made = replay(
            found, grid, lambda done, whole: shown.update(task, completed=done, total=whole)
        )
    tell(found, trace, made, out=out, json=json, csv=csv)


def plays(trace: Trace, typed: Sequence[str], drift: str | None, *, commits: bool) -> list[Play]:
    """vanilla, then the policies, each once, and each again with every drift."""
    bounds = [_share(text) for text in _listed(drift)] if drift is not None else []
    named = list(dict.fromkeys(policy_of(text) for text in typed if policy_of(text) != "vanilla"))
    made = [Play(parse_policy("vanilla"))]
    for name in named:
        policy = parse_policy(name)
        check_layers(policy, len(trace.about.layers))
        made.append(Play(policy, commits=commits))
        if bounds:
            check_keeps(policy)
        made += [Play(policy, bound, commits) for bound in bounds]
    if bounds and not named:
        raise CoterieError("--drift keeps coresets: give a --policy that elects one")
    return made


def machines(
    link: str, memory: str | None, rest: float, *, latency: float, overlap: float
) -> dict[str, Machine]:
    """One for each link, by what was typed; milliseconds. Raises CoterieError for an overlap of
    copies with what takes no time."""
    if memory is None and overlap != 1:
        raise CoterieError(
            "--overlap has no effect where computing takes no time; give --memory as well"
        )
    pace = None if memory is None else rate_of(memory, "--memory")
    return {
        text: Machine(rate_of(text, "--link"), pace, rest / 1e3, overlap, latency / 1e3)
        for text in _listed(link)
    }


def warm_votes(path: Path, trace: Trace) -> Votes:
    """[L, E] of another trace, or of a file of votes; raises CoterieError for other sizes."""
    if is_trace(path):
        other = read(path)
        check_alike(path, other.about.model, (other.about.layers, other.about.experts), trace)
        return Memory.of(other).mean_votes
    saved = read_votes(path)
    check_alike(path, saved.model, (saved.layers, len(saved.votes[0])), trace)
    return np.array(saved.votes)


def check_alike(path: Path, model: str, size: tuple[tuple[int, ...], int], trace: Trace) -> None:
    """Raises unless layers and experts are those of the trace."""
    about = trace.about
    if size != (about.layers, about.experts):
        raise CoterieError(
            f"{path}: of {model}, with {len(size[0])} layers of {size[1]} experts; "
            f"the trace is of {about.model}, with {len(about.layers)} of {about.experts}"
        )


def tell(
    trace: Trace, path: Path, made: Replay, *, out: Path | None, json: bool, csv: bool
) -> None:
    """On standard output, for people or for programs; in the folder, where there is one."""
    content = document(trace, path, made)
    if out is not None:
        keep(out, content, made)
    if json:
        print_document(content)
    elif csv:
        sys.stdout.write(table_csv(made.points))
    else:
        console().print(points_table(made.points), "", overlap_table(made.overlaps), sep="\n")


def document(trace: Trace, path: Path, made: Replay) -> dict[str, object]:
    """All of it as JSON."""
    about = trace.about
    return {
        "trace": str(path),
        "torn": trace.torn,
        "model": about.model,
        "traced_under": about.policy,
        "plan": about.plan,
        "unmask": about.unmask,
        "layers": list(about.layers),
        "experts": about.experts,
        "prompts": dict(about.prompts),
        "made": dict(about.made),
        "forwards": {kind: sum(one.kind == kind for one in trace.forwards) for kind in KINDS},
        "steps_per_block": made.steps_per_block,
        "points": [point.document() for point in made.points],
        "overlap": {name: found.document() for name, found in made.overlaps.items()},
    }


def keep(out: Path, content: dict[str, object], made: Replay) -> None:
    """The record, the CSV and the figures beside each other."""
    path = write_record(out, record(TITLE, ["coterie", *sys.argv[1:]], [], facts=content))
    path.with_suffix(".csv").write_text(table_csv(made.points), encoding="utf-8")
    try:
        figures = import_module("coterie.planning.figures")
    except ModuleNotFoundError as error:
        remark(f"no figures without {error.name}: pip install 'coterie[lab]'")
        return
    drawn = figures.write(out, made)
    remark(", ".join(str(file) for file in (path, *drawn)))


def points_table(points: Sequence[Replayed]) -> Table:
    """One point a line."""
    numbers = ("slots", "experts", "loads", "hits", "moved", "saved", "ms", "stall", "votes kept")
    table = plain_table("policy", "cache", "precision", "link", *numbers, numbers=numbers)
    for point in points:
        told, traffic = point.document(), point.traffic
        table.add_row(
            *(str(told[name]) for name in ("policy", "cache", "precision", "link")),
            f"{point.slots} ({point.case.capacity.text})",
            f"{point.experts:.1f}",
            f"{point.loads:.2f}",
            f"{traffic.hit_rate:.1%}",
            readable(traffic.bytes_moved / traffic.forwards),
            "" if traffic.saved is None else f"{traffic.saved:.1%}",
            f"{1e3 * point.clock.forward:.3g}",
            f"{1e3 * point.clock.stall:.3g}",
            f"{point.votes_kept:.3f}" + ("" if point.fidelity == "exact" else " ~"),
        )
    table.caption = (
        "experts and loads: of a layer in a forward that decodes; moved, ms, stall: of all "
        "forwards, laid on these; saved: against vanilla under lru in the same slots; ~: from "
        "votes in few bits"
    )
    table.caption_justify = "left"
    return table


def overlap_table(overlaps: Mapping[str, Overlap]) -> Table:
    """How alike consecutive forwards are, one policy a line."""
    columns = ("steps", "experts alike", "votes alike", "blocks", "experts", "votes")
    table = plain_table("policy", *columns, numbers=columns)
    for name, one in overlaps.items():
        table.add_row(
            name,
            *(str(one.steps), _told(one.mean("step_jaccard")), _told(one.mean("step_cosine"))),
            *(str(one.blocks), _told(one.mean("block_jaccard")), _told(one.mean("block_cosine"))),
        )
    table.caption = (
        "alike from one step of a block to the next, and from a block's last step to the next "
        "block's first: experts by Jaccard's index, votes by their cosine"
    )
    table.caption_justify = "left"
    return table


def table_csv(points: Sequence[Replayed]) -> str:
    """The points as CSV, with the names of the JSON."""
    rows = [point.document() for point in points]
    text = io.StringIO()
    table = writing.DictWriter(text, list(rows[0]), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


def _listed(text: str) -> list[str]:
    """What commas separate, each once."""
    found = list(dict.fromkeys(part.strip() for part in text.split(",") if part.strip()))
    if not found:
        raise CoterieError(f"{text!r} lists nothing")
    return found


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise CoterieError(f"--drift {text!r}: say a share of the votes below 1, such as 0.05")
    return value


def _told(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
