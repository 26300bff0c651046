"""The layout of packed experts: plain torch against the kernels' own packing, there and back."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from policy_strategies import law

from coterie import ops
from coterie.ops import cpu, packed_layout
from coterie.ops.cpu import library
from coterie.ops.cpu.library import FORMAT_IDS
from coterie.ops.packed_layout import expert_bytes, pack, unpack
from coterie.quantization import FORMATS, QTensor, QuantFormat, quantize
from coterie.values import PACKED_FORMATS, STORAGE_DTYPES, PackedExperts, PackedFormat, Slab

SIZES = {"hidden": st.integers(1, 200), "width": st.integers(1, 150)}
needs_kernels = pytest.mark.skipif(
    not cpu.is_available(), reason="the kernels for CPUs are not built"
)


def random_slab(
    kind: PackedFormat, seed: int, *, hidden: int, width: int, experts: int = 3
) -> Slab:
    draw = torch.Generator().manual_seed(seed)
    gate_up = torch.randn(experts, 2 * width, hidden, generator=draw)
    down = torch.randn(experts, hidden, width, generator=draw)
    slot_of = torch.randperm(experts, generator=draw)
    dtype = STORAGE_DTYPES[kind]
    if dtype.is_floating_point:
        return Slab(gate_up.to(dtype), down.to(dtype), slot_of)
    return Slab(quantize(gate_up, FORMATS[kind]), quantize(down, FORMATS[kind]), slot_of)


def packed(slab: Slab) -> torch.Tensor:
    assert isinstance(slab.gate_up, PackedExperts)
    return slab.gate_up.packed


@needs_kernels
@given(seed=st.integers(0, 999), kind=st.sampled_from(PACKED_FORMATS), **SIZES)
@law(60)
def test_kernels_pack_as_plain_torch_does(
    seed: int, kind: PackedFormat, hidden: int, width: int
) -> None:
    slab = random_slab(kind, seed, hidden=hidden, width=width)
    plain, compiled = pack(slab), cpu.pack(slab)
    assert packed(plain).equal(packed(compiled))
    assert (plain.gate_up.shape, plain.down.shape) == (compiled.gate_up.shape, compiled.down.shape)
    size = library.require_library().handle.coterie_expert_bytes(FORMAT_IDS[kind], hidden, width)
    assert expert_bytes(kind, hidden=hidden, width=width) == -(-size // 64) * 64


@needs_kernels
@pytest.mark.parametrize(("hidden", "width"), [(0, 5), (5, 0), (0, 0)])
def test_weights_without_rows_or_columns_are_packed_too(hidden: int, width: int) -> None:
    """An empty mapping of memory does not exist."""
    slab = Slab(
        torch.ones(3, 2 * width, hidden, dtype=torch.bfloat16),
        torch.ones(3, hidden, width, dtype=torch.bfloat16),
        torch.arange(3),
    )
    assert packed(pack(slab)).equal(packed(cpu.pack(slab)))
    matrix = torch.ones(hidden, width, dtype=torch.bfloat16)
    assert cpu.pack_matrix(matrix).nbytes == 0


@given(seed=st.integers(0, 999), kind=st.sampled_from(PACKED_FORMATS), **SIZES)
@law(60)
def test_unpack_inverts_pack(seed: int, kind: PackedFormat, hidden: int, width: int) -> None:
    slab = random_slab(kind, seed, hidden=hidden, width=width)
    again = unpack(pack(slab))
    assert again.slot_of.equal(slab.slot_of)
    for ours, theirs in ((again.gate_up, slab.gate_up), (again.down, slab.down)):
        if isinstance(theirs, QTensor):
            assert isinstance(ours, QTensor)
            assert (ours.format, ours.k) == (theirs.format, theirs.k)
            assert ours.q.equal(theirs.q)
            assert ours.scales.equal(theirs.scales)
        else:
            assert isinstance(ours, torch.Tensor)
            assert ours.view(torch.uint8).equal(theirs.view(torch.uint8))


@pytest.mark.parametrize("kind", PACKED_FORMATS)
def test_every_byte_of_an_expert_matters(kind: PackedFormat) -> None:
    """At sizes that fill their panels: so no byte is lost between two that say the same."""
    hidden, width = 128, 64
    size = expert_bytes(kind, hidden=hidden, width=width)
    blobs = torch.randint(0, 256, (2, size), generator=torch.Generator().manual_seed(3))
    slab = packed_layout.slab_of_packed(
        blobs.to(torch.uint8), kind, torch.arange(2), hidden=hidden, width=width
    )
    assert packed(pack(unpack(slab))).equal(blobs.to(torch.uint8))


def test_gate_and_up_of_a_row_are_paired() -> None:
    gate_up = torch.zeros(1, 40, 6)
    gate_up[0, 3, 2], gate_up[0, 20 + 3, 2] = 1.0, 2.0
    slab = Slab(gate_up.bfloat16(), torch.zeros(1, 6, 20).bfloat16(), torch.arange(1))
    found = packed(pack(slab))[0].view(torch.bfloat16)
    # Row 3 of the first couple, second step of two numbers: 64 numbers a step, 32 of them gate's.
    places = {64 + 3 * 2: 1.0, 64 + 32 + 3 * 2: 2.0}
    assert {at: float(found[at]) for at in found.nonzero().flatten().tolist()} == places


def test_unsupported_weights_are_refused() -> None:
    plain = Slab(torch.zeros(1, 4, 2), torch.zeros(1, 2, 2), torch.arange(1))
    with pytest.raises(ValueError, match=r"not support experts in torch\.float16"):
        ops.pack(Slab(plain.gate_up.half(), plain.down.half(), plain.slot_of))
    coarse = QuantFormat(8, 128)
    gate_up, down = (quantize(weight, coarse) for weight in (plain.gate_up, plain.down))
    slab = Slab(gate_up, down, plain.slot_of)
    with pytest.raises(ValueError, match=r"not support experts in torch\.int8"):
        ops.pack(slab)
    assert unpack(plain) is plain


def test_both_languages_have_the_same_layout_version() -> None:
    header = Path(str(cpu.__file__)).with_name("api.hpp").read_text()
    [said] = re.findall(r"#define COTERIE_LAYOUT (\d+)", header)
    assert int(said) == packed_layout.LAYOUT_VERSION


@needs_kernels
def test_experts_in_unsupported_formats_log_a_warning(
    caplog: pytest.LogCaptureFixture,
) -> None:
    form = QuantFormat(8, 40)  # used by no other test: the warning is logged once per process
    slab = Slab(
        quantize(torch.ones(1, 4, 40), form), quantize(torch.ones(1, 40, 2), form), torch.arange(1)
    )
    assert ops.prepare(slab) is slab
    assert ops.prepare(slab) is slab
    [message] = [record.getMessage() for record in caplog.records]
    assert message.startswith("Experts in int8 in groups of 40 run on PyTorch alone")
    assert message.endswith("int8 in groups of 64 and int4 in groups of 32")


@needs_kernels
def test_packed_experts_are_in_private_memory() -> None:
    """Shared memory would get no huge pages where they are for the asking only."""
    slab = cpu.pack(random_slab("bf16", 0, hidden=512, width=512, experts=4))
    start, owner = packed(slab).data_ptr(), ""
    for line in Path("/proc/self/maps").read_text().splitlines():
        ends, kind = line.split()[:2]
        low, high = (int(end, 16) for end in ends.split("-"))
        if low <= start < high:
            owner = kind
    assert owner == "rw-p"
