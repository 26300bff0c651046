"""How much memory experts may have: what was asked for, and what that comes to on a machine."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch

from coterie.engine.coarse import Coarse
from coterie.engine.warm import SavedVotes
from coterie.experts.aside import AtMost, parse_aside
from coterie.experts.capacity import Capacity, parse_bytes
from coterie.experts.eviction import EVICTIONS, Eviction, Lru, parse_eviction
from coterie.model.size import size
from coterie.model.spec import ModelSpec
from coterie.naming import CoterieError
from coterie.spelling import spelled

Auto = Literal["auto"]

AUTO: Auto = "auto"
LENGTH = 2048  # positions of a row whose keys and values "auto" leaves room for
MARGIN = 512 << 20  # bytes that "auto" leaves for what a forward computes with
SPARE = 0.05  # and of what is free, the share that others may take meanwhile


@dataclass(frozen=True)
class Memory:
    """Memory for some of the experts, while the others stay where they were loaded from.

    ``fast`` is where they are computed from. On a GPU, ``host`` bytes of the machine's own memory
    stand between that and the disk; None leaves it to what the machine needs. ``eviction`` says who
    leaves fast memory, ``warm`` who is there from the start. With ``coarse`` a part of that memory
    is for experts in fewer bits.
    """

    fast: Capacity | Auto
    host: int | Auto | None = None
    eviction: Eviction = field(default_factory=Lru)
    warm: SavedVotes | None = None
    coarse: Coarse | None = None
    aside: AtMost | Auto | None = None  # whom a CPU beside a GPU computes; None: nobody
    imagined: bool = False  # all experts are there, and book is kept of what would have moved

    @staticmethod
    def parse(
        fast: str,
        *,
        host: str | None = None,
        eviction: str | None = None,
        warm: SavedVotes | None = None,
        coarse: Coarse | None = None,
        aside: str | None = None,
        imagined: bool = False,
    ) -> Memory:
        """From what is typed: "35%", "47" a layer, "6GiB" or "auto"; "20GiB" or "auto"; "lru";
        "off", "auto" or the most tokens of an expert."""
        option, or_else = ("--imagine-memory", "") if imagined else ("--expert-memory", ", or auto")
        return Memory(
            AUTO if fast.strip() == AUTO else Capacity.parse(fast, option, or_else),
            AUTO if host == AUTO else None if host is None else parse_bytes(host, "--host-memory"),
            Lru() if eviction is None else parse_eviction(eviction),
            warm,
            coarse,
            None if aside is None else parse_aside(aside),
            imagined,
        )

    def document(self) -> dict[str, object]:
        """As plain values, by the names of the options; what was not asked for is None."""
        return {
            "expert_memory": self.fast if self.fast == AUTO else self.fast.text,
            "host_memory": self.host,
            "eviction": spelled(self.eviction, EVICTIONS),
            "warm": None if self.warm is None else self.warm.name,
            **({} if self.coarse is None else self.coarse.document()),
            **(
                {}
                if self.aside is None
                else {"cpu_experts": AUTO if self.aside == AUTO else self.aside.tokens}
            ),
            **({"imagined": True} if self.imagined else {}),
        }


@dataclass(frozen=True)
class Settled:
    """What a ``Memory`` came to: ``slots`` for the experts of each layer.

    ``free`` bytes were there and ``rest`` of them left for all else, where it was "auto" that
    chose. Behind a GPU's slots, ``host`` bytes of the machine's own memory are for experts; none
    where the slots hold all of them.
    """

    asked: Memory
    slots: int
    experts: int
    layers: int
    expert_bytes: int
    free: int | None = None
    rest: int | None = None
    host: int | None = None

    @property
    def whole(self) -> bool:
        """Whether "auto" found that all of them fit, or a GPU was given room for all: then there is
        nothing to fetch."""
        return self.slots == self.experts and (self.asked.fast == AUTO or self.host == 0)

    @property
    def bytes(self) -> int:
        """Of all slots."""
        return self.slots * self.layers * self.expert_bytes

    @property
    def absent(self) -> int:
        """Bytes of the experts for which there are no slots."""
        return (self.experts - self.slots) * self.layers * self.expert_bytes


def settle(
    asked: Memory, spec: ModelSpec, dtype: torch.dtype, *, expert_bytes: int, free: int | None
) -> Settled:
    """The slots of each layer, where an expert weighs so much in fast memory and ``free`` bytes
    can be had there; raises CoterieError for less than one."""
    layers, experts = len(spec.moe_layers), spec.router.experts
    if asked.fast != AUTO:
        slots = asked.fast.slots(layers=layers, experts=experts, size=expert_bytes)
        return Settled(asked, slots, experts, layers, expert_bytes)
    if free is None:
        raise CoterieError(
            "--expert-memory auto: this system does not tell how much memory is free; "
            "say a share (35%), slots a layer (47) or bytes (6GiB)"
        )
    rest = all_else(spec, dtype, free)
    slots = min(experts, max(0, free - rest) // (layers * expert_bytes))
    if slots < 1:
        raise CoterieError(
            f"--expert-memory auto: {free:,} bytes are free, all else needs {rest:,}, and one "
            f"expert in each of {layers} layers {layers * expert_bytes:,} more"
        )
    return Settled(asked, slots, experts, layers, expert_bytes, free, rest)


def all_else(spec: ModelSpec, dtype: torch.dtype, free: int) -> int:
    """Bytes beside the experts: other weights, keys and values of a long row, and a margin."""
    whole = size(spec, dtype)
    weights = whole.bytes - len(spec.moe_layers) * whole.layer_expert_bytes
    row = min(LENGTH, spec.max_length) * whole.cache_bytes
    return weights + row + MARGIN + int(SPARE * free)
