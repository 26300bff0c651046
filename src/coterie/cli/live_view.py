"""The picture of a block being unmasked: words coloured by confidence, experts beside them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import repeat

from rich.console import Console, ConsoleOptions, RenderResult
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from coterie.engine.events import Denoised

MASK_GLYPH, END_GLYPH = "▒", "∎"
ANSWER_WIDTH, BAR_WIDTH = (
    64,
    24,
)  # columns of the answer and of a full bar, where there is room for both
MIN_BAR_WIDTH = 12  # columns of a bar that leaves room for the answer beside it
NARROW_WIDTH = 72  # columns below which the experts stand under the answer
# Confidence from 0 to 1 in five steps, readable on dark and on light ground.
CONFIDENCE_COLOURS = ("#d7005f", "#d75f00", "#af8700", "#5f8700", "#008787")


@dataclass(frozen=True)
class TokenMark:
    """What stands at one position now."""

    text: str
    confidence: float
    state: str  # "committed", "edited" or "provisional"


@dataclass
class LiveView:
    """Gathers events and draws itself; mutable, because it is what the eye sees now."""

    title: str
    decode_token: Callable[[int], str]
    num_experts: int  # routed experts of a layer
    moe_layers: tuple[int, ...]  # those that route
    eos_ids: tuple[int, ...] = ()  # token ids that end a text
    tokens: dict[int, TokenMark] = field(default_factory=dict)
    experts: tuple[int, ...] = ()
    forwards: int = 0
    blocks: int = 0

    def update(self, event: Denoised) -> None:
        """One forward: what it wrote, what it still weighs, unique experts by layer."""
        tokens_by_state = {"committed": event.committed, "edited": event.edited}
        for state, tokens in {**tokens_by_state, "provisional": event.provisional}.items():
            for token in tokens:
                text = END_GLYPH if token.id in self.eos_ids else self.decode_token(token.id)
                self.tokens[token.position] = TokenMark(text, token.confidence, state)
        self.experts = event.experts or self.experts
        self.forwards = event.forward
        self.blocks = event.block + 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, frame_width = options.max_width, self._frame_width()
        if width < NARROW_WIDTH:
            yield self.answer_panel(min(width, ANSWER_WIDTH))
            yield self.experts_panel(
                max(0, min(width, ANSWER_WIDTH, frame_width + BAR_WIDTH) - frame_width)
            )
        else:
            bar_width = min(BAR_WIDTH, max(MIN_BAR_WIDTH, width - ANSWER_WIDTH - frame_width - 1))
            grid = Table.grid(padding=(0, 1, 0, 0))
            answer = self.answer_panel(min(ANSWER_WIDTH, width - bar_width - frame_width - 1))
            grid.add_row(answer, self.experts_panel(bar_width))
            yield grid
        yield legend()

    def answer_panel(self, width: int) -> Panel:
        heading = Text.assemble(
            (self.title, "bold"), f"  block {self.blocks}, forward {self.forwards}"
        )
        return Panel(
            self.answer_text(), title=heading, title_align="left", border_style="dim", width=width
        )

    def _frame_width(self) -> int:
        """Columns of the experts' panel beside its bars."""
        return (
            len(f"layer {max(self.moe_layers)} ")
            + len(f" {self.num_experts}/{self.num_experts}")
            + 4
        )

    def answer_text(self) -> Text:
        """The answer so far: firm words in the colour of their confidence, guesses in italics."""
        text = Text()
        for position in range(max(self.tokens, default=-1) + 1):
            token = self.tokens.get(position)
            if token is None or (token.state == "provisional" and not token.text.strip()):
                text.append(MASK_GLYPH, style="dim")
            else:
                text.append(token.text, style=token_style(token))
        return text

    def experts_panel(self, width: int = BAR_WIDTH) -> Panel:
        """One bar a layer: the unique experts of the last forward out of all there are."""
        table = Table.grid(padding=(0, 1))
        table.add_column(no_wrap=True)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        for layer, count in zip(self.moe_layers, self.experts or repeat(0), strict=False):
            filled = round(width * count / self.num_experts)
            bar = Text.assemble(("━" * filled, "#5f87d7"), ("─" * (width - filled), "dim"))
            table.add_row(f"layer {layer}", bar, f"{count}/{self.num_experts}")
        return Panel(
            table,
            title="experts touched",
            title_align="left",
            border_style="dim",
            width=self._frame_width() + width,
        )


def token_style(token: TokenMark) -> str:
    """A rich style: colour says confidence, form says state."""
    colour = CONFIDENCE_COLOURS[
        min(int(max(token.confidence, 0.0) * len(CONFIDENCE_COLOURS)), len(CONFIDENCE_COLOURS) - 1)
    ]
    return {"committed": colour, "edited": f"underline {colour}"}.get(
        token.state, f"dim italic {colour}"
    )


def legend() -> Text:
    """How to read the colours."""
    text = Text.assemble((" confidence  ", "dim"))
    for step, colour in enumerate(CONFIDENCE_COLOURS):
        text.append(f"{step / len(CONFIDENCE_COLOURS):.1f} ", style=colour)
    text.append("1.0", style=CONFIDENCE_COLOURS[-1])
    text.append("   guess", style="dim italic")
    text.append("  ")
    text.append("edited", style="underline dim")
    text.append(f"  {MASK_GLYPH} still masked", style="dim")
    return text
