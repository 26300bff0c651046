"""The picture of a block being unmasked: words coloured by confidence, experts beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import repeat

from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from coterie.engine.event import Denoised

MASK, END = "▒", "∎"
ANSWER, BAR = 64, 24  # columns of the answer and of a full bar, where there is room for both
SHORT = 12  # columns of a bar that leaves room for the answer beside it
NARROW = 72  # columns below which the experts stand under the answer
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

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, frame = options.max_width, self._frame()
        if width < NARROW:
            yield self._panel(min(width, ANSWER))
            yield self.touched(max(0, min(width, ANSWER, frame + BAR) - frame))
        else:
            bar = min(BAR, max(SHORT, width - ANSWER - frame - 1))
            beside = Table.grid(padding=(0, 1, 0, 0))
            answer = self._panel(min(ANSWER, width - bar - frame - 1))
            beside.add_row(answer, self.touched(bar))
            yield beside
        yield legend()

    def _panel(self, width: int) -> Panel:
        heading = Text.assemble(
            (self.title, "bold"), f"  block {self.blocks}, forward {self.forwards}"
        )
        return Panel(
            self.answer(), title=heading, title_align="left", border_style="dim", width=width
        )

    def _frame(self) -> int:
        """Columns of the experts' panel beside its bars."""
        return len(f"layer {max(self.layers)} ") + len(f" {self.total}/{self.total}") + 4

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

    def touched(self, width: int = BAR) -> Panel:
        """One bar a layer: the unique experts of the last forward out of all there are."""
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        for layer, count in zip(self.layers, self.experts or repeat(0), strict=False):
            filled = round(width * count / self.total)
            bar = Text.assemble(("━" * filled, "#5f87d7"), ("─" * (width - filled), "dim"))
            table.add_row(f"layer {layer}", bar, f"{count}/{self.total}")
        return Panel(
            table,
            title="experts touched",
            title_align="left",
            border_style="dim",
            width=self._frame() + width,
        )


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
    text.append("  ")
    text.append("edited", style="underline dim")
    text.append(f"  {MASK} still masked", style="dim")
    return text
