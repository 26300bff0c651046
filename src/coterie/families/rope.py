"""The config keys of rotary position embeddings: beside each other, or in one object."""

from __future__ import annotations

from dataclasses import replace

from coterie.errors import quote
from coterie.families.config import ModelConfig

ROPE_OBJECTS = ("rope_parameters", "rope_scaling")
"""The object of transformers 5, and that of transformers 4."""

ROPE_KEYS = ("rope_theta", "partial_rotary_factor")
IGNORED = {"factor": 1, "attention_factor": 1, "mscale": 1}
"""Keys that the default type does not read, each with the value that would change nothing."""


def with_rope_parameters(config: ModelConfig) -> ModelConfig:
    """The config with the keys of its RoPE objects, which must agree with those beside them.

    Raises ConfigError, with the key of the object, for any other type than "default".
    """
    values = dict(config.values)
    for name in ROPE_OBJECTS:
        for key, value in _default_rope(config, name).items():
            if values.get(key) not in (None, value):
                problem = f"is {quote(values[key])}, but {name} has {quote(value)}"
                raise config.error(key, f"{problem}: the rope values disagree")
            values[key] = value
    return replace(config, values=values)


def _default_rope(config: ModelConfig, name: str) -> dict[str, object]:
    """The keys of an object that changes no position; empty if it is null or absent."""
    value = config.get(name)
    if isinstance(value, dict) and set(value) == {"full_attention"}:
        value = value["full_attention"]  # one object for each kind of layer
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise config.error(name, f"is {quote(value)}, not an object")
    keys = {key: item for key, item in value.items() if item is not None}
    for key in ("rope_type", "type"):
        if keys.pop(key, "default") != "default":
            raise config.error(name, f'is {quote(value)}; supported: null or the type "default"')
    rope = {key: keys.pop(key) for key in ROPE_KEYS if key in keys}
    for key, item in keys.items():
        if key not in IGNORED or type(item) is bool or item != IGNORED[key]:
            raise config.error(name, f"has {key} {quote(item)}, which is not supported")
    return rope
