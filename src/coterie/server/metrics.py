"""Metrics of the server, in the conventions of Prometheus.

Three counters have the names of vLLM's for diffusion models, so that its benchmark reads them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    Info,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

import coterie
from coterie.engine.engine import Engine
from coterie.engine.events import Denoised, Event
from coterie.engine.prefix_cache import PrefixCacheStats
from coterie.model.weights import expert_bytes
from coterie.offload.traffic import Traffic
from coterie.server.ticket import Outcome, Ticket

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
STEP_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10)
REQUEST_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
SHARE_BUCKETS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 1)

disable_created_metrics()


class ServerMetrics:
    """Counts what happens; the engine's thread and the event loop may both call it."""

    def __init__(self, engine: Engine, model_name: str) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self._expert_bytes = expert_bytes(engine.model.spec, engine.model.transformer.dtype)
        self._layers = engine.model.spec.moe_layers
        info = Info("coterie_build", "Version and model.", registry=self.registry)
        info.info({"version": coterie.__version__, "model": model_name})
        self._make_request_metrics()
        self._make_engine_metrics()
        self._make_vllm_counters(model_name)

    def render(self) -> bytes:
        """All metrics in the text format."""
        return generate_latest(self.registry)

    def watch_queue(self, running: Callable[[], int], waiting: Callable[[], int]) -> None:
        """Read the numbers of requests whenever metrics are read."""
        self._gauge("requests_running", "Requests with a row.").set_function(running)
        self._gauge("requests_waiting", "Requests that wait for a row.").set_function(waiting)

    def on_response(self, path: str, status: int) -> None:
        """An HTTP response was sent; ``path`` is that of the route."""
        self.http_requests.labels(path, str(status)).inc()

    def on_started(self, queue_seconds: float) -> None:
        """A request got a row."""
        self.queue_seconds.observe(queue_seconds)

    def on_cancelled(self) -> None:
        """A request was ended by its client, or by its deadline."""
        self.requests.labels("cancelled").inc()

    def on_failed(self) -> None:
        """A request ended in an error."""
        self.requests.labels("error").inc()

    def on_commit(self, ticket: Ticket) -> None:
        """A step committed tokens of a request."""
        now = time.monotonic()
        if ticket.last_commit is None:
            self.first_commit.observe(now - ticket.request.arrival)
        else:
            self.between_commits.observe(now - ticket.last_commit)
        ticket.last_commit = now

    def on_finished(self, ticket: Ticket, outcome: Outcome) -> None:
        """A request has its answer."""
        self.requests.labels(outcome.finish_reason).inc()
        self.request_seconds.observe(time.monotonic() - ticket.request.arrival)
        self.completion_tokens.inc(outcome.completion_tokens)
        if outcome.result is not None:
            self.prompt_tokens.inc(outcome.result.prompt_tokens)
            self.cached_tokens.inc(outcome.result.cached_tokens)

    def on_prefix_cache(self, stats: PrefixCacheStats) -> None:
        """What the keys of earlier prompts take."""
        self.prefix_cache_bytes.set(stats.bytes)

    def on_step(self, seconds: float, events: Sequence[Event], traffic: Traffic | None) -> None:
        """The engine ran one step."""
        self.step_seconds.observe(seconds)
        for event in events:
            if isinstance(event, Denoised):
                self._on_denoised(event)
        if traffic is not None:
            self._on_traffic(traffic)

    def _on_denoised(self, event: Denoised) -> None:
        self.forwards.labels(event.kind).inc()
        self.denoising_steps.inc()
        self.canvas_positions.inc(event.stop - event.start)
        self.committed_tokens.inc(len(event.committed))
        for layer, experts in zip(self._layers, event.experts, strict=False):
            self.unique_experts.labels(str(layer)).inc(experts)
        self.bytes_read.inc(sum(event.experts) * self._expert_bytes)
        self.bytes_vanilla.inc(sum(event.vanilla_experts) * self._expert_bytes)
        if event.vote_mass_kept is not None:
            self.vote_mass.observe(event.vote_mass_kept)

    def _on_traffic(self, traffic: Traffic) -> None:
        self.cache_hits.inc(traffic.hits)
        self.cache_lookups.inc(traffic.experts_used)
        for tier, transfer in traffic.transfers.items():
            self.bytes_moved.labels(tier).inc(transfer.bytes)

    def _make_request_metrics(self) -> None:
        ended = "Requests that ended, by finish reason, cancelled or error."
        self.requests = self._counter("requests", ended, "finish_reason")
        self.http_requests = self._counter("http_requests", "HTTP responses.", "path", "status")
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts.")
        cached = "Tokens of prompts with keys that an earlier request had left."
        self.cached_tokens = self._counter("cached_prompt_tokens", cached)
        self.completion_tokens = self._counter("completion_tokens", "Tokens of answers.")
        waited = "Seconds from arrival to a row."
        self.queue_seconds = self._histogram("queue_seconds", waited, REQUEST_BUCKETS)
        first = "Seconds from arrival to the first committed token."
        self.first_commit = self._histogram("time_to_first_commit_seconds", first, REQUEST_BUCKETS)
        between = "Seconds between two steps of a request that committed tokens."
        self.between_commits = self._histogram(
            "time_between_commits_seconds", between, STEP_BUCKETS
        )
        whole = "Seconds from arrival to the last token."
        self.request_seconds = self._histogram("request_seconds", whole, REQUEST_BUCKETS)

    def _make_engine_metrics(self) -> None:
        self.step_seconds = self._histogram(
            "step_seconds", "Seconds of one step of the engine.", STEP_BUCKETS
        )
        denoising = "Denoising forwards of requests, by kind."
        self.forwards = self._counter("forwards", denoising, "kind")
        unique = "Unique experts that requests used in decode forwards, by layer."
        self.unique_experts = self._counter("unique_experts", unique, "layer")
        read = "Bytes of experts that requests used in decode forwards."
        self.bytes_read = self._counter("expert_bytes_read", read)
        vanilla = "The same under vanilla routing of the same scores."
        self.bytes_vanilla = self._counter("expert_bytes_vanilla", vanilla)
        moved = "Bytes of experts fetched into fast memory, by the tier that had them."
        self.bytes_moved = self._counter("expert_bytes_moved", moved, "tier")
        kept = "Bytes of the keys of earlier prompts."
        self.prefix_cache_bytes = self._gauge("prefix_cache_bytes", kept)
        self.cache_hits = self._counter("expert_cache_hits", "Used experts that were resident.")
        self.cache_lookups = self._counter("expert_cache_lookups", "Used experts.")
        mass = "Share of a step's votes for the experts that it used."
        self.vote_mass = self._histogram("vote_mass_kept", mass, SHARE_BUCKETS)

    def _make_vllm_counters(self, model_name: str) -> None:
        def counter(name: str, text: str) -> Any:
            name = f"vllm:diffusion_num_{name}"
            return Counter(name, text, ["model_name"], registry=self.registry).labels(model_name)

        self.denoising_steps = counter("denoising_steps", "Number of denoising steps.")
        self.canvas_positions = counter("canvas_positions", "Number of canvas positions evaluated.")
        self.committed_tokens = counter(
            "committed_tokens", "Number of committed (finalized) tokens."
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"coterie_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"coterie_{name}", text, registry=self.registry)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"coterie_{name}", text, buckets=buckets, registry=self.registry)
