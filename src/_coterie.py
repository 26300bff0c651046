"""The entry point of the ``coterie`` command, which runs before the package is imported.

It is outside the package because importing the package imports torch, which takes seconds. Ctrl-C
during the import must end the program without a traceback, and OpenMP reads its settings then.
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Runs the command line; never returns."""
    # Threads that spin while they wait take cores from the threads that they wait for: on a busy
    # machine a forward of a small model then takes twenty times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # a shell may have set SIGINT to be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from coterie.cli import main as run

    signal.signal(signal.SIGINT, handler)
    run()


if __name__ == "__main__":
    main()
