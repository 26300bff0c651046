"""Experts from kernels for a GPU say what the reference says: any shape, format and routing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from gpu_compilation import compiled
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.ops import reference
from coterie.quantization import FORMATS, QTensor, QuantFormat, quantize
from coterie.values import Activation, Routing, Slab, expert_mask

pytest.importorskip("triton", reason="NOT TESTED: kernels for a GPU (triton is not installed)")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
NEAR = {FP32: 1e-5, FP16: 4e-3, BF16: 2e-2}
"""Distance over size. Weights in few bits round once more on their way to bf16."""


def layer(
    experts: int, sizes: tuple[int, int], dtype: torch.dtype, form: QuantFormat | None, seed: int
) -> Slab:
    """Random experts, the slots in any order and some experts absent."""
    (hidden, width), draw = sizes, torch.Generator().manual_seed(seed)
    slots = max(1, experts - experts // 4)
    gate_up = torch.randn(slots, 2 * width, hidden, generator=draw) * hidden**-0.5
    down = torch.randn(slots, hidden, width, generator=draw) * width**-0.5
    held = torch.randperm(experts, generator=draw)[:slots]
    slot_of = torch.full((experts,), -1).scatter_(0, held, torch.arange(slots)).to(DEVICE)
    if form is None:
        return Slab(gate_up.to(DEVICE, dtype), down.to(DEVICE, dtype), slot_of)
    return Slab(on_device(quantize(gate_up, form)), on_device(quantize(down, form)), slot_of)


def on_device(weight: QTensor) -> QTensor:
    return QTensor(weight.q.to(DEVICE), weight.scales.to(DEVICE), weight.format, weight.k)


def routed(tokens: int, k: int, experts: int, used: int, seed: int) -> Routing:
    """Every token its k of the first ``used`` experts; about a tenth of the ids are -1."""
    draw = torch.Generator().manual_seed(seed)
    ids = torch.rand(tokens, max(used, k), generator=draw).argsort(-1)[:, :k] % experts
    ids = ids.masked_fill(torch.rand(ids.shape, generator=draw) < 0.1, -1)
    weights = torch.rand(ids.shape, generator=draw).masked_fill(ids < 0, 0.0)
    used_mask = expert_mask(ids.flatten(), experts)
    return Routing(*(tensor.to(DEVICE) for tensor in (ids, weights, used_mask, ids)))


def inputs(tokens: int, hidden: int, dtype: torch.dtype, seed: int) -> Tensor:
    draw = torch.Generator().manual_seed(seed + 1)
    return torch.randn(tokens, hidden, generator=draw).to(DEVICE, dtype)


def agree(
    x: Tensor, routing: Routing, slab: Slab, activation: Activation = "silu", **how: object
) -> None:
    """The kernels' sum, against the reference's in fp32 on the same numbers."""
    from coterie.ops.triton import experts

    assert experts.supports_experts(x, slab)
    found = experts.run_experts(x, routing, slab, activation, **how)
    gate_up, down = (
        weight.float() if isinstance(weight, Tensor) else weight
        for weight in (slab.gate_up, slab.down)
    )
    wide = Slab(gate_up, down, slab.slot_of)
    expected = reference.run_experts(x.float(), routing, wide, activation)
    assert found.dtype == torch.float32
    assert bool(torch.isfinite(found).all())
    distance = (found - expected).norm() / expected.norm().clamp(min=1e-30)
    assert float(distance) <= NEAR[x.dtype], float(distance)


@settings(max_examples=6, phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(
    size=st.tuples(
        st.sampled_from((1, 2, 7, 16, 17, 33)),
        st.sampled_from(((64, 32), (96, 48), (40, 24), (33, 17))),
    ),
    dtype=st.sampled_from((FP32, BF16, FP16)),
    form=st.sampled_from((None, None, FORMATS["int8"], FORMATS["int4"], QuantFormat(4, 16))),
    k_of_used=st.sampled_from(((1, 1), (1, 12), (2, 3), (4, 12), (3, 3))),
    seed=st.integers(0, 2**31),
    activation=st.sampled_from(sorted(reference.ACTIVATIONS)),
)
def test_kernels_equal_the_reference(
    *,
    size: tuple[int, tuple[int, int]],
    dtype: torch.dtype,
    form: QuantFormat | None,
    k_of_used: tuple[int, int],
    seed: int,
    activation: Activation,
) -> None:
    (tokens, sizes), (k, used) = size, k_of_used
    slab, x = layer(12, sizes, dtype, form, seed), inputs(tokens, sizes[0], dtype, seed)
    agree(x, routed(tokens, k, 12, used, seed), slab, activation)


@pytest.mark.parametrize(
    ("form", "turned"),
    [
        (None, False),
        (FORMATS["int8"], True),
        pytest.param(None, True, marks=pytest.mark.slow),
        pytest.param(FORMATS["int4"], False, marks=pytest.mark.slow),
    ],
)
def test_every_tile_config_equals_the_reference(form: QuantFormat | None, turned: bool) -> None:
    from coterie.ops.triton.tuning import TileConfig

    slab, x = layer(2, (80, 24), BF16, form, 3), inputs(36, 80, BF16, 3)
    routing = routed(36, 1, 2, 2, 3)
    for tokens, columns, step in ((16, 16, 64), (32, 32, 128), (64, 64, 64)):
        plan = TileConfig(tokens, columns, step, warps=4, stages=3, transposed=turned)
        agree(x, routing, slab, configs=(plan, plan))


@pytest.mark.slow
@pytest.mark.parametrize("form", [None, *FORMATS.values()])
def test_many_tokens(form: QuantFormat | None) -> None:
    slab = layer(16, (256, 128), BF16, form, 4)
    agree(inputs(512, 256, BF16, 4), routed(512, 4, 16, 16, 4), slab)


LAUNCHES = """
import torch
from coterie.ops.expert_layout import ExpertLayout
from coterie.ops.triton import experts, tuning
from coterie.quantization import FORMATS, QTensor
from coterie.values import Routing, Slab

def weight(rows, k, form):
    if form is None:
        return torch.empty(256, rows, k, dtype=DTYPE, device="meta")
    shape, groups = form.storage_shapes((256, rows, k))
    q = torch.empty(shape, dtype=form.dtype, device="meta")
    scales = torch.empty(groups, dtype=torch.bfloat16, device="meta")
    return QTensor(q, scales, form, k)

def layer(hidden, width, form):
    slot_of = torch.empty(256, dtype=torch.int64, device="meta")
    return Slab(weight(2 * width, hidden, form), weight(hidden, width, form), slot_of)

def in_blobs(slots, layout):
    slot_of = torch.empty(256, dtype=torch.int64, device="meta")
    memory = torch.empty(slots, layout.size, dtype=torch.uint8, device="meta")
    return layout.as_slab(memory, slot_of)

def run(tokens, slab, **how):
    x = torch.empty(tokens, slab.down.shape[1], dtype=DTYPE, device="meta")
    ids = torch.empty(tokens, 8, dtype=torch.int64, device="meta")
    weights = torch.empty(tokens, 8, device="meta")
    used = torch.empty(256, dtype=torch.bool, device="meta")
    experts.run_experts(x, Routing(ids, weights, used, ids), slab, **how)
"""


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_odd_shapes_compile_for_a_gpu(dtype: str) -> None:
    compiled(
        LAUNCHES.replace("DTYPE", f"torch.{dtype}")
        + """
for form in (None, *FORMATS.values()):
    for hidden, width in ((2048, 512), (2048, 1024), (96, 48), (33, 17)):
        for tokens in (1, 32, 100):
            run(tokens, layer(hidden, width, form))
"""
    )


@pytest.mark.slow
@pytest.mark.parametrize("form", ["", "int8", "int4"])
def test_every_candidate_compiles_for_a_gpu(form: str) -> None:
    kernels = compiled(
        LAUNCHES.replace("DTYPE", "torch.bfloat16")
        + f"""
form = FORMATS.get({form!r})
slab = layer(2048, 512, form)
x = torch.empty(32, 2048, dtype=torch.bfloat16, device="meta")
gate_up, down = experts.gemm_shapes(x, slab)
for config in tuning.candidate_configs(gate_up):
    run(32, slab, configs=(config, tuning.default_config(down)))
for config in tuning.candidate_configs(down):
    run(32, slab, configs=(tuning.default_config(gate_up), config))
"""
    )
    assert len(kernels) > 20


def test_no_experts_give_zeros() -> None:
    from coterie.ops.triton import experts

    slab, x = layer(4, (32, 16), FP32, None, 5), inputs(3, 32, FP32, 5)
    empty = torch.full((3, 2), -1, device=DEVICE)
    nothing = Routing(empty, torch.ones(3, 2, device=DEVICE), empty[0] > 0, empty)
    used = torch.zeros(4, dtype=torch.bool, device=DEVICE)
    out = experts.run_experts(x, Routing(empty, nothing.topk_weights, used, empty), slab)
    assert bool((out == 0).all())


def test_twice_is_bit_for_bit_the_same() -> None:
    from coterie.ops.triton import experts

    slab, x = layer(8, (64, 32), BF16, None, 6), inputs(20, 64, BF16, 6)
    routing = routed(20, 4, 8, 8, 6)
    first, second = (experts.run_experts(x, routing, slab) for _ in range(2))
    assert torch.equal(first, second)


def test_a_token_does_not_depend_on_its_batch() -> None:
    from coterie.ops.triton import experts

    slab, x = layer(8, (64, 32), BF16, None, 7), inputs(20, 64, BF16, 7)
    routing = routed(20, 4, 8, 8, 7)
    whole = experts.run_experts(x, routing, slab)
    broken = x.clone()
    broken[3] = float("nan")
    found = experts.run_experts(broken, routing, slab)
    assert torch.equal(found[torch.arange(20) != 3], whole[torch.arange(20) != 3])


def test_other_types_are_left_to_the_reference() -> None:
    from coterie.ops.triton import experts

    slab = layer(4, (32, 16), FP32, None, 8)
    assert not experts.supports_experts(inputs(2, 32, BF16, 8), slab)
    odd = layer(4, (48, 48), FP32, QuantFormat(8, 48), 8)
    assert not experts.supports_experts(inputs(2, 48, FP32, 8), odd)


def test_a_measured_config_is_saved_and_used(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from coterie.ops.triton import tuning

    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path))
    tuning._tuned_configs.cache_clear()
    gemm = tuning.GemmShape(
        "down", 32, rows=2048, k=512, dtype="bfloat16", weight_format="", group=1
    )
    default = tuning.best_config(gemm)
    assert default == tuning.default_config(gemm)
    times = tuning.tune(gemm, lambda config: abs(config.step - 128) + config.stages + config.warps)
    assert default in times
    assert len(times) > 10
    best = tuning.best_config(gemm)
    assert best == min(times, key=times.__getitem__) != default
    assert list(json.loads((tmp_path / "tuning.json").read_text())) == [gemm.key()]
    monkeypatch.setattr(tuning, "BUNDLED_CONFIGS", tmp_path / "tuning.json")
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "nothing"))
    tuning._tuned_configs.cache_clear()
    assert tuning.best_config(gemm) == best
    (tmp_path / "tuning.json").write_text("{broken")
    tuning._tuned_configs.cache_clear()
    assert tuning.best_config(gemm) == default
    tuning._tuned_configs.cache_clear()


def test_a_config_that_fails_is_skipped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from coterie.ops.triton import tuning

    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path))
    tuning._tuned_configs.cache_clear()
    gemm = tuning.GemmShape(
        "gate-up", 32, rows=512, k=2048, dtype="bfloat16", weight_format="int8", group=64
    )

    def time(config: tuning.TileConfig) -> float:
        if config.warps == 8:
            raise RuntimeError("out of registers")
        return config.warps

    assert all(config.warps < 8 for config in tuning.tune(gemm, time))
    tuning._tuned_configs.cache_clear()


def test_measured_configs_are_used_if_they_cannot_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    from coterie.ops.triton import tuning

    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("COTERIE_CACHE", str(tmp_path / "file"))
    tuning._tuned_configs.cache_clear()
    gemm = tuning.GemmShape(
        "down", 32, rows=2048, k=512, dtype="bfloat16", weight_format="", group=1
    )
    times = tuning.tune(gemm, lambda config: abs(config.step - 128) + config.stages + config.warps)
    assert (
        tuning.best_config(gemm) == min(times, key=times.__getitem__) != tuning.default_config(gemm)
    )
    assert "not saved" in caplog.text
    tuning._tuned_configs.cache_clear()


def test_kernels_launch_on_the_device_of_their_tensors(monkeypatch: pytest.MonkeyPatch) -> None:
    from coterie.ops.triton.launch import launch

    class Far(torch.Tensor):
        is_cuda = True

        def get_device(self) -> int:
            return 1

    current = [0]

    class Device:
        def __init__(self, device: torch.device) -> None:
            del device

        def __enter__(self) -> None:
            current.append(1)

        def __exit__(self, *error: object) -> None:
            current.pop()

    seen: list[int] = []
    kernel = {(1,): lambda *args: seen.append(current[-1])}
    monkeypatch.setattr(torch.cuda, "current_device", lambda: current[-1])
    monkeypatch.setattr(torch.cuda, "device", Device)
    launch(kernel, (1,), torch.ones(1))
    launch(kernel, (1,), None, torch.ones(1).as_subclass(Far))
    assert seen == [0, 1]
