"""Ctrl-C in a terminal that reads lines and answers them."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from threading import Event as Flag

from coterie.cli.output import print_text


@dataclass  # not frozen: signals change it
class Interrupts:
    """What Ctrl-C does: it drops the line that is read, or ends an answer after a forward.

    The second Ctrl-C during an answer ends the program.
    """

    reading: bool = False
    requested: Flag = field(default_factory=Flag)

    @contextmanager
    def handled(self) -> Iterator[None]:
        """Ctrl-C comes here."""
        previous = signal.signal(signal.SIGINT, self._on_signal)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, previous)

    def read_line(self) -> str | None:
        """A line of the terminal; None if Ctrl-C dropped it."""
        self.requested.clear()
        try:
            self.reading = True
            return input("> ")
        except KeyboardInterrupt:
            print_text("")
            return None
        finally:
            self.reading = False

    def _on_signal(self, *_: object) -> None:
        if self.reading or self.requested.is_set():
            raise KeyboardInterrupt
        self.requested.set()
