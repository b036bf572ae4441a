"""Figures for Prometheus, under vLLM's names where it has them: its dashboards and load clients
find them."""

from __future__ import annotations

import time
from collections.abc import Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from inferlab.scheduler import Request
from inferlab.server.engine_thread import EngineThread

_SECONDS = (
    *(0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5),
    *(1.0, 2.0, 5.0, 10.0, 20.0, 60.0, 120.0, 300.0),
)
_TOKEN_SECONDS = (0.0001, 0.0002, 0.0005, *_SECONDS[:11])


class Metrics:
    """Counts what requests came to; filled in the engine's thread, read in any."""

    def __init__(self, model: str) -> None:
        self.registry = CollectorRegistry()

        def counter(name: str, text: str, labels: tuple[str, ...] = ()) -> Counter:
            return Counter(name, text, ("model_name", *labels), registry=self.registry)

        def total(name: str, text: str) -> Counter:
            return counter(name, text).labels(model)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            made = Histogram(name, text, ("model_name",), registry=self.registry, buckets=buckets)
            return made.labels(model)

        self._model = model
        self._prompt_tokens = total("vllm:prompt_tokens", "Prompt tokens.")
        self._new_tokens = total("vllm:generation_tokens", "New tokens.")
        self._queried = total(
            "vllm:prefix_cache_queries", "Prompt tokens that could have been there already."
        )
        self._found = total("vllm:prefix_cache_hits", "Prompt tokens that were there already.")
        self._preemptions = total(
            "vllm:num_preemptions", "Times that a request lost its pages and was read anew."
        )
        self._ended = counter(
            "vllm:request_success", "Requests that ended, by reason.", ("finished_reason",)
        )
        self._steps = total(
            "inferlab:steps", "Verification steps of requests, plain ones among them."
        )
        self._drafts = total("vllm:spec_decode_num_drafts", "Steps in which something was drafted.")
        self._drafted = total("vllm:spec_decode_num_draft_tokens", "Draft tokens along one path.")
        self._nodes = total(
            "inferlab:spec_decode_num_draft_nodes", "Draft tokens, all branches of trees."
        )
        self._accepted = total(
            "vllm:spec_decode_num_accepted_tokens", "Draft tokens that were accepted."
        )
        self._accepted_at = counter(
            "vllm:spec_decode_num_accepted_tokens_per_pos",
            "Accepted draft tokens by position.",
            ("position",),
        )
        self._first = histogram(
            "vllm:time_to_first_token_seconds", "From arrival to the first token.", _SECONDS
        )
        self._per_token = histogram(
            "vllm:request_time_per_output_token_seconds",
            "From the first token to the last, per token behind the first.",
            _TOKEN_SECONDS,
        )
        self._latency = histogram(
            "vllm:e2e_request_latency_seconds", "From arrival to the last token.", _SECONDS
        )

    def watch(self, engine: EngineThread) -> None:
        """Adds gauges of what the engine does when it is asked."""
        self.registry.register(_Gauges(engine, self._model))

    def finished(self, request: Request) -> None:
        """Counts a request that has ended."""
        self._ended.labels(self._model, request.finish_reason).inc()
        if request.first_token_at is None:
            return
        stats = request.stats
        self._prompt_tokens.inc(len(request.prompt))
        self._queried.inc(len(request.prompt))
        self._found.inc(request.num_shared)
        self._preemptions.inc(request.num_preempted)
        self._new_tokens.inc(request.num_output)
        self._steps.inc(stats.steps)
        self._drafts.inc(stats.offered_at[0] if stats.offered_at else 0)
        self._drafted.inc(stats.proposed)
        self._nodes.inc(stats.draft_nodes)
        self._accepted.inc(stats.accepted)
        for position, count in enumerate(stats.accepted_at):
            self._accepted_at.labels(self._model, str(position)).inc(count)
        now = time.perf_counter()
        self._first.observe(request.first_token_at - request.arrived_at)
        self._latency.observe(now - request.arrived_at)
        if request.num_output > 1:
            spread = now - request.first_token_at
            self._per_token.observe(spread / (request.num_output - 1))

    def text(self) -> bytes:
        """All of it in Prometheus' text format."""
        return generate_latest(self.registry)


class _Gauges(Collector):
    def __init__(self, engine: EngineThread, model: str) -> None:
        self._engine = engine
        self._model = model

    def collect(self) -> Iterator[GaugeMetricFamily]:
        for name, text, value in (
            ("vllm:num_requests_running", "Requests in the batch.", self._engine.num_running),
            ("vllm:num_requests_waiting", "Requests in the queue.", self._engine.num_waiting),
            ("vllm:kv_cache_usage_perc", "Share of K/V pages in use.", self._engine.pages_used),
        ):
            gauge = GaugeMetricFamily(name, text, labels=("model_name",))
            gauge.add_metric((self._model,), value)
            yield gauge
