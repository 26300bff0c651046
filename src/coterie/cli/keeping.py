"""The options that say which experts are kept in memory: read, and told what they came to."""

from __future__ import annotations

from pathlib import Path

from coterie.cli import options as o
from coterie.cli.tables import readable
from coterie.engine.coarse import Coarse
from coterie.engine.memory import Memory, Settled
from coterie.engine.warm import SavedVotes, read_votes
from coterie.experts.mixed import Mixed
from coterie.naming import CoterieError
from coterie.planning.booking import Memory as Remembered
from coterie.planning.trace import is_trace, read


def memory_of(
    *,
    expert_memory: o.ExpertMemory = None,
    imagine_memory: o.ImagineMemory = None,
    host_memory: o.HostMemory = None,
    eviction: o.Evicting = None,
    warm: o.Warm = None,
    coarse: o.CoarseModel = None,
    placement: o.Placing = None,
    cpu_experts: o.CpuExperts = None,
) -> Memory | None:
    """What the group of options asks for; None where all experts are to be in memory. Raises for
    what would have no effect."""
    if expert_memory is not None and imagine_memory is not None:
        raise CoterieError("--imagine-memory stands in place of --expert-memory; give one of them")
    fast = imagine_memory if expert_memory is None else expert_memory
    if fast is not None:
        return Memory.parse(
            fast,
            host=host_memory,
            eviction=eviction,
            warm=None if warm is None else votes_of(warm),
            coarse=coarse_of(coarse, placement),
            aside=cpu_experts,
            imagined=imagine_memory is not None,
        )
    typed = {
        "--host-memory": host_memory, "--eviction": eviction, "--warm": warm, "--coarse": coarse,
        "--placement": placement, "--cpu-experts": cpu_experts,
    }  # fmt: skip
    idle = [flag for flag, value in typed.items() if value is not None]
    if idle:
        raise CoterieError(
            f"{idle[0]} has no effect where all experts are in memory; --expert-memory 35% keeps "
            "fewer there, --imagine-memory 35% acts as if"
        )
    return None


def rows_of(rows: int | None, memory: Memory | None, usual: int) -> int:
    """Together as many as were asked for, or the ``usual``; one by one where memory is short."""
    if memory is None:
        return usual if rows is None else rows
    if rows not in (None, 1):
        raise CoterieError(
            f"--rows {rows}: where not all experts are in memory, prompts run one by one, so that "
            "no answer depends on who is beside it; leave --rows out"
        )
    return 1


def coarse_of(folder: str | None, placement: str | None) -> Coarse | None:
    """Raises for a placement that would have no effect."""
    if folder is not None:
        return Coarse.parse(folder, placement)
    if placement is not None:
        raise CoterieError(
            "--placement has no effect without --coarse FOLDER, the same model in fewer bits"
        )
    return None


def votes_of(path: Path) -> SavedVotes:
    """From a file of votes, or from the forwards of a trace."""
    if not is_trace(path):
        return read_votes(path)
    trace = read(path)
    return SavedVotes.of(trace.about.model, trace.about.layers, Remembered.of(trace).mean_votes)


def mixed_line(store: Mixed, layers: int) -> str:
    """How many experts are in memory in either precision; and what its manifests do not tell."""
    fine, coarse = store.fine, store.coarse
    sizes = (fine.capacity * fine.expert_bytes, coarse.capacity * coarse.expert_bytes)
    away = "" if store.capacity >= coarse.experts else f", the others on disk in {store.kinds[1]}"
    untold = "" if store.errors else "; a manifest does not tell what its experts lost: no bound"
    return (
        f"{fine.capacity} of {coarse.experts} experts a layer in {store.kinds[0]} and "
        f"{coarse.capacity} in {store.kinds[1]} in memory ({readable(sum(sizes) * layers)})"
        f"{away}{untold}"
    )


def settled_line(found: Settled) -> str:
    """How many experts are in memory, and why so many where "auto" chose."""
    chosen = ""
    if found.free is not None and found.rest is not None:
        chosen = f"{readable(found.free)} are free, {readable(found.rest)} kept for all else: "
    if found.whole:
        return f"{chosen}all {found.experts} experts a layer fit ({readable(found.bytes)})"
    many = f"{found.slots} of" if found.absent else "all"
    here = f"{chosen}{many} {found.experts} experts a layer in memory "
    if found.asked.imagined:
        return f"{here}({readable(found.bytes)}), as is imagined: all are there"
    if found.host is None:
        return f"{here}({readable(found.bytes)})" + ", the others on disk" * bool(found.absent)
    whole = found.layers * found.experts * found.expert_bytes
    others = "all" if found.host >= whole else "some before the disk"
    held = f"{others} in {readable(found.host)} of the host"
    return f"{here}of the GPU ({readable(found.bytes)}), {held}"
