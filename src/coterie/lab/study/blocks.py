"""Robustness to the block size (Fig. 7b): accuracy and experts as blocks grow."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypedDict

from matplotlib.figure import Figure

from coterie.errors import CoterieError
from coterie.lab.evals.run import Variant
from coterie.lab.plotting import add_legend, format_percent, new_axes
from coterie.lab.study.charts import DASHES, draw_series, policy_series
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import (
    Drawing,
    Experiment,
    ExperimentText,
    Finding,
    Table,
    judge,
    make_table,
)
from coterie.lab.study.paired import compare_pairs
from coterie.lab.study.results import JsonObject, VariantResult
from coterie.lab.study.variants import GUARD_OPTIONS

BLOCK_SIZES = (8, 16, 32, 64)
VANILLA, DES_VOTE, GUARDED = "vanilla", "des-vote:beta=0.3", f"des-vote:beta=0.3,{GUARD_OPTIONS}"


class BlockResult(TypedDict):
    block: int
    arm: JsonObject


class BlockSizeRecord(TypedDict):
    """``usual`` is the model's own block size; ``skipped`` explains missing sizes."""

    experts: int
    usual: int
    policies: list[str]
    found: list[BlockResult]
    skipped: list[str]


class BlockSizeExperiment(Experiment):
    """The same problems with blocks of several sizes, each compared with vanilla at that size."""

    text = ExperimentText.load("block-size")

    def measure(self, context: StudyContext) -> BlockSizeRecord:
        half_k = max(1, context.engine.model.spec.router.k // 2)
        policies = [VANILLA, DES_VOTE, GUARDED, f"topk:k={half_k}"]
        entries: list[BlockResult] = []
        skipped: list[str] = []
        for index, size in enumerate(BLOCK_SIZES):
            overrides = {} if size == context.engine.generation.block else {"block": size}
            variants = [Variant(policy, overrides) for policy in policies]
            progress_span = index / len(BLOCK_SIZES), (index + 1) / len(BLOCK_SIZES)
            try:
                eval_results = context.evaluate(variants, progress_span)
            # Not every model supports every block size.
            except CoterieError as error:
                skipped.append(f"Blocks of {size} are not measured: {error}.")
                continue
            results = [VariantResult.from_eval_result(eval_result) for eval_result in eval_results]
            entries += [BlockResult(block=size, arm=r.to_json(results[0])) for r in results]
        if not entries:
            raise CoterieError(" ".join(skipped))
        return BlockSizeRecord(
            experts=context.engine.model.spec.router.experts,
            usual=context.engine.generation.block,
            policies=policies,
            found=entries,
            skipped=skipped,
        )

    def drawings(self, record: BlockSizeRecord) -> Sequence[Drawing]:
        by_policy, y_label = _by_policy(record), f"unique experts of {record['experts']}"
        return [
            Drawing(
                self.name,
                "Accuracy against block size, with 95 % Wilson intervals. The model was trained "
                f"with blocks of {record['usual']}.",
                lambda: _draw(by_policy, "accuracy", lambda r: r.accuracy, intervals=True),
            ),
            Drawing(
                f"{self.name}-experts",
                "Unique experts per layer and forward against block size, in the same runs.",
                lambda: _draw(by_policy, y_label, lambda r: r.experts),
            ),
        ]

    def tables(self, record: BlockSizeRecord) -> Sequence[Table]:
        by_policy = _by_policy(record)
        vanilla = by_policy[VANILLA]

        def cell(size: int) -> Callable[[str], str]:
            template = "{0.accuracy:.1%}, {0.experts:.1f}, {0.forwards_per_block:.2f}"
            return lambda p: template.format(by_policy[p][size]) if size in by_policy[p] else ""

        n = len(next(iter(vanilla.values())).correct_flags())
        caption = f"Accuracy on {n} problems, experts, forwards per block."
        columns = {f"block {size}": cell(size) for size in vanilla}
        return [make_table(caption, list(by_policy), {"policy": "{0}", **columns})]

    def findings(self, record: BlockSizeRecord) -> Sequence[Finding | str]:
        by_policy = _by_policy(record)
        vanilla = by_policy[VANILLA]
        text = ", ".join(f"{r.accuracy:.1%} at {size}" for size, r in sorted(vanilla.items()))
        return [
            *(_robustness_finding(policy, by_policy) for policy in (DES_VOTE, GUARDED)),
            f"Vanilla's own accuracy is {text}.",
            *record["skipped"],
        ]


ResultsBySize = dict[int, VariantResult]


def _by_policy(record: BlockSizeRecord) -> dict[str, ResultsBySize]:
    """Policy -> block size -> result."""
    by_policy: dict[str, ResultsBySize] = {}
    for entry in record["found"]:
        result = VariantResult.from_json(entry["arm"])
        by_policy.setdefault(result.policy, {})[entry["block"]] = result
    return by_policy


def _robustness_finding(policy: str, by_policy: dict[str, ResultsBySize]) -> Finding:
    votes, vanilla = by_policy[policy], by_policy[VANILLA]
    sizes = sorted(vanilla)
    relative = {s: votes[s].accuracy / max(vanilla[s].accuracy, 1e-9) for s in sizes}
    comparisons = compare_pairs([(vanilla[size], votes[size]) for size in sizes])
    worse = [str(s) for s, c in zip(sizes, comparisons, strict=True) if c.sign < 0]
    text = ", ".join(f"{relative[size]:.1%} at {size}" for size in sizes)
    return judge(
        f"Relative to vanilla with the same blocks, {policy} has an accuracy of {text}. It is "
        f"significantly worse than vanilla at {', '.join(worse) or 'no size'}.",
        "DES keeps its accuracy at every block size.",
        relative[sizes[-1]] >= relative[sizes[0]] - 0.01,
    )


def _draw(
    by_policy: dict[str, ResultsBySize],
    label: str,
    value: Callable[[VariantResult], float],
    *,
    intervals: bool = False,
) -> Figure:
    figure, ax = new_axes("block size (positions)", label)
    for index, (policy, by_size) in enumerate(by_policy.items()):
        sizes = sorted(by_size)
        results = [by_size[size] for size in sizes]
        draw_series(ax, policy_series(
            policy, sizes, [value(result) for result in results],
            label=policy.replace(f",{GUARD_OPTIONS}", ", guarded"), line=DASHES[index % 4],
            intervals=[result.interval for result in results] if intervals else None,
        ))  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(BLOCK_SIZES, [str(size) for size in BLOCK_SIZES])
    ax.set_ylim(0, None)
    if intervals:
        format_percent(ax)
    add_legend(ax)
    return figure
