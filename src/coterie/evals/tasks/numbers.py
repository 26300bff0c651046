r"""Numbers as models write them: ``$1,234.50``, ``-\frac{1}{2}``, ``2 1/2``, ``18.00 dollars``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

SIGNS = {  # minus signs, times, fraction slash, full-width percent and comma
    0x2212: "-", 0xFE63: "-", 0xFF0D: "-", 0xD7: "*", 0x2044: "/", 0xFF05: "%", 0xFF0C: ",",
}  # fmt: skip
VULGAR = {
    ord(sign): f" {spelled}"
    for sign, spelled in {
        "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8",
    }.items()
}  # fmt: skip

COMMA = re.compile(r"(?:\\text\s*)?\{,\}|,\\!\s*")
GAP = re.compile(r"(?<=\d)(?:\\[,;:! ]|[~\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
GROUP = re.compile(r"(?<=\d) (?=\d{3}(?!\d))")
SPACE = re.compile(r"\\[,;:! ]|[~\u00a0\u2009\u202f]|\\q?quad\b")
FRACTION = re.compile(
    r"(?P<before>\d?)\s{0,3}\\[dtc]?frac\s*"
    r"(?:\{\s*(?P<over>-?[\d.,]+)\s*\}|\s*(?P<digit>\d))\s*"
    r"(?:\{\s*(?P<under>-?[\d.,]+)\s*\}|(?P<other>\d))"
)
WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|bf|rm)\s*\{([^{}]*)\}")
TENS = re.compile(r"(?<=\d)\s*\*\s*10\s*\^\s*(?:\{\s*(-?\d{1,2})\s*\}|(\d))(?!\d)")
POWER = re.compile(r"(?<=[A-Za-z])\s*\^\s*(?:\{\s*[23]\s*\}|[23])")  # of a unit: cm^2
EMPTY = re.compile(r"\\(?:left|right|displaystyle)\b|\\(?=[$%#])|\\[()\[\]]|__")

CURRENCY = r"(?:(?:US|A|C)?[$€£¥₹]|USD|EUR|GBP|INR|Rs\.)"
WHOLE = r"\d{1,3}(?:,\d{3})+(?!\d)|\d+"
NUMBER = re.compile(
    rf"(?<![A-Za-z_\d])(?P<sign>-\s*)?(?:{CURRENCY}\s*)?(?P<inner>-)?"
    rf"(?:(?P<mixed>\d+)\s+(?=\d+\s?/\s?\d))?"
    rf"(?P<core>(?:{WHOLE})(?:\.\d+)?|(?<![\d.])\.\d+)"
    rf"(?:\s?/\s?(?P<under>(?:{WHOLE})(?:\.\d+)?)|[eE](?P<ten>[+-]?\d{{1,2}})(?!\w))?"
    r"(?P<scale>\s*(?:thousand|million|billion)\b)?"
)
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
LONGEST = 300  # digits: beyond, nothing is a count of apples, and Python refuses thousands


@dataclass(frozen=True)
class Number:
    """A number in a text: as written, less commas and currency; ``start .. stop`` is its place.

    ``scale`` is the million of "1.5 million", which may also be no more than a unit.
    """

    text: str
    value: Fraction
    start: int
    stop: int
    scale: int = 1


def plain(text: str) -> str:
    r"""LaTeX as one would type it: ``\$1{,}234`` is $1,234, ``\frac{1}{2}`` is 1/2."""
    text = text.translate(SIGNS | VULGAR)
    text = SPACE.sub(" ", GAP.sub("", COMMA.sub(",", text)))
    text = text.replace(r"\times", "*").replace(r"\cdot", "*").replace(r"\div", "/")
    text = TENS.sub(lambda found: f"e{found[1] or found[2]}", text)
    return POWER.sub("", EMPTY.sub("", WRAPPED.sub(r" \1", FRACTION.sub(_divided, text))))


def grouped(text: str) -> str:
    """Without the spaces of "1 234 567": only where the text is an answer, not prose."""
    return GROUP.sub("", text)


def numbers(text: str) -> Iterator[Number]:
    """Every number of a plain text, left to right; "16 - 3" holds 16 and 3."""
    for found in NUMBER.finditer(text):
        number = _number(found, text)
        if number is not None:
            yield number


def _number(found: re.Match[str], text: str) -> Number | None:
    core = found["core"].replace(",", "")
    under = (found["under"] or "").replace(",", "")
    if max(len(core), len(under), len(found["mixed"] or "")) > LONGEST:
        return None
    value = Fraction(core) * Fraction(10) ** int(found["ten"] or 0)
    written = core + (f"e{found['ten']}" if found["ten"] else "")
    if under and Fraction(under):
        value, written = value / Fraction(under), f"{core}/{under}"
        if found["mixed"]:
            value, written = value + int(found["mixed"]), f"{found['mixed']} {written}"
    elif under:
        written = f"{core}/{under}"
    negative = bool(found["inner"]) or (bool(found["sign"]) and _is_sign(found, text))
    if negative:
        value, written = -value, f"-{written}"
    scale = SCALES[found["scale"].strip()] if found["scale"] else 1
    return Number(written, value, found.start(), found.end(), scale)


def _is_sign(found: re.Match[str], text: str) -> bool:
    """Whether a minus says "negative": not in "16 - 3", "a-3" or a list's "- 3 eggs"."""
    before = text[max(0, found.start() - 40) : found.start()]
    last = before.rstrip()[-1:]
    line_start = not before.rpartition("\n")[2].strip()
    if line_start:
        return not found["sign"][1:]
    if last.isdigit() or last in ")]}%":
        return False
    return not last.isalpha() or before[-1:].isspace()


def _divided(found: re.Match[str]) -> str:
    over = found["over"] or found["digit"]
    under = found["under"] or found["other"]
    gap = f"{found['before']} " if found["before"] else ""
    return f"{gap}{over}/{under}"
