"""The summary of a study: what was measured, and the main findings with links to sections."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from coterie.lab.study.accuracy import DES_SEQ, DES_VOTE, MIN_RELATIVE_ACCURACY, TOP_K
from coterie.lab.study.experiment import format_p
from coterie.lab.study.expert_cache_report import ResultGrid, lowest_traffic
from coterie.lab.study.report import ReportSection, collect_claims
from coterie.lab.study.results import VariantResult, VariantResults

Records = Mapping[str, Any]  # experiment -> the facts of its record


def summary_points(sections: Sequence[ReportSection], records: Records) -> list[tuple[str, str]]:
    """(name of the section with the details, sentence); only of experiments with a record."""
    makers: Mapping[str, Callable[[Any], str | None]] = {
        "accuracy": _size_point,
        "random-control": _control_point,
        "experts-per-token": _half_k_point,
        "beyond": _own_policy_point,
        "forwards": _forwards_point,
        "speed": _speed_point,
        "experts": _cache_point,
    }
    points = [("accuracy", _rivals_point(records["accuracy"]))] if "accuracy" in records else []
    for name, make in makers.items():
        text = make(records[name]) if name in records else None
        points += [] if text is None else [(name, text)]
    verdicts = claims_sentence(sections)
    return [("", verdicts), *points] if verdicts else points


def claims_sentence(sections: Sequence[ReportSection]) -> str:
    """How many claims hold; a claim with several verdicts counts by the worst one."""
    claims = collect_claims(sections)
    order = ("does not hold", "inconclusive", "holds")
    counts = Counter(next(v for v in order if v in claim.verdicts) for claim in claims)
    mixed = sum(len(set(claim.verdicts)) > 1 for claim in claims)
    return (
        f"Of {len(claims)} claims, {counts['holds']} hold, {counts['does not hold']} do not hold "
        f"in at least one test ({mixed} of them hold in another), and {counts['inconclusive']} are "
        "inconclusive."
    )


def _against(result: VariantResult, vanilla: VariantResult) -> str:
    return (
        f"{result.name} has an accuracy of {result.accuracy:.1%} with {result.experts:.0f} unique "
        f"experts per layer and forward (vanilla: {vanilla.accuracy:.1%} with "
        f"{vanilla.experts:.0f})"
    )


def _size_point(record: Any) -> str | None:
    """The accuracy at a coreset of 30 %, and the smallest DES policy that keeps accuracy."""
    results = VariantResults.from_record(record)
    vanilla, group = results.vanilla, results.groups[DES_VOTE]
    small = next((vote for vote in group if vote.policy == "des-vote:beta=0.3"), None)
    if small is None or not vanilla.accuracy:
        return None
    text = f"{_against(small, vanilla)}: {small.relative_accuracy(vanilla)} of vanilla's accuracy."
    variants = [*group, *results.groups[DES_SEQ]]
    least = MIN_RELATIVE_ACCURACY * vanilla.accuracy
    best = min((r for r in variants if r.accuracy >= least), key=lambda r: r.experts, default=None)
    if best is None:
        return f"{text} No DES policy in the run keeps {MIN_RELATIVE_ACCURACY:.0%} of it."
    return (
        f"{text} The smallest DES policy that keeps {MIN_RELATIVE_ACCURACY:.0%} of it is "
        f"{best.name} with {best.experts:.0f} experts, {1 - best.experts / vanilla.experts:.0%} "
        "fewer."
    )


def _rivals_point(record: Any) -> str:
    """DES-Vote against DES-Seq and top-k at equal experts."""
    results = VariantResults.from_record(record)
    clauses = []
    for label in (TOP_K, DES_SEQ):
        pairs = [(a, b) for a, b in results.pairs if a in results.groups[label]]
        differences = [vote.compare_to(other).difference for other, vote in pairs]
        if differences:
            better = sum(difference > 0 for difference in differences)
            count = f"{better or len(pairs)} of {len(pairs)} comparisons"
            clauses.append(
                f"{'more' if better else 'less'} accurate than {label} in {count} "
                f"({min(differences):+.1%} to {max(differences):+.1%})"
            )
    return f"At equal experts, DES-Vote is {' and '.join(clauses) or 'not compared'}."


def _control_point(record: Any) -> str:
    results = VariantResults.from_record(record)
    elected, random, *_ = results.groups.values()
    pairs = ", ".join(
        f"{a.accuracy:.1%} against {b.accuracy:.1%} ({a.policy.partition('beta=')[2]} of the "
        "experts)"
        for a, b in zip(elected, random, strict=True)
    )
    return f"The election matters: accuracy of an elected and of a random coreset: {pairs}."


def _half_k_point(record: Any) -> str | None:
    results = VariantResults.from_record(record)
    full = next(iter(results.groups.values()))
    half = [results.by_name[name] for name in record["narrow"]]
    if not full or not half:
        return None
    return (
        f"At the same coreset ({full[-1].policy}), K = {results.k} has an accuracy of "
        f"{full[-1].accuracy:.1%} and K = {record['half']} of {half[-1].accuracy:.1%}."
    )


def _own_policy_point(record: Any) -> str | None:
    """The largest gain of a proportional or priced vote over DES-Vote at equal experts."""
    results = VariantResults.from_record(record)
    pairs = [(a, b) for a, b in results.pairs if b.policy.startswith("des-vote")]
    if not pairs:
        return None
    own, vote = max(pairs, key=lambda pair: pair[0].compare_to(pair[1]).difference)
    change = own.compare_to(vote)
    return (
        f"Not in the paper: {own.name} has an accuracy of {own.accuracy:.1%} with "
        f"{own.experts:.0f} experts, DES-Vote {vote.accuracy:.1%} with as many "
        f"({change.difference:+.1%}, {format_p(change.p_value)})."
    )


def _forwards_point(record: Any) -> str | None:
    results = VariantResults.from_record(record)
    vanilla = results.vanilla
    small = next((r for r in results.groups[DES_VOTE] if r.policy == "des-vote:beta=0.15"), None)
    if small is None:
        return None
    return (
        f"A small coreset costs forwards: {small.name} needs {small.forwards_per_block:.2f} "
        f"forwards per block (vanilla: {vanilla.forwards_per_block:.2f}) and reads "
        f"{small.experts_per_block / vanilla.experts_per_block:.0%} of vanilla's experts per block."
    )


def _speed_point(record: Any) -> str:
    def speed(entry: Any) -> float:
        rounds = sorted(entry["rounds"])
        return rounds[len(rounds) // 2]

    vanilla, *others = record["timed"]
    best = max((e for e in others if e["policy"].startswith("des-")), key=speed)
    return (
        f"On this small model DES brings little speed end to end: the fastest DES policy "
        f"({best['policy']}) generates {speed(best) / speed(vanilla):.2f} times vanilla's tokens "
        "per second."
    )


def _cache_point(record: Any) -> str | None:
    """The accurate policy with the lowest traffic at the main share of memory."""
    best = lowest_traffic(ResultGrid.from_record(record).against_vanilla())
    if best is None:
        return None
    point, vanilla = best.point, best.baseline
    return (
        f"With {point.share} of the experts in memory, {point.policy} saves {best.saved:.1%} of "
        f"the bytes that vanilla moves ({point.moved} instead of {vanilla.moved} per answer) at an "
        f"accuracy of {point.result.accuracy:.1%} (vanilla: {best.test.first.accuracy:.1%})."
    )
