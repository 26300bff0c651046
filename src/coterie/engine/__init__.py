"""The engine: requests as rows, rows in shared forwards, events and results out."""
