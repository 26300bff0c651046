"""The engine: requests share forwards, and events and results come out."""
