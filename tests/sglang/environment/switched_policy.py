"""A policy that is another one, whose text stands in a file: one server tries many policies."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from coterie.routing import parse_policy


@dataclass(frozen=True)
class SwitchedPolicy:
    def eligible(self, scores, k):
        return _current().eligible(scores, k)

    def kernel_rule(self, scores, k):
        kernel_rule = getattr(_current(), "kernel_rule", None)
        return None if kernel_rule is None else kernel_rule(scores, k)


def _current():
    return _parsed(Path(os.environ["SWITCHED_POLICY"]).read_text(encoding="utf-8"))


_parsed = cache(parse_policy)
