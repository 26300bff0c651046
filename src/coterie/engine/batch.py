"""Rows that can share a forward, and that forward."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from coterie import ops
from coterie.decoding import Change, Row
from coterie.decoding.plans import Look
from coterie.decoding.row import first_of
from coterie.decoding.sampling import NotFinite
from coterie.engine.config import Generation
from coterie.engine.graph import Graphs
from coterie.engine.pool import Pool
from coterie.experts.traffic import Traffic
from coterie.model.cache import Cache
from coterie.model.step import Coresets, Step
from coterie.model.transformer import Transformer
from coterie.naming import CoterieError
from coterie.routing import Vanilla
from coterie.telemetry import Counting, Null, Recorder, Together, Tracing
from coterie.values import Policy, Progress, Survey, Window

VANILLA = Vanilla()
NOBODY = Null()


@dataclass  # not frozen: it counts what its row went through
class Slot:
    """A row in the engine: its cache row, its policy, and what it has cost."""

    number: int
    row: Row
    place: int
    policy: Policy
    generation: Generation
    embeddings: Tensor | None = None  # [length, H], where masks are fed what was last proposed
    coresets: tuple[int, Tensor] | None = None  # a block, and its [L, E] of the step before
    prefills: int = 0
    commits: int = 0
    moved: Traffic | None = None  # by everybody, before it
    began: float = field(default_factory=time.perf_counter)

    @property
    def look(self) -> Look:
        """The forward it waits for."""
        if self.row.look is None:
            raise RuntimeError(f"row {self.number} is finished")
        return self.row.look

    def routes(self) -> Policy:
        """The policy of the forward it waits for: elsewhere than in decoding, only where asked."""
        kind = self.look.kind
        asked = self.generation.commit if kind == "commit" else self.generation.prefill
        return self.policy if kind == "decode" or asked == "policy" else VANILLA

    def drift(self) -> float | None:
        """How much of its votes a coreset may lose before the block leaves it; None where each
        forward elects anew, as all do that do not decode."""
        return self.generation.drift if self.look.kind == "decode" else None

    def kept(self) -> Tensor | None:
        """[L, E]: the coresets of the block's step before, if it had one."""
        block, coresets = self.coresets or (None, None)
        return coresets if block == self.row.block.index else None


def groups(slots: Iterable[Slot]) -> list[list[Slot]]:
    """Slots whose next forwards agree in everything but positions, in order of arrival."""
    found: dict[tuple[object, ...], list[Slot]] = {}
    for slot in slots:
        look = slot.look
        smooth = slot.embeddings is not None
        key = (
            *(look.width, look.kind, look.causal, look.cached),
            *(slot.routes(), slot.drift(), smooth),
        )
        found.setdefault(key, []).append(slot)
    return list(found.values())


def forward(
    transformer: Transformer,
    pool: Pool,
    group: Sequence[Slot],
    counting: Counting,
    watcher: Recorder = NOBODY,
    *,
    graphs: Graphs | None = None,
    every: bool = False,
) -> list[Change]:
    """One forward of rows that agree (``groups``); every row then moves on to its next.

    Decoding forwards that nobody watches are played from ``graphs``, where they take them. Only
    decoding forwards are counted, and shown to the watcher unless it is to see ``every`` one. If
    logits are not finite this raises, and no row has moved.
    """
    look, device = group[0].look, transformer.device
    rows, places = tuple(slot.number for slot in group), [slot.place for slot in group]
    # What is played again shall not change in shape, and who watches is shown whole blocks.
    sparing = device.type == "cpu" and graphs is None and isinstance(watcher, Null)
    tokens, step = _asked(group, sparing=sparing)
    step = replace(step, coresets=_coresets(group, transformer))
    blocks = [slot.row.block.index for slot in group]

    def cache() -> Cache | None:
        return pool.rows(places) if look.cached else None

    alone = look.kind == "decode" and isinstance(watcher, Null) and step.embeddings is None
    if graphs is not None and alone and graphs.takes(step):
        whole = replace(step, cache=pool.whole() if look.cached else None)
        logits, counted = graphs.run(tokens, whole, places, rows)
    else:
        counted = Counting()
        others = watcher if every else NOBODY
        recorder = Together((counted, watcher)) if look.kind == "decode" else others
        recorder.began(rows)
        moved = _moved(replace(step, cache=cache(), recorder=recorder), device)
        logits = transformer(tokens.to(device), moved)
    # The one read that ends a step, whatever the number of rows.
    survey = ops.survey(logits, group[0].row.ask.mask).on_host()
    if not bool(torch.isfinite(survey.total).all()):
        raise _broken(transformer, tokens, replace(step, cache=cache()))
    try:
        at = [_needed(slot, sparing=sparing) for slot in group]
        changes = [
            _move_on(transformer, slot, where, *share)
            for slot, where, share in zip(group, at, _shares(at, logits, survey), strict=True)
        ]
    except NotFinite as error:
        raise _broken(transformer, tokens, replace(step, cache=cache())) from error
    if step.coresets is not None:
        for slot, block, used in zip(group, blocks, step.coresets.after.unbind(1), strict=True):
            slot.coresets = block, used
    counting.absorb(counted)
    return changes


def _asked(group: Sequence[Slot], *, sparing: bool) -> tuple[Tensor, Step]:
    """The tokens [B, W] and the step of a forward, on the host, without cache and recorder."""
    step = Step(
        window=_window(group),
        cache=None,
        policy=group[0].routes(),
        recorder=NOBODY,
        wanted=_wanted(group, sparing=sparing),
        voters=_voters(group),
        progress=_progress(group),
        forward=tuple(slot.row.clock.row for slot in group),
        embeddings=_embeddings(group),
    )
    return torch.stack([slot.row.canvas.tokens[_span(slot)] for slot in group]), step


def _coresets(group: Sequence[Slot], transformer: Transformer) -> Coresets | None:
    """What the rows' blocks had in the step before, on the device: it is never read here."""
    drift, spec = group[0].drift(), transformer.spec
    if drift is None:
        return None
    shape = (len(spec.moe_layers), spec.router.experts)
    nobody = torch.zeros(shape, dtype=torch.bool, device=transformer.device)
    before = [nobody if (kept := slot.kept()) is None else kept for slot in group]
    return Coresets.of(drift, torch.stack(before, dim=1))


def _broken(transformer: Transformer, tokens: Tensor, step: Step) -> CoterieError:
    """What to raise over such a forward."""
    device = transformer.device
    where = _first_broken(transformer, tokens.to(device), _moved(step, device))
    return CoterieError(f"{where} NaN or infinite numbers: no token was written")


def _moved(step: Step, device: torch.device) -> Step:
    """The same step with what routing reads on the device. Windows stay: their reach is asked."""

    def there(tensor: Tensor | None) -> Tensor | None:
        return None if tensor is None else tensor.to(device)

    progress = step.progress
    if progress is not None:
        progress = Progress(**{name: there(value) for name, value in vars(progress).items()})
    return replace(step, wanted=there(step.wanted), voters=there(step.voters), progress=progress)


def _first_broken(transformer: Transformer, tokens: Tensor, step: Step) -> str:
    """Where numbers stop being finite: the same forward once more, watched."""
    trace, last = Tracing(), transformer.spec.layers
    transformer(tokens, replace(step, recorder=trace))
    for layer, x in trace.outputs:
        if not bool(torch.isfinite(x).all()):
            names = {-1: "the embedding gives", last: "the last norm gives"}
            return names.get(layer, f"layer {layer} gives")
    return "the head gives"


def _shares(
    at: Sequence[Tensor], logits: Tensor, survey: Survey | None
) -> Iterator[tuple[Tensor, Survey | None]]:
    first = 0
    for where in at:
        rows = slice(first, first + len(where))
        yield logits[rows], None if survey is None else survey[rows]
        first = rows.stop


def _move_on(
    transformer: Transformer, slot: Slot, at: Tensor, logits: Tensor, survey: Survey | None
) -> Change:
    """Give a row its logits ``at`` these positions; refresh what its masks are fed."""
    look, row = slot.look, slot.row
    if not look.denoises:
        slot.prefills += look.kind == "prefill"
        slot.commits += look.kind == "commit"
        return row.receive(None)
    smooth = row.ask.unmask.smooth
    if smooth is None or slot.embeddings is None:
        return row.receive(logits, survey, at - row.block.start)
    number, block = row.clock.row, row.block
    here = slice(block.start - look.start, block.stop - look.start)
    change = row.receive(logits[here], None if survey is None else survey[here])
    tokens = row.canvas.tokens[look.start : look.stop]
    embedded = transformer.embed(tokens.to(logits.device)[None])[0]
    expected = torch.softmax(logits, dim=-1).to(embedded.dtype) @ transformer.embedding
    masked = tokens == row.ask.mask
    slot.embeddings[look.start : look.stop] = smooth.mix(embedded, expected, masked, number)
    return change


def _span(slot: Slot) -> slice:
    return slice(slot.look.start, slot.look.stop)


def _needed(slot: Slot, *, sparing: bool) -> Tensor:
    """Positions [n] whose logits are used: of the block (``sparing``: those that can change
    something), or the window's where masks are fed them."""
    look, block = slot.look, slot.row.block
    if not look.denoises:
        return torch.arange(0)
    if slot.embeddings is not None:
        return torch.arange(look.start, look.stop)
    return block.start + slot.row.wanted() if sparing else torch.arange(block.start, block.stop)


def _wanted(group: Sequence[Slot], *, sparing: bool) -> Tensor:
    """[P] int64 into B*width."""
    width = group[0].look.width
    needed = (_needed(slot, sparing=sparing) - slot.look.start for slot in group)
    return torch.cat([b * width + at for b, at in enumerate(needed)])


def _window(group: Sequence[Slot]) -> Window:
    looks = [slot.look for slot in group]
    return Window(
        start=torch.tensor([look.start for look in looks]),
        width=looks[0].width,
        visible=torch.tensor([look.visible for look in looks]),
        block=looks[0].causal,
    )


def _voters(group: Sequence[Slot]) -> Tensor | None:
    """[B, width] fp32: the live block and what is computed anew beside it; None: all there is."""
    looks = [slot.look for slot in group]
    if all(look.voters == (look.start, look.stop) for look in looks):
        return None
    rows = []
    for look in looks:
        position = torch.arange(look.start, look.stop)
        first, last = look.voters
        rows.append((position >= first) & (position < last))
    return torch.stack(rows).float()


def _progress(group: Sequence[Slot]) -> Progress:
    masked, filled, doubt = [], [], []
    for slot in group:
        canvas, span = slot.row.canvas, _span(slot)
        masked.append(canvas.tokens[span] == canvas.mask)
        end = first_of(canvas.tokens[canvas.prompt :].tolist(), slot.row.ask.stops)
        last = canvas.length if end is None else canvas.prompt + end
        filled.append(torch.arange(span.start, span.stop) > last)
        doubt.append(1.0 - canvas.confidence[span])
    return Progress(*(torch.stack(part) for part in (masked, filled, doubt)))


def _embeddings(group: Sequence[Slot]) -> Tensor | None:
    kept = [slot.embeddings[_span(slot)] for slot in group if slot.embeddings is not None]
    return torch.stack(kept) if kept else None
