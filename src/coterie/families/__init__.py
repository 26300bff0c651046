"""The supported model families, and detection of the family from a config."""

from __future__ import annotations

from dataclasses import replace

from coterie.errors import quote
from coterie.families.config import ModelConfig
from coterie.families.diffusion_gemma import FAMILY as DIFFUSION_GEMMA
from coterie.families.family import Family, FamilyDefaults
from coterie.families.llada2 import FAMILY as LLADA2
from coterie.families.llada_moe import FAMILY as LLADA_MOE
from coterie.families.llada_moe_v2 import check_not_llada_moe_v2
from coterie.families.sdar_moe import FAMILY as SDAR_MOE
from coterie.tokenizer.token_ids import read_token_ids

__all__ = [
    "FAMILIES",
    "Family",
    "FamilyDefaults",
    "ModelConfig",
    "detect_family",
    "eos_ids",
    "mask_id",
]

# Dense models that share a model_type with a supported family, or are often tried.
DENSE_ARCHITECTURES = ("LLaDAModelLM", "LLaDAModel", "SDARForCausalLM", "DreamModel")

SHARED_MODEL_TYPES = ("llada",)
"""Types of a supported family that dense models have too."""


def detect_family(config: ModelConfig) -> Family:
    """The family of ``architectures``, with the defaults of this checkpoint.

    Raises ConfigError for a model that is dense, unknown or inconsistent.
    """
    check_not_llada_moe_v2(config)
    architectures = config.values.get("architectures")
    if architectures is None:
        architectures = _architectures_of_type(config)
    if (
        not isinstance(architectures, list)
        or len(architectures) != 1
        or not isinstance(architectures[0], str)
    ):
        stated = "missing or null" if architectures is None else quote(architectures)
        raise config.error("architectures", f"is {stated}; known: {', '.join(FAMILIES)}")
    name = architectures[0]
    if name in DENSE_ARCHITECTURES:
        raise config.error("architectures", f"names {name}, a dense model: there are no experts")
    if name not in FAMILIES:
        raise config.error("architectures", f"names {quote(name)}; known: {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    model_type = config.values.get("model_type", family.model_types[0])
    if model_type not in family.model_types:
        known = " or ".join(family.model_types)
        raise config.error("model_type", f"is {quote(model_type)}, but {name} is {known}")
    if family.read_defaults is None:
        return family
    return replace(family, defaults=family.read_defaults(config, family.defaults))


def _architectures_of_type(config: ModelConfig) -> list[str] | None:
    """The only architecture of ``model_type``; None if there is not exactly one."""
    kind = config.values.get("model_type")
    named = [f.architecture for f in FAMILIES.values() if kind in f.model_types]
    return named if len(named) == 1 and kind not in SHARED_MODEL_TYPES else None


def mask_id(config: ModelConfig, family: Family, vocabulary: int) -> int | None:
    """The mask token: the config's, else the family's; None if that is outside the vocabulary."""
    if isinstance(config.values.get("mask_token_id"), list):
        raise config.error("mask_token_id", "is a list; a model has one mask token")
    default = family.defaults.mask_id
    ids = _token_ids(config, "mask_token_id", vocabulary)
    return ids[0] if ids else default if default < vocabulary else None


def eos_ids(config: ModelConfig, family: Family, vocabulary: int) -> tuple[int, ...]:
    """The end-of-text tokens: the config's and the family's, else the padding token."""
    config_ids = _token_ids(config, "eos_token_id", vocabulary)
    defaults = tuple(i for i in family.defaults.eos_ids if i < vocabulary)
    ids = tuple(dict.fromkeys(config_ids + defaults))
    return ids or _token_ids(config, "pad_token_id", vocabulary)


def _token_ids(config: ModelConfig, key: str, vocabulary: int) -> tuple[int, ...]:
    return read_token_ids(config.values, key, file=config.file, vocab_size=vocabulary)


FAMILIES = {
    family.architecture: family for family in (LLADA_MOE, LLADA2, SDAR_MOE, DIFFUSION_GEMMA)
}
