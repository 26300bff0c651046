"""The options of ``coterie eval`` alone."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from coterie.cli.options import DECODING_PANEL, MEMORY_PANEL, OUTPUT_PANEL, RUNTIME_PANEL
from coterie.lab.evals.tasks import TASKS
from coterie.lab.problems import PROBLEM_MAKERS as OWN

BENCHMARK_PANEL = "What to ask"
DEFAULT_PROBLEMS = 50  # problems of each of the package's own tasks

Tasks = Annotated[
    list[str] | None,
    typer.Option(
        "--task",
        help=f"Of {', '.join(TASKS)}; may be repeated. Default, for the model in the package: "
        f"{', '.join(OWN)}.",
        rich_help_panel=BENCHMARK_PANEL,
        show_default=False,
    ),
]
DataPath = Annotated[
    Path | None,
    typer.Option(
        "--data",
        help="The benchmark's file, its folder, or the folder above. "
        "Default: the folder that $COTERIE_DATA names, else the hub.",
        rich_help_panel=BENCHMARK_PANEL,
        show_default=False,
    ),
]
NumShots = Annotated[
    int | None,
    typer.Option(
        "--shots",
        min=0,
        help="Worked examples before each question. Default: as is usual for the model's family.",
        rich_help_panel=BENCHMARK_PANEL,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        "-n",
        min=1,
        help="Tokens to write at most. Default: as is usual for the task.",
        rich_help_panel=DECODING_PANEL,
    ),
]
NumProblems = Annotated[
    int | None,
    typer.Option(
        "--items",
        min=1,
        help=f"Problems to draw of each of {', '.join(OWN)}; default {DEFAULT_PROBLEMS}.",
        rich_help_panel=BENCHMARK_PANEL,
    ),
]
Seed = Annotated[
    int,
    typer.Option(
        "--seed",
        min=0,
        help="Of the problems drawn; with a temperature, of the tokens too.",
        rich_help_panel=BENCHMARK_PANEL,
    ),
]
Limit = Annotated[
    int | None,
    typer.Option(
        "--limit",
        min=1,
        help="Ask only so many items of each task.",
        rich_help_panel=BENCHMARK_PANEL,
    ),
]
ShuffleSeed = Annotated[
    int | None,
    typer.Option(
        "--shuffle-seed",
        min=0,
        help="Ask in an order drawn from this seed; with --limit, a sample.",
        rich_help_panel=BENCHMARK_PANEL,
    ),
]
TrustCode = Annotated[
    bool,
    typer.Option(
        "--trust-generated-code",
        help="Run what the model writes even where no sandbox can be had.",
        rich_help_panel=RUNTIME_PANEL,
    ),
]
DEFAULT_BATCH_SIZE = 16  # decoded together
BatchSize = Annotated[
    int | None,
    typer.Option(
        "--rows",
        min=1,
        help=f"Rows decoded together; default {DEFAULT_BATCH_SIZE}, and 1 where not all experts are in memory.",
        rich_help_panel=RUNTIME_PANEL,
    ),
]
ResetEvery = Annotated[
    int | None,
    typer.Option(
        "--memory-lasts",
        min=1,
        help="Empty that memory before every so many questions, and for each policy anew; default "
        "1: no answer depends on what was asked before.",
        rich_help_panel=MEMORY_PANEL,
    ),
]
OutputFolder = Annotated[
    Path | None,
    typer.Option(
        "--out",
        "-o",
        help="Folder for every answer, the record and a CSV; a run that stopped goes on there.",
        rich_help_panel=OUTPUT_PANEL,
        show_default=False,
    ),
]
CsvOutput = Annotated[
    bool, typer.Option("--csv", help="CSV on standard output.", rich_help_panel=OUTPUT_PANEL)
]
