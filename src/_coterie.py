"""The program ``coterie``, before its package is imported.

It lies outside the package because importing that imports torch, which takes seconds; an interrupt
meanwhile shall end the program without a traceback.
"""

from __future__ import annotations

import signal


def main() -> None:
    """Runs the command that the shell asked for; never returns."""
    usual = signal.getsignal(signal.SIGINT)
    if usual is signal.default_int_handler:  # a shell may also have told us to ignore it
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from coterie.cli import main as run

    signal.signal(signal.SIGINT, usual)
    run()


if __name__ == "__main__":
    main()
