"""The commands: each reads its options, asks the engine, and prints."""

from __future__ import annotations

from typing import Annotated

import typer

import coterie
from coterie.cli import options as o
from coterie.cli.bench import bench
from coterie.cli.calibrate import calibrate_command
from coterie.cli.document import (
    comparison_document,
    precision_document,
    print_document,
    result_document,
    traffic_document,
)
from coterie.cli.grade import grade_command
from coterie.cli.grouping import takes
from coterie.cli.harness import PASSED_ON, lm_eval
from coterie.cli.keeping import memory_of
from coterie.cli.lab import evaluate, train
from coterie.cli.quantize import quantize, verified_line, verify_shown
from coterie.cli.replay import replay_command
from coterie.cli.request import (
    Options,
    check_effect,
    check_kept,
    decoding_of,
    drifting,
    ids_of,
    open_engine,
    policy_of,
    read_prompt,
)
from coterie.cli.study import study
from coterie.cli.tables import (
    comparison_table,
    console,
    facts_document,
    facts_table,
    option_table,
    policy_documents,
    policy_table,
    print_text,
    summary,
)
from coterie.cli.trace import trace
from coterie.cli.traffic import Noted, check_moves, check_traffic, draw, finished
from coterie.cli.watch import require_terminal, watch
from coterie.engine.engine import Engine
from coterie.engine.event import Result
from coterie.engine.facts import GIB
from coterie.engine.facts import inspect as read_facts
from coterie.engine.load import DTYPES
from coterie.engine.memory import Memory
from coterie.engine.source import find_folder
from coterie.keys import to_json
from coterie.naming import CoterieError

COMPARED = ("des-vote:beta=0.5", "des-vote:beta=0.3", "des-vote:beta=0.15", "des-seq:k=3")

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


@app.callback(invoke_without_command=True)
def coterie_command(
    context: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False,
) -> None:
    """Mixture-of-Experts diffusion language models, where every block elects its experts.

    \b
    coterie generate "Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?"
    coterie compare "..." --policy des-vote:beta=0.3 --policy random:beta=0.3
    coterie inspect inclusionAI/LLaDA2.0-mini
    coterie policies

    \b
    Without --model, a small model in the package answers. It knows word
    problems, short Python functions and simple algebra, and nothing else.
    """
    if version:
        typer.echo(f"coterie {coterie.__version__}")
        raise typer.Exit
    if context.invoked_subcommand is None:
        typer.echo(context.get_help())


@app.command()
@takes(memory=memory_of, wanted=decoding_of)
def generate(
    prompt: o.Prompt,
    *,
    policy: o.OnePolicy = "vanilla",
    wanted: Options,
    raw: o.Raw = False,
    model: o.Model = None,
    dtype: o.Dtype = None,
    device: o.Device = "auto",
    experts: o.Experts = None,
    memory: Memory | None = None,
    drift: o.Drift = None,
    json: o.Json = False,
    watching: o.Watch = False,
    traffic: o.Traffic = None,
) -> None:
    """Answer a prompt.

    \b
    coterie generate "Solve 3x + 4 = 19 for x." --policy des-vote:beta=0.3 --watch
    coterie generate - --model inclusionAI/LLaDA2.0-mini --json < question.txt
    coterie generate "5 17 33" --model ./folder-without-tokenizer -n 32
    coterie generate "..." -p resident-vote:beta=0.3 --imagine-memory 35% --traffic moved
    """
    check_shown(json=json, watching=watching)
    check_traffic(traffic, memory)
    named = policy_of(policy)
    wanted |= drifting([named], drift)[named]
    asked = read_prompt(prompt)
    engine = open_engine(
        model, dtype=dtype, device=device, experts=experts, memory=memory,
        compared=json or traffic is not None,
    )  # fmt: skip
    check_moves(traffic, engine)
    check_effect(engine, wanted)
    check_kept(engine, [policy], wanted)
    ids = ids_of(engine, asked, raw=raw)
    noted = Noted()
    events = noted.passing(engine.stream(ids, policy=named, **wanted))
    result = watch(engine, events, named) if watching else finished(events)
    show(engine, result, json=json, watching=watching)
    if traffic is not None:
        draw(engine, traffic, result, noted)


def show(engine: Engine, result: Result, *, json: bool, watching: bool) -> None:
    """The answer, and to a terminal what it took."""
    if json:
        moved = traffic_document(engine, result) | precision_document(engine)
        print_document(result_document(result) | moved)
        return
    if not watching:
        print_text(result.text)
    terminal = console(stderr=True)
    if terminal.is_terminal:
        terminal.print(summary(result, timed=not watching), style="dim")


def check_shown(*, json: bool, watching: bool) -> None:
    """Raises where nobody could watch."""
    if json and watching:
        raise CoterieError("--json and --watch both want standard output; give one of them")
    if watching:
        require_terminal()


@app.command()
@takes(memory=memory_of, wanted=decoding_of)
def compare(
    prompt: o.Prompt,
    *,
    policies: o.Policies = None,
    wanted: Options,
    raw: o.Raw = False,
    model: o.Model = None,
    dtype: o.Dtype = None,
    device: o.Device = "auto",
    experts: o.Experts = None,
    memory: Memory | None = None,
    drift: o.Drift = None,
    json: o.Json = False,
) -> None:
    """Run several policies on one prompt, in one table; vanilla is always the first.

    Where only some experts are in memory, each policy begins as the first did: with none there, or
    with those of --warm.

    \b
    coterie compare "..." -p des-vote:beta=0.3 -p des-seq:k=3 -p random:beta=0.3
    """
    named = dict.fromkeys(["vanilla", *(policy_of(p) for p in policies or COMPARED)])
    apart = drifting(list(named), drift)
    asked = read_prompt(prompt)
    engine = open_engine(
        model, dtype=dtype, device=device, experts=experts, memory=memory, compared=True
    )
    check_effect(engine, wanted)
    check_kept(engine, policies or (), wanted)
    ids = ids_of(engine, asked, raw=raw)
    # The first forwards of a process are slow; no policy shall pay for that alone.
    engine.generate(ids, **{**wanted, "max_new_tokens": 1})
    results = []
    for name in named:
        engine.empty()
        results.append(engine.generate(ids, policy=name, **wanted, **apart[name]))
    if json:
        print_document(comparison_document(engine, asked, results))
    else:
        console().print(comparison_table(results))


@app.command()
def inspect(
    model: Annotated[
        str | None,
        typer.Argument(help="A folder or a hub id. Default: the model in the package."),
    ] = None,
    *,
    dtype: Annotated[str, typer.Option("--dtype", help="In which the sizes are given.")] = "bf16",
    length: Annotated[
        int, typer.Option("--length", min=1, help="Positions of the row that must fit beside.")
    ] = 2048,
    memory: Annotated[
        list[float] | None,
        typer.Option(
            "--memory",
            min=0.0,
            max=float(1 << 30),
            help="GiB to fit into; may be repeated. Default: 8, 16, 24.",
        ),
    ] = None,
    verified: Annotated[
        bool,
        typer.Option("--verify", help="Read the weights too, and compare them with the manifest."),
    ] = False,
    json: o.Json = False,
) -> None:
    """Tell a model's family, sizes and experts, and what of it fits, from its config alone.

    --verify is for what `coterie quantize` wrote: it says which expert or
    tensor is not what was written, and ends in 2.
    """
    if dtype not in DTYPES:
        raise CoterieError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    memories = tuple(round(gib * GIB) for gib in memory or (8, 16, 24))
    facts = read_facts(model, dtype=DTYPES[dtype], length=length, memories=memories)
    found = verify_shown(find_folder(model)) if verified else None
    if json:
        checked = {} if found is None else {"verified": to_json(found)}
        print_document({**facts_document(facts), **checked})
        return
    console().print(facts_table(facts))
    if found is not None:
        console().print(verified_line(found))


@app.command()
def policies(json: o.Json = False) -> None:
    """List every routing policy: its spelling, its meaning, its source."""
    if json:
        print_document(policy_documents())
    else:
        console().print(policy_table(), "", option_table(), sep="\n")
        console().print("\nSpelled together: des-vote:beta=0.15,voters=before-eos,protect=top1")


app.command("eval")(evaluate)
app.add_typer(bench, name="bench")
app.command("grade")(grade_command)
app.command("calibrate")(calibrate_command)
app.command("lm-eval", context_settings=PASSED_ON, add_help_option=False)(lm_eval)
app.command("quantize")(quantize)
app.command("train")(train)
app.command("study")(study)
app.command("trace")(trace)
app.command("replay")(replay_command)
