"""``coterie chat``: a conversation in the terminal."""

import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event as Flag
from typing import Annotated

from coterie.cli import engine_options as engines
from coterie.cli import options as o
from coterie.cli import output
from coterie.cli.generate import result_summary
from coterie.engine.engine import Engine
from coterie.engine.events import Finished, Result
from coterie.errors import CoterieError, GenerationError
from coterie.files import atomic_write_json
from coterie.offload.capacity import format_bytes

PREFIX_CACHE_BYTES = 1 << 30  # for the keys of earlier turns
SYSTEM_HELP = "System turn that starts the conversation."
HELP = """\
/policy SPEC   route by another policy, such as des-vote:beta=0.15; alone, print the current one
/stats         print counts of the last answer, and of the keys that were used again
/save FILE     write the conversation to a JSON file
/reset         forget the conversation
/quit          leave, as Ctrl-D does
Ctrl-C during an answer ends it and keeps its final text."""


@dataclass  # not frozen: each turn adds to it
class Conversation:
    """The turns so far, and what answers the next one."""

    engine: Engine
    policy: str
    options: engines.GenerationOptions
    first_turns: Sequence[dict[str, str]] = ()
    turns: list[dict[str, str]] = field(default_factory=list)
    last: Result | None = None

    def answer(self, question: str, interrupted: Flag) -> Iterator[str]:
        """The answer's parts as they become final. An interrupt ends it after a forward.

        Both turns join the conversation, unless nothing was answered.
        """
        self.turns = self.turns or list(self.first_turns)
        turns = [*self.turns, {"role": "user", "content": question}]
        engine, text = self.engine, ""
        ids = engine.model.tokenizer.encode_chat(turns)
        number = engine.submit(ids, policy=self.policy, **self._fitted_options(len(ids)))
        try:
            while number in engine.rows and not interrupted.is_set():
                for event in engine.step():
                    if isinstance(event, Finished):
                        self.last = event.result
                    else:
                        text += event.text
                        yield event.text
        finally:
            if number in engine.rows:
                self.last = engine.result(number)
                engine.cancel(number)
            if text:
                self.turns = [*turns, {"role": "assistant", "content": text}]

    def _fitted_options(self, prompt_tokens: int) -> engines.GenerationOptions:
        """The options with as many new tokens as the model still has positions for."""
        length = self.engine.model.spec.max_length
        fitted = self.engine.generation.replace(**self.options).fit(prompt_tokens, length)
        if fitted is None:
            raise GenerationError(
                f"the conversation fills the {length} positions of the model; /reset starts anew"
            )
        return {**self.options, "max_new_tokens": fitted.max_new_tokens}

    def set_policy(self, spec: str) -> None:
        """Route the next answers by another policy."""
        engines.check_engine(self.engine, [spec], self.options)
        self.policy = engines.canonical_policy(spec)

    def save(self, path: Path) -> None:
        """Write the turns, with the model and the policy, as JSON."""
        output.check_output_file(path)
        model, policy = self.engine.model.name, self.policy
        atomic_write_json(path, {"model": model, "policy": policy, "messages": self.turns})

    def stats(self) -> str:
        """Counts of the last answer and of the prefix cache."""
        cache = self.engine.prefix_cache_stats()
        lines = [f"{sum(turn['role'] == 'user' for turn in self.turns)} questions"]
        if (last := self.last) is not None:
            lines.append(result_summary(last, timed=True))
            lines.append(f"keys of {last.cached_tokens} of {last.prompt_tokens} prompt tokens used "
                         "again")  # fmt: skip
        lines.append(f"prefix cache: {format_bytes(cache.bytes)} in {cache.entries} blocks")
        return "\n".join(lines)


@o.with_option_groups
def chat(
    *, policy: o.PolicySpec = engines.VANILLA, decode: engines.DecodeOptions,
    sampling: engines.SamplingOptions, seed: o.Seed = None,
    system: Annotated[str | None, o.decoding(SYSTEM_HELP)] = None,
    engine_options: engines.EngineOptions,
) -> None:  # fmt: skip
    """Talk to a model; /help lists what else can be typed.

    \b
    coterie chat
    coterie chat --model ./LLaDA2.0-mini-int8 --policy des-vote:beta=0.15 --expert-memory 35%
    coterie chat < questions.txt        one turn a line, one answer a line

    The keys of earlier turns are used again, so that a turn computes only what is new.
    """
    spec = engines.canonical_policy(policy)
    options: engines.GenerationOptions = {**decode.to_fields(), **sampling.to_fields()}
    options |= {} if seed is None else {"seed": seed}
    engine = engine_options.open(prefix_cache_bytes=PREFIX_CACHE_BYTES)
    engines.check_engine(engine, [policy], options)
    first = [] if system is None else [{"role": "system", "content": system}]
    conversation = Conversation(engine, spec, options, first)
    in_terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if in_terminal:
        output.print_note(f"{engine.model.name} under {spec}; /help lists commands")
    for line in read_lines(in_terminal=in_terminal):
        try:
            if line == "/quit":
                return
            take_line(conversation, line, in_terminal=in_terminal)
        except (CoterieError, OSError) as error:
            if not in_terminal:
                raise
            output.print_note(str(error))


def read_lines(*, in_terminal: bool) -> Iterator[str]:
    """The lines of standard input that are not blank; a terminal gets a prompt and a history."""
    if in_terminal:
        with suppress(ImportError):  # Windows has none
            import readline  # noqa: F401
    while True:
        try:
            line = input("> ") if in_terminal else next(sys.stdin).removesuffix("\n")
        except KeyboardInterrupt:
            if not in_terminal:
                raise
            output.print_text("")
            continue
        except (EOFError, StopIteration):
            break
        if line.strip():
            yield line.strip()
    output.print_text("", end="\n" if in_terminal else "")


def take_line(conversation: Conversation, line: str, *, in_terminal: bool) -> None:
    """Run a command, or answer a question and print the answer."""
    command, _, argument = line.partition(" ")
    match command, argument.strip():
        case "/policy", spec if spec:
            conversation.set_policy(spec)
        case "/policy", _:
            output.print_text(conversation.policy)
        case "/save", path if path:
            conversation.save(Path(path))
        case "/stats", _:
            output.print_text(conversation.stats())
        case "/reset", _:
            conversation.turns = []
        case "/help", _:
            output.print_text(HELP)
        case _ if line.startswith("/"):
            raise CoterieError(f"{command}: no such command, or its argument is missing; see /help")
        case _:
            print_answer(conversation, line, in_terminal=in_terminal)


def print_answer(conversation: Conversation, question: str, *, in_terminal: bool) -> None:
    """Print an answer as it becomes final; a terminal also gets one line of counts."""
    with interrupts() as interrupted:
        try:
            for text in conversation.answer(question, interrupted):
                output.print_text(text, end="")
        finally:
            output.print_text("")
    if in_terminal and conversation.last is not None:
        stopped = "stopped; " if interrupted.is_set() else ""
        summary = stopped + result_summary(conversation.last, timed=True)
        output.console(stderr=True).print(summary, style="dim")
    elif interrupted.is_set():
        raise KeyboardInterrupt


@contextmanager
def interrupts() -> Iterator[Flag]:
    """A flag that Ctrl-C sets, so that a forward ends first; the second Ctrl-C interrupts."""
    interrupted = Flag()

    def on_signal(*_: object) -> None:
        if interrupted.is_set():
            raise KeyboardInterrupt
        interrupted.set()

    previous = signal.signal(signal.SIGINT, on_signal)
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)
