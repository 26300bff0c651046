"""Experts computed on a CPU beside a GPU: any split gives the same sum; the best one is taken."""

from __future__ import annotations

import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offload_cases import (
    HIDDEN,
    LAYERS,
    OPTIONS,
    PROMPT,
    cached_store,
    cached_store_of,
    expert_blobs,
    fp32_slab,
    load_engine,
    moe_output,
    plain_or_packed_checkpoint,
    random_routings,
    simulate_gpu,
)
from policy_strategies import law

from coterie.cli.entry import run
from coterie.errors import CoterieError
from coterie.loading import cpu_experts, gpu_offload
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.offload.cpu_experts import BreakEven, CpuExperts, TokenLimit, parse_cpu_experts
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.tiers import HostTier
from coterie.ops import cpu
from coterie.values import ExpertRequest

simulated_gpu = pytest.mark.usefixtures("gpu")


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    simulate_gpu(monkeypatch)


seconds = st.floats(0, 1e-2, allow_subnormal=False)


@given(st.integers(1, 12), st.integers(1, 14), st.integers(0, 2**20), st.integers(0, 6))
@law(60)
def test_any_split_equals_resident(experts: int, capacity: int, seed: int, most: int) -> None:
    """To rounding; who was computed aside is neither moved nor a hit, and takes no slot."""
    whole = expert_blobs(experts, seed)
    everyone = {layer: fp32_slab(one, torch.arange(experts)) for layer, one in whole.items()}
    resident, own = ResidentExpertStore(everyone), cached_store(HostTier(whole), experts, capacity)
    own.cpu_experts = CpuExperts(TokenLimit(most), everyone)
    aside = 0
    for place, routing in enumerate(random_routings(experts, seed, count=6)):
        layer, tokens = LAYERS[place % 2], ExpertRequest(routing.used, routing).token_counts
        assert tokens is not None
        here = own.resident(layer)
        assert here is not None
        left = routing.used & ~here & (tokens <= most)
        aside += int(left.sum())
        x = torch.randn(5, HIDDEN, generator=torch.Generator().manual_seed(place))
        found, true = (moe_output(one, layer, routing, x) for one in (own, resident))
        torch.testing.assert_close(found, true, atol=1e-5, rtol=1e-5)
        now = own.resident(layer)
        assert now is not None
        assert not bool((now & left).any())
    traffic = own.traffic_log.traffic()
    assert traffic.on_cpu == aside
    assert traffic.experts_used == traffic.hits + traffic.experts_moved + traffic.on_cpu
    assert traffic.bytes_saved == (traffic.hits + traffic.on_cpu) * traffic.expert_bytes


@given(
    st.lists(st.tuples(st.booleans(), st.integers(0, 40)), min_size=1, max_size=8),
    st.tuples(seconds, seconds, seconds, seconds),
)
@law(80)
def test_no_split_ends_sooner(
    experts: list[tuple[bool, int]], prices: tuple[float, float, float, float]
) -> None:
    missed, tokens = np.array([one for one, _ in experts]), np.array([many for _, many in experts])
    even = BreakEven(*prices)

    def end(aside: tuple[int, ...]) -> float:
        alone = [even.expert_seconds + even.token_seconds * int(tokens[one]) for one in aside]
        copied = int(missed.sum()) - len(aside)
        return max(even.copy_seconds * copied, even.layer_seconds + sum(alone) if aside else 0.0)

    chosen = even.select(missed, tokens)
    assert not (chosen & ~missed).any()
    who = np.flatnonzero(missed).tolist()
    best = min(end(some) for count in range(len(who) + 1) for some in combinations(who, count))
    assert end(tuple(np.flatnonzero(chosen).tolist())) <= best * (1 + 1e-9)


@given(st.tuples(seconds, seconds, seconds, seconds))
@law(60)
def test_prices_are_read_off_three_layers(prices: tuple[float, float, float, float]) -> None:
    true = BreakEven(*prices)

    def took(experts: int, tokens: int) -> float:
        return true.layer_seconds + experts * (true.expert_seconds + true.token_seconds * tokens)

    found = BreakEven.from_timings(
        true.copy_seconds,
        one_expert=took(1, 1),
        many_experts=took(8, 1),
        full_experts=took(8, 8),
        experts=8,
        tokens=8,
    )
    for name, price in vars(true).items():
        assert getattr(found, name) == pytest.approx(price, abs=1e-9)


def test_slow_cpu_computes_no_miss_and_fast_cpu_all() -> None:
    missed, tokens = np.ones(5, dtype=bool), np.array([1, 9, 2, 4, 3])
    slow, fast = BreakEven(1e-4, 1.0, 0.0, 0.0), BreakEven(1e-2, 0.0, 1e-6, 1e-6)
    assert slow.select(missed, tokens).tolist() == [False] * 5
    assert fast.select(missed, tokens).tolist() == [True] * 5
    even = BreakEven(1.0, 0.0, 0.5, 0.25)
    assert even.select(missed, tokens).tolist() == [True, False, True, False, False]


@pytest.mark.parametrize("text", ["", "0", "-1", "some", "4.5"])
def test_what_is_no_choice_is_refused(text: str) -> None:
    with pytest.raises(CoterieError, match="cpu_experts"):
        parse_cpu_experts(text)


def test_a_choice_is_read() -> None:
    assert (parse_cpu_experts("off"), parse_cpu_experts("auto"), parse_cpu_experts("4")) == (
        None,
        "auto",
        TokenLimit(4),
    )


@simulated_gpu
@pytest.mark.parametrize(
    ("kept", "asked"), [("plain", "auto"), ("plain", "3"), ("bf16", "auto"), ("int8", "3")]
)
def test_a_model_answers_with_some_experts_on_the_cpu(
    tmp_path: Path, kept: str, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Few of its experts are in the slots; those that are missed by few tokens do not come."""
    folder = plain_or_packed_checkpoint(tmp_path, kept)
    fast = BreakEven(copy_seconds=1e-3, layer_seconds=0.0, expert_seconds=1e-3, token_seconds=1e-5)
    monkeypatch.setattr(gpu_offload, "measure_break_even", lambda *known, **how: fast)
    few = load_engine(folder, ExpertMemoryConfig.parse("35%", cpu_experts=asked))
    store = cached_store_of(few)
    assert store.cpu_experts is not None
    assert store.cpu_experts.selection == (fast if asked == "auto" else TokenLimit(3))
    true = load_engine(folder).generate(PROMPT, **OPTIONS)
    found = few.generate(PROMPT, **OPTIONS)
    traffic = store.traffic_log.traffic()
    assert traffic.on_cpu > 0
    assert traffic.experts_moved > 0
    if kept == "plain":  # the others' kernels round activations
        assert found.tokens == true.tokens
    else:
        same = sum(a == b for a, b in zip(found.tokens, true.tokens, strict=True))
        assert same >= len(true.tokens) // 2


@simulated_gpu
def test_prices_are_measured_on_the_machine(tmp_path: Path) -> None:
    few = load_engine(
        plain_or_packed_checkpoint(tmp_path, "int8"),
        ExpertMemoryConfig.parse("35%", cpu_experts="auto"),
    )
    store = cached_store_of(few)
    assert store.cpu_experts is not None
    choice = store.cpu_experts.selection
    assert isinstance(choice, BreakEven)
    assert choice.copy_seconds > 0
    assert choice.layer_seconds + choice.expert_seconds > 0
    assert "a copy takes" in store.cpu_experts.selection.describe()
    assert few.generate(PROMPT, **OPTIONS).tokens


@simulated_gpu
def test_kernels_need_memory_of_their_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not cpu.is_available():
        pytest.skip("the kernels for CPUs are not built")
    folder = plain_or_packed_checkpoint(tmp_path, "int8")
    monkeypatch.setattr(cpu_experts, "free_memory", lambda device: 5)
    with pytest.raises(CoterieError, match=r"more bytes of host memory .* 5 are free"):
        load_engine(folder, ExpertMemoryConfig.parse("35%", cpu_experts="auto"))


@simulated_gpu
def test_cpu_experts_without_effect_is_an_error(tmp_path: Path) -> None:
    folder = plain_or_packed_checkpoint(tmp_path, "int8")
    for memory, told in (
        (
            ExpertMemoryConfig.parse("auto", cpu_experts="auto"),
            "all experts fit into the GPU's memory",
        ),
        (
            ExpertMemoryConfig.parse("35%", host_memory="30KB", cpu_experts="4"),
            "needs all experts in host memory",
        ),
    ):
        with pytest.raises(CoterieError, match=told):
            load_engine(folder, memory)


def test_cpu_experts_needs_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = str(plain_or_packed_checkpoint(tmp_path, "int8"))
    words = ["generate", "5 17", "-m", folder, "--device", "cpu", "--cpu-experts", "auto"]
    assert run(words) == 2
    assert "--cpu-experts has no effect where all experts are in memory" in capsys.readouterr().err
    if cpu.is_available():
        assert run([*words, "--expert-memory", "5"]) == 2
        assert "which computes all experts" in capsys.readouterr().err


@simulated_gpu
def test_command_notes_the_cpu_selection(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = [
        "generate",
        "5 17 33",
        "-m",
        str(plain_or_packed_checkpoint(tmp_path, "plain")),
        "--device",
        "cpu",
    ]
    words += ["-n", "8", "--block", "8", "--json", "--expert-memory", "5", "--cpu-experts"]
    assert run([*words, "3"]) == 0
    said = capsys.readouterr()
    assert "needed by at most 3 tokens" in said.err
    assert "5 of 16 experts per layer in memory of the GPU" in said.err
    told = json.loads(said.out)["expert_traffic"]
    assert told["experts_on_cpu"] > 0
    assert run([*words, "auto"]) == 0
    assert "faster than a copy: a copy takes" in capsys.readouterr().err
    assert run([*words, "off"]) == 0
    said = capsys.readouterr()
    assert "computed on the CPU" not in said.err
    assert json.loads(said.out)["expert_traffic"]["experts_on_cpu"] == 0
