"""Errors that name what is wrong and what would have worked."""

from __future__ import annotations


class CoterieError(ValueError):
    """Bad input: one line that names the thing at fault and what would have worked."""
