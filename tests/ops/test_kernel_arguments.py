"""Kernels with wrong arguments: a Python error or a right value, never the end of the process."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from kernel_cases import attention, plain_slab, positions, route_arguments, routing
from policy_strategies import law

from coterie import ops
from coterie.checks import address
from coterie.errors import ConfigError
from coterie.ops import cpu
from coterie.ops.cpu import build
from coterie.ops.packed_layout import slab_of_packed
from coterie.quantization import QTensor
from coterie.values import CoresetRule, PackedExperts, PackedMatrix, PreviousCoresets, RouterSpec

PROGRAM = Path(__file__).parents[1] / "support" / "kernel_cases.py"
HALF = torch.bfloat16

if not cpu.is_available():
    pytest.skip("NOT TESTED: the kernels for CPUs are not built", allow_module_level=True)


def in_a_child(seed: int, count: int, *arguments: str, **variables: str) -> None:
    paths = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, PROGRAM, str(seed), str(count), *arguments],
        env={**os.environ, "PYTHONPATH": paths, **variables},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stdout[-2000:], done.stderr[-4000:])


def test_wrong_arguments_give_an_error_or_the_right_value():
    in_a_child(1, 150)


@pytest.mark.slow
@pytest.mark.parametrize("isa", cpu.available_isas())
def test_wrong_arguments_of_every_instruction_set(isa: str):
    in_a_child(2, 20_000, COTERIE_ISA=isa)


@pytest.mark.slow
def test_wrong_arguments_touch_no_other_memory(tmp_path: Path):
    """Under the address sanitizer, which the interpreter must load first.

    The sanitizer looks for C++'s exceptions when it loads. It ends the process at the first one of
    torch, unless the library that has them is loaded by then.
    """
    flags = ("-fsanitize=address", "-fno-omit-frame-pointer", "-g", "-DCOTERIE_SMALL")
    path = build.build(tmp_path / "watched.so", extra_flags=flags)
    preload = " ".join(map(library_path, ("libasan.so", "libstdc++.so.6")))
    options = "detect_leaks=0:allocator_may_return_null=1"
    in_a_child(3, 20_000, str(path), LD_PRELOAD=preload, ASAN_OPTIONS=options)


def library_path(name: str) -> str:
    """Where the compiler finds a library."""
    find = [*build.find_compiler(), f"-print-file-name={name}"]
    return subprocess.run(find, capture_output=True, text=True, check=True).stdout.strip()


def test_attention_outside_the_cache_raises():
    qkv, norms, queries, cache, epsilon = attention().arguments

    def attend(queries=queries, cache=cache, norms=norms):
        return ops.fused_attention(qkv, norms, queries, cache, epsilon)

    assert attend().isfinite().all()
    length = cache.keys.shape[2]
    for outside in (length, -1, 10**9):
        where = positions().positions.clone()
        where[1, 2] = outside
        with pytest.raises(RuntimeError, match="outside the KV cache"):
            attend(replace(queries, positions=where))
        with pytest.raises(RuntimeError, match="outside the KV cache"):
            attend(cache=replace(cache, cache_rows=torch.tensor([outside, 0])))
    for reach in (length + 1, 0, 2**32 + 1):
        with pytest.raises(ValueError, match="KV cache of 32 positions"):
            attend(replace(queries, kv_length=reach))
    with pytest.raises(ValueError, match="cache rows"):
        attend(cache=replace(cache, cache_rows=cache.cache_rows.int()))
    with pytest.raises(ValueError, match="norm"):
        attend(norms=(norms[0], norms[1][:4]))


def test_routing_with_tensors_of_another_shape_raises():
    scores, rule, vote_weight = route_arguments("des-vote:beta=0.4", capacity=7)
    short = PreviousCoresets(0.1, torch.ones(1, 16, dtype=torch.bool))
    for name, wrong in (
        ("previous_coresets", short),
        ("bias", scores.bias[:5]),
        ("resident", scores.resident[:5]),
        ("voters", scores.voters[:1]),
        ("starts", scores.starts[:1]),
        ("starts", scores.starts.int()),
    ):
        with pytest.raises(ValueError, match=name.split("_", maxsplit=1)[0]):
            ops.route(replace(scores, **{name: wrong}), rule, vote_weight)
    with pytest.raises(ValueError, match="vote weights"):
        ops.route(scores, rule, vote_weight[:1])
    with pytest.raises(ValueError, match="experts"):
        ops.route(replace(scores, logits=scores.logits[..., :8].contiguous()), rule, vote_weight)


@pytest.mark.parametrize(
    "wrong",
    [
        {"groups": 0},
        {"groups": 3},
        {"topk_groups": 0},
        {"topk_groups": 5},
        {"k": 0},
        {"k": 17},
        {"experts": 2**16},
        {"activation": "relu"},
        {"block": 0},
        {"block": 2**31},
        {"capacity": 8},
        {"capacity": 2, "topk_groups": 4},
        {"capacity": 17, "topk_groups": 4},
        {"capacity": -1, "topk_groups": 4},
    ],
)
def test_a_router_checks_itself(wrong: dict):
    router = RouterSpec(16, 3, "sigmoid", True, groups=4, topk_groups=2)
    with pytest.raises(ConfigError):
        replace(router, **wrong)


@given(st.integers(-1, 2), st.integers(-1, 2), st.sampled_from((-0.1, 0.0, 0.5, float("nan"), 1.0)))
@law(60)
def test_a_rule_has_exactly_one_size(union: int, count: int, mass: float):
    is_valid = min(union, count) >= 0 and mass >= 0 and (union, count, mass).count(0) == 2
    if is_valid:
        CoresetRule(union=union, count=count, mass=mass)
        return
    with pytest.raises(ConfigError):
        CoresetRule(union=union, count=count, mass=mass)


@pytest.mark.parametrize("wrong", [{"vote": "loud"}, {"protect": -1}, {"min_experts": 2**31}])
def test_a_rule_checks_its_numbers(wrong: dict):
    with pytest.raises(ConfigError):
        CoresetRule(count=1, **wrong)


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_quantised_weights_check_themselves(kind: str):
    weight = plain_slab(kind).gate_up
    assert isinstance(weight, QTensor)
    for wrong in (
        {"scales": weight.scales[..., :0]},
        {"scales": weight.scales.float()},
        {"q": weight.q.to(torch.int16)},
        {"q": weight.q[:2]},
        {"k": weight.k + 64},
    ):
        with pytest.raises(ValueError, match=kind):
            replace(weight, **wrong)


def test_packed_weights_check_themselves():
    slab, matrix = ops.pack(plain_slab("int8")), cpu.pack_matrix(torch.ones(5, 7).to(HALF))
    experts = slab.gate_up
    assert isinstance(experts, PackedExperts)
    with pytest.raises(ValueError, match="packed experts"):
        replace(experts, packed=experts.packed[:2])
    with pytest.raises(ValueError, match="packed experts"):
        replace(experts, packed=experts.packed.T.contiguous().T)
    with pytest.raises(ValueError, match="format"):
        replace(experts, format="int5")
    wide = slab_of_packed(experts.packed, "int8", slab.slot_of, hidden=64, width=64)
    with pytest.raises(ValueError, match="too small"):
        ops.run_experts(torch.ones(6, 64), routing(), wide)
    for wrong in ({"shape": (4, 64, 16)}, {"format": "int4"}, {"packed": experts.packed.clone()}):
        other = replace(slab, down=replace(slab.down, **wrong))
        with pytest.raises(ValueError, match="same experts"):
            ops.run_experts(torch.ones(6, 64), routing(), other)
    with pytest.raises(ValueError, match="packed matrix"):
        PackedMatrix(matrix.packed[:-1], HALF, (5, 7))
    with pytest.raises(ValueError, match="slots"):
        replace(slab, slot_of=slab.slot_of.int())


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
def test_a_product_is_a_float(dtype: torch.dtype):
    """A rounded sum does not tell which integer is right."""
    x, matrix = torch.ones(5, 48), torch.randn(96, 48).to(HALF)
    for weight in (matrix, cpu.pack_matrix(matrix)):
        with pytest.raises(ValueError, match="product"):
            ops.linear(x, weight, dtype=dtype)
        with pytest.raises(ValueError, match="product"):
            ops.linear(x.to(dtype), weight)
        assert ops.linear(x.to(dtype), weight, dtype=HALF).dtype is HALF


def test_reads_of_absent_experts_raise():
    slab, used = ops.pack(plain_slab("bf16")), torch.ones(4, dtype=torch.bool)
    for slots in ([-1, 1, 2, 3], [0, 1, 2, 4], [2**40, 0, 1, 2]):
        with pytest.raises(ValueError, match="absent"):
            cpu.read_experts(replace(slab, slot_of=torch.tensor(slots)), used)


def test_weights_that_are_not_contiguous_are_read_in_their_order():
    x, norm = torch.randn(3, 32).to(HALF), torch.randn(64).to(HALF)
    expected = ops.rms_norm(x, norm[::2].contiguous(), 1e-6)
    assert torch.equal(ops.rms_norm(x, norm[::2], 1e-6), expected)
    with pytest.raises(ValueError, match="contiguous"):
        cpu.crc32(torch.arange(64, dtype=torch.uint8)[::2])
    with pytest.raises(ValueError, match="norm weight"):
        ops.rms_norm(x, norm[:31].contiguous(), 1e-6)


def test_an_address_is_that_of_the_right_tensor_only():
    tensor = torch.zeros(2, 3)
    assert address(tensor, torch.float32, (2, 3), "it") == tensor.data_ptr()
    wrong = (tensor.double(), tensor[:1], tensor.T.contiguous().T, tensor.to("meta"))
    for other in wrong:
        with pytest.raises(ValueError, match=r"it: \["):
            address(other, torch.float32, (2, 3), "it")
