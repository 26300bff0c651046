"""What a run found, one line a policy, for a table or a document."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from coterie.evals.served import Saved, saved
from coterie.evals.sheet import Sheet
from coterie.evals.stats import Paired, Share, holm, paired
from coterie.keys import to_json


@dataclass(frozen=True)
class Line:
    """One policy: accuracy whole and by task; the change against the first policy, item by item.

    ``p_holm`` is the change's p raised for the number of policies that were compared; ``relative``
    is the accuracy as a share of the first one's, None where that is 0; ``saved`` are bytes moved,
    where not all experts are in memory.
    """

    sheet: Sheet
    whole: Share
    by_task: dict[str, Share]
    also: dict[str, Share]  # a task's other measures: "gsm8k flexible"
    change: Paired | None = None  # None: this is the first
    p_holm: float | None = None
    relative: float | None = None
    saved: Saved | None = None

    def document(self) -> dict[str, object]:
        """As JSON values; experts and bytes are per layer and decoding forward."""
        return {
            "policy": self.sheet.policy,
            "accuracy": _share(self.whole),
            "by_task": {task: _share(share) for task, share in self.by_task.items()},
            "also": {name: _share(share) for name, share in self.also.items()},
            "change": None if self.change is None else _change(self.change, self.p_holm),
            "relative_accuracy": self.relative,
            "failed": self.sheet.failed,
            "experts": self.sheet.experts,
            "expert_bytes": self.sheet.expert_bytes,
            "vote_mass_kept": self.sheet.vote_mass_kept,
            "forwards_per_block": self.sheet.forwards_per_block,
            "new_tokens": self.sheet.new_tokens,
            "tokens_per_second": self.sheet.tokens_per_second,
            "seconds": self.sheet.seconds,
            **_traffic(self),
        }


def lines(sheets: Sequence[Sheet], tasks: Sequence[str]) -> list[Line]:
    """The first sheet is the one that the others are compared with."""
    first, others = sheets[0], sheets[1:]
    base = share(first.right()).value
    changes = [paired(first.right(), sheet.right()) for sheet in others]
    raised = holm([change.p for change in changes])
    compared = [
        replace(
            _line(sheet, tasks),
            change=change,
            p_holm=p,
            relative=share(sheet.right()).value / base if base else None,
            saved=saved(*([one.served for one in two.answers] for two in (first, sheet))),
        )
        for sheet, change, p in zip(others, changes, raised, strict=True)
    ]
    return [_line(first, tasks), *compared]


def _line(sheet: Sheet, tasks: Sequence[str]) -> Line:
    return Line(
        sheet=sheet,
        whole=share(sheet.right()),
        by_task={task: share(sheet.right(task)) for task in tasks},
        also={
            f"{task} {name}": share(right)
            for task in tasks
            for name, right in sheet.also(task).items()
        },
    )


def share(right: Sequence[bool]) -> Share:
    """How many are right of how many."""
    return Share(sum(right), len(right))


def _traffic(line: Line) -> dict[str, object]:
    """Nothing where all experts are in memory."""
    served, saved = line.sheet.served, line.saved
    if served is None:
        return {}
    told = {
        **to_json(served),
        "hit_rate": served.hit_rate,
        "moved_a_forward": line.sheet.moved_a_forward,
        "saved_on_same_forwards": served.saved_on_same_forwards,
        "saved": None if saved is None else saved.value,
        "saved_interval": None if saved is None else list(saved.interval),
    }
    return {"expert_traffic": told}


def _share(share: Share) -> dict[str, object]:
    return {"value": share.value, "n": share.n, "interval": list(share.interval)}


def _change(change: Paired, p_holm: float | None) -> dict[str, object]:
    return {
        "value": change.difference,
        "gained": change.gained,
        "lost": change.lost,
        "interval": list(change.interval),
        "p": change.p,
        "p_holm": p_holm,
    }
