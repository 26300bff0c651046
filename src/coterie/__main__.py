"""``python -m coterie`` runs the command line."""

from coterie.cli import main

main()
