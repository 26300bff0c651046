"""``--watch``: the view of a generation, redrawn at every forward."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from rich.live import Live

from coterie.cli.tables import console
from coterie.cli.view import View
from coterie.engine.engine import Engine
from coterie.engine.event import Event, Finished, Result
from coterie.naming import CoterieError

HOLD = 0.08  # seconds that a frame stays at least: a small model is faster than the eye


def watch(engine: Engine, events: Iterator[Event], policy: str) -> Result:
    """What a stream ends in; meanwhile the terminal shows it, slowed for the eye."""
    screen = view(engine, policy)
    with Live(screen, console=console(), auto_refresh=False) as live:
        for event in events:
            if isinstance(event, Finished):
                return event.result
            shown = time.perf_counter()
            screen.take(event)
            live.refresh()
            time.sleep(max(0.0, HOLD - (time.perf_counter() - shown)))
    raise RuntimeError("a stream ended without a result")


def require_terminal() -> None:
    """Raises where nobody could watch."""
    if not sys.stdout.isatty():
        raise CoterieError("--watch needs a terminal, and standard output is none; leave it out")


def view(engine: Engine, policy: str) -> View:
    """An empty view of this engine's model."""
    model = engine.model
    return View(
        title=policy,
        piece=model.codec.piece,
        total=model.spec.router.experts,
        layers=model.spec.moe_layers,
        ends=model.eos_ids,
    )
