"""``coterie compare``: several policies on one prompt."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from coterie.cli import options as o
from coterie.cli.engine_options import (
    DEFAULT_POLICIES,
    VANILLA,
    DecodeOptions,
    EngineOptions,
    SamplingOptions,
    check_engine,
    distinct_policies,
    encode_prompt,
    read_prompt,
    reuse_options,
)
from coterie.cli.option_groups import with_option_groups
from coterie.cli.output import add_caption, console, plain_table, print_document
from coterie.cli.result_output import memory_document
from coterie.engine.engine import Engine
from coterie.engine.events import Result
from coterie.offload.capacity import format_bytes


@with_option_groups
def compare(
    prompt: o.Prompt,
    *,
    policies: o.PolicySpecs = None,
    decode: DecodeOptions,
    sampling: SamplingOptions,
    seed: o.Seed = None,
    no_chat_template: o.NoChatTemplate = False,
    engine_options: EngineOptions,
    coreset_reuse: o.CoresetReuse = None,
    json: o.Json = False,
) -> None:
    """Run several policies on one prompt and print one table; vanilla is always the first.

    Without --policy, des-vote runs with beta 0.5, 0.3 and 0.15, and des-seq with k=3.

    Where memory holds only some of the experts, each policy starts with the same cache: empty, or
    filled by --warm-start.

    \b
    coterie compare "..." -p des-vote:beta=0.3 -p des-seq:k=3 -p random:beta=0.3
    coterie compare "..." -p resident-vote:beta=0.3 --simulate-expert-memory 35%
    """
    specs = distinct_policies([VANILLA, *(policies or DEFAULT_POLICIES)])
    options = {**decode.to_fields(), **sampling.to_fields()}
    options |= {} if seed is None else {"seed": seed}
    reuse_by_policy = reuse_options(specs, coreset_reuse)
    text = read_prompt(prompt)
    engine = engine_options.open(count_vanilla=True)
    check_engine(engine, policies or (), options)
    ids = encode_prompt(engine, text, raw=no_chat_template)
    # The first forwards of a process are slow: keep them out of every policy's time.
    engine.generate(ids, **{**options, "max_new_tokens": 1})
    results = []
    for spec in specs:
        engine.reset_cache()
        results.append(engine.generate(ids, policy=spec, **options, **reuse_by_policy[spec]))
    if json:
        print_document({"prompt": text, "runs": run_documents(engine, results)})
    else:
        console().print(comparison_table(results))


def run_documents(engine: Engine, results: Sequence[Result]) -> list[dict[str, object]]:
    """The runs as JSON; the first is vanilla. ``saved`` is a share of the bytes that it moved."""
    vanilla = results[0]
    return [
        {
            **result.to_dict(),
            "equals_vanilla": result.tokens == vanilla.tokens,
            **({} if result.traffic is None else {"saved": saved_share(result, vanilla)}),
            **memory_document(engine, result),
        }
        for result in results
    ]


def saved_share(result: Result, vanilla: Result) -> float | None:
    """The share of vanilla's bytes that were not moved; None for vanilla itself, and where it moved
    none."""
    if result == vanilla or result.traffic is None or vanilla.traffic is None:
        return None
    total = vanilla.traffic.bytes_moved
    return 1 - result.traffic.bytes_moved / total if total else None


def comparison_table(results: Sequence[Result]) -> Table:
    """One line a policy; the first is vanilla."""
    numbers = ["experts", "max", "bytes", "votes kept", "forwards", "tokens", "tokens/s"]
    has_reuse = any(result.coreset_reuse_rate is not None for result in results)
    numbers += ["coresets kept", "votes lost"] if has_reuse else []
    numbers += [] if results[0].traffic is None else ["hit rate", "moved", "bytes saved"]
    table = plain_table("policy", "text", numbers=numbers)
    for result in results:
        table.add_row(
            result.policy,
            "as vanilla" if result.tokens == results[0].tokens else "differs",
            f"{result.experts.mean:.1f} of {result.experts.total}",
            str(result.experts.max),
            format_bytes(result.expert_bytes),
            f"{result.vote_mass_kept:.3f}",
            str(result.forwards),
            str(result.new_tokens),
            f"{result.tokens_per_second:.1f}",
            *(_reuse_cells(result) if has_reuse else ()),
            *_traffic_cells(result, results[0]),
        )
    caption = "experts (distinct) and their bytes are means over layers and decoding forwards"
    if results[0].traffic is not None:
        caption += "; moved: by all forwards; saved: a share of what vanilla moved"
    return add_caption(table, caption)


def _reuse_cells(result: Result) -> tuple[str, str]:
    if result.coreset_reuse_rate is None or result.reuse_vote_loss is None:
        return "", ""
    return f"{result.coreset_reuse_rate:.1%}", f"{result.reuse_vote_loss:.2%}"


def _traffic_cells(result: Result, vanilla: Result) -> tuple[str, ...]:
    traffic, saved = result.traffic, saved_share(result, vanilla)
    if traffic is None:
        return ()
    saved_cell = "" if saved is None else f"{saved:.1%}"
    return f"{traffic.hit_rate:.1%}", format_bytes(traffic.bytes_moved), saved_cell
