"""The time of the selection itself (Fig. 6): scores in, experts and weights out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict, cast

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from coterie.engine.engine import Engine
from coterie.engine.observation import collect_observations
from coterie.lab.bench.routings import BLOCK_LENGTH, find_skew, skewed_scores
from coterie.lab.bench.timing import (
    TimingConditions,
    TimingStats,
    describe_conditions,
    load_warnings,
    mean_timing_stats,
    time_interleaved,
    timing_conditions,
)
from coterie.lab.plotting import new_panels, policy_style
from coterie.lab.study.context import StudyContext
from coterie.lab.study.experiment import Drawing, ExperimentData, Finding, Table
from coterie.lab.study.latency import LayerLatency
from coterie.lab.study.layers import layer_runner, moe_layers
from coterie.routing import parse_policy, route
from coterie.routing.router import route_by_mask
from coterie.values import DecodeProgress, Policy, RouterSpec, Routing, Scores

EXPERT_COUNTS = (64, 128, 256)
TOKEN_COUNTS = (8, 16, 32, 64)
VANILLA = "vanilla"
POLICIES = (
    VANILLA,
    "topk:k=4",
    "naee:beta=0.6",
    "des-seq:k=3",
    "des-vote:beta=0.15",
    "xshare:beta=0.15",
    "mass-vote:tau=0.8",
    "des-vote:beta=0.15,voters=before-eos,protect=top1",
)
DRAWN_POLICIES = (VANILLA, "topk:k=4", "des-seq:k=3", "des-vote:beta=0.15", "xshare:beta=0.15")
ROUNDS = 12
NUM_PROMPTS = 4
UNIQUE_SHARE = 0.5  # of what a block would use by lot: how skewed the scores are that are drawn
MAX_SELECTION_SHARE = (
    0.1  # of the layer's time, up to which a selection is said to cost next to nothing
)

SelectFunction = Callable[[Scores, Policy], Routing]

EAGER, FUSED = "eager", "fused"

# Every version of the selection by name. ``fused`` is what models run: one kernel where the device
# and the policy have one, and eager torch where they have not.
VERSIONS: dict[str, SelectFunction] = {EAGER: route_by_mask, FUSED: route}


class SelectionTiming(TypedDict):
    """One selection for a block of ``tokens`` among ``experts``."""

    version: str
    policy: str
    experts: int
    tokens: int
    seconds: TimingStats


class SelectionLayerTiming(TypedDict):
    """The model's own MoE layer and the selection in it, on real blocks of ``tokens``."""

    policy: str
    tokens: int
    layer: TimingStats
    selection: TimingStats


class LargeLayerTiming(TypedDict):
    """A random layer's experts on a vanilla block of 32, as the latency chapter timed them."""

    name: str
    experts: int
    seconds: TimingStats


class SelectionRecord(TypedDict):
    activation: str
    machine: TimingConditions
    points: list[SelectionTiming]
    layers: list[SelectionLayerTiming]
    large: list[LargeLayerTiming]


@dataclass(frozen=True)
class SelectionExperiment:
    """Scores drawn for every number of experts, then the model's own, each policy in turn."""

    name: str = "selection"
    title: str = "What the selection costs (Fig. 6)"
    question: str = (
        "Electing a coreset and routing inside it is work as well. "
        "How long does it take beside the layer whose bytes it saves?"
    )

    rounds: int = ROUNDS

    def measure(self, context: StudyContext) -> ExperimentData:
        spec, device = context.engine.model.spec, context.engine.model.transformer.device
        points: list[SelectionTiming] = []
        for number, experts in enumerate(EXPERT_COUNTS):
            share, activity = (
                number / (len(EXPERT_COUNTS) + 1),
                f"selections among {experts} experts",
            )

            def on_progress(
                fraction: float, share: float = share, activity: str = activity
            ) -> None:
                context.on_progress(share + fraction / (len(EXPERT_COUNTS) + 1), activity)

            points += time_selections(
                scale_router(spec.router, experts),
                device,
                on_progress=on_progress,
                rounds=self.rounds,
            )
        context.on_progress(len(EXPERT_COUNTS) / (len(EXPERT_COUNTS) + 1), "the model's own layers")
        record = SelectionRecord(
            activation=spec.router.activation,
            machine=timing_conditions(device),
            points=points,
            layers=time_model_layers(
                context.engine, context.questions()[:NUM_PROMPTS], rounds=self.rounds
            ),
            large=large_layer_timings(context),
        )
        return cast("ExperimentData", record)

    def drawings(self, data: ExperimentData) -> Sequence[Drawing]:
        record = cast("SelectionRecord", data)
        versions = list(dict.fromkeys(point["version"] for point in record["points"]))
        where = f"{record['activation']} router, {describe_conditions(record['machine'])}"
        return [
            Drawing(
                f"{self.name}-{version}",
                f"Time of one {version} selection against the experts to choose from, for a block "
                f"of {BLOCK_LENGTH} (left), and against the tokens of the block, among {EXPERT_COUNTS[-1]} "
                f"experts (right); {where}. Bars span the quartiles.",
                lambda version=version: _draw(record, version),
            )
            for version in versions
        ]

    def tables(self, data: ExperimentData) -> Sequence[Table]:
        record = cast("SelectionRecord", data)
        return [*_version_tables(record), _layer_table(record)]

    def findings(self, data: ExperimentData) -> Sequence[Finding | str]:
        record = cast("SelectionRecord", data)
        vanilla = next(entry for entry in record["layers"] if entry["policy"] == VANILLA)
        cost_findings = [
            _cost_finding(e, vanilla) for e in record["layers"] if e["policy"].startswith("des-")
        ]
        large = [_large_layer_finding(record, entry) for entry in record["large"]]
        return [
            *cost_findings,
            *large,
            _width_sentence(record),
            *_fused_sentences(record),
            *load_warnings(record["machine"]),
        ]


def scale_router(router: RouterSpec, experts: int) -> RouterSpec:
    """The same router over another number of experts; without groups where these do not divide."""
    grouped = experts % router.groups == 0 and experts // router.groups >= 2
    return replace(
        router,
        experts=experts,
        k=min(router.k, experts),
        groups=router.groups if grouped else 1,
        topk_groups=router.topk_groups if grouped else 1,
    )


def time_selections(
    router: RouterSpec,
    device: torch.device,
    *,
    on_progress: Callable[[float], None],
    rounds: int,
) -> list[SelectionTiming]:
    """Every version and policy at every block size, on scores drawn once."""
    generator = torch.Generator().manual_seed(0)
    expected_unique = router.experts * (1 - (1 - router.k / router.experts) ** BLOCK_LENGTH)
    skew = find_skew(router, UNIQUE_SHARE * expected_unique)
    blocks = {
        count: _with_progress(skewed_scores(router, count, skew, generator), device)
        for count in TOKEN_COUNTS
    }
    runs = {
        (version, policy, count): selection_runner(select, scores, parse_policy(policy))
        for count, scores in blocks.items()
        for policy in POLICIES
        for version, select in VERSIONS.items()
    }
    timings = time_interleaved(runs, rounds, device=device, on_progress=on_progress)
    return [
        SelectionTiming(
            version=version, policy=policy, experts=router.experts, tokens=count, seconds=seconds
        )
        for (version, policy, count), seconds in timings.items()
    ]


def time_model_layers(
    engine: Engine, prompts: Sequence[str], *, rounds: int
) -> list[SelectionLayerTiming]:
    """Layer and selection in turns, over the real decoding forwards of one row at a time."""
    observations = collect_observations(engine, prompts, batch_size=1, max_forwards=1)
    moes = {moe.layer: moe for moe in moe_layers(engine.model.transformer)}
    runs: dict[tuple[str, str, int], Callable[[], object]] = {}
    for spelling in POLICIES:
        for index, observation in enumerate(observations):
            policy, scores = parse_policy(spelling), replace(observation.scores, vanilla_ids=None)
            runs["layer", spelling, index] = layer_runner(
                moes[observation.layer], observation, policy
            )
            runs["selection", spelling, index] = selection_runner(VERSIONS[FUSED], scores, policy)
    timings = time_interleaved(runs, rounds, device=engine.model.transformer.device)
    return [
        SelectionLayerTiming(
            policy=policy,
            tokens=observations[0].x.shape[1],
            layer=mean_timing_stats(
                [timings["layer", policy, index] for index in range(len(observations))]
            ),
            selection=mean_timing_stats(
                [timings["selection", policy, index] for index in range(len(observations))]
            ),
        )
        for policy in POLICIES
    ]


def large_layer_timings(context: StudyContext) -> list[LargeLayerTiming]:
    """Those of the latency chapter whose experts are as many as here; none where it has not run."""
    data = context.record("latency")
    layers = cast("list[LayerLatency]", data["lines"]) if data is not None else []
    return [
        LargeLayerTiming(
            name=layer["bench"]["name"], experts=layer["bench"]["experts"], seconds=check["seconds"]
        )
        for layer in layers
        for check in layer["checks"]
        if check["policy"] == VANILLA
        and layer["bench"]["random"]
        and layer["bench"]["experts"] in EXPERT_COUNTS
    ]


def selection_runner(
    select: SelectFunction, scores: Scores, policy: Policy
) -> Callable[[], Routing]:
    """Every time from the logits on: what scores remember of themselves is forgotten."""
    return lambda: select(replace(scores), policy)


def _with_progress(scores: Scores, device: torch.device) -> Scores:
    """On the device, with a canvas on which nothing but the last quarter is fill."""
    tokens = scores.logits.shape[1]
    filled = (torch.arange(tokens, device=device) >= tokens - tokens // 4).unsqueeze(0)
    masked = torch.ones_like(filled)
    return replace(
        scores,
        logits=scores.logits.to(device),
        progress=DecodeProgress(masked=masked, after_eos=filled),
    )


def _draw(record: SelectionRecord, version: str) -> Figure:
    points = [
        p for p in record["points"] if p["version"] == version and p["policy"] in DRAWN_POLICIES
    ]
    figure, (left, right) = new_panels(2, height=3.4)
    left.set(xlabel="experts to choose from", ylabel="milliseconds", xticks=EXPERT_COUNTS)
    right.set(xlabel="tokens of the block", xticks=TOKEN_COUNTS)
    _draw_against(left, "experts", [point for point in points if point["tokens"] == BLOCK_LENGTH])
    _draw_against(
        right, "tokens", [point for point in points if point["experts"] == EXPERT_COUNTS[-1]]
    )
    slowest = max(point["seconds"]["median"] for point in points)
    for ax in (left, right):
        ax.set(ylim=(0, 1.3e3 * slowest))
    right.tick_params(labelleft=False)
    handles, labels = left.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside upper left", ncols=2)
    return figure


def _draw_against(
    ax: Axes, key: Literal["experts", "tokens"], points: Sequence[SelectionTiming]
) -> None:
    for policy in DRAWN_POLICIES:
        policy_points = [point for point in points if point["policy"] == policy]
        timings = [point["seconds"] for point in policy_points]
        lower = [(timing["median"] - timing["low"]) * 1e3 for timing in timings]
        upper = [(timing["high"] - timing["median"]) * 1e3 for timing in timings]
        ax.errorbar(
            [point[key] for point in policy_points],
            [timing["median"] * 1e3 for timing in timings],
            yerr=[lower, upper],
            color=policy_style(policy).colour,
            marker=policy_style(policy).marker,
            elinewidth=1,
            label=policy,
        )


def _version_tables(record: SelectionRecord) -> list[Table]:
    """A table for each version: policies against experts and tokens."""
    tables = []
    for version in dict.fromkeys(point["version"] for point in record["points"]):
        points = [point for point in record["points"] if point["version"] == version]
        sizes = list(
            dict.fromkeys((p["experts"], p["tokens"]) for p in points if p["tokens"] >= 32)
        )
        medians = {(p["policy"], p["experts"], p["tokens"]): p["seconds"]["median"] for p in points}
        tables.append(
            Table(
                heads=["policy", *(f"{experts}, N = {tokens}" for experts, tokens in sizes)],
                rows=[
                    [policy, *(f"{medians[policy, *size] * 1e3:.2f}" for size in sizes)]
                    for policy in POLICIES
                ],
                caption=f"Median milliseconds of one {version} selection, from the logits to "
                "experts and weights: by experts to choose from and tokens of the block.",
                numbers=list(range(1, len(sizes) + 1)),
            )
        )
    return tables


def _layer_table(record: SelectionRecord) -> Table:
    rows = [
        [
            entry["policy"],
            f"{entry['selection']['median'] * 1e3:.3f}",
            f"{entry['layer']['median'] * 1e3:.3f}",
            f"{entry['layer']['low'] * 1e3:.3f} to {entry['layer']['high'] * 1e3:.3f}",
            f"{entry['selection']['median'] / entry['layer']['median']:.0%}",
        ]
        for entry in record["layers"]
    ]
    return Table(
        heads=["policy", "selection, ms", "whole layer, ms", "quartiles", "selection's share"],
        rows=rows,
        caption=f"The model's own MoE layer on real blocks of {record['layers'][0]['tokens']}; the "
        "whole layer is gate, selection, experts and shared expert.",
        numbers=[1, 2, 3, 4],
    )


def _cost_finding(layer: SelectionLayerTiming, vanilla: SelectionLayerTiming) -> Finding:
    extra = layer["selection"]["median"] - vanilla["selection"]["median"]
    share = extra / vanilla["layer"]["median"]
    return Finding(
        f"{layer['policy']} selects in {layer['selection']['median'] * 1e3:.2f} ms, "
        f"{abs(extra) * 1e3:.2f} ms {'more' if extra > 0 else 'less'} than vanilla: "
        f"{abs(share):.0%} of vanilla's layer.",
        claim="The selection costs next to nothing beside the layer.",
        verdict="holds" if share <= MAX_SELECTION_SHARE else "does not hold",
    )


def _large_layer_finding(record: SelectionRecord, large: LargeLayerTiming) -> Finding:
    policy = "des-vote:beta=0.15"
    medians = {
        p["policy"]: p["seconds"]["median"]
        for p in record["points"]
        if (p["version"], p["experts"], p["tokens"])
        == (_model_version(record), large["experts"], BLOCK_LENGTH)
    }
    extra, layer_seconds = medians[policy] - medians[VANILLA], large["seconds"]["median"]
    return Finding(
        f"Beside the experts of a random layer of {large['name']}'s shape, {layer_seconds * 1e3:.0f} ms "
        f"under vanilla, the {extra * 1e3:.2f} ms more that {policy} takes to select among "
        f"{large['experts']} are {extra / layer_seconds:.1%}.",
        claim="The selection costs next to nothing beside the layer.",
        verdict="holds" if extra <= MAX_SELECTION_SHARE * layer_seconds else "does not hold",
    )


def _width_sentence(record: SelectionRecord) -> str:
    medians = {
        (p["policy"], p["tokens"]): p["seconds"]["median"]
        for p in record["points"]
        if p["experts"] == EXPERT_COUNTS[-1] and p["version"] == _model_version(record)
    }
    policy, (fewest, largest_block) = "des-vote:beta=0.15", (TOKEN_COUNTS[0], TOKEN_COUNTS[-1])
    ratio = medians[policy, largest_block] / medians[policy, fewest]
    return (
        f"Among {EXPERT_COUNTS[-1]} experts, a selection by {policy} for {largest_block} tokens takes {ratio:.1f} "
        f"times as long as one for {fewest}."
    )


def _model_version(record: SelectionRecord) -> str:
    """The version that models ran when this was measured."""
    return FUSED if any(point["version"] == FUSED for point in record["points"]) else EAGER


def _fused_sentences(record: SelectionRecord) -> list[str]:
    """Of one kernel over eager torch, among the most experts."""
    if _model_version(record) == EAGER:
        return [
            "There is no fused selection yet: every time here is that of eager torch operations."
        ]
    medians = {
        (p["version"], p["policy"]): p["seconds"]["median"] * 1e6
        for p in record["points"]
        if (p["experts"], p["tokens"]) == (EXPERT_COUNTS[-1], BLOCK_LENGTH)
    }
    return [
        f"Among {EXPERT_COUNTS[-1]} experts, a block of {BLOCK_LENGTH} is routed under {policy} in "
        f"{medians[FUSED, policy]:.0f} us as models do it, and in {medians[EAGER, policy]:.0f} us by "
        f"eager torch operations: {medians[EAGER, policy] / medians[FUSED, policy]:.1f} times as long."
        for policy in (VANILLA, "des-vote:beta=0.15")
    ]
