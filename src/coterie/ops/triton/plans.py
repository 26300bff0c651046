"""How a product of experts is cut up: plans that are good without measuring, and measured ones.

What was measured on a device is kept in a file (``$COTERIE_CACHE``, else ``~/.cache/coterie``) and
used from then on; so is what lies beside this module as ``plans.json``, measured before. Without
either a plan follows from the shape alone.
"""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Annotated

import torch
import triton

from coterie.keys import Key, from_json, to_json
from coterie.ops.triton.launch import power_of_two

LARGEST = 220 << 10
"""Bytes of shared memory that a program may plan to take: what Hopper has, less a little."""


SHIPPED = Path(__file__).with_name("plans.json")


@dataclass(frozen=True)
class Work:
    """One of the two products: ``rows`` columns of output, sums over ``k``."""

    name: str  # "gate-up", where every column has two rows of weights, or "down"
    tokens: int
    rows: int
    k: int
    dtype: str  # of tokens
    kind: str  # "" for weights like tokens, "int8" or "int4"
    group: int

    @property
    def most(self) -> int:
        """Tokens that a tile must take for one to be enough: 16, 32 or 64 (and then again)."""
        return 16 if self.tokens <= 16 else 32 if self.tokens <= 32 else 64

    def key(self) -> str:
        """By what a measured plan is found again."""
        shape = (self.name, self.most, self.rows, self.k, self.dtype, self.kind, self.group)
        return " ".join((device_name(), f"triton {triton.__version__}", *map(str, shape)))


@dataclass(frozen=True)
class Plan:
    """Tokens, columns of output and numbers along k that a program takes at a time."""

    tokens: Annotated[int, Key("tokens")]
    columns: Annotated[int, Key("columns")]
    step: Annotated[int, Key("step")]
    warps: Annotated[int, Key("warps")]
    stages: Annotated[int, Key("stages")]
    turned: Annotated[bool, Key("turned")] = (
        False  # rows of weights stand where tensor cores want 64
    )

    def sizes(self) -> dict[str, int]:
        """As the kernels are launched with it."""
        return {
            "TOKENS": self.tokens,
            "COLUMNS": self.columns,
            "STEP": self.step,
            "TURNED": self.turned,
            "num_warps": self.warps,
            "num_stages": self.stages,
        }


def chosen(work: Work) -> Plan:
    """The measured plan where there is one, else the usual one."""
    return _measured().get(work.key()) or usual(work)


def usual(work: Work) -> Plan:
    """A plan that follows from the shape alone: the same on every machine.

    Some 64 rows of weights a program, so that 25 experts keep 132 processors busy and the tokens,
    read anew by every program, are little beside the weights; 24 to 48 KB under way in each.
    """
    rows = 64 if work.name == "down" else 32
    plan = Plan(work.most, rows, step=64, warps=4, stages=4)
    if work.dtype == "float32":
        plan = replace(plan, columns=rows // 2, step=32, stages=3)
    elif work.kind:
        plan = replace(plan, step=128)
    return _fitting(plan, work)


def candidates(work: Work) -> Iterator[Plan]:
    """Plans worth measuring, the usual one first."""
    first = usual(work)
    seen = {first}
    yield first
    double = 2 if work.name == "gate-up" else 1
    for tokens in sorted({16, work.most}):
        for rows, step, warps, stages in SHAPES["bf16" if not work.kind else work.kind]:
            for turned in (False, True):
                plan = Plan(tokens, rows // double, step, warps, stages, turned)
                plan = _fitting(plan, work)
                if (turned and (rows < 64 or warps % 4)) or plan in seen:
                    continue
                if work.dtype != "float32" and _shared(plan, work) <= LARGEST:
                    seen.add(plan)
                    yield plan


SHAPES = {
    "bf16": (
        *((64, 64, 4, 4), (64, 64, 4, 6), (64, 128, 4, 3), (64, 128, 4, 4), (64, 256, 4, 3)),
        *((32, 128, 4, 4), (32, 128, 2, 4), (32, 256, 4, 3)),
        *((128, 64, 4, 4), (128, 64, 8, 4), (128, 128, 8, 3)),
    ),
    "int8": (
        *((64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 4, 6), (64, 128, 8, 4), (64, 256, 8, 3)),
        *((32, 128, 4, 4), (32, 256, 4, 4), (128, 128, 8, 4)),
    ),
    "int4": (
        *((64, 64, 4, 6), (64, 128, 4, 4), (64, 128, 4, 6), (64, 128, 8, 4), (64, 256, 8, 3)),
        *((32, 128, 4, 4), (32, 256, 4, 4), (128, 128, 8, 4)),
    ),
}
"""Rows of weights, numbers along k, warps and stages that are worth a try."""


def tune(work: Work, time: Callable[[Plan], float]) -> dict[Plan, float]:
    """Measures the candidates by ``time`` (in any unit; an error means no) and keeps the best.

    Returns what was measured. Not for use while a graph is captured: it waits for the device.
    """
    found: dict[Plan, float] = {}
    for plan in candidates(work):
        try:
            found[plan] = time(plan)
        except (RuntimeError, triton.TritonError):  # too many registers, too much memory
            continue
    if found:
        keep(work, min(found, key=found.__getitem__))
    return found


def keep(work: Work, plan: Plan) -> None:
    """Use ``plan`` for such work from now on, here and in later runs."""
    _measured()[work.key()] = plan
    told = {key: to_json(plan) for key, plan in sorted(_measured().items())}
    path = kept_in()
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
        unfinished.replace(path)
    except OSError as error:
        logging.getLogger("coterie").warning(
            "Measured plans are not kept for later runs: %s (COTERIE_CACHE names another folder)",
            error,
        )


def kept_in() -> Path:
    """The file of measured plans."""
    folder = os.environ.get("COTERIE_CACHE")
    usual = os.path.expanduser("~/.cache/coterie")  # as it is where nobody is at home
    return Path(folder or usual) / "plans.json"


@cache
def device_name() -> str:
    return torch.cuda.get_device_name() if torch.cuda.is_available() else "no device"


@cache
def _measured() -> dict[str, Plan]:
    """By key; a file that cannot be read is as good as none."""
    found: dict[str, Plan] = {}
    for path in (SHIPPED, kept_in()):
        try:
            told = json.loads(path.read_text(encoding="utf-8"))
            found |= {key: from_json(Plan, plan) for key, plan in told.items()}
        except (OSError, ValueError, TypeError, AttributeError):
            continue
    return found


def _fitting(plan: Plan, work: Work) -> Plan:
    """The same for small shapes: no tile much larger than what there is; whole groups of scales."""
    step = max(min(plan.step, power_of_two(work.k)), 32, work.group)
    columns = max(min(plan.columns, power_of_two(work.rows)), 16)
    return replace(plan, step=step, columns=columns)


def _shared(plan: Plan, work: Work) -> int:
    """About how many bytes of shared memory it takes."""
    size = {"int8": 1.0, "int4": 0.5}.get(work.kind, 2.0)
    rows = plan.columns * (2 if work.name == "gate-up" else 1)
    return int(plan.stages * plan.step * (rows * size + plan.tokens * 2))
