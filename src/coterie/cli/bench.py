"""``coterie bench``: how fast a layer, a forward, an answer is; records, and figures of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
import typer
from rich.progress import TimeElapsedColumn

from coterie.checkpoints.source import EMBEDDED
from coterie.cli import bench_options as b
from coterie.cli import options as o
from coterie.cli.bench_tables import (
    JsonContent,
    forward_table,
    generation_table,
    layer_table,
    plot_record,
    print_report,
    save_record,
)
from coterie.cli.engine_options import canonical_policy, open_engine, reuse_options
from coterie.cli.memory_options import expert_memory_config
from coterie.cli.option_groups import option_group
from coterie.cli.tables import print_note, print_text, progress_bar
from coterie.engine.engine import Engine
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import CoterieError
from coterie.lab.bench import forward as forwards
from coterie.lab.bench import generate as answers
from coterie.lab.bench.baselines import resolve_baselines
from coterie.lab.bench.interleaved import BenchConfig
from coterie.lab.bench.layer import time_layer
from coterie.lab.bench.model import random_model
from coterie.lab.bench.shapes import find_shape
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.loading.free_memory import free_memory
from coterie.model.weights import weight_bytes

RESERVED_BYTES = 2 << 30  # bytes left free where --memory says nothing
DEFAULT_TOKENS = 32  # tokens of a block, which records do not name

bench = typer.Typer(
    rich_markup_mode="rich",
    context_settings={"help_option_names": ["-h", "--help"]},
)


@bench.callback(invoke_without_command=True)
def bench_command(context: typer.Context) -> None:
    """Time a layer of experts, a whole forward, or answers; write a record and its figures.

    Whatever is compared takes turns, so that a machine that slows down slows all of it.

    \b
    coterie bench layer --shape llada2-mini
    coterie bench forward --shape llada2-mini --dtype int8
    coterie bench generate -p des-vote:beta=0.3
    """
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@bench.command("layer")
def layer_command(
    *,
    shape: b.ShapeName = "llada2-mini",
    dtype: b.ExpertDtype = "bf16",
    policies: b.PolicySpecs = None,
    tokens: b.Tokens = 32,
    repeats: b.Repeats = 40,
    threads: b.Threads = None,
    uniform_routing: b.UniformRouting = False,
    baseline_names: b.BaselineNames = None,
    baseline_pythons: b.BaselinePythons = None,
    include_slow: b.IncludeSlow = False,
    baseline_gib: b.BaselineMemory = None,
    out: b.OutputFolder = Path("results"),
    json: o.JsonOutput = False,
) -> None:
    """Time one layer of experts of a published shape: ours, a plain read of its bytes, the peers.

    Weights are random, nothing is downloaded. Tokens choose as a router does that is as skewed as
    the published one: a block of 32 uses 84 of LLaDA2.0-mini's 256 experts.

    \b
    coterie bench layer --shape llada-moe --policy vanilla --policy des-vote:beta=0.4
    coterie bench layer --peer zentorch --peer-python zentorch=/opt/zen/bin/python
    coterie bench layer --dtype int8 --peer none --threads 2
    """
    policy_specs = tuple(
        dict.fromkeys(canonical_policy(policy) for policy in policies or find_shape(shape).policies)
    )
    config = BenchConfig(
        find_shape(shape),
        dtype,
        policy_specs,
        tokens,
        repeats,
        threads or torch.get_num_threads(),
        uniform_routing,
    )
    baseline_options = {"--slow": include_slow, "--memory": baseline_gib is not None}
    _check_baseline_options(
        baseline_names, [flag for flag, is_set in baseline_options.items() if is_set]
    )
    baselines, skipped = _resolve_baselines(baseline_names, baseline_pythons, dtype)
    with _progress_callback() as on_progress:
        result = time_layer(
            config,
            baselines,
            include_slow=include_slow,
            budget=_baseline_budget(config, baseline_gib),
            on_progress=on_progress,
        )
    result.skipped.update(skipped)
    facts: JsonContent = {
        "shape": shape,
        "dtype": dtype,
        "tokens": tokens,
        "threads": config.threads,
        "even": uniform_routing,
        "policies": [timing.facts() for timing in result.timings],
        "peers": {"versions": result.versions, "errors": result.errors, "skipped": result.skipped},
        "sittings": result.sessions,
    }
    for name, reason in result.skipped.items():
        print_note(f"without {name}: {reason.removeprefix(f'{name}: ')}")
    title = (
        f"bench layer {shape} {dtype}"
        + (" even" if uniform_routing else "")
        + _tokens_suffix(tokens)
    )
    measures = [measure for timing in result.timings for measure in timing.measures()]
    print_report(save_record(out, title, measures, facts), layer_table(result), json=json)


@bench.command("forward")
def forward_command(
    *,
    shape: b.ShapeName = "llada2-mini",
    dtype: b.ExpertDtype = "int8",
    policies: b.PolicySpecs = None,
    tokens: b.Tokens = 32,
    context: b.ContextLength = 512,
    num_logits: b.NumLogits = "block",
    layers: b.Layers = None,
    repeats: b.Repeats = 10,
    threads: b.Threads = None,
    seed: b.Seed = 0,
    out: b.OutputFolder = Path("results"),
    json: o.JsonOutput = False,
) -> None:
    """Time whole forwards of a random model of a published shape, beside a read of their bytes.

    Its gates are bent until a block uses as many experts as the published model's does. What a
    forward reads are the experts it uses, attention, shared and dense networks, router, head, keys.
    Its floor: of each of these, whatever takes longer of reading at the bandwidth of this run, and
    of multiplying at the rate of the same kernels on weights that stay in a cache.

    \b
    coterie bench forward --shape llada2-mini --dtype int8 --context 1024
    coterie bench forward --shape llada2-flash --layers 4 -p vanilla
    """
    policy_specs = list(
        dict.fromkeys(canonical_policy(policy) for policy in policies or find_shape(shape).policies)
    )
    truncated = find_shape(shape).truncate(layers)
    logits = _parse_num_logits(num_logits, tokens)
    with _progress_callback() as on_progress:
        on_progress(0.0, "making weights")
        model = random_model(truncated, dtype, seed=seed)
        num_threads = threads or torch.get_num_threads()
        result = forwards.time_forward(
            model, policy_specs, tokens=tokens, context=context, num_logits=logits, repeats=repeats,
            threads=num_threads, seed=seed + 1, on_progress=on_progress,
        )  # fmt: skip
    model_bytes, peak_memory = weight_bytes(model.spec, model.transformer.dtype), _peak_memory()
    facts: JsonContent = {
        "shape": shape,
        "dtype": dtype,
        "layers": truncated.spec.layers,
        "tokens": tokens,
        "context": context,
        "wanted": logits,
        "logits": result.logit_counts,
        "threads": num_threads,
        "weights": model_bytes,
        "peak_memory": peak_memory,
        "peak_times_weights": None if peak_memory is None else peak_memory / model_bytes,
        "policies": [timing.facts() for timing in result.timings],
    }
    layers_suffix = "" if layers is None else f" {layers} layers"
    title = f"bench forward {shape} {dtype}{layers_suffix}{_tokens_suffix(tokens)}"
    print_report(
        save_record(out, title, result.measures(), facts), forward_table(result.timings), json=json
    )


@bench.command("generate")
@option_group(memory=expert_memory_config)
def generate_command(
    *,
    model: o.Model = None,
    shape: b.RandomModelShape = None,
    dtype: b.AnyDtype = None,
    device: o.Device = "auto",
    expert_dtype: o.ExpertDtype = None,
    memory: ExpertMemoryConfig | None = None,
    layers: b.Layers = None,
    policies: b.ComparedPolicies = None,
    reuse_tolerance: o.ReuseTolerance = None,
    tokens: b.MaxNewTokens = 256,
    prompt_texts: b.PromptTexts = None,
    num_prompts: b.NumPrompts = None,
    prompt_length: b.PromptLength = None,
    repeats: b.Repeats = 5,
    threads: b.Threads = None,
    out: b.OutputFolder = Path("results"),
    json: o.JsonOutput = False,
) -> None:
    """Time whole answers: tokens a second, forwards, forwards a block, policy beside policy.

    \b
    coterie bench generate -p des-vote:beta=0.3 -p des-seq:k=3
    coterie bench generate --model inclusionAI/LLaDA2.0-mini --experts int8 --prompt "..."
    coterie bench generate --shape llada2-mini --layers 4 --dtype int8 --tokens 64

    \b
    A random model is sure of nothing: it writes one token a forward, and while
    most of a block is masked its tokens look alike and share their experts.
    """
    _check_generate(
        shape=shape, needs_shape={"--layers": layers, "--length": prompt_length}, model=model,
        expert_dtype=expert_dtype, prompt_texts=prompt_texts, num_prompts=num_prompts, memory=memory,
    )  # fmt: skip
    policy_specs = [canonical_policy(policy) for policy in policies or b.DEFAULT_POLICIES]
    reuse_by_policy = reuse_options(policy_specs, reuse_tolerance)
    if threads is not None:
        torch.set_num_threads(threads)
    if shape is None:
        engine = open_engine(
            model, dtype=dtype, device=device, expert_dtype=expert_dtype, memory=memory
        )
        workload = list(prompt_texts or answers.held_out_problems(num_prompts or 8))
    else:
        engine = _random_engine(shape, dtype or "bf16", layers, device)
        workload = answers.random_prompts(
            num_prompts or 8, prompt_length or 64, engine.model.mask_id
        )
    with _progress_callback() as on_progress:
        timings = answers.time_generation(
            engine, workload, policy_specs, num_repeats=repeats, options={"max_new_tokens": tokens}, policy_options=reuse_by_policy,
            on_progress=on_progress,
        )  # fmt: skip
    title_parts = [
        None if shape and dtype == "bf16" else dtype,
        expert_dtype,
        layers and f"{layers} layers",
    ]
    _report_generation(engine, timings, len(workload), out, title_parts=title_parts, json=json)


@bench.command("plot")
def plot_command(
    records: b.RecordFiles,
) -> None:
    """Draw records again: RECORD-light.svg and RECORD-dark.svg, beside each."""
    for path in records:
        for file in plot_record(path):
            print_text(str(file))


def _check_baseline_options(names: Sequence[str] | None, flags: Sequence[str]) -> None:
    """Raises for options of peers where there are none."""
    if names and b.NO_BASELINE in names and flags:
        raise CoterieError(f"{flags[0]} has no effect with --peer {b.NO_BASELINE}: it is for peers")


def _resolve_baselines(names: Sequence[str] | None, pythons: Sequence[str] | None, dtype: str):
    if names and b.NO_BASELINE in names:
        if len(names) > 1 or pythons:
            raise CoterieError(f"--peer {b.NO_BASELINE} leaves no peer to name or to give a Python")
        return [], {}
    python_paths: dict[str, Path] = {}
    for text in pythons or ():
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise CoterieError(f"--peer-python {text}: not NAME=PATH")
        if names and name not in names:
            raise CoterieError(
                f"--peer-python {text}: {name} is not among --peer {', '.join(names)}"
            )
        python_paths[name] = Path(path)
    return resolve_baselines(tuple(names or ()), python_paths, dtype)


def _baseline_budget(config: BenchConfig, gib: float | None) -> float:
    """Bytes that peers may hold together, beside our own layer."""
    if gib is not None:
        return gib * 2**30
    free = free_memory(torch.device("cpu"))
    return 4.0 * 2**30 if free is None else float(free - RESERVED_BYTES - config.shape.layer.bytes)


def _check_generate(
    *,
    shape: str | None,
    needs_shape: Mapping[str, object],
    model: str | None,
    expert_dtype: str | None,
    prompt_texts: Sequence[str] | None,
    num_prompts: int | None,
    memory: ExpertMemoryConfig | None,
) -> None:
    """Raises for options that would have no effect together."""
    if memory is not None and memory.simulated:
        raise CoterieError("--imagine-memory: nothing moves, so times would be another machine's")
    if shape is not None:
        ignored = {
            "--model": model,
            "--experts": expert_dtype,
            "--prompt": prompt_texts,
            "--expert-memory": memory,
        }
        for flag, value in ignored.items():
            if value is not None:
                raise CoterieError(f"{flag} has no effect with --shape: its model is random")
        return
    for flag, value in needs_shape.items():
        if value is not None:
            raise CoterieError(f"{flag} needs --shape")
    if prompt_texts and num_prompts:
        raise CoterieError("--prompts has no effect with --prompt")
    if model not in (None, EMBEDDED) and not prompt_texts:
        raise CoterieError("--model needs --prompt: the problems are for the model in the package")


def _random_engine(shape: str, dtype: str, layers: int | None, device: str) -> Engine:
    if dtype not in ("fp32", "bf16", "int8", "int4"):
        raise CoterieError(f"--dtype {dtype} with --shape; known: fp32, bf16, int8, int4")
    if device not in ("auto", "cpu"):
        raise CoterieError(f"--device {device} with --shape: random models are made for a CPU")
    model = random_model(find_shape(shape), dtype, layers=layers)
    generation = GenerationConfig.for_family(model.family.defaults).replace(early_stop="off")
    return Engine(model, generation=generation)


def _report_generation(
    engine: Engine,
    timings: Sequence[answers.GenerationTiming],
    num_prompts: int,
    out: Path,
    *,
    title_parts: Sequence[str | int | None],
    json: bool,
) -> None:
    """``kinds``: what else its name tells it apart by."""
    model, device = engine.model, str(engine.model.transformer.device)
    facts: JsonContent = {
        "model": model.name,
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
        "prompts": num_prompts,
        "policies": {timing.policy: timing.facts(timings[0]) for timing in timings},
    }
    device_name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    title_words = [
        Path(model.name).name,
        device.partition(":")[0],
        *(str(part) for part in title_parts if part),
    ]
    title = f"generate {' '.join(title_words)}"
    content = save_record(
        out, title, [timing.measure() for timing in timings], facts, device=device_name
    )
    print_report(content, generation_table(timings), json=json)


def _tokens_suffix(tokens: int) -> str:
    """What tells a record apart from that of a usual block."""
    return "" if tokens == DEFAULT_TOKENS else f" {tokens} tokens"


def _parse_num_logits(num_logits: str, tokens: int) -> forwards.LogitCount:
    """``--wanted``, checked before a model is made."""
    if num_logits != "block" and not num_logits.isdecimal():
        raise CoterieError(f"--wanted {num_logits}: neither a number nor block")
    logits = "block" if num_logits == "block" else int(num_logits)
    forwards.logits_per_forward(logits, tokens)
    return logits


def _peak_memory() -> int | None:
    """Bytes that this process has held at most; None where the system does not tell."""
    try:
        resource = import_module("resource")
    except ModuleNotFoundError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _progress_callback() -> Iterator[Callable[[float, str], None]]:
    """A bar that hears the share that is done, and what is being done."""
    with progress_bar(TimeElapsedColumn()) as progress:
        task = progress.add_task("", total=1.0)
        yield lambda share, doing: progress.update(task, completed=share, description=doing)
