"""Makes a request that the engine accepts from a body; every error is the client's."""

from __future__ import annotations

import secrets
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

from coterie.decoding import parse_kv_scheme, parse_unmask
from coterie.engine.engine import Engine
from coterie.engine.generation_config import GenerationConfig, make_request
from coterie.errors import CoterieError
from coterie.routing import check_coreset_reuse, check_layers, format_policy, parse_policy
from coterie.server.api_error import ApiError
from coterie.server.requests import CoterieStreamOptions, GenerationFields
from coterie.server.settings import RESTRICTED_OPTIONS, ServerSettings
from coterie.values import Policy

CANONICAL: dict[str, Callable[[str], str]] = {
    "policy": lambda text: format_policy(parse_policy(text)),
    "kv_cache": lambda text: str(parse_kv_scheme(text)),
    "unmask": lambda text: str(parse_unmask(text)),
}
SAMPLING = ("temperature", "top_p", "top_k", "early_stop")
T = TypeVar("T")


@dataclass(frozen=True)
class GenerationRequest:
    """One request for the scheduler. ``votes`` implies ``steps``."""

    id: str
    prompt_ids: tuple[int, ...]
    policy: Policy
    generation: GenerationConfig
    stop_strings: tuple[str, ...] = ()
    logprobs: bool = False
    steps: bool = False  # whether deltas carry their steps
    votes: bool = False
    arrival: float = field(default_factory=time.monotonic)


def make_generation_request(
    fields: GenerationFields,
    prompt_ids: Sequence[int],
    engine: Engine,
    settings: ServerSettings,
    *,
    request_id: str,
) -> GenerationRequest:
    """Raises ApiError, with the field where it is known, for what the engine would refuse."""
    _check_allowed(fields, engine, settings)
    policy = engine.policy
    if fields.policy is not None:
        policy = _checked("policy", lambda: parse_policy(fields.policy or ""))
    layers = len(engine.model.spec.moe_layers)
    _checked("policy", lambda: check_layers(policy, layers))
    if fields.reuse_tolerance is not None:
        _checked("reuse_tolerance", lambda: check_coreset_reuse(policy))
    generation = _checked(None, lambda: engine.generation.replace(**_options(fields)))
    generation = _fitted(fields, len(prompt_ids), generation, engine, settings)
    _checked(
        fields.prompt_field,
        lambda: _check_prompt(fields, prompt_ids, generation, engine, settings),
    )
    frames = fields.stream_options.coterie if fields.stream_options else False
    return GenerationRequest(
        id=request_id,
        prompt_ids=tuple(prompt_ids),
        policy=policy,
        generation=generation,
        stop_strings=fields.stop_strings,
        logprobs=fields.wants_logprobs,
        steps=bool(frames),
        votes=isinstance(frames, CoterieStreamOptions) and frames.votes,
    )


def max_model_len(engine: Engine, settings: ServerSettings) -> int:
    """Positions of a prompt and its answer."""
    return min(settings.max_model_len or engine.model.spec.max_length, engine.model.spec.max_length)


def _options(fields: GenerationFields) -> dict[str, object]:
    """Fields of a GenerationConfig, without the number of new tokens."""
    names = (*SAMPLING, *RESTRICTED_OPTIONS)
    options = {name: getattr(fields, name) for name in names if getattr(fields, name) is not None}
    options.pop("policy", None)
    if options.get("top_k") == -1:
        options["top_k"] = 0
    if fields.ignore_eos:
        options["early_stop"] = "off"
    if fields.seed is not None:
        options["seed"] = fields.seed % 2**63
    elif fields.temperature:
        options["seed"] = secrets.randbits(62)
    return options


def _check_allowed(fields: GenerationFields, engine: Engine, settings: ServerSettings) -> None:
    """Raises for an option that the operator does not allow."""
    for option in RESTRICTED_OPTIONS:
        value = getattr(fields, option)
        if value is None:
            continue
        canonical = _checked(option, lambda: CANONICAL.get(option, str)(value))  # noqa: B023
        default = engine.policy if option == "policy" else None
        is_default = default is not None and _checked(None, lambda: parse_policy(value)) == default  # noqa: B023
        if not is_default and not settings.allowed.allows(option, canonical):
            allowed = settings.allowed.describe()
            raise ApiError(
                400,
                f"{option}={canonical} is not allowed here; allowed: {allowed}",
                param=option,
                code="option_not_allowed",
            )


def _fitted(
    fields: GenerationFields,
    prompt_tokens: int,
    generation: GenerationConfig,
    engine: Engine,
    settings: ServerSettings,
) -> GenerationConfig:
    """The options with the requested number of new tokens, else as many of the default as fit."""
    room = max_model_len(engine, settings)
    if fields.limit is not None:
        return generation.replace(max_new_tokens=fields.limit)
    fitted = generation.fit(prompt_tokens, room) if 0 < prompt_tokens < room else generation
    if fitted is None:
        raise _too_long(
            f"a prompt of {prompt_tokens} tokens leaves no room in {room} positions",
            fields.prompt_field,
        )
    return fitted


def _check_prompt(
    fields: GenerationFields,
    prompt_ids: Sequence[int],
    generation: GenerationConfig,
    engine: Engine,
    settings: ServerSettings,
) -> None:
    model, room = engine.model, max_model_len(engine, settings)
    if len(prompt_ids) >= room:
        message = f"the prompt has {len(prompt_ids)} tokens; this server takes {room - 1}"
        raise _too_long(message, fields.prompt_field)
    try:
        make_request(
            prompt_ids,
            generation,
            mask_id=model.mask_id,
            stop_ids=model.eos_ids,
            vocabulary=model.spec.vocabulary,
            max_length=room,
            edit_ids=model.family.defaults.edit_ids,
        )
    except CoterieError as error:
        if len(prompt_ids) + generation.max_new_tokens > room - generation.block:
            limit = fields.limit_field
            raise _too_long(str(error).replace("max_new_tokens", limit), limit) from None
        raise


def _too_long(message: str, param: str) -> ApiError:
    return ApiError(400, message, param=param, code="context_length_exceeded")


def _checked(param: str | None, check: Callable[[], T]) -> T:
    """What the check returns; an error of the package is the client's."""
    try:
        return check()
    except CoterieError as error:
        raise ApiError(400, str(error), param=param) from None
