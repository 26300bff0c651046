"""The whole model, writing text while it routes as a drawn trace did."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from random import Random

import numpy as np
from offload_parts.bench import POLICIES, RESIDENT, SHARE, Arm, Bench, Found, named, play, tell

from coterie.lab.records import Measurement
from coterie.lab.replay.following import TimedRun, TraceDrivenModel, add_commits, run_trace
from coterie.lab.replay.judging import concatenate_runs, validate
from coterie.lab.replay.learning import TimedForwards
from coterie.lab.replay.synthetic import LLADA2_MINI
from coterie.lab.replay.trace import Trace
from coterie.loading.load import Model, load_model
from coterie.offload.store import TrackedExpertStore

# Room for all that vanilla uses, for what comes in waves is not in the clock; and three numbers of
# experts, for one alone does not tell computing them from all else.
TEACHERS: tuple[Arm, ...] = tuple(
    (one, "40%") for one in (*POLICIES[:2], play("des-vote:beta=0.2"))
)
ARMS: tuple[Arm, ...] = (
    *((one, SHARE) for one in POLICIES),
    (play(RESIDENT, commits=False), SHARE),
)


def measure(bench: Bench, *, blocks: int, rounds: int) -> Found:
    """Teachers write two blocks, the others all."""
    model, stores = opened(bench, {share for _, share in (*TEACHERS, *ARMS)})
    trace = add_commits(bench.drawn(len(bench.spec.moe_layers), blocks))
    brief = add_commits(bench.drawn(len(bench.spec.moe_layers), min(2, blocks)))
    traces = {arm: brief if arm in TEACHERS else trace for arm in (*TEACHERS, *ARMS)}
    found = in_turns(model, lambda arm: stores[arm[1]], traces, rounds)
    runs, replays = {}, {}
    for arm, ran in found.items():
        replays[arm] = bench.foretold(traces[arm], arm)
        counts = replays[arm].used, replays[arm].loads
        runs[named(arm)] = concatenate_runs([TimedForwards(*counts, one.seconds) for one in ran])
    judged = validate(runs, [named(arm) for arm in TEACHERS], bench.size)
    tell(judged)
    vanilla = found[ARMS[0]]
    told = {
        named(arm): {
            **written(bench, ran, vanilla if arm in ARMS else found[TEACHERS[0]]),
            "loads_as_replayed": all(
                (one.loads == replays[arm].loads.sum(-1)).all() for one in ran
            ),
        }
        for arm, ran in found.items()
    }
    facts = {**bench.about(trace), "foretelling": judged.to_dict(), "runs": told}
    return "Offload whole model", measured(found), facts


def resident(bench: Bench, *, blocks: int, rounds: int) -> Found:
    """Experts mapped, each in the system's cache of files."""
    model = load_model(bench.folder, dtype="bf16", device="cpu")
    store = model.store
    trace = add_commits(bench.drawn(len(bench.spec.moe_layers), blocks))
    arms = [(one, "100%") for one in POLICIES[:2]]
    found = in_turns(model, lambda arm: store, dict.fromkeys(arms, trace), rounds)
    told = {named(arm): written(bench, ran, found[arms[0]]) for arm, ran in found.items()}
    facts = {**bench.about(trace), "runs": told}
    return "Offload whole model resident", measured(found), facts


def opened(bench: Bench, shares: set[str]) -> tuple[Model, dict[str, TrackedExpertStore]]:
    """One model, and a store for each share of the experts."""
    models = {
        share: load_model(bench.folder, dtype="bf16", device="cpu", expert_memory=share)
        for share in sorted(shares)
    }
    return models[SHARE], {share: model.store for share, model in models.items()}


def in_turns(
    model: Model,
    store: Callable[[Arm], TrackedExpertStore],
    traces: Mapping[Arm, Trace],
    rounds: int,
) -> dict[Arm, list[TimedRun]]:
    """Every arm once a round, in an order drawn anew, its slots empty at first. Before all of them
    a block under vanilla through every store: first forwards, and slots never touched, are slow."""
    follows = {id(trace): TraceDrivenModel(trace) for trace in traces.values()}
    found: dict[Arm, list[TimedRun]] = {arm: [] for arm in traces}
    for arm in {arm[1]: arm for arm in traces}.values():
        short = replace(traces[arm], forwards=traces[arm].forwards[: LLADA2_MINI.steps])
        run_trace(model, TraceDrivenModel(short), POLICIES[0], store(arm))
    draw = Random(0)
    for _ in range(rounds):
        order = list(traces)
        draw.shuffle(order)
        for arm in order:
            kept = store(arm)
            kept.reset()
            ran = run_trace(model, follows[id(traces[arm])], arm[0], kept)
            found[arm].append(ran)
            print(
                f"{named(arm)}: {1e3 * ran.seconds.sum() / ran.decode_forwards:.0f} ms a forward, "
                f"{ran.tokens_per_second:.2f} tokens/s",
                flush=True,
            )
    return found


def written(
    bench: Bench, ran: Sequence[TimedRun], vanilla: Sequence[TimedRun]
) -> dict[str, object]:
    """Of all turns together; forwards that commit are laid on those that decode."""
    decoding, moved = sum(one.decode_forwards for one in ran), bytes_of(bench, ran)
    seconds = sum(float(one.seconds.sum()) for one in ran)
    usual = bytes_of(bench, vanilla)
    used = sum(int(one.used.sum()) for one in ran)
    first = {kind: one_kind(ran, kind) for kind in ("decode", "commit")}
    passes = sum(len(one.kinds) for one in ran)
    return {
        "blocks": ran[0].kinds.count("commit") + 1,
        "forwards": {kind: ran[0].kinds.count(kind) for kind in first},
        "experts_of_a_layer": used / passes / len(bench.spec.moe_layers) if used else None,
        "bytes_moved_a_forward": moved / decoding,
        "bytes_moved_against_vanilla": moved / usual if usual else None,
        "hit_rate": 1 - moved / bench.size / used if used else None,
        "ms_a_forward": 1e3 * seconds / decoding,
        "median_ms": first,
        "stall_ms_a_forward": 1e3 * sum(float(one.stalls.sum()) for one in ran) / decoding,
        "tokens_per_second": sum(one.tokens for one in ran) / seconds,
        "tokens_per_second_against_vanilla": (sum(one.tokens for one in ran) / seconds)
        / (sum(one.tokens for one in vanilla) / sum(float(v.seconds.sum()) for v in vanilla)),
    }


def one_kind(ran: Sequence[TimedRun], kind: str) -> float | None:
    """The median of its forwards, ms."""
    taken = [
        second
        for one in ran
        for second, what in zip(one.seconds, one.kinds, strict=True)
        if what == kind
    ]
    return 1e3 * float(np.median(taken)) if taken else None


def bytes_of(bench: Bench, ran: Sequence[TimedRun]) -> int:
    return bench.size * sum(int(one.loads.sum()) for one in ran)


def measured(found: Mapping[Arm, Sequence[TimedRun]]) -> list[Measurement]:
    speeds = [
        Measurement(
            f"{named(arm)}: written", "tokens/s", tuple(one.tokens_per_second for one in ran)
        )
        for arm, ran in found.items()
    ]
    return speeds + [
        Measurement(
            f"{named(arm)}: a forward",
            "ms",
            tuple(1e3 * float(one.seconds.sum()) / one.decode_forwards for one in ran),
        )
        for arm, ran in found.items()
    ]
