"""A stand-in for the parts of SGLang that the plug-in uses, as modules that are not installed."""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass, field
from enum import Enum
from types import ModuleType, SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from torch import nn

EXPERTS, K, BLOCK, MASK = 16, 4, 4, 9


@dataclass
class TopKConfig:
    top_k: int = K
    use_grouped_topk: bool = False
    topk_group: int | None = None
    num_expert_group: int | None = None
    renormalize: bool = True
    scoring_func: str = "softmax"
    correction_bias: Any = None
    custom_routing_function: Any = None
    num_shared_topk_slots: int = 0


class HookType(Enum):
    AROUND = "around"
    AFTER = "after"


class HookRegistry:
    """Wraps like SGLang's: a hook around a function gets it, one after it gets its result."""

    hooks: ClassVar[list[tuple[str, Any, HookType]]] = []
    works = True

    @classmethod
    def register(cls, target: str, hook: Any, kind: HookType) -> None:
        cls.hooks.append((target, hook, kind))

    @classmethod
    def apply_hooks(cls) -> None:
        for target, hook, kind in cls.hooks if cls.works else []:
            path, _, name = target.rpartition(".")
            owner = _resolve(path)
            raw = vars(owner)[name]
            original = raw.__func__ if isinstance(raw, classmethod) else raw
            wrapped = _wrapped(original, hook, kind)
            setattr(owner, name, classmethod(wrapped) if raw is not original else wrapped)


def _wrapped(original: Any, hook: Any, kind: HookType) -> Any:
    @functools.wraps(original)
    def wrapper(*args: Any, **options: Any) -> Any:
        if kind is HookType.AROUND:
            return hook(original, *args, **options)
        result = original(*args, **options)
        hook(result, *args, **options)
        return result

    return wrapper


def _resolve(path: str) -> Any:
    if path in sys.modules:
        return sys.modules[path]
    owner, _, name = path.rpartition(".")
    return getattr(_resolve(owner), name)


def select_experts(
    hidden_states: Any, router_logits: Any, topk_config: Any, *, layer_id: int | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """The weights and ids of SGLang, or of the function that the config has."""
    if topk_config.custom_routing_function is not None:
        return topk_config.custom_routing_function(
            hidden_states=hidden_states,
            gating_output=router_logits,
            topk=topk_config.top_k,
            renormalize=topk_config.renormalize,
        )
    weights, ids = torch.softmax(router_logits, -1).topk(topk_config.top_k)
    return weights / weights.sum(-1, keepdim=True), ids


class TopK(nn.Module):
    bypasses = False

    def __init__(self, layer_id: int) -> None:
        super().__init__()
        self.layer_id, self.topk_config = layer_id, TopKConfig()

    def forward(self, hidden_states: Any, router_logits: Any) -> Any:
        if self.bypasses:
            return None
        choose = sys.modules["sglang.srt.layers.moe.topk"].select_experts
        return choose(hidden_states, router_logits, self.topk_config, layer_id=self.layer_id)


class SparseBlock(nn.Module):
    def __init__(self, layer_id: int) -> None:
        super().__init__()
        self.topk = TopK(layer_id)


class LLaDA2MoeSparseMoeBlock(SparseBlock):
    def _block_topk(self, router_logits: Any) -> Any:
        raise ValueError("needs a GPU")


def random_logits() -> torch.Tensor:
    """Of each token, [10, E]."""
    return torch.randn(10, EXPERTS, generator=torch.Generator().manual_seed(0)) * 3


def _sparse(blocks: Any) -> list[Any]:
    return [block for block in blocks if hasattr(block, "topk")]


class SDARMoeForCausalLM(nn.Module):
    """Layers 1 and 3 route; tokens and positions decide the logits. Returns what was chosen."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Identity(), SparseBlock(1), nn.Identity(), SparseBlock(3)])

    def forward(self, input_ids: Any, positions: Any, forward_batch: Any) -> Any:
        logits = random_logits()[input_ids] + positions.unsqueeze(-1).sin()
        return [block.topk(logits, logits) for block in _sparse(self.blocks)]


class LLaDA2MoeModelLM(SDARMoeForCausalLM):
    def forward(self, input_ids: Any, positions: Any, forward_batch: Any) -> Any:
        raise NotImplementedError


@dataclass
class ForwardBatch:
    input_ids: Any
    positions: Any
    batch_size: int
    is_dllm: bool = True
    forward_mode: Any = None

    def __post_init__(self) -> None:
        self.forward_mode = SimpleNamespace(is_dllm_extend=lambda: self.is_dllm)

    @classmethod
    def init_new(cls, batch: Any, model_runner: Any, *, is_dllm: bool = True) -> ForwardBatch:
        positions = [row.start + i for row in batch.reqs for i in range(BLOCK)]
        tokens = [token for row in batch.reqs for token in row.block]
        rows = len(batch.reqs)
        return cls(torch.tensor(tokens), torch.tensor(positions), rows, is_dllm)


@dataclass
class Request:
    """A request whose current block starts after ``start`` tokens."""

    block: list[int]
    start: int
    origin_input_ids: list[int]
    output_ids: list[int] = field(default_factory=list)


class ModelRunner:
    """``options`` are those of the server."""

    device, dtype = "cpu", torch.float32

    def __init__(self, network: nn.Module, **options: Any) -> None:
        self.network = network
        self.server_args = SimpleNamespace(
            **{
                "dllm_algorithm": "LowConfidence",
                "attn_dp_size": 1,
                "moe_a2a_backend": "none",
                "moe_runner_backend": "auto",
                "enable_metrics": False,
                **options,
            }
        )
        config = SimpleNamespace(hidden_size=8, num_experts=EXPERTS)
        self.model_config = SimpleNamespace(hf_config=config)

    def load_model(self) -> None:
        self.model = self.network


class DllmConfig:
    mask_id = MASK

    @staticmethod
    def from_server_args(server_args: Any) -> type[DllmConfig]:
        return DllmConfig


def install(monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the modules importable for one test."""
    HookRegistry.hooks, HookRegistry.works = [], True
    TopK.bypasses = False
    contents = {
        "plugins.hook_registry": {"HookRegistry": HookRegistry, "HookType": HookType},
        "layers.moe.topk": {"select_experts": select_experts, "TopK": TopK},
        "models.llada2": _copies(LLaDA2MoeSparseMoeBlock, LLaDA2MoeModelLM),
        "models.sdar_moe": _copies(SDARMoeForCausalLM),
        "model_executor.forward_batch_info": _copies(ForwardBatch),
        "model_executor.model_runner": _copies(ModelRunner),
        "arg_groups.overrides": {"resolving_view": lambda server_args: server_args},
        "runtime_context": {"get_parallel": lambda: SimpleNamespace(tp_rank=0)},
        "dllm.config": {"DllmConfig": DllmConfig},
    }
    for path, names in contents.items():
        parts = f"sglang.srt.{path}".split(".")
        for end in range(1, len(parts) + 1):
            name = ".".join(parts[:end])
            if end == len(parts) or name not in sys.modules:
                monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[".".join(parts)]).update(names)


def _copies(*classes: type) -> dict[str, type]:
    """Subclasses with the same methods, which hooks may change."""
    return {cls.__name__: type(cls.__name__, (cls,), dict(vars(cls))) for cls in classes}


def module(path: str) -> Any:
    return sys.modules[f"sglang.srt.{path}"]
