"""A tiny random model of each family in memory, and options with which it decodes quickly."""

from __future__ import annotations

from functools import cache

from coterie.engine.generation_config import GenerationConfig
from coterie.loading.load import Model
from coterie.testing import random_transformer, read_spec, tiny_config
from coterie.tokenizer import IdTokenizer
from coterie.values import NO_MASK

RULES = {"llada2.2": "joint-threshold-indel", "diffusion-gemma": "renoise:steps=4"}
"""Rules that end soon with random weights; other families have theirs."""


@cache
def tiny_model(family: str) -> Model:
    kind, spec = read_spec(tiny_config(family))
    mask = NO_MASK if kind.defaults.mask_id == NO_MASK else 95
    weights = random_transformer(spec, seed=1)
    return Model(f"tiny {family}", kind, weights, IdTokenizer(96), mask, (94,))


def family_generation(family: str) -> GenerationConfig:
    defaults = GenerationConfig.for_family(tiny_model(family).family.defaults)
    return defaults.replace(block=8, unmask=RULES.get(family, defaults.unmask))
