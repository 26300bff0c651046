"""The size of the expert cache as users write it: a share, slots, or bytes."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Literal

from coterie.errors import ConfigError, quote

BYTE_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
SIZE_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")
AMOUNT_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*([A-Za-z%]*)(/s)?\s*", re.I)


@dataclass(frozen=True)
class Capacity:
    """Fast memory for experts: a share of all experts, slots per layer, or bytes."""

    amount: float
    unit: Literal["share", "slots", "bytes"]
    text: str

    @staticmethod
    def parse(text: str, option_name: str = "`capacity`", other_forms: str = "") -> Capacity:
        """Parse "35%", "47" (slots per layer) or "6GiB".

        Raises ConfigError with the option's name, and ``other_forms`` that the option accepts.
        """
        amount, unit, is_rate = parse_amount(text)
        if not is_rate and unit == "%" and 0 < amount <= 100:
            return Capacity(amount / 100, "share", text.strip())
        if not is_rate and unit == "" and amount >= 1 and amount.is_integer():
            return Capacity(amount, "slots", text.strip())
        if not is_rate and unit.upper() in BYTE_UNITS and amount > 0:
            return Capacity(amount * BYTE_UNITS[unit.upper()], "bytes", text.strip())
        raise ConfigError(
            f"{option_name} is {text!r}; use a share of the experts (35%), slots per layer (47) "
            f"or bytes (6GiB){other_forms}"
        )

    def slots(self, *, layers: int, experts: int, expert_bytes: int) -> int:
        """Slots per layer; raises ConfigError for less than one."""
        slots_per_layer = {
            "share": self.amount * experts + 1e-9,
            "slots": self.amount,
            "bytes": self.amount / (layers * expert_bytes),
        }[self.unit]
        if slots_per_layer < 1:
            raise ConfigError(
                f"{self.text} is less than one expert in each of {layers} layers, "
                f"which needs {layers * expert_bytes:,} bytes or {100 / experts:.3g}%"
            )
        return min(experts, int(slots_per_layer))


def parse_bytes(text: str, option_name: str) -> int:
    """Parse "20GiB"; raises ConfigError with the option's name."""
    amount, unit, is_rate = parse_amount(text)
    if is_rate or unit.upper() not in BYTE_UNITS or not 0 < amount < math.inf:
        raise ConfigError(f"{option_name} is {quote(text)}; use bytes, such as 20GiB")
    return int(amount * BYTE_UNITS[unit.upper()])


def parse_amount(text: str) -> tuple[float, str, bool]:
    """The number, its unit, and whether it is a rate; (0, "", False) if it cannot be parsed.

    The caller reports the error, since it knows which forms are accepted.
    """
    match = AMOUNT_PATTERN.fullmatch(text)
    if match is None:
        return 0.0, "", False
    return float(match[1]), match[2], match[3] is not None


def format_bytes(size: float) -> str:
    """Bytes with three digits and a unit: 6291456 -> "6.00 MiB"."""
    unit = 0
    while size >= 1024 and unit < len(SIZE_UNITS) - 1:
        size, unit = size / 1024, unit + 1
    if unit == 0:
        return f"{size:.0f} B"
    decimals = 2 if size < 10 else 1 if size < 100 else 0
    return f"{size:.{decimals}f} {SIZE_UNITS[unit]}"
