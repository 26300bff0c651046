"""A model ready to run, from a name."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from coterie import ops
from coterie.checkpoints.source import EMBEDDED, find_folder
from coterie.errors import CoterieError
from coterie.families import Family, ModelConfig, detect_family, eos_ids, mask_id
from coterie.families.names import is_stacked, weight_map
from coterie.loading import gpu_offload
from coterie.loading.disk_offload import build_disk_store
from coterie.loading.expert_memory import ExpertMemoryConfig, ExpertMemoryPlan, plan_expert_memory
from coterie.loading.free_memory import free_memory
from coterie.loading.gpu_offload import GpuOffloadBuilder
from coterie.loading.mixed_precision import PackedModel, build_mixed_store
from coterie.loading.simulated_memory import plan_simulated_cache, simulate_cache
from coterie.model.checkpoint import Checkpoint
from coterie.model.spec import ModelSpec
from coterie.model.transformer import Transformer, build
from coterie.model.weight_loader import WeightLoader
from coterie.model.weights import allocate, take_slab, weight_bytes
from coterie.offload.cached_store import CachedExpertStore
from coterie.offload.mixed_precision_store import MixedPrecisionStore
from coterie.offload.resident_store import ResidentExpertStore
from coterie.offload.traffic_log import CachedStore
from coterie.ops import cpu
from coterie.quantization import QuantFormat, parse_format
from coterie.tokenizer import TextTokenizer, load_tokenizer
from coterie.values import ExpertStore

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
}
FP32_MAX_BYTES = 4 << 30
"""Models whose fp32 weights stay below this run in fp32 on a CPU, where it costs little."""


@dataclass(frozen=True)
class Model:
    """What the engine needs to know of a model."""

    name: str
    family: Family
    transformer: Transformer
    codec: TextTokenizer
    mask_id: int
    eos_ids: tuple[int, ...]
    folder: Path | None = None  # None: made in memory
    offload_store: CachedExpertStore | None = None  # its experts, where they are not all in memory
    memory_plan: ExpertMemoryPlan | None = (
        None  # what the memory that was asked for experts came to
    )
    cached_store: CachedStore | None = None  # the store, where memory is short or imagined to be

    @property
    def spec(self) -> ModelSpec:
        return self.transformer.spec

    def with_simulated_cache(self, config: ExpertMemoryConfig) -> Model:
        """The same in a smaller memory that is imagined; raises CoterieError for none, and for a
        model whose memory is short already."""
        if self.cached_store is not None:
            raise CoterieError("a memory can be imagined only where all experts are in memory")
        plan = plan_simulated_cache(config, self.spec, self.transformer.dtype)
        if config.warm_start is not None and self.folder is not None:
            config.warm_start.check(self.spec, self.folder)
        transformer, store = simulate_cache(self.transformer, plan)
        return replace(self, transformer=transformer, memory_plan=plan, cached_store=store)


def load_model(
    name_or_path: str | Path | None = None,
    *,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device = "auto",
    experts: str | QuantFormat | None = None,
    expert_memory: str | ExpertMemoryConfig | None = None,
    on_progress: Callable[[int, int], None] | None = None,
) -> Model:
    """Load a folder, a hub id, or (None) the embedded model.

    ``device`` "auto" is CUDA where there is one. ``dtype`` None or "auto" is bf16, but fp32 on a
    CPU for models whose weights then stay below 4 GiB. ``experts`` "int8" or "int4" quantises the
    routed experts as they are read. Packed experts are mapped and stay in their file where kernels
    of a CPU read them, and are unpacked elsewhere. With ``expert_memory`` ("35%", "47" a layer,
    "6GiB", "auto": as many as are free, or a ``Memory``) only so many are in memory, and the others
    are read when they are needed; a policy's votes may then prefer those that are there. Of a
    memory that is only imagined nothing is read: all are there, and book is kept.
    ``progress`` hears (bytes done, bytes in all).
    Every bad input raises a CoterieError of one line.
    """
    folder = find_folder(name_or_path)
    config = ModelConfig.of(folder / "config.json")
    family = detect_family(config)
    spec = family.read_spec(config)
    target_device = choose_device(device)
    weights_dtype = choose_dtype(dtype, spec, target_device)
    loaded_spec = _loaded_spec(folder, spec, experts, target_device)
    memory_config = (
        ExpertMemoryConfig.parse(expert_memory) if isinstance(expert_memory, str) else expert_memory
    )
    simulated_config = (
        memory_config if memory_config is not None and memory_config.simulated else None
    )
    if simulated_config is not None:
        plan_simulated_cache(
            simulated_config, loaded_spec, weights_dtype
        )  # fails here, before weights are loaded
    memory_plan = (
        None
        if simulated_config
        else _plan_memory(
            folder, spec, loaded_spec, memory_config, dtype=weights_dtype, device=target_device
        )
    )
    transformer, store = _load_weights(
        folder,
        family,
        spec,
        loaded_spec,
        dtype=weights_dtype,
        device=target_device,
        memory_plan=memory_plan,
        on_progress=on_progress,
    )
    codec = load_tokenizer(
        folder, template=family.defaults.chat_template, vocab_size=spec.vocabulary
    )
    model = Model(
        name=EMBEDDED if name_or_path is None else str(name_or_path),
        family=family,
        transformer=transformer,
        codec=codec,
        mask_id=_resolve_mask_id(config, codec, mask_id(config, family, spec.vocabulary)),
        eos_ids=tuple(dict.fromkeys(codec.eos_ids + eos_ids(config, family, spec.vocabulary))),
        folder=folder,
        offload_store=store if isinstance(store, CachedExpertStore) else None,
        memory_plan=memory_plan,
        cached_store=store if isinstance(store, CachedExpertStore | MixedPrecisionStore) else None,
    )
    return model if simulated_config is None else model.with_simulated_cache(simulated_config)


def _plan_memory(
    folder: Path,
    stored_spec: ModelSpec,
    loaded_spec: ModelSpec,
    config: ExpertMemoryConfig | None,
    *,
    dtype: torch.dtype,
    device: torch.device,
) -> ExpertMemoryPlan | None:
    """Raises CoterieError where experts cannot be read one by one, or not even one fits."""
    if config is None:
        return None
    if config.warm_start is not None:
        config.warm_start.check(loaded_spec, folder)
    if gpu_offload.has_device_memory(device):
        return gpu_offload.plan_gpu_offload(config, stored_spec, loaded_spec, dtype, device=device)
    if not loaded_spec.panels:
        raise CoterieError(
            f"{folder}: --expert-memory reads experts from a packed checkpoint, for a CPU's "
            "kernels; `coterie quantize MODEL OUT --experts int8` makes one, "
            "and --imagine-memory acts as if"
        )
    if config.host_memory is not None:
        raise CoterieError(
            "--host-memory has no effect on a CPU: --expert-memory is memory of the host there; "
            "with --device cuda it stands between the GPU's memory and the disk"
        )
    if config.cpu_experts is not None:
        raise CoterieError("--cpu-experts has no effect where a CPU computes all experts anyway")
    free_bytes, expert_bytes = free_memory(device), loaded_spec.expert_stride
    plan = plan_expert_memory(
        config, loaded_spec, dtype, expert_bytes=expert_bytes, free_bytes=free_bytes
    )
    if plan.holds_all and config.fallback_model is not None:
        raise CoterieError("--coarse has no effect: all experts fit into what is free as they are")
    return plan


def _loaded_spec(
    folder: Path, stored_spec: ModelSpec, experts: str | QuantFormat | None, device: torch.device
) -> ModelSpec:
    """The model in memory: its experts as stored, or as asked where they are stored whole."""
    expert_format = parse_format(experts) if isinstance(experts, str) else experts
    if expert_format not in (None, stored_spec.expert_format):
        if stored_spec.expert_format is not None or stored_spec.panels:
            raise CoterieError(
                f"{folder}: its experts are {stored_spec.expert_storage} already; "
                f"{expert_format} can be made of the original only"
            )
        return replace(stored_spec, expert_format=expert_format)
    packed = stored_spec.panels and not gpu_offload.has_device_memory(device) and cpu.is_available()
    return replace(stored_spec, panels=packed)


def _resolve_mask_id(config: ModelConfig, codec: TextTokenizer, default: int) -> int:
    """The tokenizer's, which a config that states one must agree with; else the ``usual`` one."""
    if codec.mask_id is None:
        return default
    if config.values.get("mask_token_id") is not None and default != codec.mask_id:
        raise config.error("mask_token_id", f"is {default}, but tokenizer.json has {codec.mask_id}")
    return codec.mask_id


def choose_device(device: str | torch.device) -> torch.device:
    """ "auto" is CUDA where there is one; asking for what is not there raises."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise CoterieError(f"unknown device {str(device)!r}; known: auto, cpu, cuda") from None
    if resolved.type not in ("cpu", "cuda"):
        raise CoterieError(f"unknown device {str(device)!r}; known: auto, cpu, cuda")
    if resolved.type == "cuda" and (resolved.index or 0) >= torch.cuda.device_count():
        raise CoterieError(f"device {str(device)!r} is not there: PyTorch sees no such GPU")
    return resolved


def choose_dtype(
    dtype: str | torch.dtype | None, spec: ModelSpec, device: torch.device
) -> torch.dtype:
    """None and "auto" are bf16, or fp32 on a CPU where the weights stay small; others by name."""
    if dtype is None or dtype == "auto":
        is_small = weight_bytes(spec, torch.float32) < FP32_MAX_BYTES
        return torch.float32 if device.type == "cpu" and is_small else torch.bfloat16
    if isinstance(dtype, str):
        if dtype not in DTYPES:
            raise CoterieError(f"unknown dtype {dtype!r}; known: auto, {', '.join(DTYPES)}")
        return DTYPES[dtype]
    if dtype not in DTYPES.values():
        raise CoterieError(f"unsupported dtype {dtype}; known: {', '.join(DTYPES)}")
    return dtype


def _load_weights(
    folder: Path,
    family: Family,
    spec: ModelSpec,
    loaded_spec: ModelSpec,
    *,
    dtype: torch.dtype,
    device: torch.device,
    memory_plan: ExpertMemoryPlan | None,
    on_progress: Callable[[int, int], None] | None,
) -> tuple[Transformer, ExpertStore]:
    """Everything is checked before the first byte of memory is asked for."""
    checkpoint = Checkpoint.of(folder)
    targets = weight_map(family.tensor_names, spec, stacked=is_stacked(checkpoint.tensors))
    checkpoint.check(targets)
    memory_plan = None if memory_plan is None or memory_plan.holds_all else memory_plan
    absent_bytes = 0 if memory_plan is None else memory_plan.absent_bytes
    _check_free_memory(folder, weight_bytes(loaded_spec, dtype) - absent_bytes, device)
    weights = allocate(loaded_spec, dtype, device, experts=memory_plan is None)
    builder = (
        GpuOffloadBuilder(loaded_spec, dtype, memory_plan, device)
        if memory_plan and gpu_offload.has_device_memory(device)
        else None
    )
    if builder is not None and builder.holds_all:
        weights |= builder.weights()
    skip_experts = memory_plan is not None and not (builder is not None and builder.holds_all)
    on_bytes = _running_total(checkpoint.bytes, on_progress)
    checkpoint.load(
        targets, WeightLoader(spec, loaded_spec, weights, skip_packed=skip_experts), on_bytes
    )
    if builder is not None:
        store = builder.build_store(checkpoint, targets, spec)
        return build(loaded_spec, weights, store), store
    if memory_plan is not None:
        store = (
            build_disk_store(checkpoint, targets, loaded_spec, memory_plan)
            if memory_plan.config.fallback_model is None
            else build_mixed_store(
                PackedModel(checkpoint, targets, loaded_spec),
                memory_plan,
                memory_plan.config.fallback_model,
            )
        )
        return build(loaded_spec, weights, store), store
    slabs = {
        layer: ops.prepare(take_slab(loaded_spec, layer, weights), release_source=True)
        for layer in loaded_spec.moe_layers
    }
    store = ResidentExpertStore(slabs)
    return build(loaded_spec, weights, store), store


def _running_total(
    total_bytes: int, on_progress: Callable[[int, int], None] | None
) -> Callable[[int], None] | None:
    if on_progress is None:
        return None
    done_bytes = 0

    def on_bytes(size: int) -> None:
        nonlocal done_bytes
        done_bytes += size
        on_progress(done_bytes, total_bytes)

    return on_bytes


def _check_free_memory(folder: Path, needed_bytes: int, device: torch.device) -> None:
    free_bytes = free_memory(device)
    if free_bytes is not None and needed_bytes > free_bytes:
        gib = 1 << 30
        raise CoterieError(
            f"{folder}: the weights need {needed_bytes / gib:.1f} GiB, {free_bytes / gib:.1f} GiB are free "
            f"on {device}"
        )
