"""``coterie compare``: several policies on one prompt."""

from collections.abc import Iterator, Sequence

from rich.table import Table

from coterie.cli import engine_options as engines
from coterie.cli.output import plain_table, print_result
from coterie.engine.events import Result
from coterie.engine.vanilla_comparison import run_documents, saved_share
from coterie.offload.capacity import format_bytes


def compare(
    prompt: str, *, policies: list[str] | None = None, decode: engines.DecodeOptions,
    sampling: engines.SamplingOptions, seed: int | None = None, no_chat_template: bool = False,
    engine_options: engines.EngineOptions, coreset_reuse: float | None = None, json: bool = False,
) -> None:  # fmt: skip
    """Run several policies on one prompt; print one table, and each different answer once.

    Vanilla is always the first.

    Without --policy, des-vote runs with beta 0.5, 0.3 and 0.15, and des-seq with k=3.

    Where memory holds only some of the experts, each policy starts with the same cache: empty, or
    filled by --warm-start.

    \b
    coterie compare "..." -p des-vote:beta=0.3 -p des-seq:k=3 -p random:beta=0.3
    coterie compare "..." -p resident-vote:beta=0.3 --simulate-expert-memory 35%
    """
    specs = engines.distinct_policies([engines.VANILLA, *(policies or engines.DEFAULT_POLICIES)])
    options = {**decode.to_fields(), **sampling.to_fields()}
    options |= {} if seed is None else {"seed": seed}
    reuse_by_policy = engines.reuse_options(specs, coreset_reuse)
    text = engines.read_prompt(prompt)
    engine = engine_options.open(count_vanilla=True)
    engines.check_engine(engine, policies or (), options)
    ids = engines.encode_prompt(engine, text, raw=no_chat_template)
    # The first forwards of a process are slow: keep them out of every policy's time.
    engine.generate(ids, **{**options, "max_new_tokens": 1})
    results = []
    for spec in specs:
        engine.reset_cache()
        results.append(engine.generate(ids, policy=spec, **options, **reuse_by_policy[spec]))
    document = {"prompt": text, "runs": run_documents(engine, results)}
    print_result(document, comparison_table(results), *answer_texts(results), json=json)


def answer_texts(results: Sequence[Result]) -> Iterator[str]:
    """Each different answer once, under the policies that gave it."""
    policies: dict[str, list[str]] = {}
    for result in results:
        policies.setdefault(result.text, []).append(result.policy)
    for text, names in policies.items():
        yield f"\n{', '.join(names)}:\n{text}"


def comparison_table(results: Sequence[Result]) -> Table:
    """One line a policy; the first is vanilla."""
    numbers = ["experts", "max", "bytes", "votes kept", "forwards", "tokens", "tokens/s"]
    has_reuse = any(result.coreset_reuse_rate is not None for result in results)
    has_traffic = results[0].traffic is not None
    numbers += ["coresets kept", "votes lost"] if has_reuse else []
    numbers += ["hit rate", "moved", "bytes saved"] if has_traffic else []
    caption = "experts (distinct) and their bytes are means over layers and decoding forwards"
    caption += "; moved: by all forwards; saved: a share of what vanilla moved" * has_traffic
    rows = []
    for result in results:
        traffic = result.traffic
        rows.append([
            result.policy, "as vanilla" if result.tokens == results[0].tokens else "differs",
            f"{result.experts.mean:.1f} of {result.experts.total}", str(result.experts.max),
            format_bytes(result.expert_bytes), f"{result.vote_mass_kept:.3f}",
            str(result.forwards), str(result.new_tokens), f"{result.tokens_per_second:.1f}",
        ])  # fmt: skip
        if has_reuse:
            rate, loss = result.coreset_reuse_rate, result.reuse_vote_loss
            is_vanilla = rate is None or loss is None
            rows[-1] += ["", ""] if is_vanilla else [f"{rate:.1%}", f"{loss:.2%}"]
        if traffic is not None:
            saved = saved_share(result, results[0])
            cells = (f"{traffic.hit_rate:.1%}", format_bytes(traffic.bytes_moved))
            rows[-1] += [*cells, "" if saved is None else f"{saved:.1%}"]
    return plain_table("policy", "text", numbers=numbers, rows=rows, caption=caption)
