"""References outside the repository: golden vectors, published benchmark files, other engines.

Files are looked for in ``$COTERIE_SHARED``, else in the folder ``shared`` beside the repository.
``scripts/peers`` installs the engines in ``$COTERIE_PEERS``, else in ``.peers``.
A test that needs them calls ``golden(...)`` or ``benchmark(...)`` and is skipped where they are
absent; the header and the summary of the run then say so.
"""

from __future__ import annotations

import json
import os
from importlib.util import find_spec
from pathlib import Path

import pytest

CHROMIUM = Path(os.environ.get("COTERIE_CHROMIUM", "/usr/bin/chromium"))
SHARED = Path(os.environ.get("COTERIE_SHARED") or Path(__file__).parents[3] / "shared")

PEERS = Path(os.environ.get("COTERIE_PEERS") or Path(__file__).parents[2] / ".peers")


def golden(*parts: str) -> Path:
    """``golden("llada2", "a")``: a folder of golden vectors."""
    return _present("golden", *parts)


def golden_sets() -> list[str]:
    """Every set as "family/name", for parametrised tests; one stand-in that skips where none is."""
    found = sorted((SHARED / "golden").glob("*/*/reference.npz"))
    return [f"{path.parents[1].name}/{path.parent.name}" for path in found] or ["absent/absent"]


def field_cases(kind: str) -> list[tuple[str, str]]:
    """Folder and expectation of each case "configs" or "templates"; a stand-in where none is."""
    index = SHARED / "cases" / kind / "index.jsonl"
    lines = index.read_text(encoding="utf-8").splitlines() if index.is_file() else []
    cases = [(case["folder"], case["expect"]) for case in map(json.loads, lines)]
    return cases or [("absent", "ok")]


def grading_cases() -> list[dict]:
    """Outputs of models, each with its task, its gold and the right verdict; or a stand-in."""
    index = SHARED / "cases" / "grading" / "numbers-and-latex.jsonl"
    lines = index.read_text(encoding="utf-8").splitlines() if index.is_file() else []
    return [json.loads(line) for line in lines] or [{"id": "absent", "task": "gsm8k"}]


def field_case(kind: str, *parts: str) -> Path:
    """``field_case("configs", "01-llada2-plain")``: a case of ``field_cases``."""
    return _present("cases", kind, *parts)


def benchmark(*parts: str) -> Path:
    """``benchmark("gsm8k", "test.jsonl")``: a published benchmark file."""
    return _present("data", *parts)


def peer_folder(name: str) -> Path:
    """``peer_folder("transformers")``: the virtual environment of another engine."""
    if not _is_installed(name):
        pytest.skip(f"{PEERS / name} is absent")
    return PEERS / name


def missing(marks: str) -> list[str]:
    """What a run of the tests with these ``marks`` (pytest's ``-m``) cannot check, a line each."""
    wanted = {"golden": "parity with the golden vectors", "data": "the published benchmark files"}
    wanted |= {"cases": "files as they are in the field"}
    absent = [
        f"NOT TESTED: {what} (no folder {SHARED / name}; set COTERIE_SHARED)"
        for name, what in wanted.items()
        if not (SHARED / name).is_dir()
    ]
    if find_spec("lm_eval") is None:
        absent.append("NOT TESTED: the harness's adapter (pip install '.[harness]')")
    if find_spec("triton") is None:
        absent.append("NOT TESTED: kernels for a GPU (triton is not installed)")
    if find_spec("playwright") is None or not CHROMIUM.exists():
        absent.append(f"NOT TESTED: the page (no {CHROMIUM}, or no playwright; COTERIE_CHROMIUM)")
    if marks == "peers" and not _is_installed("transformers"):
        absent.append(f"NOT TESTED: against transformers and diffusers (no {PEERS}/transformers)")
    return absent


def _is_installed(peer: str) -> bool:
    return (PEERS / peer / ".made").exists()


def _present(*parts: str) -> Path:
    path = SHARED.joinpath(*parts)
    if not path.exists():
        pytest.skip(f"{path} is absent")
    return path
