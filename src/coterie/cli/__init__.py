"""The command line: ``coterie generate | compare | eval | inspect | policies | train``."""

from coterie.cli.entry import main

__all__ = ["main"]
