"""The gateway's metrics once more under vLLM's names, so that its dashboards work unchanged.

Only what a gateway knows; queue lengths, KV use and preemptions are the scheduler's and workers'.
"""

from functools import cache

from prometheus_client import CollectorRegistry, Counter, Histogram

from services.gateway.calls import Call, Choice
from services.gateway.gaps import GapHistogram, GapTally
from shared.telemetry.metrics import LATENCY_SECONDS, TOKEN_COUNTS, TOKEN_SECONDS

LABELS = ("model_name", "engine")
ENGINE = "0"
"""vLLM numbers its engines; clients of a mesh see one."""
CHOICE_COUNTS = (1, 2, 5, 10, 20)


class VllmAliases:
    """Names as in vLLM's `/metrics`."""

    def __init__(self, registry: CollectorRegistry, gaps: GapTally) -> None:
        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"vllm:{name}", text, LABELS, buckets=buckets, registry=registry)

        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"vllm:{name}", text, (*LABELS, *labels), registry=registry)

        counts = tuple(float(count) for count in TOKEN_COUNTS)
        self._first_token = histogram(
            "time_to_first_token_seconds", "Time to first token.", LATENCY_SECONDS
        )
        self._per_token = histogram(
            "request_time_per_output_token_seconds", "Time per output token.", TOKEN_SECONDS
        )
        for name, text in (
            ("inter_token_latency_seconds", "Inter-token latency."),
            ("time_per_output_token_seconds", "Older name of inter-token latency."),
        ):
            GapHistogram(f"vllm:{name}", text, gaps, registry, LABELS, (ENGINE,))
        self._request = histogram(
            "e2e_request_latency_seconds", "End-to-end latency.", LATENCY_SECONDS
        )
        self._prompt_length = histogram("request_prompt_tokens", "Prompt length.", counts)
        self._output_length = histogram("request_generation_tokens", "Output length.", counts)
        self._output_longest = histogram(
            "request_max_num_generation_tokens", "Longest output of a call's choices.", counts
        )
        self._choices = histogram("request_params_n", "The parameter n.", CHOICE_COUNTS)
        self._limits = histogram("request_params_max_tokens", "The output limit.", counts)
        self._prompt_tokens = counter("prompt_tokens", "Prompt tokens.")
        self._output_tokens = counter("generation_tokens", "Output tokens.")
        self._successes = counter("request_success", "Finished requests.", "finished_reason")
        self._output_tokens_of = cache(self._output_tokens.labels)

    def accepted(self, call: Call, choices_per_prompt: int) -> None:
        """A call went to the mesh."""
        labels = (call.model, ENGINE)
        self._prompt_tokens.labels(*labels).inc(call.prompt_tokens)
        self._choices.labels(*labels).observe(choices_per_prompt)
        self._limits.labels(*labels).observe(call.choices[0].spec.max_tokens)

    def first_token(self, model: str, waited_s: float) -> None:
        """A choice's first token arrived."""
        self._first_token.labels(model, ENGINE).observe(waited_s)

    def tokens(self, model: str, count: int) -> None:
        """Output tokens arrived."""
        self._output_tokens_of(model, ENGINE).inc(count)

    def call_ended(self, call: Call) -> None:
        """All choices of a call ended."""
        longest = max(choice.transcript.output_tokens for choice in call.choices)
        self._output_longest.labels(call.model, ENGINE).observe(longest)

    def ended(
        self, call: Call, choice: Choice, reason: str, request_s: float, per_token_s: float | None
    ) -> None:
        """A choice ended well."""
        labels = (call.model, ENGINE)
        self._successes.labels(*labels, reason).inc()
        self._request.labels(*labels).observe(request_s)
        self._prompt_length.labels(*labels).observe(len(choice.prompt.ids))
        self._output_length.labels(*labels).observe(choice.transcript.output_tokens)
        if per_token_s is not None:
            self._per_token.labels(*labels).observe(per_token_s)
