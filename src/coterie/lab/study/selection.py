"""The time of the selection itself (Fig. 6): from router scores to experts and weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import product
from typing import Any

import torch
from matplotlib.figure import Figure

from coterie.engine.engine import Engine
from coterie.engine.observation import LayerObservation, collect_observations
from coterie.lab import timing
from coterie.lab.bench.routings import BLOCK_LENGTH, find_skew, skewed_scores
from coterie.lab.plotting import line_chart, policy_style, timing_series
from coterie.lab.study.experiment import Entry, Experiment, Finding, Part, StudyContext
from coterie.lab.study.layers import NUM_PROMPTS, RunMaker, layer_runner, time_observed_layers
from coterie.model.moe import MoE
from coterie.routing import parse_policy, route
from coterie.routing.router import route_by_mask
from coterie.values import DecodeProgress, Policy, RouterSpec, Routing, Scores

EXPERT_COUNTS = (64, 128, 256)
TOKEN_COUNTS = (8, 16, 32, 64)
TABLE_TOKENS = (32, 64)
VANILLA, DES_VOTE = "vanilla", "des-vote:beta=0.15"
DRAWN_POLICIES = (VANILLA, "topk:k=4", "des-seq:k=3", DES_VOTE, "xshare:beta=0.15")
POLICIES = (
    *(VANILLA, "topk:k=4", "naee:beta=0.6", "des-seq:k=3", DES_VOTE, "xshare:beta=0.15"),
    *("mass-vote:tau=0.8", f"{DES_VOTE},voters=before-eos,protect=top1"),
)
AXES = {"experts": "number of experts", "tokens": "tokens of the block"}
ROUNDS = 12
UNIQUE_SHARE = 0.5  # unique experts relative to uniform random routing: sets the skew of scores
MAX_SELECTION_SHARE = 0.1  # of the layer's time: the limit of a negligible selection

SelectFunction = Callable[[Scores, Policy], Routing]
SelectionRun = Callable[[], Routing]

# Every version of the selection by name. Models run ``fused``: one kernel where the device and the
# policy support it, otherwise eager torch.
VERSIONS: dict[str, SelectFunction] = {"eager": route_by_mask, "fused": route}


@dataclass(frozen=True)
class SelectionExperiment(Experiment, name="selection"):
    """Random scores for several numbers of experts, then the model's own layers, in turns.

    In the record, ``points`` are selections for a block of ``tokens`` among ``experts``, ``layers``
    are the model's own MoE layers on real blocks, and ``large`` has the random layers of the record
    ``latency`` with a number of experts that is timed here.
    """

    rounds: int = ROUNDS

    def measure(self, context: StudyContext) -> Entry:
        spec, device = context.engine.model.spec, context.engine.model.transformer.device
        points: list[Entry] = []
        steps = len(EXPERT_COUNTS) + 1
        for number, experts in enumerate(EXPERT_COUNTS):
            points += time_selections(
                scale_router(spec.router, experts),
                device,
                rounds=self.rounds,
                on_progress=lambda share, number=number, experts=experts: context.on_progress(
                    (number + share) / steps, f"selections among {experts} experts"
                ),
            )
        context.on_progress((steps - 1) / steps, "the model's own layers")
        prompts = context.questions()[:NUM_PROMPTS]
        return {
            "activation": spec.router.activation,
            "machine": timing.timing_conditions(device),
            "points": points,
            "layers": time_model_layers(context.engine, prompts, rounds=self.rounds),
            "large": large_layer_timings(context),
        }

    def report(self, record: Entry) -> Iterator[Part]:
        machine = timing.describe_conditions(record["machine"])
        fixed = {"experts": ("tokens", BLOCK_LENGTH), "tokens": ("experts", EXPERT_COUNTS[-1])}
        for version, (axis, (other, value)) in product(VERSIONS, fixed.items()):
            points = [p for p in record["points"] if p["version"] == version and p[other] == value]
            draw, figure = partial(_draw, points, axis), f"{self.name}-{version}-{axis}"
            values = {"version": version, "value": value, "machine": machine, "record": record}
            yield self.text.drawing(axis, draw, figure, **values)
        seconds = medians(record)
        for version in VERSIONS:
            columns = {
                f"{experts}, N = {tokens}": lambda policy, key=(version, experts, tokens): (
                    f"{1e3 * seconds[policy, *key]:.2f}"
                )
                for experts, tokens in product(EXPERT_COUNTS, TABLE_TOKENS)
            }
            yield self.text.table("versions", POLICIES, columns, version=version)
        layers = [
            {
                **entry,
                "ms": {key: 1e3 * value for key, value in entry["layer"].items()},
                "selection_ms": 1e3 * entry["selection"]["median"],
                "share": entry["selection"]["median"] / entry["layer"]["median"],
            }
            for entry in record["layers"]
        ]
        yield self.text.table("layers", layers, tokens=layers[0]["tokens"])
        yield from self._findings(record, seconds)

    def _findings(self, record: Entry, seconds: Mapping[Any, float]) -> Iterator[Finding | str]:
        vanilla, *others = record["layers"]
        des = [entry for entry in others if entry["policy"].startswith("des-")]
        yield from (self._cost_finding(entry, vanilla) for entry in des)
        yield from (self._large_layer_finding(entry, seconds) for entry in record["large"])
        size, most_experts = (
            {"experts": EXPERT_COUNTS[-1], "block": BLOCK_LENGTH},
            EXPERT_COUNTS[-1],
        )
        fewest, most = TOKEN_COUNTS[0], TOKEN_COUNTS[-1]
        few, many = (seconds[DES_VOTE, "fused", most_experts, n] for n in (fewest, most))
        width = {"policy": DES_VOTE, "most": most, "fewest": fewest, "ratio": many / few}
        yield self.text.sentence("width", **width, **size)
        for policy in (VANILLA, DES_VOTE):
            times = {v: 1e6 * seconds[policy, v, most_experts, BLOCK_LENGTH] for v in VERSIONS}
            ratio = times["eager"] / times["fused"]
            yield self.text.sentence("fused", policy=policy, ratio=ratio, **times, **size)
        yield from timing.load_warnings(record["machine"])

    def _cost_finding(self, entry: Entry, vanilla: Entry) -> Finding:
        extra = entry["selection"]["median"] - vanilla["selection"]["median"]
        share = extra / vanilla["layer"]["median"]
        return self.text.finding(
            "cost",
            share <= MAX_SELECTION_SHARE,
            policy=entry["policy"],
            ms=f"{1e3 * entry['selection']['median']:.2f}",
            extra=abs(extra) * 1e3,
            word="more" if extra > 0 else "less",
            share=abs(share),
        )

    def _large_layer_finding(self, large: Entry, seconds: Mapping[Any, float]) -> Finding:
        size, layer_seconds = (large["experts"], BLOCK_LENGTH), large["seconds"]["median"]
        extra = seconds[DES_VOTE, "fused", *size] - seconds[VANILLA, "fused", *size]
        return self.text.finding(
            "large",
            extra <= MAX_SELECTION_SHARE * layer_seconds,
            claim="cost",
            large=large,
            ms=layer_seconds * 1e3,
            policy=DES_VOTE,
            extra=extra * 1e3,
            share=extra / layer_seconds,
        )


def medians(record: Entry) -> dict[tuple[str, str, int, int], float]:
    """Median seconds by policy, version, experts and tokens."""
    return {
        (p["policy"], p["version"], p["experts"], p["tokens"]): p["seconds"]["median"]
        for p in record["points"]
    }


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
) -> list[Entry]:
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
        {
            "version": version,
            "policy": policy,
            "experts": router.experts,
            "tokens": count,
            "seconds": seconds,
        }
        for (version, policy, count), seconds in timings.items()
    ]


def time_model_layers(engine: Engine, prompts: Sequence[str], *, rounds: int) -> list[Entry]:
    """Layer and selection in turns, over real decoding forwards of one row at a time."""
    observations = collect_observations(engine, prompts, batch_size=1, max_forwards=1)

    def select_experts(_: MoE, observation: LayerObservation, policy: Policy) -> SelectionRun:
        return selection_runner(route, replace(observation.scores, vanilla_ids=None), policy)

    makers: dict[str, RunMaker] = {"layer": layer_runner, "selection": select_experts}
    timings = time_observed_layers(engine, observations, POLICIES, makers, rounds=rounds)
    tokens = observations[0].x.shape[1]
    return [
        {"policy": policy, "tokens": tokens, **{part: timings[part, policy] for part in makers}}
        for policy in POLICIES
    ]


def large_layer_timings(context: StudyContext) -> list[Entry]:
    """The random layers of the record ``latency`` with a number of experts that is timed here."""
    record = context.record("latency")
    return [
        {key: layer["bench"][key] for key in ("name", "experts")} | {"seconds": check["seconds"]}
        for layer in (record["lines"] if record is not None else ())
        for check in layer["checks"]
        if check["policy"] == VANILLA
        and layer["bench"]["random"]
        and layer["bench"]["experts"] in EXPERT_COUNTS
    ]


def selection_runner(select: SelectFunction, scores: Scores, policy: Policy) -> SelectionRun:
    """Run the selection from the logits; a copy of the scores drops their cached values."""
    return lambda: select(replace(scores), policy)


def _with_progress(scores: Scores, device: torch.device) -> Scores:
    """On the device, with a masked block; its last quarter is after the end-of-text token."""
    tokens = scores.logits.shape[1]
    filled = (torch.arange(tokens, device=device) >= tokens - tokens // 4).unsqueeze(0)
    progress = DecodeProgress(masked=torch.ones_like(filled), after_eos=filled)
    return replace(scores, logits=scores.logits.to(device), progress=progress)


def _draw(points: Sequence[Entry], axis: str) -> Figure:
    series = []
    for policy in DRAWN_POLICIES:
        shown = [point for point in points if point["policy"] == policy]
        x, timings = [p[axis] for p in shown], [p["seconds"] for p in shown]
        series.append(timing_series(policy_style(policy), x, timings, policy))
    return line_chart(series, AXES[axis], "milliseconds", ylim=(0, None))
