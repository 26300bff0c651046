"""The options that commands share, each said once."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from coterie.decoding.kv_schemes import PLANS
from coterie.decoding.unmask import RULES
from coterie.loading.low_precision import PRECISION_POLICIES
from coterie.offload.eviction import EVICTIONS

DECODING_PANEL = "How to decode"
RUNTIME_PANEL = "What to run it on"
MEMORY_PANEL = "Which experts to keep in memory"
OUTPUT_PANEL = "What to show"

Prompt = Annotated[str, typer.Argument(help="The question; - reads it from standard input.")]
Model = Annotated[
    str | None,
    typer.Option(
        "--model",
        "-m",
        help="A folder in the official layout, or a hub id. Default: the model in the package.",
        rich_help_panel=RUNTIME_PANEL,
        show_default=False,
    ),
]
PolicySpec = Annotated[
    str,
    typer.Option(
        "--policy",
        "-p",
        help="Who may use which experts, as in `coterie policies`; @FILE: as calibrated.",
        rich_help_panel=DECODING_PANEL,
    ),
]
PolicySpecs = Annotated[
    list[str] | None,
    typer.Option(
        "--policy",
        "-p",
        help="A policy to compare, or @FILE as calibrated; give it several times. vanilla "
        "always runs too.",
        rich_help_panel=DECODING_PANEL,
        show_default=False,
    ),
]
MaxNewTokens = Annotated[
    int | None,
    typer.Option(
        "--max-new-tokens",
        "-n",
        min=1,
        help="Tokens to write at most; default 256.",
        rich_help_panel=DECODING_PANEL,
    ),
]
BlockLength = Annotated[
    int | None,
    typer.Option(
        "--block",
        min=1,
        help="Tokens unmasked together; default as the model's family is meant to be used, "
        "and so for --plan and --unmask.",
        rich_help_panel=DECODING_PANEL,
    ),
]
KVCacheScheme = Annotated[
    str | None,
    typer.Option(
        "--plan",
        help=f"The caching scheme, such as dual:before=16,after=16; of {', '.join(PLANS)}.",
        rich_help_panel=DECODING_PANEL,
    ),
]
UnmaskRule = Annotated[
    str | None,
    typer.Option(
        "--unmask",
        help="Which proposals to keep, such as fixed:steps=32 or threshold:p=0.7+edit:p=0.5; "
        f"of {', '.join(RULES)}.",
        rich_help_panel=DECODING_PANEL,
    ),
]
Threshold = Annotated[
    float | None,
    typer.Option(
        "--threshold",
        min=0.0,
        max=1.0,
        help="Short for --unmask threshold:p=...",
        rich_help_panel=DECODING_PANEL,
    ),
]
Temperature = Annotated[
    float | None,
    typer.Option(
        "--temperature",
        "-t",
        min=0.0,
        help="0, the default, is greedy.",
        rich_help_panel=DECODING_PANEL,
    ),
]
TopK = Annotated[
    int | None,
    typer.Option(
        "--top-k",
        min=1,
        help="Draw from the k likeliest tokens; needs a temperature.",
        rich_help_panel=DECODING_PANEL,
    ),
]
TopP = Annotated[
    float | None,
    typer.Option(
        "--top-p",
        min=0.0,
        max=1.0,
        help="Draw from the likeliest tokens that hold this share; needs a temperature.",
        rich_help_panel=DECODING_PANEL,
    ),
]
Seed = Annotated[
    int | None,
    typer.Option(
        "--seed",
        min=0,
        help="Of the draws, default 0; at temperature 0 nothing is drawn.",
        rich_help_panel=DECODING_PANEL,
    ),
]
EarlyStop = Annotated[
    Literal["block", "token", "off"] | None,
    typer.Option(
        "--early-stop",
        help="After an end-of-text: finish its block (the default), stop at once, or go on.",
        rich_help_panel=DECODING_PANEL,
    ),
]
CommitRouting = Annotated[
    Literal["vanilla", "policy"] | None,
    typer.Option(
        "--commit",
        help="Routing of the pass that stores a finished block; default vanilla.",
        rich_help_panel=DECODING_PANEL,
    ),
]
PrefillRouting = Annotated[
    Literal["vanilla", "policy"] | None,
    typer.Option(
        "--prefill",
        help="Routing of the forwards that store the prompt; default vanilla.",
        rich_help_panel=DECODING_PANEL,
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        help="float32, bfloat16 or float16. Default: what fits the device.",
        rich_help_panel=RUNTIME_PANEL,
        show_default=False,
    ),
]
Device = Annotated[
    str, typer.Option("--device", help="auto, cpu, cuda, cuda:1.", rich_help_panel=RUNTIME_PANEL)
]
ExpertDtype = Annotated[
    str | None,
    typer.Option(
        "--experts",
        help="int8 or int4: quantise the routed experts while loading. Default: as stored.",
        rich_help_panel=RUNTIME_PANEL,
        show_default=False,
    ),
]
ExpertMemory = Annotated[
    str | None,
    typer.Option(
        "--expert-memory",
        help="Keep only so many routed experts in memory: a share (35%), slots a layer (47), "
        "bytes (6GiB), or auto, as many as fit into what is free; the others are read from a "
        "packed checkpoint. Default: all.",
        rich_help_panel=MEMORY_PANEL,
        show_default=False,
    ),
]
SimulatedExpertMemory = Annotated[
    str | None,
    typer.Option(
        "--imagine-memory",
        help="Act as if only so many experts were in memory (35%, 47 or 6GiB), though all are: "
        "policies elect, and traffic is counted, as it would be. For any model.",
        rich_help_panel=MEMORY_PANEL,
        show_default=False,
    ),
]
HostMemory = Annotated[
    str | None,
    typer.Option(
        "--host-memory",
        help="Of the host, for experts between a GPU's slots and the disk: bytes (20GiB) or auto.",
        rich_help_panel=MEMORY_PANEL,
        show_default=False,
    ),
]
CpuExperts = Annotated[
    str | None,
    typer.Option(
        "--cpu-experts",
        help="Of experts that a GPU misses, compute on the CPU: those of at most so many tokens (4)"
        ", auto: those that a measurement at the start says it has done sooner, or off, the "
        "default.",
        rich_help_panel=MEMORY_PANEL,
        show_default=False,
    ),
]
Eviction = Annotated[
    str | None,
    typer.Option(
        "--eviction",
        help=f"Who leaves a slot, such as votes:decay=0.9; of {', '.join(EVICTIONS)}. Default: "
        "lru.",
        rich_help_panel=MEMORY_PANEL,
        show_default=False,
    ),
]
WarmStart = Annotated[
    Path | None,
    typer.Option(
        "--warm",
        help="Fill the slots with the experts most voted for before: a file of `coterie trace "
        "--votes`, or a trace.",
        rich_help_panel=MEMORY_PANEL,
        show_default=False,
    ),
]
FallbackModel = Annotated[
    str | None,
    typer.Option(
        "--coarse",
        help="The same model packed in fewer bits: it serves experts that are not in memory as "
        "they are, until they are there.",
        rich_help_panel=MEMORY_PANEL,
        show_default=False,
    ),
]
PrecisionPolicy = Annotated[
    str | None,
    typer.Option(
        "--placement",
        help="With --coarse, who is served as it is: upgrades:most=2,share=0.5 (those voted for "
        "lately; most come after each forward of a layer; a share of --expert-memory; the "
        "default), ballot:mass=0.7 (who holds so much of a forward's votes, at once) or votes "
        f"(those of --warm, for good); of {', '.join(PRECISION_POLICIES)}.",
        rich_help_panel=MEMORY_PANEL,
        show_default=False,
    ),
]
ReuseTolerance = Annotated[
    float | None,
    typer.Option(
        "--drift",
        help="A block keeps its coreset of a layer from step to step, until that holds less than "
        "1 - DRIFT of the votes that a fresh one would hold. Default: a fresh one every step.",
        rich_help_panel=MEMORY_PANEL,
        show_default=False,
    ),
]
RawPrompt = Annotated[
    bool,
    typer.Option(
        "--raw", help="The prompt as it is, without chat template.", rich_help_panel=DECODING_PANEL
    ),
]
JsonOutput = Annotated[
    bool,
    typer.Option(
        "--json", help="One JSON document on standard output.", rich_help_panel=OUTPUT_PANEL
    ),
]
TrafficPlot = Annotated[
    Path | None,
    typer.Option(
        "--traffic",
        metavar="NAME",
        help="Draw what every forward moved where not all experts are in memory: NAME-light.svg, "
        "NAME-dark.svg, and the numbers in NAME.json.",
        rich_help_panel=OUTPUT_PANEL,
        show_default=False,
    ),
]
LiveDisplay = Annotated[
    bool,
    typer.Option(
        "--watch",
        "-w",
        help="Show the block being unmasked, live, with the experts touched per layer.",
        rich_help_panel=OUTPUT_PANEL,
    ),
]
