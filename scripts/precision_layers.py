"""The loss bound beside what layers of Gaussian experts lose: a part of ``precision.py``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from coterie import ops
from coterie.engine.distance import quantization_error
from coterie.experts.mixed import vote_shares
from coterie.quant import FORMATS, dequantize, quantize
from coterie.routing import route
from coterie.routing.token import Vanilla
from coterie.values import ExpertRequest, RouterSpec, Routing, Scores, Slab

DRAWS, TOKENS, EXPERTS, K, HIDDEN, WIDTH = 60, 32, 64, 8, 128, 64


@dataclass(frozen=True)
class Layer:
    """Gaussian experts as they are, and as each precision has them; what both lose."""

    whole: Slab
    kinds: Mapping[str, Slab]
    errors: Mapping[str, np.ndarray]  # [E] each

    @staticmethod
    def drawn(draw: torch.Generator) -> Layer:
        everyone = torch.arange(EXPERTS)
        gate_up = torch.randn(EXPERTS, 2 * WIDTH, HIDDEN, generator=draw) * HIDDEN**-0.5
        down = torch.randn(EXPERTS, HIDDEN, WIDTH, generator=draw) * WIDTH**-0.5
        whole = Slab(gate_up.bfloat16().float(), down.bfloat16().float(), everyone)
        kinds = {
            name: Slab(
                *(dequantize(quantize(w, form)) for w in (whole.gate_up, whole.down)), everyone
            )
            for name, form in FORMATS.items()
        }
        errors = {
            name: np.array(
                [quantization_error(one(whole, e), one(slab, e)) for e in range(EXPERTS)]
            )
            for name, slab in kinds.items()
        }
        return Layer(whole, kinds, errors)


def one(slab: Slab, expert: int) -> Slab:
    assert isinstance(slab.gate_up, Tensor)
    assert isinstance(slab.down, Tensor)
    some = slice(expert, expert + 1)
    return Slab(slab.gate_up[some], slab.down[some], torch.zeros(1, dtype=torch.int64))


def layers() -> dict[str, object]:
    """The loss bound beside what a layer of drawn weights, tokens and votes really loses.

    ``of_sums``: the error's norm, token by token, against the sum of its experts' norms, weighed as
    they are. ``of_output``: the relative error of the layer's output.
    """
    draw, numbers = torch.Generator().manual_seed(1), np.random.default_rng(1)
    points = []
    for _ in range(DRAWS):
        layer = Layer.drawn(draw)
        skew = float(numbers.uniform(0, 2))
        bias = torch.randn(EXPERTS, generator=draw) * skew
        logits = (torch.randn(1, TOKENS, EXPERTS, generator=draw) + bias).float()
        scores = Scores(logits, RouterSpec(EXPERTS, K, "softmax", renormalise=True))
        routing = route(scores, Vanilla())
        demand = ExpertRequest(routing.used, routing, scores)
        assert demand.votes is not None
        votes, used = demand.votes.numpy(), routing.used.numpy()
        x = torch.randn(TOKENS, HIDDEN, generator=draw)
        count = int(numbers.integers(0, EXPERTS + 1))
        for name, order in (("most voted", -votes), ("drawn", numbers.random(EXPERTS))):
            fine = np.zeros(EXPERTS, dtype=bool)
            fine[np.argsort(order, kind="stable")[:count]] = True
            error = np.where(fine, layer.errors["int8"], layer.errors["int4"])
            share = vote_shares(votes, used)
            points.append(
                {
                    "fine": name,
                    "share_fine": float(share[fine].sum()),
                    "bound": float(share @ error),
                    "rms": float(share @ error**2) ** 0.5,
                    **losses(layer, routing, x, fine),
                }
            )
    return {"draws": DRAWS, "shape": [TOKENS, EXPERTS, K, HIDDEN, WIDTH], **judged(points)}


def losses(layer: Layer, routing: Routing, x: Tensor, fine: np.ndarray) -> dict[str, float]:
    chosen = torch.from_numpy(fine)[:, None, None]
    parts = (
        (layer.kinds["int8"].gate_up, layer.kinds["int4"].gate_up),
        (layer.kinds["int8"].down, layer.kinds["int4"].down),
    )
    mixed = Slab(*(torch.where(chosen, *pair) for pair in parts), layer.whole.slot_of)
    true, found = (ops.reference.run_experts(x, routing, slab) for slab in (layer.whole, mixed))
    lost = found - true
    sums = torch.zeros(TOKENS)
    for expert in range(EXPERTS):
        alone = routing.topk_ids == expert
        weight = (routing.topk_weights * alone).sum(-1)
        if bool(alone.any()):
            gate_up, down = layer.whole.gate_up[expert], layer.whole.down[expert]
            given = ops.linear(ops.silu_and_mul(ops.linear(x, gate_up)), down)
            sums += weight * given.norm(dim=-1)
    return {
        "of_sums": float(lost.norm(dim=-1).sum() / sums.sum()),
        "of_output": float(lost.norm() / true.norm()),
    }


def judged(points: Sequence[Mapping[str, float]]) -> dict[str, object]:
    """How far the bound and the root of squares hold and follow: ratios, and rank correlations."""
    told: dict[str, object] = {"points": list(points)}
    for name in ("of_sums", "of_output"):
        found = np.array([point[name] for point in points])
        for figure in ("bound", "rms"):
            guess = np.array([point[figure] for point in points])
            told[f"{name} to {figure}"] = {
                "largest_ratio": float((found / guess).max()),
                "smallest_ratio": float((found / guess).min()),
                "above": int((found > guess).sum()),
                "rank_correlation": float(np.corrcoef(ranks(guess), ranks(found))[0, 1]),
            }
            print(name, figure, told[f"{name} to {figure}"], flush=True)
    return told


def ranks(values: np.ndarray) -> np.ndarray:
    return values.argsort().argsort().astype(float)
