"""What is timed, of which shape, and against whom."""
