"""Refinements of an unmasking rule: editing, credit and smoothing; and the whole strategy."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.decoding.block_edit import BlockEditRule, JointEditRule, JointThresholdInDelRule
from coterie.decoding.unmask import RULES, BlockState, RenoiseRule, UnmaskRule
from coterie.errors import SpecError
from coterie.specs import NonNegativeInt, UnitFraction, check_options, format_spec, parse_spec


@dataclass(frozen=True)
class Edit:
    """A written token is replaced by a different proposal with confidence above ``p`` (LLaDA2.1).

    A block without masks has up to ``post`` more forwards, until one of them edits nothing.
    """

    p: UnitFraction = 0.5
    post: NonNegativeInt = 16

    __post_init__ = check_options

    def choose(self, state: BlockState) -> Tensor:
        """Bool [w]: the generated positions to replace now."""
        differs = state.proposal.ids != state.tokens
        return state.generated & differs & (state.proposal.confidence > self.p)


@dataclass(frozen=True)
class Credit:
    """A token that repeatedly has the top probability of a masked position gains logits (dInfer).

    In each forward the memory is multiplied by ``beta`` and gains (top probability) ** ``gamma``.
    Logits gain ``alpha`` * log(1 + memory).
    """

    alpha: float = 0.7
    gamma: float = 0.2
    beta: float = 0.8

    __post_init__ = check_options

    def add_credit(
        self, logits: Tensor, masked: Tensor, memory: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """Logits [w, V] with credit, and the memory [w, V] after this forward."""
        logits = logits.float()
        memory = torch.zeros_like(logits) if memory is None else memory * self.beta
        top = torch.softmax(logits, dim=-1).max(dim=-1)
        gain = top.values.pow(self.gamma) * masked.to(logits.device)
        memory = memory.scatter_add(-1, top.indices[:, None], gain[:, None])
        return logits + self.alpha * torch.log1p(memory), memory


@dataclass(frozen=True)
class Smooth:
    """The input of a mask includes the expected embedding of its last proposal (dInfer).

    The weight of that grows from ``init`` by ``growth`` a forward up to ``weight``. Thresholds are
    at least 1 - ``decay`` * forward, so early forwards commit few tokens.
    """

    weight: float = 0.3
    init: float = 0.15
    growth: float = 0.02
    decay: float = 0.02

    __post_init__ = check_options

    def mix_weight(self, forward: int) -> float:
        return min(self.init + self.growth * forward, self.weight)

    def threshold_floor(self, forward: int) -> float:
        return 1.0 - self.decay * forward

    def mix_embeddings(
        self, embeddings: Tensor, expected: Tensor, masked: Tensor, forward: int
    ) -> Tensor:
        """The next input [w, H] from token and expected embeddings; masked is [w] bool."""
        mixed = self.mix_weight(forward) * expected + embeddings
        return torch.where(masked[:, None].to(embeddings.device), mixed, embeddings)


@dataclass(frozen=True)
class UnmaskStrategy:
    """A rule with its refinements; its text is ``rule:..+edit:..+credit:..+smooth:..``."""

    rule: UnmaskRule | BlockEditRule
    edit: Edit | None = None
    credit: Credit | None = None
    smooth: Smooth | None = None

    @property
    def edits(self) -> bool:
        """Whether a later forward may change tokens of the current block."""
        return self.edit is not None or isinstance(self.rule, BlockEditRule)

    @property
    def renoises(self) -> bool:
        """Whether blocks are noise at first, and not masks."""
        return isinstance(self.rule, RenoiseRule)

    def __str__(self) -> str:
        refinements = (part for part in (self.edit, self.credit, self.smooth) if part is not None)
        specs = (format_spec(part, REFINEMENTS) for part in refinements)
        return "+".join((format_spec(self.rule, ALL_RULES), *specs))


def parse_unmask(text: str) -> UnmaskStrategy:
    """The strategy of a text such as ``threshold:p=0.7+edit:p=0.5,post=16``."""
    first, *rest = text.split("+")
    parts: dict[str, Edit | Credit | Smooth] = {}
    for spec in rest:
        part = parse_spec(spec, REFINEMENTS, "addition to an unmasking rule")
        name = type(part).__name__.lower()
        if name in parts:
            raise SpecError(f"{name} is given twice in {text!r}")
        parts[name] = part
    rule = parse_spec(first, ALL_RULES, "unmasking rule")
    if parts and isinstance(rule, BlockEditRule):
        raise SpecError(f"{first!r} edits blocks itself and takes no addition: {text!r}")
    if parts and isinstance(rule, RenoiseRule):
        raise SpecError(f"renoise takes no additions, and {text!r} has some")
    return UnmaskStrategy(rule, **parts)  # pyright: ignore[reportArgumentType]


ALL_RULES: dict[str, type[UnmaskRule | BlockEditRule]] = {
    **RULES,
    "joint-edit": JointEditRule,
    "joint-threshold-indel": JointThresholdInDelRule,
}
REFINEMENTS: dict[str, type[Edit | Credit | Smooth]] = {
    "edit": Edit,
    "credit": Credit,
    "smooth": Smooth,
}
