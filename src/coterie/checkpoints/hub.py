"""Requests to the hub: a note after two seconds, and a bound on the time of each."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Timer
from typing import Any

from huggingface_hub import hf_hub_download, snapshot_download
from huggingface_hub.utils import get_session

__all__ = ["hf_hub_download", "hub_requests", "snapshot_download"]

NOTE_SECONDS, REQUEST_SECONDS = 2.0, 30.0


@contextmanager
def hub_requests(name: str) -> Iterator[None]:
    """Bounds the requests of the hub's library inside, which would wait for ever for some.

    One note on stderr replaces what it logs about its retries.
    """
    logger, session = logging.getLogger("huggingface_hub"), get_session()
    level, hooks = logger.level, session.event_hooks
    note = Timer(NOTE_SECONDS, _print_note, (f"coterie: asking the hub for {name} ...",))
    note.daemon = True
    logger.setLevel(logging.CRITICAL)
    session.event_hooks = {**hooks, "request": [*hooks["request"], _bound]}
    note.start()
    try:
        yield
    finally:
        note.cancel()
        session.event_hooks = hooks
        logger.setLevel(level)


def _bound(request: Any) -> None:
    phases = request.extensions.get("timeout") or dict.fromkeys(
        ("connect", "read", "write", "pool")
    )
    request.extensions["timeout"] = {
        phase: REQUEST_SECONDS if seconds is None else min(seconds, REQUEST_SECONDS)
        for phase, seconds in phases.items()
    }


def _print_note(note: str) -> None:
    if sys.stderr is not None:
        print(note, file=sys.stderr, flush=True)
