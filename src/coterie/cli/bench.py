"""``coterie bench``: times a layer, a forward or whole answers."""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import typer
from rich.progress import TimeElapsedColumn

from coterie.cli import bench_output as output
from coterie.cli import engine_options as engines
from coterie.cli import options as o
from coterie.cli.output import print_note, print_text, progress_bar
from coterie.engine.engine import Engine, Prompt
from coterie.errors import ConfigError
from coterie.lab.bench import answers
from coterie.lab.bench import forward as forwards
from coterie.lab.bench.baselines import ResolvedBaseline, resolve_baselines
from coterie.lab.bench.layer import BenchConfig, free_budget, time_layer
from coterie.lab.bench.model import random_engine, random_model
from coterie.lab.bench.shapes import find_shape
from coterie.model.weights import weight_bytes

NO_BASELINE = "none"
DEFAULT_TOKENS = 32  # tokens of a block, which the titles of records leave out

bench = typer.Typer(name="bench", add_completion=False, context_settings=o.HELP_NAMES)


@bench.callback(invoke_without_command=True)
def bench_command(context: typer.Context) -> None:
    """Time a layer of experts, a whole forward, or answers; write a record and its figures.

    The compared programs take turns, so that a machine that slows down slows all of them.

    \b
    coterie bench layer --shape llada2-mini
    coterie bench forward --shape llada2-mini --expert-dtype int8
    coterie bench generate -p des-vote:beta=0.3
    coterie bench serve --shape llada2-mini --layers 4 --expert-dtype int8
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@dataclass(frozen=True)
class BaselineOptions:
    """The other programs to time."""

    baseline: list[str] | None = None
    baseline_python: list[str] | None = None
    include_slow: bool = False
    baseline_memory: float | None = None

    def resolve(self, dtype: str) -> tuple[list[ResolvedBaseline], dict[str, str]]:
        """The baselines, and why others are skipped; raises for options without effect."""
        names = self.baseline or []
        if NO_BASELINE in names:
            others = (len(names) > 1, self.baseline_python, self.include_slow, self.baseline_memory)
            flags = ("--baseline", "--baseline-python", "--include-slow", "--baseline-memory")
            _check_unused(dict(zip(flags, others, strict=True)), f"--baseline {NO_BASELINE}")
            return [], {}
        pythons: dict[str, Path] = {}
        for text in self.baseline_python or ():
            name, _, path = text.partition("=")
            if not path:
                raise ConfigError(f"--baseline-python {text}: not NAME=PATH")
            if names and name not in names:
                raise ConfigError(f"--baseline-python {text}: not one of {', '.join(names)}")
            pythons[name] = Path(path)
        return resolve_baselines(tuple(names), pythons, dtype)

    def budget(self, config: BenchConfig) -> float:
        """Bytes for the baselines that run together, besides our own layer."""
        if self.baseline_memory is not None:
            return self.baseline_memory * 2**30
        return free_budget(config.shape)


def layer_command(
    *, shape: str = "llada2-mini", expert_dtype: Literal["fp32", "bf16", "int8", "int4"] = "bf16",
    policies: list[str] | None = None, tokens: int = DEFAULT_TOKENS, repeats: int = 40,
    threads: int | None = None, uniform_routing: bool = False, baselines: BaselineOptions,
    record: output.RecordOptions,
) -> None:  # fmt: skip
    """Time one layer of experts of a published shape, a read of its bytes, and the baselines.

    Weights are random; nothing is downloaded. The router is as skewed as the published one: a block
    of 32 tokens uses 84 of LLaDA2.0-mini's 256 experts.

    \b
    coterie bench layer --shape llada-moe --policy vanilla --policy des-vote:beta=0.4
    coterie bench layer --baseline zentorch --baseline-python zentorch=/opt/zen/bin/python
    coterie bench layer --expert-dtype int8 --baseline none --threads 2
    """
    model_shape = find_shape(shape)
    specs = tuple(engines.distinct_policies(policies or model_shape.policies))
    num_threads = checked_threads(threads)
    config = BenchConfig(
        model_shape, expert_dtype, specs, tokens, repeats, num_threads, uniform_routing
    )
    resolved, skipped = baselines.resolve(expert_dtype)
    routing = " even" if uniform_routing else ""
    title = f"bench layer {shape} {expert_dtype}{routing}{_tokens_suffix(tokens)}"
    facts: dict[str, object] = {
        "shape": shape, "dtype": expert_dtype, "tokens": tokens, "threads": num_threads,
        "even": uniform_routing,
    }  # fmt: skip
    programs = [str(each.python) for each in resolved]
    same = {**facts, "policies": specs, "programs": programs, "slow": baselines.include_slow}
    with record.journal(title, same) as journal:
        with _progress_callback() as on_progress:
            result = time_layer(
                config, resolved, include_slow=baselines.include_slow,
                budget=baselines.budget(config), journal=journal, on_progress=on_progress,
            )  # fmt: skip
        result.skipped.update(skipped)
        for name, reason in result.skipped.items():
            print_note(f"without {name}: {reason.removeprefix(f'{name}: ')}")
        peers = {"versions": result.versions, "errors": result.errors, "skipped": result.skipped}
        facts |= {"policies": [timing.facts() for timing in result.timings]}
        facts |= {"peers": peers, "sittings": result.sessions}
        measures = [measure for timing in result.timings for measure in timing.measures()]
        record.report(output.layer_table(result), title, measures, facts)


def forward_command(
    *, shape: str = "llada2-mini", expert_dtype: Literal["fp32", "bf16", "int8", "int4"] = "int8",
    dense_dtype: str | None = None,
    policies: list[str] | None = None, tokens: int = DEFAULT_TOKENS, context: int | None = None,
    logits: str = "block", layers: int | None = None, repeats: int = 10, threads: int | None = None,
    seed: int = 0, record: output.RecordOptions,
) -> None:  # fmt: skip
    """Time whole forwards of a random model of a published shape, and a read of their bytes.

    A block uses as many experts as with the published model. The roofline takes, for each part of a
    forward, the longer of reading it at this run's bandwidth and computing it from a cache.

    \b
    coterie bench forward --shape llada2-mini --expert-dtype int8 --context 1024
    coterie bench forward --shape llada2-flash --layers 4 -p vanilla
    """
    specs = engines.distinct_policies(policies or find_shape(shape).policies)
    truncated = find_shape(shape).truncate(layers)
    num_logits = forwards.parse_num_logits(logits, tokens)
    num_threads = checked_threads(threads)
    layers_suffix = "" if layers is None else f" {layers} layers"
    dense = "" if dense_dtype is None else f" dense {dense_dtype}"
    title = f"bench forward {shape} {expert_dtype}{dense}{layers_suffix}{_tokens_suffix(tokens)}"
    facts: dict[str, object] = {
        "shape": shape, "dtype": expert_dtype, "layers": truncated.spec.layers, "tokens": tokens,
        "context": context, "wanted": num_logits, "threads": num_threads,
    }  # fmt: skip
    if dense_dtype is not None:
        facts["dense_dtype"] = dense_dtype
    same = {**facts, "policies": specs, "seed": seed}
    with record.journal(title, same) as journal:
        with _progress_callback() as on_progress:
            on_progress(0.0, "making weights")
            model = random_model(truncated, expert_dtype, seed=seed, dense_dtype=dense_dtype)
            facts["context"] = forwards.context_length(model, tokens, context)
            result = forwards.time_forward(
                model, specs, tokens=tokens, context=context, num_logits=num_logits,
                repeats=repeats, threads=num_threads, seed=seed + 1, journal=journal,
                on_progress=on_progress,
            )  # fmt: skip
        size, peak = weight_bytes(model.spec, model.transformer.dtype), forwards.peak_memory()
        facts |= {
            "logits": result.logit_counts, "weights": size, "peak_memory": peak,
            "peak_times_weights": peak / size,
            "policies": [timing.facts() for timing in result.timings],
        }  # fmt: skip
        table = output.forward_table(result.timings)
        record.report(table, title, result.measures(), facts)


@dataclass(frozen=True)
class Workload:
    """A model and its prompts; ``title`` names the model in records."""

    engine: Engine
    prompts: Sequence[Prompt]
    title: str

    def facts(self) -> dict[str, object]:
        model = self.engine.model
        dtype = str(model.transformer.dtype).removeprefix("torch.")
        return {"model": model.name, "dtype": dtype, "prompts": len(self.prompts)}

    def identity(self, engine_options: engines.EngineOptions) -> dict[str, object]:
        """What samples depend on, besides the policies."""
        threads = torch.get_num_threads()
        return {"texts": self.prompts, "engine": str(engine_options), "threads": threads}

    @property
    def device_name(self) -> str:
        device = str(self.engine.model.transformer.device)
        return torch.cuda.get_device_name(device) if device.startswith("cuda") else device


@dataclass(frozen=True)
class WorkloadOptions:
    """The model's shape and the prompts of ``bench generate``."""

    shape: str | None = None
    layers: int | None = None
    prompt: list[str] | None = None
    num_prompts: int | None = None
    length: int | None = None

    def check(self, engine_options: engines.EngineOptions) -> None:
        """Raises for options that would have no effect."""
        memory = engine_options.memory
        if memory is not None and memory.simulated:
            raise ConfigError("--simulate-expert-memory moves nothing, so its times mean nothing")
        if self.shape is not None:
            ignored = {
                "--model": engine_options.model, "--prompt": self.prompt, "--expert-memory": memory
            }  # fmt: skip
            _check_unused(ignored, "--shape: its model is random")
            return
        for flag, value in (("--layers", self.layers), ("--length", self.length)):
            if value is not None:
                raise ConfigError(f"{flag} needs --shape")
        if self.prompt and self.num_prompts:
            raise ConfigError("--num-prompts has no effect with --prompt")
        if not engine_options.is_embedded and not self.prompt:
            reason = "the problems are for the model in the package"
            raise ConfigError(f"--model needs --prompt: {reason}")

    def open(self, engine_options: engines.EngineOptions, count: int) -> Workload:
        """The model and so many prompts; a random model's experts are bf16 by default."""
        dtypes = [engine_options.dtype, engine_options.expert_dtype]
        if self.shape is None:
            engine = engine_options.open()
            prompts = list(self.prompt or answers.held_out_problems(count))
        else:
            # --dtype is the old name of a random model's --expert-dtype.
            dtype = engine_options.expert_dtype or engine_options.dtype or "bf16"
            dtypes = [] if dtype == "bf16" else [dtype]
            engine = random_engine(
                self.shape, dtype, self.layers, engine_options.device, engine_options.dense_dtype
            )
            prompts = answers.random_prompts(count, self.length or 64, engine.model.plain_ids)
        if engine_options.dense_dtype is not None:
            dtypes.append(f"dense {engine_options.dense_dtype}")
        layers = None if self.layers is None else f"{self.layers} layers"
        device = str(engine.model.transformer.device)
        parts = (Path(engine.model.name).name, device.partition(":")[0], *dtypes, layers)
        return Workload(engine, prompts, " ".join(filter(None, parts)))


def generate_command(
    *, engine_options: engines.EngineOptions, workload: WorkloadOptions,
    policies: list[str] | None = None, coreset_reuse: float | None = None, tokens: int = 256,
    repeats: int = 5, threads: int | None = None, record: output.RecordOptions,
) -> None:  # fmt: skip
    """Time whole answers under several policies: tokens a second, forwards, forwards a block.

    Without --policy, des-vote runs with beta 0.5, 0.3 and 0.15, and des-seq with k=3.

    With --shape, --expert-dtype is the format of a random model's experts: fp32, bf16 (default),
    int8 or int4. A random model samples, and writes one token a forward.

    \b
    coterie bench generate -p des-vote:beta=0.3 -p des-seq:k=3
    coterie bench generate --model inclusionAI/LLaDA2.0-mini --expert-dtype int8 --prompt "..."
    coterie bench generate --shape llada2-mini --layers 4 --expert-dtype int8 --tokens 64
    """
    workload.check(engine_options)
    specs = engines.distinct_policies(policies or engines.DEFAULT_POLICIES)
    reuse_by_policy = engines.reuse_options(specs, coreset_reuse)
    torch.set_num_threads(checked_threads(threads))
    opened = workload.open(engine_options, workload.num_prompts or 8)
    title, facts = f"generate {opened.title}", opened.facts()
    same = {**facts, **opened.identity(engine_options), "policies": reuse_by_policy}
    with record.journal(title, same | {"tokens": tokens}) as journal:
        with _progress_callback() as on_progress:
            timings = answers.time_generation(
                opened.engine, opened.prompts, specs, num_repeats=repeats,
                options={"max_new_tokens": tokens}, policy_options=reuse_by_policy,
                journal=journal, on_progress=on_progress,
            )  # fmt: skip
        facts["policies"] = {timing.policy: timing.facts(timings[0]) for timing in timings}
        measures = [timing.measure() for timing in timings]
        table = output.generation_table(timings)
        record.report(table, title, measures, facts, opened.device_name)


def serve_command(
    *, engine_options: engines.EngineOptions, workload: WorkloadOptions,
    policies: list[str] | None = None, rows: list[int] | None = None, tokens: int = 256,
    repeats: int = 5, threads: int | None = None, record: output.RecordOptions,
) -> None:  # fmt: skip
    """Time requests in progress together: tokens a second, and the experts that all rows read.

    Without --policy, vanilla runs, and des-vote:beta=0.15 with one coreset for each row and with
    one for all rows of a forward.

    \b
    coterie bench serve
    coterie bench serve --shape llada2-mini --layers 4 --expert-dtype int8 --tokens 64
    """
    workload.check(engine_options)
    specs = engines.distinct_policies(policies or answers.SERVED_POLICIES)
    counts = rows or answers.SERVED_ROWS
    torch.set_num_threads(checked_threads(threads))
    # Answers of a trained model end at different times; further requests keep all rows in use.
    per_row = 1 if workload.shape else 4
    opened = workload.open(engine_options, workload.num_prompts or per_row * max(counts))
    title, facts = f"bench serve {opened.title}", opened.facts()
    same = {**facts, **opened.identity(engine_options), "policies": specs, "rows": counts}
    with record.journal(title, same | {"tokens": tokens}) as journal:
        with _progress_callback() as on_progress:
            timings = answers.time_concurrency(
                opened.engine, opened.prompts, specs, counts, num_repeats=repeats,
                options={"max_new_tokens": tokens}, journal=journal, on_progress=on_progress,
            )  # fmt: skip
        fewest = {timing.policy: timing for timing in reversed(timings)}
        settings = [timing.rows_facts(fewest[timing.policy]) for timing in timings]
        measures = [timing.measure() for timing in timings]
        table, facts = output.concurrency_table(timings, settings), facts | {"settings": settings}
        record.report(table, title, measures, facts, opened.device_name)


def plot_command(records: list[Path]) -> None:
    """Draw records again, as RECORD-light.svg and RECORD-dark.svg.

    \b
    coterie bench plot runs/bench/bench-layer-llada2-mini-bf16.json
    """
    for path in records:
        for file in output.plot_record(path):
            print_text(str(file))


def checked_threads(threads: int | None) -> int:
    """The number of threads to time; more of them than processors would time their turns."""
    processors = os.cpu_count() or 1
    if threads is not None and threads > processors:
        raise ConfigError(f"--threads {threads}: this machine has {processors} processors")
    return threads or torch.get_num_threads()


def _check_unused(options: Mapping[str, object], cause: str) -> None:
    """Raises for the first option that is given and that ``cause`` leaves without effect."""
    for flag, value in options.items():
        if value not in (None, False, []):
            raise ConfigError(f"{flag} has no effect with {cause}")


def _tokens_suffix(tokens: int) -> str:
    return "" if tokens == DEFAULT_TOKENS else f" {tokens} tokens"


@contextmanager
def _progress_callback() -> Iterator[Callable[[float, str], None]]:
    """Yields a callback for (share done, current activity), which moves one bar."""
    with progress_bar(TimeElapsedColumn()) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda share, doing: progress.update(task, completed=share, description=doing)


COMMANDS = {
    "layer": layer_command, "forward": forward_command, "generate": generate_command,
    "serve": serve_command, "plot": plot_command,
}  # fmt: skip
for name, command in COMMANDS.items():
    o.add_command(bench, name, command, "bench")
