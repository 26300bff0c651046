"""The decoding options of a request, and their validation."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, Literal

from coterie.decoding import (
    DecodeRequest,
    KVScheme,
    Sampling,
    UnmaskStrategy,
    parse_kv_scheme,
    parse_unmask,
)
from coterie.decoding.block_edit import BlockEditRule
from coterie.decoding.sequence import EarlyStop
from coterie.errors import ConfigError, GenerationError
from coterie.families import FamilyDefaults
from coterie.keys import Key, by_attribute, keys_of, names_of, to_json
from coterie.specs import (
    Bounds,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFraction,
    PositiveInt,
    spec_options,
)
from coterie.values import NO_MASK

RoutingMode = Literal["vanilla", "policy"]
ReuseTolerance = Annotated[float, Bounds(ge=0, lt=1)]
Seed = Annotated[int, Bounds(ge=0, le=2**63 - 1)]


@dataclass(frozen=True)
class GenerationConfig:
    """Decoding options of a request. Raises ConfigError for a value out of range.

    ``kv_cache`` (the KV-caching scheme) and ``unmask`` are specs, such as ``prefix`` and
    ``threshold:p=0.9``.
    The policy always routes decode forwards. ``commit_routing`` and ``prefill_routing`` select
    whether it also routes the forwards that write keys: of finished blocks, and of the prompt.

    ``early_stop`` ends decoding after the block with an end-of-text ("block"), as soon as all
    tokens before the end-of-text are filled ("token"), or never ("off"). ``reuse_tolerance``
    reuses a block's coreset in the next step unless it loses more than this share of the votes of
    a newly elected one. None elects a coreset in every step.

    ``skip_settled`` leaves a token of the current block out of the block's next forwards after so
    many have computed it. They attend to its cached keys. None computes all tokens in every step.
    """

    max_new_tokens: Annotated[PositiveInt, Key("max_new_tokens")] = 256
    block: Annotated[PositiveInt, Key("block")] = 32
    kv_cache: Annotated[str, Key("plan")] = "block-causal"
    unmask: Annotated[str, Key("unmask")] = "threshold"
    temperature: Annotated[NonNegativeFloat, Key("temperature")] = 0.0
    top_k: Annotated[NonNegativeInt, Key("top_k")] = 0
    top_p: Annotated[PositiveFraction, Key("top_p")] = 1.0
    seed: Annotated[Seed, Key("seed")] = 0
    early_stop: Annotated[EarlyStop, Key("early_stop")] = "block"
    commit_routing: Annotated[RoutingMode, Key("commit")] = "vanilla"
    prefill_routing: Annotated[RoutingMode, Key("prefill")] = "vanilla"
    reuse_tolerance: Annotated[ReuseTolerance | None, Key("drift")] = None
    skip_settled: Annotated[PositiveInt | None, Key("skip_settled")] = None

    def __post_init__(self) -> None:
        for option in spec_options(GenerationConfig).values():
            # Some keys are older names: errors name the field.
            label = option.name if option.name == option.attribute else f"`{option.attribute}`"
            replace(option, name=label).check(option.value_of(self))
        kv_scheme, unmask = parse_kv_scheme(self.kv_cache), parse_unmask(self.unmask)
        if self.skip_settled is not None:
            _check_skipping(kv_scheme, unmask)

    @property
    def sampling(self) -> Sampling:
        return Sampling(self.temperature, self.top_k, self.top_p)

    def replace(self, **options: object) -> GenerationConfig:
        """A copy with some options changed, by field name or by key.

        Raises ConfigError for an unknown option.
        """
        known = {*keys_of(GenerationConfig), *names_of(GenerationConfig)}
        unknown = [name for name in options if name not in known]
        if unknown:
            known_names = ", ".join(keys_of(GenerationConfig))
            raise ConfigError(f"unknown option {unknown[0]!r}; known: {known_names}")
        return replace(self, **by_attribute(GenerationConfig, options))

    def fit(self, prompt_tokens: int, max_length: int) -> GenerationConfig | None:
        """The options with as many new tokens as fit beside a prompt; None if none fits."""
        kv_scheme = parse_kv_scheme(self.kv_cache)

        def length(new_tokens: int) -> int:
            return kv_scheme.blocks(prompt_tokens, new_tokens, self.block)[-1].stop

        # More tokens than positions never fit; their list of blocks could exceed memory.
        most = min(self.max_new_tokens, max_length - prompt_tokens)
        count = bisect_right(range(1, most + 1), max_length, key=length)
        return replace(self, max_new_tokens=count) if count else None

    def document(self) -> dict[str, Any]:
        """The options by their keys on disk; ``replace`` accepts them."""
        document = to_json(self)
        if self.skip_settled is None:  # omitted, so that runs of earlier versions stay the same
            del document["skip_settled"]
        return document

    @staticmethod
    def for_family(defaults: FamilyDefaults) -> GenerationConfig:
        """The decoding options that the family's models were published with."""
        return GenerationConfig(
            block=defaults.block, kv_cache=defaults.kv_cache, unmask=defaults.unmask
        )


def make_request(
    prompt: Sequence[int],
    config: GenerationConfig,
    *,
    mask_id: int,
    stop_ids: tuple[int, ...],
    vocabulary: int,
    max_length: int,
    edit_ids: tuple[int, int] | None = None,
) -> DecodeRequest:
    """The decode request of a prompt.

    Raises GenerationError for an invalid prompt, or one that exceeds ``max_length`` positions, and
    ConfigError for an unmasking rule that needs ``edit_ids`` where there are none.
    """
    check_prompt(prompt, (mask_id, *(edit_ids or ())), vocabulary)
    kv_scheme, unmask = parse_kv_scheme(config.kv_cache), parse_unmask(config.unmask)
    _check_denoising(kv_scheme, unmask, mask_id)
    if edit_ids is None and isinstance(unmask.rule, BlockEditRule):
        raise ConfigError(f"{unmask} needs DELETE and SPLIT tokens, and this model has none")
    if edit_ids is not None and config.skip_settled is not None:
        raise ConfigError(
            "`skip_settled` leaves tokens of a block out, and this model routes by all of them; "
            "leave it out"
        )
    length = len(prompt) + config.max_new_tokens
    # A larger request is refused below; its list of blocks could exceed memory.
    if length <= max_length:
        length = kv_scheme.blocks(len(prompt), config.max_new_tokens, config.block)[-1].stop
    if length > max_length:
        raise GenerationError(
            f"a prompt of {len(prompt)} tokens and max_new_tokens={config.max_new_tokens} "
            f"need at least {length} positions; the model has {max_length}"
        )
    return DecodeRequest(
        prompt_ids=tuple(prompt),
        max_new_tokens=config.max_new_tokens,
        block_length=config.block,
        kv_scheme=kv_scheme,
        unmask=unmask,
        sampling=config.sampling,
        seed=config.seed,
        early_stop=config.early_stop,
        eos_ids=stop_ids,
        mask_id=mask_id,
        vocabulary=vocabulary,
        edit_ids=edit_ids,
        skip_settled=config.skip_settled,
    )


def _check_skipping(kv_scheme: KVScheme, unmask: UnmaskStrategy) -> None:
    """Raises ConfigError where a block has no cached keys, or where its tokens may change."""
    if not kv_scheme.caches_blocks:
        raise ConfigError(
            f"`skip_settled` reads cached keys of the block, and `kv_cache` {kv_scheme} has none"
        )
    if unmask.edits or unmask.renoises:
        raise ConfigError(
            f"`skip_settled` takes tokens as final, and `unmask` {unmask} may change them"
        )


def _check_denoising(kv_scheme: KVScheme, unmask: UnmaskStrategy, mask_id: int) -> None:
    """Raises ConfigError unless model, KV scheme and rule denoise the same: masks or noise."""
    is_noise = mask_id == NO_MASK
    fits = {
        f"`kv_cache` {kv_scheme}": kv_scheme.base.encodes == is_noise,
        f"`unmask` {unmask}": unmask.renoises == is_noise,
    }
    own, other = ("random tokens", "masks") if is_noise else ("masks", "random tokens")
    for name, is_fitting in fits.items():
        if not is_fitting:
            raise ConfigError(
                f"{name}: for models that denoise {other}; the model denoises {own}. "
                "Without it the model's own is used"
            )


def check_prompt(prompt: Sequence[int], special_ids: tuple[int, ...], vocabulary: int) -> None:
    """Raises GenerationError for a prompt that no request can have.

    ``special_ids`` are the mask, and DELETE and SPLIT where a model has them.
    """
    if not prompt:
        raise GenerationError("the prompt is empty")
    for token in prompt:
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocabulary:
            raise GenerationError(f"prompt: {token!r} is not a token id below {vocabulary}")
        if token in special_ids:
            name = ("mask", "DELETE", "SPLIT")[special_ids.index(token)]
            raise GenerationError(f"the prompt contains the {name} token ({token})")
