"""Rows of block-diffusion training data: clean context blocks, noised answer blocks, drills.

A row is a run of blocks. A problem brings its clean blocks once, one noised copy of the block that
prompt and answer share, and one or two of each later block; a noised block sees the clean blocks
before it and itself, as it will when the model decodes. What is left of a row is filled with
drills: bare lines of arithmetic.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor

from coterie.problems import TASKS, Problem, draw, fact
from coterie.training.batch import Batch
from coterie.training.vocabulary import ASSISTANT, END, HUMAN, MASK, ROLE_END

NO_TARGET = -100
DRILL = len(TASKS)  # the task number of a drill


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
    number_weight: float = 2.0  # of the loss on numbers in worked answers
    result_masked: float = 0.75  # share of drill facts in which the result alone is masked


@dataclass
class Row:
    """A row under construction; grows by whole blocks."""

    tokens: list[list[int]] = field(default_factory=list)
    targets: list[list[int]] = field(default_factory=list)
    weights: list[list[float]] = field(default_factory=list)
    places: list[tuple[int, int, bool]] = field(default_factory=list)  # problem, index, clean
    tasks: list[int] = field(default_factory=list)


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
        self.numbers = {i for piece, i in vocabulary.items() if piece.lstrip("Ġ").isdigit()}

    def __call__(self, step: int) -> Batch:
        rng = random.Random(f"{self.seed}/{step}")
        rows = [self._row(rng) for _ in range(self.mixture.rows)]
        shape = (len(rows), -1)
        tokens, targets = (
            torch.tensor([getattr(row, name) for row in rows]).view(shape)
            for name in ("tokens", "targets")
        )
        index = torch.tensor([[place[1] for place in row.places] for row in rows])
        offsets = torch.arange(self.mixture.block)
        return Batch(
            tokens=tokens,
            positions=(index[..., None] * self.mixture.block + offsets).view(shape),
            visible=torch.stack([_visible(row) for row in rows]),
            targets=targets,
            weights=torch.tensor([row.weights for row in rows]).view(shape),
            tasks=torch.tensor([row.tasks for row in rows]).repeat_interleave(
                self.mixture.block, 1
            ),
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

    def _row(self, rng: random.Random) -> Row:
        row, mixture = Row(), self.mixture
        if rng.random() < mixture.drills:
            self._add_drill(row, rng)
        number = 0
        while len(row.tasks) < mixture.blocks:
            left = mixture.blocks - len(row.tasks)
            task = rng.choices(list(TASKS), weights=mixture.shares)[0]
            sheet = self.sheet(draw(TASKS[task], rng, "train"))
            size = len(sheet.ids) // mixture.block
            first = sheet.start // mixture.block
            spare = left - (size - 1) - 1 - (size - 1 - first)  # with one copy of each block
            copies = 0 if spare < 0 else 1 + (spare >= size - 1 - first)
            if copies:
                number += 1
                self._add_problem(row, rng, sheet, number=number, copies=copies)
            else:
                self._add_drill(row, rng)
        return row

    def _add_problem(
        self, row: Row, rng: random.Random, sheet: Sheet, *, number: int, copies: int
    ) -> None:
        block = self.mixture.block
        size, first = len(sheet.ids) // block, sheet.start // block
        for index in range(size - 1):
            ids = sheet.ids[index * block : (index + 1) * block]
            self._add(row, ids, [False] * block, [0.0] * block, (number, index, True), sheet.task)
        weights = [self._weight(sheet, position) for position in range(len(sheet.ids))]
        for index in range(first, size):
            for copy in range(1 if index == first else copies):
                at = slice(index * block, (index + 1) * block)
                answer = [position >= sheet.start for position in range(at.start, at.stop)]
                masked = self._masked(rng, answer, copy, copies if index > first else 1)
                place = (number, index, False)
                self._add(row, sheet.ids[at], masked, weights[at], place, sheet.task)

    def _add_drill(self, row: Row, rng: random.Random) -> None:
        block = self.mixture.block
        ids: list[int] = []
        masked: list[bool] = []
        while len(ids) < 2 * block:
            line = self._encode(f" {fact(rng)}.")
            ids += line
            if rng.random() < self.mixture.result_masked:
                masked += [False] * (len(line) - 2) + [True, False]
            else:
                masked += [rng.random() < 0.5 for _ in line]
        skip = rng.randrange(6)
        at = slice(skip, skip + block)
        place = (-1 - len(row.tasks), rng.randrange(3), False)
        self._add(row, ids[at], masked[at], [1.0] * block, place, DRILL)

    def _add(
        self,
        row: Row,
        ids: list[int],
        masked: list[bool],
        weights: list[float],
        place: tuple[int, int, bool],
        task: int,
    ) -> None:
        row.tokens.append([self.mask if m else i for i, m in zip(ids, masked, strict=True)])
        row.targets.append([i if m else NO_TARGET for i, m in zip(ids, masked, strict=True)])
        row.weights.append(weights)
        row.places.append(place)
        row.tasks.append(task)

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
        if sheet.ids[position] in self.numbers:
            return self.mixture.number_weight
        return 1.0


def _visible(row: Row) -> Tensor:
    """[n, n] bool: a block sees itself and the clean blocks before it in its own problem."""
    problem, index, clean = (torch.tensor(kind) for kind in zip(*row.places, strict=True))
    earlier = clean[None, :] & (index[None, :] < index[:, None])
    return torch.eye(len(problem), dtype=torch.bool) | (
        (problem[:, None] == problem[None, :]) & earlier
    )
