"""Laws of decoding, with random numbers in a model's place."""

from __future__ import annotations

import itertools

import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.decoding import DecodeRequest, Sampling, SequenceState, parse_plan, parse_unmask
from coterie.decoding.canvas import split_into_blocks
from coterie.decoding.kv_schemes import PLANS, StepCounter
from coterie.decoding.sampling import propose
from coterie.decoding.unmask import RULES, BlockState
from coterie.values import LogitsSummary

VOCABULARY, MASK, END = 11, 10, 9

plans = st.sampled_from(
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
around = st.sampled_from(["", "+edit:p=0.3,post=3", "+credit", "+smooth"])


@st.composite
def asks(draw: st.DrawFn) -> DecodeRequest:
    tokens = st.integers(0, VOCABULARY - 2)
    return DecodeRequest(
        prompt_ids=tuple(draw(st.lists(tokens, min_size=1, max_size=9))),
        max_new_tokens=draw(st.integers(1, 14)),
        block_length=draw(st.integers(1, 6)),
        plan=parse_plan(draw(plans)),
        unmask=parse_unmask(draw(rules) + draw(around)),
        sampling=Sampling(draw(st.sampled_from([0.0, 1.0]))),
        seed=draw(st.integers(0, 99)),
        early_stop=draw(st.sampled_from(["off", "block", "token"])),
        eos_ids=(END,),
        mask_id=MASK,
    )


def noise(row: SequenceState, seed: int) -> torch.Tensor:
    """Logits that follow from the canvas, as a model's would; the mask is as likely as any."""
    number = hash((seed, tuple(row.canvas.tokens.tolist()), row.steps.total))
    draw = torch.Generator().manual_seed(number % (1 << 62))
    return 3 * torch.randn(row.block.width, VOCABULARY, generator=draw)


def run(row: SequenceState, seed: int, most: int) -> int:
    """Forwards until the row is finished."""
    forwards = 0
    while row.next_pass is not None:
        row.receive(noise(row, seed) if row.next_pass.is_denoising else None)
        forwards += 1
        assert forwards <= most, "the row does not end"
    return forwards


@given(asks(), st.integers(0, 99))
def test_every_row_ends_with_its_prompt_untouched(ask: DecodeRequest, seed: int) -> None:
    row = SequenceState(ask)
    edit = ask.unmask.edit
    per_block = ask.block_length + 2 if edit is None else 8 * ask.block_length + 2 * edit.post + 2
    unrolled = 2 * (ask.plan.unroll.most if ask.plan.unroll else 1)
    run(row, seed, most=len(row.blocks) * (per_block + unrolled) + 3)
    assert row.canvas.tokens[: len(ask.prompt_ids)].tolist() == list(ask.prompt_ids)
    answer = row.canvas.tokens[len(ask.prompt_ids) :][: ask.max_new_tokens].tolist()
    if ask.early_stop == "off" or END not in answer:
        assert MASK not in answer
    assert len(row.answer) <= ask.max_new_tokens
    assert MASK not in row.answer


@given(asks(), st.integers(0, 99))
def test_every_forward_at_masks_fills_one_at_least(ask: DecodeRequest, seed: int) -> None:
    row = SequenceState(ask)
    for _ in range(400):
        look, block = row.next_pass, row.block
        if look is None:
            return
        before = int(row.canvas.is_masked(block.start, block.stop).sum())
        change = row.receive(noise(row, seed) if look.is_denoising else None)
        if look.is_denoising and before:
            assert change.committed
        assert not (look.is_denoising and not before and change.committed)


@given(asks(), st.integers(0, 99))
def test_changes_tell_what_the_canvas_holds(ask: DecodeRequest, seed: int) -> None:
    row, told = SequenceState(ask), {}
    while row.next_pass is not None:
        change = row.receive(noise(row, seed) if row.next_pass.is_denoising else None)
        told |= {t.position: t.id for t in (*change.committed, *change.edited)}
        assert all(0 <= t.confidence <= 1.0001 for t in (*change.committed, *change.provisional))
    answer = row.canvas.tokens[len(ask.prompt_ids) :].tolist()
    assert {i: token for i, token in enumerate(answer) if token != MASK} == {
        i: token for i, token in told.items() if token != MASK
    }


@given(asks(), st.integers(0, 99))
def test_wanted_logits_decide_what_all_of_the_block_do(ask: DecodeRequest, seed: int) -> None:
    whole, part = SequenceState(ask), SequenceState(ask)
    while whole.next_pass is not None:
        if not whole.next_pass.is_denoising:
            assert whole.receive(None) == part.receive(None)
            continue
        logits, at = noise(whole, seed), part.logits_indices()
        total = logits[at].logsumexp(dim=-1)
        rest = logits[at].index_fill(1, torch.tensor([MASK]), -torch.inf)
        survey = LogitsSummary.from_logits(
            logits[at], logits[at].argmax(dim=-1), rest.argmax(dim=-1), total
        )
        assert whole.receive(logits) == part.receive(logits[at], survey, at)
        assert torch.equal(whole.canvas.tokens, part.canvas.tokens)
    assert part.next_pass is None


@given(asks())
def test_looks_cover_the_block_and_stay_on_the_canvas(ask: DecodeRequest) -> None:
    row = SequenceState(ask)
    while (look := row.next_pass) is not None:
        assert 0 <= look.start < look.stop <= look.visible <= row.canvas.length
        assert look.use_cache or (look.start, look.stop) == (0, look.visible)
        assert look.start <= look.voters[0] < look.voters[1] <= look.stop
        if look.is_denoising:
            assert look.start <= row.block.start < row.block.stop <= look.stop
        row.receive(noise(row, 0) if look.is_denoising else None)


@given(asks(), st.integers(0, 99))
def test_the_same_seed_draws_the_same_row(ask: DecodeRequest, seed: int) -> None:
    first, second = SequenceState(ask), SequenceState(ask)
    run(first, seed, 2000)
    run(second, seed, 2000)
    assert first.canvas.tokens.tolist() == second.canvas.tokens.tolist()


@given(st.integers(1, 40), st.integers(1, 40), st.integers(1, 9), st.booleans(), st.booleans())
def test_blocks_tile_what_is_new(
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
    logits = torch.randn(width, VOCABULARY, generator=draw)
    proposal = propose(logits, Sampling(), MASK, draw, entropy=True)
    moment = BlockState(
        proposal,
        tokens=torch.where(masked, MASK, 1),
        masked=masked,
        generated=~masked,
        mask_id=MASK,
        step=step,
        initial_masked=int(masked.sum()),
    )
    chosen = parse_unmask(text).rule.choose(moment)
    assert chosen.dtype == torch.bool
    assert not bool((chosen & ~masked).any()) or not bool(masked.any())
    able = masked & (proposal.ids != MASK)
    if bool(able.any()):
        assert bool((chosen & masked).any())


@given(st.integers(0, 99), st.integers(1, 6), st.integers(1, 6))
def test_greedy_is_top_k_of_one(seed: int, width: int, heat: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(width, VOCABULARY, generator=draw)
    greedy = propose(logits, Sampling(), MASK, draw)
    warm = propose(logits, Sampling(temperature=heat / 3, top_k=1), MASK, draw)
    assert greedy.ids.tolist() == warm.ids.tolist()


@given(st.integers(0, 99), st.sampled_from([0.05, 0.4, 0.9]), st.integers(1, VOCABULARY))
def test_draws_come_from_what_top_k_and_top_p_keep(seed: int, top_p: float, top_k: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    logits = torch.randn(8, VOCABULARY, generator=draw)
    drawn = propose(logits, Sampling(1.0, top_k, top_p), MASK, draw).ids.tolist()
    for line, token in zip(torch.softmax(logits, -1), drawn, strict=True):
        order = line.sort(descending=True).indices.tolist()[:top_k]
        kept = line[order] / line[order].sum()
        sure = float(kept[: order.index(token)].sum())  # what stands before it
        assert token in order
        assert sure < top_p + 1e-6


@given(st.sampled_from(sorted(PLANS)), st.integers(0, 30), st.booleans())
def test_a_plan_reads_back_from_its_spelling(name: str, number: int, aligned: bool) -> None:
    text = name
    if name in ("uncached", "prefix") and aligned:
        text += ":aligned=yes"
    if name == "dual":
        text += f":before={number},after={number + 1},aligned={'yes' if aligned else 'no'}"
    plan = parse_plan(f"{text}+unroll:most={number + 1},tokens=8" if number % 2 else text)
    assert parse_plan(str(plan)) == plan


@given(st.sampled_from(sorted(RULES)), st.floats(0.001, 1.0), around)
def test_an_unmasking_reads_back_from_its_spelling(name: str, p: float, extra: str) -> None:
    option = {"threshold": "p", "dynamic": "p", "hierarchy": "p", "entropy": "bound"}.get(name)
    unmask = parse_unmask((f"{name}:{option}={p!r}" if option else name) + extra)
    assert parse_unmask(str(unmask)) == unmask


@given(plans, st.integers(0, 40), st.integers(1, 30))
def test_patience_makes_one_forward_at_least(text: str, masked: int, new: int) -> None:
    plan = parse_plan(text)
    blocks = plan.blocks(5, new, 4)
    for block in blocks:
        forwards = plan.steps_until_check(
            block, blocks[-1].stop, StepCounter(block.index * 3, 0), masked
        )
        assert forwards >= 1
        assert plan.unroll is not None or forwards == 1
