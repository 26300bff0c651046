"""``coterie doctor``: what this machine and installation are, and the commands that mend them."""

import typer
from rich.progress import TimeElapsedColumn

from coterie.cli import output
from coterie.lab.doctor import Diagnosis, diagnose

BROKEN_STATUS = 1
MARKS = {"ok": "", "note": "!", "broken": "BROKEN"}


def doctor_command(model: str | None = None, *, json: bool = False) -> None:
    """Examine the machine, the kernels and the installation, in a few seconds.

    The exit status is 1 where something is broken. The disk is timed below the folder MODEL.

    \b
    coterie doctor
    coterie doctor ./mini-int8 --json
    """
    with output.progress_bar(TimeElapsedColumn()) as progress:
        task = progress.add_task("", total=None)
        result = diagnose(model, lambda doing: progress.update(task, description=doing))
    rows = [(MARKS[each.state], each.name, each.value) for each in result.checks]
    table = output.plain_table("", "part", "what was found", rows=rows)
    output.print_result(result.to_dict(), table, *remedies(result), json=json)
    if result.is_broken:
        raise typer.Exit(BROKEN_STATUS)


def remedies(result: Diagnosis) -> list[str]:
    """A line for each part with a remedy."""
    lines = [f"{each.name}: {each.remedy}" for each in result.checks if each.remedy]
    return ["", "To mend or add:", *lines] if lines else ["", "Nothing is missing."]
