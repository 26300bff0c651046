"""The time model of a replay: predicted milliseconds from experts used and loaded.

Hits, experts in fast memory, are computed while misses are copied over the link. Misses are
computed once they are copied. For each layer, in bytes and bytes per second:

    hit_time = hits / memory
    copy_time = latency + misses / link        0 where nothing is missing
    layer = hit_time + copy_time - overlap * min(hit_time, copy_time) + misses / memory

``overlap`` is the share of the shorter of both that the longer one hides: 1 where copies need no
compute core, less where the same cores verify the copied bytes. The model leaves out copies that
start before their layer, coresets larger than the cache, and how many tokens each expert has.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from coterie.errors import ConfigError
from coterie.keys import Key
from coterie.offload.capacity import BYTE_UNITS, parse_amount

CountArray = NDArray[np.int64]
SecondsArray = NDArray[np.float64]


@dataclass(frozen=True)
class HardwareModel:
    """Bandwidths in bytes per second; ``memory_bandwidth`` None: computing takes no time."""

    link_bandwidth: Annotated[float, Key("link")]
    memory_bandwidth: Annotated[float | None, Key("memory")] = None
    # Seconds of a forward for all else: attention, router, shared experts, fixed costs.
    other_seconds: Annotated[float, Key("rest")] = 0.0
    overlap: Annotated[float, Key("overlap")] = 1.0
    transfer_latency: Annotated[float, Key("latency")] = 0.0  # seconds of a layer with a miss


def predict_seconds(
    hardware: HardwareModel, used: CountArray, loads: CountArray, expert_bytes: int
) -> tuple[SecondsArray, SecondsArray]:
    """[P] seconds of each forward, and [P] seconds in which nothing is computed."""
    memory = hardware.memory_bandwidth
    compute = 0.0 if memory is None else expert_bytes / memory
    hits, misses = (used - loads) * compute, loads * compute
    copies = loads * (expert_bytes / hardware.link_bandwidth)
    copies = copies + (loads > 0) * hardware.transfer_latency
    stall = copies - hardware.overlap * np.minimum(hits, copies)  # [P, L]
    return hardware.other_seconds + (hits + stall + misses).sum(-1), stall.sum(-1)


def parse_bytes(text: str, option: str) -> float:
    """Bytes in "6291456" or "6MiB"; ``option`` names the value in an error."""
    return _parse(text, option, is_rate=False, example="bytes, such as 6291456 or 6MiB")


def parse_bandwidth(text: str, option: str) -> float:
    """Bytes per second in "25GB/s"; ``option`` names the value in an error."""
    return _parse(text, option, is_rate=True, example="bytes per second, such as 25GB/s")


def expert_sizes(
    known_sizes: Mapping[str, int], precisions: list[str], expert_bytes: str
) -> dict[str, int]:
    """Bytes of one expert by precision: from the trace, or ``expert_bytes`` for a single one."""
    if expert_bytes != "auto":
        if len(precisions) != 1:
            raise ConfigError(f"`expert_bytes` {expert_bytes} fits one `precision`, not several")
        return {precisions[0]: int(parse_bytes(expert_bytes, "`expert_bytes`"))}
    if unknown := [name for name in precisions if name not in known_sizes]:
        raise ConfigError(
            f"`precision` {unknown[0]!r}: the trace has sizes for {', '.join(known_sizes)}; "
            "`expert_bytes` sets the size of an expert in another format"
        )
    return {name: known_sizes[name] for name in precisions}


def _parse(text: str, option: str, *, is_rate: bool, example: str) -> float:
    amount, unit, has_rate = parse_amount(text)
    unit = unit.upper() or ("" if is_rate else "B")
    if has_rate != is_rate or unit not in BYTE_UNITS or amount <= 0:
        raise ConfigError(f"{option} {text!r}: give {example}")
    return amount * BYTE_UNITS[unit]


def hardware_models(
    links: Sequence[str], memory: str | None, other_ms: float, *, latency_ms: float, overlap: float
) -> dict[str, HardwareModel]:
    """One model for each link; raises for an overlap with computing that takes no time."""
    if memory is None and overlap != 1:
        raise ConfigError("`overlap` has no effect without `memory_bandwidth`")
    speed = None if memory is None else parse_bandwidth(memory, "`memory_bandwidth`")
    bandwidths = {text: parse_bandwidth(text, "`link_bandwidth`") for text in links}
    return {
        text: HardwareModel(bandwidth, speed, other_ms / 1e3, overlap, latency_ms / 1e3)
        for text, bandwidth in bandwidths.items()
    }
