"""A block keeps its coresets from step to step until they have lost their votes, and no longer."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offload_cases import load_engine, needs_kernels, packed_checkpoint
from policy_strategies import coresets, law
from score_strategies import blocks
from test_observation import PROMPTS, engine, tiny_model, untimed
from torch import Tensor

from coterie import ops
from coterie.cli.entry import run as command
from coterie.cli.eval import make_variants
from coterie.engine.engine import Engine
from coterie.engine.events import Result
from coterie.engine.generation_config import GenerationConfig
from coterie.engine.observation import LayerObservation, observe_forwards
from coterie.errors import CoterieError
from coterie.lab.replay.cache_simulation import ReplayPolicy, TraceVotes, select_experts
from coterie.lab.replay.recorder import bias_of, forward_record, trace_header
from coterie.lab.replay.trace import Trace, TraceForward
from coterie.routing import parse_policy, route
from coterie.routing.router import coreset_of, route_by_mask, vanilla_ids, vanilla_votes
from coterie.values import CoresetReuse, Policy, PreviousCoresets, Scores

STEPS: dict[str, object] = {"unmask": "fixed:steps=3", "max_new_tokens": 20}


def drawn(scores: Scores, drift: float, seed: int) -> Scores:
    """With incumbents; about a third of the rows has none."""
    rows, _, experts = scores.logits.shape
    generator = torch.Generator().manual_seed(seed)
    there = torch.rand(rows, experts, generator=generator) < 0.4
    some = torch.rand(rows, 1, generator=generator) < 0.7
    return replace(
        scores,
        vanilla_ids=vanilla_ids(scores),
        previous_coresets=PreviousCoresets(drift, there & some),
    )


def before(scores: Scores) -> Tensor:
    assert scores.previous_coresets is not None
    return scores.previous_coresets.coresets


def settled(scores: Scores, policy: Policy) -> CoresetReuse:
    found = route_by_mask(scores, policy).coreset_reuse
    assert found is not None
    return found


WITHOUT_TIES = ("xshare:beta=0.3", "des-seq:k=1", "mass-vote:tau=0.6,least=1,resident_bonus=1")
drifts = st.sampled_from((0.0, 0.05, 0.5, 0.9)) | st.floats(0, 0.999)
seeds = st.integers(0, 2**32 - 1)


@given(blocks(), coresets(), drifts, seeds)
@law(60)
def test_coreset_is_reused_within_the_tolerance(
    scores: Scores, policy: Policy, drift: float, seed: int
) -> None:
    scores = drawn(scores, drift, seed)
    fresh = coreset_of(scores, policy.eligible(scores, scores.router.k))
    found, votes = settled(scores, policy), vanilla_votes(scores)
    for row, had in enumerate(before(scores)):
        held, best = (int((votes[row] * mask).sum()) for mask in (had, fresh[row]))
        stays = bool(had.any()) and held >= (1 - drift) * best
        assert bool(found.reused[row]) == stays
        assert torch.equal(found.coresets[row], had if stays else fresh[row])
        lost = max(0.0, 1 - held / best) if stays and best else 0.0
        assert float(found.vote_loss[row]) == pytest.approx(lost)


@given(blocks(), coresets(), drifts, seeds)
@law(40)
def test_no_token_uses_experts_outside_the_reused_coreset(
    scores: Scores, policy: Policy, drift: float, seed: int
) -> None:
    scores = drawn(scores, drift, seed)
    for routing in (route(scores, policy), route_by_mask(scores, policy)):
        assert routing.coreset_reuse is not None
        ids = routing.topk_ids.view(*scores.logits.shape[:2], -1)
        allowed = routing.coreset_reuse.coresets
        for row, mask in zip(ids, allowed, strict=True):
            assert bool(mask[row[row >= 0]].all())
            few = min(scores.router.k, int(mask.sum()))
            assert ((row >= 0).sum(-1) == few).all()


@given(blocks(ties=False, groups=False), st.sampled_from(WITHOUT_TIES), drifts, seeds)
@law(30)
def test_permuting_experts_permutes_reused_coresets(
    scores: Scores, name: str, drift: float, seed: int
) -> None:
    scores, policy = drawn(scores, drift, seed), parse_policy(name)
    assert scores.previous_coresets is not None
    names = torch.randperm(scores.router.experts, generator=torch.Generator().manual_seed(seed))
    renamed = replace(
        scores,
        logits=scores.logits[..., names],
        bias=None if scores.bias is None else scores.bias[names],
        resident=None if scores.resident is None else scores.resident[names],
        vanilla_ids=None,
        previous_coresets=replace(scores.previous_coresets, coresets=before(scores)[:, names]),
    )
    one, other = settled(scores, policy), settled(renamed, policy)
    assert torch.equal(one.reused, other.reused)
    assert torch.equal(one.coresets[:, names], other.coresets)


@given(blocks(), drifts, seeds)
@law(30)
def test_batched_reuse_equals_reuse_alone(scores: Scores, drift: float, seed: int) -> None:
    scores, policy = drawn(scores, drift, seed), parse_policy("des-vote:beta=0.3,voters=masked")
    whole = settled(scores, policy)
    for row in range(len(scores.logits)):
        here = slice(row, row + 1)
        assert scores.progress is not None
        assert scores.progress.masked is not None
        alone = replace(
            scores,
            logits=scores.logits[here],
            voters=None if scores.voters is None else scores.voters[here],
            progress=replace(scores.progress, masked=scores.progress.masked[here]),
            vanilla_ids=vanilla_ids(scores)[here],
            previous_coresets=PreviousCoresets(drift, before(scores)[here]),
        )
        found = route(alone, policy).coreset_reuse
        assert found is not None
        assert torch.equal(found.coresets[0], whole.coresets[row])
        assert bool(found.reused[0]) == bool(whole.reused[row])


def test_empty_vote_adds_no_experts() -> None:
    """Probabilities may all be nothing; a row without a coreset elects one all the same."""
    logits = torch.full((2, 3, 8), -200.0)
    router = replace(tiny_model("llada2").spec.router, experts=8, k=2, groups=1, topk_groups=1)
    had = torch.zeros(2, 8, dtype=torch.bool)
    had[1, 3:5] = True
    scores = Scores(logits, router, previous_coresets=PreviousCoresets(0.5, had))
    for routing in (
        route(scores, policy := parse_policy("des-vote:beta=0.5")),
        route_by_mask(scores, policy),
    ):
        assert routing.coreset_reuse is not None
        assert routing.coreset_reuse.coresets.sum(-1).tolist() == [4, 2]
        assert routing.coreset_reuse.vote_loss.tolist() == [0.0, 0.0]


def test_non_finite_scores_raise() -> None:
    scores = Scores(
        torch.full((1, 2, 16), math.nan),
        replace(tiny_model("llada2").spec.router, experts=16),
        previous_coresets=PreviousCoresets(0.5, torch.ones(1, 16, dtype=torch.bool)),
    )
    with pytest.raises(CoterieError, match="router logits are NaN"):
        route(scores, parse_policy("des-vote:beta=0.5"))


def test_policy_without_coreset_cannot_reuse() -> None:
    scores = Scores(
        torch.zeros(1, 2, 16),
        replace(tiny_model("llada2").spec.router, experts=16),
        previous_coresets=PreviousCoresets(0.5, torch.ones(1, 16, dtype=torch.bool)),
    )
    with pytest.raises(CoterieError, match=r"layer 0.*elects none"):
        route(scores, parse_policy("topk:k=1"))


# Whole runs


@dataclass  # not frozen: it gathers a run
class Seen:
    """Every forward of a run as a trace would have it, but for the bits that a file spares; and of
    each the coresets [L, E], where it decoded."""

    layers: int
    forwards: list[TraceForward] = field(default_factory=list)
    used: list[np.ndarray | None] = field(default_factory=list)
    waiting: list[LayerObservation] = field(default_factory=list)
    number: int = 0

    def see(self, watched: LayerObservation) -> None:
        self.waiting.append(watched)
        if len(self.waiting) < self.layers:
            return
        for place in range(len(watched.rows)):
            self.forwards.append(forward_record(self.waiting, place, self.number))
            kept = [one.routing.coreset_reuse for one in self.waiting]
            found = [one.coresets[place].numpy() for one in kept if one is not None]
            self.used.append(np.stack(found) if found else None)
        self.waiting.clear()
        self.number += 1


def run(policy: str, rows: int, **options: object) -> tuple[Seen, Trace, list[Result]]:
    own_engine = engine("llada2", **STEPS)
    seen = Seen(len(own_engine.model.spec.moe_layers))
    results = observe_forwards(
        own_engine,
        PROMPTS[:3],
        seen.see,
        policy=policy,
        batch_size=rows,
        record_all=True,
        **options,
    )
    generation = own_engine.generation.replace(**options)
    said = trace_header(own_engine, policy=policy, generation=generation, prompts={}, provenance={})
    return seen, Trace(said, bias_of(own_engine.model), tuple(seen.forwards)), results


@pytest.mark.parametrize(
    ("policy", "drift"),
    [
        *(("des-vote:beta=0.3", drift) for drift in (0.0, 0.1, 0.3)),
        *(("uniform-vote:beta=0.3", 0.1), ("des-seq:k=1", 0.3), ("des-seq:k=8", 0.1)),
    ],
)
def test_decoding_reuses_like_its_replay(policy: str, drift: float) -> None:
    """Two rows at a time, several blocks of several steps each, commits by vanilla."""
    seen, trace, results = run(policy, rows=2, drift=drift)
    chosen = select_experts(TraceVotes.of(trace), ReplayPolicy(parse_policy(policy), drift))
    assert len({(one.row, one.block_start) for one in trace.forwards}) > 6
    decoding = [one.kind == "decode" for one in trace.forwards]
    assert decoding == [used is not None for used in seen.used]
    for foretold, used in zip(chosen.used, seen.used, strict=True):
        assert used is None or np.array_equal(foretold, used)
    layers, steps = len(trace.header.layers), 0
    for row, result in enumerate(results):
        mine = [one for one in trace.forwards if (one.row, one.kind) == (row, "decode")]
        could = layers * (len(mine) - len({one.block_start for one in mine}))
        steps += result.coreset_reuse_rate * could if result.coreset_reuse_rate is not None else 0.0
    assert steps == pytest.approx(chosen.reused)


def test_commits_elect_anew() -> None:
    seen, trace, _ = run("uniform-vote:beta=0.3", rows=2, drift=0.3, commit="policy")
    play = ReplayPolicy(parse_policy("uniform-vote:beta=0.3"), 0.3, routes_commits=True)
    chosen = select_experts(TraceVotes.of(trace), play)
    assert {one.kind for one in trace.forwards} >= {"decode", "commit"}
    for foretold, used in zip(chosen.used, seen.used, strict=True):
        assert used is None or np.array_equal(foretold, used)


def test_wide_tolerance_keeps_the_first_coreset_of_a_block() -> None:
    seen, trace, _ = run("des-vote:beta=0.3", rows=2, drift=1 - 1e-9)
    firsts: dict[tuple[int, int], np.ndarray] = {}
    for one, used in zip(trace.forwards, seen.used, strict=True):
        if used is not None:
            assert np.array_equal(firsts.setdefault((one.row, one.block_start), used), used)
    blocks_of_a_row = [used for (row, _), used in firsts.items() if row == 0]
    assert any(not np.array_equal(blocks_of_a_row[0], other) for other in blocks_of_a_row[1:])


def test_batched_decoding_and_kernels_reuse_equally(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    policy, options = "des-vote:beta=0.3,protect=top1", {**STEPS, "drift": 0.2}
    alone = [engine("llada2", **options).generate(p, policy=policy) for p in PROMPTS]
    together = observe_forwards(
        engine("llada2", **options), PROMPTS, lambda _: None, policy=policy, batch_size=3
    )
    assert [r.tokens for r in together] == [r.tokens for r in alone]
    assert [r.coreset_reuse_rate for r in together] == [r.coreset_reuse_rate for r in alone]
    assert [r.reuse_vote_loss for r in together] == pytest.approx(
        [r.reuse_vote_loss for r in alone], rel=1e-5
    )
    monkeypatch.setattr(ops, "route", lambda scores, rule, voice: None)
    plain = [engine("llada2", **options).generate(p, policy=policy) for p in PROMPTS]
    assert untimed(plain) == untimed(alone)


def test_reuse_is_reported_and_changes_experts() -> None:
    own_engine = engine("llada2", **STEPS)
    usual = own_engine.generate(PROMPTS[0], policy="des-vote:beta=0.3")
    assert (usual.coreset_reuse_rate, usual.reuse_vote_loss) == (None, None)
    bounds = (0.0, 0.1, 0.99)
    kept = [own_engine.generate(PROMPTS[0], policy="des-vote:beta=0.3", drift=d) for d in bounds]
    shares = [one.coreset_reuse_rate for one in kept]
    assert shares[2] == 1.0
    assert shares[0] is not None
    assert shares[1] is not None
    assert shares[0] <= shares[1] <= 1.0
    for one, bound in zip(kept, bounds, strict=True):
        assert one.reuse_vote_loss is not None
        assert 0 <= one.reuse_vote_loss <= bound


def test_other_tolerances_do_not_share_a_forward() -> None:
    own_engine = engine("llada2", **STEPS)
    numbers = [
        own_engine.submit(PROMPTS[0], policy="des-vote:beta=0.3", drift=drift)
        for drift in (None, 0.1, 0.2)
    ]
    found: dict[int, Result] = {}
    while own_engine.rows:
        for event in own_engine.step():
            if hasattr(event, "result"):
                found[event.row] = event.result
    for number, drift in zip(numbers, (None, 0.1, 0.2), strict=True):
        alone = engine("llada2", **STEPS).generate(
            PROMPTS[0], policy="des-vote:beta=0.3", drift=drift
        )
        assert found[number].tokens == alone.tokens
        assert found[number].coreset_reuse_rate == alone.coreset_reuse_rate


@pytest.mark.parametrize("policy", ["vanilla", "topk:k=2", "naee:beta=0.5", "mc-moe:beta=0.5"])
def test_vanilla_reuses_no_coreset(policy: str) -> None:
    with pytest.raises(CoterieError, match=f"{policy}.* elects none"):
        engine(**STEPS).generate(PROMPTS[0], policy=policy, drift=0.1)


def test_batch_coresets_cannot_be_reused() -> None:
    with pytest.raises(CoterieError, match="use scope=block"):
        engine(**STEPS).generate(PROMPTS[0], policy="des-seq:k=2,scope=batch", drift=0.1)


@pytest.mark.parametrize("drift", [-0.1, 1, 1.5, math.nan])
def test_tolerance_is_below_one(drift: float) -> None:
    with pytest.raises(CoterieError, match="`reuse_tolerance` must be at least 0 and below 1"):
        GenerationConfig(reuse_tolerance=drift)


def test_failed_forward_keeps_previous_coresets() -> None:
    own_engine = Engine(
        tiny_model("llada2"),
        policy="des-vote:beta=0.3",
        generation=engine(**STEPS, drift=0.5).generation,
    )
    number = own_engine.submit(PROMPTS[0])
    while own_engine.sequence(number).steps.in_block < 2:
        own_engine.step()
    slot = own_engine._active[number]
    had, head = slot.coresets, own_engine.model.transformer.head
    broken = head.clone()
    broken[3] = math.nan
    own_engine.model = replace(
        own_engine.model, transformer=replace(own_engine.model.transformer, head=broken)
    )
    with pytest.raises(CoterieError, match="NaN"):
        own_engine.step()
    assert had is not None
    assert slot.coresets is had


@needs_kernels
def test_offloading_does_not_change_reuse(tmp_path: Path) -> None:
    folder, policy = packed_checkpoint(tmp_path), "des-vote:beta=0.3,protect=top1"
    found = []
    for memory in (None, "35%"):
        own_engine = load_engine(folder, memory, **STEPS, drift=0.1)
        results = [own_engine.generate(p, policy=policy) for p in PROMPTS]
        found.append([(r.tokens, r.coreset_reuse_rate) for r in results])
    assert found[0] == found[1]


# Commands


def test_variants_differ_by_tolerance() -> None:
    vanilla, arm = make_variants(["des-vote:beta=0.3"], 0.05)
    assert (vanilla.name, arm.name) == ("vanilla", "des-vote:beta=0.3 drift=0.05")
    assert [one.name for one in make_variants(["des-vote:beta=0.3"])] == [
        "vanilla",
        "des-vote:beta=0.3",
    ]


def test_compare_reports_reuse(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["compare", "Solve 3x + 4 = 19 for x.", "-p", "des-vote:beta=0.3", "-n", "16"]
    words += ["--unmask", "fixed:steps=4", "--coreset-reuse", "0.1"]
    assert command([*words, "--json"]) == 0
    vanilla, elected = json.loads(capsys.readouterr().out)["runs"]
    assert (vanilla["coresets_kept"], vanilla["drift"]) == (None, None)
    assert 0 < elected["coresets_kept"] <= 1
    assert 0 <= elected["drift"] <= 0.1
    assert command(words) == 0
    assert "votes lost" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "why"),
    [
        (["generate", "x", "--coreset-reuse", "0.1"], "give a --policy that elects one"),
        (
            ["eval", "--coreset-reuse", "0.1", "--num-problems", "1"],
            "give a --policy that elects one",
        ),
        (["compare", "x", "-p", "topk:k=2", "--coreset-reuse", "0.1"], "topk:k=2 elects none"),
        (["bench", "generate", "-p", "vanilla", "--coreset-reuse", "0.1"], "that elects one"),
        (
            ["trace", "-o", "x.trace", "-p", "naee:beta=0.5", "--coreset-reuse", "0.1"],
            "elects none",
        ),
        (
            ["generate", "x", "-p", "des-vote:beta=0.3", "--coreset-reuse", "1"],
            "at least 0 and below 1",
        ),
        (["generate", "x", "-p", "des-seq:k=2,scope=batch", "--coreset-reuse", "0"], "scope=block"),
    ],
)
def test_tolerance_without_effect_raises(
    words: list[str], why: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert command(words) == 2
    assert why in capsys.readouterr().err
