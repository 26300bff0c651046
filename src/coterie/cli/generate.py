"""``coterie generate``: answers one prompt."""

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from coterie.cli import engine_options as engines
from coterie.cli import output
from coterie.cli.live_view import show_live
from coterie.engine.engine import Engine
from coterie.engine.events import Denoised, Event, Finished, Result
from coterie.engine.vanilla_comparison import memory_document, vanilla_document, vanilla_line
from coterie.errors import ConfigError, CoterieError
from coterie.loading.expert_memory import ExpertMemoryConfig

PLOTTING = "coterie.lab.traffic_plot"
ALL_RESIDENT = (
    "--plot-traffic: all experts are in memory, so nothing is moved; "
    "--expert-memory 35% keeps fewer"
)


def generate(
    prompt: str, *, policy: str = engines.VANILLA, decode: engines.DecodeOptions,
    sampling: engines.SamplingOptions, seed: int | None = None, no_chat_template: bool = False,
    engine_options: engines.EngineOptions, coreset_reuse: float | None = None, auto: bool = False,
    json: bool = False, live: bool = False, compare_vanilla: bool = False,
    plot_traffic: Path | None = None,
) -> None:  # fmt: skip
    """Answer a prompt.

    \b
    coterie generate "Solve 3x + 4 = 19 for x." --policy des-vote:beta=0.3 --watch
    coterie generate "Solve 3x + 4 = 19 for x." -p priced-vote:price=0.022 --compare-vanilla
    coterie generate - --model inclusionAI/LLaDA2.0-mini --json < question.txt
    coterie generate "5 17 33" --model ./folder-without-tokenizer -n 32
    coterie generate "..." -m ./mini-int8 -p resident-vote:beta=0.3 --expert-memory 35%
    coterie generate "..." --simulate-expert-memory 35% --plot-traffic moved
    """
    spec = engines.canonical_policy(policy)
    options: engines.GenerationOptions = {**decode.to_fields(), **sampling.to_fields()}
    options |= {} if seed is None else {"seed": seed}
    reuse = engines.reuse_options([spec], coreset_reuse)[spec]
    _check_output(engine_options.memory, json=json, live=live, plot=plot_traffic)
    text = engines.read_prompt(prompt)
    if auto:
        engine_options = engines.planned_options(engine_options, spec)
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
        plotting = output.require_extra(PLOTTING, "--plot-traffic")
        log, slots = engine.model.store.traffic_log, engine.model.store.capacity
        paths = plotting.write_traffic(plot_traffic, last.result, forwards, log, slots)
        output.print_note(", ".join(map(str, paths)))
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


def result_summary(result: Result, *, timed: bool) -> str:
    """One line of counts; without times where the live view slowed the run down."""
    speed = f"{result.seconds:.2f} s, {result.tokens_per_second:.1f} tokens/s, " if timed else ""
    cut = ", where -n cut the answer" if result.finish_reason == "length" else ""
    return (
        f"{result.new_tokens} tokens{cut} in {result.forwards} forwards, {speed}"
        f"{result.experts.mean:.1f} of {result.experts.total} experts a layer ({result.policy})"
        f"{'' if result.traffic is None else '; ' + result.traffic.describe()}"
    )


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
