"""The transformer: its spec, its weights and how it runs."""
