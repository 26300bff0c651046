"""The generations that a reference folder records, each checked against its arrays."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coterie.model.strictjson import read_object
from coterie.naming import CoterieError
from coterie.parity.arrays import Arrays

CLOSE = 2e-6
"""Runs whose own decisions are nearer than this to a tie are reported, not judged."""
BESIDE = {"lladamoe": (), "llada2": ("logits_fullattn",), "llada21": (), "sdar_moe": ()}
"""The families, as meta.json names them, and the arrays that only their sets hold."""
VERBATIM = "off_"
"""Runs so tagged reproduce a known error of published code: reported, not judged."""


@dataclass(frozen=True)
class Run:
    """One entry of meta.json's ``generations`` with its arrays; B rows.

    Where ``excused`` says why, a difference is not held against us.
    """

    tag: str
    family: str
    entry: Mapping[str, object]
    prompts: list[list[int]]
    outs: list[list[int]]
    arrays: Arrays

    @property
    def excused(self) -> str:
        if self.family == "llada21" and self.tag.startswith(VERBATIM):
            return "reproduces a known error"
        return f"margin {self.margin:.1e}" if self.margin < CLOSE else ""

    @property
    def margin(self) -> float:
        """The smallest that the run records."""
        named = self.entry.get("margins", {})
        if not isinstance(named, dict):
            raise CoterieError(f"{self.where}: margins is {named!r}, not an object")
        alone = {key: value for key, value in self.entry.items() if key.endswith("_margin")}
        return min(_sizes(self.where, {**named, **alone}), default=math.inf)

    @property
    def parameters(self) -> Mapping[str, object]:
        values = self.entry.get("params")
        if not isinstance(values, dict):
            raise CoterieError(f"{self.where}: params is {values!r}, not an object")
        return values

    @property
    def where(self) -> str:
        return f"{self.arrays.file.parent}: {self.tag}"


def read_runs(folder: Path, arrays: Arrays) -> list[Run]:
    """Every generation of meta.json, checked against the arrays, and the arrays against it."""
    meta = read_object(folder / "meta.json")
    family, entries = meta.get("family"), meta.get("generations")
    if not isinstance(family, str) or family not in BESIDE:
        raise CoterieError(f"{folder}: meta.json: family is {family!r}; known: {', '.join(BESIDE)}")
    if not isinstance(entries, list) or not entries:
        raise CoterieError(f"{folder}: meta.json lists no generations")
    runs = [_run(folder, family, entry, arrays) for entry in entries]
    tags = [run.tag for run in runs]
    if len(set(tags)) < len(tags):
        raise CoterieError(f"{folder}: meta.json lists a generation twice")
    _check_arrays(family, tags, arrays)
    _check_margins(folder, meta, runs)
    return runs


def _check_arrays(family: str, tags: list[str], arrays: Arrays) -> None:
    """What the family needs is there, and nothing of a generation that is not listed."""
    for name in BESIDE[family]:
        if name not in arrays.held:
            raise CoterieError(f"{arrays.file}: {name} is missing")
    ends = {f"gen_{tag}_{part}" for tag in tags for part in ("prompt", "out")}
    for name in arrays.held:
        ours = any(name.startswith(f"gen_{tag}_") for tag in tags)
        if name.endswith(("_prompt", "_out")):  # one tag may begin as another does
            ours = name in ends
        if name.startswith("gen_") and not ours:
            raise CoterieError(f"{arrays.file}: {name} belongs to no generation of meta.json")


def _check_margins(folder: Path, meta: Mapping[str, object], runs: list[Run]) -> None:
    """A margin excuses a run, so none may be closer than the closest that the set states."""
    stated = {key: value for key, value in meta.items() if key.startswith("worst_margin")}
    worst = min(_sizes(f"{folder}: meta.json", stated), default=0.0)
    for run in runs:
        if run.margin < worst:
            raise CoterieError(f"{run.where}: margin {run.margin:.1e} is below the set's worst")


def _run(folder: Path, family: str, entry: object, arrays: Arrays) -> Run:
    if not isinstance(entry, dict) or not isinstance(entry.get("tag"), str):
        raise CoterieError(f"{folder}: meta.json: a generation without a tag")
    tag = entry["tag"]
    prompts, outs = (_rows(arrays, f"gen_{tag}_{part}") for part in ("prompt", "out"))
    if arrays.held[f"gen_{tag}_prompt"].ndim != arrays.held[f"gen_{tag}_out"].ndim:
        raise CoterieError(f"{arrays.file}: {tag}: prompt and out have not the same axes")
    if len(prompts) != len(outs):
        raise CoterieError(f"{arrays.file}: {tag}: {len(prompts)} prompts, {len(outs)} outputs")
    if entry.get("n_out", len(outs[0])) != len(outs[0]):
        raise CoterieError(f"{folder}: {tag}: n_out is {entry['n_out']}, of {len(outs[0])} ids")
    return Run(tag, family, entry, prompts, outs, arrays)


def _sizes(where: str, stated: Mapping[str, object]) -> list[float]:
    """Numbers from 0 up, as margins are."""
    found = []
    for name, value in stated.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not value >= 0:
            raise CoterieError(f"{where}: {name} is {value!r}, not a margin")
        found.append(float(value))
    return found


def _rows(arrays: Arrays, name: str) -> list[list[int]]:
    held = arrays.held.get(name)
    axes = held.ndim if isinstance(held, np.ndarray) and held.ndim in (1, 2) else 1
    found = arrays.whole(name, *arrays.shape(name, axes))
    return found.reshape(-1, found.shape[-1]).tolist()
