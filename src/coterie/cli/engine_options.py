"""From the options of a command to an engine and its generation settings.

What only a few options need is imported where it is used: every command imports this module.
"""

import os
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TextIO

from rich.progress import DownloadColumn, TransferSpeedColumn

from coterie.checkpoints.source import EMBEDDED, TEXT
from coterie.cli import options as o
from coterie.cli.output import print_note, progress_bar
from coterie.decoding.kv_schemes import BlockCausalCache, BlockCausalNoCache, parse_kv_scheme
from coterie.decoding.refinements import parse_unmask
from coterie.engine.engine import Engine, load
from coterie.errors import ConfigError
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.loading.load import choose_device
from coterie.loading.low_precision import LowPrecisionExperts
from coterie.loading.saved_votes import SavedVotes, read_votes
from coterie.routing import check_coreset_reuse, format_policy, parse_policy

if TYPE_CHECKING:
    from coterie.lab.calibration import CalibratedPolicy

PROGRESS_BYTES = 256 << 20  # bytes of weights from which loading shows a bar
FILE_PREFIX = "@"
VANILLA = "vanilla"
DEFAULT_POLICIES = ("des-vote:beta=0.5", "des-vote:beta=0.3", "des-vote:beta=0.15", "des-seq:k=3")
NO_EFFECT = (
    "has no effect where all experts are in memory; "
    "`expert_memory=35%` keeps fewer, `simulate_expert_memory=35%` simulates that"
)
GenerationOptions = dict[str, object]  # fields of GenerationConfig


@dataclass(frozen=True)
class EngineOptions:
    """Which model to load, where to, and how much memory its experts get."""

    model: str | None = None
    dtype: str | None = None
    device: str = "auto"
    expert_dtype: str | None = None
    expert_memory: str | None = None
    simulate_expert_memory: str | None = None
    host_memory: str | None = None
    eviction: str | None = None
    warm_start: Path | None = None
    fallback_model: str | None = None
    precision_policy: str | None = None
    cpu_experts: str | None = None
    dense_dtype: str | None = None

    @property
    def is_embedded(self) -> bool:
        """Whether the model is the one in the package."""
        return self.model in (None, EMBEDDED)

    @cached_property
    def memory(self) -> ExpertMemoryConfig | None:
        """The memory for experts; None where all are in memory."""
        if self.expert_memory is not None and self.simulate_expert_memory is not None:
            raise ConfigError("`simulate_expert_memory` replaces `expert_memory`; give one of them")
        if self.fallback_model is None and self.precision_policy is not None:
            raise ConfigError("`precision_policy` has no effect without `fallback_model`")
        simulated = self.simulate_expert_memory is not None
        capacity = self.simulate_expert_memory if simulated else self.expert_memory
        if capacity is None:
            for name in ("host_memory", "eviction", "warm_start", "fallback_model", "cpu_experts"):
                if getattr(self, name) is not None:
                    raise ConfigError(f"`{name}` {NO_EFFECT}")
            return None
        fallback = None
        if self.fallback_model is not None:
            fallback = LowPrecisionExperts.parse(self.fallback_model, self.precision_policy)
        votes = None if self.warm_start is None else load_votes(self.warm_start)
        return ExpertMemoryConfig.parse(
            capacity, host_memory=self.host_memory, eviction=self.eviction, warm_start=votes,
            fallback_model=fallback, cpu_experts=self.cpu_experts, simulated=simulated,
        )  # fmt: skip

    def resolve_batch_size(self, requested: int | None, default: int) -> int:
        """Prompts decoded together: 1 where memory holds only some of the experts."""
        if self.memory is None:
            return default if requested is None else requested
        if requested not in (None, 1):
            raise ConfigError(
                f"`batch_size={requested}`: with limited expert memory prompts run one by one, "
                "so that no answer depends on another; leave `batch_size` out"
            )
        return 1

    def open(self, *, count_vanilla: bool = False, prefix_cache_bytes: int = 0) -> Engine:
        """The engine. ``count_vanilla`` also counts the traffic of the unmodified model."""
        memory = self.memory
        with progress_bar(DownloadColumn(binary_units=True), TransferSpeedColumn()) as progress:
            task = progress.add_task("loading weights", visible=False)

            def on_progress(completed: int, total: int) -> None:
                visible = total >= PROGRESS_BYTES
                progress.update(task, completed=completed, total=total, visible=visible)

            engine = load(
                self.model, dtype=self.dtype, device=self.device, expert_dtype=self.expert_dtype,
                dense_dtype=self.dense_dtype, expert_memory=memory, on_progress=on_progress,
                prefix_cache_bytes=prefix_cache_bytes,
            )  # fmt: skip
        if count_vanilla and (log := engine.model.store.traffic_log) is not None:
            log.track_vanilla()
        for note in (*engine.model.notes, *engine.model.placement.describe()):
            print_note(note)
        return engine


def planned_options(options: EngineOptions, policy: str) -> EngineOptions:
    """The options with the expert format and memory of the fastest configuration that fits.

    A note says what was chosen, and its prediction. The policy stays as it is.
    """
    from coterie.lab.planner.request import PlanRequest, first_choice

    given = ("expert_memory", "simulate_expert_memory", "host_memory", "fallback_model", "dtype")
    for name in given:
        if getattr(options, name) is not None:
            raise ConfigError(f"`{name}` has no effect with `auto`, which chooses the memory")
    if choose_device(options.device).type != "cpu":
        raise ConfigError("`auto` plans for a CPU; give `device=cpu`, or leave it out")
    formats = () if options.expert_dtype is None else (options.expert_dtype,)
    with progress_bar() as progress:
        task = progress.add_task("planning", total=None)
        request = PlanRequest(
            options.model, policies=(policy,), formats=formats, dense_dtype=options.dense_dtype
        )
        choice = first_choice(request, lambda doing: progress.update(task, description=doing))
    print_note(choice.describe())
    changed = {"expert_dtype": choice.converted_to, "expert_memory": choice.capacity}
    return replace(options, **changed)


@dataclass(frozen=True)
class DecodeOptions:
    """How blocks are decoded."""

    max_new_tokens: int | None = None
    block: int | None = None
    kv_cache: str | None = None
    unmask: str | None = None
    threshold: float | None = None
    commit_routing: o.RoutingMode | None = None
    prefill_routing: o.RoutingMode | None = None
    skip_settled: int | None = None

    def to_fields(self) -> GenerationOptions:
        """Fields of a GenerationConfig; raises ConfigError for options that exclude each other."""
        options = {name: value for name, value in asdict(self).items() if value is not None}
        if self.threshold is not None:
            if self.unmask is not None:
                raise ConfigError("--threshold P is short for --unmask threshold:p=P; give one")
            options["unmask"] = f"threshold:p={options.pop('threshold')!r}"
        return options


@dataclass(frozen=True)
class SamplingOptions:
    """How tokens are sampled, and where an answer ends."""

    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    early_stop: Literal["block", "token", "off"] | None = None

    def to_fields(self) -> GenerationOptions:
        """Fields of a GenerationConfig."""
        return {name: value for name, value in asdict(self).items() if value is not None}


def load_votes(path: Path) -> SavedVotes:
    """The votes of a file of votes, or the mean votes of a trace."""
    from coterie.lab.replay.cache_simulation import TraceVotes
    from coterie.lab.replay.trace_file import is_trace, read_trace

    if not is_trace(path):
        return read_votes(path)
    trace = read_trace(path)
    return SavedVotes.of(trace.header.model, trace.header.layers, TraceVotes.of(trace).mean_votes)


def standard_input() -> TextIO:
    """Standard input; raises ConfigError where the shell closed it."""
    if sys.stdin is None:
        raise ConfigError("standard input is closed, so nothing can be read from it")
    return sys.stdin


def read_prompt(source: str) -> str:
    """The prompt; for "-", standard input without its last line break."""
    prompt = standard_input().read().removesuffix("\n") if source == "-" else source
    if not prompt.strip():
        raise ConfigError("the prompt is empty")
    return prompt


def canonical_policy(spec: str) -> str:
    """The policy in its canonical form; for ``@file``, the calibrated policy of that file."""
    if spec.startswith(FILE_PREFIX):
        return _calibrated(spec).policy
    if os.path.isfile(spec):  # False for a name that is too long
        raise ConfigError(f"policy {spec!r} is a file; {FILE_PREFIX}{spec} reads it")
    return format_policy(parse_policy(spec))


def _calibrated(spec: str) -> "CalibratedPolicy":
    from coterie.lab.calibration import read_calibrated_policy

    return read_calibrated_policy(spec.removeprefix(FILE_PREFIX))


def distinct_policies(specs: Sequence[str]) -> list[str]:
    """The canonical policies, each once."""
    return list(dict.fromkeys(map(canonical_policy, specs)))


def reuse_options(specs: Sequence[str], reuse: float | None) -> dict[str, GenerationOptions]:
    """The options of each policy from --coreset-reuse; raises where no coreset can be reused."""
    if reuse is None:
        return {name: {} for name in specs}
    check_reuse(specs)
    return {name: {} if name == VANILLA else {"drift": reuse} for name in specs}


def check_reuse(specs: Sequence[str]) -> None:
    """Raises where no policy elects a coreset, and for one without reusable coresets."""
    electing = [name for name in specs if name != VANILLA]
    if not electing:
        raise ConfigError("--coreset-reuse reuses coresets: give a --policy that elects one")
    for name in electing:
        check_coreset_reuse(parse_policy(name))


def check_engine(engine: Engine, specs: Sequence[str], options: GenerationOptions) -> None:
    """Raises for options without effect, and for an ``@file`` of a model with other sizes."""
    kv_cache = str(options.get("kv_cache", engine.generation.kv_cache))
    scheme = parse_kv_scheme(kv_cache)
    ignored = f"has no effect with --kv-cache {kv_cache}"
    if "commit_routing" in options and not scheme.base.writes_kv:
        raise ConfigError(f"--commit-routing {ignored}: it commits no blocks")
    if "prefill_routing" in options and not scheme.caches_blocks:
        raise ConfigError(f"--prefill-routing {ignored}: every forward decodes")
    generation = engine.generation.replace(**options)
    if not generation.temperature and not parse_unmask(generation.unmask).renoises:
        for name in ("top_k", "top_p"):
            if name in options:
                raise ConfigError(f"`{name}` needs `temperature` above 0: greedy takes the best")
    trained = (
        isinstance(scheme.base, BlockCausalCache | BlockCausalNoCache)
        and "edit" not in generation.unmask
    )
    if engine.model.name in (EMBEDDED, TEXT) and not trained:
        print_note("the model in the package was trained for block-causal decoding without edits")
    for spec in specs:
        _note_oversize(engine, spec)
        if spec.startswith(FILE_PREFIX):
            for note in _calibrated(spec).check_model(engine.model, generation):
                print_note(note)


def _note_oversize(engine: Engine, spec: str) -> None:
    """A note for a policy that allows more experts than the model uses or has."""
    policy, router = parse_policy(canonical_policy(spec)), engine.model.spec.router
    for name, limit, noun in (("k", router.k, "uses"), ("m", router.experts, "has")):
        value = getattr(policy, name, None)
        if isinstance(value, int) and value > limit:
            print_note(f"{spec}: the model {noun} {limit} experts, so {name}={limit} is the same")


def encode_prompt(engine: Engine, prompt: str, *, raw: bool) -> list[int]:
    """The prompt's token ids; a note of the tokenizer goes to stderr."""
    if (note := engine.model.tokenizer.prompt_note(prompt)) is not None:
        print_note(note)
    return engine.model.tokenizer.encode(prompt, raw=raw)
