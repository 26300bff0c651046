"""Laws of decoding, with random logits instead of a model."""

from __future__ import annotations

import itertools
from dataclasses import replace

import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.decoding import DecodeRequest, Sampling, SequenceState, parse_kv_scheme, parse_unmask
from coterie.decoding.canvas import split_into_blocks
from coterie.decoding.kv_schemes import KV_SCHEMES, ForwardPass, StepCounter
from coterie.decoding.sampling import propose
from coterie.decoding.unmask import RULES, BlockState
from coterie.values import LogitsSummary

VOCAB_SIZE, MASK, EOS = 11, 10, 9

kv_schemes = st.sampled_from(
    [
        "uncached",
        "uncached:aligned=yes",
        "prefix",
        "prefix:aligned=yes+unroll:most=3,tokens=2",
        "dual",
        "dual:before=3,after=2,aligned=yes",
        "dual:before=2,after=2,warmup=3+unroll:most=2,tokens=3",
        "block-causal",
        "block-causal-uncached",
    ]
)
rules = st.sampled_from(
    [
        "threshold:p=0.3",
        "threshold:p=1,slack=0",
        "dynamic:p=0.2,steps=3",
        "dynamic:p=0.9,least=2",
        "fixed:steps=3",
        "static:steps=2",
        "sequential:steps=3",
        "entropy:bound=1.5",
        "hierarchy:p=0.5,low=0.2",
    ]
)
refinements = st.sampled_from(["", "+edit:p=0.3,post=3", "+credit", "+smooth"])


@st.composite
def requests(draw: st.DrawFn) -> DecodeRequest:
    tokens = st.integers(0, VOCAB_SIZE - 2)
    return DecodeRequest(
        prompt_ids=tuple(draw(st.lists(tokens, min_size=1, max_size=9))),
        max_new_tokens=draw(st.integers(1, 14)),
        block_length=draw(st.integers(1, 6)),
        kv_scheme=parse_kv_scheme(draw(kv_schemes)),
        unmask=parse_unmask(draw(rules) + draw(refinements)),
        sampling=Sampling(draw(st.sampled_from([0.0, 1.0]))),
        seed=draw(st.integers(0, 99)),
        early_stop=draw(st.sampled_from(["off", "block", "token"])),
        eos_ids=(EOS,),
        mask_id=MASK,
    )


def noise(sequence: SequenceState, seed: int) -> torch.Tensor:
    """Random logits that depend on the canvas, like those of a model."""
    number = hash((seed, tuple(sequence.canvas.tokens.tolist()), sequence.steps.total))
    draw = torch.Generator().manual_seed(number % (1 << 62))
    return 3 * torch.randn(sequence.block.width, VOCAB_SIZE, generator=draw)


def run(sequence: SequenceState, seed: int, max_forwards: int) -> int:
    """Forwards until the sequence is finished."""
    forwards = 0
    while sequence.next_pass is not None:
        sequence.receive(noise(sequence, seed) if sequence.next_pass.is_denoising else None)
        forwards += 1
        assert forwards <= max_forwards, "the sequence does not end"
    return forwards


@given(requests(), st.integers(0, 99))
def test_every_sequence_ends_with_an_unchanged_prompt(request: DecodeRequest, seed: int) -> None:
    sequence = SequenceState(request)
    edit = request.unmask.edit
    per_block = (
        request.block_length + 2 if edit is None else 8 * request.block_length + 2 * edit.post + 2
    )
    unrolled = 2 * (request.kv_scheme.unroll.most if request.kv_scheme.unroll else 1)
    run(sequence, seed, max_forwards=len(sequence.blocks) * (per_block + unrolled) + 3)
    assert sequence.canvas.tokens[: len(request.prompt_ids)].tolist() == list(request.prompt_ids)
    answer = sequence.canvas.tokens[len(request.prompt_ids) :][: request.max_new_tokens].tolist()
    if request.early_stop == "off" or EOS not in answer:
        assert MASK not in answer
    assert len(sequence.answer) <= request.max_new_tokens
    assert MASK not in sequence.answer


@given(requests(), st.integers(0, 99))
def test_every_denoising_forward_of_a_masked_block_writes_a_token(
    request: DecodeRequest, seed: int
) -> None:
    sequence = SequenceState(request)
    for _ in range(400):
        next_pass, block = sequence.next_pass, sequence.block
        if next_pass is None:
            return
        before = int(sequence.canvas.is_masked(block.start, block.stop).sum())
        update = sequence.receive(noise(sequence, seed) if next_pass.is_denoising else None)
        if next_pass.is_denoising and before:
            assert update.committed
        assert not (next_pass.is_denoising and not before and update.committed)


@given(requests(), st.integers(0, 99))
def test_updates_match_the_canvas(request: DecodeRequest, seed: int) -> None:
    sequence, written = SequenceState(request), {}
    while sequence.next_pass is not None:
        update = sequence.receive(
            noise(sequence, seed) if sequence.next_pass.is_denoising else None
        )
        written |= {t.position: t.id for t in (*update.committed, *update.edited)}
        assert all(0 <= t.confidence <= 1.0001 for t in (*update.committed, *update.provisional))
    answer = sequence.canvas.tokens[len(request.prompt_ids) :].tolist()
    assert {i: token for i, token in enumerate(answer) if token != MASK} == {
        i: token for i, token in written.items() if token != MASK
    }


@given(requests(), st.integers(0, 99))
def test_needed_logits_decide_like_those_of_the_whole_block(
    request: DecodeRequest, seed: int
) -> None:
    whole, part = SequenceState(request), SequenceState(request)
    while whole.next_pass is not None:
        if not whole.next_pass.is_denoising:
            assert whole.receive(None) == part.receive(None)
            continue
        block, logits = part.block, noise(whole, seed)
        indices = part.logits_positions(torch.arange(block.start, block.stop)) - block.start
        total = logits[indices].logsumexp(dim=-1)
        rest = logits[indices].index_fill(1, torch.tensor([MASK]), -torch.inf)
        summary = LogitsSummary.from_logits(
            logits[indices], logits[indices].argmax(dim=-1), rest.argmax(dim=-1), total
        )
        assert whole.receive(logits) == part.receive(logits[indices], summary, indices)
        assert torch.equal(whole.canvas.tokens, part.canvas.tokens)
    assert part.next_pass is None


@given(requests())
def test_passes_cover_the_block_and_stay_on_the_canvas(request: DecodeRequest) -> None:
    sequence = SequenceState(request)
    while (next_pass := sequence.next_pass) is not None:
        assert 0 <= next_pass.start < next_pass.stop <= next_pass.visible <= sequence.canvas.length
        assert next_pass.use_cache or (next_pass.start, next_pass.stop) == (0, next_pass.visible)
        assert next_pass.start <= next_pass.voters[0] < next_pass.voters[1] <= next_pass.stop
        if next_pass.is_denoising:
            assert next_pass.start <= sequence.block.start < sequence.block.stop <= next_pass.stop
        sequence.receive(noise(sequence, 0) if next_pass.is_denoising else None)


@given(requests(), st.integers(0, 99))
def test_the_same_seed_gives_the_same_tokens(request: DecodeRequest, seed: int) -> None:
    first, second = SequenceState(request), SequenceState(request)
    run(first, seed, 2000)
    run(second, seed, 2000)
    assert first.canvas.tokens.tolist() == second.canvas.tokens.tolist()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.booleans(), st.booleans())
def test_blocks_tile_the_new_tokens(
    prompt: int, new: int, width: int, aligned: bool, whole: bool
) -> None:
    blocks = split_into_blocks(prompt, new, width, aligned=aligned, whole_blocks=whole)
    assert blocks[0].start <= prompt < blocks[0].stop
    assert all(a.stop == b.start for a, b in itertools.pairwise(blocks))
    assert blocks[-1].start < prompt + new <= blocks[-1].stop
    assert whole or blocks[-1].stop == prompt + new
    if aligned:
        assert all(block.start % width == 0 for block in blocks)
    else:
        assert blocks[0].start == prompt
    assert all(block.width == width for block in blocks[:-1])


@given(rules, st.integers(1, 12), st.integers(0, 99), st.integers(0, 8), st.data())
def test_a_rule_chooses_masked_positions_only(
    text: str, width: int, seed: int, step: int, data: st.DataObject
) -> None:
    masked = torch.tensor(data.draw(st.lists(st.booleans(), min_size=width, max_size=width)))
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(width, VOCAB_SIZE, generator=draw)
    proposal = propose(logits, Sampling(), MASK, draw, entropy=True)
    state = BlockState(
        proposal,
        tokens=torch.where(masked, MASK, 1),
        masked=masked,
        generated=~masked,
        mask_id=MASK,
        step=step,
        initial_masked=int(masked.sum()),
    )
    selected = parse_unmask(text).rule.choose(state)
    assert selected.dtype == torch.bool
    assert not bool((selected & ~masked).any()) or not bool(masked.any())
    candidates = masked & (proposal.ids != MASK)
    if bool(candidates.any()):
        assert bool((selected & masked).any())


@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 6))
def test_greedy_is_top_k_of_one(seed: int, width: int, heat: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(width, VOCAB_SIZE, generator=draw)
    greedy = propose(logits, Sampling(), MASK, draw)
    warm = propose(logits, Sampling(temperature=heat / 3, top_k=1), MASK, draw)
    assert greedy.ids.tolist() == warm.ids.tolist()


@given(st.integers(0, 99), st.sampled_from([0.05, 0.4, 0.9]), st.integers(1, VOCAB_SIZE))
def test_sampled_ids_are_within_top_k_and_top_p(seed: int, top_p: float, top_k: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, VOCAB_SIZE, generator=draw)
    drawn = propose(logits, Sampling(1.0, top_k, top_p), MASK, draw).ids.tolist()
    for line, token in zip(torch.softmax(logits, -1), drawn, strict=True):
        order = line.sort(descending=True).indices.tolist()[:top_k]
        retained = line[order] / line[order].sum()
        mass_before = float(retained[: order.index(token)].sum())
        assert token in order
        assert mass_before < top_p + 1e-6


@given(st.sampled_from(sorted(KV_SCHEMES)), st.integers(0, 30), st.booleans())
def test_a_formatted_plan_parses_to_the_same_plan(name: str, number: int, aligned: bool) -> None:
    text = name
    if name in ("uncached", "prefix") and aligned:
        text += ":aligned=yes"
    if name == "dual":
        text += f":before={number},after={number + 1},aligned={'yes' if aligned else 'no'}"
    kv_scheme = parse_kv_scheme(f"{text}+unroll:most={number + 1},tokens=8" if number % 2 else text)
    assert parse_kv_scheme(str(kv_scheme)) == kv_scheme


@given(st.sampled_from(sorted(RULES)), st.floats(0.001, 1.0), refinements)
def test_a_formatted_strategy_parses_to_the_same_strategy(name: str, p: float, extra: str) -> None:
    option = {"threshold": "p", "dynamic": "p", "hierarchy": "p", "entropy": "bound"}.get(name)
    extra = "" if name == "renoise" else extra  # it takes no additions
    unmask = parse_unmask((f"{name}:{option}={p!r}" if option else name) + extra)
    assert parse_unmask(str(unmask)) == unmask


@given(kv_schemes, st.integers(0, 40), st.integers(1, 30))
def test_there_is_a_forward_until_each_check(text: str, masked: int, new: int) -> None:
    kv_scheme = parse_kv_scheme(text)
    blocks = kv_scheme.blocks(5, new, 4)
    for block in blocks:
        forwards = kv_scheme.steps_until_check(
            block, blocks[-1].stop, StepCounter(block.index * 3, 0), masked
        )
        assert forwards >= 1
        assert kv_scheme.unroll is not None or forwards == 1


# Tokens that were computed often enough leave the passes of their block, and only those.

limits = st.sampled_from([1, 2, 4])


@st.composite
def skipping(draw: st.DrawFn) -> DecodeRequest:
    fits = requests().filter(lambda each: each.kv_scheme.caches_blocks and not each.unmask.edits)
    return replace(draw(fits), skip_settled=draw(limits))


def passes(sequence: SequenceState, seed: int) -> list[tuple[int, ForwardPass]]:
    """The passes of a sequence, each with the index of its block."""
    seen = []
    while (window := sequence.next_pass) is not None:
        seen.append((sequence.block.index, window))
        if not window.is_denoising:
            sequence.receive(None)
            continue
        block = sequence.block
        positions = window.positions[block.contains(window.positions)]
        indices = sequence.logits_positions(positions) - block.start
        sequence.receive(noise(sequence, seed)[indices], None, indices)
    return seen


@given(skipping(), st.integers(0, 99))
def test_skipped_tokens_were_computed_often_enough(request: DecodeRequest, seed: int) -> None:
    sequence, computed = SequenceState(request), torch.zeros(400, dtype=torch.int64)
    block = None
    while (window := sequence.next_pass) is not None:
        if sequence.block is not block:
            block, computed = sequence.block, torch.zeros_like(computed)
        tokens, cached = sequence.canvas.tokens, window.kind == "decode" and window.use_cache
        assert request.skip_settled is not None
        settled = (computed >= request.skip_settled).nonzero()[:, 0].tolist()
        if cached and bool((tokens[block.start : block.stop] == MASK).any()):
            assert list(window.skipped) == settled
        else:
            assert window.skipped == ()
        assert window.width == len(window.positions) > 0
        assert not bool((tokens[list(window.skipped)] == MASK).any())
        held = window.positions[block.contains(window.positions)]
        if window.is_denoising:
            computed[held[tokens[held] != MASK]] += 1
            indices = held - block.start
            sequence.receive(noise(sequence, seed)[indices], None, indices)
        else:
            sequence.receive(None)


@given(skipping(), st.integers(0, 99))
def test_passes_of_a_block_never_grow(request: DecodeRequest, seed: int) -> None:
    request = replace(request, kv_scheme=replace(request.kv_scheme, unroll=None))
    widths: dict[int, list[int]] = {}
    for block, window in passes(SequenceState(request), seed):
        if window.kind == "decode" and window.use_cache:
            widths.setdefault(block, []).append(window.width)
    for each in widths.values():
        assert each == sorted(each, reverse=True)


@given(skipping(), st.integers(0, 99))
def test_a_limit_above_all_steps_skips_nothing(request: DecodeRequest, seed: int) -> None:
    plain = SequenceState(replace(request, skip_settled=None))
    late = SequenceState(replace(request, skip_settled=1000))
    assert passes(plain, seed) == passes(late, seed)
    assert torch.equal(plain.canvas.tokens, late.canvas.tokens)
