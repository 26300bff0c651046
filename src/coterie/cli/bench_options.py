"""The options of ``coterie bench``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from coterie.cli import options as o
from coterie.lab.bench.baselines import BASELINES
from coterie.lab.bench.shapes import SHAPES

NO_BASELINE = "none"
DEFAULT_POLICIES = ("des-vote:beta=0.5", "des-vote:beta=0.3", "des-vote:beta=0.15", "des-seq:k=3")

ShapeName = Annotated[
    str,
    typer.Option(
        "--shape",
        help=f"Of a published model: {', '.join(SHAPES)}.",
        rich_help_panel=o.RUNTIME_PANEL,
    ),
]
ExpertDtype = Annotated[
    Literal["fp32", "bf16", "int8", "int4"],
    typer.Option("--dtype", help="What the experts are kept in.", rich_help_panel=o.RUNTIME_PANEL),
]
PolicySpecs = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        "-p",
        help="May be repeated; default vanilla and des-vote at the paper's sizes.",
        rich_help_panel=o.DECODING_PANEL,
        show_default=False,
    ),
]
Repeats = Annotated[int, typer.Option("--turns", min=1, help="Samples of each work.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", min=1, help="Of ours and of each peer; default as PyTorch's."),
]
Tokens = Annotated[int, typer.Option("--tokens", min=1, help="Of the block.")]
Layers = Annotated[
    int | None,
    typer.Option("--layers", min=1, help="The model's first so many layers; default all."),
]
OutputFolder = Annotated[
    Path, typer.Option("--out", "-o", help="Folder of the record and its figures.")
]
BaselineNames = Annotated[
    list[str] | None,
    typer.Option(
        "--peer",
        help=f"Only this one, of {', '.join(BASELINES)}, or {NO_BASELINE}; may be repeated. "
        "Default: those that are installed.",
        show_default=False,
    ),
]
BaselinePythons = Annotated[
    list[str] | None,
    typer.Option(
        "--peer-python",
        metavar="NAME=PATH",
        help="The Python that has a peer; default .peers/NAME, which scripts/peers makes.",
    ),
]
UniformRouting = Annotated[
    bool, typer.Option("--even", help="A router that prefers nobody, in place of a skewed one.")
]
IncludeSlow = Annotated[bool, typer.Option("--slow", help="Works that take a second a turn, too.")]
BaselineMemory = Annotated[
    float | None,
    typer.Option("--memory", min=0.1, help="GiB for peers that sit together; default: free."),
]
ContextLength = Annotated[int, typer.Option("--context", min=0, help="Positions before the block.")]
NumLogits = Annotated[
    str,
    typer.Option(
        "--wanted",
        metavar="N|block",
        help="Positions whose logits a forward makes; block: those still masked, as 8 forwards "
        "fill a block evenly, and a sample is their mean.",
    ),
]
Seed = Annotated[int, typer.Option("--seed", min=0, help="Of weights and tokens.")]
RandomModelShape = Annotated[
    str | None,
    typer.Option(
        "--shape",
        help=f"A random model in place of --model: {', '.join(SHAPES)}.",
        rich_help_panel=o.RUNTIME_PANEL,
    ),
]
AnyDtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="As elsewhere; with --shape what the experts are kept in: fp32, bf16, int8, int4.",
        rich_help_panel=o.RUNTIME_PANEL,
        show_default=False,
    ),
]
ComparedPolicies = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        "-p",
        help=f"May be repeated; vanilla always runs too. Default {', '.join(DEFAULT_POLICIES)}.",
        rich_help_panel=o.DECODING_PANEL,
        show_default=False,
    ),
]
MaxNewTokens = Annotated[
    int, typer.Option("--tokens", min=1, help="Tokens to write at most, for each prompt.")
]
PromptTexts = Annotated[
    list[str] | None,
    typer.Option("--prompt", help="May be repeated, in place of held-out problems."),
]
NumPrompts = Annotated[
    int | None, typer.Option("--prompts", min=1, help="How many prompts; default 8.")
]
PromptLength = Annotated[
    int | None,
    typer.Option("--length", min=1, help="Tokens of a random model's prompts; default 64."),
]
RecordFiles = Annotated[list[Path], typer.Argument(help="Records that a bench has written.")]
