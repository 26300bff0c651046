"""Experts that do not fit: a cache, an election and few bits, one by one and together."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from coterie.decoding.plans import parse_plan
from coterie.engine.engine import Engine
from coterie.engine.load import load_model
from coterie.evals.run import Arm
from coterie.evals.stats import ratio_interval
from coterie.experts.capacity import Capacity
from coterie.keys import to_json
from coterie.model.weights import expert_bytes
from coterie.naming import CoterieError
from coterie.planning.machine import Machine, clock, rate_of
from coterie.study.chapter import Drawing, Facts, Finding, Table
from coterie.study.experts_drawn import drawings
from coterie.study.experts_facts import LINKS, MAIN, SHARES, Found, Kept, Precision, Ratio, Run
from coterie.study.experts_told import conclusions, tables
from coterie.study.inmemory import Asked, answered, moves, sheet
from coterie.study.lab import Lab
from coterie.study.tally import Document, Tally

SIXTEEN: Mapping[torch.dtype, str] = {torch.bfloat16: "bf16", torch.float16: "fp16"}
FEW_BITS = ("int8", "int4")
RULES = (
    *("vanilla", "des-vote:beta=0.5", "des-vote:beta=0.3", "des-seq:k=3"),
    *("proportional-vote:beta=0.3", "priced-vote:price=0.022", "priced-vote:price=0.04"),
)
PREFERRING = (
    "resident-vote:beta=0.3",
    "priced-vote:price=0.022,resident_bonus=1,max_vote_loss=0.1",
)
PREFERRING_AT_MAIN = (
    "proportional-vote:beta=0.3,resident_bonus=3,max_vote_loss=0.2",
    "priced-vote:price=0.04,resident_bonus=1,max_vote_loss=0.1",
)
DRIFTING, DRIFT = PREFERRING[1], 0.05  # a block's coresets kept while they lose no more votes
FEWER = 2  # where residents are preferred, other runs than the main ones ask one in so many

Numbers = NDArray[np.int64]


@dataclass(frozen=True)
class Counted:
    """One run as it was measured: per answer, what its memories brought and its forwards."""

    asked: Asked
    tally: Tally
    passes: int
    decoding: Numbers  # [n]
    moved: Mapping[str, Numbers]  # share -> experts [n]
    kept: Mapping[str, Kept]


@dataclass(frozen=True)
class Experts:
    """Policy x share of the experts in memory x precision: accuracy, hits, bytes, forwards."""

    name: str = "experts"
    title: str = "Experts that do not fit: caching, election and few bits"
    question: str = (
        "Where only some of the experts are in fast memory, can a cache cut what is moved and keep "
        "answers and forwards, and what do experts in few bits add, at what cost?"
    )

    def measure(self, lab: Lab) -> Facts:
        model, commits = lab.engine.model, commits_apart(lab.engine)
        names = precisions_of(lab.engine)
        measured: list[tuple[Precision, list[Counted]]] = []
        left_out: list[dict[str, str]] = []
        for place, name in enumerate(names):

            def tell(share: float, doing: str, place: int = place) -> None:
                lab.tell((place + share) / len(names), doing)

            try:
                engine = opened(lab.engine, name)
            except CoterieError as error:
                left_out.append({"name": name, "why": str(error)})
                continue
            precision = said_of(engine, name)
            asked = wanted(engine, lab, commits=commits, whole=not measured)
            measured.append((precision, count(lab, engine, precision, asked, tell)))
            del engine  # the next one may need its room
        if not measured:
            raise CoterieError("; ".join(one["why"] for one in left_out))
        found = Found(
            experts=model.spec.router.experts,
            k=model.spec.router.k,
            layers=len(model.spec.moe_layers),
            block=lab.engine.generation.block,
            main=MAIN,
            commits=commits,
            precisions=[precision for precision, _ in measured],
            left_out=left_out,
            runs=[run for one in measured for run in told_of(*one, measured[0])],
        )
        return cast("Facts", found)

    def drawings(self, facts: Facts) -> Sequence[Drawing]:
        return drawings(facts)

    def tables(self, facts: Facts) -> Sequence[Table]:
        return tables(facts)

    def findings(self, facts: Facts) -> Sequence[Finding | str]:
        return conclusions(facts)


def precisions_of(engine: Engine) -> list[str]:
    """16 bits, then fewer; of experts that came in few bits, only these."""
    form = engine.model.spec.expert_format
    whole = SIXTEEN.get(engine.model.transformer.dtype, "bf16")
    return [whole, *FEW_BITS] if form is None else [form.name]


def opened(engine: Engine, name: str) -> Engine:
    """The same model with its experts so, everything else in 16 bits; raises CoterieError where it
    cannot be made, or there is no room beside the one that is loaded."""
    model = engine.model
    dtype = model.transformer.dtype
    there = model.spec.expert_format
    if (there is not None and there.name == name) or SIXTEEN.get(dtype) == name:
        return engine
    made = load_model(
        model.folder,
        dtype=dtype if dtype in SIXTEEN else torch.bfloat16,
        device=model.transformer.device,
        experts=name if name in FEW_BITS else None,
    )
    return Engine(made, generation=engine.generation)


def said_of(engine: Engine, name: str) -> Precision:
    spec, dtype = engine.model.spec, engine.model.transformer.dtype
    return Precision(
        name=name,
        dtype=str(dtype).removeprefix("torch."),
        expert_bytes=expert_bytes(replace(spec, panels=False), dtype),
    )


def commits_apart(engine: Engine) -> bool:
    """Whether a finished block's keys are written in a forward of their own."""
    return parse_plan(engine.generation.plan).gaze.terms.stores


def slots_by_share(engine: Engine) -> dict[str, int]:
    """Of each layer; shares that are less than one expert are left out."""
    experts = engine.model.spec.router.experts
    parsed = {share: Capacity.parse(share) for share in SHARES}
    return {
        share: one.slots(layers=1, experts=experts, size=1)
        for share, one in parsed.items()
        if one.amount * experts >= 1
    }


def wanted(engine: Engine, lab: Lab, *, commits: bool, whole: bool) -> list[Asked]:
    """Vanilla first. In the first precision (``whole``) every rule with both kinds of commits."""
    slots, few = slots_by_share(engine), -(-lab.items // FEWER)
    usual = {"commit": "policy"} if commits else {}
    asked = [Asked(Arm(rule, {} if rule == "vanilla" else usual), lab.items) for rule in RULES]
    for share, here in slots.items():
        main = whole and share == MAIN
        rules = (*PREFERRING, *(PREFERRING_AT_MAIN if main else ()))
        many = lab.items if main else few
        asked += [Asked(Arm(rule, usual), many, here) for rule in rules]
        asked += [Asked(Arm(DRIFTING, {**usual, "drift": DRIFT}), many, here)] if main else []
    if whole and commits:
        other = {"commit": "vanilla"}
        asked += [Asked(Arm(rule, other), lab.items) for rule in RULES if rule != "vanilla"]
        rules = (*PREFERRING, *PREFERRING_AT_MAIN)
        asked += [
            Asked(Arm(rule, other), lab.items, slots[MAIN]) for rule in rules if MAIN in slots
        ]
    return asked


def count(
    lab: Lab,
    engine: Engine,
    precision: Precision,
    asked: Sequence[Asked],
    tell: Callable[[float, str], None],
) -> list[Counted]:
    """Every run, answered where its logbook does not have it yet, and what memories brought."""
    folder = (lab.answers or lab.folder / "items") / "experts" / precision["name"]
    by_share, total, done = slots_by_share(engine), sum(one.items for one in asked), 0
    found = []
    for one in asked:

        def heard(share: float, one: Asked = one, before: int = done) -> None:
            tell((before + share * one.items) / total, f"{precision['name']}, {one.arm.name}")

        entries = answered(engine, lab.tasks, one, folder, heard)
        done += one.items
        shares = {s: n for s, n in by_share.items() if one.slots in (None, n)}
        kept, moved = {}, {}
        for share, slots in shares.items():
            memory = moves(entries, slots)
            moved[share] = memory.by_answer(memory.loads, len(entries))
            kept[share] = Kept(
                share=share,
                slots=slots,
                used=int(memory.used.sum()),
                moved=int(memory.loads.sum()),
                moved_decoding=int(memory.loads[memory.decoded].sum()),
                to_vanilla=None,
                to_whole=None,
                ms={
                    link: 1e3 * clock(
                        Machine(rate_of(link, "link")), memory.used, memory.loads,
                        precision["expert_bytes"], decoding=len(entries),
                    ).forward
                    for link in LINKS
                },
            )  # fmt: skip
        found.append(
            Counted(
                asked=one,
                tally=Tally.of_sheet(sheet(one, entries)),
                passes=sum(len(entry.kinds) for entry in entries),
                decoding=np.array([entry.answer.forwards for entry in entries]),
                moved=moved,
                kept=kept,
            )
        )
    return found


def told_of(
    precision: Precision, counted: Sequence[Counted], first: tuple[Precision, Sequence[Counted]]
) -> Iterator[Run]:
    """As the record has them, held against vanilla and against the first precision."""
    vanilla, whole = counted[0], first[1] if first[0] is not precision else []
    same = {(one.asked.arm.name, one.asked.slots): one for one in whole}
    size = precision["expert_bytes"] / first[0]["expert_bytes"]
    for one in counted:
        before = same.get((one.asked.arm.name, one.asked.slots))
        yield Run(
            precision=precision["name"],
            policy=label_of(one.asked.arm),
            commit=str(one.asked.arm.generation.get("commit", "")),
            looks=one.asked.slots is not None,
            items=len(one.decoding),
            tally=fields_of(one.tally),
            passes=one.passes / len(one.decoding),
            decoding=float(one.decoding.mean()),
            to_vanilla=ratio(one.decoding, vanilla.decoding),
            to_whole=None if before is None else ratio(one.decoding, before.decoding),
            kept=[
                Kept(**{**kept, "to_vanilla": _moved_ratio(one, vanilla, share),
                        "to_whole": _moved_ratio(one, before, share, size)})
                for share, kept in one.kept.items()
            ],
        )  # fmt: skip


def label_of(arm: Arm) -> str:
    """As tables call it: without who routes commits."""
    drift = arm.generation.get("drift")
    return arm.policy if drift is None else f"{arm.policy} --drift {drift}"


def fields_of(tally: Tally) -> Document:
    """Without what follows from the rest."""
    return to_json(tally)


def ratio(parts: Numbers, wholes: Numbers, scale: float = 1.0) -> Ratio:
    """Of the sums over the answers that both have, times ``scale``; paired bootstrap."""
    n = min(len(parts), len(wholes))
    one, other = (x[:n].astype(float).tolist() for x in (parts, wholes))
    value = sum(one) / max(sum(other), 1e-9)
    return [scale * end for end in (value, *ratio_interval(one, other))]


def _moved_ratio(
    one: Counted, other: Counted | None, share: str, scale: float = 1.0
) -> Ratio | None:
    """None where everybody stays in memory: then nothing moves but once."""
    if other is None or other is one or share == SHARES[0]:
        return None
    return ratio(one.moved[share], other.moved[share], scale)
