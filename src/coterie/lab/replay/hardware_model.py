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

from coterie.errors import CoterieError
from coterie.keys import Key
from coterie.offload.capacity import BYTE_UNITS, parse_amount

CountArray = NDArray[np.int64]
SecondsArray = NDArray[np.float64]


@dataclass(frozen=True)
class HardwareModel:
    """Rates in bytes a second; ``memory`` None: computing takes no time. ``rest`` in seconds of a
    forward, ``latency`` in seconds of a layer that misses anybody, ``overlap`` a share."""

    link_bandwidth: Annotated[float, Key("link")]
    memory_bandwidth: Annotated[float | None, Key("memory")] = None
    other_seconds: Annotated[float, Key("rest")] = 0.0
    overlap: Annotated[float, Key("overlap")] = 1.0
    transfer_latency: Annotated[float, Key("latency")] = 0.0


@dataclass(frozen=True)
class PredictedTime:
    """Seconds of a forward that decodes, and how much of them nothing was computed; forwards that
    only write keys are laid on those that decode."""

    forward_seconds: float
    stall_seconds: float


def predict_time(
    hardware: HardwareModel,
    used: CountArray,
    loads: CountArray,
    expert_bytes: int,
    *,
    decode_forwards: int,
) -> PredictedTime:
    """What forwards take that use and load so many experts [P, L] of ``size`` bytes; of these
    forwards, ``decoding`` decode."""
    total, stall = predict_seconds(hardware, used, loads, expert_bytes)
    return PredictedTime(float(total.sum()) / decode_forwards, float(stall.sum()) / decode_forwards)


def predict_seconds(
    hardware: HardwareModel, used: CountArray, loads: CountArray, expert_bytes: int
) -> tuple[SecondsArray, SecondsArray]:
    """[P] of each forward, and [P] in which nothing is computed."""
    seconds_per_expert = (
        0.0 if hardware.memory_bandwidth is None else expert_bytes / hardware.memory_bandwidth
    )
    hit_seconds, miss_seconds = (used - loads) * seconds_per_expert, loads * seconds_per_expert
    copy_seconds = (
        loads * (expert_bytes / hardware.link_bandwidth) + (loads > 0) * hardware.transfer_latency
    )
    stall = copy_seconds - hardware.overlap * np.minimum(hit_seconds, copy_seconds)  # [P, L]
    return hardware.other_seconds + (hit_seconds + stall + miss_seconds).sum(-1), stall.sum(-1)


def format_hardware(hardware: HardwareModel) -> str:
    """As `coterie replay` takes it."""
    memory_option = (
        ""
        if hardware.memory_bandwidth is None
        else f" --memory {hardware.memory_bandwidth / 1e9:.3g}GB/s"
    )
    return (
        f"--link {hardware.link_bandwidth / 1e9:.3g}GB/s{memory_option} --rest {1e3 * hardware.other_seconds:.3g} "
        f"--latency {1e3 * hardware.transfer_latency:.3g} --overlap {hardware.overlap:.3g}"
    )


def parse_bytes(text: str, option: str) -> float:
    """ "6291456" or "6MiB" in bytes."""
    amount, unit, rate = parse_amount(text)
    if rate or unit.upper() not in ("", *BYTE_UNITS) or amount <= 0:
        raise CoterieError(f"{option} {text!r}: say bytes, such as 6291456 or 6MiB")
    return amount * BYTE_UNITS[unit.upper() or "B"]


def parse_bandwidth(text: str, option: str) -> float:
    """ "25GB/s" in bytes a second."""
    amount, unit, rate = parse_amount(text)
    if not rate or unit.upper() not in BYTE_UNITS or amount <= 0:
        raise CoterieError(f"{option} {text!r}: say bytes a second, such as 25GB/s")
    return amount * BYTE_UNITS[unit.upper()]


def expert_sizes(
    known_sizes: Mapping[str, int], precisions: list[str], expert_bytes: str
) -> dict[str, int]:
    """Bytes of one expert in each of the precisions: as the trace knows, or as typed for one."""
    if expert_bytes != "auto":
        if len(precisions) != 1:
            raise CoterieError(f"--expert-bytes {expert_bytes} is of one --precision, not several")
        return {precisions[0]: int(parse_bytes(expert_bytes, "--expert-bytes"))}
    if unknown := [name for name in precisions if name not in known_sizes]:
        raise CoterieError(
            f"precision {unknown[0]!r}: the trace knows {', '.join(known_sizes)}; "
            "--expert-bytes says what an expert weighs in another"
        )
    return {name: known_sizes[name] for name in precisions}
