"""``coterie calibrate``: searches for the option of a policy that meets a target."""

from dataclasses import replace
from pathlib import Path

from rich.progress import MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from coterie.cli import options as o
from coterie.cli import output
from coterie.cli.engine_options import DecodeOptions, EngineOptions, check_engine
from coterie.cli.prompt_options import PromptOptions
from coterie.files import atomic_write_json
from coterie.lab import calibration as lab
from coterie.lab.calibration.calibration import check_target
from coterie.lab.calibration.measurement import PromptProgressCallback
from coterie.lab.calibration.search_space import SearchFamily
from coterie.lab.journal import Journal
from coterie.lab.records import package_versions

DEFAULT_PROBLEMS = 40  # of each task


def calibrate_command(
    family: str, *, target: str, confident: bool = False, per_layer: bool = False,
    prompts: PromptOptions, decode: DecodeOptions, engine_options: EngineOptions,
    batch_size: int | None = None, trust_code: bool = False, out: Path | None = None,
    json: bool = False,
) -> None:  # fmt: skip
    """Find the option of a policy that meets a target and reads as few experts as possible.

    The prompts are problems that no evaluation draws, a benchmark's items, or a file. Where memory
    holds only some of the experts, the cache is emptied before each prompt. With --out, a search
    that was stopped goes on with the same command.

    \b
    coterie calibrate des-vote:voters=before-eos,protect=top1 --target drop=0.01 -o policy.json
    coterie generate "..." --policy @policy.json
    """
    search_family = SearchFamily.parse(family)
    parsed_target = lab.Target.parse(target, confident=confident)
    options = decode.to_fields()
    output.check_output_file(out)
    model = engine_options.model
    prompt_set = prompts.load(model, default_count=DEFAULT_PROBLEMS, trust_code=trust_code)
    batch_size = engine_options.resolve_batch_size(batch_size, o.DEFAULT_BATCH_SIZE)
    engine = engine_options.open()
    check_engine(engine, (), options)
    evaluator = lab.PolicyEvaluator(engine, prompt_set, options, batch_size)
    check_target(evaluator, search_family, parsed_target)
    file = None if out is None else out.with_name(f"{out.name}.journal")
    conditions = {**lab.evaluation_conditions(evaluator), "versions": package_versions()}
    with output.resumable(Journal(file, conditions)) as journal:
        with output.progress_bar(MofNCompleteColumn(), TimeElapsedColumn()) as progress:
            callback = _progress_callback(progress)
            evaluator = replace(evaluator, on_progress=callback, journal=journal)
            result = lab.calibrate(evaluator, search_family, parsed_target, per_layer=per_layer)
        content = lab.calibration_record(evaluator, result, output.command_line())
        parts = (calibration_table(result), "", *result.describe())
        output.print_result(content, *parts, json=json)
        if out is not None:
            atomic_write_json(out, content)
            output.print_note(f"{out}; --policy @{out} takes it")
        journal.remove()


def calibration_table(calibration: lab.Calibration) -> Table:
    """The measurements, ordered by traffic."""
    noun, is_met = calibration.target.spec.description, calibration.target.is_met
    table = output.plain_table("policy", numbers=(noun, "95 %"))
    table.add_column("meets it")
    for step in calibration.steps:
        meets = "yes" if is_met(step.estimate) else "no"
        table.add_row(step.policy, *step.estimate.format(), meets)
    return table


def _progress_callback(progress: Progress) -> PromptProgressCallback:
    """One bar, which starts again with every measurement."""
    task = progress.add_task("", total=None)
    measurements = 0

    def on_progress(label: str, completed: int, total: int) -> None:
        nonlocal measurements
        measurements += completed == 0
        description = f"{measurements}. {label}"
        progress.update(task, completed=completed, total=total, description=description)

    return on_progress
