"""The command line: ``coterie generate | compare | eval | inspect | policies | train``."""

from coterie.cli.edge import main

__all__ = ["main"]
