"""The summary of a study: the main findings, with the names of the sections that have details."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from coterie.lab.study.accuracy import (
    DES_SEQ,
    DES_VOTE,
    MIN_RELATIVE_ACCURACY,
    TOP_K,
    smallest_accurate,
)
from coterie.lab.study.experiment import ExperimentText, format_p
from coterie.lab.study.expert_cache_report import ResultGrid, lowest_traffic
from coterie.lab.study.report import ReportSection, collect_claims
from coterie.lab.study.results import VariantResult, VariantResults
from coterie.lab.study.speed import fastest_des

TEXT = ExperimentText.load("summary")
Records = Mapping[str, Any]  # experiment -> the facts of its record
Points = Iterator[str]  # the sentences of one experiment; none where its record has not enough


def summary_points(sections: Sequence[ReportSection], records: Records) -> list[tuple[str, str]]:
    """(name of the section with the details, sentence); only of experiments with a record."""
    points = [
        (name, text)
        for name, make in POINTS.items()
        if name in records
        for text in make(records[name])
    ]
    return [("", claims_sentence(sections)), *points]


def claims_sentence(sections: Sequence[ReportSection]) -> str:
    """How many claims hold; a claim with several verdicts counts by the worst one."""
    claims = collect_claims(sections)
    order = ("does not hold", "inconclusive", "holds")
    counts = Counter(next(v for v in order if v in claim.verdicts) for claim in claims)
    mixed = sum(len(set(claim.verdicts)) > 1 for claim in claims)
    return TEXT.sentence("claims", n=len(claims), counts=counts, mixed=mixed)


def _accuracy_points(record: Any) -> Points:
    """DES-Vote against others at equal experts, and the smallest DES policy that is accurate."""
    results = VariantResults.from_record(record)
    rivals = [_rival(results, label) for label in (TOP_K, DES_SEQ)]
    yield TEXT.sentence("rivals", rivals=" and ".join(filter(None, rivals)) or "not compared")
    vanilla, small = results.vanilla, _vote(results, "des-vote:beta=0.3")
    if small is None or not vanilla.accuracy:
        return
    best, kept = smallest_accurate(results), MIN_RELATIVE_ACCURACY
    fewer = 1 - best.experts / vanilla.experts if best else 0.0
    smallest = TEXT.sentence("smallest" if best else "none", best=best, fewer=fewer, kept=kept)
    relative = small.relative_accuracy(vanilla)
    yield TEXT.sentence("size", r=small, vanilla=vanilla, relative=relative, smallest=smallest)


def _rival(results: VariantResults, label: str) -> str:
    pairs = [pair for pair in results.pairs if pair[0] in results.groups[label]]
    changes = [vote.compare_to(other).difference for other, vote in pairs]
    if not changes:
        return ""
    better = sum(change > 0 for change in changes)
    return TEXT.sentence(
        "rival",
        word="more" if better else "less",
        label=label,
        count=better or len(pairs),
        n=len(pairs),
        low=min(changes),
        high=max(changes),
    )


def _control_points(record: Any) -> Points:
    elected, random, *_ = VariantResults.from_record(record).groups.values()
    pairs = [
        TEXT.sentence("control-pair", a=a, b=b, beta=a.policy.partition("beta=")[2])
        for a, b in zip(elected, random, strict=True)
    ]
    yield TEXT.sentence("control", pairs=", ".join(pairs))


def _half_k_points(record: Any) -> Points:
    results = VariantResults.from_record(record)
    full = next(iter(results.groups.values()))
    half = [results.by_name[name] for name in record["narrow"]]
    if full and half:
        yield TEXT.sentence("half-k", full=full[-1], half=half[-1], record=record)


def _own_policy_points(record: Any) -> Points:
    """The largest gain of a proportional or priced vote over DES-Vote at equal experts."""
    pairs = VariantResults.from_record(record).pairs
    changes = [(a.compare_to(b), a, b) for a, b in pairs if b.policy.startswith("des-vote")]
    if changes:
        change, own, vote = max(changes, key=lambda entry: entry[0].difference)
        p = format_p(change.p_value)
        yield TEXT.sentence("own", own=own, vote=vote, change=change, p=p)


def _forward_points(record: Any) -> Points:
    results = VariantResults.from_record(record)
    vanilla, small = results.vanilla, _vote(results, "des-vote:beta=0.15")
    if small is not None:
        share = small.experts_per_block / vanilla.experts_per_block
        yield TEXT.sentence("forwards", small=small, vanilla=vanilla, share=share)


def _speed_points(record: Any) -> Points:
    yield TEXT.sentence("speed", best=fastest_des(record))


def _cache_points(record: Any) -> Points:
    """The accurate policy with the lowest traffic at the main share of memory."""
    best = lowest_traffic(ResultGrid.from_record(record).against_vanilla())
    if best is not None:
        yield TEXT.sentence("cache", best=best)


def _vote(results: VariantResults, policy: str) -> VariantResult | None:
    return next((vote for vote in results.groups[DES_VOTE] if vote.policy == policy), None)


POINTS: Mapping[str, Callable[[Any], Points]] = {
    "accuracy": _accuracy_points,
    "random-control": _control_points,
    "experts-per-token": _half_k_points,
    "beyond": _own_policy_points,
    "forwards": _forward_points,
    "speed": _speed_points,
    "experts": _cache_points,
}
