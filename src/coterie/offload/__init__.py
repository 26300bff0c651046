"""Where experts live. A store knows slots and copies, never who asked."""
