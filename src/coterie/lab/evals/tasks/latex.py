r"""Equivalence of short LaTeX answers: ``\frac12``, 0.5 and ``x = 1/2`` are the same.

Numbers, words, options and digits in a base are compared here. The rest is normalized and compared
by math-verify.
"""

from __future__ import annotations

import re
from fractions import Fraction

from coterie.lab.evals.tasks.numbers import (
    SIGN_TABLE,
    find_numbers,
    join_digit_groups,
    latex_to_plain,
)
from coterie.lab.evals.tasks.verify import is_equivalent_latex

MAX_LENGTH = 1000  # characters; a longer text is no answer

TEXT_COMMAND = (
    r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mathrm|mathbf|mathit|mbox|hbox|operatorname)\*?"
)
TEXT_GROUP = re.compile(TEXT_COMMAND + r"\s*\{([^{}]*)\}")
UNIT = re.compile(TEXT_COMMAND + r"\s*\{[^{}]*\}(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?")
CONJUNCTION = re.compile(TEXT_COMMAND + r"\s*\{\s*,?\s*(?:and|or)\s*\}|,?\s\b(?:and|or)\b\s")
SYMBOLS = {
    "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "\u222a": r"\cup ", "∩": r"\cap ", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "∈": r"\in ", "±": r"\pm ", "·": r"\cdot ", "°": r"^\circ ",
    "θ": r"\theta ", "²": "^2", "³": "^3",
}  # fmt: skip
NORMALIZATIONS = [
    (re.compile(r"\\\\\s*\[[^\]]*\]"), r"\\\\ "),  # "\\[4pt]"
    (re.compile(r"\\(?:text)?color\s*\{[^{}]*\}|\\(?:underline|underset\{[^{}]*\})(?![a-z])"), ""),
    (re.compile(r"\\(?:mathrm|text|operatorname)\s*\{\s*([ie])\s*\}"), r"\1"),
    (
        re.compile(
            r"\\(?:left|right|[bB]igg?[lrm]?|(?:display|text)style|limits|[lL]arge|LARGE|[hH]uge)(?![a-zA-Z])"
        ),
        "",
    ),
    (re.compile(r"\\[dtc]frac(?![a-zA-Z])"), r"\\frac"),
    (re.compile(r"\\(?:leq|leqslant)(?![a-zA-Z])"), r"\\le"),
    (re.compile(r"\\(?:geq|geqslant)(?![a-zA-Z])"), r"\\ge"),
    (re.compile(r"\\varnothing(?![a-zA-Z])"), r"\\emptyset"),
    (re.compile(r"\\langle(?![a-zA-Z])"), "("),
    (re.compile(r"\\rangle(?![a-zA-Z])"), ")"),
    (re.compile(r"(?<![a-zA-Z\\{])(sin|cos|tan|cot|csc|log|ln|exp|sqrt)(?![a-zA-Z])"), r"\\\1 "),
    (re.compile(r"\\sqrt\s*(\d+)"), r"\\sqrt{\1}"),
    (re.compile(r"\+\s*\(\s*-\s*(\d*\.?\d*)\s*i\s*\)"), r"-\1i"),  # 3 + (-2i)
    (re.compile(r"\\sqrt\s*\(([^()]*)\)"), r"\\sqrt{\1}"),
    (
        re.compile(r"\\sqrt\s*\{\s*\\frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}\s*\}"),
        r"\\frac{\\sqrt{\1}}{\\sqrt{\2}}",
    ),
    (re.compile(r"\\sqrt\s*\{\s*(\w+)\s*/\s*(\w+)\s*\}"), r"\\frac{\\sqrt{\1}}{\\sqrt{\2}}"),
    (re.compile(r"\+\s*\(?\s*-\s*(\d*\.?\d*)\s*\)?\s*(?=i\b)"), r"-\1"),  # 3 + (-2)i
    (re.compile(r"(?:\\text\s*)?\{,\}|(?<!\\),\\!\s*"), ","),
    (re.compile(r"(?<!\\)\\!"), ""),
    (re.compile(r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])|\\hspace\{[^{}]*\}"), " "),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?(?:\s*[CF]\b)?|\\degree(?![a-zA-Z])"), ""),
    (re.compile(r"\bdegrees?\b"), ""),
    (re.compile(r"(?<=\d)\s*\^\s*(?:\{\s*o\s*\}|o\b)"), ""),  # "o" for degrees
    (re.compile(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])"), r"\\pi"),
    (re.compile(r"\\?[$€£¥₹]|(?<!\\)\\[()\[\]]"), ""),
    (re.compile(r"\\?%|\bper\s?cent\b"), r"\\%"),
    (re.compile(r"\*\*|__"), ""),
    (re.compile(r"\\\\|&"), r" \g<0> "),  # math-verify needs spaces between rows
    (re.compile(r"\s+"), " "),
]
DOUBLE_ESCAPE = re.compile(r"\\\\(?=[a-zA-Z,;!$%])")  # escaped twice by a JSON encoder
REPEATED_COMMAS = re.compile(r",(?:\s*,)+")
REPEATING_DECIMAL = re.compile(r"(?<!\d)(\d*+)\.(\d*)\\overline\s*\{\s*(\d+)\s*\}")
OUTER_BRACES = re.compile(r"^\{([^{}]*)\}$")

# A name before its value: x =, x_1 =, f(x) =, (x, y) =, \theta =, AB =, x \in
VARIABLE = (
    r"(?:[a-zA-Z]{1,3}(?:_\{?\w+\}?)?'?|\\[a-zA-Z]+|\\?[a-zA-Z]+\s*\([\w, ]*\)"
    r"|\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))"
)
ASSIGNMENT = re.compile(rf"^\s*{VARIABLE}\s*(?:=|:|\\(?:in|approx)(?![a-z]))\s*(?=[^=])")
TRAILING_VARIABLE = re.compile(r"^([^=]*[^=<>!])=\s*[a-zA-Z]$")
EACH_ASSIGNMENT = re.compile(r"(^|,)\s*[a-zA-Z](?:_\{?\w+\}?)?\s*=\s*")
COMPUTATION = re.compile(
    r"^(?:[\s\d.,+*/()^{}-]|\\(?:times|cdot|div|frac|sqrt|pi)(?![a-z])|"
    + TEXT_COMMAND
    + r"\s*\{[^{}]*\})*="
)

FUNCTION = r"(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|max|min|mod|gcd|lcm|not?|arc\w+)\b"
LEADING_WORDS = re.compile(rf"^(?:(?!{FUNCTION})[A-Za-z]{{2,}}:?\s+)+", re.IGNORECASE)
SHORT_UNIT = r"(?:[ckmn]?m|kg?|g|m?l|lb|oz|ft|yd|mi|in|hr?|[ap]m|[sLNJWV])"
ATTACHED_UNIT = r"(?:[ckmn]m|kg|ml|lbs?|oz|ft|yd|mi|in|hrs?|mins?|mph|km/hr?|[ap]m)"
TRAILING_UNITS = re.compile(  # exclusive alternatives, for linear time
    rf"(?:(?:(?<=\d){ATTACHED_UNIT}\b|(?<=[\d)}}A-Za-z.])\s+(?:(?!{FUNCTION})[A-Za-z]{{3,}}\.?|{SHORT_UNIT}\b))"
    r"(?:\s*\^\s*\{?[23]\}?)?(?:\s*/\s*[A-Za-z]+(?:\^\{?\d\}?)?)?)+$"
)

NUMBER_IN_BASE = re.compile(r"^([0-9A-Fa-f]+)\s*(?:_\s*\{?\s*\(?(\w+)\)?\s*\}?|\(?base (\w+)\)?)?$")
OPTION = re.compile(
    r"^(?:(?:option|choice|answer)\s+)?(?:\(([A-Za-z])\)|([A-Za-z])(?=[).:]|$))", re.I
)
NOISE = re.compile(r"^(?:the|a|an)\s+|[\s.\"'`]+$|^[\s\"'`]+", re.IGNORECASE)

BOUND, SIGN = r"([^<>,=]+?)", r"(<=?|>=?|\\[lg][te])(?![a-zA-Z])"
SET_BUILDER = re.compile(r"^\\\{\s*[a-zA-Z]\s*(?:\\mid|\\vert|:|\|)\s*(.*)\\\}$")
INEQUALITY = re.compile(
    rf"^\s*(?:{BOUND}\s*{SIGN}\s*)??[a-zA-Z]\s*(?:{SIGN}\s*{BOUND})?\s*$"  # 2 < x \le 5, x > 2
)
GREATER, INCLUSIVE = {">", ">=", r"\gt", r"\ge"}, {"<=", ">=", r"\le", r"\ge"}


def is_equivalent(answer: str, gold: str) -> bool:
    """Whether two box contents are the same answer."""
    if max(len(answer), len(gold)) > MAX_LENGTH:
        return False
    answer, gold = normalize(answer), normalize(gold)
    if not answer or not gold:
        return False
    equal = True if answer == gold else _compare_directly(answer, gold)
    return _compare_symbolically(answer, gold) if equal is None else equal


def normalize(latex: str) -> str:
    r"""Unifies spellings: ``\dfrac``, ``\left(``, ``$``, degree signs."""
    text = latex.translate(SIGN_TABLE)
    for sign, replacement in SYMBOLS.items():
        text = text.replace(sign, replacement)
    if r"\begin" not in text:
        text = DOUBLE_ESCAPE.sub(r"\\", text)
    for pattern, replacement in NORMALIZATIONS:
        text = pattern.sub(replacement, text)
    text = REPEATED_COMMAS.sub(",", CONJUNCTION.sub(", ", text))
    text = REPEATING_DECIMAL.sub(_expand_repeating, text)
    text = text.strip().rstrip(".,;: ").strip()
    outer = OUTER_BRACES.match(text)
    return outer[1].strip() if outer else text


def possible_values(text: str) -> set[Fraction]:
    """The possible values of one number, with or without a unit; 15% is 15 or 0.15."""
    stripped = LEADING_WORDS.sub("", strip_units(text)).replace(r"\%", "%").strip()
    percent = stripped.endswith("%")
    plain = latex_to_plain(stripped.removesuffix("%")).strip().removesuffix(".").strip()
    plain = join_digit_groups(plain)
    matches = list(find_numbers(plain))
    if len(matches) != 1 or (matches[0].start, matches[0].stop) != (0, len(plain)):
        return set()
    value = matches[0].value * matches[0].scale
    return {value, value / 100} if percent else {value}


def strip_units(text: str) -> str:
    r"""Removes ``\text{ cm}^2`` and "square units" if a value remains."""
    stripped = UNIT.sub(" ", text)
    if not re.search(r"[0-9a-zA-Z]", stripped):
        return TEXT_GROUP.sub(r"\1", text).strip()
    return TRAILING_UNITS.sub("", stripped.strip()).strip()


def normalize_words(text: str) -> str:
    r"""``\text{The Ellipse}.`` becomes "ellipse"."""
    unwrapped = re.sub(r"[${}]", "", TEXT_GROUP.sub(r" \1 ", text))
    return NOISE.sub("", NOISE.sub("", " ".join(unwrapped.split()))).casefold()


def _expand_repeating(match: re.Match[str]) -> str:
    r"""``0.1\overline{6}`` becomes a fraction."""
    integer_part, fixed_digits, repeating_digits = match.groups()
    prefix = f"{integer_part}{fixed_digits}"
    value = Fraction(int(prefix + repeating_digits) - int(prefix or 0))
    value /= (10 ** len(repeating_digits) - 1) * 10 ** len(fixed_digits)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _compare_directly(answer: str, gold: str) -> bool | None:
    """Compares words, numbers and digits; None if these do not decide."""
    if not re.search(r"[0-9a-zA-Z\\]", TEXT_GROUP.sub("", gold)) or OPTION.fullmatch(gold):
        return _same_words(answer, gold)
    gold_in_base = NUMBER_IN_BASE.match(gold)
    if gold_in_base is not None and gold_in_base[2]:
        return _same_digits(answer, gold_in_base)
    values, gold_values = (possible_values(_strip_assignment(text)) for text in (answer, gold))
    if values and gold_values:
        overlap = len(values) != len(gold_values) and values & gold_values
        # 0.3333333 may still be accepted for 1/3.
        return True if overlap or max(values) == max(gold_values) else None
    return True if _same_words(answer, gold) else None


def _same_words(answer: str, gold: str) -> bool:
    answer, gold = normalize_words(answer), normalize_words(gold)
    gold_option, option = OPTION.fullmatch(gold), OPTION.match(answer)
    if gold_option is not None:
        letter = gold_option[1] or gold_option[2]
        return option is not None and (option[1] or option[2]) == letter
    return answer == gold or answer.rpartition(" is ")[2] == gold


def _same_digits(answer: str, gold: re.Match[str]) -> bool:
    r"""Compares ``52_8`` by digits, and by base if the answer has one."""
    plain = " ".join(TEXT_GROUP.sub(r" \1 ", _strip_assignment(answer)).split())
    number = NUMBER_IN_BASE.match(plain)
    if number is None or number[1].upper() != gold[1].upper():
        return False
    return (number[2] or number[3]) in (None, gold[2])


def _strip_assignment(text: str) -> str:
    r"""The 5 of ``x = 5``, the ``[-2, 7]`` of ``x \in [-2, 7]``, the 18 of ``9 * 2 = 18``."""
    stripped = ASSIGNMENT.sub("", text, count=1)
    trailing = TRAILING_VARIABLE.match(stripped)
    stripped = trailing[1].strip() if trailing else stripped
    computation = COMPUTATION.match(stripped)
    return stripped if computation is None else stripped[computation.end() :].strip()


def _compare_symbolically(answer: str, gold: str) -> bool:
    answer, gold = strip_units(answer), strip_units(gold)
    if "=" not in gold:
        answer = EACH_ASSIGNMENT.sub(r"\1", _strip_assignment(answer))
        gold = _strip_assignment(gold)
        in_brackets = "," in gold and gold[:1] in "([" and gold[-1:] in ")]"
        if in_brackets or re.search(r"\\infty|\\cup", gold):
            answer = as_interval(answer)
    elif "=" not in answer:
        gold = _strip_assignment(gold)
    if _is_list(answer):
        # A point without brackets is ordered; "100,200" in a list is two numbers.
        if gold.startswith("(") and gold.endswith(")") and "," in gold:
            answer = f"({answer})"
        elif _is_list(gold):
            answer = answer.replace(",", ", ")
    return is_equivalent_latex(gold, answer)


def _is_list(text: str) -> bool:
    return "," in text and not re.search(r"[()\[\]]|\\[{}]|\\cup|\\begin", text)


def as_interval(text: str) -> str:
    r"""``2 < x \le 5`` and ``\{x \mid 2 < x \le 5\}`` become ``(2, 5]``; other texts stay."""
    set_builder = SET_BUILDER.match(text)
    condition = set_builder[1] if set_builder else text
    parts = [_parse_interval(part) for part in re.split(r"\\cup(?![a-z])|,", condition)]
    return r" \cup ".join(part for part in parts if part) if all(parts) else text


def _parse_interval(text: str) -> str | None:
    inequality = INEQUALITY.match(text)
    if inequality is None:
        return None
    low, first, second, high = inequality.groups()
    directions = {sign in GREATER for sign in (first, second) if sign}
    if len(directions) != 1:
        return None
    if directions == {True}:
        low, first, second, high = high, second, first, low
    opening, closing = "[" if first in INCLUSIVE else "(", "]" if second in INCLUSIVE else ")"
    low, high = (r"-\infty" if low is None else low), (r"\infty" if high is None else high)
    return f"{opening}{low.strip()}, {high.strip()}{closing}"
