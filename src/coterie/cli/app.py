"""The commands: each reads its options, asks the engine, and prints."""

from __future__ import annotations

from typing import Annotated

import typer

import coterie
from coterie.checkpoints.model_info import GIB
from coterie.checkpoints.model_info import inspect as read_facts
from coterie.checkpoints.source import find_folder
from coterie.cli import options as o
from coterie.cli.bench import bench
from coterie.cli.calibrate import calibrate_command
from coterie.cli.engine_options import (
    GenerationOptions,
    canonical_policy,
    check_options,
    check_policy_files,
    decode_options,
    encode_prompt,
    open_engine,
    read_prompt,
    reuse_options,
)
from coterie.cli.eval_train import evaluate, train
from coterie.cli.grade import grade_command
from coterie.cli.harness import PASS_THROUGH, lm_eval
from coterie.cli.json_output import (
    comparison_document,
    precision_document,
    print_document,
    result_document,
    traffic_document,
)
from coterie.cli.memory_options import expert_memory_config
from coterie.cli.option_groups import option_group
from coterie.cli.quantize import describe_verification, quantize, verify_with_progress
from coterie.cli.replay import replay_command
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
    result_summary,
)
from coterie.cli.trace import trace
from coterie.cli.traffic import (
    TrafficCollector,
    check_experts_move,
    check_traffic_option,
    final_result,
    plot_traffic,
)
from coterie.cli.watch import require_terminal, show_live
from coterie.engine.engine import Engine
from coterie.engine.events import Result
from coterie.errors import CoterieError
from coterie.keys import to_json
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.loading.load import DTYPES

DEFAULT_POLICIES = ("des-vote:beta=0.5", "des-vote:beta=0.3", "des-vote:beta=0.15", "des-seq:k=3")

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
@option_group(memory=expert_memory_config, options=decode_options)
def generate(
    prompt: o.Prompt,
    *,
    policy: o.PolicySpec = "vanilla",
    options: GenerationOptions,
    raw: o.RawPrompt = False,
    model: o.Model = None,
    dtype: o.Dtype = None,
    device: o.Device = "auto",
    expert_dtype: o.ExpertDtype = None,
    memory: ExpertMemoryConfig | None = None,
    reuse_tolerance: o.ReuseTolerance = None,
    json: o.JsonOutput = False,
    live: o.LiveDisplay = False,
    traffic: o.TrafficPlot = None,
) -> None:
    """Answer a prompt.

    \b
    coterie generate "Solve 3x + 4 = 19 for x." --policy des-vote:beta=0.3 --watch
    coterie generate - --model inclusionAI/LLaDA2.0-mini --json < question.txt
    coterie generate "5 17 33" --model ./folder-without-tokenizer -n 32
    coterie generate "..." -p resident-vote:beta=0.3 --imagine-memory 35% --traffic moved
    """
    check_output_options(json=json, live=live)
    check_traffic_option(traffic, memory)
    policy_spec = canonical_policy(policy)
    options |= reuse_options([policy_spec], reuse_tolerance)[policy_spec]
    prompt_text = read_prompt(prompt)
    engine = open_engine(
        model, dtype=dtype, device=device, expert_dtype=expert_dtype, memory=memory,
        count_vanilla=json or traffic is not None,
    )  # fmt: skip
    check_experts_move(traffic, engine)
    check_options(engine, options)
    check_policy_files(engine, [policy], options)
    ids = encode_prompt(engine, prompt_text, raw=raw)
    collector = TrafficCollector()
    events = collector.collect(engine.stream(ids, policy=policy_spec, **options))
    result = show_live(engine, events, policy_spec) if live else final_result(events)
    print_result(engine, result, json=json, live=live)
    if traffic is not None:
        plot_traffic(engine, traffic, result, collector)


def print_result(engine: Engine, result: Result, *, json: bool, live: bool) -> None:
    """The answer, and to a terminal what it took."""
    if json:
        memory_document = traffic_document(engine, result) | precision_document(engine)
        print_document(result_document(result) | memory_document)
        return
    if not live:
        print_text(result.text)
    terminal = console(stderr=True)
    if terminal.is_terminal:
        terminal.print(result_summary(result, timed=not live), style="dim")


def check_output_options(*, json: bool, live: bool) -> None:
    """Raises where nobody could watch."""
    if json and live:
        raise CoterieError("--json and --watch both want standard output; give one of them")
    if live:
        require_terminal()


@app.command()
@option_group(memory=expert_memory_config, options=decode_options)
def compare(
    prompt: o.Prompt,
    *,
    policies: o.PolicySpecs = None,
    options: GenerationOptions,
    raw: o.RawPrompt = False,
    model: o.Model = None,
    dtype: o.Dtype = None,
    device: o.Device = "auto",
    expert_dtype: o.ExpertDtype = None,
    memory: ExpertMemoryConfig | None = None,
    reuse_tolerance: o.ReuseTolerance = None,
    json: o.JsonOutput = False,
) -> None:
    """Run several policies on one prompt, in one table; vanilla is always the first.

    Where only some experts are in memory, each policy begins as the first did: with none there, or
    with those of --warm.

    \b
    coterie compare "..." -p des-vote:beta=0.3 -p des-seq:k=3 -p random:beta=0.3
    """
    policy_specs = dict.fromkeys(
        ["vanilla", *(canonical_policy(p) for p in policies or DEFAULT_POLICIES)]
    )
    reuse_by_policy = reuse_options(list(policy_specs), reuse_tolerance)
    prompt_text = read_prompt(prompt)
    engine = open_engine(
        model,
        dtype=dtype,
        device=device,
        expert_dtype=expert_dtype,
        memory=memory,
        count_vanilla=True,
    )
    check_options(engine, options)
    check_policy_files(engine, policies or (), options)
    ids = encode_prompt(engine, prompt_text, raw=raw)
    # The first forwards of a process are slow; no policy shall pay for that alone.
    engine.generate(ids, **{**options, "max_new_tokens": 1})
    results = []
    for name in policy_specs:
        engine.reset_cache()
        results.append(engine.generate(ids, policy=name, **options, **reuse_by_policy[name]))
    if json:
        print_document(comparison_document(engine, prompt_text, results))
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
    verify: Annotated[
        bool,
        typer.Option("--verify", help="Read the weights too, and compare them with the manifest."),
    ] = False,
    json: o.JsonOutput = False,
) -> None:
    """Tell a model's family, sizes and experts, and what of it fits, from its config alone.

    --verify is for what `coterie quantize` wrote: it says which expert or
    tensor is not what was written, and ends in 2.
    """
    if dtype not in DTYPES:
        raise CoterieError(f"unknown dtype {dtype!r}; known: {', '.join(DTYPES)}")
    memories = tuple(round(gib * GIB) for gib in memory or (8, 16, 24))
    facts = read_facts(model, dtype=DTYPES[dtype], kv_length=length, memory_sizes=memories)
    verification = verify_with_progress(find_folder(model)) if verify else None
    if json:
        verified_document = {} if verification is None else {"verified": to_json(verification)}
        print_document({**facts_document(facts), **verified_document})
        return
    console().print(facts_table(facts))
    if verification is not None:
        console().print(describe_verification(verification))


@app.command()
def policies(json: o.JsonOutput = False) -> None:
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
app.command("lm-eval", context_settings=PASS_THROUGH, add_help_option=False)(lm_eval)
app.command("quantize")(quantize)
app.command("train")(train)
app.command("study")(study)
app.command("trace")(trace)
app.command("replay")(replay_command)
