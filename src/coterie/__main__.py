"""``python -m coterie`` is the command."""

from coterie.cli import main

main()
