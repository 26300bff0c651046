"""What may be asked of one generation, checked where it enters."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from coterie.decoding import DecodeRequest, Sampling, parse_plan, parse_unmask
from coterie.decoding.sequence import EarlyStop
from coterie.errors import CoterieError
from coterie.families import FamilyDefaults
from coterie.keys import Key, by_attribute, keys_of, names_of, to_json
from coterie.specs import (
    Bounds,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFraction,
    PositiveInt,
    check_options,
)

RoutingMode = Literal["vanilla", "policy"]
ReuseTolerance = Annotated[float, Bounds(ge=0, lt=1)]
Seed = Annotated[int, Bounds(ge=0, le=2**63 - 1)]


@dataclass(frozen=True)
class GenerationConfig:
    """How to generate. ``plan`` and ``unmask`` are spelled like policies.

    The policy routes decoding forwards; ``prefill`` and ``commit`` say whether it also routes what
    computes the prompt's keys (full re-forwards at block entry too) and a finished block's.
    ``early_stop``: after the block that holds an end-of-text, as soon as everything before one is
    filled ("token"), or never. ``drift``: a block keeps its coresets from step to step, each until
    it has lost more than this share of the votes that a fresh one holds (None: elect every step).
    """

    max_new_tokens: Annotated[PositiveInt, Key("max_new_tokens")] = 256
    block: Annotated[PositiveInt, Key("block")] = 32
    plan: Annotated[str, Key("plan")] = "block-causal"
    unmask: Annotated[str, Key("unmask")] = "threshold"
    temperature: Annotated[NonNegativeFloat, Key("temperature")] = 0.0
    top_k: Annotated[NonNegativeInt, Key("top_k")] = 0
    top_p: Annotated[PositiveFraction, Key("top_p")] = 1.0
    seed: Annotated[Seed, Key("seed")] = 0
    early_stop: Annotated[EarlyStop, Key("early_stop")] = "block"
    commit_routing: Annotated[RoutingMode, Key("commit")] = "vanilla"
    prefill_routing: Annotated[RoutingMode, Key("prefill")] = "vanilla"
    reuse_tolerance: Annotated[ReuseTolerance | None, Key("drift")] = None

    def __post_init__(self) -> None:
        check_options(self)
        parse_plan(self.plan)
        parse_unmask(self.unmask)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    def replace(self, **options: object) -> GenerationConfig:
        """The same with some options changed, by key or by field; an unknown one raises."""
        known = {*keys_of(GenerationConfig), *names_of(GenerationConfig)}
        unknown = [name for name in options if name not in known]
        if unknown:
            known_names = ", ".join(names_of(GenerationConfig))
            raise CoterieError(f"unknown option {unknown[0]!r}; known: {known_names}")
        return replace(self, **by_attribute(GenerationConfig, options))

    def document(self) -> dict[str, Any]:
        """All options by key, as they are kept on disk and as ``but`` takes them."""
        return to_json(self)

    @staticmethod
    def for_family(defaults: FamilyDefaults) -> GenerationConfig:
        """As the family's models are meant to be used."""
        return GenerationConfig(block=defaults.block, plan=defaults.plan, unmask=defaults.unmask)


def make_request(
    prompt: Sequence[int],
    config: GenerationConfig,
    *,
    mask_id: int,
    stop_ids: tuple[int, ...],
    vocabulary: int,
    max_length: int,
) -> DecodeRequest:
    """What a row needs to know, or a CoterieError that names what cannot be done."""
    _check_prompt(prompt, mask_id, vocabulary)
    plan = parse_plan(config.plan)
    length = len(prompt) + config.max_new_tokens
    if length <= max_length:  # else there may be more blocks than memory
        length = plan.blocks(len(prompt), config.max_new_tokens, config.block)[-1].stop
    if length > max_length:
        raise CoterieError(
            f"a prompt of {len(prompt)} tokens and max_new_tokens={config.max_new_tokens} "
            f"need at least {length} positions; the model has {max_length}"
        )
    return DecodeRequest(
        prompt_ids=tuple(prompt),
        max_new_tokens=config.max_new_tokens,
        block_length=config.block,
        plan=plan,
        unmask=parse_unmask(config.unmask),
        sampling=config.sampling,
        seed=config.seed,
        early_stop=config.early_stop,
        eos_ids=stop_ids,
        mask_id=mask_id,
    )


def _check_prompt(prompt: Sequence[int], mask_id: int, vocabulary: int) -> None:
    if not prompt:
        raise CoterieError("the prompt is empty")
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise CoterieError(f"{token!r} in the prompt is no token id below {vocabulary}")
        if token == mask_id:
            raise CoterieError(
                f"the prompt holds the mask token ({mask_id}), which stands for a gap"
            )
