"""``coterie generate``: answers one prompt."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated

from coterie.cli import options as o
from coterie.cli import output
from coterie.cli.engine_options import (
    VANILLA,
    DecodeOptions,
    EngineOptions,
    GenerationOptions,
    SamplingOptions,
    canonical_policy,
    check_engine,
    encode_prompt,
    read_prompt,
    reuse_options,
)
from coterie.cli.live_view import require_terminal, show_live
from coterie.cli.option_groups import with_option_groups
from coterie.cli.result_output import describe_traffic, memory_document, precision_document
from coterie.engine.engine import Engine
from coterie.engine.events import Denoised, Event, Finished, Result
from coterie.errors import ConfigError
from coterie.lab.records import write_json
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.offload.capacity import format_bytes
from coterie.offload.traffic import Traffic
from coterie.offload.traffic_log import KV_ONLY_KINDS

PLOTTING = "coterie.lab.traffic_plot"
ALL_RESIDENT = "--plot-traffic: all experts are in memory, so nothing is moved; "


@with_option_groups
def generate(
    prompt: o.Prompt,
    *,
    policy: o.PolicySpec = VANILLA,
    decode: DecodeOptions,
    sampling: SamplingOptions,
    seed: o.Seed = None,
    no_chat_template: o.NoChatTemplate = False,
    engine_options: EngineOptions,
    coreset_reuse: o.CoresetReuse = None,
    json: o.Json = False,
    live: Annotated[
        bool,
        o.output(
            "Show the block live, with the experts that each layer reads.",
            *("--watch", "--live", "-w"),
        ),
    ] = False,
    compare_vanilla: Annotated[
        bool,
        o.output(
            "Run the unmodified model too, and print how much of its expert memory was read.",
            "--compare-vanilla",
        ),
    ] = False,
    plot_traffic: Annotated[
        Path | None,
        o.output(
            "Files NAME-light.svg, NAME-dark.svg and NAME.json to write: the bytes that each "
            "forward moved.",
            metavar="NAME",
        ),
    ] = None,
) -> None:
    """Answer a prompt.

    \b
    coterie generate "Solve 3x + 4 = 19 for x." --policy des-vote:beta=0.3 --watch
    coterie generate "Solve 3x + 4 = 19 for x." -p priced-vote:price=0.022 --compare-vanilla
    coterie generate - --model inclusionAI/LLaDA2.0-mini --json < question.txt
    coterie generate "5 17 33" --model ./folder-without-tokenizer -n 32
    coterie generate "..." -p resident-vote:beta=0.3 --expert-memory 35% --plot-traffic moved
    """
    spec = canonical_policy(policy)
    options: GenerationOptions = {**decode.to_fields(), **sampling.to_fields()}
    options |= {} if seed is None else {"seed": seed}
    options |= reuse_options([spec], coreset_reuse)[spec]
    _check_output(engine_options.memory, json=json, live=live, plot=plot_traffic)
    text = read_prompt(prompt)
    engine = engine_options.open(count_vanilla=json or plot_traffic is not None)
    if plot_traffic is not None and engine.model.store.traffic_log is None:
        raise ConfigError(ALL_RESIDENT + "--expert-memory 35% keeps fewer")
    check_engine(engine, [policy], options)
    ids = encode_prompt(engine, text, raw=no_chat_template)
    collector = TrafficCollector()
    events = collector.collect(engine.stream(ids, policy=spec, **options))
    result = show_live(engine, events, spec) if live else final_result(events)
    if plot_traffic is not None:
        write_traffic_plot(engine, plot_traffic, result, collector)
    vanilla = _run_vanilla(engine, ids, options) if compare_vanilla else None
    print_result(engine, result, vanilla, json=json, live=live)


def print_result(
    engine: Engine, result: Result, vanilla: Result | None, *, json: bool, live: bool
) -> None:
    """Prints the answer; a terminal also gets one line of counts."""
    if json:
        comparison = {} if vanilla is None else {"vanilla": vanilla_document(result, vanilla)}
        memory = memory_document(engine, result) | precision_document(engine)
        output.print_document(result.to_dict() | memory | comparison)
        return
    if not live:
        output.print_text(result.text)
    terminal = output.console(stderr=True)
    if vanilla is not None:
        output.print_text(vanilla_line(result, vanilla))
    elif terminal.is_terminal:
        terminal.print(result_summary(result, timed=not live), style="dim")


def vanilla_line(result: Result, vanilla: Result) -> str:
    """One line: what a policy read, against a run of the unmodified model on the same prompt."""
    share = bytes_read(result) / bytes_read(vanilla)
    forwards = (
        ""
        if result.forwards == vanilla.forwards
        else f" in {result.forwards} forwards (vanilla {vanilla.forwards})"
    )
    same = "the same answer" if result.tokens == vanilla.tokens else "another answer"
    return (
        f"{result.policy} read {result.experts.mean:.0f} of {result.experts.total} experts a layer "
        f"(vanilla {vanilla.experts.mean:.0f}), {share:.2f}x the bytes{forwards}; {same}"
    )


def vanilla_document(result: Result, vanilla: Result) -> dict[str, object]:
    """The same as JSON."""
    return {
        "text": vanilla.text,
        "forwards": vanilla.forwards,
        "experts_mean": vanilla.experts.mean,
        "expert_bytes": vanilla.expert_bytes,
        "bytes_ratio": bytes_read(result) / bytes_read(vanilla),
        "same_answer": result.tokens == vanilla.tokens,
    }


def bytes_read(result: Result) -> float:
    """Bytes of experts that a run read in a layer, over all its decoding forwards."""
    return result.expert_bytes * result.experts.forwards


def result_summary(result: Result, *, timed: bool) -> str:
    """One line of counts; without times where the live view slowed the run down."""
    speed = f"{result.seconds:.2f} s, {result.tokens_per_second:.1f} tokens/s, " if timed else ""
    return (
        f"{result.new_tokens} tokens in {result.forwards} forwards, {speed}"
        f"{result.experts.mean:.1f} of {result.experts.total} experts a layer ({result.policy})"
        f"{'' if result.traffic is None else describe_traffic(result.traffic)}"
    )


def _run_vanilla(engine: Engine, ids: list[int], options: GenerationOptions) -> Result:
    """The unmodified model on the same prompt, from an empty expert cache."""
    engine.reset_cache()
    options = {name: value for name, value in options.items() if name != "drift"}
    return engine.generate(ids, policy=VANILLA, **options)


def _check_output(
    memory: ExpertMemoryConfig | None, *, json: bool, live: bool, plot: Path | None
) -> None:
    """Raises for outputs that exclude each other, and for a plot that could not be made."""
    if json and live:
        raise ConfigError("--json and --watch both write to standard output; give one of them")
    if live:
        require_terminal()
    if plot is None:
        return
    if memory is None:
        raise ConfigError(
            ALL_RESIDENT + "--expert-memory 35% keeps fewer, --simulate-expert-memory 35% "
            "simulates that"
        )
    if not plot.absolute().parent.is_dir():
        raise ConfigError(f"{plot}: its folder does not exist")
    output.require_extra(PLOTTING, "--plot-traffic")


@dataclass  # not frozen: it collects
class TrafficCollector:
    """The forwards of one answer, in order."""

    denoised: list[Denoised] = field(default_factory=list)

    def collect(self, events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            if isinstance(event, Denoised):
                self.denoised.append(event)
            yield event


def final_result(events: Iterator[Event]) -> Result:
    """The result at the end of a stream."""
    *_, last = events
    if not isinstance(last, Finished):
        raise RuntimeError("a stream ended without a result")
    return last.result


def write_traffic_plot(
    engine: Engine, name: Path, result: Result, collector: TrafficCollector
) -> None:
    """Writes NAME-light.svg, NAME-dark.svg and NAME.json for the one answer of this engine."""
    store = engine.model.store
    if store.traffic_log is None or result.traffic is None:
        raise ConfigError(ALL_RESIDENT + "--expert-memory 35% keeps fewer")
    plotting, events = output.require_extra(PLOTTING, "--plot-traffic"), iter(collector.denoised)
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
    summary = (
        f"{format_bytes(traffic.bytes_moved)} moved, without a cache "
        f"{format_bytes(traffic.bytes_without_cache)}"
    )
    if traffic.vanilla_bytes is None or traffic.fraction_saved is None:
        return summary
    vanilla = format_bytes(traffic.vanilla_bytes)
    return f"{summary}; vanilla with LRU {vanilla} ({traffic.fraction_saved:.0%} saved)"
