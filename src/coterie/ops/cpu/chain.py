"""Works one after the other in one call of the kernels."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from typing import TypeAlias

import torch

from coterie.ops.cpu.kernels import OUTCOMES, built
from coterie.ops.cpu.library import Attending, Chain, Gating, Link, Norming, Product

Work: TypeAlias = Product | Attending | Norming | Gating

_KINDS: Mapping[type[Work], int] = {Product: 0, Attending: 1, Norming: 2, Gating: 3}
"""See ``api.hpp``."""


def follow(*works: Work) -> None:
    """Do them in this order: what one writes, the next ones may read.

    The caller keeps all memory that they name until it returns.
    """
    links = (Link * len(works))(*((ctypes.addressof(w), _KINDS[type(w)]) for w in works))
    chain = Chain(ctypes.addressof(links), len(works), torch.get_num_threads())
    found = built()
    if outcome := found.handle.coterie_follow(found.isa(), ctypes.byref(chain)):
        names = ", ".join(type(work).__name__.lower() for work in works)
        raise RuntimeError(f"the kernels could not run ({names}): {OUTCOMES[outcome]}")
