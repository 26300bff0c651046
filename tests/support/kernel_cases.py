"""Calls of every kernel with one argument spoilt; run as a program, each in the same process.

    python kernel_cases.py SEED COUNT [LIBRARY]

A call ends with a Python error, or with the value that plain torch gives for the same arguments.
Each line of the output names the call that follows, so that the last line is that of a crash.
"""

from __future__ import annotations

import random
import sys
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from coterie import ops
from coterie.errors import CoterieError
from coterie.ops import cpu, packed_layout, reference, threads
from coterie.ops.cpu import library
from coterie.quantization import FORMATS, dequantize, quantize
from coterie.routing import parse_policy
from coterie.routing.router import route_by_mask
from coterie.values import (
    CoresetRule,
    LayerKV,
    PackedExperts,
    PreviousCoresets,
    QueryPositions,
    RouterSpec,
    Routing,
    Scores,
    Slab,
)

ERRORS = (ValueError, RuntimeError, TypeError, LookupError, ArithmeticError, AttributeError)
HALF = torch.bfloat16
NUMBERS = (-1, 0, 1, 2, 3, 7, 10**6, 2**31, 2**32, 2**32 + 1, 2**62, -(2**40))
FRACTIONS = (-1.0, 0.0, 0.5, 1e30, float("nan"), float("inf"))


@dataclass(frozen=True)
class Call:
    """A kernel, its valid arguments, and the same in plain torch (None: any value is right)."""

    kernel: Callable[..., object]
    arguments: tuple
    plain: Callable[..., object] | None = None
    tolerance: float = 0.05


def calls() -> dict[str, Call]:
    x, norm = torch.randn(5, 48).to(HALF), torch.randn(48).to(HALF)
    matrix, down = torch.randn(96, 48).to(HALF), torch.randn(48, 48).to(HALF)
    made = {
        "rms_norm": Call(ops.rms_norm, (x, norm, 1e-6), reference.rms_norm),
        "add_rms_norm": Call(ops.add_rms_norm, (x, x.clone(), norm, 1e-6), add_rms_norm),
        "summarize_logits": Call(
            ops.summarize_logits, (torch.randn(4, 70), 3), reference.summarize_logits
        ),
        "linear": Call(
            lambda x, w: ops.linear(x, ops.prepare_matrix(w)),
            (x, matrix),
            lambda x, w: reference.linear(x, w, x.dtype),
        ),
        "packed linear": Call(ops.linear, (x, cpu.pack_matrix(matrix))),
        "swiglu": Call(
            cpu.swiglu,
            (x, cpu.pack_matrix(matrix), cpu.pack_matrix(down), torch.randn(5, 48)),
        ),
        "attention": attention(),
        "attention layer": attention_layer(),
        "crc32": Call(cpu.crc32, (torch.randint(0, 255, (700,), dtype=torch.uint8),), plain_crc32),
    }
    for kind in ("bf16", "int8", "int4"):
        slab = plain_slab(kind)
        made[f"pack {kind}"] = Call(cpu.pack, (slab,), packed_layout.pack)
        made[f"read_experts {kind}"] = Call(
            cpu.read_experts, (ops.pack(slab), torch.ones(4, dtype=torch.bool))
        )
        tokens = torch.randn(6, 64)
        made[f"run_experts {kind}"] = Call(
            ops.run_experts, (tokens, routing(), ops.pack(slab)), plain_experts
        )
    groups, blocks = {"groups": 4, "topk_groups": 2}, {"capacity": 7, "block": 4}
    for text in ("vanilla", "des-vote:beta=0.4", "mass-vote:tau=0.6", "des-seq:k=1"):
        for name, limit in (("", groups), (" in blocks", blocks)):
            made[f"route{name} {text}"] = Call(ops.route, route_arguments(text, **limit))
            made[f"route{name} by {text}"] = Call(
                lambda scores, text=text: kernel_routing(text, scores),
                (route_arguments(text, **limit)[0],),
                lambda scores, text=text: route_by_mask(scores, parse_policy(text)),
            )
    return made


def kernel_routing(text: str, scores: Scores) -> object:
    form = parse_policy(text).kernel_rule(scores, scores.router.k)
    return ops.route(form.scores, form.rule, form.vote_weight)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, epsilon: float) -> object:
    total = x + residual
    return total, reference.rms_norm(total, weight, epsilon)


def plain_crc32(content: Tensor) -> int:
    return zlib.crc32(content.contiguous().numpy().tobytes())


def plain_slab(kind: str) -> Slab:
    gate_up, down = torch.randn(4, 64, 64) / 8, torch.randn(4, 64, 32) / 8
    if kind == "bf16":
        return Slab(gate_up.to(HALF), down.to(HALF), torch.arange(4))
    return Slab(
        quantize(gate_up, FORMATS[kind]), quantize(down, FORMATS[kind]), torch.tensor([2, 0, 3, 1])
    )


def routing() -> Routing:
    ids = torch.rand(6, 4).argsort(dim=1)[:, :2]
    return Routing(ids, torch.rand(6, 2), torch.ones(4, dtype=torch.bool), ids)


def plain_experts(x: Tensor, routing: Routing, slab: Slab) -> Tensor:
    unpacked = packed_layout.unpack(slab)
    weights = [
        each.float() if isinstance(each, Tensor) else dequantize(each)
        for each in (unpacked.gate_up, unpacked.down)
    ]
    ids = routing.topk_ids.where(routing.topk_ids >= 0, -1)
    slots = slab.slot_of.where(slab.slot_of >= 0, -1)
    slots = slots[ids.clamp(min=0)].where(ids >= 0, -1)
    out = torch.zeros(x.shape)
    for token, choice in (slots >= 0).nonzero().tolist():
        gate, up = (weights[0][slots[token, choice]] @ x[token].float()).chunk(2)
        y = weights[1][slots[token, choice]] @ (torch.nn.functional.silu(gate) * up)
        out[token] += y * routing.topk_weights[token, choice]
    return out


def route_arguments(text: str, **limit: int) -> tuple[Scores, CoresetRule | None, Tensor | None]:
    router = RouterSpec(16, 3, "sigmoid", True, epsilon=1e-20, **limit)
    reuse = PreviousCoresets(0.2, torch.rand(2, 16) < 0.5)
    scores = Scores(
        torch.randn(2, 5, 16),
        router,
        bias=torch.randn(16) / 4,
        voters=torch.rand(2, 5),
        resident=torch.rand(16) < 0.5,
        previous_coresets=None if text == "vanilla" else reuse,
        starts=torch.tensor([2, 37]),
    )
    form = parse_policy(text).kernel_rule(scores, 3)
    return form.scores, form.rule, form.vote_weight


def attention() -> Call:
    rows, width, heads, dim, length = 2, 4, 4, 8, 32
    norms = (torch.ones(dim).to(HALF), torch.ones(dim).to(HALF))
    cache = LayerKV(
        torch.randn(3, 2, length, dim).to(HALF),
        torch.randn(3, 2, length, dim).to(HALF),
        torch.tensor([2, 0]),
    )
    qkv = torch.randn(rows, width, heads + 4, dim).to(HALF)
    return Call(ops.fused_attention, (qkv, norms, positions(), cache, 1e-6))


def attention_layer() -> Call:
    _, norms, queries, cache, epsilon = attention().arguments
    weights = (torch.randn(64, 24).to(HALF), torch.randn(24, 32).to(HALF))
    packed = tuple(map(cpu.pack_matrix, weights))
    return Call(
        lambda x, weights, norms, queries, kv: ops.fused_attention_layer(
            x, weights, norms, queries=queries, kv=kv, epsilon=epsilon
        ),
        (torch.randn(2, 4, 24).to(HALF), packed, norms, queries, cache),
    )


def positions() -> QueryPositions:
    where = torch.arange(4).repeat(2, 1)
    angle = torch.randn(2, 4, 1, 4)
    return QueryPositions(where, torch.full((2, 4), 9), 9, angle.cos(), angle.sin())


def spoilt(value: object, draw: random.Random) -> object:
    """The value with one part of it made wrong: a shape, a dtype, a stride, a number."""
    if isinstance(value, Tensor):
        return spoilt_tensor(value, draw)
    if is_dataclass(value):
        names = [field.name for field in fields(value) if getattr(value, field.name) is not None]
        name = draw.choice(names)
        return replace(value, **{name: spoilt(getattr(value, name), draw)})
    if isinstance(value, tuple):
        at = draw.randrange(len(value))
        return (*value[:at], spoilt(value[at], draw), *value[at + 1 :])
    others = ("", "bf16", "int4", "softmax", torch.float16, torch.float32, None)
    choices = {bool: (not value,), int: NUMBERS, float: FRACTIONS}.get(type(value), others)
    return draw.choice(choices)


def spoilt_tensor(tensor: Tensor, draw: random.Random) -> Tensor:
    dtypes = (torch.float32, HALF, torch.float16, torch.int64, torch.int32, torch.uint8, torch.bool)
    dim = draw.randrange(max(1, tensor.dim()))
    if not tensor.dim():
        return tensor.to(draw.choice(dtypes))
    ways = [
        lambda: tensor.to(draw.choice(dtypes)),
        lambda: tensor.narrow(dim, 0, draw.randrange(tensor.shape[dim] + 1)),
        lambda: tensor.narrow(dim, 0, draw.randrange(tensor.shape[dim] + 1)).clone(),
        lambda: torch.cat([tensor, tensor], dim),
        lambda: tensor.unsqueeze(dim),
        lambda: tensor.select(dim, 0).clone(),
        lambda: tensor.transpose(dim, draw.randrange(tensor.dim())),
        lambda: tensor.repeat_interleave(2, dim).unflatten(dim, (-1, 2)).select(dim + 1, 0),
        lambda: tensor[..., :1].expand(tensor.shape),
    ]
    if not tensor.is_floating_point() and tensor.dtype is not torch.bool and tensor.numel():
        ways += 6 * [lambda: with_number(tensor, draw)]
    return draw.choice(ways)()


def with_number(tensor: Tensor, draw: random.Random) -> Tensor:
    changed, limits = tensor.clone(), torch.iinfo(tensor.dtype)
    number = draw.choice([*NUMBERS, *tensor.shape])
    changed.view(-1)[draw.randrange(tensor.numel())] = max(limits.min, min(limits.max, number))
    return changed


def difference(found: object, expected: object) -> float:
    """The greatest distance of two results, in units of the expected one's size; NaN is 0."""
    if isinstance(expected, Tensor):
        if not isinstance(found, Tensor) or found.shape != expected.shape:
            return float("inf")
        one, other = (each.double().nan_to_num(0, 0, 0) for each in (found, expected))
        return float((one - other).norm() / other.norm().clamp(min=1e-3))
    if is_dataclass(expected) and not isinstance(expected, PackedExperts):
        found, expected = list(vars(found).values()), list(vars(expected).values())
    if isinstance(expected, PackedExperts):
        return difference(found.packed, expected.packed)
    if isinstance(expected, list | tuple):
        return max(map(difference, found, expected))
    return 0.0 if found == expected else float("inf")


def check(call: Call, arguments: tuple) -> str | None:
    """What is wrong with the outcome of a call; None for an error or the right value."""
    try:
        found = call.kernel(*arguments)
    except ERRORS:
        return None
    if call.plain is None or found is None:
        return None
    try:
        expected = call.plain(*arguments)
    except ERRORS as error:
        return f"gives a value, plain torch {type(error).__name__}: {error}"
    error = difference(found, expected)
    return f"is off by {error:.3g}" if error > call.tolerance else None


def main(seed: int, count: int) -> int:
    torch.manual_seed(0)
    torch.set_num_threads(2)
    threads.MIN_SHARE = 1
    draw, wrong = random.Random(seed), 0
    known = calls()
    for name, call in known.items():
        trouble = check(call, call.arguments)
        call.kernel(*call.arguments)  # valid arguments raise nothing
        assert trouble is None, (name, trouble)
    for turn in range(count):
        name = draw.choice(sorted(known))
        arguments = known[name].arguments
        try:
            arguments = spoilt(arguments, draw)
        except (*ERRORS, CoterieError):
            continue  # a value that checks itself
        print(turn, name, flush=True)
        if trouble := check(known[name], arguments):
            wrong += 1
            print(f"WRONG {name} {trouble}: {arguments}")
    return wrong


if __name__ == "__main__":
    if len(sys.argv) > 3:
        library.LIBRARY_PATH = Path(sys.argv[3])
    sys.exit(min(100, main(int(sys.argv[1]), int(sys.argv[2]))))
