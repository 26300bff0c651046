"""Strict reading of a config.json: a key is used, known to have no effect, or an error."""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

from coterie.errors import ConfigError, clip, quote
from coterie.strict_json import read_object

Scalar: TypeAlias = bool | int | float | str | None

MAX_SIZE = 1 << 24
"""Upper limit of every size; a larger one means a damaged config."""

IGNORED_KEYS = frozenset(
    (
        *("_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal"),
        *("_flash_attn_2_enabled", "tf_legacy_loss", "use_bfloat16"),
        *("_commit_hash", "_experts_implementation", "_moe_implementation", "_name_or_path"),
        *("architectures", "attention_dropout", "attn_implementation", "auto_map"),
        *("bos_token_id", "embedding_dropout", "eos_token_id", "finetuning_task"),
        *("fuse_cross_entropy", "gradient_checkpointing", "id2label", "initializer_range"),
        *(
            "is_decoder",
            "label2id",
            "mask_token_id",
            "max_window_layers",
            "model_type",
            "output_attentions",
        ),
        *("output_dropout", "output_hidden_states", "output_router_logits", "pad_token_id"),
        *("problem_type", "return_dict", "router_aux_loss_coef", "sliding_window"),
        *("task_specific_params", "tokenizer_class", "torchscript", "transformers_version"),
        *("unsloth_fixed", "unsloth_version", "use_cache", "use_return_dict"),
    )
)
"""Keys without effect on a forward pass: training, bookkeeping, and token ids (read separately)."""

GENERATION_KEYS = frozenset(
    (
        *("bad_words_ids", "diversity_penalty", "do_sample", "early_stopping"),
        *("encoder_no_repeat_ngram_size", "length_penalty", "max_length", "max_new_tokens"),
        *("min_length", "no_repeat_ngram_size", "num_beam_groups", "num_beams"),
        *("num_return_sequences", "output_scores", "remove_invalid_values"),
        *("repetition_penalty", "return_dict_in_generate", "temperature", "top_k", "top_p"),
        *("typical_p"),
    )
)
"""Options of another decoder, which tools that write every default leave in a config."""

NEUTRAL_VALUES: Mapping[str, tuple[bool | int | dict[str, object], ...]] = {
    "add_cross_attention": (False,),
    "chunk_size_feed_forward": (0,),
    "is_encoder_decoder": (False,),
    "pretraining_tp": (1,),
    "pruned_heads": ({},),
    "tie_encoder_decoder": (False,),
    "use_regular_causal": (False,),
}
"""Keys that change a forward pass, except with these values."""


@dataclass(frozen=True)
class ModelConfig:
    """A config and the keys read so far; errors name ``file`` and the key."""

    file: Path
    values: Mapping[str, object]
    read_keys: set[str] = field(default_factory=set)  # grows while a family reads

    @staticmethod
    def of(file: Path) -> ModelConfig:
        if not os.path.lexists(file):
            raise ConfigError(f"{file}: no such file; a model folder has a config.json")
        return ModelConfig(file, read_object(file))

    def get(self, key: str) -> object:
        """The value, or None if the key is absent."""
        self.read_keys.add(key)
        return self.values.get(key)

    def section(self, key: str) -> ModelConfig:
        """A config inside the config, read and checked on its own."""
        value = self.get(key)
        if not isinstance(value, Mapping):
            raise self.error(key, "is missing" if value is None else f"is {quote(value)}")
        return ModelConfig(self.file, value)

    def size(self, key: str, *, maximum: int = MAX_SIZE) -> int:
        """A required integer, at least 1."""
        value = self.get(key)
        if value is None:
            raise self.error(key, "is missing")
        return self._checked_int(key, value, 1, maximum)

    def optional_size(self, key: str, *, minimum: int = 1) -> int | None:
        """An integer, or None if the key is absent or null."""
        value = self.get(key)
        return None if value is None else self._checked_int(key, value, minimum, MAX_SIZE)

    def number(self, key: str, default: float | None = None, maximum: float = math.inf) -> float:
        """A finite positive number; required unless it has a default."""
        value = self.get(key)
        if value is None:
            value = default
        if value is None:
            raise self.error(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, f"is {quote(value)}, not a number")
        if not 0 < value < math.inf:
            raise self.error(key, f"is {quote(value)}; it must be finite and positive")
        if value > maximum:
            raise self.error(key, f"is {quote(value)}; it must be above 0 and at most {maximum:g}")
        if value > sys.float_info.max:
            raise self.error(key, "is a number too large to calculate with")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """A boolean; null and absent mean the default."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, f"is {quote(value)}, not true or false")
        return value

    def allow_only(self, key: str, *supported: Scalar | dict[str, object]) -> None:
        """Raises ConfigError if the key is present with another value than these.

        Null is false, as in the models' own code.
        """
        value = self.get(key)
        if key not in self.values or (value is None and False in supported):
            return
        same_type = (v for v in supported if type(v) is type(value) or _are_numbers(v, value))
        if not any(v == value for v in same_type):
            known = " or ".join(json.dumps(v) for v in supported)
            raise self.error(key, f"is {clip(json.dumps(value))}; supported: {known}")

    def check_unknown_keys(self) -> None:
        """Raises ConfigError for keys that are neither read nor known to have no effect.

        A null has no effect under any key.
        """
        for key, neutral in NEUTRAL_VALUES.items():
            self.allow_only(key, *neutral, None)
        known = self.read_keys | IGNORED_KEYS | GENERATION_KEYS
        if unknown := sorted(key for key in set(self.values) - known if self.get(key) is not None):
            raise ConfigError(
                f"{self.file}: unknown key {clip(', '.join(map(repr, unknown)), 300)}"
            )

    def error(self, key: str, problem: str) -> ConfigError:
        return ConfigError(f"{self.file}: {key} {problem}")

    def _checked_int(self, key: str, value: object, minimum: int, maximum: int) -> int:
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, f"is {quote(value)}, not a whole number")
        if not minimum <= value <= maximum:
            raise self.error(key, f"is {quote(value)}; it must lie between {minimum} and {maximum}")
        return value


def _are_numbers(left: object, right: object) -> bool:
    no_bools = not isinstance(left, bool) and not isinstance(right, bool)
    return no_bools and isinstance(left, int | float) and isinstance(right, int | float)
