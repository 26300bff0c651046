"""Every step of diffusers' pipeline and schedulers against our unmasking rules."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from peer_process import SEEDS, PeerProcess, fresh
from torch import Tensor

from coterie.decoding import DecodeRequest, SequenceState
from coterie.decoding.kv_schemes import parse_kv_scheme
from coterie.decoding.refinements import parse_unmask
from coterie.decoding.sampling import Proposal, Sampling, propose
from coterie.decoding.unmask import BlockState, RenoiseRule
from coterie.values import NO_MASK

pytestmark = pytest.mark.peers

VOCABULARY, MASK, EOS = 24, 23, 22
MIN_MARGIN = 1e-6  # probabilities may differ by less than this between two programs


def random_logits(*shape: int, seed: int, heat: float) -> Tensor:
    """Logits [.., V]; the mask is never the best: published loops could then repeat for ever."""
    logits = heat * torch.randn(*shape, VOCABULARY, generator=torch.Generator().manual_seed(seed))
    logits[..., MASK] = -100.0
    return logits


@st.composite
def pipeline_options(draw: st.DrawFn) -> dict[str, Any]:
    """With edits, steps are left when the last mask is written: without one, no edit follows."""
    block, edit = draw(st.sampled_from((1, 3, 4, 8))), draw(st.sampled_from((0.0, 0.4)))
    new = draw(st.integers(block + 1, 16))
    return {
        "gen_length": new,
        "block_length": block,
        "num_inference_steps": block + 1 if edit else draw(st.integers(1, block)),
        "threshold": draw(st.sampled_from((0.3, 0.7, 0.95))),
        "editing_threshold": edit,
        "max_post_steps": draw(st.integers(0, 2)),
        "eos_early_stop": draw(st.booleans()),
        "eos_token_id": EOS,
        "mask_token_id": MASK,
    }


@given(pipeline_options(), st.integers(1, 12), SEEDS, st.sampled_from((1.0, 3.0, 6.0)))
@fresh(60)
def test_every_forward_of_llada2_writes_the_tokens_of_diffusers(
    huggingface: PeerProcess, options: dict[str, Any], length: int, seed: int, heat: float
) -> None:
    """Whole answers; the model's logits are random numbers of the forward.

    Diffusers looks for an end-of-text only in forwards that write one: it may go on for longer.
    """
    width, stops = options["block_length"], options["eos_early_stop"]
    blocks = (length + options["gen_length"]) // width + 1
    logits = random_logits(blocks, width + 5, width, seed=seed, heat=heat)
    prompt = torch.randint(EOS, (length,), generator=torch.Generator().manual_seed(seed)).tolist()
    reply = huggingface.call(
        "llada2_pipeline", prompt=prompt, logits=logits.tolist(), options=options
    )
    assume(reply["margin"] > MIN_MARGIN)
    theirs = reply["blocks"] if options["editing_threshold"] else needed_forwards(reply["blocks"])
    sequence = SequenceState(request_of(prompt, options))
    ours = blocks_after_forwards(sequence, logits)
    assert ours == theirs[: len(ours)]
    assert stops or len(ours) == len(theirs)
    tokens = reply["tokens"]
    assert sequence.answer == (tokens[: tokens.index(EOS)] if stops and EOS in tokens else tokens)


def needed_forwards(blocks: list[list[list[int]]]) -> list[list[list[int]]]:
    """Without the forward that a full block has if steps are left: it writes nothing."""
    return [block[:-1] if block[-1:] == block[-2:-1] else block for block in blocks]


def request_of(prompt: list[int], options: Mapping[str, Any]) -> DecodeRequest:
    """Diffusers edits in one forward more than its ``max_post_steps``."""
    unmask = f"dynamic:p={options['threshold']},steps={options['num_inference_steps']}"
    if options["editing_threshold"]:
        unmask += f"+edit:p={options['editing_threshold']},post={options['max_post_steps'] + 1}"
    return DecodeRequest(
        tuple(prompt),
        max_new_tokens=options["gen_length"],
        block_length=options["block_length"],
        kv_scheme=parse_kv_scheme("block-causal"),
        unmask=parse_unmask(unmask),
        sampling=Sampling(),
        seed=0,
        early_stop="token" if options["eos_early_stop"] else "off",
        eos_ids=(EOS,),
        mask_id=MASK,
    )


def blocks_after_forwards(sequence: SequenceState, logits: Tensor) -> list[list[list[int]]]:
    """Each generated block after each of its denoising forwards, with logits [block, n, w, V]."""
    forwards: dict[int, list[list[int]]] = defaultdict(list)
    while (forward := sequence.next_pass) is not None:
        if not forward.is_denoising:
            sequence.receive(None)
            continue
        block = sequence.block
        number = block.start // block.width
        sequence.receive(logits[number, len(forwards[number])])
        forwards[number].append(sequence.canvas.tokens[block.start : block.stop].tolist())
    return list(forwards.values())


@given(SEEDS, st.integers(1, 20), st.floats(0.5, 8), st.data())
@fresh(60)
def test_a_step_keeps_the_tokens_of_the_entropy_bound(
    huggingface: PeerProcess, seed: int, width: int, heat: float, data: st.DataObject
) -> None:
    bound, steps = data.draw(st.floats(0, 9)), data.draw(st.integers(1, 9))
    step = data.draw(st.integers(0, steps - 1))
    logits = random_logits(width, seed=seed, heat=heat)
    kept = huggingface.call(
        "entropy_bound", logits=logits.tolist(), step=step, steps=steps, bound=bound
    )
    rule = RenoiseRule(bound=bound, steps=steps)
    proposal = proposal_of(logits / rule.temperature(step))
    everywhere = torch.ones(width, dtype=torch.bool)
    state = BlockState(proposal, proposal.ids, everywhere, ~everywhere, NO_MASK, step, width)
    assert rule.choose(state).tolist() == kept


@given(
    SEEDS,
    st.lists(st.tuples(st.booleans(), st.sampled_from((1.0, 9.0, 99.0))), min_size=1, max_size=6),
    st.integers(0, 3),
    st.sampled_from((0.005, 0.2, 2.0)),
)
@fresh(60)
def test_a_canvas_is_final_in_the_step_of_transformers(
    huggingface: PeerProcess,
    seed: int,
    steps: list[tuple[bool, float]],
    stable: int,
    certain: float,
) -> None:
    """Each step has the most probable tokens of one of two canvases, more or less certain."""
    canvases = random_logits(2, 5, seed=seed, heat=1.0)
    logits = torch.stack([canvases[int(second)] * heat for second, heat in steps])
    expected = huggingface.call(
        "stable_and_confident", logits=logits.tolist(), stability=stable, confidence=certain
    )
    rule = RenoiseRule(steps=len(steps) + 1, stable=stable, certain=certain)
    proposals = [proposal_of(step) for step in logits]
    best = [proposal.ids for proposal in proposals]
    final = [
        rule.is_final(step, best[: step + 1], proposal.entropy)
        for step, proposal in enumerate(proposals)
    ]
    assert final == expected


def proposal_of(logits: Tensor) -> Proposal:
    return propose(logits, Sampling(), NO_MASK, torch.Generator(), entropy=True)
