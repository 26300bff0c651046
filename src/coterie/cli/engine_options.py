"""From what was typed to what the engine is asked."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.progress import DownloadColumn, TransferSpeedColumn

from coterie.cli import options as o
from coterie.cli.tables import print_note, progress_bar
from coterie.decoding.kv_schemes import BlockCausalNoCache, NoCache, parse_plan
from coterie.engine.engine import Engine, load
from coterie.errors import CoterieError
from coterie.lab.calibration import read_calibrated_policy
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.routing import check_coreset_reuse, format_policy, parse_policy

PROGRESS_BYTES = 256 << 20  # bytes of weights from which loading shows a bar
FILE_PREFIX = "@"
VANILLA = "vanilla"
GenerationOptions = dict[str, object]


def read_prompt(source: str) -> str:
    """The prompt as typed, or standard input for "-", without its last line break."""
    if source == "-" and sys.stdin is None:
        raise CoterieError("standard input is closed, and the prompt was to come from there")
    prompt = sys.stdin.read().removesuffix("\n") if source == "-" else source
    if not prompt.strip():
        raise CoterieError("the prompt is empty")
    return prompt


def generation_options(
    *, unmask: str | None, threshold: float | None, temperature: float | None, **others: object
) -> GenerationOptions:
    """Fields of ``Generation`` for what was typed; raises for what would have no effect.

    A seed may always be given: scripts do, and a greedy answer is the same under each.
    """
    if threshold is not None and unmask is not None:
        raise CoterieError("--threshold is short for --unmask threshold:p=..; give one of them")
    if threshold is not None:
        unmask = f"threshold:p={threshold!r}"
    if not temperature:
        sampling_options = {"top_k": "--top-k", "top_p": "--top-p"}
        ignored = [flag for name, flag in sampling_options.items() if others.get(name) is not None]
        if ignored:
            raise CoterieError(f"{ignored[0]} needs --temperature above 0: at 0 nothing is drawn")
    options = {"unmask": unmask, "temperature": temperature, **others}
    return {name: value for name, value in options.items() if value is not None}


def decode_options(
    *,
    max_new_tokens: o.MaxNewTokens = None,
    block: o.BlockLength = None,
    plan: o.KVCacheScheme = None,
    unmask: o.UnmaskRule = None,
    threshold: o.Threshold = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    seed: o.Seed = None,
    early_stop: o.EarlyStop = None,
    commit_routing: o.CommitRouting = None,
    prefill_routing: o.PrefillRouting = None,
) -> GenerationOptions:
    """Fields of ``Generation`` that a prompt may be answered with."""
    return generation_options(
        max_new_tokens=max_new_tokens, block=block, plan=plan, unmask=unmask,
        threshold=threshold, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        early_stop=early_stop, commit=commit_routing, prefill=prefill_routing,
    )  # fmt: skip


def greedy_options(
    *,
    max_new_tokens: o.MaxNewTokens = None,
    block: o.BlockLength = None,
    plan: o.KVCacheScheme = None,
    unmask: o.UnmaskRule = None,
    threshold: o.Threshold = None,
    commit_routing: o.CommitRouting = None,
    prefill_routing: o.PrefillRouting = None,
) -> GenerationOptions:
    """The same where nothing is drawn and prompts are answered to their ends."""
    return generation_options(
        max_new_tokens=max_new_tokens, block=block, plan=plan, unmask=unmask,
        threshold=threshold, temperature=None, commit=commit_routing, prefill=prefill_routing,
    )  # fmt: skip


def canonical_policy(spec: str) -> str:
    """The policy as it is spelled; of ``@file``, the one that was calibrated there."""
    if spec.startswith(FILE_PREFIX):
        return read_calibrated_policy(spec.removeprefix(FILE_PREFIX)).policy
    return format_policy(parse_policy(spec))


def reuse_options(
    policy_specs: Sequence[str], reuse_tolerance: float | None
) -> dict[str, GenerationOptions]:
    """Of each policy, what it gets of ``--drift``: vanilla, beside others, has no coreset to keep.

    Raises where nobody has one, and for a policy that cannot keep its own.
    """
    if reuse_tolerance is None:
        return {name: {} for name in policy_specs}
    electing = [name for name in policy_specs if name != VANILLA]
    if not electing:
        raise CoterieError("--drift keeps coresets: give a --policy that elects one")
    for name in electing:
        check_coreset_reuse(parse_policy(name))
    return {name: {"drift": reuse_tolerance} if name in electing else {} for name in policy_specs}


def check_policy_files(engine: Engine, specs: Sequence[str], options: GenerationOptions) -> None:
    """Raises for an ``@file`` made for a model of other sizes; remarks on what else differs."""
    generation = engine.generation.replace(**options)
    for spec in specs:
        if spec.startswith(FILE_PREFIX):
            calibrated = read_calibrated_policy(spec.removeprefix(FILE_PREFIX))
            for note in calibrated.check_model(engine.model, generation):
                print_note(note)


def open_engine(
    model: str | None,
    *,
    dtype: str | None,
    device: str,
    expert_dtype: str | None = None,
    memory: ExpertMemoryConfig | None = None,
    count_vanilla: bool = False,
) -> Engine:
    """The engine, with a bar on stderr while large weights load; where memory for experts was asked
    for, a remark says what it came to. ``compared``: traffic is held against vanilla's."""
    with progress_bar(DownloadColumn(binary_units=True), TransferSpeedColumn()) as progress:
        task = progress.add_task("loading weights", visible=False)

        def on_progress(completed: int, total: int) -> None:
            progress.update(task, completed=completed, total=total, visible=total >= PROGRESS_BYTES)

        engine = load(
            model, dtype=dtype, device=device, experts=expert_dtype, expert_memory=memory,
            on_progress=on_progress,
        )  # fmt: skip
    if count_vanilla and (log := engine.model.store.traffic_log) is not None:
        log.track_vanilla()
    for note in engine.model.placement.describe():
        print_note(note)
    return engine


def check_options(engine: Engine, options: GenerationOptions) -> None:
    """Raises for an option that this plan has no use for."""
    scheme_spec = str(options.get("plan", engine.generation.plan))
    scheme = parse_plan(scheme_spec).scheme
    if "commit" in options and not scheme.traits.writes_kv:
        raise CoterieError(
            f"--commit has no effect with --plan {scheme_spec}: it commits no blocks"
        )
    if "prefill" in options and isinstance(scheme, NoCache | BlockCausalNoCache):
        raise CoterieError(
            f"--prefill has no effect with --plan {scheme_spec}: every forward decodes"
        )


def encode_prompt(engine: Engine, prompt: str, *, raw: bool) -> list[int]:
    """The prompt's token ids; a remark of the codec goes to stderr."""
    note = engine.model.codec.prompt_note(prompt)
    if note is not None:
        print_note(note)
    return engine.model.codec.encode(prompt, raw=raw)
