"""The kernels for CPUs against plain arithmetic: every instruction set of this machine, forced."""

from __future__ import annotations

import os
import subprocess
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law
from torch import Tensor
from torch.nn import functional as F

from coterie import ops
from coterie.errors import CoterieError
from coterie.ops import cpu
from coterie.ops.cpu import build, library
from coterie.ops.packed_layout import expert_bytes
from coterie.ops.reference import ACTIVATIONS
from coterie.quantization import FORMATS, QTensor, QuantFormat, dequantize, quantize
from coterie.values import Activation, PackedExperts, Routing, Slab

HERE = Path(__file__).parent
FLOATS = {"fp32": torch.float32, "bf16": torch.bfloat16}
KINDS = (*FLOATS, "int8", "int4")
TOGETHER = 32  # activations of a token that share a scale, in int8 and int4
OF_H = 16  # of those between the two matrices
CLOSE = 1e-2
"""Of a small case, where one rounding of an activation that falls the other way is felt."""
TIGHT = 2e-3
EXACT = 1e-4
"""Where activations are not rounded."""

if not cpu.is_available():
    pytest.skip("NOT TESTED: the kernels for CPUs are not built", allow_module_level=True)

ISAS = cpu.available_isas()


@given(
    seed=st.integers(0, 999),
    kind=st.sampled_from(KINDS),
    isa=st.sampled_from(ISAS),
    tokens=st.integers(1, 40),
    hidden=st.integers(1, 200),
    width=st.integers(1, 150),
    threads=st.integers(1, 3),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
)
@law(80)
def test_kernels_equal_plain_arithmetic(
    *,
    seed: int,
    kind: str,
    isa: str,
    tokens: int,
    hidden: int,
    width: int,
    threads: int,
    activation: Activation,
):
    case = Case(kind, activation, tokens=tokens, hidden=hidden, width=width, seed=seed)
    rounds = kind not in FLOATS or (kind, isa) == ("bf16", "avx512bf16")
    assert case.error(isa, threads=threads) < (CLOSE if rounds else EXACT)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_with_many_tokens(kind: str, isa: str):
    assert Case(kind, tokens=512, hidden=96, width=80, experts=3, k=2).error(isa) < TIGHT


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_kernels_with_published_shapes(kind: str, isa: str):
    assert Case(kind, tokens=9, hidden=2048, width=512, experts=2, k=1).error(isa) < TIGHT


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_largest_sums_of_integers_do_not_overflow(kind: str, isa: str):
    case = Case(kind, tokens=9, hidden=128, width=64, flat=True)
    assert case.error(isa) < TIGHT


@pytest.mark.parametrize("kind", KINDS)
def test_tokens_in_bf16_are_the_same_tokens(kind: str):
    case = Case(kind, tokens=5, hidden=77, width=40)
    half = case.x.bfloat16()
    assert torch.equal(case.run(x=half), case.run(x=half.float()))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_threads_do_not_change_a_bit(kind: str, isa: str):
    case = Case(kind, tokens=33, hidden=150, width=70)
    first = case.run(isa, threads=1)
    for threads in (1, 2, 3):
        assert torch.equal(case.run(isa, threads=threads), first)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("kind", KINDS)
def test_every_number_of_the_output_is_written(kind: str, isa: str):
    case = Case(kind, tokens=7, hidden=45, width=20)
    torch.use_deterministic_algorithms(True)  # new memory is then full of NaN
    try:
        assert torch.empty(3).isnan().all()
        assert case.error(isa) < TIGHT
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("kind", KINDS)
def test_unused_experts_are_not_read(kind: str):
    case = Case(kind, tokens=3, hidden=64, width=32, experts=12, k=2)
    panels = case.packed.gate_up
    assert isinstance(panels, PackedExperts)
    before = case.run()
    panels.packed[case.packed.slot_of[~case.routing.used]] = 255  # NaN, as weight or as scale
    assert torch.equal(case.run(), before)


def test_empty_choices_and_absent_experts_add_nothing():
    case = Case("bf16", tokens=4, hidden=40, width=24, experts=3, k=2)
    empty = Routing(
        torch.full((4, 2), -1),
        case.routing.topk_weights,
        case.routing.used,
        case.routing.vanilla_ids,
    )
    assert not cpu.run_experts(case.x, empty, case.packed).any()
    absent = Slab(case.packed.gate_up, case.packed.down, torch.full((3,), -1))
    assert not cpu.run_experts(case.x, case.routing, absent).any()


def test_no_tokens_are_no_rows():
    case = Case("int8", tokens=1, hidden=40, width=24)
    ids = torch.empty(0, 2, dtype=torch.int64)
    none = Routing(ids, torch.empty(0, 2), case.routing.used, ids)
    assert cpu.run_experts(torch.empty(0, 40), none, case.packed).shape == (0, 40)


@pytest.mark.parametrize("kind", KINDS)
def test_nan_propagates(kind: str):
    case = Case(kind, tokens=3, hidden=40, width=24)
    case.x[1, 7] = torch.nan
    clean = torch.tensor([0, 2])
    found = case.run()
    assert found[1].isnan().any()
    assert found[clean].isfinite().all()


def test_a_routing_with_unknown_experts_raises():
    case = Case("bf16", tokens=2, hidden=40, width=24, experts=3, k=1)
    for ids in (torch.tensor([[0], [3]]), torch.tensor([[9], [0]])):
        wrong = Routing(ids, torch.ones(2, 1), case.routing.used, ids)
        with pytest.raises(RuntimeError, match="an expert or a slot that does not exist"):
            cpu.run_experts(case.x, wrong, case.packed)
    with pytest.raises(ValueError, match="tokens have 41 features, the experts 40"):
        cpu.run_experts(torch.zeros(2, 41), case.routing, case.packed)


@pytest.mark.parametrize(
    ("ids", "weights"),
    [
        (torch.zeros(2, 1, dtype=torch.int64), torch.ones(2, 1)),
        (torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 2)),
        (torch.zeros(3, 1, dtype=torch.int32), torch.ones(3, 1)),
        (torch.zeros(3, 1, dtype=torch.int64), torch.ones(3, 1).bfloat16()),
    ],
)
def test_a_routing_of_other_dtypes_raises(ids: Tensor, weights: Tensor):
    case = Case("bf16", tokens=3, hidden=40, width=24)
    with pytest.raises(ValueError, match=r"ids|weights"):
        cpu.run_experts(case.x, Routing(ids, weights, case.routing.used, ids), case.packed)


def test_an_unknown_instruction_set_is_refused(monkeypatch: pytest.MonkeyPatch):
    case = Case("bf16", tokens=2, hidden=40, width=24)
    monkeypatch.setenv("COTERIE_ISA", "abacus")
    with pytest.raises(CoterieError, match=r"COTERIE_ISA=abacus: .* known: portable"):
        cpu.run_experts(case.x, case.routing, case.packed)


def test_unsupported_slabs_are_not_packed():
    plain = Slab(torch.zeros(2, 8, 4).half(), torch.zeros(2, 4, 4).half(), torch.arange(2))
    assert ops.prepare(plain) is plain
    odd = quantize(torch.ones(2, 8, 24), QuantFormat(8, 24))
    slab = Slab(odd, quantize(torch.ones(2, 24, 4), QuantFormat(8, 24)), torch.arange(2))
    assert ops.prepare(slab) is slab
    with pytest.raises(ValueError, match="do not support experts"):
        cpu.pack(plain)


def test_both_sides_agree_on_the_group_sizes():
    kernels = library.load_library()
    assert kernels is not None
    for name, form in FORMATS.items():
        assert kernels.handle.coterie_group_size(library.FORMAT_IDS[name]) == form.group


def test_packed_experts_have_no_overhead():
    whole = 3 * 2048 * 512
    sizes = [expert_bytes(kind, hidden=2048, width=512) for kind in KINDS]
    assert sizes == [whole * 4, whole * 2, whole * 66 // 64, whole * 18 // 32]


def test_a_missing_library_is_logged_once(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    one = torch.ones(1, 2, 1).bfloat16()
    half = Slab(one, one[:, :1], torch.arange(1))
    monkeypatch.setattr(library, "LIBRARY_PATH", tmp_path / "nowhere.so")
    library.load_library.cache_clear()
    try:
        assert ops.prepare(half) is half
        assert ops.prepare(half) is half
    finally:
        library.load_library.cache_clear()
    assert caplog.text.count("kernels are not available") == 1


def test_a_library_that_does_not_load_is_not_a_missing_compiler(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, caplog: pytest.LogCaptureFixture
):
    broken = tmp_path / "libcoterie.so"
    broken.write_bytes(b"of another machine")
    monkeypatch.setattr(library, "LIBRARY_PATH", broken)
    assert library.load_library.__wrapped__() is None
    assert "the library does not load" in caplog.text
    assert "compiler" not in caplog.text


def test_without_a_compiler_the_reason_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    monkeypatch.setenv("CXX", str(tmp_path / "no-such-compiler"))
    with pytest.raises(build.NoCompilerError, match="no-such-compiler cannot be run"):
        build.build(tmp_path / "library.so")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_sanitizers_find_nothing(tmp_path: Path):
    watched(tmp_path, 30, "-O0", "-DCOTERIE_SMALL")


@pytest.mark.slow
def test_sanitizers_find_nothing_in_the_release_build(tmp_path: Path):
    watched(tmp_path, 300, "-g")


def watched(folder: Path, rounds: int, *flags: str) -> None:
    """So many random cases under every instruction set, with addresses and arithmetic checked."""
    checks = ("-fsanitize=address,undefined", "-fno-sanitize-recover=all")
    extra = (*checks, "-fno-omit-frame-pointer", *flags)
    program = build.build(folder / "driver", program=HERE / "kernels.cpp", extra_flags=extra)
    done = subprocess.run([program, str(rounds)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


class Case:
    """Random experts, tokens, a routing with a -1 in it: what they make, and what they should."""

    def __init__(
        self,
        kind: str,
        activation: Activation = "silu",
        *,
        tokens: int,
        hidden: int,
        width: int,
        experts: int = 6,
        k: int = 3,
        seed: int = 0,
        flat: bool = False,
    ) -> None:
        """With ``flat`` all weights are one number, and so are all tokens."""
        draw = torch.Generator().manual_seed(seed)
        self.kind, self.activation = kind, activation
        self.x = torch.randn(tokens, hidden, generator=draw)
        gate_up = torch.randn(experts, 2 * width, hidden, generator=draw) * hidden**-0.5
        down = torch.randn(experts, hidden, width, generator=draw) * width**-0.5
        if flat:
            self.x, gate_up, down = (torch.ones_like(each) for each in (self.x, gate_up, down))
        ids = torch.rand(tokens, experts, generator=draw).argsort(dim=1)[:, :k]
        ids[-1, -1] = -1
        used = torch.zeros(experts, dtype=torch.bool)
        used[ids[ids >= 0]] = True
        self.routing = Routing(ids, torch.rand(tokens, k, generator=draw), used, ids)
        # The slots lie in another order than the experts.
        slot_of = torch.randperm(experts, generator=draw)
        slab = Slab(_kept(gate_up, kind), _kept(down, kind), slot_of)
        self.plain = Slab(_whole(slab.gate_up), _whole(slab.down), slot_of)
        self.packed = cpu.pack(slab)

    def run(self, isa: str = ISAS[-1], *, threads: int = 2, x: Tensor | None = None) -> Tensor:
        before, found = torch.get_num_threads(), os.environ.get("COTERIE_ISA")
        torch.set_num_threads(threads)
        os.environ["COTERIE_ISA"] = isa
        try:
            x = self.x if x is None else x
            return ops.run_experts(x, self.routing, self.packed, self.activation)
        finally:
            torch.set_num_threads(before)
            os.environ.pop("COTERIE_ISA")
            if found is not None:
                os.environ["COTERIE_ISA"] = found

    def error(self, isa: str, *, threads: int = 2) -> float:
        """Of the output, in units of what adds up to it; activations rounded as the kernel does."""
        expected = torch.zeros(self.x.shape, dtype=torch.float64)
        size = torch.zeros_like(expected)
        gate_up, down = self.plain.gate_up, self.plain.down
        assert isinstance(gate_up, Tensor)
        assert isinstance(down, Tensor)
        x = _rounded(self.x, self.kind, isa, TOGETHER)
        for token, choice in (self.routing.topk_ids >= 0).nonzero().tolist():
            slot = self.plain.slot_of[self.routing.topk_ids[token, choice]]
            gate, up = (gate_up[slot].double() @ x[token].double()).chunk(2)
            h = _rounded((ACTIVATIONS[self.activation](gate) * up).float(), self.kind, isa, OF_H)
            parts = down[slot].double() * h.double() * self.routing.topk_weights[token, choice]
            expected[token] += parts.sum(dim=1)
            size[token] += parts.abs().sum(dim=1)
        found = self.run(isa, threads=threads).double()
        return float((found - expected).norm() / size.norm().clamp(min=1e-30))


def _kept(weight: Tensor, kind: str) -> Tensor | QTensor:
    return weight.to(FLOATS[kind]) if kind in FLOATS else quantize(weight, FORMATS[kind])


def _whole(weight: Tensor | QTensor | PackedExperts) -> Tensor:
    assert not isinstance(weight, PackedExperts)
    return dequantize(weight) if isinstance(weight, QTensor) else weight.float()


def _rounded(x: Tensor, kind: str, isa: str, size: int) -> Tensor:
    """Activations as the kernel sees them; ``size`` of them share a scale."""
    if kind in FLOATS:
        return x.bfloat16().float() if (kind, isa) == ("bf16", "avx512bf16") else x
    groups = F.pad(x, (0, -x.shape[-1] % size)).unflatten(-1, (-1, size))
    scale = groups.abs().amax(dim=-1, keepdim=True) / 127
    whole = (groups / scale.clamp(min=1e-37)).round() * scale
    return whole.flatten(-2)[..., : x.shape[-1]]
