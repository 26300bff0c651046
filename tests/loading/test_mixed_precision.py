"""Whole models in two precisions: from two folders, behind one memory, on the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from offload_cases import OPTIONS, PROMPT, load_engine, needs_kernels
from policy_strategies import law
from precision_reference import PrecisionReference, experts_moved
from tiny_checkpoints import converted_checkpoint, tiny_checkpoint
from torch import Tensor

from coterie.checkpoints.manifest import MANIFEST
from coterie.cli.entry import run
from coterie.engine.engine import Engine
from coterie.errors import CoterieError
from coterie.lab.evals.run import run_identity
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.loading.low_precision import (
    LowPrecisionExperts,
    PrecisionPolicy,
    PromoteUsed,
    StaticVotes,
    VoteMassPrecision,
    split_slots,
)
from coterie.loading.saved_votes import SavedVotes
from coterie.model.moe import MoE
from coterie.offload.mixed_precision_store import MixedPrecisionStore
from coterie.offload.resident_store import ResidentExpertStore
from coterie.values import ExpertRequest, Slab


@dataclass
class Plain:
    """All experts of two folders in memory; of each layer a plain rule says which one serves."""

    fine: ResidentExpertStore
    coarse: ResidentExpertStore
    rules: dict[int, PrecisionReference]

    capacity = None

    def serve(self, layer: int, demand: ExpertRequest) -> Iterator[Slab]:
        rule, everyone = self.rules[layer], range(len(demand.used))
        used, votes = demand.used.tolist(), demand.votes
        assert votes is not None
        rule.before_forward(used, votes.tolist())
        who = torch.tensor([expert in rule.high for expert in everyone])
        for held, mask in ((self.fine, who), (self.coarse, ~who)):
            slab = held.slabs[layer]
            yield replace(slab, slot_of=slab.slot_of.where(mask, -1))
        rule.after_forward(used)

    def resident(self, layer: int) -> Tensor | None:
        del layer
        return None


def folders(folder: Path, kinds: tuple[str, str], family: str = "llada2") -> tuple[Path, Path]:
    """One tiny model of 16 experts a layer, packed twice."""
    high, low = (converted_checkpoint(folder / kind, family, kind) for kind in kinds)
    return high, low


def plainly(fine: Path, coarse: Path, own: MixedPrecisionStore) -> tuple[Engine, Plain]:
    """An engine that answers by the plain rule, begun where ``own`` begins."""
    model = load_engine(fine).model
    held, others = model.store, load_engine(coarse).model.store
    assert isinstance(held, ResidentExpertStore)
    assert isinstance(others, ResidentExpertStore)
    rules = {}
    for layer in model.spec.moe_layers:
        votes = [float(vote) for vote in own.high.warm_votes.get(layer, np.zeros(16))]
        order = sorted(range(16), key=lambda e: (-votes[e], e))[: own.high.capacity]
        fine_first = {e for e in order if votes[e]}
        rules[layer] = PrecisionReference(
            own.high.capacity, own.max_promotions, own.vote_mass, fine_first, votes
        )
    store = Plain(held, others, rules)
    layers = tuple(
        replace(one, feed_forward=replace(one.feed_forward, store=store))
        if isinstance(one.feed_forward, MoE)
        else one
        for one in model.transformer.layers
    )
    transformer = replace(model.transformer, layers=layers)
    return Engine(replace(model, transformer=transformer)), store


def drawn_votes(layers: Sequence[int]) -> SavedVotes:
    draw = np.random.default_rng(1)
    return SavedVotes.of("drawn", layers, draw.integers(0, 9, (len(layers), 16)) / 1.0)


@needs_kernels
@pytest.mark.parametrize(
    ("family", "kinds", "memory", "placement"),
    [
        ("llada2", ("int8", "int4"), "35%", PromoteUsed(1)),
        ("llada-moe", ("int8", "int4"), "40%", VoteMassPrecision()),
        ("sdar-moe", ("bf16", "int4"), "35%", StaticVotes()),
        *(
            pytest.param(*case, marks=pytest.mark.slow)
            for case in (
                ("llada2", ("bf16", "int4"), "20%", PromoteUsed(3)),
                ("llada-moe", ("int8", "int4"), "70%", PromoteUsed()),
                ("llada2", ("bf16", "int4"), "25%", VoteMassPrecision(0.4)),
                ("llada2", ("int8", "int4"), "75%", StaticVotes()),
            )
        ),
    ],
)
def test_model_matches_the_precision_reference(
    tmp_path: Path, family: str, kinds: tuple[str, str], memory: str, placement: PrecisionPolicy
) -> None:
    fine, coarse = folders(tmp_path, kinds, family)
    layers = load_engine(fine).model.spec.moe_layers
    warm = drawn_votes(layers) if isinstance(placement, StaticVotes) else None
    asked = ExpertMemoryConfig.parse(
        memory, warm_start=warm, fallback_model=LowPrecisionExperts(coarse, placement)
    )
    own = load_engine(fine, asked)
    store = mixed_of(own)
    reference, plain = plainly(fine, coarse, store)
    for policy in ("vanilla", "des-vote:beta=0.3"):
        found, true = (one.generate(PROMPT, policy=policy, **OPTIONS) for one in (own, reference))
        assert found.tokens == true.tokens
    for layer in layers:
        here = set(np.flatnonzero(store.high.layer_cache(layer).slots.resident).tolist())
        assert here == plain.rules[layer].high
    assert (store.precision_stats.promotions > 0) == (not isinstance(placement, StaticVotes))
    assert 0 < store.precision_stats.high_share_sum < store.precision_stats.forwards
    assert store.precision_stats.bound_sum > 0


def mixed_of(engine: Engine) -> MixedPrecisionStore:
    store = engine.model.store
    assert isinstance(store, MixedPrecisionStore)
    return store


@needs_kernels
def test_two_precisions_that_fit_read_each_expert_once(tmp_path: Path) -> None:
    fine, coarse = folders(tmp_path, ("int8", "int4"))
    warm = drawn_votes(load_engine(fine).model.spec.moe_layers)
    engine = load_engine(
        fine,
        ExpertMemoryConfig.parse(
            "75%", warm_start=warm, fallback_model=LowPrecisionExperts(coarse, StaticVotes())
        ),
    )
    store = mixed_of(engine)
    assert store.high.capacity + store.low.capacity == 16
    engine.generate(PROMPT, **OPTIONS)
    traffic = store.traffic_log.traffic()
    places = (store.high.capacity, store.low.capacity)
    assert experts_moved(store) == {"disk, int8": 2 * places[0], "disk, int4": 2 * places[1]}
    assert traffic.hit_rate == 1
    sizes = (store.high.expert_bytes, store.low.expert_bytes)
    assert traffic.bytes_moved == 2 * sum(a * b for a, b in zip(places, sizes, strict=True))


@needs_kernels
def test_run_identity_fingerprints_the_fallback_model(tmp_path: Path) -> None:
    fine, coarse = folders(tmp_path, ("int8", "int4"))
    asked = [ExpertMemoryConfig.parse("75%", fallback_model=LowPrecisionExperts(coarse))]
    moved_to = coarse.rename(tmp_path / "elsewhere")
    asked.append(ExpertMemoryConfig.parse("75%", fallback_model=LowPrecisionExperts(moved_to)))
    coarse.symlink_to(moved_to)
    found = [run_identity(load_engine(fine, memory), [])["memory"] for memory in asked]
    assert found[0] == found[1]
    config = moved_to / "config.json"
    config.write_text(config.read_text() + "\n")
    assert run_identity(load_engine(fine, asked[0]), [])["memory"] != found[0]


@needs_kernels
def test_two_folders_that_are_not_one_model_are_refused(tmp_path: Path) -> None:
    fine, coarse = folders(tmp_path / "a", ("int8", "int4"))
    other = tiny_checkpoint(tmp_path / "seed", seed=1)
    converted_checkpoint(tmp_path / "seed-int4", kind="int4", seed=1)
    converted_checkpoint(tmp_path / "wider-int4", kind="int4", vocab_size=100, mask_token_id=95)
    for first, second, told in (
        (fine, tmp_path / "seed-int4", "not made from the weights"),
        (fine, tmp_path / "wider-int4", "vocab_size is 100, not 96"),
        (coarse, fine, "are not smaller"),
        (fine, other, "packed checkpoint"),
    ):
        with pytest.raises(CoterieError, match=told):
            load_engine(
                first, ExpertMemoryConfig.parse("35%", fallback_model=LowPrecisionExperts(second))
            )
    for folder in (tmp_path / "seed-int4", coarse):  # where no source is told, weights decide
        listed = json.loads((folder / MANIFEST).read_text())
        (folder / MANIFEST).write_text(json.dumps({**listed, "source": None}))
    with pytest.raises(CoterieError, match="not made from the weights"):
        load_engine(
            fine,
            ExpertMemoryConfig.parse(
                "35%", fallback_model=LowPrecisionExperts(tmp_path / "seed-int4")
            ),
        )
    assert mixed_of(
        load_engine(
            fine, ExpertMemoryConfig.parse("35%", fallback_model=LowPrecisionExperts(coarse))
        )
    )


@needs_kernels
@pytest.mark.parametrize(
    ("memory", "placement", "told"),
    [
        ("35%", "static", "warm_start"),
        ("100%", "promote", "fallback_model` has no effect"),
        ("1", "promote:share=0.5", "less than one of each"),
        ("35%", "promote:share=1", "share must be at least 0.01"),
        ("35%", "promote:most=0", "most must be at least 1"),
        ("35%", "best", "unknown precision policy 'best'; known: promote, static, vote-mass"),
    ],
)
def test_two_precisions_that_cannot_be_had_are_refused(
    tmp_path: Path, memory: str, placement: str, told: str
) -> None:
    fine, few = folders(tmp_path, ("int8", "int4"))
    with pytest.raises(CoterieError, match=told):
        load_engine(
            fine,
            ExpertMemoryConfig.parse(
                memory, fallback_model=LowPrecisionExperts.parse(str(few), placement)
            ),
        )


@given(st.integers(1, 300), st.floats(0.01, 0.99), st.integers(2, 40), st.integers(1, 39))
@law(100)
def test_a_split_stays_inside_its_memory(
    room: int, share: float, experts: int, coarse: int
) -> None:
    fine = 40
    try:
        high_slots, low_slots = split_slots(
            room * 10, share, experts=experts, high_bytes=fine, low_bytes=coarse
        )
    except CoterieError:
        return
    assert high_slots * fine + low_slots * coarse <= room * 10
    assert high_slots >= 1
    assert low_slots >= 1
    assert high_slots + low_slots <= experts
    assert high_slots >= min(experts - 1, int(share * room * 10) // fine) or (
        high_slots + low_slots == experts
    )


@needs_kernels
def test_the_command_says_which_precision_served(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine, coarse = folders(tmp_path, ("int8", "int4"))
    words = ["generate", "5 17 33", "-m", str(fine), "-n", "8", "--block", "8", "--json"]
    words += [
        "--expert-memory",
        "50%",
        "--fallback-model",
        str(coarse),
        "--precision-policy",
        "promote:most=1",
    ]
    assert run(words) == 0
    said = capsys.readouterr()
    told = json.loads(said.out)
    precision, traffic = told["expert_precision"], told["expert_traffic"]
    slots = precision["fine_slots"], precision["coarse_slots"]
    assert f"{slots[0]} of 16 experts per layer in int8 and {slots[1]} in int4" in said.err
    assert traffic["slots"] == sum(slots)
    assert set(traffic["bytes_moved_from"]) == {"disk, int8", "disk, int4"}
    assert (precision["fine"], precision["coarse"]) == ("int8", "int4")
    assert precision["votes_fine"] + precision["votes_coarse"] == pytest.approx(1)
    assert 0 < precision["loss_bound"] < 1
    listed = json.loads((coarse / MANIFEST).read_text())
    for tensor in listed["tensors"].values():
        tensor.pop("error", None)
    (coarse / MANIFEST).write_text(json.dumps(listed))
    assert run(words) == 0
    said = capsys.readouterr()
    assert json.loads(said.out)["expert_precision"]["loss_bound"] is None
    assert "no quantization errors" in said.err


@needs_kernels
def test_an_option_of_two_precisions_without_them_is_an_error(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fine, coarse = folders(tmp_path, ("int8", "int4"))
    for options, told in (
        (["--fallback-model", str(coarse)], "--fallback-model has no effect"),
        (
            ["--expert-memory", "35%", "--precision-policy", "static"],
            "--precision-policy has no effect without",
        ),
    ):
        assert run(["generate", "5 17", "-m", str(fine), *options]) == 2
        said = capsys.readouterr()
        assert told in said.err
        assert said.err.count("\n") == 1
