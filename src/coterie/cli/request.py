"""From what was typed to what the engine is asked."""

from __future__ import annotations

import sys
from collections.abc import Sequence

from rich.progress import DownloadColumn, TransferSpeedColumn

from coterie.calibration import read_kept
from coterie.cli import options as o
from coterie.cli.keeping import mixed_line, settled_line
from coterie.cli.tables import bar, remark
from coterie.decoding.plans import BlockCausalUncached, Uncached, parse_plan
from coterie.engine.beside import aside_line
from coterie.engine.engine import Engine, load
from coterie.engine.memory import Memory
from coterie.experts.mixed import Mixed
from coterie.experts.offload import Offloaded
from coterie.naming import CoterieError
from coterie.routing import check_keeps, parse_policy, spell

LARGE = 256 << 20  # bytes of weights from which loading shows a bar
FROM_FILE = "@"
VANILLA = "vanilla"
Options = dict[str, object]


def read_prompt(typed: str) -> str:
    """The prompt as typed, or standard input for "-", without its last line break."""
    if typed == "-" and sys.stdin is None:
        raise CoterieError("standard input is closed, and the prompt was to come from there")
    prompt = sys.stdin.read().removesuffix("\n") if typed == "-" else typed
    if not prompt.strip():
        raise CoterieError("the prompt is empty")
    return prompt


def generation_options(
    *, unmask: str | None, threshold: float | None, temperature: float | None, **others: object
) -> Options:
    """Fields of ``Generation`` for what was typed; raises for what would have no effect.

    A seed may always be given: scripts do, and a greedy answer is the same under each.
    """
    if threshold is not None and unmask is not None:
        raise CoterieError("--threshold is short for --unmask threshold:p=..; give one of them")
    if threshold is not None:
        unmask = f"threshold:p={threshold!r}"
    if not temperature:
        drawing = {"top_k": "--top-k", "top_p": "--top-p"}
        idle = [flag for name, flag in drawing.items() if others.get(name) is not None]
        if idle:
            raise CoterieError(f"{idle[0]} needs --temperature above 0: at 0 nothing is drawn")
    typed = {"unmask": unmask, "temperature": temperature, **others}
    return {name: value for name, value in typed.items() if value is not None}


def decoding_of(
    *,
    max_new_tokens: o.MaxNewTokens = None,
    block: o.BlockWidth = None,
    plan: o.Plan = None,
    unmask: o.UnmaskRule = None,
    threshold: o.Threshold = None,
    temperature: o.Temperature = None,
    top_k: o.TopK = None,
    top_p: o.TopP = None,
    seed: o.Seed = None,
    early_stop: o.EarlyStop = None,
    commit: o.Commit = None,
    prefill: o.Prefill = None,
) -> Options:
    """Fields of ``Generation`` that a prompt may be answered with."""
    return generation_options(
        max_new_tokens=max_new_tokens, block=block, plan=plan, unmask=unmask,
        threshold=threshold, temperature=temperature, top_k=top_k, top_p=top_p, seed=seed,
        early_stop=early_stop, commit=commit, prefill=prefill,
    )  # fmt: skip


def greedy_of(
    *,
    max_new_tokens: o.MaxNewTokens = None,
    block: o.BlockWidth = None,
    plan: o.Plan = None,
    unmask: o.UnmaskRule = None,
    threshold: o.Threshold = None,
    commit: o.Commit = None,
    prefill: o.Prefill = None,
) -> Options:
    """The same where nothing is drawn and prompts are answered to their ends."""
    return generation_options(
        max_new_tokens=max_new_tokens, block=block, plan=plan, unmask=unmask,
        threshold=threshold, temperature=None, commit=commit, prefill=prefill,
    )  # fmt: skip


def policy_of(typed: str) -> str:
    """The policy as it is spelled; of ``@file``, the one that was calibrated there."""
    if typed.startswith(FROM_FILE):
        return read_kept(typed.removeprefix(FROM_FILE)).policy
    return spell(parse_policy(typed))


def drifting(named: Sequence[str], drift: float | None) -> dict[str, Options]:
    """Of each policy, what it gets of ``--drift``: vanilla, beside others, has no coreset to keep.

    Raises where nobody has one, and for a policy that cannot keep its own.
    """
    if drift is None:
        return {name: {} for name in named}
    keeping = [name for name in named if name != VANILLA]
    if not keeping:
        raise CoterieError("--drift keeps coresets: give a --policy that elects one")
    for name in keeping:
        check_keeps(parse_policy(name))
    return {name: {"drift": drift} if name in keeping else {} for name in named}


def check_kept(engine: Engine, typed: Sequence[str], wanted: Options) -> None:
    """Raises for an ``@file`` made for a model of other sizes; remarks on what else differs."""
    generation = engine.generation.but(**wanted)
    for text in typed:
        if text.startswith(FROM_FILE):
            kept = read_kept(text.removeprefix(FROM_FILE))
            for line in kept.check(engine.model, generation):
                remark(line)


def open_engine(
    model: str | None,
    *,
    dtype: str | None,
    device: str,
    experts: str | None = None,
    memory: Memory | None = None,
    compared: bool = False,
) -> Engine:
    """The engine, with a bar on stderr while large weights load; where memory for experts was asked
    for, a remark says what it came to. ``compared``: traffic is held against vanilla's."""
    with bar(DownloadColumn(binary_units=True), TransferSpeedColumn()) as shown:
        task = shown.add_task("loading weights", visible=False)

        def heard(done: int, whole: int) -> None:
            shown.update(task, completed=done, total=whole, visible=whole >= LARGE)

        engine = load(
            model, dtype=dtype, device=device, experts=experts, expert_memory=memory,
            progress=heard,
        )  # fmt: skip
    if compared and engine.model.rationed is not None:
        engine.model.rationed.ledger.compare()
    if isinstance(store := engine.model.rationed, Mixed):
        remark(mixed_line(store, len(engine.model.spec.moe_layers)))
    elif engine.model.memory is not None:
        remark(settled_line(engine.model.memory))
    if isinstance(store, Offloaded) and store.aside is not None:
        remark(aside_line(store.aside))
    return engine


def check_effect(engine: Engine, wanted: Options) -> None:
    """Raises for an option that this plan has no use for."""
    text = str(wanted.get("plan", engine.generation.plan))
    gaze = parse_plan(text).gaze
    if "commit" in wanted and not gaze.terms.stores:
        raise CoterieError(f"--commit has no effect with --plan {text}: it commits no blocks")
    if "prefill" in wanted and isinstance(gaze, Uncached | BlockCausalUncached):
        raise CoterieError(f"--prefill has no effect with --plan {text}: every forward decodes")


def ids_of(engine: Engine, prompt: str, *, raw: bool) -> list[int]:
    """The prompt's token ids; a remark of the codec goes to stderr."""
    note = engine.model.codec.remark(prompt)
    if note is not None:
        remark(note)
    return engine.model.codec.encode(prompt, raw=raw)
