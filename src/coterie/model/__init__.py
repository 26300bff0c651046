"""One transformer over a ModelSpec: what it is, how it is loaded, how it runs."""
