"""A model class for lm-evaluation-harness, registered as "coterie".

The harness only finds registered models, so this module must be imported first. ``coterie lm-eval``
imports it and then runs the harness's own command.
"""

from __future__ import annotations

import logging
import math
import sys
from collections.abc import Mapping, Sequence
from statistics import fmean, variance
from typing import Protocol

import torch
from lm_eval.api.model import LM  # pyright: ignore[reportMissingImports]
from lm_eval.api.registry import register_model  # pyright: ignore[reportMissingImports]
from tqdm import tqdm

from coterie.engine.engine import load
from coterie.engine.events import Finished
from coterie.engine.generation_config import GenerationConfig
from coterie.errors import ConfigError
from coterie.lab.likelihood.estimator import LikelihoodEstimator, Passage
from coterie.lab.likelihood.passages import continuation_passage, split_text
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.tokenizer.chat_template import ChatTemplate
from coterie.tokenizer.tokenizer import SubwordTokenizer

NAME = "coterie"
DEFAULT_BATCH_SIZE, DEFAULT_SAMPLES = 16, 32
LENGTH_OPTIONS = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
SAMPLING_OPTIONS = ("temperature", "top_k", "top_p")
HANDLED_OPTIONS = ("do_sample", "until", *LENGTH_OPTIONS, *SAMPLING_OPTIONS)

log = logging.getLogger(__name__)


class HarnessRequest(Protocol):
    """A request of the harness: a prompt and its generation options."""

    @property
    def args(self) -> tuple[str, Mapping[str, object]]: ...


class TextRequest(Protocol):
    """A request of a likelihood: a context and its continuation, or one text."""

    @property
    def args(self) -> tuple[str, ...]: ...


@register_model(NAME)
class CoterieLM(LM):
    """Answers and likelihoods; further options are fields of ``GenerationConfig``.

    A likelihood is a bound from ``likelihood_samples`` corruptions of each block. They are the same
    under every policy.
    """

    def __init__(
        self,
        pretrained: str | None = None,
        policy: str = "vanilla",
        *,
        dtype: str | None = None,
        device: str | None = None,
        expert_dtype: str | None = None,
        expert_memory: str | None = None,
        imagine_memory: str | None = None,
        eviction: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        likelihood_samples: int = DEFAULT_SAMPLES,
        **options: object,
    ) -> None:
        super().__init__()
        if "max_gen_toks" in options:
            options["max_new_tokens"] = options.pop("max_gen_toks")
        _check_options(options)
        if likelihood_samples < 1:
            raise ConfigError(f"likelihood_samples is {likelihood_samples}; it must be 1 or more")
        memory = _expert_memory(expert_memory, imagine_memory, eviction)
        # The harness's "auto" searches for the largest batch; a fixed default is enough here.
        default_batch_size = 1 if memory is not None else max_batch_size or DEFAULT_BATCH_SIZE
        self.rows = int(str(batch_size)) if str(batch_size).isdigit() else default_batch_size
        if self.rows < 1 or (memory is not None and self.rows != 1):
            raise ConfigError(
                f"batch_size is {batch_size}; it must be 1 or more, and 1 where not all experts "
                "are in memory: an answer may depend on the others of its batch"
            )
        self.engine = load(
            pretrained, policy=policy, dtype=dtype, device=_available_device(device),
            expert_dtype=expert_dtype, expert_memory=memory,
        )  # fmt: skip
        self.engine.generation = self.engine.generation.replace(**options)
        self.policy, self.uses_template = policy, False
        self.samples, self.noises = likelihood_samples, list[float]()

    @property
    def tokenizer_name(self) -> str:
        """The key of the chat template in the harness's request cache."""
        return self.engine.model.name.replace("/", "__")

    @property
    def _template(self) -> ChatTemplate | None:
        tokenizer = self.engine.model.tokenizer
        return tokenizer.template if isinstance(tokenizer, SubwordTokenizer) else None

    def chat_template(self, chat_template: bool | str = False) -> str:
        """The template's source; the harness calls this before it applies a template."""
        template = self._template
        self.uses_template = bool(chat_template) and template is not None
        return "" if template is None else template.source

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """The text of a conversation; without a generation prompt it ends in an open last turn."""
        if (template := self._template) is None:
            raise ConfigError(f"{self.engine.model.name}: no chat template without a tokenizer")
        self.uses_template = True
        if add_generation_prompt:
            return template.render(chat_history)
        return template.render(chat_history[:-1]) + chat_history[-1]["content"]

    def get_model_info(self) -> dict[str, object]:
        """Metadata for the harness's results file."""
        model = self.engine.model
        return {
            "policy": self.policy,
            "model_dtype": str(model.transformer.dtype),
            "experts": model.spec.expert_storage,
            "memory": None if (memory := model.memory_config) is None else memory.to_dict(),
            "generation": self.engine.generation.document(),
            "likelihood_samples": self.samples,
            "likelihood_noise": fmean(self.noises) if self.noises else None,
        }

    def generate_until(self, requests: Sequence[HarnessRequest]) -> list[str]:
        """Each answer, cut at the first of its ``until`` strings."""
        if not self.uses_template and self._template is not None:
            log.warning(NO_TEMPLATE)
        waiting = list(enumerate(requests))[::-1]
        texts: dict[int, str] = {}
        active: dict[int, tuple[int, tuple[str, ...]]] = {}  # row: request, stop strings
        with tqdm(total=len(requests), desc="coterie") as bar:
            while waiting or active:
                while waiting and len(active) < self.rows:
                    if not active:
                        self.engine.reset_cache()
                    index, request = waiting.pop()
                    row = self._submit(*request.args, seed=index)
                    active[row] = index, _stop_texts(request.args[1])
                for row, text in self._step({row: stops for row, (_, stops) in active.items()}):
                    index, stops = active.pop(row)
                    texts[index] = _truncate_at_stop(text, stops)
                    self.cache_hook.add_partial(
                        "generate_until", requests[index].args, texts[index]
                    )
                    bar.update()
        return [texts[index] for index in range(len(requests))]

    def loglikelihood(self, requests: Sequence[TextRequest]) -> list[tuple[float, bool]]:
        """The log-likelihood of each continuation; none counts as what greedy decoding writes."""
        passages = [
            continuation_passage(str(i), self.engine, *r.args[:2], templated=self.uses_template)
            for i, r in enumerate(requests)
        ]
        answers = [(value, False) for value in self._log_likelihoods(passages)]
        for request, answer in zip(requests, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", request.args, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[TextRequest]) -> list[float]:
        """The log-likelihood of each text: the sum over its passages, each on its own."""
        parts = [
            list(split_text(str(i), request.args[0], self.engine))
            for i, request in enumerate(requests)
        ]
        values = iter(self._log_likelihoods([passage for part in parts for passage in part]))
        totals = [sum(next(values) for _ in part) for part in parts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _log_likelihoods(self, passages: Sequence[Passage]) -> list[float]:
        """Each passage's value; says how large the error of the corruptions is."""
        estimator = LikelihoodEstimator(self.engine, self.samples)
        # Passages of equal length share forwards.
        order = sorted(range(len(passages)), key=lambda i: len(passages[i].ids))
        values, noises = dict[int, float](), list[float]()
        with tqdm(total=len(passages), desc="coterie") as bar:
            for start in range(0, len(order), self.rows):
                indices = order[start : start + self.rows]
                [scores] = estimator.score([passages[i] for i in indices], [self.policy])
                for i, score in zip(indices, scores, strict=True):
                    values[i] = -score.mean_nats
                    if self.samples > 1:
                        noises.append(math.sqrt(variance(score.nats) / self.samples))
                bar.update(len(indices))
        self.noises += noises
        if noises:
            log.warning(NOISE, self.samples, fmean(noises))
        return [values[i] for i in range(len(passages))]

    def _submit(self, prompt: str, request_options: Mapping[str, object], *, seed: int) -> int:
        options = _generation_options(request_options, seed)
        generation, model = self.engine.generation.replace(**options), self.engine.model
        ids = self._encode(prompt)
        # Long prompts lose their beginning, as with the harness's other models.
        max_prompt_tokens = model.spec.max_length - generation.max_new_tokens - 2 * generation.block
        if len(ids) > max_prompt_tokens > 0:
            log.warning("a prompt of %d tokens is cut to its last %d", len(ids), max_prompt_tokens)
            ids = ids[-max_prompt_tokens:]
        return self.engine.submit(ids, policy=self.policy, **options)

    def _encode(self, prompt: str) -> list[int]:
        tokenizer = self.engine.model.tokenizer
        if self.uses_template and isinstance(tokenizer, SubwordTokenizer):
            # The template writes every special token itself.
            return tokenizer.tokenizer.encode(prompt, add_special_tokens=False).ids
        return tokenizer.encode(prompt, raw=True)

    def _step(self, stop_by_row: Mapping[int, Sequence[str]]) -> list[tuple[int, str]]:
        """Rows that finished or reached a stop string, with their texts."""
        texts: dict[int, str] = {}
        for event in self.engine.step():
            if isinstance(event, Finished):
                texts[event.row] = event.result.text
            elif event.start > 0 and event.row in set(stop_by_row) & set(self.engine.rows):
                # The blocks before the event's are final.
                ids = self.engine.sequence(event.row).answer[: event.start]
                text = self.engine.model.tokenizer.decode(ids)
                if any(stop in text for stop in stop_by_row[event.row]):
                    texts[event.row] = text
        for row in set(texts) & set(self.engine.rows):
            self.engine.cancel(row)
        return list(texts.items())


def run_harness(args: Sequence[str]) -> None:
    """Runs the harness's command with this model registered."""
    from lm_eval.__main__ import cli_evaluate  # pyright: ignore[reportMissingImports]

    sys.argv = ["lm_eval", *args]
    cli_evaluate()


def _check_options(options: Mapping[str, object]) -> None:
    """Raises ConfigError for unknown options, before a model is loaded."""
    try:
        GenerationConfig().replace(**options)
    except ConfigError as error:
        raise ConfigError(f"model_args: {error}; {OTHER_OPTIONS}") from None


def _expert_memory(
    size: str | None, simulated_size: str | None, eviction: str | None
) -> ExpertMemoryConfig | None:
    """The memory config of these options; raises for combinations without effect."""
    if size is not None and simulated_size is not None:
        raise ConfigError("imagine_memory replaces expert_memory; set one of them")
    capacity = simulated_size if size is None else size
    if capacity is not None:
        simulated = simulated_size is not None
        return ExpertMemoryConfig.parse(str(capacity), eviction=eviction, simulated=simulated)
    if eviction is not None:
        raise ConfigError("eviction has no effect without expert_memory or imagine_memory")
    return None


def _available_device(device: str | None) -> str:
    """The device, or the CPU without a GPU: the harness's default is cuda:0 on every machine."""
    if device and device.startswith("cuda") and not torch.cuda.is_available():
        log.warning("%s is not available: running on the CPU", device)
        return "cpu"
    return device or "auto"


def _generation_options(request_options: Mapping[str, object], seed: int) -> dict[str, object]:
    """Fields of ``GenerationConfig`` for a task's ``generation_kwargs``."""
    set_options = {name: value for name, value in request_options.items() if value is not None}
    lengths = [set_options[name] for name in LENGTH_OPTIONS if name in set_options]
    options: dict[str, object] = {"max_new_tokens": lengths[0]} if lengths else {}
    temperature = set_options.get("temperature")
    samples = set_options.get("do_sample") is not False
    if samples and isinstance(temperature, int | float) and temperature:
        options |= {name: set_options[name] for name in SAMPLING_OPTIONS if name in set_options}
        options |= {"temperature": float(temperature), "seed": seed}  # repeats differ by seed
    ignored = [name for name in request_options if name not in HANDLED_OPTIONS]
    if ignored:
        log.warning("generation_kwargs without effect: %s", ", ".join(ignored))
    return options


def _stop_texts(request_options: Mapping[str, object]) -> tuple[str, ...]:
    stops = request_options.get("until") or ()
    return (stops,) if isinstance(stops, str) else tuple(stop for stop in stops if stop)  # pyright: ignore[reportGeneralTypeIssues, reportAttributeAccessIssue]


def _truncate_at_stop(text: str, stops: Sequence[str]) -> str:
    return text[: min([len(text), *(text.find(stop) for stop in stops if stop in text)])]


NO_TEMPLATE = (
    "the prompts have no chat template; answers of an instruct model need it: apply_chat_template"
)
OTHER_OPTIONS = (
    "and pretrained, policy, dtype, device, experts, expert_memory, imagine_memory, eviction, "
    "batch_size, likelihood_samples; a policy with commas needs model_args in JSON: "
    '{"policy": "des-vote:beta=0.3,voters=before-eos"}'
)
NOISE = (
    "log-likelihoods are bounds from %d samples (likelihood_samples=), with a standard error of "
    "%.3f on average"
)
