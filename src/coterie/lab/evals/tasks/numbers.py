r"""Numbers in texts of models: ``$1,234.50``, ``-\frac{1}{2}``, ``2 1/2``, ``18.00 dollars``."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction

SIGN_TABLE = {  # minus signs, times, fraction slash, full-width percent and comma
    0x2212: "-", 0xFE63: "-", 0xFF0D: "-", 0xD7: "*", 0x2044: "/", 0xFF05: "%", 0xFF0C: ",",
}  # fmt: skip
VULGAR_FRACTIONS = {
    ord(sign): f" {spelled}"
    for sign, spelled in {
        "½": "1/2", "⅓": "1/3", "⅔": "2/3", "¼": "1/4", "¾": "3/4", "⅕": "1/5", "⅛": "1/8",
    }.items()
}  # fmt: skip

COMMA = re.compile(r"(?:\\text\s*)?\{,\}|,\\!\s*")
THIN_SPACE = re.compile(r"(?<=\d)(?:\\[,;:! ]|[~\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
GROUP_SPACE = re.compile(r"(?<=\d) (?=\d{3}(?!\d))")
SPACE = re.compile(r"\\[,;:! ]|[~\u00a0\u2009\u202f]|\\q?quad\b")
FRACTION = re.compile(
    r"(?P<before>\d?)\s{0,3}\\[dtc]?frac\s*"
    r"(?:\{\s*(?P<over>-?[\d.,]+)\s*\}|\s*(?P<digit>\d))\s*"
    r"(?:\{\s*(?P<under>-?[\d.,]+)\s*\}|(?P<other>\d))"
)
TEXT_COMMAND = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mbox|bf|rm)\s*\{([^{}]*)\}")
POWER_OF_TEN = re.compile(r"(?<=\d)\s*\*\s*10\s*\^\s*(?:\{\s*(-?\d{1,2})\s*\}|(\d))(?!\d)")
UNIT_POWER = re.compile(r"(?<=[A-Za-z])\s*\^\s*(?:\{\s*[23]\s*\}|[23])")  # of a unit: cm^2
INVISIBLE = re.compile(r"\\(?:left|right|displaystyle)\b|\\(?=[$%#])|\\[()\[\]]|__")

CURRENCY = r"(?:(?:US|A|C)?[$€£¥₹]|USD|EUR|GBP|INR|Rs\.)"
WHOLE_NUMBER = r"\d{1,3}(?:,\d{3})+(?!\d)|\d+"
NUMBER = re.compile(
    rf"(?<![A-Za-z_\d])(?P<sign>-\s*)?(?:{CURRENCY}\s*)?(?P<inner>-)?"
    rf"(?:(?P<mixed>\d+)\s+(?=\d+\s?/\s?\d))?"
    rf"(?P<core>(?:{WHOLE_NUMBER})(?:\.\d+)?|(?<![\d.])\.\d+)"
    rf"(?:\s?/\s?(?P<under>(?:{WHOLE_NUMBER})(?:\.\d+)?)|[eE](?P<ten>[+-]?\d{{1,2}})(?!\w))?"
    r"(?P<scale>\s*(?:thousand|million|billion)\b)?"
)
# A time of day, a date, a version, a ratio, a power, a root: the digits are no number of their own.
NUMBER_GOES_ON = re.compile(r":\d|\.\d|/\s?\d|_\d|\s*(?:\^|√|\\(?:sqrt|pi)\b)")
PART_BEFORE = re.compile(
    r"(?:\d[:._]|\d/\s?\d{1,4}/\s?|\^\s*\{?|(?:√|\\sqrt)\s*(?:\[\d?\]?)?\s*\{?|(?:±|\\pm)\s?)\Z"
)
SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9}
MAX_DIGITS = 300  # Python refuses to parse thousands of digits


@dataclass(frozen=True)
class ParsedNumber:
    """A number at ``start .. stop`` of a text; ``text`` has no commas and no currency.

    ``scale`` is the million of "1.5 million", which a gold may treat as a unit.
    """

    text: str
    value: Fraction
    start: int
    stop: int
    scale: int = 1


def latex_to_plain(text: str) -> str:
    r"""Plain text for LaTeX: ``\$1{,}234`` becomes $1,234 and ``\frac{1}{2}`` becomes 1/2."""
    text = text.translate(SIGN_TABLE | VULGAR_FRACTIONS)
    text = SPACE.sub(" ", THIN_SPACE.sub("", COMMA.sub(",", text)))
    text = text.replace(r"\times", "*").replace(r"\cdot", "*").replace(r"\div", "/")
    text = POWER_OF_TEN.sub(lambda match: f"e{match[1] or match[2]}", text)
    text = TEXT_COMMAND.sub(r" \1", FRACTION.sub(_format_fraction, text))
    return UNIT_POWER.sub("", INVISIBLE.sub("", text))


def join_digit_groups(text: str) -> str:
    """Removes the spaces of "1 234 567"; for answers only, not for prose."""
    return GROUP_SPACE.sub("", text)


def find_numbers(text: str) -> Iterator[ParsedNumber]:
    """All numbers of a plain text, from left to right; "16 - 3" has 16 and 3."""
    for match in NUMBER.finditer(text):
        number = _parse_number(match, text)
        if number is not None:
            yield number


def _parse_number(match: re.Match[str], text: str) -> ParsedNumber | None:
    if NUMBER_GOES_ON.match(text, match.end()) or PART_BEFORE.search(
        text, max(0, match.start() - 12), match.start()
    ):
        return None
    core = match["core"].replace(",", "")
    denominator = (match["under"] or "").replace(",", "")
    if max(len(core), len(denominator), len(match["mixed"] or "")) > MAX_DIGITS:
        return None
    value = Fraction(core) * Fraction(10) ** int(match["ten"] or 0)
    digits = core + (f"e{match['ten']}" if match["ten"] else "")
    if denominator and Fraction(denominator):
        value, digits = value / Fraction(denominator), f"{core}/{denominator}"
        if match["mixed"]:
            value, digits = value + int(match["mixed"]), f"{match['mixed']} {digits}"
    elif denominator:
        digits = f"{core}/{denominator}"
    negative = bool(match["inner"]) or (bool(match["sign"]) and _is_sign(match, text))
    if negative:
        value, digits = -value, f"-{digits}"
    scale = SCALES[match["scale"].strip()] if match["scale"] else 1
    return ParsedNumber(digits, value, match.start(), match.end(), scale)


def _is_sign(match: re.Match[str], text: str) -> bool:
    """Whether a minus is a sign: not in "16 - 3", "a-3" or a list item "- 3 eggs"."""
    before = text[max(0, match.start() - 40) : match.start()]
    last = before.rstrip()[-1:]
    line_start = not before.rpartition("\n")[2].strip()
    if line_start:
        return not match["sign"][1:]
    if last.isdigit() or last in ")]}%":
        return False
    return not last.isalpha() or before[-1:].isspace()


def _format_fraction(match: re.Match[str]) -> str:
    numerator = match["over"] or match["digit"]
    denominator = match["under"] or match["other"]
    gap = f"{match['before']} " if match["before"] else ""
    return f"{gap}{numerator}/{denominator}"
