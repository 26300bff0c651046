"""The options that several commands share. A parameter's name is the name of its flag."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from coterie.decoding.kv_schemes import PLANS
from coterie.decoding.unmask import RULES
from coterie.lab.evals.tasks import TASKS
from coterie.lab.problems import PROBLEM_MAKERS
from coterie.loading.low_precision import PRECISION_POLICIES
from coterie.offload.eviction import EVICTIONS

DEFAULT_PROBLEMS = 50  # problems that `coterie eval` draws of each task of the package
DEFAULT_BATCH_SIZE = 16


def panel(title: str) -> Callable[..., Any]:
    """Makes options of one panel of the help."""

    def option(help: str, *flags: str, **settings: Any) -> Any:
        return typer.Option(*flags, help=help, rich_help_panel=title, **settings)

    return option


decoding = panel("How to decode")
runtime = panel("What to run it on")
memory = panel("Which experts to keep in memory")
benchmark = panel("What to ask")
output = panel("What to show")


def one_of(names: object) -> str:
    return f"One of: {', '.join(map(str, names))}."  # type: ignore[call-overload]


# How to decode

Prompt = Annotated[str, typer.Argument(help="Prompt; - reads it from standard input.")]
PolicySpec = Annotated[
    str,
    decoding(
        "Expert-routing policy, such as des-vote:beta=0.15 (see `coterie policies`), or @FILE "
        "of `coterie calibrate`.",
        *("--policy", "-p"),
    ),
]
PolicySpecs = Annotated[
    list[str] | None,
    decoding(
        "Expert-routing policy to compare with vanilla, or @FILE; may be repeated.",
        *("--policy", "-p"),
    ),
]
MaxNewTokens = Annotated[
    int | None,
    decoding(
        "Maximum of new tokens (default 256; for a benchmark, the task's own).",
        *("--max-new-tokens", "-n"),
        min=1,
    ),
]
Block = Annotated[
    int | None,
    decoding("Tokens of a block, unmasked together (default: the model family's).", min=1),
]
KVCache = Annotated[
    str | None,
    decoding(
        "KV-caching scheme, such as dual:before=16,after=16 (default: the model family's). "
        + one_of(PLANS)
    ),
]
Unmask = Annotated[
    str | None,
    decoding(
        "Unmasking rule, such as fixed:steps=32 or threshold:p=0.7+edit:p=0.5 (default: the "
        f"model family's). {one_of(RULES)}"
    ),
]
Threshold = Annotated[
    float | None, decoding("Probability P; short for --unmask threshold:p=P.", min=0.0, max=1.0)
]
Temperature = Annotated[
    float | None,
    decoding("Sampling temperature (default 0: greedy).", "--temperature", "-t", min=0.0),
]
TopK = Annotated[
    int | None, decoding("Number of likeliest tokens to sample from (default: all).", min=1)
]
TopP = Annotated[
    float | None,
    decoding(
        "Probability of the likeliest tokens to sample from (default 1: all).", min=0.0, max=1.0
    ),
]
Seed = Annotated[int | None, decoding("Seed of the sampling (default 0).", min=0)]
EarlyStop = Annotated[
    Literal["block", "token", "off"] | None,
    decoding("When an end-of-text stops: at the end of its block (default), at once, or never."),
]
CommitRouting = Annotated[
    Literal["vanilla", "policy"] | None,
    decoding("Routing of the forward that caches a finished block (default vanilla)."),
]
PrefillRouting = Annotated[
    Literal["vanilla", "policy"] | None,
    decoding("Routing of the forwards that cache the prompt (default vanilla)."),
]
NoChatTemplate = Annotated[
    bool, decoding("Pass the prompt to the model without a chat template.", "--no-chat-template")
]

# What to run it on

Model = Annotated[
    str | None,
    runtime(
        "Model folder in the official layout, or a hub id (default: the model in the package).",
        *("--model", "-m"),
    ),
]
ModelArgument = Annotated[
    str | None,
    typer.Argument(help="Model folder or hub id (default: the model in the package)."),
]
Dtype = Annotated[
    str | None,
    runtime("Data type of the weights: float32, bfloat16 or float16 (default: the device's)."),
]
Device = Annotated[str, runtime("Device: auto, cpu, cuda or cuda:1.")]
ExpertDtype = Annotated[
    str | None,
    runtime("Format to quantize the routed experts to: int8 or int4 (default: as stored)."),
]
BatchSize = Annotated[
    int | None,
    runtime(
        f"Prompts decoded together (default {DEFAULT_BATCH_SIZE}; 1 where memory holds only some "
        "of the experts).",
        min=1,
    ),
]
TrustCode = Annotated[
    bool,
    runtime("Run generated code even where no sandbox is available.", "--trust-generated-code"),
]

# Which experts to keep in memory

ExpertMemory = Annotated[
    str | None,
    memory(
        "Memory for routed experts: a share (35%), slots of each layer (47), bytes (6GiB), or "
        "auto: what is free (default: all experts). A packed checkpoint serves the rest."
    ),
]
SimulateExpertMemory = Annotated[
    str | None,
    memory(
        "Memory to simulate for routed experts (35%, 47 or 6GiB) although all are in memory: "
        "routing and traffic are those of the smaller memory."
    ),
]
HostMemory = Annotated[
    str | None,
    memory("Host memory for experts between a GPU's slots and the disk: bytes (20GiB) or auto."),
]
CpuExperts = Annotated[
    str | None,
    memory(
        "Cache misses of a GPU to compute on the CPU: off (default), auto (decided by a "
        "measurement at the start), or the most tokens of such an expert (4)."
    ),
]
Eviction = Annotated[
    str | None,
    memory(f"Eviction policy, such as votes:decay=0.9 (default lru). {one_of(EVICTIONS)}"),
]
WarmStart = Annotated[
    Path | None,
    memory("Trace, or file of `coterie trace --save-votes`, whose top experts are loaded first."),
]
FallbackModel = Annotated[
    str | None,
    memory("Folder of the same model, packed in fewer bits; it serves the cache misses."),
]
PrecisionPolicy = Annotated[
    str | None,
    memory(
        "Experts to serve in high precision with --fallback-model: "
        "promote:most=2,share=0.5 (the default: the most used of late), vote-mass:mass=0.7 (this "
        "share of a forward's votes) or static (the most voted of --warm-start). "
        + one_of(PRECISION_POLICIES)
    ),
]
CoresetReuse = Annotated[
    float | None,
    memory(
        "Share of the votes that a block's coreset may lose before a new one is elected, such as "
        "0.05 (default: a new one each step).",
    ),
]

# What to ask

Tasks = Annotated[
    list[str] | None,
    benchmark(
        f"Benchmark task; may be repeated. {one_of(TASKS)} Default for the model in the package: "
        f"{', '.join(PROBLEM_MAKERS)}.",
        "--task",
    ),
]
DataPath = Annotated[
    Path | None,
    benchmark(
        "Data of the benchmark: its file, its folder, or the folder above (default: "
        "$COTERIE_DATA, else the hub).",
        "--data",
    ),
]
NumShots = Annotated[
    int | None,
    benchmark(
        "Worked examples before each question (default: the model family's).", "--shots", min=0
    ),
]
ProblemSeed = Annotated[int, benchmark("Seed of the problems that are drawn.", "--seed", min=0)]
PromptFile = Annotated[
    Path | None,
    benchmark('File of prompts in place of --task: one a line, or JSONL with "prompt".'),
]
NumPromptsOfTask = Annotated[
    int, benchmark("Number of prompts of each task.", "--num-problems", min=1)
]

# What to show

Json = Annotated[bool, output("Print one JSON document.", "--json")]
Csv = Annotated[bool, output("Print CSV.", "--csv")]
