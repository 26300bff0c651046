"""``coterie generate``: answers one prompt."""

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Annotated

from coterie.cli import engine_options as engines
from coterie.cli import options as o
from coterie.cli import output
from coterie.cli.live_view import show_live
from coterie.engine.engine import Engine
from coterie.engine.events import Denoised, Event, Finished, Result
from coterie.errors import ConfigError, CoterieError
from coterie.lab.records import write_json
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.offload.capacity import format_bytes
from coterie.offload.traffic import Traffic
from coterie.offload.traffic_log import KV_ONLY_KINDS

PLOTTING = "coterie.lab.traffic_plot"
ALL_RESIDENT = (
    "--plot-traffic: all experts are in memory, so nothing is moved; "
    "--expert-memory 35% keeps fewer"
)
LIVE_HELP = "Show the block live, with the experts that each layer reads."
VANILLA_HELP = "Run the unmodified model too, and print how much of its expert memory was read."
PLOT_HELP = (
    "Files NAME-light.svg, NAME-dark.svg and NAME.json to write: the bytes that each forward moved."
)


@o.with_option_groups
def generate(
    prompt: o.Prompt, *, policy: o.PolicySpec = engines.VANILLA, decode: engines.DecodeOptions,
    sampling: engines.SamplingOptions, seed: o.Seed = None,
    no_chat_template: o.NoChatTemplate = False, engine_options: engines.EngineOptions,
    coreset_reuse: o.CoresetReuse = None, json: o.Json = False,
    live: Annotated[bool, o.output(LIVE_HELP, "--watch", "--live", "-w")] = False,
    compare_vanilla: Annotated[bool, o.output(VANILLA_HELP, "--compare-vanilla")] = False,
    plot_traffic: Annotated[Path | None, o.output(PLOT_HELP, metavar="NAME")] = None,
) -> None:  # fmt: skip
    """Answer a prompt.

    \b
    coterie generate "Solve 3x + 4 = 19 for x." --policy des-vote:beta=0.3 --watch
    coterie generate "Solve 3x + 4 = 19 for x." -p priced-vote:price=0.022 --compare-vanilla
    coterie generate - --model inclusionAI/LLaDA2.0-mini --json < question.txt
    coterie generate "5 17 33" --model ./folder-without-tokenizer -n 32
    coterie generate "..." -p resident-vote:beta=0.3 --expert-memory 35% --plot-traffic moved
    """
    spec = engines.canonical_policy(policy)
    options: engines.GenerationOptions = {**decode.to_fields(), **sampling.to_fields()}
    options |= {} if seed is None else {"seed": seed}
    reuse = engines.reuse_options([spec], coreset_reuse)[spec]
    _check_output(engine_options.memory, json=json, live=live, plot=plot_traffic)
    text = engines.read_prompt(prompt)
    engine = engine_options.open(count_vanilla=json or plot_traffic is not None)
    if plot_traffic is not None and engine.model.store.traffic_log is None:
        raise ConfigError(ALL_RESIDENT)
    engines.check_engine(engine, [policy], options | reuse)
    ids = engines.encode_prompt(engine, text, raw=no_chat_template)
    events = engine.stream(ids, policy=spec, **options, **reuse)
    if not json:
        events = show_live(engine, events, spec) if live else print_stream(events)
    *forwards, last = events
    if not isinstance(last, Finished):
        raise RuntimeError("a stream ended without a result")
    if plot_traffic is not None:
        write_traffic_plot(engine, plot_traffic, last.result, forwards)
    vanilla = None
    if compare_vanilla:
        engine.reset_cache()
        vanilla = engine.generate(ids, policy=engines.VANILLA, **options)
    print_result(engine, last.result, vanilla, json=json, live=live)


def print_stream(events: Iterable[Event]) -> Iterator[Event]:
    """The same events; text goes to standard output as soon as it is final."""
    unfinished_line = False
    try:
        for event in events:
            if isinstance(event, Denoised) and event.text:
                output.print_text(event.text, end="")
                unfinished_line = True
            yield event
    except CoterieError:
        if unfinished_line:
            output.print_text("")
        raise
    output.print_text("")


def print_result(
    engine: Engine, result: Result, vanilla: Result | None, *, json: bool, live: bool
) -> None:
    """Prints what follows the answer; a terminal also gets one line of counts."""
    if json:
        comparison = {} if vanilla is None else {"vanilla": vanilla_document(result, vanilla)}
        stats = engine.model.store.precision_stats
        precision = {} if stats is None else {"expert_precision": stats.to_dict()}
        memory = memory_document(engine, result)
        output.print_document(result.to_dict() | memory | precision | comparison)
        return
    terminal = output.console(stderr=True)
    if vanilla is not None:
        output.print_text(vanilla_line(result, vanilla))
    elif terminal.is_terminal:
        terminal.print(result_summary(result, timed=not live), style="dim")


def memory_document(engine: Engine, result: Result) -> dict[str, object]:
    """As JSON, what the forwards of a result moved; empty where all experts are in memory. A
    simulated cache has no stalls: both are None."""
    if result.traffic is None:
        return {}
    document = {"slots": engine.model.store.capacity, **result.traffic.to_dict()}
    if engine.model.memory_config is not None and engine.model.memory_config.simulated:
        document |= {"stall_seconds": None, "stalled": None}
    return {"expert_traffic": document}


def vanilla_line(result: Result, vanilla: Result) -> str:
    """One line: what a policy read, against a run of the unmodified model on the same prompt."""
    counts = vanilla_document(result, vanilla)
    forwards = f" in {result.forwards} forwards (vanilla {vanilla.forwards})"
    forwards = "" if result.forwards == vanilla.forwards else forwards
    same = "the same answer" if counts["same_answer"] else "another answer"
    return (
        f"{result.policy} read {result.experts.mean:.0f} of {result.experts.total} experts a layer "
        f"(vanilla {vanilla.experts.mean:.0f}), {counts['bytes_ratio']:.2f}x the bytes{forwards}; "
        f"{same}"
    )


def vanilla_document(result: Result, vanilla: Result) -> dict[str, object]:
    """The same as JSON. The ratio is of expert bytes over all decoding forwards, 1 without any."""
    size, base = (run.expert_bytes * run.experts.forwards for run in (result, vanilla))
    return {
        "text": vanilla.text, "forwards": vanilla.forwards, "experts_mean": vanilla.experts.mean,
        "expert_bytes": vanilla.expert_bytes, "bytes_ratio": size / base if base else 1.0,
        "same_answer": result.tokens == vanilla.tokens,
    }  # fmt: skip


def result_summary(result: Result, *, timed: bool) -> str:
    """One line of counts; without times where the live view slowed the run down."""
    speed = f"{result.seconds:.2f} s, {result.tokens_per_second:.1f} tokens/s, " if timed else ""
    cut = ", where -n cut the answer" if result.finish_reason == "length" else ""
    return (
        f"{result.new_tokens} tokens{cut} in {result.forwards} forwards, {speed}"
        f"{result.experts.mean:.1f} of {result.experts.total} experts a layer ({result.policy})"
        f"{'' if result.traffic is None else describe_traffic(result.traffic)}"
    )


def describe_traffic(traffic: Traffic) -> str:
    """The hit rate, the bytes from each tier, and the time without computation."""
    sizes = {tier: format_bytes(moved.bytes) for tier, moved in traffic.transfers.items()}
    moved = " and ".join(f"{size} from {tier}" for tier, size in sizes.items()) or "nothing moved"
    stall = f", {traffic.stall_seconds:.2f} s waited" if traffic.stall_seconds else ""
    return f"; {traffic.hit_rate:.1%} cache hits, {moved}{stall}"


def _check_output(
    memory: ExpertMemoryConfig | None, *, json: bool, live: bool, plot: Path | None
) -> None:
    """Raises for outputs that exclude each other, and for a plot that could not be made."""
    if json and live:
        raise ConfigError("--json and --watch both write to standard output; give one of them")
    if live and not sys.stdout.isatty():
        raise ConfigError("--watch needs a terminal, and standard output is none; leave it out")
    if plot is None:
        return
    if memory is None:
        raise ConfigError(f"{ALL_RESIDENT}, --simulate-expert-memory 35% simulates that")
    output.check_output_file(plot.with_name(f"{plot.name}.json"))
    output.require_extra(PLOTTING, "--plot-traffic")


def write_traffic_plot(
    engine: Engine, name: Path, result: Result, forwards: Sequence[Event]
) -> None:
    """Writes NAME-light.svg, NAME-dark.svg and NAME.json for the one answer of this engine."""
    store = engine.model.store
    if store.traffic_log is None or result.traffic is None:
        raise ConfigError(ALL_RESIDENT)
    plotting = output.require_extra(PLOTTING, "--plot-traffic")
    events = (event for event in forwards if isinstance(event, Denoised))
    points = []
    for forward in store.traffic_log.forwards:
        event = None if forward.kind in KV_ONLY_KINDS else next(events)
        vote_facts = () if event is None else (event.vote_mass_kept, event.reuse_vote_loss)
        points.append(plotting.TrafficPoint(forward, *vote_facts))
    title = f"{result.policy}, {store.capacity} of {result.experts.total} experts a layer in memory"
    caption = f"{title}\n{traffic_summary(result.traffic)}"
    paths = [name.with_name(f"{name.name}.json"), *plotting.write_figures(name, caption, points)]
    documents = [point.to_dict() for point in points]
    write_json(paths[0], {"model": result.model, "policy": result.policy, "forwards": documents})
    output.print_note(", ".join(map(str, paths)))


def traffic_summary(traffic: Traffic) -> str:
    """One line: bytes moved, without a cache, and by the unmodified model."""
    moved, without_cache = map(format_bytes, (traffic.bytes_moved, traffic.bytes_without_cache))
    summary = f"{moved} moved, without a cache {without_cache}"
    if traffic.vanilla_bytes is None or traffic.fraction_saved is None:
        return summary
    vanilla = format_bytes(traffic.vanilla_bytes)
    return f"{summary}; vanilla with LRU {vanilla} ({traffic.fraction_saved:.0%} saved)"
