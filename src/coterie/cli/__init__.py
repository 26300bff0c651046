"""The command line: one module for each command, and the options and output they share."""

from coterie.cli.entry import main

__all__ = ["main"]
