"""GSM8K: grade-school word problems with a number as answer (Cobbe et al., arXiv 2110.14168).

The grade reads the answer as a person would; several values are a hedge, which is wrong. The two
metrics of lm-evaluation-harness (and dInfer) are recorded as well: ``strict``, the number after the
first ``####``, and ``flexible``, the last number. ``strict`` fails if the prompt asks for a box,
``flexible`` if a sentence follows.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Sequence
from fractions import Fraction
from itertools import islice, pairwise, takewhile
from pathlib import Path

from coterie.errors import TaskError
from coterie.lab.evals.task import QUESTION, Grade, Item, Task, TaskOptions
from coterie.lab.evals.tasks.boxed import ANSWER_LINE_START, ZERO_SHOT, find_boxes, strip_end_marks
from coterie.lab.evals.tasks.numbers import (
    ParsedNumber,
    find_numbers,
    join_digit_groups,
    latex_to_plain,
)
from coterie.lab.evals.tasks.source import BenchmarkData, BenchmarkFile, read_benchmark

Numbers = tuple[ParsedNumber, ...]

KEYS = {"question": str, "answer": str}
TEST, TRAIN = (
    BenchmarkFile(
        f"gsm8k/{split}.jsonl", "openai/gsm8k", (f"main/{split}-00000-of-00001.parquet",), KEYS
    )
    for split in ("test", "train")
)
DEFAULT_SHOTS = {"llada-moe": 4}  # dInfer's; other families: none
MAX_NEW_TOKENS = {"llada-moe": 1024}  # dInfer's; other families: 2048

FEW_SHOT = "Question: {question}\nLet's think step by step\nAnswer:"

GOLD_MARK = re.compile(r"####\s*(\S[^\n]*)")
BOLD = re.compile(r"\*\*([^\w*\n]{0,4}\d[\d,./ ]*[A-Za-z %/]{0,40}[.!]?)\*\*")
DIGIT = re.compile(r"\d")
ANSWER_TAG = re.compile(r"<answer>([^<>]*)</answer>", re.IGNORECASE)
NEXT_QUESTION = re.compile(r"^Question:", re.MULTILINE)
MAX_SENTENCE = 500  # characters read after "the answer is"
ANNOTATION = re.compile(r"<<[^<>\n]*>>")  # calculator notes of the data: "2*3=<<2*3=6>>6"

NEXT_PROBLEM = re.compile(r"^[ \t>*#]*(?:Question|Problem|Q)[ \t*]*\d*[ \t*]*:", re.MULTILINE)
# Not a heading such as "#### 1. Find the cost" or "#### Step 1".
HASHES = re.compile(r"####[ \t*_=(]*(?!\d+[.)][ \t]+\S)(?=\\?(?:US)?[-\u2212.$€£¥₹\d])")
ANSWER_PHRASE = re.compile(
    rf"(?:{ANSWER_LINE_START}[\s*_]*[:=]|"
    r"\banswer\b[^.\n:=]{0,80}?\b(?:is|was|equals)\b[\s*_]*:?)"
    r"(?P<gap>[\s*_`$(\[]*(?:(?:therefore|thus|then|about|approximately|exactly|simply)[\s,*_]*)?)",
    re.IGNORECASE | re.MULTILINE,
)
COMPUTATION = re.compile(r"(?:[\s\d.,+*/()$€£%-]*=)+\s*")  # "9 * 2 = "
# Between the numbers of a hedge: "138 or 149", "138 eggs or 149"; in a box also "138, 149".
OR = re.compile(r"[\s*_`$]*(?P<unit>[A-Za-z]*)[\s*_`$]*,?[\s*_`$]*\bor\b[\s*_`$]*", re.IGNORECASE)
LIST = re.compile(r"\s*(?:[,;]|,?\s*\band\b)\s*")
WORD = re.compile(r"[\s*_`$]{0,9}(?P<unit>[A-Za-z]*)(?!\s{0,9}=)")  # "5A/5 or 20 = A" is no hedge
# Between the numbers of what is not one number: a range, a computation without its result, a date,
# "5 hours and 30 minutes".
JOIN = re.compile(
    r"[\s*_`$)]{0,9}(?:[-+*/~\u2010-\u2015\u00f7]|\.{2,3}|\u2026|to\b|"
    r"(?:st|nd|rd|th)?\s*(?:of\s+)?(?:Jan|Feb|Mar|Apr|May|Jun|Jul|Aug|Sep|Oct|Nov|Dec)[a-z]*\.?,?|"
    r"(?:years?|months?|weeks?|days?|hours?|hrs?|minutes?|feet|foot|ft|yards?|pounds?|lbs?|dollars?)"
    r"[\s,]*(?:and\b)?)[\s*$(]{0,9}",
    re.IGNORECASE,
)
FACTORIAL = re.compile(r"(?<![\w.,])(\d{1,2})\s?!(?!=)")
BETWEEN_BOXES = re.compile(r"[\s$.,]*\bor\b[\s$]*", re.IGNORECASE)
# "The total is 138 dollars for 5 people": the number of the claim, then numbers of its setting.
CLAIM = re.compile(
    r"\b(?:is|are|was|were|be|equals?|totals?|comes? to)[\s*_`]+"
    r"(?:(?:about|approximately|exactly|only|just|a total of)\s+)?$",
    re.IGNORECASE,
)
SETTING = re.compile(
    r"\b(?:for|over|in|per|at|after|during|within|with|from|across|among|by|of|on|each|every)\s+"
    r"(?:(?:the|these|those|all|each|every|another|a|his|her|their|its)\s+)?(?:\w+\s+of\s+)?$",
    re.IGNORECASE,
)
SENTENCE_END = re.compile(r"(?<=[.!?])\s+|\n")
MAX_BEFORE, MAX_GAP = 60, 60  # characters read before a number, and between two of a hedge

HARNESS_STRICT = re.compile(r"#### (-?[0-9.,]+)")
HARNESS_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def open_gsm8k(options: TaskOptions) -> Task:
    """The 1,319 test problems with examples, or zero-shot with a box.

    The number of examples is ``options.shots``, or the default of the family.
    """
    source = read_benchmark(TEST, options.data)
    shots = DEFAULT_SHOTS.get(options.family, 0) if options.shots is None else options.shots
    train = _read_train(source.folder, shots) if shots else None
    about = {
        **source.settings(),
        "shots": shots,
        "examples": None if train is None else train.settings(),
        "template": FEW_SHOT if shots else ZERO_SHOT,
        "counts": "the last box, <answer>, ####; else as said, in bold at the end, or the last",
        "also": {
            "strict": HARNESS_STRICT.pattern + " (first)",
            "flexible": HARNESS_FLEXIBLE.pattern + " (last)",
        },
    }
    template = ZERO_SHOT if train is None else "\n\n".join([*_examples(train, shots), FEW_SHOT])
    return Task(
        "gsm8k",
        tuple(_items(source)),
        template,
        lambda output, item: grade(output, item.gold),
        about,
        MAX_NEW_TOKENS.get(options.family, 2048),
    )


def grade(output: str, gold: str) -> Grade:
    """Compares numbers; ``gold`` is a number, or a solution "... #### 1,234" of the data."""
    expected = gold_value(gold)
    text = strip_end_marks(output)
    values = extract_numbers(_first_problem(text))
    before_next = text.partition("Question:")[0]  # the harness stops here
    return Grade(
        bool(values) and all(expected in (one.value, one.value * one.scale) for one in values),
        " or ".join(dict.fromkeys(one.text for one in values)) or None,
        {
            "strict": _harness_value(HARNESS_STRICT.findall(before_next)[:1]) == expected,
            "flexible": _harness_value(HARNESS_FLEXIBLE.findall(before_next)[-1:]) == expected,
        },
    )


def gold_value(gold: str) -> Fraction:
    """The number in ``gold``; raises TaskError if there is none."""
    matches = GOLD_MARK.findall(gold)
    numbers = extract_numbers(matches[-1] if matches else gold)
    if not numbers:
        raise TaskError(f"{gold!r} holds no number; a gold answer is 1234 or '... #### 1,234'")
    return numbers[0].value * numbers[0].scale


def extract_numbers(text: str) -> Numbers:
    """The answer: the last number in a box, ``<answer>`` or after ``####``.

    Without one: the number after "the answer is", the last one in bold, or that of the last claim.
    Several numbers if the answer is a hedge, none if there is no answer.
    """
    plain_text = latex_to_plain(text)
    return (
        _marked_numbers(text)
        or _stated_numbers(plain_text)
        or _bold_numbers(plain_text)
        or _claimed_numbers(plain_text)
    )


def _read_train(folder: Path | None, shots: int) -> BenchmarkData:
    """The training data from the folder of the test data, or from the hub."""
    if shots < 0:
        raise TaskError(f"gsm8k: {shots} shots; 0 or more")
    path = None if folder is None else folder / "train.jsonl"
    if path is not None and not path.is_file():
        raise TaskError(f"{path}: not found; {shots} shots need it, or set `shots` to 0")
    return read_benchmark(TRAIN, path)


def _examples(train: BenchmarkData, shots: int) -> Iterator[str]:
    """The first examples, without calculator notes."""
    if len(train.rows) < shots:
        raise TaskError(f"{train.name} holds {len(train.rows)} examples, not {shots}")
    for row in train.rows[:shots]:
        answer = ANNOTATION.sub("", str(row["answer"]))
        yield f"{FEW_SHOT.replace(QUESTION, str(row['question']))} {answer}"


def _items(source: BenchmarkData) -> Iterator[Item]:
    for number, row in enumerate(source.rows):
        try:
            gold_value(str(row["answer"]))
        except TaskError as error:
            raise TaskError(f"{source.name}, row {number + 1}: {error}") from None
        yield Item(f"gsm8k/{number}", str(row["question"]), str(row["answer"]))


def _first_problem(text: str) -> str:
    """The text up to the point where a few-shot model continues with a new problem."""
    for start in islice(NEXT_PROBLEM.finditer(text), 20):
        before = text[: start.start()]
        if _marked_numbers(before) or _stated_numbers(latex_to_plain(before)):
            return before
    # Without an answer before it, only a bare "Question:" after a number starts a new problem.
    digit = DIGIT.search(text)
    next_question = None if digit is None else NEXT_QUESTION.search(text, digit.end())
    return text if next_question is None else text[: next_question.start()]


def _marked_numbers(text: str) -> Numbers:
    """The number in the last box or tag, or after the last ``####``, that has one."""
    boxes = find_boxes(text)
    candidates = [(box.start, box.content) for box in boxes]
    candidates += [(tag.start(), tag[1]) for tag in ANSWER_TAG.finditer(text)]
    for hashes in HASHES.finditer(text):
        candidates.append((hashes.start(), text[hashes.end() :].split("\n", 1)[0]))
    for start, content in sorted(candidates, reverse=True):
        plain = join_digit_groups(latex_to_plain(content))
        plain = FACTORIAL.sub(lambda match: str(math.factorial(int(match[1]))), plain)
        if numbers := _result_numbers(plain):
            for box in boxes:
                if box.stop <= start and BETWEEN_BOXES.fullmatch(text, box.stop, start):
                    numbers = _result_numbers(latex_to_plain(box.content)) + numbers
            return numbers
    return ()


def _stated_numbers(text: str) -> Numbers:
    """The number directly after the last "the answer is" or "Answer:"."""
    for phrase in reversed(list(ANSWER_PHRASE.finditer(text))):
        rest = text[phrase.end("gap") : phrase.end("gap") + MAX_SENTENCE]
        first = next(find_numbers(rest), None)
        if first is not None and not rest[: first.start].strip(" -$€£¥₹"):
            computation = COMPUTATION.match(rest, first.start)
            result = "" if computation is None else rest[computation.end() :]
            return _first_numbers(result) or _first_numbers(rest)
    return ()


def _result_numbers(text: str) -> Numbers:
    """The 18 of "9 * 2 = 18 dollars", the 42 of "42 apples in 3 bags", all of "138, 149"."""
    result = text.rpartition("=")[2]
    numbers = list(find_numbers(result))
    gaps = [result[a.stop : b.start] for a, b in pairwise(numbers)]
    if gaps and all(len(gap) <= MAX_GAP and LIST.fullmatch(gap) for gap in gaps):
        return tuple(numbers)
    return _first_numbers(result) or _first_numbers(text)


def _first_numbers(text: str) -> Numbers:
    """The number at the start of an answer; several where it is part of a range or a date."""
    numbers = tuple(islice(find_numbers(text), 3))
    # A number may begin with a minus; here that stands between two.
    starts = (number.start + text.startswith("-", number.start) for number in numbers[1:])
    gaps = (text[a.stop : b][: MAX_GAP + 1] for a, b in zip(numbers, starts, strict=False))
    joined = sum(1 for _ in takewhile(JOIN.fullmatch, gaps))
    return numbers[: joined + 1] if joined else _alternatives(text, 0)


def _bold_numbers(text: str) -> Numbers:
    """The last number in bold, alone or with its unit, if no computation follows."""
    *_, last = (None, *BOLD.finditer(text))
    if last is None or "=" in text[last.end() :]:
        return ()
    index = sum(1 for _ in find_numbers(text[: last.start()]))
    inside, around = _result_numbers(last[1]), _alternatives(text, index)
    return around if len(inside) == 1 and inside[0].value in [n.value for n in around] else inside


def _claimed_numbers(text: str) -> Numbers:
    """The number of the last claim ("the total is 138 for 5 people"), else the last number."""
    numbers = list(find_numbers(text))
    if not numbers:
        return ()
    *_, sentence = (0, *(end.end() for end in SENTENCE_END.finditer(text, 0, numbers[-1].start)))
    index = len(numbers) - 1
    while index > 0 and numbers[index].start > sentence and _follows(SETTING, text, numbers[index]):
        index -= 1
    is_claim = numbers[index].start > sentence and _follows(CLAIM, text, numbers[index])
    return _alternatives(text, index if is_claim else -1)


def _follows(pattern: re.Pattern[str], text: str, number: ParsedNumber) -> bool:
    return pattern.search(text[max(0, number.start - MAX_BEFORE) : number.start]) is not None


def _alternatives(text: str, index: int) -> Numbers:
    """The number ``index`` of a text, with those that "or" joins to it."""
    numbers = list(find_numbers(text))
    if not numbers:
        return ()
    first = last = index % len(numbers)
    while first > 0 and _is_hedge(text, numbers[first - 1], numbers[first]):
        first -= 1
    while last + 1 < len(numbers) and _is_hedge(text, numbers[last], numbers[last + 1]):
        last += 1
    return tuple(numbers[first : last + 1])


def _is_hedge(text: str, first: ParsedNumber, second: ParsedNumber) -> bool:
    """Whether "or" joins two numbers of one unit; "120 minutes or 2 hours" is one value."""
    if second.start - first.stop > MAX_GAP:
        return False
    gap, after = OR.fullmatch(text, first.stop, second.start), WORD.match(text, second.stop)
    if gap is None or after is None:
        return False
    units = {match["unit"].casefold() for match in (gap, after)} - {""}
    return len(units) < 2


def _harness_value(matches: Sequence[str]) -> Fraction | None:
    """The number that the harness reads: without commas, dollars and one final full stop."""
    try:
        return Fraction(matches[0].replace(",", "").replace("$", "").removesuffix("."))
    except (IndexError, ValueError, ZeroDivisionError):
        return None
