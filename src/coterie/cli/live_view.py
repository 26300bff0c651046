"""The live view of ``--watch``: tokens coloured by confidence, and the experts of each layer."""

import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from itertools import repeat

from rich.console import Console, ConsoleOptions, RenderResult
from rich.live import Live
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from coterie.cli.output import console
from coterie.engine.engine import Engine
from coterie.engine.events import Denoised, Event
from coterie.errors import printable

MASK_GLYPH, END_GLYPH = "▒", "∎"
ANSWER_WIDTH, BAR_WIDTH = 64, 24  # columns of the answer and of a full bar, in a wide terminal
MIN_BAR_WIDTH = 12  # columns of a bar that shares a line with the answer
NARROW_WIDTH = 72  # columns below which the experts stand under the answer
MIN_FRAME_SECONDS = 0.08  # a small model is faster than the eye
# Confidence from 0 to 1 in five steps, readable on a dark and on a light background.
CONFIDENCE_COLOURS = ("#d7005f", "#d75f00", "#af8700", "#5f8700", "#008787")


@dataclass(frozen=True)
class TokenMark:
    """What one position shows."""

    text: str
    confidence: float
    state: str  # "committed", "edited" or "provisional"


@dataclass  # not frozen: each forward updates it
class LiveView:
    """Collects events and draws them."""

    title: str
    decode_token: Callable[[int], str]
    num_experts: int  # routed experts of a layer
    moe_layers: tuple[int, ...]
    eos_ids: tuple[int, ...] = ()
    tokens: dict[int, TokenMark] = field(default_factory=dict)
    experts: tuple[int, ...] = ()
    forwards: int = 0
    blocks: int = 0

    def update(self, event: Denoised) -> None:
        """Adds one forward."""
        for position in event.remasked:
            self.tokens.pop(position, None)
        tokens_by_state = {"committed": event.committed, "edited": event.edited}
        for state, tokens in {**tokens_by_state, "provisional": event.provisional}.items():
            for token in tokens:
                text = printable(self.decode_token(token.id))
                text = END_GLYPH if token.id in self.eos_ids else text
                self.tokens[token.position] = TokenMark(text, token.confidence, state)
        self.experts = event.experts or self.experts
        self.forwards, self.blocks = event.forward, event.block + 1

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        width, frame_width = options.max_width, self._frame_width()
        if width < NARROW_WIDTH:
            bar_width = min(width, ANSWER_WIDTH, frame_width + BAR_WIDTH) - frame_width
            yield self.answer_panel(min(width, ANSWER_WIDTH))
            yield self.experts_panel(max(0, bar_width))
        else:
            bar_width = min(BAR_WIDTH, max(MIN_BAR_WIDTH, width - ANSWER_WIDTH - frame_width - 1))
            grid = Table.grid(padding=(0, 1, 0, 0))
            answer_width = min(ANSWER_WIDTH, width - bar_width - frame_width - 1)
            grid.add_row(self.answer_panel(answer_width), self.experts_panel(bar_width))
            yield grid
        yield legend()

    def answer_panel(self, width: int) -> Panel:
        position = f"  block {self.blocks}, forward {self.forwards}"
        return _panel(self.answer_text(), Text.assemble((self.title, "bold"), position), width)

    def _frame_width(self) -> int:
        """Columns of the experts' panel without its bars."""
        label, count = f"layer {max(self.moe_layers)} ", f" {self.num_experts}/{self.num_experts}"
        return len(label) + len(count) + 4

    def answer_text(self) -> Text:
        """The answer so far: the colour shows the confidence, guesses are in italics."""
        text = Text()
        for position in range(max(self.tokens, default=-1) + 1):
            token = self.tokens.get(position)
            if token is None or (token.state == "provisional" and not token.text.strip()):
                text.append(MASK_GLYPH, style="dim")
            else:
                text.append(token.text, style=token_style(token))
        return text

    def experts_panel(self, width: int = BAR_WIDTH) -> Panel:
        """One bar a layer: the distinct experts of the last forward."""
        table = Table.grid(padding=(0, 1))
        for justify in ("left", "left", "right"):
            table.add_column(justify=justify, no_wrap=True)
        for layer, count in zip(self.moe_layers, self.experts or repeat(0), strict=False):
            filled = round(width * count / self.num_experts)
            bar = Text.assemble(("━" * filled, "#5f87d7"), ("─" * (width - filled), "dim"))
            table.add_row(f"layer {layer}", bar, f"{count}/{self.num_experts}")
        return _panel(table, "experts touched", self._frame_width() + width)


def show_live(engine: Engine, events: Iterable[Event], policy: str) -> Iterator[Event]:
    """The same events; the terminal shows each forward, at a readable speed."""
    live_view = make_view(engine, policy)
    with Live(live_view, console=console(), auto_refresh=False) as live:
        for event in events:
            frame_start = time.perf_counter()
            if isinstance(event, Denoised):
                live_view.update(event)
                live.refresh()
                time.sleep(max(0.0, MIN_FRAME_SECONDS - (time.perf_counter() - frame_start)))
            yield event


def make_view(engine: Engine, policy: str) -> LiveView:
    """An empty view of this engine's model."""
    model, spec = engine.model, engine.model.spec
    decode = model.tokenizer.decode_token
    return LiveView(policy, decode, spec.router.experts, spec.moe_layers, model.eos_ids)


def token_style(token: TokenMark) -> str:
    """A rich style: the colour shows the confidence, the form shows the state."""
    step = int(max(token.confidence, 0.0) * len(CONFIDENCE_COLOURS))
    colour = CONFIDENCE_COLOURS[min(step, len(CONFIDENCE_COLOURS) - 1)]
    styles = {"committed": colour, "edited": f"underline {colour}"}
    return styles.get(token.state, f"dim italic {colour}")


def legend() -> Text:
    """The key to the colours."""
    text = Text.assemble((" confidence  ", "dim"))
    for step, colour in enumerate(CONFIDENCE_COLOURS):
        text.append(f"{step / len(CONFIDENCE_COLOURS):.1f} ", style=colour)
    guess, edited = ("   guess", "dim italic"), ("edited", "underline dim")
    rest = (("1.0", CONFIDENCE_COLOURS[-1]), guess, "  ", edited)
    return Text.assemble(text, *rest, (f"  {MASK_GLYPH} still masked", "dim"))


def _panel(content: Text | Table, title: Text | str, width: int) -> Panel:
    return Panel(content, title=title, title_align="left", border_style="dim", width=width)
