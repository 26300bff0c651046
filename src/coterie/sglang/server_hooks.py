"""The functions that run in place of SGLang's: they route its blocks by the policy."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from coterie.routing import format_policy
from coterie.sglang.block_routing import LayerRouter, route_blocks
from coterie.sglang.expert_counts import ExpertTotals, append_counts, summarize
from coterie.sglang.live_blocks import NO_REQUEST, BlockRules, LiveBlocks
from coterie.sglang.metrics import CountGauges
from coterie.sglang.settings import PluginSettings
from coterie.values import RouterSpec

logger = logging.getLogger(__name__)

MAX_REQUESTS = 4096  # of a forward


@dataclass(frozen=True)
class RoutedModel:
    """What the hooks need of a model that SGLang has loaded."""

    rules: BlockRules
    moe_indices: Mapping[int, int]  # of each layer that routes
    fixed_lengths: Tensor  # [MAX_REQUESTS] int64, of the requests of the current batch
    totals: ExpertTotals
    gauges: CountGauges | None  # None: the server has no metrics
    reports: bool  # whether this process reports the counts


@dataclass  # not frozen: SGLang calls its methods, and what one sees another needs
class ServerHooks:
    """The hooks of one process."""

    settings: PluginSettings
    model: RoutedModel | None = None
    blocks: LiveBlocks | None = None  # of the forward that runs now
    probed: set[int] | None = None  # while the hooks are checked: layers that called them
    batches: int = 0
    routers: dict[int, LayerRouter] = field(default_factory=dict)

    def on_new_batch(self, result: Any, cls: type, batch: Any, runner: Any, **options: Any) -> None:
        """After ``ForwardBatch.init_new``: notes how many tokens of each request are fixed."""
        model = self.model
        if model is None or not result.forward_mode.is_dllm_extend():
            return
        lengths = [
            len(request.origin_input_ids) + len(request.output_ids) for request in batch.reqs
        ]
        lengths += [NO_REQUEST] * (MAX_REQUESTS - len(lengths))
        model.fixed_lengths.copy_(torch.tensor(lengths))
        self.batches += 1
        if model.reports and self.batches % self.settings.counts_every == 0:
            self._report(model)

    def on_forward(
        self,
        original: Callable[..., Any],
        network: Any,
        input_ids: Tensor,
        positions: Tensor,
        forward_batch: Any,
        *rest: Any,
        **options: Any,
    ) -> Any:
        """Around a model's ``forward``: the blocks that its layers route."""
        if self.model is not None and forward_batch.forward_mode.is_dllm_extend():
            rows = forward_batch.batch_size
            self.blocks = LiveBlocks.of(
                input_ids.view(rows, -1),
                positions.view(rows, -1),
                self.model.fixed_lengths[:rows],
                self.model.rules,
            )
        try:
            return original(network, input_ids, positions, forward_batch, *rest, **options)
        finally:
            self.blocks = None

    def on_select_experts(
        self,
        original: Callable[..., Any],
        hidden_states: Tensor,
        router_logits: Tensor,
        topk_config: Any,
        *,
        layer_id: int,
        **options: Any,
    ) -> Any:
        """Around ``select_experts``: SGLang's own steps before and after the choice stay."""
        if self.probed is not None:
            return self.probed.add(layer_id)
        if self.blocks is not None:
            topk_config = replace(
                topk_config,
                use_grouped_topk=False,
                custom_routing_function=self._routing_function(layer_id, topk_config),
            )
        return original(hidden_states, router_logits, topk_config, layer_id=layer_id, **options)

    def on_block_topk(
        self, original: Callable[..., Any], block: Any, router_logits: Tensor
    ) -> tuple[Tensor, Tensor] | None:
        """Around the choice of LLaDA2.2: its blocks admit experts first."""
        if self.probed is not None:
            return self.probed.add(block.layer_id)
        if self.blocks is None:
            return original(block, router_logits)
        if block.layer_id not in self.routers:
            spec = RouterSpec(
                experts=block.num_experts,
                k=block.top_k,
                activation="sigmoid",
                renormalise=True,
                epsilon=1e-20,
                capacity=0 if block.expert_capacity == block.num_experts else block.expert_capacity,
                block=block.block_size,
            )
            self._add_router(block.layer_id, spec, block.correction_bias)
        return self._route(block.layer_id, router_logits)

    def _routing_function(
        self, layer: int, topk_config: Any
    ) -> Callable[..., tuple[Tensor, Tensor]]:
        def choose(
            hidden_states: Tensor, gating_output: Tensor, topk: int, renormalize: bool
        ) -> tuple[Tensor, Tensor]:
            if layer not in self.routers:
                spec = router_spec(topk_config, gating_output.shape[-1])
                self._add_router(layer, spec, topk_config.correction_bias)
            return self._route(layer, gating_output)

        return choose

    def _add_router(self, layer: int, spec: RouterSpec, bias: Tensor | None) -> None:
        assert self.model is not None
        self.routers[layer] = LayerRouter(layer, self.model.moe_indices[layer], spec, bias)

    def _route(self, layer: int, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The weights and the ids of a layer, in SGLang's order."""
        assert self.model is not None
        assert self.blocks is not None
        chosen = route_blocks(logits, self.routers[layer], self.blocks, self.settings.policy)
        self.model.totals.add(chosen.scores, chosen.routing, self.blocks.routed)
        return chosen.weights, chosen.ids

    def _report(self, model: RoutedModel) -> None:
        counts = model.totals.read()
        logger.info("coterie: %s: %s", format_policy(self.settings.policy), summarize(counts))
        if model.gauges is not None:
            model.gauges.set(counts)
        if self.settings.counts_file is not None:
            append_counts(self.settings.counts_file, counts)


def router_spec(topk_config: Any, experts: int) -> RouterSpec:
    """The router of a layer that ``select_experts`` serves; SGLang scales the weights itself."""
    grouped = topk_config.use_grouped_topk
    return RouterSpec(
        experts=experts,
        k=topk_config.top_k,
        activation=topk_config.scoring_func or "softmax",
        renormalise=topk_config.renormalize,
        groups=topk_config.num_expert_group if grouped else 1,
        topk_groups=topk_config.topk_group if grouped else 1,
        epsilon=1e-20,
    )
