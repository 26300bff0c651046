"""Robustness to the block size (Fig. 7b): what larger blocks do to answers and to experts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import cast

from matplotlib.figure import Figure

from coterie.errors import CoterieError
from coterie.lab.evals.run import Variant
from coterie.lab.plotting import add_legend, format_percent, new_axes, policy_style
from coterie.lab.study.context import StudyContext
from coterie.lab.study.curves import wilson
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.paired import compare_pairs
from coterie.lab.study.results import JsonObject, VariantResult
from coterie.lab.study.variants import GUARD_OPTIONS

BLOCK_SIZES = (8, 16, 32, 64)
VANILLA, DES_VOTE, GUARDED = "vanilla", "des-vote:beta=0.3", f"des-vote:beta=0.3,{GUARD_OPTIONS}"


@dataclass(frozen=True)
class BlockSizeExperiment:
    """The same questions with blocks of several sizes; vanilla at each is what is compared with."""

    name: str = "block-size"
    title: str = "Robustness to the block size (Fig. 7b)"
    question: str = (
        "The more words are decoded together, the more experts they ask for, and the more must "
        "share one coreset. Does it still serve them?"
    )

    def measure(self, context: StudyContext) -> ExperimentData:
        policies = [VANILLA, DES_VOTE, GUARDED, f"topk:k={_half_k(context)}"]
        entries: list[JsonObject] = []
        skipped: list[str] = []
        for index, size in enumerate(BLOCK_SIZES):
            overrides = {} if size == context.engine.generation.block else {"block": size}
            variants = [Variant(policy, overrides) for policy in policies]
            progress_span = index / len(BLOCK_SIZES), (index + 1) / len(BLOCK_SIZES)
            try:
                variant_results = [
                    VariantResult.from_eval_result(eval_result)
                    for eval_result in context.evaluate(variants, progress_span)
                ]
            # Not every model may be asked for every width.
            except CoterieError as error:
                skipped.append(f"Blocks of {size} were left out: {error}.")
                continue
            documents = [result.to_json(variant_results[0]) for result in variant_results]
            entries += [{"block": size, "arm": document} for document in documents]
        if not entries:
            raise CoterieError(" ".join(skipped))
        return {
            "experts": context.engine.model.spec.router.experts,
            "usual": context.engine.generation.block,
            "policies": policies,
            "found": entries,
            "skipped": skipped,
        }

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        by_policy = _by_policy(data)
        return [
            Drawing(
                self.name,
                "Right answers against block size, with 95 % Wilson intervals. The model was "
                f"trained with blocks of {data['usual']}.",
                lambda: _draw(by_policy, "right answers", lambda t: t.accuracy, bars=True),
            ),
            Drawing(
                f"{self.name}-experts",
                "Unique experts of a layer and forward against block size, in the same runs.",
                lambda: _draw(by_policy, f"unique experts of {data['experts']}", _expert_count),
            ),
        ]

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        by_policy = _by_policy(data)
        sizes = list(by_policy[VANILLA])
        rows = [
            [policy, *(_format_cell(by_size[size]) if size in by_size else "" for size in sizes)]
            for policy, by_size in by_policy.items()
        ]
        n = len(by_policy[VANILLA][sizes[0]].correct_flags())
        caption = f"Right answers of {n}, experts, forwards a block."
        heads = ["policy", *(f"block {size}" for size in sizes)]
        return [Table(heads, rows, caption, numbers=range(1, len(heads)))]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        by_policy = _by_policy(data)
        sizes = sorted(by_policy[VANILLA])
        small, large = sizes[0], sizes[-1]
        findings: list[Finding | str] = []
        for policy in (DES_VOTE, GUARDED):
            votes, vanilla = by_policy[policy], by_policy[VANILLA]
            relative = {s: votes[s].accuracy / max(vanilla[s].accuracy, 1e-9) for s in sizes}
            text = ", ".join(f"{relative[size]:.1%} at {size}" for size in sizes)
            comparisons = compare_pairs([(vanilla[size], votes[size]) for size in sizes])
            worse_sizes = [
                size
                for size, comparison in zip(sizes, comparisons, strict=True)
                if comparison.sign < 0
            ]
            robust = relative[large] >= relative[small] - 0.01
            findings.append(
                Finding(
                    f"Of vanilla's accuracy with the same blocks, {policy} keeps {text}. It is "
                    f"below vanilla beyond the interval at {_format_sizes(worse_sizes)}.",
                    "DES stays accurate whatever the block size.",
                    "holds" if robust else "does not hold",
                )
            )
        return [
            *findings,
            self._vanilla_sentence(by_policy[VANILLA]),
            *cast("list[str]", data["skipped"]),
        ]

    def _vanilla_sentence(self, vanilla: dict[int, VariantResult]) -> str:
        text = ", ".join(f"{t.accuracy:.1%} at {size}" for size, t in sorted(vanilla.items()))
        return f"Vanilla itself answers {text} right."


def _by_policy(data: ExperimentData) -> dict[str, dict[int, VariantResult]]:
    """Policy -> block size -> what it came to."""
    by_policy: dict[str, dict[int, VariantResult]] = {}
    for entry in cast("list[dict[str, object]]", data["found"]):
        result = VariantResult.from_json(cast("JsonObject", entry["arm"]))
        by_policy.setdefault(result.policy, {})[cast("int", entry["block"])] = result
    return by_policy


def _draw(
    by_policy: dict[str, dict[int, VariantResult]],
    label: str,
    figure_of: Callable[[VariantResult], float],
    *,
    bars: bool = False,
) -> Figure:
    figure, ax = new_axes("block size (positions)", label)
    for index, (policy, by_size) in enumerate(by_policy.items()):
        sizes = sorted(by_size)
        variant_results = [by_size[size] for size in sizes]
        style = policy_style(policy)
        ax.errorbar(
            sizes, [figure_of(t) for t in variant_results], yerr=wilson(variant_results) if bars else None,
            color=style.colour, marker=style.marker, label=policy.replace(f",{GUARD_OPTIONS}", ", guarded"),
            ls=("-", "--", ":", "-.")[index % 4], elinewidth=0.8,
        )  # fmt: skip
    ax.set_xscale("log", base=2)
    ax.set_xticks(BLOCK_SIZES, [str(size) for size in BLOCK_SIZES])
    ax.set_ylim(0, None)
    if bars:
        format_percent(ax)
    add_legend(ax)
    return figure


def _expert_count(result: VariantResult) -> float:
    return result.experts


def _format_cell(result: VariantResult) -> str:
    return f"{result.accuracy:.1%}, {result.experts:.1f}, {result.forwards_per_block:.2f}"


def _half_k(context: StudyContext) -> int:
    return max(1, context.engine.model.spec.router.k // 2)


def _format_sizes(sizes: Sequence[int]) -> str:
    return ", ".join(map(str, sizes)) if sizes else "no size"
