"""How much fast memory experts may have, as it is typed: a share, slots, or bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from coterie.errors import CoterieError

BYTE_UNITS = {
    "B": 1,
    "KB": 10**3,
    "MB": 10**6,
    "GB": 10**9,
    "KIB": 2**10,
    "MIB": 2**20,
    "GIB": 2**30,
}
AMOUNT_PATTERN = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*([A-Za-z%]*)(/s)?\s*", re.I)


@dataclass(frozen=True)
class Capacity:
    """Fast memory for experts: a share of them all, slots of each layer, or bytes."""

    amount: float
    unit: Literal["share", "slots", "bytes"]
    text: str

    @staticmethod
    def parse(text: str, option_name: str = "capacity", other_forms: str = "") -> Capacity:
        """ "35%", "47" or "6GiB"; raises CoterieError that says ``what`` it was to be, and what
        would do beside these."""
        amount, unit, is_rate = parse_amount(text)
        if not is_rate and unit == "%" and 0 < amount <= 100:
            return Capacity(amount / 100, "share", text.strip())
        if not is_rate and unit == "" and amount >= 1 and amount.is_integer():
            return Capacity(amount, "slots", text.strip())
        if not is_rate and unit.upper() in BYTE_UNITS and amount > 0:
            return Capacity(amount * BYTE_UNITS[unit.upper()], "bytes", text.strip())
        raise CoterieError(
            f"{option_name} {text!r}: say a share of the experts (35%), slots of each layer (47) "
            f"or bytes (6GiB){other_forms}"
        )

    def slots(self, *, layers: int, experts: int, expert_bytes: int) -> int:
        """Of each layer, where an expert weighs ``size``; raises for a budget below one."""
        slots_per_layer = {
            "share": self.amount * experts + 1e-9,
            "slots": self.amount,
            "bytes": self.amount / (layers * expert_bytes),
        }[self.unit]
        if slots_per_layer < 1:
            raise CoterieError(
                f"capacity {self.text}: less than one expert in each of {layers} layers, "
                f"which takes {layers * expert_bytes:,} bytes or {100 / experts:.3g}%"
            )
        return min(experts, int(slots_per_layer))


def parse_bytes(text: str, option_name: str) -> int:
    """ "20GiB"; raises CoterieError that says ``what`` was to be so many bytes."""
    amount, unit, is_rate = parse_amount(text)
    if is_rate or unit.upper() not in BYTE_UNITS or amount <= 0:
        raise CoterieError(f"{option_name} {text!r}: say bytes, such as 20GiB")
    return int(amount * BYTE_UNITS[unit.upper()])


def parse_amount(text: str) -> tuple[float, str, bool]:
    """The number, its unit, and whether it is a rate; 0 of nothing where there is none, for who
    asks knows what would have done."""
    match = AMOUNT_PATTERN.fullmatch(text)
    if match is None:
        return 0.0, "", False
    return float(match[1]), match[2], match[3] is not None
