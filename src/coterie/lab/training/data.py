"""Rows of block-diffusion training data: clean context blocks, noised answer blocks, drills.

A row is a sequence of blocks. A problem adds its clean blocks once, one noised copy of the block
that prompt and answer share, and one or two copies of each later block. A noised block attends to
itself and to the clean blocks before it, as in decoding. The rest of a row is filled with drills:
equations, repeated words, and phrases with their code.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field

import torch
from tokenizers import Tokenizer
from torch import Tensor

from coterie.lab.problems import (
    PROBLEM_MAKERS,
    TRAINING_MAKERS,
    Problem,
    code_phrase,
    draw_equation,
    draw_problem,
    replace_equations,
)
from coterie.lab.problems.code import NOUNS, VERBS
from coterie.lab.problems.words import CONTAINERS, ITEMS, NAMES
from coterie.lab.training.feed import TrainingBatch
from coterie.lab.training.vocabulary import ASSISTANT, END_OF_TEXT, HUMAN, MASK_TOKEN, ROLE_END

MaskedIds = list[tuple[int, bool]]  # and whether each one is masked
IGNORE_INDEX = -100
DRILL_TASK = len(PROBLEM_MAKERS)  # the task number of a drill
OPERATORS = {"+", "-", "*", "/", "%", "<", ">", "!=", "=="}
CONTENT_WORDS = {*NAMES, *ITEMS, *CONTAINERS, *VERBS, *NOUNS}  # an answer copies them


@dataclass(frozen=True)
class DataMixture:
    """The composition of a batch."""

    rows: int = 16
    blocks: int = 8  # of a row
    block: int = 32  # positions
    task_shares: tuple[float, ...] = (0.36, 0.14, 0.2, 0.3)  # in the order of PROBLEM_MAKERS
    drill_row_share: float = 0.6  # rows that start with a drill
    all_masked_share: float = 0.2  # noised blocks without any visible answer token
    # Loss weights: end-of-text after the first; numbers, names and items; operators.
    fill_weight: float = 0.1
    content_weight: float = 3.0
    operator_weight: float = 1.0
    copy_share: float = 0.4  # drills that repeat words
    worked_steps_share: float = 0.0  # of the other drills: worked steps with random equations
    code_phrase_share: float = 0.0  # of the remaining drills: phrases with their code
    result_masked_share: float = 0.75  # equations in which only the result is masked


@dataclass(frozen=True)
class TrainingBlock:
    """One block of a row: its problem in the row, its index in the problem, and its task."""

    ids: list[int]
    problem: int
    index: int
    task: int
    masked: list[bool] | None = None  # None: clean context
    weights: list[float] = field(default_factory=list)  # of the loss; empty: all 1


@dataclass(frozen=True)
class TokenizedProblem:
    """A problem in tokens, padded with end-of-text to whole blocks."""

    ids: list[int]
    start: int  # of the answer
    end: int  # of the answer, after its first end-of-text
    task: int


class BatchMaker:
    """Makes the batch of a step, which depends on the seed and the step only."""

    def __init__(self, tokenizer: Tokenizer, mixture: DataMixture, seed: int) -> None:
        self.tokenizer = tokenizer
        self.mixture = mixture
        self.seed = seed
        vocabulary = tokenizer.get_vocab()
        self.mask_id, self.eos_id = vocabulary[MASK_TOKEN], vocabulary[END_OF_TEXT]
        self.content_pieces = {  # by id
            i: piece
            for piece, i in sorted(vocabulary.items(), key=lambda item: item[1])
            if (word := piece.lstrip("Ġ")) in CONTENT_WORDS or word.isdigit()
        }
        self.operator_ids = {i for piece, i in vocabulary.items() if piece.lstrip("Ġ") in OPERATORS}

    def __call__(self, step: int) -> TrainingBatch:
        rng = random.Random(f"{self.seed}/{step}")
        width = self.mixture.block
        rows = [self._row(rng) for _ in range(self.mixture.rows)]
        shape = (len(rows), -1)
        ids = torch.tensor([[block.ids for block in row] for row in rows])  # [B, n, width]
        no_mask, unit_weights = [False] * width, [1.0] * width
        masked = torch.tensor([[block.masked or no_mask for block in row] for row in rows])
        weights = torch.tensor([[block.weights or unit_weights for block in row] for row in rows])
        index = torch.tensor([[block.index for block in row] for row in rows])
        tasks = torch.tensor([[block.task for block in row] for row in rows])
        return TrainingBatch(
            tokens=ids.where(~masked, self.mask_id).view(shape),
            positions=(index[..., None] * width + torch.arange(width)).view(shape),
            block_mask=torch.stack([_block_mask(row) for row in rows]),
            targets=ids.where(masked, IGNORE_INDEX).view(shape),
            weights=weights.view(shape),
            tasks=tasks.repeat_interleave(width, 1),
        )

    def tokenize(self, problem: Problem) -> TokenizedProblem:
        """The tokens of a problem in the chat template."""
        prompt = self._encode(f"{HUMAN}{problem.prompt}{ROLE_END}{ASSISTANT}")
        answer = self._encode(problem.answer)
        ids = [*prompt, *answer, self.eos_id]
        answer_end = len(ids)
        ids += [self.eos_id] * (-answer_end % self.mixture.block)
        return TokenizedProblem(
            ids, len(prompt), answer_end, list(PROBLEM_MAKERS).index(problem.task)
        )

    def _encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text).ids

    def _row(self, rng: random.Random) -> list[TrainingBlock]:
        mixture = self.mixture
        row = [self._drill(rng, 0)] if rng.random() < mixture.drill_row_share else []
        problem_index = 0
        while len(row) < mixture.blocks:
            remaining = mixture.blocks - len(row)
            task = rng.choices(list(PROBLEM_MAKERS), weights=mixture.task_shares)[0]
            problem = self.tokenize(draw_problem(TRAINING_MAKERS[task], rng, "train"))
            num_later = len(problem.ids) // mixture.block - 1 - problem.start // mixture.block
            num_context = len(problem.ids) // mixture.block - 1
            spare = remaining - num_context - 1 - num_later  # after one noised copy of each block
            if spare >= 0:
                problem_index += 1
                row += self._noised_blocks(
                    rng, problem, problem_index=problem_index, copies=1 + (spare >= num_later)
                )
            else:
                row.append(self._drill(rng, len(row)))
        return row

    def _noised_blocks(
        self, rng: random.Random, problem: TokenizedProblem, *, problem_index: int, copies: int
    ) -> Iterator[TrainingBlock]:
        """Clean context, one copy of the block shared with the prompt, ``copies`` of later ones."""
        width = self.mixture.block
        size, first = len(problem.ids) // width, problem.start // width
        spans = [slice(index * width, (index + 1) * width) for index in range(size)]
        for index in range(size - 1):
            yield TrainingBlock(problem.ids[spans[index]], problem_index, index, problem.task)
        weights = [self._loss_weight(problem, position) for position in range(len(problem.ids))]
        for index in range(first, size):
            span = spans[index]
            answer = [position >= problem.start for position in range(span.start, span.stop)]
            num_copies = 1 if index == first else copies
            for copy in range(num_copies):
                masked = self._draw_mask(rng, answer, copy, num_copies)
                yield TrainingBlock(
                    problem.ids[span], problem_index, index, problem.task, masked, weights[span]
                )

    def _drill(self, rng: random.Random, drill_index: int) -> TrainingBlock:
        mixture = self.mixture
        if rng.random() < mixture.copy_share:
            pairs = self._copy_drill(rng)
        elif mixture.worked_steps_share and rng.random() < mixture.worked_steps_share:
            pairs = self._cut_block(rng, self._worked_steps, max_skip=mixture.block // 2)
        elif mixture.code_phrase_share and rng.random() < mixture.code_phrase_share:
            pairs = self._cut_block(rng, self._code_phrase, max_skip=12)
        else:
            pairs = self._cut_block(rng, self._equation, max_skip=6)
        ids, masked = map(list, zip(*pairs, strict=True))
        return TrainingBlock(ids, -1 - drill_index, rng.randrange(3), DRILL_TASK, masked)

    def _copy_drill(self, rng: random.Random) -> MaskedIds:
        """A few repeated words: each masked one also occurs unmasked."""
        width = self.mixture.block
        words = rng.sample(list(self.content_pieces), rng.randint(3, 12))
        repeated = enumerate((words * width)[:width])
        return [(id, i >= len(words) and rng.random() < 0.6) for i, id in repeated]

    def _cut_block(
        self, rng: random.Random, draw: Callable[[random.Random], MaskedIds], *, max_skip: int
    ) -> MaskedIds:
        """A block of what ``draw`` returns again and again, from a random start."""
        width = self.mixture.block
        pairs: MaskedIds = []
        while len(pairs) < 2 * width:
            pairs += draw(rng)
        start = rng.randrange(max_skip)
        return pairs[start : start + width]

    def _worked_steps(self, rng: random.Random) -> MaskedIds:
        """Worked steps with random equations, every result masked."""
        task = rng.choice(("words", "algebra"))
        steps, _, _ = draw_problem(TRAINING_MAKERS[task], rng, "train").answer.rpartition("\n")
        return [
            (id, is_result)
            for text, is_result in replace_equations(f" {steps}", rng)
            for id in self._encode(text)
        ]

    def _code_phrase(self, rng: random.Random) -> MaskedIds:
        """A phrase of a description, and its code, which is masked."""
        phrase, code, after = map(self._encode, code_phrase(rng))
        masked = [(id, rng.random() < 0.7) for id in code]
        return [*((id, False) for id in phrase), *masked, *((id, False) for id in after)]

    def _equation(self, rng: random.Random) -> MaskedIds:
        """An equation, mostly with the result masked."""
        line = self._encode(f" {draw_equation(rng)}.")
        if rng.random() < self.mixture.result_masked_share:
            return [(id, i == len(line) - 2) for i, id in enumerate(line)]
        return [(id, rng.random() < 0.5) for id in line]

    def _draw_mask(
        self, rng: random.Random, answer: list[bool], copy: int, copies: int
    ) -> list[bool]:
        """Mask rates are stratified over the copies; some blocks are masked completely."""
        rate = (copy + rng.random()) / copies
        if rng.random() < self.mixture.all_masked_share:
            rate = 1.0
        masked = [a and rng.random() < rate for a in answer]
        if not any(masked):
            masked[rng.choice([i for i, a in enumerate(answer) if a])] = True
        return masked

    def _loss_weight(self, problem: TokenizedProblem, position: int) -> float:
        if position >= problem.end:
            return self.mixture.fill_weight
        if problem.ids[position] in self.content_pieces:
            return self.mixture.content_weight
        if problem.ids[position] in self.operator_ids:
            return self.mixture.operator_weight
        return 1.0


class Curriculum:
    """A sequence of mixtures, each used from its start step on."""

    def __init__(self, tokenizer: Tokenizer, stages: Mapping[int, DataMixture], seed: int) -> None:
        self.makers = {
            start: BatchMaker(tokenizer, mixture, seed) for start, mixture in stages.items()
        }

    def __call__(self, step: int) -> TrainingBatch:
        return self.makers[max(start for start in self.makers if start <= step)](step)


def _block_mask(row: list[TrainingBlock]) -> Tensor:
    problem = torch.tensor([block.problem for block in row])
    index = torch.tensor([block.index for block in row])
    return block_visibility(problem, index, torch.tensor([block.masked is None for block in row]))


def block_visibility(problem: Tensor, index: Tensor, clean: Tensor) -> Tensor:
    """[n, n] bool: a block attends to itself and to earlier clean blocks of its problem."""
    earlier = clean[None, :] & (index[None, :] < index[:, None])
    return (
        torch.eye(len(index), dtype=torch.bool) | (problem[:, None] == problem[None, :]) & earlier
    )
