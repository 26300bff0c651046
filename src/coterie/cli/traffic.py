"""``coterie generate --traffic``: what every forward moved, drawn and in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType

from coterie.cli.tables import format_bytes, print_note
from coterie.engine.engine import Engine
from coterie.engine.events import Denoised, Event, Finished, Result
from coterie.errors import CoterieError
from coterie.lab.records import write_json
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.offload.traffic import Traffic
from coterie.offload.traffic_log import KV_ONLY_KINDS


@dataclass  # not frozen: it gathers
class TrafficCollector:
    """Events of one row as they pass by."""

    denoised: list[Denoised] = field(default_factory=list)

    def collect(self, events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            if isinstance(event, Denoised):
                self.denoised.append(event)
            yield event


def final_result(events: Iterator[Event]) -> Result:
    """What a stream ends in."""
    *_, last = events
    if not isinstance(last, Finished):
        raise RuntimeError("a stream ended without a result")
    return last.result


def check_traffic_option(name: Path | None, memory: ExpertMemoryConfig | None) -> None:
    """Raises for a drawing of nothing, and for one that could not be made."""
    if name is None:
        return
    if memory is None:
        raise CoterieError(
            "--traffic draws what comes into memory; --expert-memory 35% keeps only some experts "
            "there, --imagine-memory 35% acts as if"
        )
    if not name.absolute().parent.is_dir():
        raise CoterieError(f"{name}: its folder is not there")
    load_plotting()


def check_experts_move(name: Path | None, engine: Engine) -> None:
    """Raises for a drawing of nothing, before anybody is asked: "auto" may have found room for
    all."""
    if name is not None and engine.model.store.traffic_log is None:
        raise CoterieError(
            "--traffic: all experts are in memory, and nothing moves; --expert-memory 35% keeps "
            "fewer there"
        )


def load_plotting() -> ModuleType:
    """The room that draws; here and not above, for matplotlib is of an extra."""
    try:
        return import_module("coterie.lab.traffic_plot")
    except ModuleNotFoundError as error:
        raise CoterieError(
            f"--traffic needs {error.name}, which is not installed: pip install 'coterie[lab]'"
        ) from None


def plot_traffic(engine: Engine, name: Path, result: Result, collector: TrafficCollector) -> None:
    """NAME-light.svg, NAME-dark.svg and NAME.json, of the only row that the engine ran."""
    store = engine.model.store
    if store.traffic_log is None or result.traffic is None:
        raise CoterieError("--traffic: all experts are in memory, and nothing moves")
    plotting, events = load_plotting(), iter(collector.denoised)
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
    print_note(", ".join(map(str, paths)))


def traffic_summary(traffic: Traffic) -> str:
    """In a line: what came in all and would have without a cache, beside vanilla's."""
    vanilla_bytes, saved = traffic.vanilla_bytes, traffic.fraction_saved
    moved_bytes, uncached_bytes = (
        format_bytes(traffic.bytes_moved),
        format_bytes(traffic.bytes_without_cache),
    )
    summary = f"{moved_bytes} moved, without a cache {uncached_bytes}"
    if vanilla_bytes is None or saved is None:
        return summary
    return f"{summary}; vanilla with LRU {format_bytes(vanilla_bytes)} ({saved:.0%} saved)"
