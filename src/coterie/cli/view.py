"""The picture of a block being unmasked: words coloured by confidence, experts beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from rich.columns import Columns
from rich.console import Group, RenderableType
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from coterie.engine.event import Denoised

MASK, END = "▒", "∎"
BAR = 24  # cells of a full bar
# Confidence from 0 to 1 in five steps, readable on dark and on light ground.
SCALE = ("#d7005f", "#d75f00", "#af8700", "#5f8700", "#008787")


@dataclass(frozen=True)
class Mark:
    """What stands at one position now."""

    piece: str
    confidence: float
    state: str  # "committed", "edited" or "provisional"


@dataclass
class View:
    """Gathers events and draws itself; mutable, because it is what the eye sees now."""

    title: str
    piece: Callable[[int], str]
    total: int  # routed experts of a layer
    layers: tuple[int, ...]  # those that route
    ends: tuple[int, ...] = ()  # token ids that end a text
    marks: dict[int, Mark] = field(default_factory=dict)
    experts: tuple[int, ...] = ()
    forwards: int = 0
    blocks: int = 0

    def take(self, event: Denoised) -> None:
        """One forward: what it wrote, what it still weighs, unique experts by layer."""
        written = {"committed": event.committed, "edited": event.edited}
        for state, tokens in {**written, "provisional": event.provisional}.items():
            for token in tokens:
                piece = END if token.id in self.ends else self.piece(token.id)
                self.marks[token.position] = Mark(piece, token.confidence, state)
        self.experts = event.experts or self.experts
        self.forwards = event.forward
        self.blocks = event.block + 1

    def __rich__(self) -> RenderableType:
        heading = Text.assemble(
            (self.title, "bold"), f"  block {self.blocks}, forward {self.forwards}"
        )
        answer = Panel(
            self.answer(), title=heading, title_align="left", border_style="dim", width=64
        )
        return Group(Columns([answer, self.touched()], padding=(0, 1)), legend())

    def answer(self) -> Text:
        """The answer so far: firm words in the colour of their confidence, guesses in italics."""
        text = Text()
        for position in range(max(self.marks, default=-1) + 1):
            mark = self.marks.get(position)
            if mark is None or (mark.state == "provisional" and not mark.piece.strip()):
                text.append(MASK, style="dim")
            else:
                text.append(mark.piece, style=style(mark))
        return text

    def touched(self) -> RenderableType:
        """One bar a layer: the unique experts of the last forward out of all there are."""
        table = Table.grid(padding=(0, 1))
        for layer, count in zip(self.layers, self.experts, strict=False):
            filled = round(BAR * count / self.total)
            bar = Text.assemble(("━" * filled, "#5f87d7"), ("━" * (BAR - filled), "dim"))
            table.add_row(f"layer {layer}", bar, f"{count}/{self.total}")
        return Panel(table, title="experts touched", title_align="left", border_style="dim")


def style(mark: Mark) -> str:
    """A rich style: colour says confidence, form says state."""
    colour = SCALE[min(int(max(mark.confidence, 0.0) * len(SCALE)), len(SCALE) - 1)]
    return {"committed": colour, "edited": f"underline {colour}"}.get(
        mark.state, f"dim italic {colour}"
    )


def legend() -> Text:
    """How to read the colours."""
    text = Text.assemble((" confidence  ", "dim"))
    for step, colour in enumerate(SCALE):
        text.append(f"{step / len(SCALE):.1f} ", style=colour)
    text.append("1.0", style=SCALE[-1])
    text.append("   guess", style="dim italic")
    text.append("  edited", style="underline dim")
    text.append(f"  {MASK} still masked", style="dim")
    return text
