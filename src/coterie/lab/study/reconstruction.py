"""Top-K recall and reconstruction loss against the size of the coreset (Fig. 4 right)."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from matplotlib.figure import Figure

from coterie.lab.plotting import line_chart, policy_series
from coterie.lab.study.experiment import Entry, Experiment, Finding, Part, StudyContext
from coterie.lab.study.fidelity import (
    Metric,
    compare_policies,
    compare_to_curve,
    fidelity_scores,
    gaps_to_curve,
    sample_layers,
)
from coterie.lab.study.variants import GUARD_OPTIONS

GapsByMetric = Mapping[Metric, Sequence[Entry]]

SHARES = (
    *("0.03125", "0.0625", "0.1", "0.15", "0.2", "0.25", "0.3", "0.35", "0.4", "0.45", "0.5"),
    *("0.6", "0.75", "1.0"),
)
MAIN_SHARES = ("0.0625", "0.15", "0.3", "0.5", "0.75")
DES_SEQ, DES_VOTE, RANDOM, TOP_K = "DES-Seq", "DES-Vote", "random", "top-k"
GUARDED, PROPORTIONAL = "DES-Vote, guarded", "proportional"
METRIC_NAMES: dict[Metric, str] = {
    "recall": "top-K recall",
    "word_recall": "top-K recall, answer tokens",
    "loss": "reconstruction loss",
    "word_loss": "reconstruction loss, answer tokens",
}
DRAWN_METRICS: dict[str, Metric] = {  # by figure
    "recall": "recall",
    "reconstruction-loss": "loss",
    "reconstruction-loss-words": "word_loss",
}


class ReconstructionExperiment(Experiment, name="reconstruction"):
    """Every policy routes the inputs of vanilla's layers, so errors do not accumulate.

    The record has gaps to DES-Vote's curve at the same size, by metric: ``against`` is for DES-Seq,
    ``guarded`` for the guarded vote, ``ours`` for the proportional vote and ``control`` for random
    coresets.
    """

    def measure(self, context: StudyContext) -> Entry:
        spec = context.engine.model.spec
        families = policies_by_family(spec.router.k)
        policies = [policy for family in families.values() for policy in family]
        prompts = len(context.questions())
        context.on_progress(0.02, f"{len(policies)} policies on {prompts} prompts")

        def on_progress(share: float) -> None:
            context.on_progress(0.02 + 0.95 * share, "routing")

        fidelity = compare_policies(context, policies, on_progress)
        scores = dict(zip(policies, fidelity_scores(fidelity), strict=True))
        compared = {
            "against": families[DES_SEQ][:-1],
            "guarded": families[GUARDED],
            "ours": families[PROPORTIONAL],
            "control": families[RANDOM],
        }
        return {
            "experts": spec.router.experts,
            "k": spec.router.k,
            "prompts": prompts,
            "looks": fidelity.num_observations,
            "layers": list(sample_layers(context)),
            "curves": [
                {"name": name, "readings": [scores[policy] for policy in family]}
                for name, family in families.items()
            ],
            **{
                key: {
                    metric: gaps_to_curve(fidelity, selected, families[DES_VOTE], metric)
                    for metric in METRIC_NAMES
                }
                for key, selected in compared.items()
            },
        }

    def report(self, record: Entry) -> Iterator[Part]:
        layers, against = ", ".join(map(str, record["layers"])), record["against"]
        for name, metric in DRAWN_METRICS.items():
            draw = partial(draw_metric, record, metric)
            yield self.text.drawing(metric, draw, name, record=record, layers=layers)
        readings = [reading for curve in record["curves"] for reading in curve["readings"]]
        yield self.text.table("scores", readings, record=record)
        by_policy = zip(*map(against.get, METRIC_NAMES), strict=True)
        rows = [dict(zip(METRIC_NAMES, gaps, strict=True)) for gaps in by_policy]
        yield self.text.table("gaps", rows)
        yield self._control_finding(record["control"])
        yield self._seq_finding(against["recall"], "recall")
        yield self._seq_finding(against["loss"], "loss")
        content = count_outcomes(against["word_loss"], "word_loss")
        yield self.text.sentence("word_loss", **content)
        yield from (self._vote_sentence(key, record[key]) for key in ("guarded", "ours"))

    def _control_finding(self, control: Entry) -> Finding:
        """Random coresets against elected ones, in recall and in loss."""
        counts = [count_outcomes(control[metric], metric) for metric in ("recall", "loss")]
        worse, sizes = (sum(count[key] for count in counts) for key in ("worse", "sizes"))
        nearest = min(control["recall"], key=lambda gap: abs(gap["gap"]), default=None)
        text = self.text.sentence("nearest", gap=nearest) if nearest else ""
        holds = 0 < worse == sizes
        return self.text.finding("control", holds, worse=worse, sizes=sizes, nearest=text)

    def _seq_finding(self, gaps: Sequence[Entry], metric: Metric) -> Finding:
        if not gaps:
            return self.text.finding("no_sizes", None, claim=metric)
        counts = count_outcomes(gaps, metric)
        return self.text.finding(
            "versus_seq",
            counts["worse"] > len(gaps) / 2 and not counts["better"],
            claim=metric,
            metric=METRIC_NAMES[metric],
            largest=max(gaps, key=lambda gap: abs(gap["gap"])),
            remark=self.text.sentence("maximal") if metric == "recall" else "",
            **counts,
        )

    def _vote_sentence(self, key: str, gaps_by_metric: GapsByMetric) -> str:
        """A vote of another kind against DES-Vote, metric by metric."""
        counts = {METRIC_NAMES[m]: count_outcomes(gaps, m) for m, gaps in gaps_by_metric.items()}
        clauses = [self.text.sentence("outcome", metric=m, **count) for m, count in counts.items()]
        sizes = max(count["sizes"] for count in counts.values())
        return self.text.sentence(key, sizes=sizes, outcomes="; ".join(clauses))


def count_outcomes(gaps: Sequence[Entry], metric: Metric) -> dict[str, int]:
    """The numbers of sizes, and of those where policies are better than the curve, and so on."""
    signs = [compare_to_curve(gap, metric) for gap in gaps]
    counts = {
        word: signs.count(sign) for sign, word in ((1, "better"), (-1, "worse"), (0, "similar"))
    }
    return {"sizes": len(signs), **counts}


def policies_by_family(k: int) -> dict[str, list[str]]:
    """The policies of each family, smallest coreset first."""
    return {
        DES_VOTE: [f"des-vote:beta={share}" for share in SHARES],
        DES_SEQ: [f"des-seq:k={m}" for m in range(1, k + 1)],
        PROPORTIONAL: [f"proportional-vote:beta={share}" for share in MAIN_SHARES],
        GUARDED: [f"des-vote:beta={share},{GUARD_OPTIONS}" for share in MAIN_SHARES],
        TOP_K: [f"topk:k={m}" for m in range(1, k)],
        RANDOM: [f"random:beta={share}" for share in MAIN_SHARES],
    }


def draw_metric(record: Entry, metric: Metric) -> Figure:
    """One metric against unique experts, one line per family."""
    is_loss, series = metric.endswith("loss"), []
    for curve, label in zip(record["curves"], policies_by_family(1), strict=True):
        # A loss of 0 has no place on a logarithmic axis.
        points = [reading for reading in curve["readings"] if not is_loss or reading[metric] > 0]
        key = f"{metric}_interval"
        series.append(
            policy_series(
                points[0]["policy"],
                [point["experts"] for point in points],
                [point[metric] for point in points],
                label=label,
                line=":" if label in (RANDOM, TOP_K) else "-",
                intervals=[point[key] for point in points] if key in points[0] else None,
            )
        )
    x, y = f"unique experts of {record['experts']}", METRIC_NAMES[metric]
    if is_loss:
        return line_chart(series, x, y, log="y", xlim=(0, None), ylim=(1e-3, None), columns=3)
    limits = {"xlim": (0, None), "ylim": (0, 1.03), "level": 1.0}
    return line_chart(series, x, y, percent="y", columns=3, **limits)
