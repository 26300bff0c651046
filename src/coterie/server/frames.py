"""Frames: one denoising step as JSON, small enough to stream to a page."""

from __future__ import annotations

import base64
import zlib
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from coterie.decoding import Token
from coterie.engine.events import Denoised
from coterie.loading.load import Model
from coterie.model.weights import expert_bytes
from coterie.offload.traffic import Traffic
from coterie.server.votes import StepVotes

VOTE_LEVELS = (255, 63, 15)  # of a layer's largest vote; the first with a code small enough
MAX_CODE = 6144  # characters of votes and states: a frame of 19 x 256 experts stays below 8 KB
ELECTED, RESIDENT, HIGH = 1, 2, 4  # bits of an expert's state

Json = dict[str, object]


def step_frame(
    event: Denoised,
    decode_token: Callable[[int], str],
    votes: StepVotes | None = None,
    *,
    expert_bytes: int = 0,
    traffic: Traffic | None = None,
    seconds: float = 0.0,
) -> Json:
    """One denoising forward of one request.

    ``expert_bytes`` is the size of one expert. ``traffic`` is that of this step, if experts are
    offloaded; it may serve other requests too. ``seconds`` count from the start of the request.
    """
    frame: Json = {
        "forward": event.forward,
        "kind": event.kind,
        "block": event.block,
        "start": event.start,
        "stop": event.stop,
        "text": event.text,
        "committed": _tokens(event.committed, decode_token),
        "edited": _tokens(event.edited, decode_token),
        "provisional": _tokens(event.provisional, decode_token),
        "remasked": list(event.remasked),
        "experts": list(event.experts),
        "vote_mass_kept": event.vote_mass_kept,
        "expert_bytes": sum(event.experts) * expert_bytes,
        "expert_bytes_vanilla": sum(event.vanilla_experts) * expert_bytes,
        "seconds": round(seconds, 4),
    }
    if traffic is not None:
        frame |= {"bytes_moved": traffic.bytes_moved, "hit_rate": round(traffic.hit_rate, 4)}
    if votes is not None:
        frame["votes"] = encode_votes(votes)
    return frame


def encode_votes(votes: StepVotes) -> Json:
    """The votes in ``levels`` equal steps up to ``largest`` of each layer, and each expert's state.

    Both are deflated bytes [layers, experts] in base64. Rounding keeps the order of votes, apart
    from ties; the bits of a state are ELECTED, RESIDENT and HIGH.
    """
    largest = votes.votes.amax(dim=1)
    shares = votes.votes / largest.where(largest > 0, 1.0).unsqueeze(1)
    state = votes.elected * ELECTED
    state = state + (RESIDENT if votes.resident is None else votes.resident * RESIDENT)
    if votes.high is not None:
        state = state + votes.high * HIGH
    state_code = _code(state)
    levels, code = _coded_shares(shares, MAX_CODE - len(state_code))
    return {
        "layers": list(votes.layers),
        "levels": levels,
        "largest": [round(value, 6) for value in largest.tolist()],
        "votes": code,
        "state": state_code,
        "precisions": 1 if votes.high is None else 2,
    }


def model_summary(model: Model) -> Json:
    """What a page must know of a model to draw its frames."""
    router = model.spec.router
    return {
        "model": model.name,
        "dtype": str(model.transformer.dtype).removeprefix("torch."),
        "device": str(model.transformer.device),
        "layers": list(model.spec.moe_layers),
        "experts": router.experts,
        "k": router.k,
        "block": model.defaults.block,
        "expert_bytes": expert_bytes(model.spec, model.transformer.dtype),
        "eos_ids": list(model.eos_ids),
        "offloaded": model.store.traffic_log is not None,
    }


def _tokens(tokens: Iterable[Token], decode_token: Callable[[int], str]) -> list[list[object]]:
    return [
        [token.position, token.id, decode_token(token.id), round(token.confidence, 3)]
        for token in tokens
    ]


def _coded_shares(shares: Tensor, max_length: int) -> tuple[int, str]:
    """The levels and the code of votes: with the most levels that fit, else with the fewest."""
    *finer, coarsest = VOTE_LEVELS
    for levels in finer:
        code = _code((shares * levels).round())
        if len(code) <= max_length:
            return levels, code
    return coarsest, _code((shares * coarsest).round())


def _code(values: Tensor) -> str:
    """Values 0 .. 255 as bytes, deflated, in base64. Votes repeat no sequence: only Huffman codes
    shorten them."""
    content = values.to(torch.uint8).numpy().tobytes()
    deflate = zlib.compressobj(strategy=zlib.Z_HUFFMAN_ONLY)
    return base64.b64encode(deflate.compress(content) + deflate.flush()).decode()
