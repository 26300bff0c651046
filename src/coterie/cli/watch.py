"""``--watch``: the view of a generation, redrawn at every forward."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator

from rich.live import Live

from coterie.cli.live_view import LiveView
from coterie.cli.tables import console
from coterie.engine.engine import Engine
from coterie.engine.events import Event, Finished, Result
from coterie.errors import CoterieError

MIN_FRAME_SECONDS = (
    0.08  # seconds that a frame stays at least: a small model is faster than the eye
)


def show_live(engine: Engine, events: Iterator[Event], policy: str) -> Result:
    """What a stream ends in; meanwhile the terminal shows it, slowed for the eye."""
    live_view = make_view(engine, policy)
    with Live(live_view, console=console(), auto_refresh=False) as live:
        for event in events:
            if isinstance(event, Finished):
                return event.result
            frame_start = time.perf_counter()
            live_view.update(event)
            live.refresh()
            time.sleep(max(0.0, MIN_FRAME_SECONDS - (time.perf_counter() - frame_start)))
    raise RuntimeError("a stream ended without a result")


def require_terminal() -> None:
    """Raises where nobody could watch."""
    if not sys.stdout.isatty():
        raise CoterieError("--watch needs a terminal, and standard output is none; leave it out")


def make_view(engine: Engine, policy: str) -> LiveView:
    """An empty view of this engine's model."""
    model = engine.model
    return LiveView(
        title=policy,
        decode_token=model.codec.decode_token,
        num_experts=model.spec.router.experts,
        moe_layers=model.spec.moe_layers,
        eos_ids=model.eos_ids,
    )
