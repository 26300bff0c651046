"""``coterie eval --task text``: the likelihood of given text under several policies."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from rich.progress import MofNCompleteColumn, TimeRemainingColumn
from rich.table import Table

from coterie.cli import output
from coterie.cli.options import TEXT_TASK
from coterie.engine.engine import Engine
from coterie.errors import ConfigError
from coterie.files import atomic_write
from coterie.keys import to_json
from coterie.lab.evals.text import (
    TextSummary,
    read_text_data,
    score_text,
    summarize_text,
    text_identity,
)
from coterie.lab.journal import Journal
from coterie.lab.likelihood.estimator import LikelihoodEstimator
from coterie.lab.records import write_record
from coterie.offload.capacity import format_bytes

TITLE, JOURNAL_FILE = "Bits a byte by policy", "text.jsonl"
DEFAULT_SAMPLES = 1
OPTIONS = ("task", "data", "limit", "seed", "samples", "block", "kv_cache", "commit_routing")


def check_options(options: Mapping[str, object]) -> None:
    """Raises ConfigError for other tasks beside the text, and for an option without effect."""
    if options["task"] != [TEXT_TASK]:
        raise ConfigError(f"--task {TEXT_TASK} reports bits, not answers: it runs alone")
    for name, value in options.items():
        if name not in OPTIONS and value is not None:
            raise ConfigError(f"`{name}` has no effect on --task {TEXT_TASK}")


def evaluate_text(
    engine: Engine, data: Path | None, policies: Sequence[str], *, samples: int | None, seed: int,
    limit: int | None, batch_size: int, out: Path | None, json: bool, csv: bool,
) -> None:  # fmt: skip
    """Scores all passages, and prints one line a policy, or a document."""
    if data is None:
        raise ConfigError("--task text needs --data FILE or FOLDER: the text")
    text = read_text_data(data, engine, limit)
    estimator = LikelihoodEstimator(engine, samples or DEFAULT_SAMPLES, seed)
    identity = text_identity(estimator, text)
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    file = None if out is None else out / JOURNAL_FILE
    columns = MofNCompleteColumn(), TimeRemainingColumn(compact=True)
    with (
        output.resumable(Journal(file, {**identity, "rows": batch_size})) as journal,
        output.counted_progress("passages", *columns) as on_score,
    ):
        scores = score_text(
            estimator, text.passages, policies, journal, batch_size=batch_size, on_score=on_score
        )
    summaries = summarize_text(engine.model, text.passages, policies, scores)
    document = {"model": engine.model.name, "run": identity, "policies": to_json(summaries)}
    rows = output.format_csv([csv_row(summary) for summary in summaries])
    if out is not None:
        device = str(engine.model.transformer.device)
        path = write_record(out, output.command_record(TITLE, document, device=device))
        atomic_write(path.with_suffix(".csv"), rows.encode())
        output.print_note(f"{path}, {path.stem}.csv")
    if csv:
        output.print_text(rows, end="")
    else:
        output.print_result(document, text_table(summaries), json=json)


def text_table(summaries: Sequence[TextSummary]) -> Table:
    """One policy a line."""
    numbers = ("bits/byte", "95 %", "noise", "bits/token", "rise", "rise, 95 %")
    table = output.plain_table("policy", numbers=(*numbers, "experts", "bytes", "votes kept"))
    for each in summaries:
        bits, rise, interval = each.bits_per_byte, each.rise, each.rise_interval
        table.add_row(
            each.policy,
            f"{bits.value:.4f}",
            f"{bits.interval[0]:.4f} to {bits.interval[1]:.4f}",
            "" if bits.noise is None else f"{bits.noise:.4f}",
            f"{each.bits_per_token.value:.4f}",
            "" if rise is None else f"{rise:+.2%}",
            "" if interval is None else f"{interval[0]:+.2%} to {interval[1]:+.2%}",
            f"{each.experts:.1f}",
            format_bytes(each.expert_bytes),
            f"{each.vote_mass_kept:.3f}",
        )
    return table


def csv_row(summary: TextSummary) -> dict[str, object]:
    """The summary with one column for each number."""
    row: dict[str, object] = {}
    for name, value in to_json(summary).items():
        for part, number in (value if isinstance(value, dict) else {"": value}).items():
            column = f"{name} {part}".strip()
            low, high = number if isinstance(number, tuple) else (None, None)
            row |= (
                {column: number} if low is None else {f"{column}_low": low, f"{column}_high": high}
            )
    return row
