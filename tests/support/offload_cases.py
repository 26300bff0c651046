"""Cases shared by tests of expert stores: small experts, failing tiers, packed checkpoints."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from asynchronous_device import World
from tiny_checkpoints import packed_checkpoint, tiny_checkpoint
from torch import Tensor

import coterie
from coterie import ops
from coterie.engine.engine import Engine
from coterie.errors import OffloadError
from coterie.loading import gpu_offload, target
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.eviction import Eviction, Lru
from coterie.offload.fetchers import ThreadedFetcher
from coterie.offload.tiers import Tier
from coterie.ops import cpu
from coterie.values import ExpertRequest, ExpertStore, Routing, Slab, expert_mask

HIDDEN, WIDTH, LAYERS = 8, 4, (1, 2)
GATE_UP_SIZE = 2 * WIDTH * HIDDEN
SIZE = 4 * (GATE_UP_SIZE + HIDDEN * WIDTH)  # bytes of an expert
NAN_BYTE = 255
PROMPT = [5, 17, 33, 2, 9]
OPTIONS = {"max_new_tokens": 16, "block": 8, "unmask": "fixed:steps=3"}

needs_kernels = pytest.mark.skipif(
    not cpu.is_available(), reason="the kernels for CPUs are not built"
)


def fp32_slab(memory: Tensor, slot_of: Tensor) -> Slab:
    """fp32 experts, gate and up before down."""
    numbers = memory.view(torch.float32)
    return Slab(
        numbers[:, :GATE_UP_SIZE].reshape(-1, 2 * WIDTH, HIDDEN),
        numbers[:, GATE_UP_SIZE:].reshape(-1, HIDDEN, WIDTH),
        slot_of,
    )


def expert_blobs(experts: int, seed: int = 0) -> dict[int, Tensor]:
    """Random experts of each layer."""
    generator = torch.Generator().manual_seed(seed)
    return {
        layer: torch.randn(experts, SIZE // 4, generator=generator).view(torch.uint8)
        for layer in LAYERS
    }


def nan_slots(slots: int, size: int) -> Tensor:
    """Slots that are NaN until they are filled."""
    return torch.full((slots, size), NAN_BYTE, dtype=torch.uint8)


def cached_store(
    tier: Tier, experts: int, capacity: int, eviction: Eviction | None = None, **options: object
) -> CachedExpertStore:
    return CachedExpertStore(
        ThreadedFetcher(tier),
        fp32_slab,
        nan_slots,
        experts,
        SIZE,
        capacity,
        eviction or Lru(),
        **options,  # type: ignore[arg-type]
    )


def request_for(experts: int, *used: int) -> ExpertRequest:
    """A request for these experts only."""
    mask = torch.zeros(experts, dtype=torch.bool)
    mask[list(used)] = True
    return ExpertRequest(mask)


def random_routings(
    experts: int, seed: int, *, count: int, tokens: int = 5, k: int = 3
) -> list[Routing]:
    generator = torch.Generator().manual_seed(seed)
    routings = []
    for _ in range(count):
        ids = torch.rand(tokens, experts, generator=generator).argsort(-1)[:, : min(k, experts)]
        weights = torch.rand(ids.shape, generator=generator)
        routings.append(Routing(ids, weights, expert_mask(ids.flatten(), experts), ids))
    return routings


def moe_output(store: ExpertStore, layer: int, routing: Routing, x: Tensor) -> Tensor:
    """What the experts of a store compute for x [T, H]."""
    out = torch.zeros(len(x), HIDDEN)
    for slab in store.serve(layer, ExpertRequest(routing.used, routing)):
        out += ops.run_experts(x, routing, slab)
    return out


@dataclass
class FailingTier:
    """A tier that cannot read some experts."""

    tier: Tier
    broken: set[int]

    def fetch(self, layer: int, expert: int, target: Tensor) -> str:
        if expert in self.broken:
            raise OffloadError(f"expert {expert} of layer {layer} cannot be read")
        return self.tier.fetch(layer, expert, target)


def plain_or_packed_checkpoint(folder: Path, kind: str, family: str = "llada2") -> Path:
    """A tiny checkpoint with 16 experts per layer: "plain" in fp32, or packed."""
    if kind == "plain":
        return tiny_checkpoint(folder / "whole", family, dtype=torch.float32)
    return packed_checkpoint(folder, family, kind)


def load_engine(
    folder: Path, memory: str | ExpertMemoryConfig | None = None, **options: object
) -> Engine:
    return coterie.load(folder, dtype="float32", device="cpu", expert_memory=memory, **options)


def cached_store_of(engine: Engine) -> CachedExpertStore:
    store = engine.model.store
    assert isinstance(store, CachedExpertStore)
    return store


def simulate_gpu(patch: pytest.MonkeyPatch) -> None:
    """Give the CPU a memory of its own, with copies in a stream that runs at once."""

    def allocate(count: int, size: int, device: torch.device) -> Tensor:
        return torch.empty(count, size, dtype=torch.uint8)

    World(0, eager=1.0).install(patch)
    patch.setattr(target, "has_device_memory", lambda device: True)
    patch.setattr(gpu_offload, "allocate_pinned", allocate)
    keep_slab: Callable[..., Slab] = lambda slab, release_source=False: slab  # noqa: E731
    patch.setattr(ops, "prepare", keep_slab)
