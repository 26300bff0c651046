"""Rows of block-diffusion training data: clean context blocks, noised answer blocks, drills.

A row is a run of blocks. A problem brings its clean blocks once, one noised copy of the block that
prompt and answer share, and one or two of each later block; a noised block sees the clean blocks
before it and itself, as it will when the model decodes. What is left of a row is filled with
drills: bare lines of arithmetic, words to copy, and words to put into code.
"""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor

from coterie.problems import TASKS, TAUGHT, Problem, draw, fact, phrase, with_other_facts
from coterie.problems.code import NOUNS, VERBS
from coterie.problems.words import HOLDERS, NAMES, THINGS
from coterie.training.batch import Batch
from coterie.training.vocabulary import ASSISTANT, END, HUMAN, MASK, ROLE_END

NO_TARGET = -100
DRILL = len(TASKS)  # the task number of a drill
OPERATORS = {"+", "-", "*", "/", "%", "<", ">", "!=", "=="}
WORDS = {*NAMES, *THINGS, *HOLDERS, *VERBS, *NOUNS}  # what an answer copies from its question


@dataclass(frozen=True)
class Mixture:
    """What a batch is made of."""

    rows: int = 16
    blocks: int = 8  # of a row
    block: int = 32  # positions
    shares: tuple[float, ...] = (0.36, 0.14, 0.2, 0.3)  # of the tasks, in the order of TASKS
    drills: float = 0.6  # share of rows with a block kept for drills
    all_masked: float = 0.2  # share of noised blocks that start from nothing
    fill_weight: float = 0.1  # of the loss on end-of-text after the first
    content_weight: float = 3.0  # of the loss on numbers, names and things in worked answers
    operator_weight: float = 1.0  # of the loss on operators in worked answers
    copying: float = 0.4  # share of drills that repeat words in place of arithmetic
    steps: float = 0.0  # share of the other drills that are worked steps with any facts in them
    phrases: float = 0.0  # share of the rest that put words into code
    result_masked: float = 0.75  # share of drill facts in which the result alone is masked


@dataclass(frozen=True)
class Block:
    """One block of a row, and where it stands: which problem, which block of it, which task."""

    ids: list[int]
    problem: int
    index: int
    task: int
    masked: list[bool] | None = None  # None: clean context
    weights: list[float] = field(default_factory=list)  # of the loss; empty: all one


@dataclass(frozen=True)
class Sheet:
    """A problem in tokens, filled with end-of-text to whole blocks."""

    ids: list[int]
    start: int  # where the answer begins
    end: int  # one past the answer's own end-of-text
    task: int


class BatchMaker:
    """Makes batch number i as a pure function of (seed, i)."""

    def __init__(self, tokenizer: Tokenizer, mixture: Mixture, seed: int) -> None:
        self.tokenizer = tokenizer
        self.mixture = mixture
        self.seed = seed
        vocabulary = tokenizer.get_vocab()
        self.mask, self.fill = vocabulary[MASK], vocabulary[END]
        self.content = {  # in the order of ids, with the piece each stands for
            i: piece
            for piece, i in sorted(vocabulary.items(), key=lambda item: item[1])
            if (word := piece.lstrip("Ġ")) in WORDS or word.isdigit()
        }
        self.operators = {i for piece, i in vocabulary.items() if piece.lstrip("Ġ") in OPERATORS}

    def __call__(self, step: int) -> Batch:
        rng = random.Random(f"{self.seed}/{step}")
        width = self.mixture.block
        rows = [self._row(rng) for _ in range(self.mixture.rows)]
        shape = (len(rows), -1)
        ids = torch.tensor([[block.ids for block in row] for row in rows])  # [B, n, width]
        no, one = [False] * width, [1.0] * width
        masked = torch.tensor([[block.masked or no for block in row] for row in rows])
        weights = torch.tensor([[block.weights or one for block in row] for row in rows])
        index = torch.tensor([[block.index for block in row] for row in rows])
        tasks = torch.tensor([[block.task for block in row] for row in rows])
        return Batch(
            tokens=ids.where(~masked, self.mask).view(shape),
            positions=(index[..., None] * width + torch.arange(width)).view(shape),
            visible=torch.stack([_visible(row) for row in rows]),
            targets=ids.where(masked, NO_TARGET).view(shape),
            weights=weights.view(shape),
            tasks=tasks.repeat_interleave(width, 1),
        )

    def sheet(self, problem: Problem) -> Sheet:
        """``problem`` as the chat template writes it."""
        prompt = self._encode(f"{HUMAN}{problem.prompt}{ROLE_END}{ASSISTANT}")
        answer = self._encode(problem.answer)
        ids = [*prompt, *answer, self.fill]
        end = len(ids)
        ids += [self.fill] * (-end % self.mixture.block)
        return Sheet(ids, len(prompt), end, list(TASKS).index(problem.task))

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def _row(self, rng: random.Random) -> list[Block]:
        mixture = self.mixture
        row = [self._drill(rng, 0)] if rng.random() < mixture.drills else []
        number = 0
        while len(row) < mixture.blocks:
            left = mixture.blocks - len(row)
            task = rng.choices(list(TASKS), weights=mixture.shares)[0]
            sheet = self.sheet(draw(TAUGHT[task], rng, "train"))
            later = len(sheet.ids) // mixture.block - 1 - sheet.start // mixture.block
            context = len(sheet.ids) // mixture.block - 1
            spare = left - context - 1 - later  # with one noised copy of each block
            if spare >= 0:
                number += 1
                row += self._noised(rng, sheet, number=number, copies=1 + (spare >= later))
            else:
                row.append(self._drill(rng, len(row)))
        return row

    def _noised(
        self, rng: random.Random, sheet: Sheet, *, number: int, copies: int
    ) -> Iterator[Block]:
        """Clean context, the block shared with the prompt once, each later one ``copies`` times."""
        width = self.mixture.block
        size, first = len(sheet.ids) // width, sheet.start // width
        parts = [slice(index * width, (index + 1) * width) for index in range(size)]
        for index in range(size - 1):
            yield Block(sheet.ids[parts[index]], number, index, sheet.task)
        weights = [self._weight(sheet, position) for position in range(len(sheet.ids))]
        for index in range(first, size):
            at = parts[index]
            answer = [position >= sheet.start for position in range(at.start, at.stop)]
            wanted = 1 if index == first else copies
            for copy in range(wanted):
                masked = self._masked(rng, answer, copy, wanted)
                yield Block(sheet.ids[at], number, index, sheet.task, masked, weights[at])

    def _drill(self, rng: random.Random, place: int) -> Block:
        if rng.random() < self.mixture.copying:
            ids, masked = self._copies(rng)
        elif self.mixture.steps and rng.random() < self.mixture.steps:
            ids, masked = self._steps(rng)
        elif self.mixture.phrases and rng.random() < self.mixture.phrases:
            ids, masked = self._phrases(rng)
        else:
            ids, masked = self._facts(rng)
        return Block(ids, -1 - place, rng.randrange(3), DRILL, masked)

    def _copies(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        """A few words over and over: every masked one stands elsewhere in the block."""
        width = self.mixture.block
        words = rng.sample(list(self.content), rng.randint(3, 12))
        ids = (words * width)[:width]
        masked = [i >= len(words) and rng.random() < 0.6 for i in range(width)]
        return ids, masked

    def _steps(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        """Worked steps with facts that no question asks for, every result masked."""
        width = self.mixture.block
        ids: list[int] = []
        masked: list[bool] = []
        while len(ids) < 2 * width:
            task = rng.choice(("words", "algebra"))
            steps, _, _ = draw(TAUGHT[task], rng, "train").answer.rpartition("\n")
            for text, is_result in with_other_facts(f" {steps}", rng):
                part = self._encode(text)
                ids += part
                masked += [is_result] * len(part)
        skip = rng.randrange(width // 2)
        at = slice(skip, skip + width)
        return ids[at], masked[at]

    def _phrases(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        """What is asked for in words, and the code that does it, with that code masked."""
        width = self.mixture.block
        ids: list[int] = []
        masked: list[bool] = []
        while len(ids) < 2 * width:
            for place, text in enumerate(phrase(rng)):
                part = self._encode(text)
                ids += part
                masked += [place == 1 and rng.random() < 0.7 for _ in part]
        skip = rng.randrange(12)
        at = slice(skip, skip + width)
        return ids[at], masked[at]

    def _facts(self, rng: random.Random) -> tuple[list[int], list[bool]]:
        """Lines of arithmetic, most of them with the result masked."""
        width = self.mixture.block
        ids: list[int] = []
        masked: list[bool] = []
        while len(ids) < 2 * width:
            line = self._encode(f" {fact(rng)}.")
            ids += line
            if rng.random() < self.mixture.result_masked:
                masked += [False] * (len(line) - 2) + [True, False]
            else:
                masked += [rng.random() < 0.5 for _ in line]
        skip = rng.randrange(6)
        at = slice(skip, skip + width)
        return ids[at], masked[at]

    def _masked(self, rng: random.Random, answer: list[bool], copy: int, copies: int) -> list[bool]:
        """Mask rates stratified over the copies, and some blocks masked whole."""
        rate = (copy + rng.random()) / copies
        if rng.random() < self.mixture.all_masked:
            rate = 1.0
        masked = [a and rng.random() < rate for a in answer]
        if not any(masked):
            masked[rng.choice([i for i, a in enumerate(answer) if a])] = True
        return masked

    def _weight(self, sheet: Sheet, position: int) -> float:
        if position >= sheet.end:
            return self.mixture.fill_weight
        if sheet.ids[position] in self.content:
            return self.mixture.content_weight
        if sheet.ids[position] in self.operators:
            return self.mixture.operator_weight
        return 1.0


class Course:
    """Lessons one after another: each mixture is drawn from its own step on."""

    def __init__(self, tokenizer: Tokenizer, lessons: Mapping[int, Mixture], seed: int) -> None:
        self.makers = {
            start: BatchMaker(tokenizer, mixture, seed) for start, mixture in lessons.items()
        }

    def __call__(self, step: int) -> Batch:
        return self.makers[max(start for start in self.makers if start <= step)](step)


def _visible(row: list[Block]) -> Tensor:
    """[n, n] bool: a block sees itself and the clean blocks before it in its own problem."""
    problem = torch.tensor([block.problem for block in row])
    index = torch.tensor([block.index for block in row])
    clean = torch.tensor([block.masked is None for block in row])
    earlier = clean[None, :] & (index[None, :] < index[:, None])
    return torch.eye(len(row), dtype=torch.bool) | (problem[:, None] == problem[None, :]) & earlier
