"""``python -m coterie`` runs the command line."""

from _coterie import main

main()
