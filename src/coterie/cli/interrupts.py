"""Ctrl-C: it ends the program, or in a chat the answer."""

import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from threading import Event as Flag
from types import FrameType

from coterie.cli.output import print_text

INTERRUPTED = 130  # exit status
GRACE_SECONDS = 5.0  # from Ctrl-C to the end of the program


def install_handler() -> None:
    """Ctrl-C raises KeyboardInterrupt, and the program ends also where nothing comes of it.

    Python drops an exception in a destructor, and one that comes inside the lock of a future leaves
    it locked. A second Ctrl-C ends the program at once.
    """
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
        signal.signal(signal.SIGALRM, _end_now)
        sys.unraisablehook = _end_if_interrupted


def interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt and starts the timer; ends the program if the timer runs."""
    if signal.setitimer(signal.ITIMER_REAL, GRACE_SECONDS)[0]:
        _end_now(number, frame)
    raise KeyboardInterrupt


def _end_if_interrupted(dropped: "sys.UnraisableHookArgs") -> None:
    if isinstance(dropped.exc_value, KeyboardInterrupt):
        _end_now(signal.SIGINT, None)
    sys.__unraisablehook__(dropped)


def _end_now(number: int, frame: FrameType | None) -> None:
    del number, frame
    if sys.stderr is not None:  # else descriptor 2 may be any file
        with suppress(OSError):
            os.write(2, b"coterie: stopped\n")  # through no buffer: its lock may be held
    os._exit(INTERRUPTED)


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
