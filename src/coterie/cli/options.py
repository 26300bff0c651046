"""The options that several commands share, alone and in groups.

A parameter's name is the name of its flag. A group is a dataclass with one option for each field.
"""

import functools
import inspect
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, fields, is_dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, get_type_hints

import typer

from coterie.checkpoints import model_info
from coterie.checkpoints.source import EMBEDDED
from coterie.cli.output import print_note
from coterie.decoding.kv_schemes import PLANS
from coterie.decoding.refinements import ALL_RULES
from coterie.errors import ConfigError
from coterie.lab.bench.shapes import SHAPES
from coterie.lab.calibration import PromptSet, prompts_from_file, prompts_from_tasks
from coterie.lab.evals.task import TaskOptions
from coterie.lab.evals.tasks import TASKS, check_task_name
from coterie.lab.problems import PROBLEM_MAKERS
from coterie.loading.low_precision import PRECISION_POLICIES
from coterie.offload.eviction import EVICTIONS

DEFAULT_PROBLEMS = 50  # problems that `coterie eval` draws of each task of the package
DEFAULT_BATCH_SIZE = 16
HELP_NAMES = {"help_option_names": ["-h", "--help"]}
RoutingMode = Literal["vanilla", "policy"]


def panel(title: str) -> Callable[..., Any]:
    """Makes options of one panel of the help."""

    def option(help: str, *flags: str, **settings: Any) -> Any:
        return typer.Option(*flags, help=help, rich_help_panel=title, **settings)

    return option


def one_of(names: Iterable[object]) -> str:
    return f"One of: {', '.join(map(str, names))}."


def with_option_groups(command: Callable[..., object]) -> Callable[..., object]:
    """The command with one keyword option for each field of a dataclass parameter."""
    hints = get_type_hints(command, include_extras=True)
    groups: dict[str, Any] = {name: hint for name, hint in hints.items() if is_dataclass(hint)}
    options: dict[str, inspect.Parameter] = {}
    for parameter in inspect.signature(command).parameters.values():
        group = groups.get(parameter.name)
        if group is None:
            entries = [(parameter.name, hints[parameter.name], parameter.default)]
        else:
            types = get_type_hints(group, include_extras=True)
            entries = [(field.name, types[field.name], field.default) for field in fields(group)]
        for name, hint, default in entries:
            kind = inspect.Parameter.KEYWORD_ONLY
            options[name] = inspect.Parameter(name, kind, default=default, annotation=hint)

    @functools.wraps(command)
    def run_command(**values: object) -> object:
        for name, group in groups.items():
            values[name] = group(**{field.name: values.pop(field.name) for field in fields(group)})
        return command(**values)

    run_command.__signature__ = inspect.Signature(list(options.values()))  # type: ignore[attr-defined]
    run_command.__annotations__ = {name: option.annotation for name, option in options.items()}
    return run_command


decoding = panel("How to decode")
runtime = panel("What to run it on")
memory = panel("Which experts to keep in memory")
benchmark = panel("What to ask")
output = panel("What to show")

# How to decode

Prompt = Annotated[
    str, typer.Argument(metavar="PROMPT", help="Prompt; - reads it from standard input.")
]
POLICY_HELP = "Expert-routing policy, e.g. des-vote:beta=0.15 (see `coterie policies`), or @FILE"
PolicySpec = Annotated[str, decoding(f"{POLICY_HELP} of `coterie calibrate`.", "--policy", "-p")]
PolicySpecs = Annotated[
    list[str] | None,
    decoding(f"{POLICY_HELP}; may be repeated. Vanilla always runs too.", "--policy", "-p"),
]
TOKENS_HELP = "Maximum of new tokens (default 256; for a benchmark, the task's own)."
MaxNewTokens = Annotated[int | None, decoding(TOKENS_HELP, "--max-new-tokens", "-n", min=1)]
BLOCK_HELP = "Tokens unmasked together (default: the model family's)."
Block = Annotated[int | None, decoding(BLOCK_HELP, min=1)]
CACHE_HELP = "KV-caching scheme, e.g. dual:before=16,after=16 (default: the model family's)."
KVCache = Annotated[str | None, decoding(f"{CACHE_HELP} {one_of(PLANS)}")]
UNMASK_HELP = "Unmasking rule, e.g. threshold:p=0.7+edit:p=0.5 (default: the model family's)."
Unmask = Annotated[str | None, decoding(f"{UNMASK_HELP} {one_of(ALL_RULES)}")]
Threshold = Annotated[
    float | None, decoding("Probability P; short for --unmask threshold:p=P.", min=0.0, max=1.0)
]
TEMPERATURE_HELP = "Sampling temperature (default 0: greedy)."
Temperature = Annotated[float | None, decoding(TEMPERATURE_HELP, "--temperature", "-t", min=0.0)]
TOP_K_HELP = "Number of likeliest tokens to sample from (default: all)."
TopK = Annotated[int | None, decoding(TOP_K_HELP, min=1)]
TOP_P_HELP = "Probability of the likeliest tokens to sample from (default 1)."
TopP = Annotated[float | None, decoding(TOP_P_HELP, min=0.0, max=1.0)]
Seed = Annotated[int | None, decoding("Seed of the sampling (default 0).", min=0)]
STOP_HELP = "Stop after an end-of-text: at the end of its block (default), at once, or never."
EarlyStop = Annotated[Literal["block", "token", "off"] | None, decoding(STOP_HELP)]
COMMIT_HELP = "Routing of the forward that caches a finished block"
CommitRouting = Annotated[RoutingMode | None, decoding(f"{COMMIT_HELP} (default vanilla).")]
PREFILL_HELP = "Routing of the forwards that cache the prompt (default vanilla)."
PrefillRouting = Annotated[RoutingMode | None, decoding(PREFILL_HELP)]
NoChatTemplate = Annotated[bool, decoding("Skip the chat template.", "--no-chat-template")]

# What to run it on

MODEL_HELP = "Model folder in the official layout, or hub id (default: the model in the package)."
Model = Annotated[str | None, runtime(MODEL_HELP, "--model", "-m")]
ModelArgument = Annotated[
    str | None, typer.Argument(metavar="MODEL", help=MODEL_HELP, show_default=False)
]
SHAPE_HELP = f"{MODEL_HELP[:-1]}, or a shape. {one_of(SHAPES)}"
ModelOrShape = Annotated[
    str | None, typer.Argument(metavar="MODEL", help=SHAPE_HELP, show_default=False)
]
DTYPE_HELP = "Data type of the weights: float32, bfloat16 or float16 (default: the device's)."
Dtype = Annotated[str | None, runtime(DTYPE_HELP)]
Device = Annotated[str, runtime("Device: auto, cpu, cuda or cuda:1.")]
EXPERTS_HELP = "Format to quantize the routed experts to: int8 or int4 (default: as stored)."
ExpertDtype = Annotated[str | None, runtime(EXPERTS_HELP)]
BATCH_HELP = f"Prompts decoded together (default {DEFAULT_BATCH_SIZE}; 1 with limited memory)."
BatchSize = Annotated[int | None, runtime(BATCH_HELP, min=1)]
TRUST_HELP = "Run generated code even where no sandbox is available."
TrustCode = Annotated[bool, runtime(TRUST_HELP, "--trust-generated-code")]

# Which experts to keep in memory

ExpertMemory = Annotated[str | None, memory(
    "Memory for routed experts: a share (35%), slots of each layer (47), bytes (6GiB), or "
    "auto: what is free (default: all experts). A packed checkpoint serves the rest."
)]  # fmt: skip
SimulateExpertMemory = Annotated[str | None, memory(
    "Memory for routed experts to simulate (35%, 47, 6GiB) while all are in memory; routing "
    "and traffic are those of the smaller memory."
)]  # fmt: skip
AUTO_HELP = "Choose the experts' format and memory by `coterie plan` (takes seconds); never 4 bits."
Auto = Annotated[bool, memory(AUTO_HELP, "--auto")]
HOST_HELP = "Host memory for experts, between a GPU and the disk: bytes (20GiB) or auto."
HostMemory = Annotated[str | None, memory(HOST_HELP)]
CpuExperts = Annotated[str | None, memory(
    "Cache misses of a GPU to compute on the CPU: off (default), auto (decided by a "
    "measurement at the start), or the most tokens of such an expert (4)."
)]  # fmt: skip
EVICTION_HELP = "Eviction policy, e.g. votes:decay=0.9 (default lru)."
Eviction = Annotated[str | None, memory(f"{EVICTION_HELP} {one_of(EVICTIONS)}")]
WARM_HELP = "Trace, or file of `coterie trace --save-votes`: its top experts are loaded first."
WarmStart = Annotated[Path | None, memory(WARM_HELP)]
FALLBACK_HELP = "Folder of the same model, packed in fewer bits; it serves the cache misses."
FallbackModel = Annotated[str | None, memory(FALLBACK_HELP)]
PrecisionPolicy = Annotated[str | None, memory(
    "Experts to serve in high precision with --fallback-model: promote:most=2,share=0.5 (most "
    "used of late; default), vote-mass:mass=0.7 (this share of a forward's votes) or static "
    f"(top experts of --warm-start). {one_of(PRECISION_POLICIES)}"
)]  # fmt: skip
REUSE_HELP = "Share of the votes that a block's coreset may lose before a new one is elected"
CoresetReuse = Annotated[float | None, memory(f"{REUSE_HELP} (default: elect at each step).")]

# What to ask

TASK_HELP = f"Benchmark task; may be repeated (default: {', '.join(PROBLEM_MAKERS)})."
Tasks = Annotated[list[str] | None, benchmark(f"{TASK_HELP} {one_of(TASKS)}", "--task")]
DATA_HELP = "File or folder of the benchmark's data (default: $COTERIE_DATA, else the hub)."
DataPath = Annotated[Path | None, benchmark(DATA_HELP)]
SHOTS_HELP = "Worked examples before each question (default: the model family's)."
NumShots = Annotated[int | None, benchmark(SHOTS_HELP, min=0)]
ProblemSeed = Annotated[int, benchmark("Seed of the problems that are drawn.", min=0)]

PROMPT_FILE_HELP = 'File of prompts in place of --task: one a line, or JSONL with "prompt".'
NUM_PROMPTS_HELP = "Prompts of each task (default: 40 for calibrate, 20 for trace)."

# What to show

Json = Annotated[bool, output("Print one JSON document.", "--json")]
Csv = Annotated[bool, output("Print CSV.", "--csv")]


@dataclass(frozen=True)
class PromptOptions:
    """The prompts of a calibration or a trace."""

    task: Tasks = None
    prompt_file: Annotated[Path | None, benchmark(PROMPT_FILE_HELP)] = None
    num_problems: Annotated[int | None, benchmark(NUM_PROMPTS_HELP, min=1)] = None
    seed: ProblemSeed = 1
    data: DataPath = None
    shots: NumShots = None

    def load(self, model: str | None, *, default_count: int, trust_code: bool = False) -> PromptSet:
        """The prompts; a note says where a benchmark would ask the same ones."""
        if self.task and self.prompt_file:
            raise ConfigError("--prompt-file replaces --task; give one of them")
        count = self.num_problems or default_count
        family = model_info.inspect(model).family.name
        options = TaskOptions(family, self.data, self.shots, count, self.seed, trust_code)
        if self.prompt_file is not None:
            return prompts_from_file(self.prompt_file)
        if not self.task and model not in (None, EMBEDDED):
            known = f"tasks: {', '.join(TASKS)}"
            raise ConfigError(f"--task or --prompt-file is needed with --model; {known}")
        names = list(dict.fromkeys(self.task or PROBLEM_MAKERS))
        prompts = prompts_from_tasks(names, count, options)
        if prompts.includes_test_items:
            print_note(
                "these are a benchmark's own items: an evaluation on them is no longer held out; "
                "--data or --prompt-file takes others"
            )
        return prompts


def task_names(
    requested: Sequence[str] | None, model: str | None, data: Path | None, count: int | None = None
) -> list[str]:
    """The tasks, by default those of the package; raises for an option that none of them uses."""
    if not requested and model not in (None, EMBEDDED):
        raise ConfigError(f"--task is needed with a model; tasks: {', '.join(TASKS)}")
    names = list(dict.fromkeys(requested or PROBLEM_MAKERS))
    for name in names:
        check_task_name(name)
    generated, text = [name for name in names if name in PROBLEM_MAKERS], ", ".join(names)
    if count is not None and not generated:
        raise ConfigError(f"--num-problems has no effect on {text}; --limit takes fewer items")
    if data is not None and len(generated) == len(names):
        raise ConfigError(f"--data has no effect on {text}: their problems are drawn")
    return names
