"""What goes wrong behind a store of few experts: said in a line, and over when its cause is."""

from __future__ import annotations

import errno
import os
import time
from collections.abc import Callable, Collection
from concurrent.futures import Future
from dataclasses import dataclass, field
from io import FileIO
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from offload_cases import (
    OPTIONS,
    PROMPT,
    cached_store,
    expert_blobs,
    fp32_slab,
    load_engine,
    needs_kernels,
    packed_checkpoint,
)
from torch import Tensor

from coterie.errors import CoterieError
from coterie.loading.saved_votes import SavedVotes, write_votes
from coterie.offload import tiers
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.fetchers import ThreadedFetcher
from coterie.offload.mixed_precision_store import MixedPrecisionStore
from coterie.offload.slot_table import Slots, Wave
from coterie.offload.tiers import HostTier
from coterie.values import ExpertRequest

Harm = Callable[[Path], object]
CHANGED = "the file was changed after the model was loaded: load it again"


def overwrite(path: Path) -> None:
    """In place, as many bytes, header and all else of the file as they were."""
    half = path.stat().st_size // 2
    path.write_bytes(path.read_bytes()[:half] + os.urandom(path.stat().st_size - half))


def rot(path: Path) -> None:
    """As a disk does it: nobody has written."""
    before = path.stat()
    overwrite(path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def put_another_in_its_place(path: Path) -> None:
    other = path.with_suffix(".new")
    other.write_bytes(bytes(path.stat().st_size))
    other.replace(path)


@needs_kernels
@pytest.mark.parametrize(
    ("harm", "told"),
    [
        (Path.unlink, r"cannot be read \(No such file"),
        (
            lambda path: os.truncate(path, path.stat().st_size // 2),
            f"ends after .* bytes; {CHANGED}",
        ),
        (overwrite, f"wrong checksum; {CHANGED}"),
        (put_another_in_its_place, f"wrong checksum; {CHANGED}"),
        (rot, "wrong checksum; copy or convert the model again"),
    ],
)
def test_a_file_that_changes_under_a_model_is_named_and_never_computed_with(
    tmp_path: Path, harm: Harm, told: str
) -> None:
    """Put back, the same engine answers as before."""
    folder = packed_checkpoint(tmp_path)
    true, engine = load_engine(folder).generate(PROMPT, **OPTIONS).tokens, load_engine(folder, "3")
    path = max(folder.glob("*.safetensors"), key=lambda file: file.stat().st_size)
    good = path.read_bytes()
    harm(path)
    for _ in range(2):
        with pytest.raises(CoterieError, match=f"expert \\d+ of layer \\d.*{told}"):
            engine.generate(PROMPT, **OPTIONS)
    path.write_bytes(good)
    assert engine.generate(PROMPT, **OPTIONS).tokens == true


@needs_kernels
@pytest.mark.parametrize("number", [errno.EIO, errno.EACCES, errno.ESTALE, errno.EMFILE])
def test_a_read_that_fails_now_and_works_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    folder = packed_checkpoint(tmp_path)
    true, engine = load_engine(folder).generate(PROMPT, **OPTIONS).tokens, load_engine(folder, "3")
    left, open_ = [None] * 3, tiers._open_file

    def failing(path: Path, *, direct: bool) -> FileIO:
        if left:
            left.pop()
            raise OSError(number, os.strerror(number))
        return open_(path, direct=direct)

    monkeypatch.setattr(tiers, "_open_file", failing)
    with pytest.raises(CoterieError, match=os.strerror(number)):
        engine.generate(PROMPT, **OPTIONS)
    left.clear()
    assert engine.generate(PROMPT, **OPTIONS).tokens == true


@dataclass(frozen=True)
class Slow:
    """A tier that has half an expert there long before the rest."""

    tier: HostTier

    def fetch(self, layer: int, expert: int, into: Tensor):
        into.fill_(255)
        time.sleep(0.02)
        return self.tier.fetch(layer, expert, into)


@dataclass
class Interrupted:
    """A courier that Ctrl-C comes to while somebody waits, so many times one after the other."""

    courier: ThreadedFetcher
    times: int = 0
    waits: list[str] = field(default_factory=list)

    def __getattr__(self, name: str):
        return getattr(self.courier, name)

    def wait(self, coming: Collection[Future]) -> None:
        self._pressed("wait")
        self.courier.wait(coming)

    def drain(self, coming: Collection[Future]) -> None:
        self._pressed("drain")
        self.courier.drain(coming)

    def _pressed(self, wait: str) -> None:
        self.waits.append(wait)
        if self.times:
            self.times -= 1
            raise KeyboardInterrupt


@pytest.mark.parametrize("times", [1, 2])
def test_ctrl_c_while_experts_come_leaves_a_store_that_works(times: int) -> None:
    """Twice too: then reads are still on their way when the layer is asked again."""
    whole = expert_blobs(9)
    own = cached_store(HostTier(whole), 9, 4)
    own.fetcher = courier = Interrupted(ThreadedFetcher(Slow(HostTier(whole))))
    true = fp32_slab(whole[1], torch.arange(9))
    courier.times = times
    with pytest.raises(KeyboardInterrupt):
        list(own.serve(1, ExpertRequest(torch.arange(9) < 3)))
    assert courier.waits[:2] == ["wait", "drain"]
    for wanted in (torch.arange(9) >= 5, torch.ones(9, dtype=torch.bool)):
        seen = 0
        for slab in own.serve(1, ExpertRequest(wanted)):
            time.sleep(0.03)  # what was on its way lands
            here = torch.nonzero(slab.slot_of >= 0).flatten()
            assert torch.equal(slab.down[slab.slot_of[here]], true.down[here])  # type: ignore[index]
            seen += len(here)
        assert seen == int(wanted.sum())


def test_ctrl_c_between_the_book_and_the_reads_leaves_no_wrong_weights(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The book tells of experts that nobody has begun to bring."""
    whole, booked, pressed = expert_blobs(9), Slots.serve, [True]

    def interrupted(self: Slots, *asked: Any) -> list[Wave]:
        waves = booked(self, *asked)
        if pressed:
            pressed.clear()
            raise KeyboardInterrupt
        return waves

    monkeypatch.setattr(Slots, "serve", interrupted)
    own, used = cached_store(HostTier(whole), 9, 4), torch.arange(9) < 3
    with pytest.raises(KeyboardInterrupt):
        list(own.serve(1, ExpertRequest(used)))
    (slab,) = own.serve(1, ExpertRequest(used))
    true = fp32_slab(whole[1], torch.arange(9))
    assert torch.equal(slab.down[slab.slot_of[:3]], true.down[:3])  # type: ignore[index]


@dataclass(frozen=True)
class Late:
    """A tier that takes its time for the first expert."""

    tier: HostTier
    first: list[bool] = field(default_factory=lambda: [True])

    def fetch(self, layer: int, expert: int, into: Tensor) -> str:
        if self.first:
            self.first.clear()
            time.sleep(0.1)
        return self.tier.fetch(layer, expert, into)


@pytest.mark.parametrize("mixed", [False, True])
def test_ctrl_c_while_a_read_is_begun_leaves_it_no_slot_to_come_into(
    monkeypatch: pytest.MonkeyPatch, mixed: bool
) -> None:
    """Nobody knows of that read, so nobody can wait for it."""
    whole, begin, pressed = expert_blobs(9), ThreadedFetcher.fetch_async, [True]

    def bring(self: ThreadedFetcher, layer: int, expert: int, into: Tensor) -> Future[str]:
        begun = begin(self, layer, expert, into)
        if pressed:
            pressed.clear()
            raise KeyboardInterrupt
        return begun

    monkeypatch.setattr(ThreadedFetcher, "fetch_async", bring)

    own: CachedExpertStore | MixedPrecisionStore = cached_store(Late(HostTier(whole)), 9, 2)
    if mixed:
        own = MixedPrecisionStore(own, cached_store(HostTier(whole), 9, 2), vote_mass=1.0)
    everyone, true = torch.arange(9), fp32_slab(whole[1], torch.arange(9))
    with pytest.raises(KeyboardInterrupt):
        list(own.serve(1, ExpertRequest(everyone < 2)))
    list(own.serve(1, ExpertRequest((everyone > 4) & (everyone < 7))))
    time.sleep(0.15)
    (slab,) = own.serve(1, ExpertRequest((everyone > 4) & (everyone < 7)))
    assert torch.equal(slab.down[slab.slot_of[5:7]], true.down[5:7])  # type: ignore[index]


def test_votes_are_written_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, saved = tmp_path / "votes", SavedVotes.of("tiny", (1,), np.ones((1, 4)))

    def full(_descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(CoterieError, match=r"votes: cannot be written \(No space left"):
        write_votes(path, saved)
    assert list(tmp_path.iterdir()) == []
