r"""Short answers in LaTeX, and whether two of them say the same: ``\frac12``, 0.5, ``x = 1/2``.

What can be decided without algebra is decided here: numbers, words, options, digits in a base.
The rest goes to math-verify, in a form that it reads well.
"""

from __future__ import annotations

import re
from fractions import Fraction

from coterie.evals.tasks.numbers import SIGNS, grouped, numbers, plain
from coterie.evals.tasks.verify import mean_the_same

LONGEST = 1000  # characters: beyond, an answer is none

WORDS = r"\\(?:text(?:bf|it|rm|sf|tt|normal|up)?|mathrm|mathbf|mathit|mbox|hbox|operatorname)\*?"
WORDED = re.compile(WORDS + r"\s*\{([^{}]*)\}")
UNIT = re.compile(WORDS + r"\s*\{[^{}]*\}(?:\s*\^\s*(?:\{\s*-?\d\s*\}|-?\d))?")
JOINED = re.compile(WORDS + r"\s*\{\s*,?\s*(?:and|or)\s*\}|,?\s\b(?:and|or)\b\s")
SYMBOLS = {
    "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "\u222a": r"\cup ", "∩": r"\cap ", "≤": r"\le ",
    "≥": r"\ge ", "≠": r"\ne ", "∈": r"\in ", "±": r"\pm ", "·": r"\cdot ", "°": r"^\circ ",
    "θ": r"\theta ", "²": "^2", "³": "^3",
}  # fmt: skip
LOOKS = [
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
    (re.compile(r"\\sqrt\s*(\d+)"), r"\\sqrt{\1}"),
    (re.compile(r"(?:\\text\s*)?\{,\}|(?<!\\),\\!\s*"), ","),
    (re.compile(r"(?<!\\)\\!"), ""),
    (re.compile(r"(?<=\d)\\[,;: ](?=\d{3}(?!\d))"), ""),
    (re.compile(r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![a-zA-Z])|\\hspace\{[^{}]*\}"), " "),
    (re.compile(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?(?:\s*[CF]\b)?|\\degree(?![a-zA-Z])"), ""),
    (re.compile(r"\bdegrees?\b"), ""),
    (re.compile(r"(?<=\d)\s*\^\s*(?:\{\s*o\s*\}|o\b)"), ""),  # degrees, by hand
    (re.compile(r"(?<![a-zA-Z\\])pi(?![a-zA-Z])"), r"\\pi"),
    (re.compile(r"\\?[$€£¥₹]|(?<!\\)\\[()\[\]]"), ""),
    (re.compile(r"\\?%|\bper\s?cent\b"), r"\\%"),
    (re.compile(r"\*\*|__"), ""),
    (re.compile(r"\\\\|&"), r" \g<0> "),  # math-verify loses rows that touch
    (re.compile(r"\s+"), " "),
]
TWICE = re.compile(r"\\\\(?=[a-zA-Z,;!$%])")  # escaped twice, on the way through JSON
COMMAS = re.compile(r",(?:\s*,)+")
ENDLESS = re.compile(r"(\d*)\.(\d*)\\overline\s*\{\s*(\d+)\s*\}")
OUTER = re.compile(r"^\{([^{}]*)\}$")

# A name before its value: x =, x_1 =, f(x) =, (x, y) =, \theta =, AB =, x \in
NAME = (
    r"(?:[a-zA-Z]{1,3}(?:_\{?\w+\}?)?'?|\\[a-zA-Z]+|\\?[a-zA-Z]+\s*\([\w, ]*\)"
    r"|\(\s*[a-zA-Z](?:\s*,\s*[a-zA-Z])*\s*\))"
)
NAMED = re.compile(rf"^\s*{NAME}\s*(?:=|:|\\(?:in|approx)(?![a-z]))\s*(?=[^=])")
NAMED_LAST = re.compile(r"^([^=]*[^=<>!])=\s*[a-zA-Z]$")
EACH_NAMED = re.compile(r"(^|,)\s*[a-zA-Z](?:_\{?\w+\}?)?\s*=\s*")
SUMS = re.compile(
    r"^(?:[\s\d.,+*/()^{}-]|\\(?:times|cdot|div|frac|sqrt|pi)(?![a-z])|"
    + WORDS
    + r"\s*\{[^{}]*\})*="
)

FUNCTION = r"(?:sin|cos|tan|cot|sec|csc|log|ln|exp|sqrt|max|min|mod|gcd|lcm|not?|arc\w+)\b"
LEADING = re.compile(rf"^(?:(?!{FUNCTION})[A-Za-z]{{2,}}:?\s+)+", re.IGNORECASE)
SHORT = r"(?:[ckmn]?m|kg?|g|m?l|lb|oz|ft|yd|mi|in|hr?|[ap]m|[sLNJWV])"
ATTACHED = r"(?:[ckmn]m|kg|ml|lbs?|oz|ft|yd|mi|in|hrs?|mins?|mph|km/hr?|[ap]m)"
TRAILING = re.compile(  # alternatives that exclude each other, or a long text takes for ever
    rf"(?:(?:(?<=\d){ATTACHED}\b|(?<=[\d)}}A-Za-z.])\s+(?:(?!{FUNCTION})[A-Za-z]{{3,}}\.?|{SHORT}\b))"
    r"(?:\s*\^\s*\{?[23]\}?)?(?:\s*/\s*[A-Za-z]+(?:\^\{?\d\}?)?)?)+$"
)

BASED = re.compile(r"^([0-9A-Fa-f]+)\s*(?:_\s*\{?\s*\(?(\w+)\)?\s*\}?|\(?base (\w+)\)?)?$")
OPTION = re.compile(
    r"^(?:(?:option|choice|answer)\s+)?(?:\(([A-Za-z])\)|([A-Za-z])(?=[).:]|$))", re.I
)
NOISE = re.compile(r"^(?:the|a|an)\s+|[\s.\"'`]+$|^[\s\"'`]+", re.IGNORECASE)

BOUND = r"([^<>,=]+?)"
SIGN = r"(<|>|\\lt|\\gt|\\le|\\ge|<=|>=)(?![a-zA-Z])"
BUILT = re.compile(r"^\\\{\s*[a-zA-Z]\s*(?:\\mid|\\vert|:|\|)\s*(.*)\\\}$")
BETWEEN = re.compile(rf"^\s*{BOUND}\s*{SIGN}\s*([a-zA-Z])\s*{SIGN}\s*{BOUND}\s*$")
ABOVE = re.compile(rf"^\s*([a-zA-Z])\s*{SIGN}\s*{BOUND}\s*$")
BELOW = re.compile(rf"^\s*{BOUND}\s*{SIGN}\s*([a-zA-Z])\s*$")
FLIPPED = {"<": ">", ">": "<", "<=": ">=", ">=": "<="}


def same(answer: str, gold: str) -> bool:
    """Whether ``answer`` says what ``gold`` does; both as in a box, without it."""
    if max(len(answer), len(gold)) > LONGEST:
        return False
    left, right = tidy(answer), tidy(gold)
    if not left or not right:
        return False
    decided = True if left == right else _decided(left, right)
    return _worked_out(left, right) if decided is None else decided


def tidy(latex: str) -> str:
    r"""One spelling of what only looks different: ``\dfrac``, ``\left(``, ``$``, degrees."""
    text = latex.translate(SIGNS)
    for sign, spelled in SYMBOLS.items():
        text = text.replace(sign, spelled)
    if r"\begin" not in text:
        text = TWICE.sub(r"\\", text)
    for look, spelled in LOOKS:
        text = look.sub(spelled, text)
    text = ENDLESS.sub(_ended, COMMAS.sub(",", JOINED.sub(", ", text)))
    text = text.strip().rstrip(".,;: ").strip()
    outer = OUTER.match(text)
    return outer[1].strip() if outer else text


def amounts(text: str) -> set[Fraction]:
    """What a text that is one number, with or without a unit, may mean; 15% is 15, or 0.15."""
    bare = LEADING.sub("", unitless(text)).replace(r"\%", "%").strip()
    percent = bare.endswith("%")
    spelled = grouped(plain(bare.removesuffix("%")).strip().removesuffix(".").strip())
    found = list(numbers(spelled))
    if len(found) != 1 or (found[0].start, found[0].stop) != (0, len(spelled)):
        return set()
    value = found[0].value * found[0].scale
    return {value, value / 100} if percent else {value}


def unitless(text: str) -> str:
    r"""Without ``\text{ cm}^2`` and "square units", where a value is left."""
    without = UNIT.sub(" ", text)
    if not re.search(r"[0-9a-zA-Z]", without):
        return WORDED.sub(r"\1", text).strip()
    return TRAILING.sub("", without.strip()).strip()


def words(text: str) -> str:
    r"""``\text{The Ellipse}.`` as ellipse."""
    said = re.sub(r"[${}]", "", WORDED.sub(r" \1 ", text))
    return NOISE.sub("", NOISE.sub("", " ".join(said.split()))).casefold()


def _ended(found: re.Match[str]) -> str:
    r"""``0.1\overline{6}`` as a fraction."""
    whole, still, again = found.groups()
    value = Fraction(int(f"{whole}{still}{again}") - int(f"{whole}{still}" or 0))
    value /= (10 ** len(again) - 1) * 10 ** len(still)
    return rf"\frac{{{value.numerator}}}{{{value.denominator}}}"


def _decided(answer: str, gold: str) -> bool | None:
    """By words, numbers and digits alone; None: they do not tell."""
    if not re.search(r"[0-9a-zA-Z\\]", WORDED.sub("", gold)) or OPTION.fullmatch(gold):
        return _same_words(answer, gold)
    based = BASED.match(gold)
    if based is not None and based[2]:
        return _same_digits(answer, based)
    values, right = amounts(_unnamed(answer)), amounts(_unnamed(gold))
    if values and right:
        alike = max(values) == max(right) or (len(values) != len(right) and values & right)
        return True if alike else None  # 0.3333333 may still do for 1/3
    return True if _same_words(answer, gold) else None


def _same_words(answer: str, gold: str) -> bool:
    said, right = words(answer), words(gold)
    option = OPTION.fullmatch(right)
    if option is not None:
        chosen = OPTION.match(said)
        return chosen is not None and (chosen[1] or chosen[2]) == (option[1] or option[2])
    return said == right or said.rpartition(" is ")[2] == right


def _same_digits(answer: str, gold: re.Match[str]) -> bool:
    r"""``52_8``: the digits count, and the base where it is given."""
    said = BASED.match(" ".join(WORDED.sub(r" \1 ", _unnamed(answer)).split()))
    if said is None:
        return False
    return said[1].upper() == gold[1].upper() and (said[2] or said[3]) in (None, gold[2])


def _unnamed(text: str) -> str:
    r"""The 5 of ``x = 5``, the ``[-2, 7]`` of ``x \in [-2, 7]``, the 18 of ``9 * 2 = 18``."""
    bare = NAMED.sub("", text, count=1)
    named_last = NAMED_LAST.match(bare)
    bare = named_last[1].strip() if named_last else bare
    sums = SUMS.match(bare)
    return bare if sums is None else bare[sums.end() :].strip()


def _worked_out(answer: str, gold: str) -> bool:
    said, right = unitless(answer), unitless(gold)
    if "=" not in right:
        said, right = EACH_NAMED.sub(r"\1", _unnamed(said)), _unnamed(right)
        if _is_interval(right):
            said = as_interval(said)
    elif "=" not in said:
        right = _unnamed(right)
    if _is_list(said):
        # A point written without its brackets keeps its order; "100,200" is two in a list.
        if right.startswith("(") and right.endswith(")") and "," in right:
            said = f"({said})"
        elif _is_list(right):
            said = said.replace(",", ", ")
    return mean_the_same(right, said)


def _is_list(text: str) -> bool:
    return "," in text and not re.search(r"[()\[\]]|\\[{}]|\\cup|\\begin", text)


def _is_interval(text: str) -> bool:
    return bool(re.search(r"\\infty|\\cup", text)) or (
        "," in text and text[:1] in "([" and text[-1:] in ")]"
    )


def as_interval(text: str) -> str:
    r"""``2 < x \le 5`` and ``\{x \mid 2 < x \le 5\}`` as ``(2, 5]``; anything else as it is."""
    built = BUILT.match(text)
    parts = [_interval(p) for p in re.split(r"\\cup(?![a-z])|,", built[1] if built else text)]
    return r" \cup ".join(part for part in parts if part) if all(parts) else text


def _interval(text: str) -> str | None:
    between = BETWEEN.match(text)
    if between:
        low, first, _, second, high = between.groups()
        first, second = _sign(first), _sign(second)
        if first[0] != second[0]:
            return None
        if first[0] == ">":
            low, first, second, high = high, FLIPPED[second], FLIPPED[first], low
        return f"{_open(first)}{low.strip()}, {high.strip()}{_shut(second)}"
    above, below = ABOVE.match(text), BELOW.match(text)
    if above:
        sign, bound = _sign(above[2]), above[3]
    elif below:
        sign, bound = FLIPPED[_sign(below[2])], below[1]
    else:
        return None
    bound = bound.strip()
    if sign[0] == ">":
        return rf"{_open(FLIPPED[sign])}{bound}, \infty)"
    return rf"(-\infty, {bound}{_shut(sign)}"


def _sign(written: str) -> str:
    return {r"\lt": "<", r"\gt": ">", r"\le": "<=", r"\ge": ">="}.get(written, written)


def _open(sign: str) -> str:
    return "[" if sign.endswith("=") else "("


def _shut(sign: str) -> str:
    return "]" if sign.endswith("=") else ")"
