"""An OpenAI-compatible HTTP server on the engine's events (extra ``serve``)."""
