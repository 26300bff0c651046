"""Keys of prompt prefixes that earlier requests computed, in whole blocks.

Only keys that vanilla routing wrote are exact: they depend on nothing but the tokens up to the end
of their block. A coreset is elected by all tokens of a forward, so its keys depend on later ones.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from hashlib import sha256
from itertools import takewhile
from math import lcm

from torch import Tensor

from coterie.decoding import KVScheme
from coterie.decoding.kv_schemes import ForwardPass
from coterie.model.cache import KVCache
from coterie.values import RouterSpec


@dataclass(frozen=True)
class PrefixLayout:
    """Where a prompt may be cut, so that vanilla routing writes the same keys in every part.

    A cached block has ``width`` tokens, and a prefill is cut at multiples of it. A router with a
    capacity admits experts by ``router_block`` tokens, which one forward must hold together.
    """

    width: int
    router_block: int  # 1 without a capacity
    causal_block: int

    @staticmethod
    def of(kv_scheme: KVScheme, block_length: int, router: RouterSpec) -> PrefixLayout:
        router_block = router.block if router.capacity else 1
        width = lcm(block_length, router_block)
        return PrefixLayout(width, router_block, kv_scheme.causal_block(block_length))

    def slice_width(self, tokens: int) -> int:
        """The positions of a chunk of at most ``tokens``: whole blocks, at least one."""
        return max(1, tokens // self.width) * self.width

    def exact_keys(self, before: int, written: ForwardPass) -> int:
        """How many keys of a row, from its start on, are exact after a forward by vanilla."""
        if written.start != before:
            return before
        return written.final_stop // self.router_block * self.router_block

    def digests(self, tokens: Tensor) -> list[bytes]:
        """For each whole block of ``tokens`` [n], a digest of all tokens up to its end."""
        digest, digests = sha256(repr(self).encode()), []
        for block in tokens[: len(tokens) // self.width * self.width].reshape(-1, self.width):
            digest.update(block.numpy().tobytes())
            digests.append(digest.digest())
        return digests


@dataclass(frozen=True)
class PrefixCacheStats:
    """``hits`` requests found ``tokens`` tokens of their prompts; ``entries`` blocks are cached."""

    hits: int
    tokens: int
    bytes: int
    entries: int


class PrefixBlockCache:
    """Blocks of keys by digest, within a number of bytes; the least recently used is evicted first.

    A block is never cached without the blocks before it: these count as used after it.
    """

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._blocks: OrderedDict[bytes, KVCache] = OrderedDict()  # least recently used first
        self._bytes = self._hits = self._tokens = 0

    @property
    def stats(self) -> PrefixCacheStats:
        return PrefixCacheStats(self._hits, self._tokens, self._bytes, len(self._blocks))

    def find(self, digests: Sequence[bytes]) -> list[KVCache]:
        """The blocks of the longest cached prefix."""
        cached = list(takewhile(self._blocks.__contains__, digests))
        self._use(cached)
        blocks = [self._blocks[digest] for digest in cached]
        self._hits += bool(blocks)
        self._tokens += sum(block.length for block in blocks)
        return blocks

    def store(
        self, digests: Sequence[bytes], block_bytes: int, copy: Callable[[int], KVCache]
    ) -> None:
        """Add the blocks of a prefix that are missing; ``copy`` makes the block of an index."""
        digests = digests[: self.capacity // block_bytes]
        self._use(digest for digest in digests if digest in self._blocks)
        for index, digest in enumerate(digests):
            if digest not in self._blocks:
                self._evict(block_bytes)
                self._blocks[digest] = copy(index)
                self._bytes += block_bytes
        self._use(digests)

    def _use(self, digests: Iterable[bytes]) -> None:
        """Mark the blocks of a prefix as used, the last block first."""
        for digest in reversed(list(digests)):
            self._blocks.move_to_end(digest)

    def _evict(self, needed: int) -> None:
        while self._blocks and self._bytes + needed > self.capacity:
            _, block = self._blocks.popitem(last=False)
            self._bytes -= block.row_bytes(block.length)
