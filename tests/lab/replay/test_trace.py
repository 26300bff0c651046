"""Traces: small, exact where they say so, near where they say so."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from tempfile import mkdtemp

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from test_observation import PROMPTS, engine

from coterie.engine.observation import LayerObservation, collect_observations
from coterie.errors import CoterieError
from coterie.lab.replay.policies import fidelity, forward_votes, select_from_trace
from coterie.lab.replay.recorder import bias_of, record_trace, trace_header
from coterie.lab.replay.replay import decoding_only
from coterie.lab.replay.trace import (
    KINDS,
    RouterBlocks,
    Trace,
    TraceForward,
    TraceHeader,
    encode_forward,
    frame_record,
    ids_size,
    pack_ids,
    unpack_ids,
)
from coterie.lab.replay.trace_file import TraceWriter, read_trace
from coterie.routing import parse_policy
from coterie.testing import FAMILY_CONFIGS
from coterie.values import expert_mask

FAMILIES = tuple(FAMILY_CONFIGS)
EXACT = (
    *("vanilla", "topk:k=2", "des-seq:k=1", "des-seq:k=2", "des-seq:k=2,voters=masked"),
    *("uniform-vote:beta=0.4", "uniform-vote:beta=0.3,voters=before-eos,protect=top1"),
    *("random:beta=0.4", "random:beta=0.3,seed=7,protect=top1", "des-seq:k=1,scope=batch"),
    *("coreset:tau=0.6,vote=count", "uniform-vote:beta=0.2/0.6,resident_bonus=1", "coreset:k=2"),
    "coreset:m=5,vote=random,scope=batch",
)
NEARLY = ("des-vote:beta=0.4", "mass-vote:tau=0.7", "naee:beta=0.6", "priced-vote:price=0.1")
MORE = (
    *("resident-vote:beta=0.4", "des-vote:beta=0.4,vote=weight", "proportional-vote:beta=0.4"),
    "des-vote:beta=0.4,vote=margin,scope=batch",
)
REFUSED = {
    "xshare:beta=0.3": "vote=full",
    "racing:m=4": "vote=max",
    "coreset:m=3,vote=full": "vote=full",
    "des-vote:beta=0.3,voters=uncertain": "uncertainty",
    "des-seq:k=1,voters=uncertain": "uncertainty",
    "mc-moe:beta=0.6": "importance",
}


@cache
def made(
    family: str = "llada2", policy: str = "vanilla"
) -> tuple[Trace, tuple[LayerObservation, ...]]:
    """A trace through a file, and the same run watched."""
    own = engine(family, unmask=f"{'renoise' if family == 'diffusion-gemma' else 'fixed'}:steps=4")
    path = Path(mkdtemp()) / "made.trace"
    said = trace_header(own, policy=policy, generation=own.generation, prompts={}, provenance={})
    with TraceWriter(path, said, bias_of(own.model)) as writer:
        record_trace(own, PROMPTS, writer, policy=policy, batch_size=3)
    return decoding_only(read_trace(path)), tuple(
        collect_observations(own, PROMPTS, policy=policy, batch_size=3)
    )


@st.composite
def drawn_forwards(draw: st.DrawFn) -> tuple[TraceForward, TraceHeader]:
    """Any numbers at all, in any sizes."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    layers, tokens = draw(st.integers(1, 3)), draw(st.integers(1, 40))
    k = draw(st.integers(1, 8))
    experts = draw(st.integers(k + 1, 300))
    ids = np.argsort(rng.random((layers, tokens, experts)), axis=-1)[..., :k].astype(np.int16)
    rank = -np.sort(-(rng.random((layers, tokens, k)) ** 4), axis=-1).astype(np.float32)
    following = (rank[..., -1] * rng.random((layers, tokens))).astype(np.float32)
    marks = (rng.random((3, tokens)) < draw(st.sampled_from((0, 0.5, 1)))).astype(bool)
    numbers = [int(n) for n in rng.integers(0, 2**31, size=5)]
    used = np.zeros((layers, experts), dtype=bool)
    voters, masked, filled = marks
    made = TraceForward(
        *(numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]),
        *(voters, masked, filled, ids, rank, following, used),
    )
    made = replace(
        made, used=made.vanilla_mask if draw(st.booleans()) else rng.random(used.shape) < 0.3
    )
    made = replace(made, kind=draw(st.sampled_from(KINDS)))
    if size := draw(st.sampled_from((0, 1, 7, 32))):
        offset = draw(st.integers(0, size - 1))
        blocks = RouterBlocks.count(size, offset, tokens)
        admitted = rng.random((blocks, layers, experts)) < 0.3
        made = replace(made, router_blocks=RouterBlocks(size, offset, admitted))
    if draw(st.integers(0, 4)) == 0:
        none = {name: getattr(made, name)[:, :0] for name in ("vanilla_ids", "rank", "next_score")}
        made = replace(
            made,
            router_blocks=None,
            **none,
            **dict.fromkeys(("voters", "masked", "filled"), marks[0][:0]),
        )
    sizes = {"bf16": 6}
    return made, TraceHeader("m", "p", "", "", tuple(range(layers)), experts, k, sizes)


@given(drawn_forwards())
@law(80)
def test_a_forward_comes_back_as_near_as_the_format_says(tmp_path_factory, drawn) -> None:
    forward, said = drawn
    path = tmp_path_factory.mktemp("trace") / "one"
    with TraceWriter(path, said) as writer:
        writer.write(forward)
    (found,) = read_trace(path).forwards
    for name in ("number", "row", "decode_index", "block_start", "window_start", "kind"):
        assert getattr(found, name) == getattr(forward, name)
    for name in ("voters", "masked", "filled", "vanilla_ids", "used"):
        assert np.array_equal(getattr(found, name), getattr(forward, name))
    blocks, back = forward.router_blocks, found.router_blocks
    assert (back and (back.size, back.offset)) == (blocks and (blocks.size, blocks.offset))
    assert np.array_equal(back and back.admitted, blocks and blocks.admitted)
    for layer in range(len(said.layers) if forward.tokens else 0):
        margins = forward.rank[layer] - forward.next_score[layer][:, None]
        kept = found.rank[layer] - found.next_score[layer][:, None]
        top, span = margins.max(), np.ptp(forward.next_score[layer])
        assert (
            np.abs(found.next_score[layer] - forward.next_score[layer]).max() <= span / 500 + 1e-6
        )
        assert np.abs(kept - margins).max() <= top / 16 + 1e-6
        near = np.maximum(np.sqrt(margins / top) / 16 + 1 / 1024, 1 / 256) if top > 0 else 0
        assert (np.abs(kept - margins) <= top * near + 1e-6).all()
        assert (np.diff(found.rank[layer], axis=-1) <= 0).all()


def test_the_largest_record_of_a_large_model_takes_eight_kib() -> None:
    """Numbers as disordered as can be, which no compression makes smaller."""
    rng = np.random.default_rng(1)
    ids = np.argsort(rng.random((19, 32, 256)), axis=-1)[..., :8].astype(np.int16)
    rank = -np.sort(-rng.random((19, 32, 8)), axis=-1).astype(np.float32)
    following = (rank[..., -1] * rng.random((19, 32))).astype(np.float32)
    voters, masked, filled = rng.random((3, 32)) < 0.5
    used = np.zeros((19, 256), bool)
    forward = TraceForward(
        *(1, 1, 1, 0, 0, voters, masked, filled, ids, rank, following, used),
    )
    vanilla = replace(forward, used=forward.vanilla_mask)
    assert len(encode_forward(vanilla, 256)) + 9 == 8177
    assert len(frame_record(encode_forward(vanilla, 256))) <= 8177 <= 8 * 1024
    assert len(encode_forward(forward, 256)) - len(encode_forward(vanilla, 256)) == 608
    admitting = replace(vanilla, router_blocks=RouterBlocks(32, 0, used[None]))
    assert len(encode_forward(admitting, 256)) - len(encode_forward(vanilla, 256)) == 616


@given(st.integers(1, 400), st.integers(0, 90), st.integers(0, 2**32))
@law(80)
def test_packed_numbers_are_those_that_were_packed(experts: int, count: int, seed: int) -> None:
    ids = np.random.default_rng(seed).integers(0, experts, size=count).astype(np.int16)
    packed = pack_ids(ids, experts)
    assert len(packed) == ids_size(count, experts)
    assert np.array_equal(unpack_ids(packed, count, experts), ids)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trace_holds_what_was_watched(family: str) -> None:
    policies = ("vanilla", "des-vote:beta=0.3,voters=masked")
    for policy in policies if family == FAMILIES[0] else policies[:1]:
        trace, seen = made(family, policy)
        layers = trace.header.layers
        numbers = sorted({forward.number for forward in trace.forwards})
        assert len(seen) == len(layers) * len(numbers)
        for forward in trace.forwards:
            ours = seen[numbers.index(forward.number) * len(layers) :][: len(layers)]
            place = ours[0].rows.index(forward.row)
            assert [one.layer for one in ours] == list(layers)
            assert forward.decode_index == ours[0].scores.forward_indices[place]
            voters = ours[0].scores.voters  # None: everybody votes
            everybody = torch.ones(forward.tokens, dtype=torch.bool)
            voices = everybody if voters is None else voters[place].bool()
            assert np.array_equal(forward.voters, voices.numpy())
            for ordinal, one in enumerate(ours):
                rows, _, experts = one.scores.logits.shape
                used = expert_mask(one.routing.topk_ids.view(rows, -1), experts)[place]
                assert np.array_equal(forward.used[ordinal], used.numpy())
                assert np.array_equal(
                    forward.vanilla_ids[ordinal], one.scores.vanilla_ids[place].numpy()
                )
                true = one.scores.selection_scores.gather(-1, one.scores.vanilla_ids)[place].numpy()
                span = np.ptp(true) + np.ptp(forward.next_score[ordinal])
                assert np.abs(forward.rank[ordinal] - true).max() <= span / 8


@pytest.mark.parametrize("family", ["llada2", "llada2.2"])
@pytest.mark.parametrize("policy", EXACT)
def test_exact_policies_elect_whom_they_would_have(policy: str, family: str) -> None:
    """As many as the eligible ones are, whom nobody takes among them."""
    assert fidelity(parse_policy(policy)) == "exact"
    trace, seen = made(family)
    layers = len(trace.header.layers)
    for at, one in enumerate(seen):
        places = shared(trace, at // layers)
        mask = parse_policy(policy).eligible(one.scores, one.scores.router.k)
        found = select_from_trace(trace, parse_policy(policy), places, at % layers)
        assert np.array_equal(found, expected(one, mask)), (policy, at)


def shared(trace: Trace, place: int) -> list[TraceForward]:
    """The rows of the forward at this place among those that decode."""
    numbers = sorted({forward.number for forward in trace.forwards})
    return [forward for forward in trace.forwards if forward.number == numbers[place]]


def expected(one: LayerObservation, mask: torch.Tensor) -> np.ndarray:
    """A coreset whole; of a policy that lets every token decide, what its tokens take."""
    rows, _, experts = one.scores.logits.shape
    if mask.shape[1] == 1 and mask.numel() > 1:
        return mask[:, 0].expand(rows, experts).numpy()
    own = one.scores.vanilla_ids
    allowed = mask.expand(one.scores.logits.shape).gather(-1, own)
    return expert_mask(own.where(allowed, -1).flatten(1), experts).numpy()


@pytest.mark.parametrize(
    "policy", [*NEARLY, *(pytest.param(policy, marks=pytest.mark.slow) for policy in MORE)]
)
def test_others_elect_nearly_whom_they_would_have(policy: str) -> None:
    assert fidelity(parse_policy(policy)) == "nearly"
    alike = []
    for family in FAMILIES if policy == NEARLY[0] else FAMILIES[:1]:
        trace, seen = made(family)
        layers = len(trace.header.layers)
        for at, one in enumerate(seen):
            places = shared(trace, at // layers)
            mask = parse_policy(policy).eligible(one.scores, one.scores.router.k)
            found, true = (
                select_from_trace(trace, parse_policy(policy), places, at % layers),
                expected(one, mask),
            )
            alike.append((found & true).sum() / (found | true).sum())
    # Sixteen experts with random gates are as near to ties as can be.
    assert np.mean(alike) > 0.9


def test_votes_are_nearly_the_routers_probabilities() -> None:
    for family in FAMILIES:
        trace, seen = made(family)
        for forward in trace.forwards:
            numbers = sorted({one.number for one in trace.forwards})
            ours = seen[numbers.index(forward.number) * len(trace.header.layers) :]
            for votes, one in zip(forward_votes(trace, forward), ours, strict=False):
                place, own = one.rows.index(forward.row), one.scores.vanilla_ids
                voices = torch.from_numpy(forward.voters)
                p = one.scores.probability.gather(-1, own)[place][voices].flatten()
                true = torch.zeros(len(votes)).index_add(0, own[place][voices].flatten(), p)
                assert np.abs(votes - true.numpy()).max() < 0.12 * float(true.max())


@pytest.mark.parametrize("policy", REFUSED)
def test_what_a_trace_lacks_is_an_error(policy: str) -> None:
    with pytest.raises(CoterieError, match=REFUSED[policy]):
        fidelity(parse_policy(policy))


def test_watching_for_a_trace_changes_no_token(tmp_path: Path) -> None:
    own = engine()
    said = trace_header(own, policy="vanilla", generation=own.generation, prompts={}, provenance={})
    path = tmp_path / "x"
    with TraceWriter(path, said) as writer:
        traced = record_trace(own, PROMPTS, writer, batch_size=2)
    assert [r.tokens for r in traced] == [own.generate(p).tokens for p in PROMPTS]
    decoded = sum(result.experts.forwards for result in traced)
    kinds = [forward.kind for forward in read_trace(path).forwards]
    assert (kinds.count("decode"), len(kinds)) == (decoded, writer.records)
    assert kinds.count("prefill") == sum(result.prefills for result in traced)
    assert kinds.count("commit") == sum(result.commits for result in traced) > 0
