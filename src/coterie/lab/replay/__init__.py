"""Replays of recorded routing: cache hits, bytes moved and predicted time under other policies."""
