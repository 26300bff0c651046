"""What a model is and where it fits, from its config.json alone."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch

from coterie.engine.source import CONFIG_ONLY, EMBEDDED, find_folder
from coterie.families import Config, Family, eos_ids, mask_id, recognise
from coterie.model.size import Size, experts_that_fit, size
from coterie.model.spec import ModelSpec

GIB = 1 << 30
MEMORIES = (8, 12, 16, 24, 32, 48, 80, 141)
"""Memory of usual devices in GiB."""


@dataclass(frozen=True)
class Fit:
    """Experts of each layer that stay in ``memory`` bytes; -1 = the rest alone is too large."""

    memory: int
    experts: int


@dataclass(frozen=True)
class Facts:
    """Everything that ``coterie inspect`` tells."""

    name: str
    family: Family
    spec: ModelSpec
    size: Size
    dtype: torch.dtype
    mask_id: int
    eos_ids: tuple[int, ...]
    length: int  # of the one row of keys and values that is counted in ``fits``
    fits: tuple[Fit, ...]


def inspect(
    name: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.bfloat16,
    length: int = 2048,
    memories: tuple[int, ...] = tuple(gib * GIB for gib in MEMORIES),
) -> Facts:
    """Read a model's config and nothing else; raises CoterieError as loading would."""
    config = Config.of(find_folder(name, CONFIG_ONLY) / "config.json")
    family = recognise(config)
    spec = family.read(config)
    length = min(length, spec.max_length)
    return Facts(
        name=EMBEDDED if name is None else str(name),
        family=family,
        spec=spec,
        size=size(spec, dtype),
        dtype=dtype,
        mask_id=mask_id(config, family, spec.vocabulary),
        eos_ids=eos_ids(config, family, spec.vocabulary),
        length=length,
        fits=tuple(
            Fit(memory, experts_that_fit(spec, dtype, memory=memory, length=length))
            for memory in memories
        ),
    )
