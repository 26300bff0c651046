"""``--watch``: the view of a generation, redrawn at every forward."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterable, Sequence

from rich.live import Live

from coterie.cli.tables import console
from coterie.cli.view import View
from coterie.engine.engine import Engine
from coterie.engine.event import Denoised, Event, Finished, Result
from coterie.naming import CoterieError

HOLD = 0.08  # seconds that a frame stays at least: a small model is faster than the eye


def watch(engine: Engine, prompt: Sequence[int], policy: str, options: dict[str, object]) -> Result:
    """Generates while the terminal shows it, slowed for the eye; raises where there is none."""
    require_terminal()
    screen = view(engine, policy)
    with Live(screen, console=console(), auto_refresh=False) as live:
        return follow(screen, engine.stream(prompt, policy=policy, **options), live)


def require_terminal() -> None:
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


def follow(screen: View, events: Iterable[Event], live: Live | None = None) -> Result:
    """Shows every event; the result is the last one's."""
    for event in events:
        if isinstance(event, Finished):
            return event.result
        shown = time.perf_counter()
        show(screen, event)
        if live is not None:
            live.refresh()
            time.sleep(max(0.0, HOLD - (time.perf_counter() - shown)))
    raise RuntimeError("a stream ended without a result")


def show(screen: View, event: Denoised) -> None:
    """One forward; the event that opens a stream (forward 0) shows nothing."""
    if event.forward == 0:
        return
    screen.take(
        committed=event.committed,
        edited=event.edited,
        provisional=event.provisional,
        experts=event.experts,
        block=event.block,
    )
