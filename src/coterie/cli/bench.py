"""``coterie bench``: how fast a layer, a forward, an answer is; records, and figures of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

import torch
import typer
from rich.progress import TimeElapsedColumn

from coterie.bench import forward as forwards
from coterie.bench import generate as answers
from coterie.bench.layer import time_layer
from coterie.bench.model import random_model
from coterie.bench.peers import chosen
from coterie.bench.shapes import published
from coterie.bench.turns import Asked
from coterie.cli import bench_options as b
from coterie.cli import options as o
from coterie.cli.bench_tables import (
    Content,
    forward_table,
    generation_table,
    keep,
    layer_table,
    plot,
    show,
)
from coterie.cli.grouping import takes
from coterie.cli.keeping import memory_of
from coterie.cli.request import drifting, open_engine, policy_of
from coterie.cli.tables import bar, print_text, remark
from coterie.engine.config import Generation
from coterie.engine.engine import Engine
from coterie.engine.load import free_memory
from coterie.engine.memory import Memory
from coterie.engine.source import EMBEDDED
from coterie.model.weights import bytes_kept
from coterie.naming import CoterieError

SPARE = 2 << 30  # bytes left free where --memory says nothing
USUAL = 32  # tokens of a block, which records do not name

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
    dtype: b.Kept = "bf16",
    policies: b.Policies = None,
    tokens: b.Tokens = 32,
    turns: b.Turns = 40,
    threads: b.Threads = None,
    even: b.Even = False,
    peers: b.PeerNames = None,
    pythons: b.PeerPythons = None,
    slow: b.Slow = False,
    memory: b.Memory = None,
    out: b.Out = Path("results"),
    json: o.Json = False,
) -> None:
    """Time one layer of experts of a published shape: ours, a plain read of its bytes, the peers.

    Weights are random, nothing is downloaded. Tokens choose as a router does that is as skewed as
    the published one: a block of 32 uses 84 of LLaDA2.0-mini's 256 experts.

    \b
    coterie bench layer --shape llada-moe --policy vanilla --policy des-vote:beta=0.4
    coterie bench layer --peer zentorch --peer-python zentorch=/opt/zen/bin/python
    coterie bench layer --dtype int8 --peer none --threads 2
    """
    named = tuple(
        dict.fromkeys(policy_of(policy) for policy in policies or published(shape).policies)
    )
    asked = Asked(
        published(shape), dtype, named, tokens, turns, threads or torch.get_num_threads(), even
    )
    idle = {"--slow": slow, "--memory": memory is not None}
    _check_peers(peers, [flag for flag, given in idle.items() if given])
    who, skipped = _peers(peers, pythons, dtype)
    with _telling() as tell:
        found = time_layer(asked, who, slow=slow, budget=_budget(asked, memory), tell=tell)
    found.skipped.update(skipped)
    facts: Content = {
        "shape": shape,
        "dtype": dtype,
        "tokens": tokens,
        "threads": asked.threads,
        "even": even,
        "policies": [line.facts() for line in found.lines],
        "peers": {"versions": found.versions, "errors": found.errors, "skipped": found.skipped},
        "sittings": found.sittings,
    }
    for name, why in found.skipped.items():
        remark(f"without {name}: {why.removeprefix(f'{name}: ')}")
    title = f"bench layer {shape} {dtype}" + (" even" if even else "") + _many(tokens)
    measures = [measure for line in found.lines for measure in line.measures()]
    show(keep(out, title, measures, facts), layer_table(found), json=json)


@bench.command("forward")
def forward_command(
    *,
    shape: b.ShapeName = "llada2-mini",
    dtype: b.Kept = "int8",
    policies: b.Policies = None,
    tokens: b.Tokens = 32,
    context: b.Context = 512,
    wanted: b.Wanted = "block",
    layers: b.Layers = None,
    turns: b.Turns = 10,
    threads: b.Threads = None,
    seed: b.Seed = 0,
    out: b.Out = Path("results"),
    json: o.Json = False,
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
    named = list(
        dict.fromkeys(policy_of(policy) for policy in policies or published(shape).policies)
    )
    cut = published(shape).cut(layers)
    logits = _logits(wanted, tokens)
    with _telling() as tell:
        tell(0.0, "making weights")
        model = random_model(cut, dtype, seed=seed)
        using = threads or torch.get_num_threads()
        found = forwards.time_forward(
            model, named, tokens=tokens, context=context, wanted=logits, turns=turns,
            threads=using, seed=seed + 1, tell=tell,
        )  # fmt: skip
    weights, peak = bytes_kept(model.spec, model.transformer.dtype), _peak()
    facts: Content = {
        "shape": shape,
        "dtype": dtype,
        "layers": cut.spec.layers,
        "tokens": tokens,
        "context": context,
        "wanted": logits,
        "logits": found.logits,
        "threads": using,
        "weights": weights,
        "peak_memory": peak,
        "peak_times_weights": None if peak is None else peak / weights,
        "policies": [line.facts() for line in found.lines],
    }
    cut_to = "" if layers is None else f" {layers} layers"
    title = f"bench forward {shape} {dtype}{cut_to}{_many(tokens)}"
    show(keep(out, title, found.measures(), facts), forward_table(found.lines), json=json)


@bench.command("generate")
@takes(memory=memory_of)
def generate_command(
    *,
    model: o.Model = None,
    shape: b.RandomShape = None,
    dtype: b.AnyDtype = None,
    device: o.Device = "auto",
    experts: o.Experts = None,
    memory: Memory | None = None,
    layers: b.Layers = None,
    policies: b.Compared = None,
    drift: o.Drift = None,
    tokens: b.NewTokens = 256,
    prompt: b.Prompt = None,
    prompts: b.Prompts = None,
    length: b.Length = None,
    turns: b.Turns = 5,
    threads: b.Threads = None,
    out: b.Out = Path("results"),
    json: o.Json = False,
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
        shape=shape, needs_shape={"--layers": layers, "--length": length}, model=model,
        experts=experts, prompt=prompt, prompts=prompts, memory=memory,
    )  # fmt: skip
    named = [policy_of(policy) for policy in policies or b.COMPARED]
    apart = drifting(named, drift)
    if threads is not None:
        torch.set_num_threads(threads)
    if shape is None:
        engine = open_engine(model, dtype=dtype, device=device, experts=experts, memory=memory)
        asked = list(prompt or answers.problems(prompts or 8))
    else:
        engine = _random_engine(shape, dtype or "bf16", layers, device)
        asked = answers.random_prompts(prompts or 8, length or 64, engine.model.mask_id)
    with _telling() as tell:
        lines = answers.time_generation(
            engine, asked, named, turns=turns, options={"max_new_tokens": tokens}, apart=apart,
            tell=tell,
        )  # fmt: skip
    kinds = [None if shape and dtype == "bf16" else dtype, experts, layers and f"{layers} layers"]
    _tell_generation(engine, lines, len(asked), out, kinds=kinds, json=json)


@bench.command("plot")
def plot_command(
    records: b.Records,
) -> None:
    """Draw records again: RECORD-light.svg and RECORD-dark.svg, beside each."""
    for path in records:
        for file in plot(path):
            print_text(str(file))


def _check_peers(names: Sequence[str] | None, flags: Sequence[str]) -> None:
    """Raises for options of peers where there are none."""
    if names and b.NOBODY in names and flags:
        raise CoterieError(f"{flags[0]} has no effect with --peer {b.NOBODY}: it is for peers")


def _peers(names: Sequence[str] | None, pythons: Sequence[str] | None, dtype: str):
    if names and b.NOBODY in names:
        if len(names) > 1 or pythons:
            raise CoterieError(f"--peer {b.NOBODY} leaves no peer to name or to give a Python")
        return [], {}
    given: dict[str, Path] = {}
    for text in pythons or ():
        name, equals, path = text.partition("=")
        if not equals or not path:
            raise CoterieError(f"--peer-python {text}: not NAME=PATH")
        if names and name not in names:
            raise CoterieError(
                f"--peer-python {text}: {name} is not among --peer {', '.join(names)}"
            )
        given[name] = Path(path)
    return chosen(tuple(names or ()), given, dtype)


def _budget(asked: Asked, memory: float | None) -> float:
    """Bytes that peers may hold together, beside our own layer."""
    if memory is not None:
        return memory * 2**30
    free = free_memory(torch.device("cpu"))
    return 4.0 * 2**30 if free is None else float(free - SPARE - asked.shape.layer.bytes)


def _check_generate(
    *,
    shape: str | None,
    needs_shape: Mapping[str, object],
    model: str | None,
    experts: str | None,
    prompt: Sequence[str] | None,
    prompts: int | None,
    memory: Memory | None,
) -> None:
    """Raises for options that would have no effect together."""
    if memory is not None and memory.imagined:
        raise CoterieError("--imagine-memory: nothing moves, so times would be another machine's")
    if shape is not None:
        idle = {
            "--model": model,
            "--experts": experts,
            "--prompt": prompt,
            "--expert-memory": memory,
        }
        for flag, value in idle.items():
            if value is not None:
                raise CoterieError(f"{flag} has no effect with --shape: its model is random")
        return
    for flag, value in needs_shape.items():
        if value is not None:
            raise CoterieError(f"{flag} needs --shape")
    if prompt and prompts:
        raise CoterieError("--prompts has no effect with --prompt")
    if model not in (None, EMBEDDED) and not prompt:
        raise CoterieError("--model needs --prompt: the problems are for the model in the package")


def _random_engine(shape: str, dtype: str, layers: int | None, device: str) -> Engine:
    if dtype not in ("fp32", "bf16", "int8", "int4"):
        raise CoterieError(f"--dtype {dtype} with --shape; known: fp32, bf16, int8, int4")
    if device not in ("auto", "cpu"):
        raise CoterieError(f"--device {device} with --shape: random models are made for a CPU")
    model = random_model(published(shape), dtype, layers=layers)
    generation = Generation.usual(model.family.defaults).but(early_stop="off")
    return Engine(model, generation=generation)


def _tell_generation(
    engine: Engine,
    lines: Sequence[answers.Line],
    prompts: int,
    out: Path,
    *,
    kinds: Sequence[str | int | None],
    json: bool,
) -> None:
    """``kinds``: what else its name tells it apart by."""
    model, device = engine.model, str(engine.model.transformer.device)
    facts: Content = {
        "model": model.name,
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
        "prompts": prompts,
        "policies": {line.policy: line.facts(lines[0]) for line in lines},
    }
    where = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    named = [
        Path(model.name).name,
        device.partition(":")[0],
        *(str(kind) for kind in kinds if kind),
    ]
    title = f"generate {' '.join(named)}"
    kept = keep(out, title, [line.measure() for line in lines], facts, device=where)
    show(kept, generation_table(lines), json=json)


def _many(tokens: int) -> str:
    """What tells a record apart from that of a usual block."""
    return "" if tokens == USUAL else f" {tokens} tokens"


def _logits(wanted: str, tokens: int) -> forwards.Wanted:
    """``--wanted``, checked before a model is made."""
    if wanted != "block" and not wanted.isdecimal():
        raise CoterieError(f"--wanted {wanted}: neither a number nor block")
    logits = "block" if wanted == "block" else int(wanted)
    forwards.fillings(logits, tokens)
    return logits


def _peak() -> int | None:
    """Bytes that this process has held at most; None where the system does not tell."""
    try:
        room = import_module("resource")
    except ModuleNotFoundError:
        return None
    return room.getrusage(room.RUSAGE_SELF).ru_maxrss * 1024


@contextmanager
def _telling() -> Iterator[Callable[[float, str], None]]:
    """A bar that hears the share that is done, and what is being done."""
    with bar(TimeElapsedColumn()) as shown:
        task = shown.add_task("", total=1.0)
        yield lambda share, doing: shown.update(task, completed=share, description=doing)
