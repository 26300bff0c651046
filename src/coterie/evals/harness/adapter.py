"""A model class for lm-evaluation-harness: ``--model coterie --model_args pretrained=..,policy=..``

The harness finds models in its own table only, so this module must have been imported: by
``coterie lm-eval``, which hands over to the harness, or by the program that calls it.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Never, Protocol

import torch
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from coterie.engine.config import Generation
from coterie.engine.engine import load
from coterie.engine.event import Denoised, Finished
from coterie.engine.memory import Memory
from coterie.keys import names_of
from coterie.naming import CoterieError
from coterie.text.codec import Subwords

NAME = "coterie"
ROWS = 16
LENGTHS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLED = ("temperature", "top_k", "top_p")
IDLE = ("do_sample", "until", *LENGTHS, *SAMPLED)  # read here, or not an option of ``Generation``

log = logging.getLogger(__name__)


class Request(Protocol):
    """What the harness asks: of ``generate_until``, a prompt and how to generate."""

    @property
    def args(self) -> tuple[str, Mapping[str, object]]: ...


@register_model(NAME)
class Coterie(LM):
    """Answers ``generate_until``; other options are fields of ``Generation``."""

    def __init__(
        self,
        pretrained: str | None = None,
        policy: str = "vanilla",
        *,
        dtype: str | None = None,
        device: str | None = None,
        experts: str | None = None,
        expert_memory: str | None = None,
        imagine_memory: str | None = None,
        eviction: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: object,
    ) -> None:
        super().__init__()
        _check_options(options)
        memory = _memory(expert_memory, imagine_memory, eviction)
        self.engine = load(
            pretrained, policy=policy, dtype=dtype, device=_device(device), experts=experts,
            expert_memory=memory,
        )  # fmt: skip
        length = (
            {"max_new_tokens": options.pop("max_gen_toks")} if "max_gen_toks" in options else {}
        )
        self.engine.generation = self.engine.generation.but(**length, **options)
        # "auto" would try out what fits in memory; rows of one canvas each need little of it.
        usual = 1 if memory is not None else max_batch_size or ROWS
        self.rows = int(str(batch_size)) if str(batch_size).isdigit() else usual
        if memory is not None and self.rows != 1:
            raise CoterieError(
                f"batch_size {batch_size}: where not all experts are in memory, an answer may "
                "depend on who is beside it; leave it out, or give 1"
            )
        if self.rows < 1:
            raise CoterieError(f"batch_size must be at least 1, not {batch_size!r}")
        self.policy, self.templated = policy, False

    @property
    def tokenizer_name(self) -> str:
        """Names the template in the harness's cache of requests."""
        return self.engine.model.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's source, for the harness's record; asked for when one is applied."""
        codec = self.engine.model.codec
        self.templated = bool(chat_template) and isinstance(codec, Subwords)
        return codec.template.source if isinstance(codec, Subwords) else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without a generation prompt its last turn is begun."""
        codec = self.engine.model.codec
        if not isinstance(codec, Subwords):
            raise CoterieError(f"{self.engine.model.name}: has no tokenizer, so no chat template")
        self.templated = True
        if add_generation_prompt:
            return codec.template.render(chat_history)
        return codec.template.render(chat_history[:-1]) + chat_history[-1]["content"]

    def get_model_info(self) -> dict[str, object]:
        """For the harness's record of its configuration."""
        model = self.engine.model
        return {
            "policy": self.policy,
            "model_dtype": str(model.transformer.dtype),
            "experts": model.spec.experts_as,
            "memory": None if model.memory is None else model.memory.asked.document(),
            "generation": self.engine.generation.document(),
        }

    def generate_until(self, requests: Sequence[Request]) -> list[str]:
        """Each answer up to the first of its ``until`` texts."""
        waiting = list(enumerate(requests))[::-1]
        found: dict[int, str] = {}
        open_: dict[int, tuple[int, tuple[str, ...]]] = {}
        with tqdm(total=len(requests), desc="coterie") as bar:
            while waiting or open_:
                while waiting and len(open_) < self.rows:
                    if not open_:
                        self.engine.empty()
                    index, request = waiting.pop()
                    open_[self._submit(*request.args, seed=index)] = index, _until(request.args[1])
                for row, text in self._step({row: until for row, (_, until) in open_.items()}):
                    index, until = open_.pop(row)
                    found[index] = _cut(text, until)
                    self.cache_hook.add_partial(
                        "generate_until", requests[index].args, found[index]
                    )
                    bar.update()
        return [found[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[Request]) -> Never:
        raise NotImplementedError(NO_LIKELIHOOD)

    def loglikelihood_rolling(self, requests: Sequence[Request]) -> Never:
        raise NotImplementedError(NO_LIKELIHOOD)

    def _submit(self, prompt: str, asked: Mapping[str, object], *, seed: int) -> int:
        options = _generation(asked, seed)
        generation, model = self.engine.generation.but(**options), self.engine.model
        ids = self._ids(prompt)
        # As the harness does elsewhere: what does not fit is cut from the beginning.
        room = model.spec.max_length - generation.max_new_tokens - 2 * generation.block
        if len(ids) > room > 0:
            log.warning("a prompt of %d tokens is cut to its last %d", len(ids), room)
            ids = ids[-room:]
        return self.engine.submit(ids, policy=self.policy, **options)

    def _ids(self, prompt: str) -> list[int]:
        codec = self.engine.model.codec
        if self.templated and isinstance(codec, Subwords):
            # The template writes every special token itself.
            return codec.tokenizer.encode(prompt, add_special_tokens=False).ids
        return codec.encode(prompt, raw=True)

    def _step(self, until: Mapping[int, Sequence[str]]) -> list[tuple[int, str]]:
        """Rows that are done, with their texts: finished, or past one of their ``until``."""
        done: dict[int, str] = {}
        for event in self.engine.step():
            if isinstance(event, Finished):
                done[event.row] = event.result.text
            elif event.row in until and (text := self._final(event, until[event.row])) is not None:
                done[event.row] = text
        for row in set(done) & set(self.engine.rows):
            self.engine.cancel(row)
        return list(done.items())

    def _final(self, event: Denoised, until: Sequence[str]) -> str | None:
        """The text of the blocks before the event's, where one of ``until`` is in it."""
        if event.start <= 0 or event.row not in self.engine.rows:
            return None
        written = self.engine.row(event.row).answer[: event.start]
        text = self.engine.model.codec.decode(written)
        return text if any(stop in text for stop in until) else None


def hand_over(words: Sequence[str]) -> None:
    """The harness's own command, with this model in its table."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    sys.argv = ["lm_eval", *words]
    cli_evaluate()


def _check_options(options: Mapping[str, object]) -> None:
    known = ["max_gen_toks", *names_of(Generation)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise CoterieError(
            f"unknown model_args {unknown[0]!r}; known: pretrained, policy, dtype, device, "
            f"experts, expert_memory, imagine_memory, eviction, batch_size, {', '.join(known)}; "
            "a policy with commas needs JSON: "
            '--model_args \'{"policy": "des-vote:beta=0.3,voters=before-eos"}\''
        )


def _memory(expert: str | None, imagined: str | None, eviction: str | None) -> Memory | None:
    """As the commands' options of these names; raises for what would have no effect."""
    if expert is not None and imagined is not None:
        raise CoterieError("imagine_memory stands in place of expert_memory; give one of them")
    fast = imagined if expert is None else expert
    if fast is not None:
        return Memory.parse(str(fast), eviction=eviction, imagined=imagined is not None)
    if eviction is not None:
        raise CoterieError("eviction has no effect without expert_memory or imagine_memory")
    return None


def _device(asked: str | None) -> str:
    """The one asked for; the harness asks for cuda:0 unless told, GPU or not."""
    if asked and asked.startswith("cuda") and not torch.cuda.is_available():
        log.warning("there is no %s: running on the CPU", asked)
        return "cpu"
    return asked or "auto"


def _generation(asked: Mapping[str, object], seed: int) -> dict[str, object]:
    """Fields of ``Generation`` for a task's ``generation_kwargs``."""
    options: dict[str, object] = {}
    length = next((asked[name] for name in LENGTHS if asked.get(name) is not None), None)
    if length is not None:
        options["max_new_tokens"] = length
    temperature = asked.get("temperature")
    if asked.get("do_sample") is not False and isinstance(temperature, int | float) and temperature:
        options |= {name: asked[name] for name in SAMPLED if asked.get(name) is not None}
        options["temperature"] = float(temperature)
        options["seed"] = seed  # repeats of one question draw differently
    ignored = [name for name in asked if name not in IDLE]
    if ignored:
        log.warning("generation_kwargs without effect here: %s", ", ".join(ignored))
    return options


def _until(asked: Mapping[str, object]) -> tuple[str, ...]:
    stops = asked.get("until") or ()
    return (stops,) if isinstance(stops, str) else tuple(stop for stop in stops if stop)  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]


def _cut(text: str, until: Sequence[str]) -> str:
    return text[: min([len(text), *(text.find(stop) for stop in until if stop in text)])]


NO_LIKELIHOOD = (
    "a diffusion model writes a block at once and has no left-to-right likelihood: choose tasks "
    "with output_type generate_until (such as gsm8k, humaneval, mbpp, minerva_math500)"
)
