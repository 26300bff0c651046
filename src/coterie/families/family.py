"""What a family is: a way to read its config, the names of its tensors, and its habits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coterie.families.config import ModelConfig
from coterie.families.names import TensorNames
from coterie.model.spec import ModelSpec


@dataclass(frozen=True)
class FamilyDefaults:
    """How a family's released models are meant to be used where nothing else is asked."""

    block: int  # tokens denoised together
    block_causal: bool  # attention: True = blocks on an absolute grid, False = all sees all
    plan: str  # as decoding spells it
    unmask: str
    mask_id: int
    eos_ids: tuple[int, ...]
    chat_template: str  # jinja, for checkpoints that bring none of their own


@dataclass(frozen=True)
class Family:
    """A family is data; the transformer is the same for all."""

    name: str
    title: str
    architecture: str  # config.json's ``architectures``: what decides
    model_types: tuple[str, ...]
    read_spec: Callable[[ModelConfig], ModelSpec]
    tensor_names: TensorNames
    defaults: FamilyDefaults
