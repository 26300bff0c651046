"""The program ``coterie``, before its package is imported.

It lies outside the package because importing that imports torch, which takes seconds; an interrupt
meanwhile shall end the program without a traceback. What OpenMP is to know, too, it reads then.
"""

from __future__ import annotations

import os
import signal


def main() -> None:
    """Runs the command that the shell asked for; never returns."""
    # Threads that spin while they wait take the cores from those they wait for: on a busy machine
    # a small model's forward then takes twenty times as long.
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # a shell may also have told us to ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from coterie.cli import main as run

    signal.signal(signal.SIGINT, usual)
    run()


if __name__ == "__main__":
    main()
