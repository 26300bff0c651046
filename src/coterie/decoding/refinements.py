"""What may surround an unmasking rule: editing, credit, smoothing; and the whole as one value."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from coterie.decoding.unmask import RULES, BlockState, UnmaskRule
from coterie.errors import CoterieError
from coterie.specs import NonNegativeInt, UnitFraction, check_options, format_spec, parse_spec


@dataclass(frozen=True)
class Edit:
    """A written token whose proposal differs and is surer than ``p`` is replaced (LLaDA2.1).

    Once nothing is masked the block has up to ``post`` more forwards, until one edits nothing.
    """

    p: UnitFraction = 0.5
    post: NonNegativeInt = 16

    __post_init__ = check_options

    def choose(self, state: BlockState) -> Tensor:
        """Bool [w]: the answered positions to replace now."""
        differs = state.proposal.ids != state.tokens
        return state.generated & differs & (state.proposal.confidence > self.p)


@dataclass(frozen=True)
class Credit:
    """Tokens that keep being the first choice of a masked position gain logits (dInfer).

    Memory decays by ``beta`` a forward and gains (top probability) ** ``gamma``; logits gain
    ``alpha`` * log(1 + memory).
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
    """Masks are fed the expected embedding of what was last proposed there (dInfer).

    Its weight grows from ``init`` by ``growth`` a forward up to ``weight``; thresholds fall from 1
    by ``decay`` a forward, so that early forwards commit little.
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
        """[w, H] to feed next, from the tokens' and the expected embeddings, masked [w] bool."""
        mixed = self.mix_weight(forward) * expected + embeddings
        return torch.where(masked[:, None].to(embeddings.device), mixed, embeddings)


@dataclass(frozen=True)
class UnmaskStrategy:
    """A rule and what surrounds it, spelled ``rule:..+edit:..+credit:..+smooth:..``."""

    rule: UnmaskRule
    edit: Edit | None = None
    credit: Credit | None = None
    smooth: Smooth | None = None

    def __str__(self) -> str:
        refinements = (part for part in (self.edit, self.credit, self.smooth) if part is not None)
        return "+".join(
            (
                format_spec(self.rule, RULES),
                *(format_spec(part, REFINEMENTS) for part in refinements),
            )
        )


def parse_unmask(text: str) -> UnmaskStrategy:
    """``threshold:p=0.7+edit:p=0.5,post=16`` -> the value it spells."""
    first, *rest = text.split("+")
    parts: dict[str, Edit | Credit | Smooth] = {}
    for spec in rest:
        part = parse_spec(spec, REFINEMENTS, "addition to an unmasking rule")
        name = type(part).__name__.lower()
        if name in parts:
            raise CoterieError(f"{name} is given twice in {text!r}")
        parts[name] = part
    return UnmaskStrategy(parse_spec(first, RULES, "unmasking rule"), **parts)  # pyright: ignore[reportArgumentType]


REFINEMENTS: dict[str, type[Edit | Credit | Smooth]] = {
    "edit": Edit,
    "credit": Credit,
    "smooth": Smooth,
}
