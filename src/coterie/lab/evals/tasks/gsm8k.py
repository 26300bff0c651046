"""GSM8K: grade-school word problems with a number as answer (Cobbe et al., arXiv 2110.14168).

The grade reads the answer as a person would. The two metrics of lm-evaluation-harness (and dInfer)
are recorded as well: ``strict``, the number after the first ``####``, and ``flexible``, the last
number. ``strict`` fails if the prompt asks for a box, ``flexible`` if a sentence follows.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from itertools import islice
from pathlib import Path

from coterie.errors import TaskError
from coterie.lab.evals.task import Grade, Item, TaskOptions
from coterie.lab.evals.tasks.boxed import ANSWER_LINE_START, ZERO_SHOT, find_boxes, strip_end_marks
from coterie.lab.evals.tasks.numbers import (
    ParsedNumber,
    find_numbers,
    join_digit_groups,
    latex_to_plain,
)
from coterie.lab.evals.tasks.source import BenchmarkData, BenchmarkFile, read_benchmark

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

HARNESS_STRICT = re.compile(r"#### (-?[0-9.,]+)")
HARNESS_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


@dataclass(frozen=True)
class Gsm8k:
    """The 1,319 test problems: with ``examples`` from ``train``, or zero-shot with a box."""

    source: BenchmarkData
    questions: tuple[Item, ...]
    family: str
    train: BenchmarkData | None = None
    examples: tuple[Item, ...] = ()
    name: str = field(default="gsm8k", init=False)

    def settings(self) -> Mapping[str, object]:
        return {
            **self.source.settings(),
            "shots": len(self.examples),
            "examples": None if self.train is None else self.train.settings(),
            "template": FEW_SHOT if self.examples else ZERO_SHOT.format(question="{question}"),
            "counts": "the last box, <answer>, ####; else as said, in bold at the end, or the last",
            "also": {
                "strict": HARNESS_STRICT.pattern + " (first)",
                "flexible": HARNESS_FLEXIBLE.pattern + " (last)",
            },
        }

    def generation(self) -> Mapping[str, object]:
        return {"max_new_tokens": MAX_NEW_TOKENS.get(self.family, 2048)}

    def items(self) -> Sequence[Item]:
        return self.questions

    def prompt(self, item: Item) -> str:
        if not self.examples:
            return ZERO_SHOT.format(question=item.question)
        shots = [f"{FEW_SHOT.format(question=shot.question)} {shot.gold}" for shot in self.examples]
        return "\n\n".join([*shots, FEW_SHOT.format(question=item.question)])

    def grade(self, output: str, item: Item) -> Grade:
        return grade(output, item.gold)


def open_gsm8k(options: TaskOptions) -> Gsm8k:
    """The task with ``options.shots`` examples, or the family's default."""
    source = read_benchmark(TEST, options.data)
    shots = DEFAULT_SHOTS.get(options.family, 0) if options.shots is None else options.shots
    train = _read_train(source.folder, shots) if shots else None
    examples = () if train is None else _examples(train, shots)
    return Gsm8k(source, tuple(_items(source)), options.family, train, examples)


def grade(output: str, gold: str) -> Grade:
    """Compares numbers; ``gold`` is a number, or a solution "... #### 1,234" of the data."""
    expected = gold_value(gold)
    text = strip_end_marks(output)
    answer = extract_number(_first_problem(text))
    before_next = text.partition("Question:")[0]  # the harness stops here
    return Grade(
        answer is not None and expected in (answer.value, answer.value * answer.scale),
        None if answer is None else answer.text,
        {
            "strict": _harness_value(HARNESS_STRICT.findall(before_next)[:1]) == expected,
            "flexible": _harness_value(HARNESS_FLEXIBLE.findall(before_next)[-1:]) == expected,
        },
    )


def gold_value(gold: str) -> Fraction:
    """The number in ``gold``; raises TaskError if there is none."""
    matches = GOLD_MARK.findall(gold)
    number = extract_number(matches[-1] if matches else gold)
    if number is None:
        raise TaskError(f"{gold!r} holds no number; a gold answer is 1234 or '... #### 1,234'")
    return number.value * number.scale


def extract_number(text: str) -> ParsedNumber | None:
    """The answer: the last number in a box, ``<answer>`` or after ``####``.

    Without one: the number after "the answer is", the last one in bold, or the last one.
    """
    plain_text = latex_to_plain(text)
    return (
        _marked_number(text)
        or _stated_number(plain_text)
        or _bold_number(plain_text)
        or _last_number(plain_text)
    )


def _read_train(folder: Path | None, shots: int) -> BenchmarkData:
    """The training data from the folder of the test data, or from the hub."""
    if shots < 0:
        raise TaskError(f"gsm8k: {shots} shots; 0 or more")
    path = None if folder is None else folder / "train.jsonl"
    if path is not None and not path.is_file():
        raise TaskError(f"{path}: not found; {shots} shots need it, or set `shots` to 0")
    return read_benchmark(TRAIN, path)


def _examples(train: BenchmarkData, shots: int) -> tuple[Item, ...]:
    """The first examples, without calculator notes."""
    if len(train.rows) < shots:
        raise TaskError(f"{train.name} holds {len(train.rows)} examples, not {shots}")
    return tuple(
        Item(f"gsm8k/train/{n}", str(row["question"]), ANNOTATION.sub("", str(row["answer"])))
        for n, row in enumerate(train.rows[:shots])
    )


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
        if _marked_number(before) or _stated_number(latex_to_plain(before)):
            return before
    # Without an answer before it, only a bare "Question:" after a number starts a new problem.
    digit = DIGIT.search(text)
    next_question = None if digit is None else NEXT_QUESTION.search(text, digit.end())
    return text if next_question is None else text[: next_question.start()]


def _marked_number(text: str) -> ParsedNumber | None:
    """The number in the last box or tag, or after the last ``####``, that has one."""
    candidates = [(box.start, box.content) for box in find_boxes(text)]
    candidates += [(tag.start(), tag[1]) for tag in ANSWER_TAG.finditer(text)]
    for hashes in HASHES.finditer(text):
        candidates.append((hashes.start(), text[hashes.end() :].split("\n", 1)[0]))
    for _, content in sorted(candidates, reverse=True):
        number = _result_number(join_digit_groups(latex_to_plain(content)))
        if number is not None:
            return number
    return None


def _stated_number(text: str) -> ParsedNumber | None:
    """The number directly after the last "the answer is" or "Answer:"."""
    for phrase in reversed(list(ANSWER_PHRASE.finditer(text))):
        rest = text[phrase.end("gap") : phrase.end("gap") + MAX_SENTENCE]
        first = next(find_numbers(rest), None)
        if first is not None and not rest[: first.start].strip(" -$€£¥₹"):
            computation = COMPUTATION.match(rest, first.start)
            result = "" if computation is None else rest[computation.end() :]
            return next(find_numbers(result), first)
    return None


def _result_number(text: str) -> ParsedNumber | None:
    """The 18 of "9 * 2 = 18 dollars", the 42 of "42 apples in 3 bags"."""
    after = next(find_numbers(text.rpartition("=")[2]), None)
    return after or next(find_numbers(text), None)


def _bold_number(text: str) -> ParsedNumber | None:
    """The last number in bold, alone or with its unit, if no computation follows."""
    *_, last = (None, *BOLD.finditer(text))
    if last is None or "=" in text[last.end() :]:
        return None
    return _result_number(last[1])


def _last_number(text: str) -> ParsedNumber | None:
    *_, last = (None, *find_numbers(text))
    return last


def _harness_value(matches: Sequence[str]) -> Fraction | None:
    """The number that the harness reads: without commas, dollars and one final full stop."""
    try:
        return Fraction(matches[0].replace(",", "").replace("$", "").removesuffix("."))
    except (IndexError, ValueError, ZeroDivisionError):
        return None
