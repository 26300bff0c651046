"""What a machine would do, told without it: routing traced in real runs, and replayed."""
