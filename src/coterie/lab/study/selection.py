"""The time of the selection itself (Fig. 6): from router scores to experts and weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal, TypedDict

import torch
from matplotlib.figure import Figure

from coterie.engine.engine import Engine
from coterie.engine.observation import collect_observations
from coterie.lab.bench import timing
from coterie.lab.bench.routings import BLOCK_LENGTH, find_skew, skewed_scores
from coterie.lab.plotting import new_panels, policy_style
from coterie.lab.study.charts import draw_series, milliseconds, quartiles_text, timing_series
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
from coterie.lab.study.layers import NUM_PROMPTS, layer_runner, moe_layers
from coterie.routing import parse_policy, route
from coterie.routing.router import route_by_mask
from coterie.values import DecodeProgress, Policy, RouterSpec, Routing, Scores

EXPERT_COUNTS = (64, 128, 256)
TOKEN_COUNTS = (8, 16, 32, 64)
VANILLA, DES_VOTE = "vanilla", "des-vote:beta=0.15"
DRAWN_POLICIES = (VANILLA, "topk:k=4", "des-seq:k=3", DES_VOTE, "xshare:beta=0.15")
POLICIES = (
    *(VANILLA, "topk:k=4", "naee:beta=0.6", "des-seq:k=3", DES_VOTE, "xshare:beta=0.15"),
    *("mass-vote:tau=0.8", f"{DES_VOTE},voters=before-eos,protect=top1"),
)
ROUNDS = 12
UNIQUE_SHARE = 0.5  # unique experts relative to uniform random routing: sets the skew of scores
MAX_SELECTION_SHARE = 0.1  # of the layer's time: the limit of a negligible selection

SelectFunction = Callable[[Scores, Policy], Routing]

# Every version of the selection by name. Models run ``fused``: one kernel where the device and the
# policy support it, otherwise eager torch.
EAGER, FUSED = "eager", "fused"
VERSIONS: dict[str, SelectFunction] = {EAGER: route_by_mask, FUSED: route}


class SelectionTiming(TypedDict):
    """One selection for a block of ``tokens`` among ``experts``."""

    version: str
    policy: str
    experts: int
    tokens: int
    seconds: timing.TimingStats


class SelectionLayerTiming(TypedDict):
    """The model's own MoE layer and its selection, on real blocks of ``tokens``."""

    policy: str
    tokens: int
    layer: timing.TimingStats
    selection: timing.TimingStats


class LargeLayerTiming(TypedDict):
    """A random layer's experts on a vanilla block of 32, from the record of ``latency``."""

    name: str
    experts: int
    seconds: timing.TimingStats


class SelectionRecord(TypedDict):
    activation: str
    machine: timing.TimingConditions
    points: list[SelectionTiming]
    layers: list[SelectionLayerTiming]
    large: list[LargeLayerTiming]


@dataclass(frozen=True)
class SelectionExperiment(Experiment):
    """Random scores for several numbers of experts, then the model's own layers, in turns."""

    text = ExperimentText.load("selection")

    rounds: int = ROUNDS

    def measure(self, context: StudyContext) -> SelectionRecord:
        spec, device = context.engine.model.spec, context.engine.model.transformer.device
        points: list[SelectionTiming] = []
        steps = len(EXPERT_COUNTS) + 1
        for number, experts in enumerate(EXPERT_COUNTS):

            def on_progress(share: float, number: int = number, experts: int = experts) -> None:
                activity = f"selections among {experts} experts"
                context.on_progress((number + share) / steps, activity)

            router = scale_router(spec.router, experts)
            points += time_selections(router, device, on_progress=on_progress, rounds=self.rounds)
        context.on_progress((steps - 1) / steps, "the model's own layers")
        prompts = context.questions()[:NUM_PROMPTS]
        return SelectionRecord(
            activation=spec.router.activation,
            machine=timing.timing_conditions(device),
            points=points,
            layers=time_model_layers(context.engine, prompts, rounds=self.rounds),
            large=large_layer_timings(context),
        )

    def drawings(self, record: SelectionRecord) -> Sequence[Drawing]:
        conditions = (
            f"{record['activation']} router, {timing.describe_conditions(record['machine'])}"
        )
        return [
            Drawing(
                f"{self.name}-{version}",
                f"Time of one {version} selection against the number of experts, for a block of "
                f"{BLOCK_LENGTH} (left), and against the tokens of the block, among "
                f"{EXPERT_COUNTS[-1]} experts (right); {conditions}. Bars are quartiles.",
                lambda version=version: _draw(record, version),
            )
            for version in dict.fromkeys(point["version"] for point in record["points"])
        ]

    def tables(self, record: SelectionRecord) -> Sequence[Table]:
        versions = dict.fromkeys(point["version"] for point in record["points"])
        return [
            *(_version_table(record, version) for version in versions),
            make_table(
                f"The model's own MoE layer on real blocks of {record['layers'][0]['tokens']}. The "
                "whole layer is gate, selection, experts and shared expert.",
                record["layers"],
                {
                    "policy": "{policy}",
                    "selection, ms": lambda entry: milliseconds(entry["selection"], 3),
                    "whole layer, ms": lambda entry: milliseconds(entry["layer"], 3),
                    "quartiles": lambda entry: quartiles_text(entry["layer"], 3),
                    "selection's share": lambda e: (
                        f"{e['selection']['median'] / e['layer']['median']:.0%}"
                    ),
                },
            ),
        ]

    def findings(self, record: SelectionRecord) -> Sequence[Finding | str]:
        vanilla, *others = record["layers"]
        des = [entry for entry in others if entry["policy"].startswith("des-")]
        return [
            *(_cost_finding(entry, vanilla) for entry in des),
            *(_large_layer_finding(record, entry) for entry in record["large"]),
            _width_sentence(record),
            *_fused_sentences(record),
            *timing.load_warnings(record["machine"]),
        ]


def scale_router(router: RouterSpec, experts: int) -> RouterSpec:
    """The same router with another number of experts, without groups that do not divide it."""
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
    """Every version and policy at every block size, on the same random scores."""
    generator = torch.Generator().manual_seed(0)
    uniform = router.experts * (1 - (1 - router.k / router.experts) ** BLOCK_LENGTH)
    skew = find_skew(router, UNIQUE_SHARE * uniform)
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
    timings = timing.time_interleaved(runs, rounds, device=device, on_progress=on_progress)
    return [
        SelectionTiming(
            version=version, policy=policy, experts=router.experts, tokens=count, seconds=seconds
        )
        for (version, policy, count), seconds in timings.items()
    ]


def time_model_layers(
    engine: Engine, prompts: Sequence[str], *, rounds: int
) -> list[SelectionLayerTiming]:
    """Layer and selection in turns, over real decoding forwards of one row at a time."""
    observations = collect_observations(engine, prompts, batch_size=1, max_forwards=1)
    moes = {moe.layer: moe for moe in moe_layers(engine.model.transformer)}
    runs: dict[tuple[str, str, int], Callable[[], object]] = {}
    for spelling in POLICIES:
        policy = parse_policy(spelling)
        for index, observation in enumerate(observations):
            scores, moe = replace(observation.scores, vanilla_ids=None), moes[observation.layer]
            runs["layer", spelling, index] = layer_runner(moe, observation, policy)
            runs["selection", spelling, index] = selection_runner(VERSIONS[FUSED], scores, policy)
    timings = timing.time_interleaved(runs, rounds, device=engine.model.transformer.device)

    def mean(part: str, policy: str) -> timing.TimingStats:
        return timing.mean_timing_stats(
            [timings[part, policy, i] for i in range(len(observations))]
        )

    return [
        SelectionLayerTiming(
            policy=policy,
            tokens=observations[0].x.shape[1],
            layer=mean("layer", policy),
            selection=mean("selection", policy),
        )
        for policy in POLICIES
    ]


def large_layer_timings(context: StudyContext) -> list[LargeLayerTiming]:
    """The random layers of the record ``latency`` with a number of experts that is timed here."""
    record = context.record("latency")
    return [
        LargeLayerTiming(
            name=layer["bench"]["name"], experts=layer["bench"]["experts"], seconds=check["seconds"]
        )
        for layer in (record["lines"] if record is not None else ())
        for check in layer["checks"]
        if check["policy"] == VANILLA
        and layer["bench"]["random"]
        and layer["bench"]["experts"] in EXPERT_COUNTS
    ]


def selection_runner(
    select: SelectFunction, scores: Scores, policy: Policy
) -> Callable[[], Routing]:
    """Run the selection from the logits; a copy of the scores drops their cached values."""
    return lambda: select(replace(scores), policy)


def _with_progress(scores: Scores, device: torch.device) -> Scores:
    """On the device, with a masked block; its last quarter is after the end-of-text token."""
    tokens = scores.logits.shape[1]
    filled = (torch.arange(tokens, device=device) >= tokens - tokens // 4).unsqueeze(0)
    progress = DecodeProgress(masked=torch.ones_like(filled), after_eos=filled)
    return replace(scores, logits=scores.logits.to(device), progress=progress)


def _draw(record: SelectionRecord, version: str) -> Figure:
    points = [
        p for p in record["points"] if p["version"] == version and p["policy"] in DRAWN_POLICIES
    ]
    figure, (left, right) = new_panels(2, height=3.4)
    left.set(xlabel="number of experts", ylabel="milliseconds", xticks=EXPERT_COUNTS)
    right.set(xlabel="tokens of the block", xticks=TOKEN_COUNTS)
    panels: tuple[tuple[Literal["experts", "tokens"], list[SelectionTiming]], ...] = (
        ("experts", [point for point in points if point["tokens"] == BLOCK_LENGTH]),
        ("tokens", [point for point in points if point["experts"] == EXPERT_COUNTS[-1]]),
    )
    slowest = max(point["seconds"]["median"] for point in points)
    for ax, (key, shown) in zip((left, right), panels, strict=True):
        for policy in DRAWN_POLICIES:
            of_policy = [point for point in shown if point["policy"] == policy]
            x, timings = [p[key] for p in of_policy], [p["seconds"] for p in of_policy]
            draw_series(ax, timing_series(policy_style(policy), x, timings, policy))
        ax.set(ylim=(0, 1.3e3 * slowest))
    right.tick_params(labelleft=False)
    figure.legend(*left.get_legend_handles_labels(), loc="outside upper left", ncols=2)
    return figure


def _version_table(record: SelectionRecord, version: str) -> Table:
    """Policies by numbers of experts and tokens."""
    points = [point for point in record["points"] if point["version"] == version]
    sizes = dict.fromkeys((p["experts"], p["tokens"]) for p in points if p["tokens"] >= 32)
    seconds = {(p["policy"], p["experts"], p["tokens"]): p["seconds"] for p in points}
    columns = {
        f"{experts}, N = {tokens}": lambda policy, size=(experts, tokens): milliseconds(
            seconds[policy, *size]
        )
        for experts, tokens in sizes
    }
    caption = (
        f"Median milliseconds of one {version} selection, from the logits to experts and weights, "
        "by number of experts and tokens of the block."
    )
    return make_table(caption, POLICIES, {"policy": "{0}", **columns})


def _cost_finding(layer: SelectionLayerTiming, vanilla: SelectionLayerTiming) -> Finding:
    extra = layer["selection"]["median"] - vanilla["selection"]["median"]
    share = extra / vanilla["layer"]["median"]
    return judge(
        f"{layer['policy']} selects in {milliseconds(layer['selection'])} ms, "
        f"{abs(extra) * 1e3:.2f} ms {'more' if extra > 0 else 'less'} than vanilla: "
        f"{abs(share):.0%} of vanilla's layer.",
        "The cost of the selection is negligible compared with the layer.",
        share <= MAX_SELECTION_SHARE,
    )


def _medians(record: SelectionRecord, **conditions: object) -> dict[tuple[str, int], float]:
    """Median seconds by policy and tokens, of the points with these values."""
    return {
        (point["policy"], point["tokens"]): point["seconds"]["median"]
        for point in record["points"]
        if conditions.items() <= point.items()
    }


def _large_layer_finding(record: SelectionRecord, large: LargeLayerTiming) -> Finding:
    medians = _medians(record, version=_model_version(record), experts=large["experts"])
    extra = medians[DES_VOTE, BLOCK_LENGTH] - medians[VANILLA, BLOCK_LENGTH]
    layer_seconds = large["seconds"]["median"]
    return judge(
        f"The experts of a random layer of {large['name']}'s shape take {layer_seconds * 1e3:.0f} "
        f"ms under vanilla. {DES_VOTE} selects among {large['experts']} experts in "
        f"{extra * 1e3:.2f} ms more than vanilla, which is {extra / layer_seconds:.1%}.",
        "The cost of the selection is negligible compared with the layer.",
        extra <= MAX_SELECTION_SHARE * layer_seconds,
    )


def _width_sentence(record: SelectionRecord) -> str:
    medians = _medians(record, version=_model_version(record), experts=EXPERT_COUNTS[-1])
    fewest, most = TOKEN_COUNTS[0], TOKEN_COUNTS[-1]
    return (
        f"Among {EXPERT_COUNTS[-1]} experts, a selection by {DES_VOTE} for {most} tokens takes "
        f"{medians[DES_VOTE, most] / medians[DES_VOTE, fewest]:.1f} times as long as one for "
        f"{fewest}."
    )


def _model_version(record: SelectionRecord) -> str:
    """The version that models ran at the time of the measurement."""
    return FUSED if any(point["version"] == FUSED for point in record["points"]) else EAGER


def _fused_sentences(record: SelectionRecord) -> list[str]:
    if _model_version(record) == EAGER:
        return ["No fused selection was measured; every time is that of eager torch operations."]
    size: Mapping[str, object] = {"experts": EXPERT_COUNTS[-1]}
    fused, eager = (_medians(record, version=version, **size) for version in (FUSED, EAGER))
    return [
        f"Among {EXPERT_COUNTS[-1]} experts, routing a block of {BLOCK_LENGTH} under {policy} "
        f"takes {fused[policy, BLOCK_LENGTH] * 1e6:.0f} us as models run it and "
        f"{eager[policy, BLOCK_LENGTH] * 1e6:.0f} us with eager torch operations, "
        f"{eager[policy, BLOCK_LENGTH] / fused[policy, BLOCK_LENGTH]:.1f} times as long."
        for policy in (VANILLA, DES_VOTE)
    ]
