"""``coterie generate --traffic``: what every forward moved, drawn and in numbers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from types import ModuleType

from coterie.cli.tables import readable, remark
from coterie.engine.engine import Engine
from coterie.engine.event import Denoised, Event, Finished, Result
from coterie.engine.memory import Memory
from coterie.experts.ledger import WRITING
from coterie.experts.traffic import Traffic
from coterie.naming import CoterieError
from coterie.results import write_json


@dataclass  # not frozen: it gathers
class Noted:
    """Events of one row as they pass by."""

    seen: list[Denoised] = field(default_factory=list)

    def passing(self, events: Iterator[Event]) -> Iterator[Event]:
        for event in events:
            if isinstance(event, Denoised):
                self.seen.append(event)
            yield event


def finished(events: Iterator[Event]) -> Result:
    """What a stream ends in."""
    *_, last = events
    if not isinstance(last, Finished):
        raise RuntimeError("a stream ended without a result")
    return last.result


def check_traffic(name: Path | None, memory: Memory | None) -> None:
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
    drawing()


def check_moves(name: Path | None, engine: Engine) -> None:
    """Raises for a drawing of nothing, before anybody is asked: "auto" may have found room for
    all."""
    if name is not None and engine.model.rationed is None:
        raise CoterieError(
            "--traffic: all experts are in memory, and nothing moves; --expert-memory 35% keeps "
            "fewer there"
        )


def drawing() -> ModuleType:
    """The room that draws; here and not above, for matplotlib is of an extra."""
    try:
        return import_module("coterie.planning.course")
    except ModuleNotFoundError as error:
        raise CoterieError(
            f"--traffic needs {error.name}, which is not installed: pip install 'coterie[lab]'"
        ) from None


def draw(engine: Engine, name: Path, result: Result, noted: Noted) -> None:
    """NAME-light.svg, NAME-dark.svg and NAME.json, of the only row that the engine ran."""
    store = engine.model.rationed
    if store is None or result.traffic is None:
        raise CoterieError("--traffic: all experts are in memory, and nothing moves")
    room, events = drawing(), iter(noted.seen)
    course = []
    for line in store.ledger.lines:
        event = None if line.kind in WRITING else next(events)
        told = () if event is None else (event.vote_mass_kept, event.drift)
        course.append(room.Passed(line, *told))
    title = f"{result.policy}, {store.capacity} of {result.experts.total} experts a layer in memory"
    said = f"{title}\n{sums(result.traffic)}"
    paths = [name.with_name(f"{name.name}.json"), *room.write(name, said, course)]
    forwards = [one.document() for one in course]
    write_json(paths[0], {"model": result.model, "policy": result.policy, "forwards": forwards})
    remark(", ".join(map(str, paths)))


def sums(traffic: Traffic) -> str:
    """In a line: what came in all and would have without a cache, beside vanilla's."""
    usual, saved = traffic.bytes_of_vanilla, traffic.saved
    came, uncached = readable(traffic.bytes_moved), readable(traffic.bytes_without_cache)
    told = f"{came} moved, without a cache {uncached}"
    if usual is None or saved is None:
        return told
    return f"{told}; vanilla with LRU {readable(usual)} ({saved:.0%} saved)"
