"""``coterie eval``: benchmark accuracy under several policies."""

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from coterie.checkpoints.model_info import inspect
from coterie.cli import engine_options as engines
from coterie.cli import eval_text as text
from coterie.cli import options as o
from coterie.cli import output
from coterie.cli.eval_output import EvalProgress, accuracy_document, accuracy_tables, live_progress
from coterie.cli.output import print_note
from coterie.cli.prompt_options import task_names
from coterie.engine.engine import Engine
from coterie.errors import ConfigError, CoterieError
from coterie.files import atomic_write
from coterie.lab.evals.report import PolicySummary, summarize
from coterie.lab.evals.run import Answer, Variant, run_eval, run_identity
from coterie.lab.evals.stats import unchanged_bound
from coterie.lab.evals.task import Task, TaskOptions
from coterie.lab.evals.tasks import choices, open_tasks
from coterie.lab.problems import PROBLEM_MAKERS
from coterie.lab.records import write_record

MAX_REASONS, ALL_FAILED = 3, 2
TITLES = {True: "Embedded tasks by policy", False: "Accuracy by policy"}  # of all its own tasks


@dataclass(frozen=True)
class ItemOptions:
    """The benchmark items to answer."""

    task: list[str] | None = None
    data: Path | None = None
    shots: int | None = None
    num_problems: int | None = None
    seed: int = 1
    limit: int | None = None
    shuffle_seed: int | None = None
    samples: int | None = None

    def open(self, model: str | None, *, trust_code: bool) -> list[Task]:
        """The tasks; raises ConfigError for options without effect."""
        names = task_names(self.task, model, self.data, self.num_problems)
        if self.samples is not None and choices.NAME not in names:
            raise ConfigError("--samples has no effect on tasks that generate answers")
        family, count = inspect(model).family.name, self.num_problems or o.DEFAULT_PROBLEMS
        options = TaskOptions(family, self.data, self.shots, count, self.seed, trust_code)
        return open_tasks(names, replace(options, samples=self.samples or options.samples))


@dataclass(frozen=True)
class EvalConfig:
    """One evaluation, as the command line describes it."""

    tasks: Sequence[Task]
    variants: Sequence[Variant]
    settings: Mapping[str, Any]  # of the run's identity: limit, shuffle_seed, reset_every, options
    batch_size: int
    output: Path | None


def evaluate(
    *, items: ItemOptions, policies: list[str] | None = None, decode: engines.DecodeOptions,
    sampling: engines.SamplingOptions, engine_options: engines.EngineOptions,
    reset_cache_every: int | None = None, coreset_reuse: float | None = None,
    batch_size: int | None = None, trust_code: bool = False, out: Path | None = None,
    json: bool = False, csv: bool = False,
) -> int:  # fmt: skip
    """Measure accuracy on a benchmark under several policies, paired by item, with their traffic.

    Vanilla always runs first; each policy is compared with it item by item. With -o every answer is
    stored, and the same command continues a stopped run. The exit status is 1 where the logits of
    an item were not finite, and 2 where those of all items were not, or after any other error.

    \b
    coterie eval --num-problems 50 -p des-vote:beta=0.3 -p random:beta=0.3
    coterie eval -p resident-vote:beta=0.3 --simulate-expert-memory 35% --commit-routing policy
    coterie eval -m inclusionAI/LLaDA2.0-mini --task gsm8k -p des-vote:beta=0.15 -o runs/gsm8k
    coterie eval --task text --data BOOK.txt -p des-vote:beta=0.3
    """
    output.check_one_format(json=json, csv=csv)
    options = {**decode.to_fields(), **sampling.to_fields()}
    if o.TEXT_TASK in (items.task or ()):
        unused = {"coreset_reuse": coreset_reuse, "reset_cache_every": reset_cache_every}
        text.check_options({**vars(items), **options, **unused})
        engine = engine_options.open()
        engines.check_engine(engine, policies or (), options)
        engine.generation = engine.generation.replace(**options)
        text.evaluate_text(
            engine, items.data, engines.distinct_policies([engines.VANILLA, *(policies or [])]),
            samples=items.samples, seed=items.seed, limit=items.limit, out=out, json=json, csv=csv,
            batch_size=engine_options.resolve_batch_size(batch_size, o.DEFAULT_BATCH_SIZE),
        )  # fmt: skip
        return 0
    options |= {"seed": items.seed} if options.get("temperature") else {}
    if reset_cache_every is not None and engine_options.memory is None:
        raise ConfigError("--reset-cache-every has no effect where all experts are in memory")
    tasks = items.open(engine_options.model, trust_code=trust_code)
    variants = make_variants(policies, coreset_reuse)
    batch_size = engine_options.resolve_batch_size(batch_size, o.DEFAULT_BATCH_SIZE)
    settings = {"limit": items.limit, "shuffle_seed": items.shuffle_seed, "options": options}
    settings |= {"reset_every": reset_cache_every or 1}
    config = EvalConfig(tasks, variants, settings, batch_size, out)
    engine = engine_options.open(count_vanilla=True)
    engines.check_engine(engine, policies or (), options)
    summaries = run_with_progress(engine, config)
    print_results(engine, config, summaries, json=json, csv=csv)
    return print_failures(summaries)


def make_variants(
    policies: Sequence[str] | None, coreset_reuse: float | None = None
) -> list[Variant]:
    """Vanilla and the policies, each once; ``coreset_reuse`` applies to the policies."""
    specs = engines.distinct_policies([engines.VANILLA, *(policies or [])])
    return [Variant(*item) for item in engines.reuse_options(specs, coreset_reuse).items()]


def run_with_progress(engine: Engine, config: EvalConfig) -> list[PolicySummary]:
    """Runs all variants with live accuracy on stderr."""
    limit = config.settings["limit"]
    total = len(config.variants) * sum(len(task.items()[:limit]) for task in config.tasks)
    progress = EvalProgress([variant.name for variant in config.variants], total)

    def on_answer(answer: Answer) -> None:
        if not answer.from_disk and progress.count == progress.resumed > 0:
            print_note(f"{progress.resumed} of {progress.total} answers are from an earlier run")
        progress.add(answer)

    with _resume_hint(progress, config.output), live_progress(progress):
        results = run_eval(
            engine, config.tasks, config.variants, config.output, batch_size=config.batch_size,
            on_answer=on_answer, on_remark=print_note, all_variants=True, **config.settings,
        )  # fmt: skip
    if progress.resumed == progress.total:
        print_note(f"all {progress.total} answers are from an earlier run")
    return summarize(results, [task.name for task in config.tasks])


def print_results(
    engine: Engine, config: EvalConfig, summaries: Sequence[PolicySummary], *, json: bool, csv: bool
) -> None:
    """Prints the results, and writes them to the folder where there is one."""
    identity = run_identity(engine, config.tasks, **config.settings)
    about = {**identity, "rows": config.batch_size}
    document = accuracy_document(engine.model.name, about, summaries)
    table = output.format_csv([summary.csv_row() for summary in summaries])
    if config.output is not None:
        title = TITLES[set(summaries[0].by_task) <= set(PROBLEM_MAKERS)]
        device = str(engine.model.transformer.device)
        record = output.command_record(title, document, device=device)
        path = write_record(config.output, record)
        atomic_write(path.with_suffix(".csv"), table.encode())
        print_note(f"{path}, {path.stem}.csv")
    if json:
        output.print_document(document)
    elif csv:
        output.print_text(table, end="")
    else:
        for number, accuracy_table in enumerate(accuracy_tables(summaries, output.console())):
            output.print_parts(*([""] if number else []), accuracy_table)
        if len(summaries) > 1:
            n = summaries[0].accuracy.n
            print_note(f"on {n} items a change below {unchanged_bound(n):.1%} may be chance")


def print_failures(summaries: Sequence[PolicySummary]) -> int:
    """Says how often items failed and why; returns the exit status."""
    errors = sum((summary.result.errors for summary in summaries), Counter[str]())
    for reason, count in errors.most_common(MAX_REASONS):
        print_note(f"{count} answers failed and count as wrong: {reason}")
    if len(errors) > MAX_REASONS:
        print_note(f"and {len(errors) - MAX_REASONS} more reasons")
    all_failed = errors.total() == sum(summary.accuracy.n for summary in summaries)
    return ALL_FAILED if all_failed else int(bool(errors))


@contextmanager
def _resume_hint(progress: EvalProgress, out: Path | None) -> Iterator[None]:
    """Says on an early end how many answers are stored; an error becomes one line."""
    try:
        yield
    except BaseException as error:
        count = f"{progress.count} of {progress.total} answers are"
        if progress.count and out is None:
            print_note(f"{count} lost; -o DIR stores them")
        elif progress.count:
            print_note(f"{count} in {out}; the same command continues from there")
        if isinstance(error, Exception) and not isinstance(error, ValueError | OSError):
            raise CoterieError(f"{type(error).__name__}: {error}") from error
        raise
