"""``coterie chat``: a conversation in the terminal."""

import sys
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event as Flag

from coterie.cli import engine_options as engines
from coterie.cli import output
from coterie.cli.generate import result_summary
from coterie.cli.interrupts import Interrupts
from coterie.engine.engine import Engine
from coterie.engine.events import Finished, Result
from coterie.errors import CoterieError, GenerationError
from coterie.files import atomic_write_json
from coterie.offload.capacity import format_bytes

PREFIX_CACHE_BYTES = 1 << 30  # for the keys of earlier turns
QUIT = "/quit"
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
    stopped: bool = False  # whether an interrupt ended the last answer

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
            self.stopped = number in engine.rows
            if self.stopped:
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

    def summary(self) -> str:
        """Counts of the last answer."""
        if self.last is None:
            return "no answer yet"
        stopped = "stopped; " if self.stopped else ""
        return stopped + result_summary(self.last, timed=True)

    def stats(self) -> str:
        """Counts of the last answer and of the prefix cache."""
        cache = self.engine.prefix_cache_stats()
        lines = [f"{sum(turn['role'] == 'user' for turn in self.turns)} questions", self.summary()]
        if (last := self.last) is not None:
            used = f"{last.cached_tokens} of {last.prompt_tokens} prompt tokens"
            lines.append(f"keys of {used} used again")
        lines.append(f"prefix cache: {format_bytes(cache.bytes)} in {cache.entries} blocks")
        return "\n".join(lines)


def chat(
    *, policy: str = engines.VANILLA, decode: engines.DecodeOptions,
    sampling: engines.SamplingOptions, seed: int | None = None, system: str | None = None,
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
    stdin = engines.standard_input()
    if stdin.isatty() and sys.stdout.isatty():
        output.print_note(f"{engine.model.name} under {spec}; /help lists commands")
        talk_in_terminal(conversation)
        return
    for line in stdin:
        if line.strip() == QUIT:
            return
        take_line(conversation, line.strip(), Flag())


def talk_in_terminal(conversation: Conversation) -> None:
    """Take lines until Ctrl-D; an error costs a line."""
    with suppress(ImportError):  # Windows has none
        import readline  # noqa: F401
    interrupts = Interrupts()
    with interrupts.handled(), suppress(EOFError):
        while (line := (interrupts.read_line() or "").strip()) != QUIT:
            try:
                if take_line(conversation, line, interrupts.requested):
                    output.console(stderr=True).print(conversation.summary(), style="dim")
            except (CoterieError, OSError) as error:
                output.print_note(str(error))
        return
    output.print_text("")


def take_line(conversation: Conversation, line: str, interrupted: Flag) -> bool:
    """Run a command, or print the answer to a question as it becomes final.

    Returns whether there was an answer.
    """
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
        case _ if line:
            print_answer(conversation.answer(line, interrupted))
            return True
    return False


def print_answer(parts: Iterator[str]) -> None:
    try:
        for text in parts:
            output.print_text(text, end="")
    finally:
        output.print_text("")
