"""Robustness to the block size (Fig. 7b): accuracy and experts as blocks grow."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial

from matplotlib.figure import Figure

from coterie.errors import CoterieError
from coterie.lab.evals.run import Variant
from coterie.lab.plotting import DASHES, line_chart, policy_series
from coterie.lab.study.comparison import compare_pairs
from coterie.lab.study.experiment import Entry, Experiment, Finding, Part, StudyContext
from coterie.lab.study.results import VariantResult
from coterie.lab.study.variants import GUARD_OPTIONS, short_name

BLOCK_SIZES = (8, 16, 32, 64)
VANILLA, DES_VOTE, GUARDED = "vanilla", "des-vote:beta=0.3", f"des-vote:beta=0.3,{GUARD_OPTIONS}"

ResultsByPolicy = dict[str, dict[int, VariantResult]]
"""Policy -> block size -> result."""


class BlockSizeExperiment(Experiment, name="block-size"):
    """The same problems with blocks of several sizes, each compared with vanilla at that size."""

    def measure(self, context: StudyContext) -> Entry:
        half_k = max(1, context.engine.model.spec.router.k // 2)
        usual = context.engine.generation.block
        policies = [VANILLA, DES_VOTE, GUARDED, f"topk:k={half_k}"]
        entries: list[Entry] = []
        skipped: list[str] = []
        for index, size in enumerate(BLOCK_SIZES):
            overrides = {} if size == usual else {"block": size}
            variants = [Variant(policy, overrides) for policy in policies]
            progress_span = index / len(BLOCK_SIZES), (index + 1) / len(BLOCK_SIZES)
            try:
                results = context.evaluate(variants, progress_span)
            # Not every model supports every block size.
            except CoterieError as error:
                skipped.append(self.text.sentence("skipped", size=size, error=error))
                continue
            entries += [{"block": size, "arm": r.to_json(results[0])} for r in results]
        if not entries:
            raise CoterieError(" ".join(skipped))
        return {
            "experts": context.engine.model.spec.router.experts,
            "usual": usual,  # the model's own block size
            "policies": policies,
            "found": entries,
            "skipped": skipped,
        }

    def report(self, record: Entry) -> Iterator[Part]:
        by_policy, usual = _by_policy(record), record["usual"]
        draw = partial(draw_by_size, by_policy, "accuracy", accuracy=True)
        yield self.text.drawing("accuracy", draw, usual=usual)
        label = f"unique experts of {record['experts']}"
        draw = partial(draw_by_size, by_policy, label, accuracy=False)
        yield self.text.drawing("experts", draw, f"{self.name}-experts")
        cell = "{0.accuracy:.1%}, {0.experts:.1f}, {0.forwards_per_block:.2f}"
        columns = {
            f"block {size}": lambda policy, size=size: (
                cell.format(by_policy[policy][size]) if size in by_policy[policy] else ""
            )
            for size in by_policy[VANILLA]
        }
        n = next(iter(by_policy[VANILLA].values())).accuracy_share().n
        yield self.text.table("sizes", list(by_policy), columns, n=n)
        yield self._robustness(DES_VOTE, by_policy)
        yield self._robustness(GUARDED, by_policy)
        accuracies = {size: r.accuracy for size, r in sorted(by_policy[VANILLA].items())}
        yield self.text.sentence("vanilla", sizes=_by_size_text(accuracies))
        yield from record["skipped"]

    def _robustness(self, policy: str, by_policy: ResultsByPolicy) -> Finding:
        votes, vanilla = by_policy[policy], by_policy[VANILLA]
        sizes = sorted(vanilla)
        relative = {s: votes[s].accuracy / max(vanilla[s].accuracy, 1e-9) for s in sizes}
        comparisons = compare_pairs([(vanilla[size], votes[size]) for size in sizes])
        worse = [str(s) for s, c in zip(sizes, comparisons, strict=True) if c.sign < 0]
        return self.text.finding(
            "robust",
            relative[sizes[-1]] >= relative[sizes[0]] - 0.01,
            policy=policy,
            sizes=_by_size_text(relative),
            worse=", ".join(worse) or "no size",
        )


def draw_by_size(by_policy: ResultsByPolicy, label: str, *, accuracy: bool) -> Figure:
    """Accuracy with its intervals, or unique experts, against the block size."""
    series = []
    for index, (policy, by_size) in enumerate(by_policy.items()):
        sizes = sorted(by_size)
        results = [by_size[size] for size in sizes]
        values = [result.accuracy if accuracy else result.experts for result in results]
        intervals = [result.interval for result in results] if accuracy else None
        name, line = short_name(policy), DASHES[index % len(DASHES)]
        series.append(
            policy_series(policy, sizes, values, label=name, line=line, intervals=intervals)
        )
    x, percent = "block size (positions)", "y" if accuracy else ""
    return line_chart(series, x, label, doublings=BLOCK_SIZES, ylim=(0, None), percent=percent)


def _by_size_text(values: Mapping[int, float]) -> str:
    return ", ".join(f"{value:.1%} at {size}" for size, value in values.items())


def _by_policy(record: Entry) -> ResultsByPolicy:
    by_policy: ResultsByPolicy = {}
    for entry in record["found"]:
        result = VariantResult.from_json(entry["arm"])
        by_policy.setdefault(result.policy, {})[entry["block"]] = result
    return by_policy
