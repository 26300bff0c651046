"""``coterie plan``: the configurations of a model that fit this machine, best first."""

from collections.abc import Sequence
from pathlib import Path

from rich.progress import TimeElapsedColumn
from rich.table import Table

from coterie.cli import engine_options as engines
from coterie.cli import options as o
from coterie.cli import output
from coterie.errors import ConfigError
from coterie.lab.planner.measurement import GivenRates
from coterie.lab.planner.plan import Configuration
from coterie.lab.planner.request import PlanRequest, PlanResult, verify
from coterie.lab.replay.hardware_model import parse_bandwidth
from coterie.offload.capacity import format_bytes, parse_bytes

CAPTION = (
    "experts, fetched: of a layer in a decoding forward, and those of them that memory lacks; "
    "tokens/s includes the forwards that commit a block; int4 and coresets change answers"
)


def plan_command(
    model: str | None = None, *, memory: str | None = None, gpu_memory: str | None = None,
    disk: str | None = None, read: str | None = None, link: str | None = None,
    gpu_read: str | None = None, policies: list[str] | None = None, expert_dtype: str | None = None,
    dense_dtype: str | None = None,
    commit_routing: o.RoutingMode | None = None, steps_per_block: int | None = None,
    unique_experts: float | None = None, trace: Path | None = None, verify_first: bool = False,
    json: bool = False,
) -> None:  # fmt: skip
    """Print what fits this machine, predicted milliseconds a forward, and the commands that run it.

    Reads the config alone, and measures the machine for some seconds with random weights.

    \b
    coterie plan inclusionAI/LLaDA2.0-mini --memory 8GiB
    coterie plan llada-moe --read 40GB/s --policy vanilla --verify
    """
    if gpu_memory is None and (link or gpu_read):
        raise ConfigError("--link and --gpu-read have no effect without --gpu-memory")
    rates = {"read": read, "disk": disk, "link": link, "gpu_read": gpu_read}
    request = PlanRequest(
        model,
        None if memory is None else parse_bytes(memory, "`memory`"),
        None if gpu_memory is None else parse_bytes(gpu_memory, "`gpu_memory`"),
        GivenRates(**{name: _bandwidth(text, f"`{name}`") for name, text in rates.items()}),
        tuple(engines.distinct_policies(policies or ())),
        () if expert_dtype is None else (expert_dtype,),
        steps=steps_per_block,
        unique_experts=unique_experts,
        trace=trace,
        commit_routing=commit_routing or engines.VANILLA,
        dense_dtype=dense_dtype,
    )
    with output.progress_bar(TimeElapsedColumn()) as progress:
        task = progress.add_task("", total=None)
        result = request.run(lambda doing: progress.update(task, description=doing))
        check = None
        if verify_first:
            progress.update(task, description="running the first configuration")
            check = verify(result)
    for warning in result.warnings:
        output.print_note(warning)
    document = result.to_dict() | ({} if check is None else {"verified": check.to_dict()})
    lines = [] if check is None else ["", check.describe()]
    output.print_result(document, *plan_lines(result), *lines, json=json)


def plan_lines(result: PlanResult) -> list[Table | str]:
    """The table, what it assumes, and the commands by number."""
    rows = enumerate(result.configurations, start=1)
    numbers = ("experts", "fetched", "memory", "read", "ms", "tokens/s")
    table = output.plain_table(
        "", "device", "format", "in memory", "policy", numbers=numbers, caption=CAPTION,
        rows=(_row(number, each) for number, each in rows),
    )  # fmt: skip
    notes = [f"Assumed: {text}." for text in result.assumptions]
    return [table, "", *notes, "", *_command_lines(result.configurations)]


def _row(number: int, each: Configuration) -> Sequence[str]:
    return (
        *(str(number), each.device, each.format_name, f"{each.share:.0%}", each.policy),
        *(f"{each.experts:.1f}", f"{each.loads:.2f}", format_bytes(each.memory)),
        format_bytes(each.forward_bytes),
        *(f"{1e3 * each.forward_seconds:.0f}", f"{each.tokens_per_second:.1f}"),
    )


def _command_lines(configurations: Sequence[Configuration]) -> list[str]:
    lines = []
    for number, each in enumerate(configurations, start=1):
        first, *rest = each.commands
        lines += [f"{number:2} {first}", *(f"   {line}" for line in rest)]
    return lines


def _bandwidth(text: str | None, option: str) -> float | None:
    return None if text is None else parse_bandwidth(text, option)
