"""What may be asked of one generation, checked where it enters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from coterie.decoding import Ask, Sampling, parse_plan, parse_unmask
from coterie.decoding.row import EarlyStop
from coterie.families import Defaults
from coterie.keys import Key, by_attribute, keys_of, names_of, to_json
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

    max_new_tokens: Annotated[Count, Key("max_new_tokens")] = 256
    block: Annotated[Count, Key("block")] = 32
    plan: Annotated[str, Key("plan")] = "block-causal"
    unmask: Annotated[str, Key("unmask")] = "threshold"
    temperature: Annotated[Amount, Key("temperature")] = 0.0
    top_k: Annotated[Whole, Key("top_k")] = 0
    top_p: Annotated[Share, Key("top_p")] = 1.0
    seed: Annotated[Seed, Key("seed")] = 0
    early_stop: Annotated[EarlyStop, Key("early_stop")] = "block"
    commit: Annotated[Routed, Key("commit")] = "vanilla"
    prefill: Annotated[Routed, Key("prefill")] = "vanilla"
    drift: Annotated[Drift | None, Key("drift")] = None

    def __post_init__(self) -> None:
        check_options(self)
        parse_plan(self.plan)
        parse_unmask(self.unmask)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    def but(self, **options: object) -> Generation:
        """The same with some options changed, by key or by field; an unknown one raises."""
        known = {*keys_of(Generation), *names_of(Generation)}
        unknown = [name for name in options if name not in known]
        if unknown:
            known_names = ", ".join(names_of(Generation))
            raise CoterieError(f"unknown option {unknown[0]!r}; known: {known_names}")
        return replace(self, **by_attribute(Generation, options))

    def document(self) -> dict[str, Any]:
        """All options by key, as they are kept on disk and as ``but`` takes them."""
        return to_json(self)

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
