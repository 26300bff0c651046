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

from coterie.engine.engine import load
from coterie.engine.events import Denoised, Finished
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import CoterieError
from coterie.keys import names_of
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.tokenizer.tokenizer import SubwordTokenizer

NAME = "coterie"
DEFAULT_BATCH_SIZE = 16
LENGTH_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p")
HANDLED_OPTIONS = (
    "do_sample",
    "until",
    *LENGTH_OPTIONS,
    *SAMPLING_OPTIONS,
)  # read here, or not an option of ``Generation``

log = logging.getLogger(__name__)


class HarnessRequest(Protocol):
    """What the harness asks: of ``generate_until``, a prompt and how to generate."""

    @property
    def args(self) -> tuple[str, Mapping[str, object]]: ...


@register_model(NAME)
class CoterieLM(LM):
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
        memory = _expert_memory(expert_memory, imagine_memory, eviction)
        self.engine = load(
            pretrained, policy=policy, dtype=dtype, device=_available_device(device), experts=experts,
            expert_memory=memory,
        )  # fmt: skip
        length = (
            {"max_new_tokens": options.pop("max_gen_toks")} if "max_gen_toks" in options else {}
        )
        self.engine.generation = self.engine.generation.replace(**length, **options)
        # "auto" would try out what fits in memory; rows of one canvas each need little of it.
        default_batch_size = 1 if memory is not None else max_batch_size or DEFAULT_BATCH_SIZE
        self.rows = int(str(batch_size)) if str(batch_size).isdigit() else default_batch_size
        if memory is not None and self.rows != 1:
            raise CoterieError(
                f"batch_size {batch_size}: where not all experts are in memory, an answer may "
                "depend on who is beside it; leave it out, or give 1"
            )
        if self.rows < 1:
            raise CoterieError(f"batch_size must be at least 1, not {batch_size!r}")
        self.policy, self.uses_template = policy, False

    @property
    def tokenizer_name(self) -> str:
        """Names the template in the harness's cache of requests."""
        return self.engine.model.name.replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's source, for the harness's record; asked for when one is applied."""
        codec = self.engine.model.codec
        self.uses_template = bool(chat_template) and isinstance(codec, SubwordTokenizer)
        return codec.template.source if isinstance(codec, SubwordTokenizer) else ""

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without a generation prompt its last turn is begun."""
        codec = self.engine.model.codec
        if not isinstance(codec, SubwordTokenizer):
            raise CoterieError(f"{self.engine.model.name}: has no tokenizer, so no chat template")
        self.uses_template = True
        if add_generation_prompt:
            return codec.template.render(chat_history)
        return codec.template.render(chat_history[:-1]) + chat_history[-1]["content"]

    def get_model_info(self) -> dict[str, object]:
        """For the harness's record of its configuration."""
        model = self.engine.model
        return {
            "policy": self.policy,
            "model_dtype": str(model.transformer.dtype),
            "experts": model.spec.expert_storage,
            "memory": None if (memory := model.memory_config) is None else memory.to_dict(),
            "generation": self.engine.generation.document(),
        }

    def generate_until(self, requests: Sequence[HarnessRequest]) -> list[str]:
        """Each answer up to the first of its ``until`` texts."""
        waiting = list(enumerate(requests))[::-1]
        texts: dict[int, str] = {}
        active: dict[int, tuple[int, tuple[str, ...]]] = {}
        with tqdm(total=len(requests), desc="coterie") as bar:
            while waiting or active:
                while waiting and len(active) < self.rows:
                    if not active:
                        self.engine.reset_cache()
                    index, request = waiting.pop()
                    active[self._submit(*request.args, seed=index)] = (
                        index,
                        _stop_texts(request.args[1]),
                    )
                for row, text in self._step({row: stop for row, (_, stop) in active.items()}):
                    index, stop = active.pop(row)
                    texts[index] = _truncate_at_stop(text, stop)
                    self.cache_hook.add_partial(
                        "generate_until", requests[index].args, texts[index]
                    )
                    bar.update()
        return [texts[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[HarnessRequest]) -> Never:
        raise NotImplementedError(NO_LIKELIHOOD)

    def loglikelihood_rolling(self, requests: Sequence[HarnessRequest]) -> Never:
        raise NotImplementedError(NO_LIKELIHOOD)

    def _submit(self, prompt: str, request_options: Mapping[str, object], *, seed: int) -> int:
        options = _generation_options(request_options, seed)
        generation, model = self.engine.generation.replace(**options), self.engine.model
        ids = self._encode(prompt)
        # As the harness does elsewhere: what does not fit is cut from the beginning.
        max_prompt_tokens = model.spec.max_length - generation.max_new_tokens - 2 * generation.block
        if len(ids) > max_prompt_tokens > 0:
            log.warning("a prompt of %d tokens is cut to its last %d", len(ids), max_prompt_tokens)
            ids = ids[-max_prompt_tokens:]
        return self.engine.submit(ids, policy=self.policy, **options)

    def _encode(self, prompt: str) -> list[int]:
        codec = self.engine.model.codec
        if self.uses_template and isinstance(codec, SubwordTokenizer):
            # The template writes every special token itself.
            return codec.tokenizer.encode(prompt, add_special_tokens=False).ids
        return codec.encode(prompt, raw=True)

    def _step(self, stop_by_row: Mapping[int, Sequence[str]]) -> list[tuple[int, str]]:
        """Rows that are done, with their texts: finished, or past one of their ``until``."""
        finished: dict[int, str] = {}
        for event in self.engine.step():
            if isinstance(event, Finished):
                finished[event.row] = event.result.text
            elif (
                event.row in stop_by_row
                and (text := self._stopped_text(event, stop_by_row[event.row])) is not None
            ):
                finished[event.row] = text
        for row in set(finished) & set(self.engine.rows):
            self.engine.cancel(row)
        return list(finished.items())

    def _stopped_text(self, event: Denoised, stops: Sequence[str]) -> str | None:
        """The text of the blocks before the event's, where one of ``until`` is in it."""
        if event.start <= 0 or event.row not in self.engine.rows:
            return None
        token_ids = self.engine.sequence(event.row).answer[: event.start]
        text = self.engine.model.codec.decode(token_ids)
        return text if any(stop in text for stop in stops) else None


def run_harness(args: Sequence[str]) -> None:
    """The harness's own command, with this model in its table."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    sys.argv = ["lm_eval", *args]
    cli_evaluate()


def _check_options(options: Mapping[str, object]) -> None:
    known = ["max_gen_toks", *names_of(GenerationConfig)]
    unknown = [name for name in options if name not in known]
    if unknown:
        raise CoterieError(
            f"unknown model_args {unknown[0]!r}; known: pretrained, policy, dtype, device, "
            f"experts, expert_memory, imagine_memory, eviction, batch_size, {', '.join(known)}; "
            "a policy with commas needs JSON: "
            '--model_args \'{"policy": "des-vote:beta=0.3,voters=before-eos"}\''
        )


def _expert_memory(
    expert_memory: str | None, simulated_memory: str | None, eviction: str | None
) -> ExpertMemoryConfig | None:
    """As the commands' options of these names; raises for what would have no effect."""
    if expert_memory is not None and simulated_memory is not None:
        raise CoterieError("imagine_memory stands in place of expert_memory; give one of them")
    size = simulated_memory if expert_memory is None else expert_memory
    if size is not None:
        return ExpertMemoryConfig.parse(
            str(size), eviction=eviction, simulated=simulated_memory is not None
        )
    if eviction is not None:
        raise CoterieError("eviction has no effect without expert_memory or imagine_memory")
    return None


def _available_device(device: str | None) -> str:
    """The one asked for; the harness asks for cuda:0 unless told, GPU or not."""
    if device and device.startswith("cuda") and not torch.cuda.is_available():
        log.warning("there is no %s: running on the CPU", device)
        return "cpu"
    return device or "auto"


def _generation_options(request_options: Mapping[str, object], seed: int) -> dict[str, object]:
    """Fields of ``Generation`` for a task's ``generation_kwargs``."""
    options: dict[str, object] = {}
    length = next(
        (request_options[name] for name in LENGTH_OPTIONS if request_options.get(name) is not None),
        None,
    )
    if length is not None:
        options["max_new_tokens"] = length
    temperature = request_options.get("temperature")
    if (
        request_options.get("do_sample") is not False
        and isinstance(temperature, int | float)
        and temperature
    ):
        options |= {
            name: request_options[name]
            for name in SAMPLING_OPTIONS
            if request_options.get(name) is not None
        }
        options["temperature"] = float(temperature)
        options["seed"] = seed  # repeats of one question draw differently
    ignored = [name for name in request_options if name not in HANDLED_OPTIONS]
    if ignored:
        log.warning("generation_kwargs without effect here: %s", ", ".join(ignored))
    return options


def _stop_texts(request_options: Mapping[str, object]) -> tuple[str, ...]:
    stops = request_options.get("until") or ()
    return (stops,) if isinstance(stops, str) else tuple(stop for stop in stops if stop)  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]


def _truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    return text[: min([len(text), *(text.find(stop) for stop in stops if stop in text)])]


NO_LIKELIHOOD = (
    "a diffusion model writes a block at once and has no left-to-right likelihood: choose tasks "
    "with output_type generate_until (such as gsm8k, humaneval, mbpp, minerva_math500)"
)
