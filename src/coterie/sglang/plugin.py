"""The entry point: puts the hooks into SGLang, and checks that they are called.

SGLang only logs an exception of a plug-in and then serves without it. So every fault here ends the
process, with one line that says what would work.
"""

from __future__ import annotations

import inspect
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.metadata import version
from pkgutil import resolve_name
from typing import Any, NoReturn

from coterie.errors import ConfigError, CoterieError
from coterie.sglang.loaded_model import check_model
from coterie.sglang.server_hooks import ServerHooks
from coterie.sglang.settings import read_settings

TRIED_VERSION = "0.5.23"
TOPK = "sglang.srt.layers.moe.topk"
LLADA2 = "sglang.srt.models.llada2"
SDAR = "sglang.srt.models.sdar_moe"
FORWARD_PARAMETERS = ("self", "input_ids", "positions", "forward_batch")


@dataclass(frozen=True)
class Hook:
    """A function of SGLang, its first parameters, and what runs around or after it."""

    target: str
    parameters: tuple[str, ...]
    function: Callable[..., Any]
    is_after: bool = False


def register() -> None:
    """What SGLang calls in each of its processes; without ``COTERIE_POLICY`` it does nothing."""
    try:
        settings = read_settings(os.environ)
        if settings is not None:
            _install(_hooks(ServerHooks(settings)))
    except CoterieError as error:
        stop(str(error))


def stop(message: str) -> NoReturn:
    """Ends the process with one line. SGLang catches exceptions, but not this one."""
    sys.exit(f"coterie: {message}")


def _hooks(hooks: ServerHooks) -> list[Hook]:
    forward = partial(Hook, parameters=FORWARD_PARAMETERS, function=hooks.on_forward)
    runner = "sglang.srt.model_executor"
    return [
        Hook(
            f"{TOPK}.select_experts",
            ("hidden_states", "router_logits", "topk_config", "layer_id"),
            hooks.on_select_experts,
        ),
        Hook(
            f"{LLADA2}.LLaDA2MoeSparseMoeBlock._block_topk",
            ("self", "router_logits"),
            hooks.on_block_topk,
        ),
        forward(f"{LLADA2}.LLaDA2MoeModelLM.forward"),
        forward(f"{SDAR}.SDARMoeForCausalLM.forward"),
        Hook(
            f"{runner}.forward_batch_info.ForwardBatch.init_new",
            ("batch", "model_runner"),
            hooks.on_new_batch,
            is_after=True,
        ),
        Hook(
            f"{runner}.model_runner.ModelRunner.load_model",
            ("self",),
            partial(_on_model_loaded, hooks),
            is_after=True,
        ),
    ]


def _install(hooks: list[Hook]) -> None:
    """Raises ConfigError, instead of a line in a log, if a hook has no place."""
    registry: Any = import_module("sglang.srt.plugins.hook_registry")
    for hook in hooks:
        _check_target(hook)
        kind = registry.HookType.AFTER if hook.is_after else registry.HookType.AROUND
        registry.HookRegistry.register(hook.target, hook.function, kind)
    before = [_function(hook.target) for hook in hooks]
    registry.HookRegistry.apply_hooks()
    for hook, original in zip(hooks, before, strict=True):
        if _function(hook.target) is original:
            raise ConfigError(f"SGLang did not apply the hook of {hook.target}")


def _function(target: str) -> object:
    found = resolve_name(target)
    return getattr(found, "__func__", found)


def _check_target(hook: Hook) -> None:
    """Raises ConfigError if SGLang has moved or changed the function."""
    try:
        parameters = tuple(inspect.signature(resolve_name(hook.target)).parameters)
    except (ImportError, AttributeError):
        parameters = ()
    if parameters[: len(hook.parameters)] != hook.parameters:
        raise ConfigError(
            f"SGLang {version('sglang')} has no {hook.target}({', '.join(hook.parameters)}); "
            f"the plug-in was tried with {TRIED_VERSION}: install sglang=={TRIED_VERSION}"
        )


def _on_model_loaded(hooks: ServerHooks, result: object, runner: Any) -> None:
    """After ``ModelRunner.load_model``."""
    try:
        hooks.model = check_model(hooks, runner)
    except CoterieError as error:
        stop(str(error))
