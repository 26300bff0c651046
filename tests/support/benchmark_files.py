"""Benchmark files for tests, in the published layout."""

from __future__ import annotations

import json
from pathlib import Path

ROWS = [{"question": "How many?", "answer": f"It is {n}.\n#### {n}"} for n in (7, 8)]
TRAIN = [{"question": f"Q{n}?", "answer": f"1+{n}=<<1+{n}={n + 1}>>{n + 1}\n#### {n + 1}"}
         for n in range(5)]  # fmt: skip


def write_rows(path: Path, rows: list[dict[str, object]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_benchmark(path: Path) -> Path:
    write_rows(path / "gsm8k" / "test.jsonl", ROWS)
    write_rows(path / "gsm8k" / "train.jsonl", TRAIN)
    return path
