"""How much fast memory experts may have, as it is typed: a share, slots, or bytes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from coterie.naming import CoterieError

UNITS = {"B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KIB": 2**10, "MIB": 2**20, "GIB": 2**30}
NUMBER = re.compile(r"\s*([0-9]*\.?[0-9]+(?:e-?[0-9]+)?)\s*([A-Za-z%]*)(/s)?\s*", re.I)


@dataclass(frozen=True)
class Capacity:
    """Fast memory for experts: a share of them all, slots of each layer, or bytes."""

    amount: float
    unit: Literal["share", "slots", "bytes"]
    text: str

    @staticmethod
    def parse(text: str, what: str = "capacity", or_else: str = "") -> Capacity:
        """ "35%", "47" or "6GiB"; raises CoterieError that says ``what`` it was to be, and what
        would do beside these."""
        amount, unit, rate = read_amount(text)
        if not rate and unit == "%" and 0 < amount <= 100:
            return Capacity(amount / 100, "share", text.strip())
        if not rate and unit == "" and amount >= 1 and amount.is_integer():
            return Capacity(amount, "slots", text.strip())
        if not rate and unit.upper() in UNITS and amount > 0:
            return Capacity(amount * UNITS[unit.upper()], "bytes", text.strip())
        raise CoterieError(
            f"{what} {text!r}: say a share of the experts (35%), slots of each layer (47) "
            f"or bytes (6GiB){or_else}"
        )

    def slots(self, *, layers: int, experts: int, size: int) -> int:
        """Of each layer, where an expert weighs ``size``; raises for a budget below one."""
        each = {
            "share": self.amount * experts + 1e-9,
            "slots": self.amount,
            "bytes": self.amount / (layers * size),
        }[self.unit]
        if each < 1:
            raise CoterieError(
                f"capacity {self.text}: less than one expert in each of {layers} layers, "
                f"which takes {layers * size:,} bytes or {100 / experts:.3g}%"
            )
        return min(experts, int(each))


def parse_bytes(text: str, what: str) -> int:
    """ "20GiB"; raises CoterieError that says ``what`` was to be so many bytes."""
    amount, unit, rate = read_amount(text)
    if rate or unit.upper() not in UNITS or amount <= 0:
        raise CoterieError(f"{what} {text!r}: say bytes, such as 20GiB")
    return int(amount * UNITS[unit.upper()])


def read_amount(text: str) -> tuple[float, str, bool]:
    """The number, its unit, and whether it is a rate; 0 of nothing where there is none, for who
    asks knows what would have done."""
    found = NUMBER.fullmatch(text)
    if found is None:
        return 0.0, "", False
    return float(found[1]), found[2], found[3] is not None
