"""What may be asked of one generation, checked where it enters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Annotated, Literal

from coterie.decoding import Ask, Sampling, parse_plan, parse_unmask
from coterie.decoding.row import EarlyStop
from coterie.families import Defaults
from coterie.naming import CoterieError
from coterie.spelling import Amount, Count, Share, Whole, Within, check_options

Routed = Literal["vanilla", "policy"]
Drift = Annotated[float, Within(least=0, below=1)]
Seed = Annotated[int, Within(least=0, most=2**63 - 1)]


@dataclass(frozen=True)
class Generation:
    """How to generate. ``plan`` and ``unmask`` are spelled like policies.

    The policy routes decoding forwards; ``prefill`` and ``commit`` say whether it also routes what
    computes the prompt's keys (full re-forwards at block entry too) and a finished block's.
    ``early_stop``: after the block that holds an end-of-text, as soon as everything before one is
    filled ("token"), or never. ``drift``: a block keeps its coresets from step to step, each until
    it has lost more than this share of the votes that a fresh one holds (None: elect every step).
    """

    max_new_tokens: Count = 256
    block: Count = 32
    plan: str = "block-causal"
    unmask: str = "threshold"
    temperature: Amount = 0.0
    top_k: Whole = 0
    top_p: Share = 1.0
    seed: Seed = 0
    early_stop: EarlyStop = "block"
    commit: Routed = "vanilla"
    prefill: Routed = "vanilla"
    drift: Drift | None = None

    def __post_init__(self) -> None:
        check_options(self)
        parse_plan(self.plan)
        parse_unmask(self.unmask)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    def but(self, **options: object) -> Generation:
        """The same with some options changed; an unknown one raises."""
        known = [field.name for field in fields(self)]
        unknown = [name for name in options if name not in known]
        if unknown:
            raise CoterieError(f"unknown option {unknown[0]!r}; known: {', '.join(known)}")
        return replace(self, **options)  # pyright: ignore[reportArgumentType]

    @staticmethod
    def usual(defaults: Defaults) -> Generation:
        """As the family's models are meant to be used."""
        return Generation(block=defaults.block, plan=defaults.plan, unmask=defaults.unmask)


def ask(
    prompt: Sequence[int],
    generation: Generation,
    *,
    mask: int,
    stops: tuple[int, ...],
    vocabulary: int,
    longest: int,
) -> Ask:
    """What a row needs to know, or a CoterieError that names what cannot be done."""
    _check_prompt(prompt, mask, vocabulary)
    plan = parse_plan(generation.plan)
    length = len(prompt) + generation.max_new_tokens
    if length <= longest:  # else there may be more blocks than memory
        length = plan.blocks(len(prompt), generation.max_new_tokens, generation.block)[-1].stop
    if length > longest:
        raise CoterieError(
            f"a prompt of {len(prompt)} tokens and max_new_tokens={generation.max_new_tokens} "
            f"need at least {length} positions; the model has {longest}"
        )
    return Ask(
        prompt=tuple(prompt),
        new=generation.max_new_tokens,
        block=generation.block,
        plan=plan,
        unmask=parse_unmask(generation.unmask),
        sampling=generation.sampling,
        seed=generation.seed,
        early_stop=generation.early_stop,
        stops=stops,
        mask=mask,
    )


def _check_prompt(prompt: Sequence[int], mask: int, vocabulary: int) -> None:
    if not prompt:
        raise CoterieError("the prompt is empty")
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise CoterieError(f"{token!r} in the prompt is no token id below {vocabulary}")
        if token == mask:
            raise CoterieError(f"the prompt holds the mask token ({mask}), which stands for a gap")
