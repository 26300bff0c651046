"""Load a model by name, ready to run."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from pathlib import Path

import torch

from coterie.checkpoints.model_folder import ModelFolder
from coterie.checkpoints.source import EMBEDDED, find_folder
from coterie.errors import ConfigError
from coterie.families import Family, FamilyDefaults, eos_ids, mask_id
from coterie.files import ProgressCallback
from coterie.loading.disk_offload import DiskOffload, plan_disk_offload
from coterie.loading.expert_memory import ExpertMemoryConfig
from coterie.loading.gpu_offload import HostOffload
from coterie.loading.mixed_precision import MixedPrecision
from coterie.loading.placement import Placement, Resident, Simulated
from coterie.loading.target import LoadTarget
from coterie.model.spec import ModelSpec
from coterie.model.transformer import Transformer, build
from coterie.model.weights import weight_bytes
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.store import TrackedExpertStore
from coterie.ops import cpu
from coterie.quantization import QuantFormat, parse_dense_format, parse_format
from coterie.tokenizer import MASK_TOKEN, IdTokenizer, TextTokenizer, load_tokenizer
from coterie.values import NO_MASK

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
FP32_MAX_BYTES = 4 << 30
"""On a CPU, models with smaller fp32 weights run in fp32, which costs them little."""


@dataclass(frozen=True)
class Model:
    """A model as the engine uses it."""

    name: str
    family: Family
    transformer: Transformer
    tokenizer: TextTokenizer
    mask_id: int
    eos_ids: tuple[int, ...]
    folder: Path | None = None  # None: made in memory
    # The transformer's expert store. The default suits a model made in memory: nothing is fetched.
    store: TrackedExpertStore = field(default_factory=lambda: ResidentExpertStore({}))
    placement: Placement = field(default_factory=Resident)
    notes: tuple[str, ...] = ()  # for the user, one line each

    @property
    def spec(self) -> ModelSpec:
        return self.transformer.spec

    @property
    def defaults(self) -> FamilyDefaults:
        """The generation defaults of the family, with the model's own block length."""
        defaults = self.family.defaults
        return replace(defaults, block=self.spec.block or defaults.block)

    @property
    def plain_ids(self) -> int:
        """Ids below this are tokens, and none is the mask."""
        return self.spec.vocabulary if self.mask_id == NO_MASK else self.mask_id

    @property
    def special_ids(self) -> tuple[int, ...]:
        """The tokens that no prompt may hold: the mask, and DELETE and SPLIT if there are any."""
        return self.mask_id, *(self.family.defaults.edit_ids or ())

    @property
    def memory_config(self) -> ExpertMemoryConfig | None:
        """The requested expert memory."""
        return None if self.placement.plan is None else self.placement.plan.config


def load_model(
    name_or_path: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    expert_dtype: str | QuantFormat | None = None,
    dense_dtype: str | None = None,
    expert_memory: str | ExpertMemoryConfig | None = None,
    on_progress: ProgressCallback | None = None,
) -> Model:
    """Load a folder, a hub id, or (None) the embedded model.

    ``device`` "auto" is CUDA if available. ``dtype`` None or "auto" is bf16; on a CPU it is fp32
    for models with less than 4 GiB of fp32 weights. ``expert_dtype`` "int8" or "int4" quantizes the
    routed experts while they are read. Packed experts are mapped from their file for the CPU
    kernels, and unpacked for other devices. ``dense_dtype`` "int8" does the same to the matrices of
    attention, dense networks and the head; see ``QuantizedHead``.

    ``expert_memory`` keeps only some experts in memory ("35%", "47" per layer, "6GiB", or "auto":
    as many as fit); the others are fetched when used, and policies may prefer those in memory. A
    simulated expert memory fetches nothing and counts.

    Bad input raises a CoterieError with a message of one line.
    """
    model = ModelFolder.open(find_folder(name_or_path))
    family, vocab_size = model.family, model.spec.vocabulary
    target = choose_target(
        model,
        expert_dtype=expert_dtype,
        dense_dtype=dense_dtype,
        dtype=dtype,
        device=choose_device(device),
    )
    placement = choose_placement(target, expert_memory)
    template, hidden_span = family.defaults.chat_template, family.defaults.hidden_span
    tokenizer = load_tokenizer(
        model.path, template=template, vocab_size=vocab_size, hidden_span=hidden_span
    )
    mask, stop_ids, notes = _token_ids(model, tokenizer)
    loaded = placement.load(target, on_progress)
    return Model(
        name=EMBEDDED if name_or_path is None else str(name_or_path),
        family=family,
        transformer=build(target.spec, loaded.weights, loaded.store),
        tokenizer=tokenizer,
        mask_id=mask,
        eos_ids=stop_ids,
        folder=model.path,
        store=loaded.store,
        placement=loaded.placement,
        notes=notes,
    )


def choose_placement(
    target: LoadTarget, expert_memory: str | ExpertMemoryConfig | None
) -> Placement:
    """The placement for an expert-memory config; raises CoterieError if it cannot be met."""
    if expert_memory is None:
        return Resident()
    config = expert_memory
    if isinstance(config, str):
        config = ExpertMemoryConfig.parse(config)
    if config.warm_start is not None:
        config.warm_start.check(target.spec, target.model.path)
    if config.simulated:
        return Simulated.of(config, target)
    if target.has_device_memory:
        placement = HostOffload.of(config, target)
    elif config.fallback_model is not None:
        placement = MixedPrecision.of(config, config.fallback_model, target)
    else:
        placement = DiskOffload(plan_disk_offload(config, target))
    return Resident(placement.plan) if placement.plan.holds_all else placement


def choose_target(
    model: ModelFolder,
    *,
    expert_dtype: str | QuantFormat | None,
    dense_dtype: str | None = None,
    dtype: str | torch.dtype | None,
    device: torch.device,
) -> LoadTarget:
    """The form in memory: weights as stored, or quantized if they are stored unquantized."""
    spec = model.spec
    if dense_dtype is not None:
        spec = replace(spec, dense_format=parse_dense_format(dense_dtype))
    expert_format = parse_format(expert_dtype) if isinstance(expert_dtype, str) else expert_dtype
    target = LoadTarget(model, spec, choose_dtype(dtype, model.spec, device), device)
    if expert_format in (None, spec.expert_format):
        packed = spec.panels and not target.has_device_memory and cpu.is_available()
        return replace(target, spec=replace(spec, panels=packed))
    if spec.expert_format is not None or spec.panels:
        raise ConfigError(
            f"{model.path}: its experts are {spec.expert_storage} already; "
            f"{expert_format} can only be made from the original model"
        )
    return replace(target, spec=replace(spec, expert_format=expert_format))


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA if available; raises ConfigError for a device that does not exist."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ConfigError(f"unknown device {str(device)!r}; known: auto, cpu, cuda") from None
    if resolved.type not in ("cpu", "cuda"):
        raise ConfigError(f"unknown device {str(device)!r}; known: auto, cpu, cuda")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise ConfigError(f"device {str(device)!r} does not exist: PyTorch sees no such GPU")
    return resolved


def choose_dtype(
    dtype: str | torch.dtype | None, spec: ModelSpec, device: torch.device
) -> torch.dtype:
    """None and "auto" are bf16, or fp32 on a CPU if the weights stay small; others by name."""
    if dtype is None or dtype == "auto":
        is_small = weight_bytes(spec, torch.float32) < FP32_MAX_BYTES
        return torch.float32 if device.type == "cpu" and is_small else torch.bfloat16
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise ConfigError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise ConfigError(f"unsupported dtype {dtype}; known: {', '.join(DTYPES)}")
    return dtype


def _token_ids(
    model: ModelFolder, tokenizer: TextTokenizer
) -> tuple[int, tuple[int, ...], tuple[str, ...]]:
    """The mask token and the end-of-text tokens, on which all files must agree; and notes.

    The family's mask token is used if the vocabulary has it and no file names one. Without it, a
    folder without a tokenizer (token ids as text) uses the last id; with one, that is an error.
    """
    config, vocabulary = model.config, model.spec.vocabulary
    mask, notes = mask_id(config, model.family, vocabulary), ()
    if tokenizer.mask_id is not None and mask != NO_MASK:
        if config.values.get("mask_token_id") is not None and mask != tokenizer.mask_id:
            raise config.error(
                "mask_token_id", f"is {mask}, but tokenizer.json has {tokenizer.mask_id}"
            )
        mask = tokenizer.mask_id
    if mask is None and isinstance(tokenizer, IdTokenizer):
        mask = vocabulary - 1
        notes = (f"no file names the mask token: the last id, {mask}, is taken",)
    if mask is None:
        raise config.error(
            "mask_token_id", f"is missing, and tokenizer.json has no {MASK_TOKEN} either"
        )
    stop_ids = tokenizer.eos_ids + eos_ids(config, model.family, vocabulary)
    if mask in stop_ids:
        raise ConfigError(f"{model.path}: token {mask} is both the mask and an end of text")
    return mask, tuple(dict.fromkeys(stop_ids)), notes
