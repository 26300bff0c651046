"""Bounds of the nats of passages under several policies, on the same corruptions.

A block-causal model predicts each block, given the clean blocks before it. One pass writes the keys
of all clean blocks. Blocks are then corrupted from the last to the first: a forward replaces only
keys that no earlier block attends to. Policies share keys that vanilla routing writes.

A model with full attention gets a passage at once. A model of uniform noise gets no
self-conditioning, so the bound is that of its noise process, not of its sampler.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import groupby
from typing import Annotated

import torch

from coterie.decoding.canvas import Block
from coterie.decoding.kv_schemes import DualCache, NoCache, PrefixCache, parse_kv_scheme
from coterie.engine.active_sequence import VANILLA
from coterie.engine.batch import to_device
from coterie.engine.engine import Engine
from coterie.engine.observation import check_whole_blocks
from coterie.errors import NonFiniteLogitsError, TaskError
from coterie.keys import Key
from coterie.lab.likelihood.corruption import Corruption, MaskedTokens, NoisyTokens
from coterie.model.cache import KVCache
from coterie.model.forward_context import ForwardContext
from coterie.routing import parse_policy
from coterie.telemetry import ExpertCounter, ExpertCounts
from coterie.values import NO_MASK, DecodeProgress, Policy, Window


@dataclass(frozen=True)
class Passage:
    """Tokens to score, after the first ``given`` ones, which are context."""

    id: str
    ids: tuple[int, ...]
    given: int = 0
    bytes: int = 0  # of the scored tokens, as text


@dataclass(frozen=True)
class PassageScore:
    """The bound of a passage's nats, one value a sample, and the experts of its forwards."""

    nats: Annotated[tuple[float, ...], Key("nats")]
    experts: Annotated[float, Key("experts")]  # mean unique experts of a layer
    forwards: Annotated[int, Key("forwards")]
    vote_mass_kept: Annotated[float, Key("vote_mass_kept")]

    @property
    def mean_nats(self) -> float:
        return sum(self.nats) / len(self.nats)


@dataclass(frozen=True)
class _CorruptedBlock:
    """One block of one passage, with a corruption for each sample."""

    row: int
    block: Block
    corruptions: tuple[Corruption, ...]
    given: int  # its first positions, which are context


@dataclass(frozen=True)
class LikelihoodEstimator:
    """Scores passages with ``samples`` corruptions of each block.

    Corruptions follow from ``seed`` and a passage's id, so they are the same for every policy. The
    engine's options choose the blocks and how finished ones are routed. A token that a model uses
    to edit (LLaDA2.2) counts like any other that the text does not have.
    """

    engine: Engine
    samples: int = 1
    seed: int = 0

    @torch.inference_mode()
    def score(
        self, passages: Sequence[Passage], policies: Sequence[str]
    ) -> list[list[PassageScore]]:
        """The scores of each policy, in the order of the passages, which share forwards.

        Raises NonFiniteLogitsError, TaskError for a passage that cannot be scored, and ConfigError
        for an engine that skips settled tokens. With a cache of experts each policy starts with the
        cache's first state.
        """
        check_whole_blocks(self.engine.generation)
        if self.engine.model.store.traffic_log is not None:
            if len(policies) > 1:
                return [self.score(passages, [policy])[0] for policy in policies]
            self.engine.reset_cache()
        for passage in passages:
            self._check(passage)
        blocks = [block for row, each in enumerate(passages) for block in self._blocks(row, each)]
        parsed = [parse_policy(policy) for policy in policies]
        caches = self._clean_keys(passages, blocks, parsed)
        counters = [ExpertCounter() for _ in policies]
        nats = [[[0.0] * self.samples for _ in passages] for _ in policies]
        for group in _shared_forwards(blocks):
            for policy, cache, counter, sums in zip(parsed, caches, counters, nats, strict=True):
                for sample in range(self.samples):
                    values = self._forward(group, sample, policy, cache, counter)
                    for each, value in zip(group, values, strict=True):
                        sums[each.row][sample] += value
        return [
            [_passage_score(values, counter.counts(row)) for row, values in enumerate(sums)]
            for sums, counter in zip(nats, counters, strict=True)
        ]

    @property
    def _has_full_attention(self) -> bool:
        scheme = parse_kv_scheme(self.engine.generation.kv_cache).base
        return isinstance(scheme, NoCache | PrefixCache | DualCache)

    def _check(self, passage: Passage) -> None:
        model = self.engine.model
        if not 0 <= passage.given < len(passage.ids):
            raise TaskError(f"{passage.id}: no tokens to score")
        if special := {*passage.ids[passage.given :]} & {*model.special_ids}:
            raise TaskError(f"{passage.id}: token {min(special)} is none of a text")
        if self._spans(passage)[-1].stop > model.spec.max_length:
            most = model.spec.max_length
            raise TaskError(f"{passage.id}: {len(passage.ids)} tokens; the model has {most}")

    def _spans(self, passage: Passage) -> tuple[Block, ...]:
        """The blocks that hold scored tokens, or the whole passage."""
        if self._has_full_attention:
            return (Block(0, 0, len(passage.ids)),)
        generation, count = self.engine.generation, len(passage.ids) - passage.given
        return parse_kv_scheme(generation.kv_cache).blocks(passage.given, count, generation.block)

    def _blocks(self, row: int, passage: Passage) -> list[_CorruptedBlock]:
        digest = hashlib.sha256(f"{self.seed}/{passage.id}".encode()).digest()
        generator = torch.Generator().manual_seed(int.from_bytes(digest[:7]))
        model, blocks = self.engine.model, []
        draw, source = MaskedTokens.draw, model.mask_id
        if model.mask_id == NO_MASK:
            draw, source = NoisyTokens.draw, model.spec.vocabulary
        for block in self._spans(passage):
            # Positions after the text stay masked, as in decoding.
            tokens = torch.full((block.width,), model.mask_id)
            inside = torch.tensor(passage.ids[block.start : block.stop])
            tokens[: len(inside)] = inside
            given = max(0, passage.given - block.start)
            scored = torch.arange(given, len(inside))
            drawn = [draw(tokens, scored, source, generator) for _ in range(self.samples)]
            blocks.append(_CorruptedBlock(row, block, tuple(drawn), given))
        return blocks

    def _clean_keys(
        self,
        passages: Sequence[Passage],
        blocks: Sequence[_CorruptedBlock],
        policies: Sequence[Policy],
    ) -> list[KVCache | None]:
        """The cache of each policy, with the keys of the clean tokens before each last block.

        None with full attention, which needs no keys.
        """
        if self._has_full_attention:
            return [None] * len(policies)
        generation = self.engine.generation
        ends = [0] * len(passages)
        for each in blocks:
            ends[each.row] = max(ends[each.row], each.block.start)
        length = max(each.block.stop for each in blocks)
        if generation.commit_routing == "vanilla":
            return [self._write_keys(passages, ends, length, VANILLA, max(ends))] * len(policies)
        # A policy elects for one block at a time.
        return [
            self._write_keys(passages, ends, length, policy, generation.block)
            for policy in policies
        ]

    def _write_keys(
        self,
        passages: Sequence[Passage],
        ends: Sequence[int],
        length: int,
        policy: Policy,
        step: int,
    ) -> KVCache:
        """The keys before ``ends`` of each row, written in passes of ``step`` positions."""
        transformer, generation = self.engine.model.transformer, self.engine.generation
        device, width = transformer.device, max(ends)
        cache = KVCache.allocate(
            transformer.spec, len(ends), length, dtype=transformer.dtype, device=device
        )
        causal_block = parse_kv_scheme(generation.kv_cache).causal_block(generation.block)
        # A short row is padded; its blocks replace these keys before any token attends to them.
        tokens = torch.zeros(len(ends), width, dtype=torch.int64)
        for row, (passage, end) in enumerate(zip(passages, ends, strict=True)):
            tokens[row, :end] = torch.tensor(passage.ids[:end])
        for start in range(0, width, max(1, step)):
            stop = min(start + step, width)
            rows = [row for row, end in enumerate(ends) if end > start]
            starts = torch.full((len(rows),), start)
            context = ForwardContext(
                Window(starts, stop - start, torch.full_like(starts, stop), causal_block),
                cache.select_rows(rows),
                policy,
                logits_indices=torch.arange(0),
                encodes=causal_block == 1,
            )
            with self._logged_forward("prefill", rows):
                transformer(tokens[rows, start:stop].to(device), to_device(context, device))
        return cache

    def _forward(
        self,
        group: Sequence[_CorruptedBlock],
        sample: int,
        policy: Policy,
        cache: KVCache | None,
        counter: ExpertCounter,
    ) -> list[float]:
        """One sample of the nats of each block; the blocks share a forward."""
        transformer, rows = self.engine.model.transformer, [each.row for each in group]
        corrupted = [each.corruptions[sample] for each in group]
        width, device = group[0].block.width, transformer.device
        starts = torch.tensor([each.block.start for each in group])
        undecided = torch.stack([each.undecided for each in corrupted])
        voters = None
        if cache is None:
            voters = torch.stack([torch.arange(width) >= each.given for each in group]).float()
        context = ForwardContext(
            Window(starts, width, starts + width),
            None if cache is None else cache.select_rows(rows),
            policy,
            counter,
            logits_indices=torch.cat([c.positions + i * width for i, c in enumerate(corrupted)]),
            voters=voters,
            progress=DecodeProgress(undecided, torch.zeros_like(undecided), undecided.float()),
            forward=tuple(each.block.index * self.samples + sample for each in group),
        )
        counter.on_forward(tuple(rows))
        with self._logged_forward("decode", rows):
            tokens = torch.stack([each.tokens for each in corrupted])
            logits = transformer(tokens.to(device), to_device(context, device))
        parts = logits.split([len(each.positions) for each in corrupted])
        values = [each.nats(part) for each, part in zip(corrupted, parts, strict=True)]
        if not all(map(math.isfinite, values)):
            raise NonFiniteLogitsError("logits are not finite", tuple(rows))
        return values

    @contextmanager
    def _logged_forward(self, kind: str, rows: Sequence[int]) -> Iterator[None]:
        """Marks a forward in the store's traffic log, if there is one."""
        if (log := self.engine.model.store.traffic_log) is None:
            yield
            return
        log.begin_forward(kind, tuple(rows), (0,) * len(rows))
        try:
            yield
        finally:
            log.end_forward()


def _shared_forwards(blocks: Sequence[_CorruptedBlock]) -> list[list[_CorruptedBlock]]:
    """Blocks of one width, one of each passage at most; the last blocks come first."""

    def key(each: _CorruptedBlock) -> tuple[int, int]:
        return -each.block.index, each.block.width

    return [list(group) for _, group in groupby(sorted(blocks, key=key), key)]


def _passage_score(nats: Sequence[float], counts: ExpertCounts) -> PassageScore:
    return PassageScore(tuple(nats), counts.mean, counts.forwards, counts.vote_mass_kept)
