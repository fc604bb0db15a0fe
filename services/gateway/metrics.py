"""What a gateway reports: its HTTP side, its clients' latencies, its tokens, its mesh side.

Token latencies are measured when tokens reach the gateway, not when a slow client reads them.
"""

from collections import Counter as Counts
from collections.abc import Mapping
from functools import cache

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.gateway.calls import Call, Choice
from services.gateway.gaps import GapHistogram, GapTally
from services.gateway.metrics_vllm import VllmAliases
from shared.telemetry.metrics import (
    LATENCY_SECONDS,
    MESSAGE_SECONDS,
    TOKEN_COUNTS,
    TOKEN_SECONDS,
    metrics_for,
)


class GatewayMetrics:
    """All metrics of a gateway; `alias` holds the same under vLLM's names."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._gaps = GapTally()
        self.alias = VllmAliases(registry, self._gaps)
        self._followed: Counts[str] = Counts()
        self.requests = Counter(
            "tranche_gateway_http_requests_total",
            "Answered HTTP requests.",
            ("route", "status"),
            registry=registry,
        )
        self.errors = Counter(
            "tranche_gateway_errors_total",
            "Failures by kind: error codes of answers and events, bus, outbox_full, crash.",
            ("kind",),
            registry=registry,
        )
        self.open_requests = Gauge(
            "tranche_gateway_open_requests",
            "Choices that the mesh works on for this gateway.",
            registry=registry,
        )
        self.open_streams = Gauge(
            "tranche_gateway_open_streams", "Event streams under way.", registry=registry
        )
        self.first_token = Histogram(
            "tranche_gateway_time_to_first_token_seconds",
            "From receipt of the request to its first token here.",
            ("endpoint",),
            buckets=LATENCY_SECONDS,
            registry=registry,
        )
        self.per_token = Histogram(
            "tranche_gateway_time_per_output_token_seconds",
            "Mean of one choice, without its first token.",
            ("endpoint",),
            buckets=TOKEN_SECONDS,
            registry=registry,
        )
        GapHistogram(
            "tranche_gateway_inter_token_seconds",
            "Between two arrivals of one choice, per token that arrived.",
            self._gaps,
            registry,
        )
        self.request_seconds = Histogram(
            "tranche_gateway_request_seconds",
            "From receipt of the request to the end of a choice.",
            ("endpoint",),
            buckets=LATENCY_SECONDS,
            registry=registry,
        )
        self.prompt_tokens = Counter(
            "tranche_gateway_prompt_tokens_total",
            "Prompt tokens of accepted requests.",
            ("tenant",),
            registry=registry,
        )
        self.output_tokens = Counter(
            "tranche_gateway_output_tokens_total",
            "Output tokens received.",
            ("tenant",),
            registry=registry,
        )
        self._output_tokens_of = cache(self.output_tokens.labels)
        self._arrived: Counts[tuple[str, str]] = Counts()
        """(tenant, model) to the tokens that are not in the counters yet."""
        self.prompt_length = Histogram(
            "tranche_gateway_request_prompt_tokens",
            "Prompt length of a choice.",
            buckets=TOKEN_COUNTS,
            registry=registry,
        )
        self.output_length = Histogram(
            "tranche_gateway_request_output_tokens",
            "Output length of a choice.",
            buckets=TOKEN_COUNTS,
            registry=registry,
        )
        self.finished = Counter(
            "tranche_gateway_finished_requests_total",
            "Choices by how they ended: stop, length, cancelled, or an error's code.",
            ("reason",),
            registry=registry,
        )
        self.disconnected = Counter(
            "tranche_gateway_disconnected_requests_total",
            "Calls whose client went away before the end.",
            registry=registry,
        )
        self.slow_readers = Counter(
            "tranche_gateway_slow_readers_total",
            "Streams cancelled because too much text waited for their client.",
            registry=registry,
        )
        self.paused_readers = Counter(
            "tranche_gateway_paused_readers_total",
            "Times that a stream was paused because its client was behind with reading.",
            registry=registry,
        )
        self.token_batches = Counter(
            "tranche_gateway_token_batches_total", "Token messages received.", registry=registry
        )
        self.token_wait = Histogram(
            "tranche_gateway_token_return_seconds",
            "From a worker's sending of tokens to their receipt.",
            buckets=MESSAGE_SECONDS,
            registry=registry,
        )
        self.runs = Counter(
            "tranche_gateway_token_runs_total",
            "Token runs by verdict (new, repeated, closed, parked, dropped, conflict, malformed, "
            "unknown), and protocol moves (asked, resumed, old_epoch).",
            ("verdict",),
            registry=registry,
        )
        self._runs_of = cache(self.runs.labels)

    @classmethod
    def of(cls, registry: CollectorRegistry) -> "GatewayMetrics":
        """The registry's one instance."""
        return metrics_for(registry, cls)

    def follow(self, counts: Mapping[str, int]) -> None:
        """Brings the counters up to the ledger's own counts, and to the tokens that arrived."""
        for verdict, count in counts.items():
            grown = count - self._followed[verdict]
            if grown:
                self._runs_of(verdict).inc(grown)
                self._followed[verdict] = count
        for (tenant, model), count in self._arrived.items():
            self._output_tokens_of(tenant).inc(count)
            self.alias.tokens(model, count)
        self._arrived.clear()

    def accepted(self, call: Call, choices_per_prompt: int) -> None:
        """A call went to the mesh."""
        self.prompt_tokens.labels(call.tenant).inc(call.prompt_tokens)
        self.alias.accepted(call, choices_per_prompt)

    def saw_tokens(self, call: Call, choice: Choice, count: int, now: float) -> None:
        """Tokens of a choice arrived; the choice's times are kept here. `follow` counts them."""
        self._arrived[call.tenant, call.model] += count
        if choice.first_token_at is None:
            choice.first_token_at = now
            waited_s = now - call.received_at
            self.first_token.labels(call.endpoint).observe(waited_s)
            self.alias.first_token(call.model, waited_s)
        elif choice.last_token_at is not None:
            self._gaps.observe(call.model, (now - choice.last_token_at) / count)
        choice.last_token_at = now

    def ended(self, call: Call, choice: Choice, reason: str) -> None:
        """A choice is over. Failed and cancelled ones count in `finished` only."""
        self.finished.labels(reason).inc()
        if reason not in ("stop", "length") or choice.finished_at is None:
            return
        tokens = choice.transcript.output_tokens
        request_s = choice.finished_at - call.received_at
        self.request_seconds.labels(call.endpoint).observe(request_s)
        self.prompt_length.observe(len(choice.prompt.ids))
        self.output_length.observe(tokens)
        per_token_s = None
        if choice.first_token_at is not None and tokens > 1:
            last = choice.last_token_at or choice.first_token_at
            per_token_s = (last - choice.first_token_at) / (tokens - 1)
            self.per_token.labels(call.endpoint).observe(per_token_s)
        self.alias.ended(call, choice, reason, request_s, per_token_s)
