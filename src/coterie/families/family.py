"""The definition of a model family: config reader, tensor names and defaults."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from coterie.families.config import ModelConfig
from coterie.families.names import TensorNames
from coterie.model.spec import ModelSpec


@dataclass(frozen=True)
class FamilyDefaults:
    """Generation defaults of a family's released models."""

    block: int  # tokens denoised together
    block_causal: bool  # True = block-causal attention on an absolute grid, False = bidirectional
    kv_cache: str  # spec of the KV-caching scheme
    unmask: str  # spec of the unmasking rule
    mask_id: int  # NO_MASK for a model that denoises random tokens
    eos_ids: tuple[int, ...]
    chat_template: str  # jinja, for checkpoints without a template
    hidden_span: tuple[str, str] | None = None  # marks around text that is no part of an answer
    edit_ids: tuple[int, int] | None = None  # the DELETE and SPLIT tokens of models that edit


@dataclass(frozen=True)
class Family:
    """A model family. A family is data; all families share one transformer."""

    name: str
    title: str
    architecture: str  # config.json's ``architectures``, which identifies the family
    model_types: tuple[str, ...]
    read_spec: Callable[[ModelConfig], ModelSpec]
    tensor_names: TensorNames
    defaults: FamilyDefaults
    # The defaults of one checkpoint; None: those of the family.
    read_defaults: Callable[[ModelConfig, FamilyDefaults], FamilyDefaults] | None = None
