"""Memory of the host before a disk: the right bytes, whoever asks at once and whatever fails."""

from __future__ import annotations

import threading
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from torch import Tensor

from coterie.errors import CoterieError
from coterie.offload.host_cache import HostCache
from coterie.offload.tiers import HostTier, Tier

LAYERS, EXPERTS, SIZE = (1, 4), 5, 64
WHOLE = {layer: torch.randint(256, (EXPERTS, SIZE), dtype=torch.uint8) for layer in LAYERS}
Asked = tuple[int, int]
asked = st.tuples(st.sampled_from(LAYERS), st.integers(0, EXPERTS - 1))


@dataclass
class Counted:
    """A tier that counts who was read, fails when told to, and takes its time."""

    slow: float = 0.0
    fail: set[int] = field(default_factory=set)  # of reads by number
    reads: list[Asked] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def fetch(self, layer: int, expert: int, into: Tensor) -> str:
        with self.lock:
            self.reads.append((layer, expert))
            failing = len(self.reads) - 1 in self.fail
        into.fill_(7)  # what half a read leaves
        time.sleep(self.slow)
        if failing:
            raise CoterieError(f"expert {expert} of layer {layer} cannot be read")
        return HostTier(WHOLE).fetch(layer, expert, into)


def host(below: Tier, slots: int) -> HostCache:
    return HostCache(below, torch.zeros(slots, SIZE, dtype=torch.uint8))


def fetched(tier: Tier, one: Asked) -> Tensor:
    into = torch.zeros(SIZE, dtype=torch.uint8)
    tier.fetch(*one, into)
    return into


@given(st.lists(asked, max_size=40), st.integers(1, 12), st.sets(st.integers(0, 30)))
@law(80)
def test_host_cache_is_least_frequently_used(
    wishes: list[Asked], slots: int, fail: set[int]
) -> None:
    """A second book, kept here, says who is read; what failed is read again when asked for."""
    below = Counted(fail=fail)
    tier = host(below, slots)
    here: set[Asked] = set()
    used: Counter[Asked] = Counter()
    reads = 0
    for one in wishes:
        used[one] += 1
        if one not in here:
            reads += 1
            if len(here) == slots:
                here.remove(min(here, key=lambda key: (used[key], (-key[0], -key[1]))))
            if reads - 1 in fail:
                with pytest.raises(CoterieError, match="cannot be read"):
                    fetched(tier, one)
                continue
            here.add(one)
        assert torch.equal(fetched(tier, one), WHOLE[one[0]][one[1]])
        assert len(below.reads) == reads
    assert (tier.misses, tier.hits) == (reads, len(wishes) - reads)


@given(st.lists(asked, min_size=8, max_size=40), st.integers(1, 4), st.sets(st.integers(0, 20)))
@law(12)
def test_threads_read_the_right_bytes(wishes: list[Asked], slots: int, fail: set[int]) -> None:
    below = Counted(slow=2e-4, fail=fail)
    tier = host(below, slots)

    def wish(one: Asked) -> bool:
        try:
            with tier.pin(*one) as (blob, _):
                for _ in range(3):
                    assert torch.equal(blob, WHOLE[one[0]][one[1]])
                    time.sleep(1e-4)
        except CoterieError:
            return False
        return True

    with ThreadPoolExecutor(6) as threads:
        right = list(threads.map(wish, wishes))
    assert right.count(False) == len([at for at in fail if at < len(below.reads)])
    assert tier.misses == len(below.reads)
    below.fail.clear()
    assert all(torch.equal(fetched(tier, one), WHOLE[one[0]][one[1]]) for one in set(wishes))


def test_threads_share_one_read() -> None:
    below = Counted(slow=0.02)
    tier = host(below, 2)
    with ThreadPoolExecutor(4) as threads:
        found = list(threads.map(lambda _: fetched(tier, (1, 3)), range(4)))
    assert all(torch.equal(one, WHOLE[1][3]) for one in found)
    assert (below.reads, tier.misses, tier.hits) == ([(1, 3)], 1, 3)


def test_after_a_failed_read_a_waiting_thread_reads() -> None:
    below = Counted(slow=0.02, fail={0})
    tier = host(below, 1)

    def tried(_: int) -> Tensor | None:
        try:
            return fetched(tier, (1, 3))
        except CoterieError:
            return None

    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(tried, range(3)))
    assert [one is None for one in found].count(True) == 1
    assert all(one is None or torch.equal(one, WHOLE[1][3]) for one in found)
    assert len(below.reads) == 2
