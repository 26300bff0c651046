"""Frames are small, hold the votes within their rounding, and replay to the answer."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import coterie
from coterie.decoding import Token
from coterie.engine.engine import Engine
from coterie.engine.events import Denoised, Finished, Result
from coterie.model.weights import expert_bytes
from coterie.offload.traffic import Traffic, Transfer
from coterie.server.frames import ELECTED, HIGH, RESIDENT, encode_votes, model_summary, step_frame
from coterie.server.votes import StepVotes

LAYERS, EXPERTS, K, BLOCK = 19, 256, 8, 32
MAX_BYTES = 8192
KINDS = ("top-k", "all", "equal", "none")


def step_votes(kind: str, seed: int, layers: int = LAYERS, experts: int = EXPERTS) -> StepVotes:
    """Votes of a block for random experts; of kind ``all``, each token votes for every expert."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(layers, BLOCK, experts, generator=generator)
    if kind == "top-k":
        p = p * (p >= p.topk(min(K, experts)).values[..., -1:])
    votes = {"equal": torch.ones(layers, experts), "none": torch.zeros(layers, experts)}

    def coin() -> torch.Tensor:
        return torch.rand(layers, experts, generator=generator) < 0.5

    return StepVotes(
        tuple(range(layers)), votes.get(kind, p.sum(1)).double(), coin(), coin(), coin()
    )


def decoded(code: str, votes: StepVotes) -> torch.Tensor:
    content = zlib.decompress(base64.b64decode(code))
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).view(votes.votes.shape)


def levels_of(frame: dict[str, Any], votes: StepVotes) -> torch.Tensor:
    return decoded(frame["votes"], votes).long()


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31), experts=st.sampled_from((7, 64)))
def test_votes_in_a_frame_are_those_of_the_election_within_half_a_level(
    kind: str, seed: int, experts: int
) -> None:
    votes = step_votes(kind, seed, layers=3, experts=experts)
    frame: dict[str, Any] = encode_votes(votes)
    unit = torch.tensor(frame["largest"]).unsqueeze(1) / frame["levels"]
    error = (levels_of(frame, votes) * unit - votes.votes).abs()
    assert (error <= 0.5 * unit + 1e-5).all()


@given(kind=st.sampled_from(KINDS), seed=st.integers(0, 2**31))
def test_an_expert_with_more_votes_never_has_the_lower_level(kind: str, seed: int) -> None:
    votes = step_votes(kind, seed)
    levels = levels_of(encode_votes(votes), votes)
    in_order = levels.gather(1, votes.votes.argsort(dim=1))
    assert (in_order.diff(dim=1) >= 0).all()


@given(seed=st.integers(0, 2**31), budget=st.integers(1, EXPERTS))
def test_an_election_of_a_frames_votes_loses_less_than_its_rounding(seed: int, budget: int) -> None:
    votes = step_votes("top-k", seed)
    frame: dict[str, Any] = encode_votes(votes)
    chosen = levels_of(frame, votes).topk(budget).indices
    best = votes.votes.topk(budget).values.sum(1)
    unit = torch.tensor(frame["largest"]).double() / frame["levels"]
    assert (best - votes.votes.gather(1, chosen).sum(1) <= budget * (unit + 1e-5)).all()


@given(seed=st.integers(0, 2**31), has_high=st.booleans(), offloads=st.booleans())
def test_the_state_of_each_expert_is_exact(seed: int, has_high: bool, offloads: bool) -> None:
    votes = step_votes("top-k", seed, layers=2, experts=16)
    resident = votes.resident if offloads else None
    high = votes.high if has_high else None
    frame: dict[str, Any] = encode_votes(
        StepVotes(votes.layers, votes.votes, votes.elected, resident, high)
    )
    state = decoded(frame["state"], votes)
    assert torch.equal((state & ELECTED) > 0, votes.elected)
    assert torch.equal((state & RESIDENT) > 0, torch.ones(2, 16) > 0 if not offloads else resident)
    assert torch.equal((state & HIGH) > 0, torch.zeros(2, 16) > 0 if not has_high else high)
    assert frame["precisions"] == 1 + has_high


@pytest.mark.parametrize("kind", KINDS)
def test_a_frame_of_a_large_model_is_small(kind: str) -> None:
    tokens = tuple(Token(1000 + each, 156_000 + each, 0.123456) for each in range(BLOCK))
    event = Denoised(
        0, 999, "decode", 31, 1000, 1032, " word" * BLOCK, tokens[:16], (), (), tokens[16:],
        (EXPERTS,) * LAYERS, (EXPERTS,) * LAYERS, 0.123456789,
    )  # fmt: skip
    traffic = Traffic(1, 4 << 20, 4000, 2000, {"disk": Transfer(2000, 8 << 30)})
    for seed in range(3):
        frame = step_frame(
            event,
            lambda token: " longer",
            step_votes(kind, seed),
            expert_bytes=4 << 20,
            traffic=traffic,
            seconds=123.456789,
        )
        assert len(json.dumps(frame, ensure_ascii=False).encode()) <= MAX_BYTES


@pytest.mark.usefixtures("embedded_once")
@pytest.mark.parametrize(
    "unmask", ["threshold:p=0.9", "fixed:steps=8", "threshold:p=0.3+edit:p=0.5,post=8"]
)
def test_frames_replay_to_the_answer(unmask: str) -> None:
    engine = coterie.load(unmask=unmask)
    frames, result = answer(engine, "Tom has 3 boxes of 4 pens. How many pens?")
    assert "".join(frame["text"] for frame in frames) == result.text
    canvas: dict[int, int] = {}
    for frame in frames:
        for position in frame["remasked"]:
            canvas.pop(position, None)
        canvas |= {position: token for position, token, *_ in frame["committed"] + frame["edited"]}
    assert tuple(canvas[position] for position in range(len(result.tokens))) == result.tokens


@pytest.mark.usefixtures("embedded_once")
def test_bytes_are_those_of_the_result() -> None:
    engine = coterie.load(policy="des-vote:beta=0.3")
    frames, result = answer(engine, "What is 3 + 4?")
    layers = len(engine.model.spec.moe_layers)
    for key, mean in (
        ("expert_bytes", result.expert_bytes),
        ("expert_bytes_vanilla", result.expert_bytes_vanilla),
    ):
        total = sum(frame[key] for frame in frames)
        assert total == pytest.approx(mean * layers * result.experts.forwards)


@pytest.mark.usefixtures("embedded_once")
def test_the_summary_says_what_a_page_needs() -> None:
    model = coterie.load().model
    summary: dict[str, Any] = json.loads(json.dumps(model_summary(model)))
    assert (len(summary["layers"]), summary["experts"], summary["k"]) == (4, 128, 8)
    assert summary["eos_ids"] == list(model.eos_ids)
    assert not summary["offloaded"]


def answer(engine: Engine, prompt: str) -> tuple[list[dict[str, Any]], Result]:
    """The frames of one answer, as they arrive through JSON, and its result."""
    size = expert_bytes(engine.model.spec, engine.model.transformer.dtype)
    decode, frames = engine.model.tokenizer.decode_token, []
    for event in engine.stream(prompt):
        if isinstance(event, Finished):
            return frames, event.result
        frames.append(json.loads(json.dumps(step_frame(event, decode, expert_bytes=size))))
    raise AssertionError("the stream has no end")
