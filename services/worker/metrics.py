"""The worker's metrics. Label `worker` is the worker's name: it outlives the process."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.worker.core.events import BatchBegan
from services.worker.engines.api import StepReport
from shared.messages import SliceDone, WorkerMemory
from shared.telemetry.metrics import BATCH_SIZES, LATENCY_SECONDS, TOKEN_SECONDS

_LABELS = ("worker",)
_LEASED = "of leases, between two reports,"


class WorkerMetrics:
    """All workers of one process share these."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(name, text, (*_LABELS, *labels), registry=registry)

        def gauge(name: str, text: str) -> Gauge:
            return Gauge(name, text, _LABELS, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(name, text, _LABELS, buckets=buckets, registry=registry)

        self.slices = counter("tranche_slices", "Batches and leases that ended.", "outcome")
        self.batch_size = histogram(
            "tranche_batch_size_requests",
            f"Requests per batch; {_LEASED} the most in one iteration.",
            _SIZES,
        )
        self.queue_wait = histogram(
            "tranche_worker_queue_seconds", "From an order's receipt to its start.", LATENCY_SECONDS
        )
        self.prefill = histogram(
            "tranche_prefill_seconds",
            f"Prefill of one batch; {_LEASED} what there was of it.",
            LATENCY_SECONDS,
        )
        self.decode = histogram(
            "tranche_decode_seconds",
            f"All decode iterations of one batch; {_LEASED} those there were.",
            LATENCY_SECONDS,
        )
        self.iteration = histogram(
            "tranche_iteration_seconds", "One iteration of the engine.", TOKEN_SECONDS
        )
        self.output_tokens = counter("tranche_output_tokens", "Output tokens made.")
        self.invalid_tokens = counter(
            "tranche_invalid_tokens", "Iterations that ended requests sat through."
        )
        self.pad_tokens = counter("tranche_pad_tokens", "Input tokens that were only padding.")
        self.kv_used = gauge("tranche_kv_used_tokens", "KV slots in use.")
        self.kv_capacity = gauge("tranche_kv_capacity_tokens", "KV slots there are.")
        self.kv_used_bytes = gauge("tranche_kv_used_bytes", "Bytes of the KV slots in use.")
        self.kv_capacity_bytes = gauge("tranche_kv_capacity_bytes", "Bytes of all KV slots.")
        self.device_free = gauge("tranche_device_free_bytes", "Free memory of the device.")
        self._steps: dict[str, tuple[Counter, Histogram]] = {}
        self.errors = counter("tranche_worker_errors", "Errors from outside, by kind.", "kind")

    def on_step(self, worker: str, report: StepReport) -> None:
        """Count one iteration."""
        output_tokens, iteration = self._of_steps(worker)
        made = sum(len(tokens.ids) for tokens in report.tokens)
        if made:
            output_tokens.inc(made)
        if report.batch_size and (report.prefill_s or report.decode_s):
            iteration.observe(report.prefill_s + report.decode_s)

    def _of_steps(self, worker: str) -> tuple[Counter, Histogram]:
        """Found once: looking up labels costs more than counting."""
        found = self._steps.get(worker)
        if found is None:
            found = (self.output_tokens.labels(worker), self.iteration.labels(worker))
            self._steps[worker] = found
        return found

    def on_began(self, worker: str, began: BatchBegan) -> None:
        """Count an order's wait for the engine."""
        self.queue_wait.labels(worker).observe(began.queue_s)

    def on_slice(self, worker: str, done: SliceDone) -> None:
        """Count one batch that ended, or was refused."""
        outcome = "refused" if done.refused else "done"
        self.slices.labels(worker, outcome).inc()
        if done.refused:
            return
        self.batch_size.labels(worker).observe(done.timings.batch_size)
        self.prefill.labels(worker).observe(done.timings.prefill_s)
        self.decode.labels(worker).observe(done.timings.decode_s)
        self.invalid_tokens.labels(worker).inc(sum(r.invalid_tokens for r in done.results))
        self.pad_tokens.labels(worker).inc(sum(r.pad_tokens for r in done.results))

    def on_leases(self, worker: str, done: SliceDone) -> None:
        """Count the leased requests that are not here any more, and the iterations since the last
        report. Not every report has some of prefill and of decode."""
        timings = done.timings
        if timings.batch_size:
            self.batch_size.labels(worker).observe(timings.batch_size)
        if timings.prefill_s:
            self.prefill.labels(worker).observe(timings.prefill_s)
        if timings.decode_s:
            self.decode.labels(worker).observe(timings.decode_s)
        for result in done.results:
            if not result.resident:
                finished = "done" if result.finish_reason else "parked"
                outcome = "evicted" if result.evicted else finished
                self.slices.labels(worker, outcome).inc()

    def on_memory(self, worker: str, memory: WorkerMemory) -> None:
        """Show the memory as it is now."""
        self.kv_used.labels(worker).set(memory.kv_tokens_used)
        self.kv_capacity.labels(worker).set(memory.kv_tokens_capacity)
        self.kv_used_bytes.labels(worker).set(memory.kv_bytes_used)
        self.kv_capacity_bytes.labels(worker).set(memory.kv_bytes_capacity)
        self.device_free.labels(worker).set(memory.device_bytes_free)


_SIZES = tuple(float(size) for size in BATCH_SIZES)
