"""The machine that a replay imagines: how much fast memory, over which link; and its clock.

The clock, layer by layer. Experts that are in fast memory (hits) are computed while the others
(misses) come over the link, and these are computed when they are there:

    here = hits / memory                        in bytes over bytes a second
    copies = latency + misses / link            0 where nothing is missing
    layer = here + copies - overlap * min(here, copies) + misses / memory

``overlap`` is the share of the shorter of the two that the longer hides: 1 where a link works
beside those who compute, less where the same cores check what comes. ``rest`` is a forward's time
for all else: attention, router, shared experts, and what each layer's experts cost whatever their
number. What it leaves out: any copy begun before its layer, waves of a coreset beyond the slots,
and how many tokens each expert has. With ``memory`` unknown computing takes no time, and what
remains is what the link alone takes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from coterie.experts.capacity import UNITS, read_amount
from coterie.keys import Key
from coterie.naming import CoterieError

Counts = NDArray[np.int64]
Seconds = NDArray[np.float64]


@dataclass(frozen=True)
class Machine:
    """Rates in bytes a second; ``memory`` None: computing takes no time. ``rest`` in seconds of a
    forward, ``latency`` in seconds of a layer that misses anybody, ``overlap`` a share."""

    link: Annotated[float, Key("link")]
    memory: Annotated[float | None, Key("memory")] = None
    rest: Annotated[float, Key("rest")] = 0.0
    overlap: Annotated[float, Key("overlap")] = 1.0
    latency: Annotated[float, Key("latency")] = 0.0


@dataclass(frozen=True)
class Clock:
    """Seconds of a forward that decodes, and how much of them nothing was computed; forwards that
    only write keys are laid on those that decode."""

    forward: float
    stall: float


def clock(machine: Machine, used: Counts, loads: Counts, size: int, *, decoding: int) -> Clock:
    """What forwards take that use and load so many experts [P, L] of ``size`` bytes; of these
    forwards, ``decoding`` decode."""
    whole, idle = seconds(machine, used, loads, size)
    return Clock(float(whole.sum()) / decoding, float(idle.sum()) / decoding)


def seconds(machine: Machine, used: Counts, loads: Counts, size: int) -> tuple[Seconds, Seconds]:
    """[P] of each forward, and [P] in which nothing is computed."""
    pace = 0.0 if machine.memory is None else size / machine.memory
    here, late = (used - loads) * pace, loads * pace
    copies = loads * (size / machine.link) + (loads > 0) * machine.latency
    idle = copies - machine.overlap * np.minimum(here, copies)  # [P, L]
    return machine.rest + (here + idle + late).sum(-1), idle.sum(-1)


def typed(machine: Machine) -> str:
    """As `coterie replay` takes it."""
    memory = "" if machine.memory is None else f" --memory {machine.memory / 1e9:.3g}GB/s"
    return (
        f"--link {machine.link / 1e9:.3g}GB/s{memory} --rest {1e3 * machine.rest:.3g} "
        f"--latency {1e3 * machine.latency:.3g} --overlap {machine.overlap:.3g}"
    )


def bytes_of(text: str, what: str) -> float:
    """ "6291456" or "6MiB" in bytes."""
    amount, unit, rate = read_amount(text)
    if rate or unit.upper() not in ("", *UNITS) or amount <= 0:
        raise CoterieError(f"{what} {text!r}: say bytes, such as 6291456 or 6MiB")
    return amount * UNITS[unit.upper() or "B"]


def rate_of(text: str, what: str) -> float:
    """ "25GB/s" in bytes a second."""
    amount, unit, rate = read_amount(text)
    if not rate or unit.upper() not in UNITS or amount <= 0:
        raise CoterieError(f"{what} {text!r}: say bytes a second, such as 25GB/s")
    return amount * UNITS[unit.upper()]


def sizes(known: Mapping[str, int], precisions: list[str], typed: str) -> dict[str, int]:
    """Bytes of one expert in each of the precisions: as the trace knows, or as typed for one."""
    if typed != "auto":
        if len(precisions) != 1:
            raise CoterieError(f"--expert-bytes {typed} is of one --precision, not several")
        return {precisions[0]: int(bytes_of(typed, "--expert-bytes"))}
    if strangers := [name for name in precisions if name not in known]:
        raise CoterieError(
            f"precision {strangers[0]!r}: the trace knows {', '.join(known)}; "
            "--expert-bytes says what an expert weighs in another"
        )
    return {name: known[name] for name in precisions}
