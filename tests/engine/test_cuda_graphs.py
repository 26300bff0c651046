"""Forwards that are played again say what they say when run: whatever changes is put in place."""

from __future__ import annotations

import importlib
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from graph_allocator import GraphAllocator, replaying
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import coterie
from coterie import ops
from coterie.decoding import sampling
from coterie.decoding.sampling import Sampling, propose
from coterie.engine import cuda_graphs
from coterie.engine.cuda_graphs import (
    CudaGraphCapture,
    CudaGraphs,
    ForwardOutput,
    GraphInputs,
    is_capturable,
)
from coterie.errors import NonFiniteLogitsError
from coterie.model.cache import KVCache
from coterie.model.forward_context import ForwardContext
from coterie.model.transformer import build
from coterie.model.weights import allocate, slabs
from coterie.offload.resident_store import ResidentExpertStore
from coterie.telemetry import ExpertCounter
from coterie.testing import FAMILY_CONFIGS, read_spec, tiny_config, write_checkpoint
from coterie.values import DecodeProgress, Window

PROMPTS = (list(range(3, 20)), list(range(5, 12)), list(range(40, 53)))
TWO_BLOCKS: dict[str, Any] = {"max_new_tokens": 16, "block": 8, "unmask": "fixed:steps=4"}


def again(work: Callable[[], ForwardOutput]) -> tuple[ForwardOutput, Callable[[], object]]:
    """Captures as a GPU does: what comes out stays where it is, and new numbers arrive there."""
    logits, counted = work()

    def replay() -> None:
        fresh, count = work()
        logits.copy_(fresh)
        for row, seen in counted._stats.items():
            for (_, figures), (_, new) in zip(seen, count._stats[row], strict=True):
                figures.copy_(new)

    return (logits, counted), replay


class Counted:
    """A capture that remembers how often it was asked, and what it gave replayed."""

    def __init__(self) -> None:
        self.captures = self.replays = 0

    def __call__(
        self, work: Callable[[], ForwardOutput]
    ) -> tuple[ForwardOutput, Callable[[], object]]:
        self.captures += 1
        outcome, replay = again(work)
        outcome[0].fill_(float("nan"))  # a capture only records: nothing was computed

        def counted() -> None:
            self.replays += 1
            replay()

        return outcome, counted


def told(engine: coterie.Engine, **options: Any) -> list[object]:
    """What becomes of all prompts, one after the other and then together."""
    alone = [engine.generate(prompt, **options) for prompt in PROMPTS]
    for prompt in PROMPTS:
        engine.submit(prompt, **options)
    together = []
    while engine.rows:
        together += [event for event in engine.step() if isinstance(event, coterie.Finished)]
    results = alone + [event.result for event in sorted(together, key=lambda event: event.row)]
    return [(r.tokens, r.forwards, r.experts, r.vote_mass_kept) for r in results]


@pytest.mark.parametrize(
    ("family", "policy", "options"),
    [
        ("llada2", "vanilla", {}),
        ("llada2", "des-vote:beta=0.3", {"temperature": 0.7, "seed": 3}),
        pytest.param("sdar-moe", "des-seq:k=2", {}, marks=pytest.mark.slow),
        ("llada-moe", "des-vote:beta=0.3,voters=masked", {"kv_cache": "dual:before=4,after=4"}),
        pytest.param("llada-moe", "naee:beta=0.2", {"kv_cache": "prefix"}, marks=pytest.mark.slow),
        ("llada-moe", "xshare:beta=0.3", {"kv_cache": "uncached", "unmask": "entropy:bound=0.5"}),
    ],
)
def test_replayed_forwards_equal_eager_ones(
    tmp_path: Path, family: str, policy: str, options: dict[str, object]
) -> None:
    folder = write_checkpoint(tmp_path, family, seed=5)
    engine = coterie.load(folder, device="cpu", policy=policy)
    options = TWO_BLOCKS | options
    expected = told(engine, **options)
    capture = Counted()
    engine._graphs = CudaGraphs(engine.model.transformer, capture)
    assert told(engine, **options) == expected
    assert capture.captures > 0
    assert capture.replays > capture.captures


def test_longer_sequences_attend_to_all_positions(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llada2", seed=6)
    engine = coterie.load(folder, device="cpu")
    prompts = [[3 + i % 80 for i in range(length)] for length in (20, 300, 250)]
    expected = [engine.generate(prompt, **TWO_BLOCKS).tokens for prompt in prompts]
    engine._graphs = CudaGraphs(engine.model.transformer, Counted())
    assert [engine.generate(prompt, **TWO_BLOCKS).tokens for prompt in prompts] == expected


def test_failed_capture_warns_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def failing(work: Callable[[], ForwardOutput]) -> tuple[ForwardOutput, Callable[[], object]]:
        raise RuntimeError("operation not permitted when stream is capturing\nand more")

    folder = write_checkpoint(tmp_path, "llada2", seed=7)
    engine = coterie.load(folder, device="cpu")
    expected = told(engine, **TWO_BLOCKS)
    engine._graphs = CudaGraphs(engine.model.transformer, failing)
    with caplog.at_level(logging.WARNING, logger="coterie"):
        assert told(engine, **TWO_BLOCKS) == expected
    (record,) = caplog.records
    assert "under vanilla" in record.getMessage()
    assert "not permitted when stream is capturing)" in record.getMessage()


def graphs_of(engine: coterie.Engine, monkeypatch: pytest.MonkeyPatch) -> GraphAllocator:
    """Gives the engine graphs that are captured as on a GPU."""
    allocator = GraphAllocator()
    allocator.install(monkeypatch)
    engine._graphs = CudaGraphs(engine.model.transformer, replaying(CudaGraphCapture(), again))
    return allocator


def test_graphs_survive_a_growing_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """A second row joins, and a prompt outgrows the cache: each replaces the cache's memory."""
    engine = coterie.load(write_checkpoint(tmp_path, "llada2", seed=5), device="cpu")
    long_prompt = [3 + i % 80 for i in range(300)]
    expected = told(engine, **TWO_BLOCKS), engine.generate(long_prompt, **TWO_BLOCKS).tokens
    allocator = graphs_of(engine, monkeypatch)
    replays = []
    for _ in range(2):
        found = told(engine, **TWO_BLOCKS), engine.generate(long_prompt, **TWO_BLOCKS).tokens
        assert found == expected
        replays.append(allocator.replays)
    assert 0 < replays[0] < replays[1]
    assert not caplog.records
    allocator.draw()


class FailingLayer:
    """A feed-forward network that cannot be captured under one policy."""

    def __init__(self, inner: Any, allocator: GraphAllocator, policy: object) -> None:
        self.inner, self.allocator, self.policy = inner, allocator, policy

    def __call__(self, x: torch.Tensor, context: ForwardContext, importance: object) -> object:
        if context.policy == self.policy and self.allocator.recording:
            raise RuntimeError("operation not permitted when stream is capturing")
        return self.inner(x, context, importance)


def test_other_policies_replay_after_a_failed_capture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    engine = coterie.load(write_checkpoint(tmp_path, "llada2", seed=6), device="cpu")
    policies = ("des-vote:beta=0.5", "vanilla", "des-seq:k=2")
    expected = [told(engine, policy=policy, **TWO_BLOCKS) for policy in policies]
    allocator = graphs_of(engine, monkeypatch)
    assert told(engine, policy=policies[1], **TWO_BLOCKS) == expected[1]
    transformer = engine.model.transformer
    first, *rest = transformer.layers
    failing = FailingLayer(first.feed_forward, allocator, coterie.parse_policy(policies[0]))
    engine.model = replace(
        engine.model,
        transformer=replace(transformer, layers=(replace(first, feed_forward=failing), *rest)),
    )
    engine._graphs._transformer = engine.model.transformer
    for policy, wanted in zip(policies, expected, strict=True):
        before = allocator.replays
        assert told(engine, policy=policy, **TWO_BLOCKS) == wanted
        assert (allocator.replays > before) == (policy != policies[0])
        assert allocator.streams == ["default"]
        allocator.draw()
    assert len(caplog.records) == 1


def test_the_least_recently_used_graph_is_evicted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda_graphs, "MAX_GRAPHS", 2)
    engine = coterie.load(write_checkpoint(tmp_path, "llada2", seed=7), device="cpu")
    capture = Counted()
    engine._graphs = CudaGraphs(engine.model.transformer, capture)
    options: dict[str, Any] = {
        "kv_cache": "block-causal-uncached", "unmask": "fixed:steps=4",
        "max_new_tokens": 8, "block": 8,
    }  # fmt: skip
    for policy in ("vanilla", "des-vote:beta=0.5", "vanilla", "des-seq:k=2", "vanilla"):
        engine.generate(list(range(8)), policy=policy, **options)
    assert capture.captures == 3


def test_host_dependent_policies_are_not_captured(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llada2", seed=8)
    engine = coterie.load(folder, device="cpu")
    capture = Counted()
    engine._graphs = CudaGraphs(engine.model.transformer, capture)
    engine.generate(PROMPTS[0], policy="random:beta=0.3", max_new_tokens=16, block=8)
    smooth = "threshold:p=0.9+smooth:weight=0.3"
    engine.generate(PROMPTS[0], unmask=smooth, max_new_tokens=16, block=8)
    assert capture.captures == 0
    assert is_capturable(coterie.parse_policy("des-vote:beta=0.15"))
    for asking in ("mc-moe:beta=0.6", "coreset:vote=random,m=4", "priced-vote:price=0.07"):
        assert not is_capturable(coterie.parse_policy(asking))


def test_non_finite_logits_raise_and_write_nothing(tmp_path: Path) -> None:
    folder = write_checkpoint(tmp_path, "llada2", seed=9)
    engine = coterie.load(folder, device="cpu")
    engine._graphs = CudaGraphs(engine.model.transformer, Counted())
    row = engine.submit(PROMPTS[0], max_new_tokens=16, block=8)
    while engine.sequence(row).next_pass.kind != "decode":
        engine.step()
    engine.model.transformer.norm.fill_(float("nan"))
    before = engine.sequence(row).canvas.tokens.clone()
    with pytest.raises(coterie.CoterieError, match="final norm returned NaN"):
        engine.step()
    assert torch.equal(engine.sequence(row).canvas.tokens, before)


class Asking(TorchDispatchMode):
    """Collects what would make the host wait for a device, or the device for the host's memory."""

    ASKS = frozenset(("nonzero", "_local_scalar_dense", "masked_select", "equal", "is_nonzero"))

    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        leaves = tree_flatten((args, kwargs, out))[0]
        devices = {leaf.device.type for leaf in leaves if isinstance(leaf, torch.Tensor)}
        if len(devices) > 1 or func._schema.name.removeprefix("aten::") in self.ASKS:
            self.found.append(func._schema.name)
        return out


@pytest.mark.parametrize(
    ("family", "kernels", "most"),
    [
        *((family, False, 2) for family in sorted(FAMILY_CONFIGS) if family != "llada2"),
        ("llada2", True, 3),
        pytest.param("llada2", False, 99, marks=pytest.mark.slow),
        pytest.param("llada2", True, 99, marks=pytest.mark.slow),
    ],
)
def test_forward_does_not_synchronize(
    monkeypatch: pytest.MonkeyPatch, family: str, kernels: bool, most: int
) -> None:
    """A device that holds no numbers at all: whoever asks for one finds out."""
    pytest.importorskip("triton", reason="NOT TESTED: kernels for a GPU (triton is not installed)")
    for name in ("attention", "dispatch", "experts", "routing", "elementwise"):
        module = importlib.import_module(f"coterie.ops.triton.{name}")
        monkeypatch.setattr(module, "launch", lambda *args, **constants: None)
    triton = importlib.import_module("coterie.ops.triton")
    monkeypatch.setattr(ops, "run_experts", triton.run_experts)
    if kernels:
        for name in ("fused_attention", "rms_norm"):
            monkeypatch.setattr(ops, name, getattr(triton, name))
        monkeypatch.setattr(ops, "activate_and_mul", lambda x, _: triton.silu_and_mul(x))
    monkeypatch.setattr(ops, "route", triton.route if kernels else lambda *args: None)
    _, spec = read_spec(tiny_config(family))
    weights = allocate(spec, torch.bfloat16, torch.device("meta"))
    transformer = build(spec, weights, ResidentExpertStore(slabs(spec, weights)))
    cache = KVCache.allocate(spec, 2, 64, dtype=torch.bfloat16, device="meta")

    def there(*shape: int, dtype: torch.dtype = torch.int64) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    masked, after_eos = (there(2, 8, dtype=torch.bool) for _ in range(2))
    for policy in filter(is_capturable, map(coterie.parse_policy, CAPTURABLE[:most])):
        counting = ExpertCounter()
        step = ForwardContext(
            Window(there(2), 8, there(2)),
            cache,
            policy,
            counting,
            logits_indices=there(16),
            voters=there(2, 8, dtype=torch.float32),
            progress=DecodeProgress(masked, after_eos, there(2, 8, dtype=torch.float32)),
        )
        with torch.inference_mode(), Asking() as asking:
            logits = transformer(there(2, 8), step)
            counting.on_forward(())
        assert (policy, asking.found) == (policy, [])
        assert logits.shape == (16, spec.vocabulary)


CAPTURABLE = (
    *("vanilla", "des-vote:beta=0.3", "topk:k=2", "naee:beta=0.2", "des-seq:k=2", "racing:m=4"),
    *("uniform-vote:beta=0.3", "xshare:beta=0.3", "mass-vote:tau=0.8", "resident-vote:beta=0.3"),
    *("des-vote:beta=0.3,voters=before-eos,protect=top1", "des-vote:beta=0.3,voters=masked"),
)


def test_inputs_are_copied_together() -> None:
    draw = torch.Generator().manual_seed(0)
    first, second = (
        {
            "ids": torch.randint(0, 99, (2, 5), generator=draw),
            "mask": torch.rand(2, 5, generator=draw) < 0.5,
            "doubt": torch.rand(3, generator=draw),
            "none": torch.zeros(0),
        }
        for _ in range(2)
    )
    inputs = GraphInputs.allocate(first, torch.device("cpu"))
    for values in (first, second):
        inputs.fill(values)
        assert all(torch.equal(inputs.device_views[name], values[name]) for name in values)


@pytest.mark.parametrize("entropy", [False, True])
@pytest.mark.parametrize("mask", [0, 7, 20])
def test_proposals_from_one_read_equal_many(
    monkeypatch: pytest.MonkeyPatch, mask: int, entropy: bool
) -> None:
    draw = torch.Generator().manual_seed(mask)
    logits = torch.randn(40, 21, generator=draw).mul(2).round()  # many ties
    logits[::3, mask] = 9.0
    for asked in (Sampling(), Sampling(0.8, top_k=5), Sampling(1.2, top_p=0.7)):
        near, far = (
            (
                monkeypatch.setattr(sampling, "_is_on_device", lambda _, answer=answer: answer),
                propose(logits, asked, mask, torch.Generator().manual_seed(1), entropy=entropy),
            )[1]
            for answer in (False, True)
        )
        for name, value in vars(near).items():
            other = getattr(far, name)
            assert value is other or (torch.equal(value, other) and value.dtype == other.dtype)


def test_non_finite_logits_do_not_advance_the_generator(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "_is_on_device", lambda _: True)
    generator = torch.Generator().manual_seed(1)
    before = generator.get_state()
    for bad in (float("nan"), float("inf"), float("-inf")):
        logits = torch.zeros(4, 9)
        logits[2, 3] = bad
        with pytest.raises(NonFiniteLogitsError):
            propose(logits, Sampling(0.5), 0, generator)
        assert torch.equal(generator.get_state(), before)
