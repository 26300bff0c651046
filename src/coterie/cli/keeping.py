"""The options that say which experts are kept in memory: read, and told what they came to."""

from __future__ import annotations

from pathlib import Path

from coterie.cli.tables import readable
from coterie.engine.memory import Memory, Settled
from coterie.engine.warm import SavedVotes, read_votes
from coterie.naming import CoterieError
from coterie.planning.booking import Memory as Remembered
from coterie.planning.trace import is_trace, read


def memory_of(
    expert_memory: str | None,
    *,
    host_memory: str | None,
    eviction: str | None,
    warm: Path | None,
) -> Memory | None:
    """What the group of options asks for; None where all experts are to be in memory. Raises for
    what would have no effect."""
    if expert_memory is not None:
        votes = None if warm is None else votes_of(warm)
        return Memory.parse(expert_memory, host=host_memory, eviction=eviction, warm=votes)
    typed = {"--host-memory": host_memory, "--eviction": eviction, "--warm": warm}
    idle = [flag for flag, value in typed.items() if value is not None]
    if idle:
        raise CoterieError(
            f"{idle[0]} has no effect where all experts are in memory; --expert-memory 35% keeps "
            "fewer there"
        )
    return None


def votes_of(path: Path) -> SavedVotes:
    """From a file of votes, or from the forwards of a trace."""
    if not is_trace(path):
        return read_votes(path)
    trace = read(path)
    return SavedVotes.of(trace.about.model, trace.about.layers, Remembered.of(trace).mean_votes)


def settled_line(found: Settled) -> str:
    """How many experts are in memory, and why so many where "auto" chose."""
    chosen = ""
    if found.free is not None and found.rest is not None:
        chosen = f"{readable(found.free)} are free, {readable(found.rest)} kept for all else: "
    if found.whole:
        return f"{chosen}all {found.experts} experts a layer fit ({readable(found.bytes)})"
    return (
        f"{chosen}{found.slots} of {found.experts} experts a layer in memory "
        f"({readable(found.bytes)}), the others on disk"
    )
