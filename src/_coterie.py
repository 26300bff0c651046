"""The entry point of the ``coterie`` command and of ``python -m coterie``.

It is outside the package's command line because that imports torch, which takes seconds. Ctrl-C
during the import must end the program without a traceback.
"""

from __future__ import annotations

import signal
import sys

import coterie


def main() -> None:
    """Runs the command line; never returns."""
    if sys.argv[1:] == ["--version"]:  # needs no torch
        print(f"coterie {coterie.__version__}")
        sys.exit()
    handler = signal.getsignal(signal.SIGINT)
    if handler is signal.default_int_handler:  # a shell may have set SIGINT to be ignored
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    from coterie.cli import main as run

    signal.signal(signal.SIGINT, handler)
    run()


if __name__ == "__main__":
    main()
