"""Prefill of prompts: it starts after a prefix with cached keys, and runs in chunks."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from coterie.decoding import DecodeRequest
from coterie.decoding.kv_schemes import WHOLE_PROMPT, ForwardPass, Prefill
from coterie.engine.active_sequence import ActiveSequence
from coterie.engine.kv_pool import KVCachePool
from coterie.engine.prefix_cache import PrefixBlockCache, PrefixLayout
from coterie.errors import ConfigError
from coterie.model.cache import KVCache
from coterie.routing import Vanilla
from coterie.values import Policy, RouterSpec


@dataclass(frozen=True)
class PromptPrefix:
    """The cached keys of a prompt's start, and how to prefill the rest."""

    prefill: Prefill = WHOLE_PROMPT
    blocks: tuple[KVCache, ...] = ()


class PromptPrefixes:
    """Cuts prefills into chunks, and fills and reads the prefix cache of an engine.

    One forward prefills at most ``chunk`` tokens of a prompt, rounded down to whole blocks but at
    least one; None: all of them. The cache has ``cache_bytes``; 0 turns it off. Both apply where
    vanilla routing prefills: a policy elects with all tokens of a forward, so it prefills the
    prompt at once. KV schemes without prefill are not affected.
    """

    def __init__(self, router: RouterSpec, chunk: int | None, cache_bytes: int) -> None:
        if chunk is not None and chunk < 1:
            raise ConfigError(f"`prefill_chunk` must be at least 1, not {chunk}")
        if cache_bytes < 0:
            raise ConfigError(f"`prefix_cache_bytes` must be at least 0, not {cache_bytes}")
        self.cache = PrefixBlockCache(cache_bytes)
        self._router, self._chunk = router, chunk

    def find(self, request: DecodeRequest, policy: Policy) -> PromptPrefix:
        """The cached start of a prompt that ``policy`` prefills."""
        if not request.kv_scheme.base.writes_kv or not isinstance(policy, Vanilla):
            return PromptPrefix()
        layout, blocks = self._layout(request), list[KVCache]()
        if self.cache.capacity:
            blocks = self.cache.find(layout.digests(torch.tensor(request.prompt_ids)))
        width = None if self._chunk is None else layout.slice_width(self._chunk)
        return PromptPrefix(Prefill(len(blocks) * layout.width, width), tuple(blocks))

    def after_pass(
        self, active: ActiveSequence, written: ForwardPass, policy: Policy, pool: KVCachePool
    ) -> None:
        """Count the exact keys that a forward wrote; cache them once logits depend on them.

        Logits of a forward that succeeded are finite, so the keys that it read are too.
        """
        request = active.sequence.request
        if not self.cache.capacity or not request.kv_scheme.base.writes_kv:
            return
        layout = self._layout(request)
        if isinstance(active.commit_policy() if written.committed else policy, Vanilla):
            active.exact_keys = layout.exact_keys(active.exact_keys, written)
        if written.is_denoising:
            self._store(active, layout, pool.full_cache())

    def _store(self, active: ActiveSequence, layout: PrefixLayout, cache: KVCache) -> None:
        row, width = active.cache_row, layout.width
        if active.exact_keys - active.shared_keys < width:
            return
        digests = layout.digests(active.sequence.canvas.tokens[: active.exact_keys])
        self.cache.store(
            digests,
            cache.row_bytes(width),
            lambda block: cache.copy_span(row, block * width, (block + 1) * width),
        )
        active.shared_keys = len(digests) * width

    def _layout(self, request: DecodeRequest) -> PrefixLayout:
        return PrefixLayout.of(request.kv_scheme, request.block_length, self._router)
