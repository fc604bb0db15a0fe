"""The scheduler's metrics, and the scheduler-level ones of vLLM under their names there.

A histogram of decisions is about the core's own time. The aliases carry vLLM's labels, so that
dashboards made for it work.
"""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.scheduler.core.books import Books
from services.scheduler.core.calibration import LEVELS, Calibration
from services.scheduler.core.promises import Promises
from shared.messages import (
    Finished,
    Park,
    Recall,
    Rejected,
    RunSlice,
    SchedulerBeat,
    SchedulerCommand,
    SliceDone,
)
from shared.telemetry.metrics import BATCH_SIZES, LATENCY_SECONDS, MESSAGE_SECONDS

DECISION_SECONDS = (0.00001, 0.00003, 0.0001, 0.0003, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0)
ERROR_RATIOS = (0.01, 0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.75, 1.0, 2.0, 5.0)
EXPECTED_MAX = 10_000
"""Dispatched batches whose estimate is kept to compare with; more are not compared."""
ENGINE = "0"
"""vLLM's label for the engine of a data-parallel group; there is one mesh."""


class SchedulerMetrics:
    """Base units; one object per registry."""

    def __init__(self, registry: CollectorRegistry) -> None:
        def counter(name: str, text: str, *labels: str) -> Counter:
            return Counter(f"tranche_{name}", text, labels, registry=registry)

        def gauge(name: str, text: str, *labels: str) -> Gauge:
            return Gauge(name, text, labels, registry=registry)

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(f"tranche_{name}", text, (), buckets=buckets, registry=registry)

        self.request_queue = histogram(
            "request_queue_seconds",
            "Wait of a new request in the request queue, between gateway and scheduler.",
            MESSAGE_SECONDS,
        )
        self.pool_wait = histogram(
            "pool_wait_seconds", "Wait in the pool before each slice.", LATENCY_SECONDS
        )
        self.batch_size = histogram(
            "dispatched_batch_size_requests", "Requests of each dispatched batch.", BATCH_SIZES
        )
        self.decision = histogram(
            "decision_seconds", "The core's time for one event or wake-up.", DECISION_SECONDS
        )
        self.slice_error = histogram(
            "slice_time_error_ratio",
            "How far the estimate of a closed slice's time was off: |estimate - measured| / "
            "measured. Nobody estimates the time of a lease.",
            ERROR_RATIOS,
        )
        self.prediction_error = Histogram(
            "tranche_prediction_error_ratio",
            "How far the predicted start (first token) or finish of a request was off: |predicted "
            "- actual| / actual, both counted from its arrival at the scheduler.",
            ("of",),
            buckets=ERROR_RATIOS,
            registry=registry,
        )
        self.predicted_outputs = counter(
            "predicted_outputs",
            "Ended requests of whose output quantiles had been predicted.",
        )
        self.covered_outputs = counter(
            "covered_outputs",
            "Those whose output was no longer than the predicted quantile. Over all of them this "
            "is the quantile's coverage, which should be the quantile.",
            "quantile",
        )
        self.pinball = counter(
            "output_pinball_loss_tokens",
            "Pinball loss of predicted quantiles of the output. Over tranche_predicted_outputs it "
            "is the mean loss, least for the true quantile.",
            "quantile",
        )
        self.evictions = counter(
            "evictions",
            "Leases that ended early for want of memory. Over the finished requests this is the "
            "share that admission by chance steers to its target.",
        )
        self.finished = counter(
            "finished_requests", "Requests that came to their end, by reason.", "reason"
        )
        self.eviction_target = gauge(
            "tranche_eviction_target_ratio",
            "Admission by chance: the wanted share of evictions; it follows their price.",
        )
        self.margin = gauge(
            "tranche_admission_margin_deviations",
            "Admission by chance: standard deviations of future memory that are kept free.",
        )
        self.dispatched = counter("dispatched_batches", "Batches given to workers.")
        self.orders = counter("dispatched_orders", "Requests' slices given to workers.")
        self.renewals = counter("renewed_leases", "Leases made longer while they ran.")
        self.parked = counter("parked_requests", "Requests that were told to leave a worker.")
        self.rejections = counter("rejections", "Requests refused by the scheduler.", "reason")
        self.recalls = counter("recalls", "Requests whose truth was asked for, repeats counted.")
        self.refused = counter("refused_batches", "Batches that workers did not run.")
        self.workers_lost = counter("lost_workers", "Workers that fell silent or unreachable.")
        self.elections = counter("elections", "Times that this process became the leader.")
        self.errors = counter("scheduler_errors", "Caught errors, by kind.", "kind")
        self.waiting = gauge("tranche_waiting_requests", "Open requests that no worker runs now.")
        self.running = gauge("tranche_running_requests", "Requests in running batches.")
        self.workers = gauge("tranche_workers", "Workers that may be given work.")
        self.kv_usage = gauge("tranche_kv_usage_ratio", "Share of all KV slots in use, 0 to 1.")
        self.predicted_wait = gauge(
            "tranche_predicted_wait_seconds", "Predicted wait of a request submitted now."
        )
        self.epoch = gauge("tranche_epoch", "The leadership's number; 0 while standing by.")
        self.outbox = gauge("tranche_outbox_messages", "Commands that wait to be published.")
        names = ("model_name", "engine")
        self.vllm_waiting = gauge(
            "vllm:num_requests_waiting", "Number of requests waiting to be processed.", *names
        )
        self.vllm_running = gauge(
            "vllm:num_requests_running", "Number of requests in model execution batches.", *names
        )
        self.vllm_kv_usage = gauge(
            "vllm:kv_cache_usage_perc", "KV-cache usage. 1 means 100 percent usage.", *names
        )
        self.vllm_queue_time = Histogram(
            "vllm:request_queue_time_seconds",
            "Time that a request waits for its first slice.",
            names,
            buckets=LATENCY_SECONDS,
            registry=registry,
        )
        self._expected: dict[str, float] = {}
        self._told = Calibration()
        """What was counted of the present leadership."""
        self._evictions = 0
        self._model = ""

    def on_command(self, command: SchedulerCommand) -> None:
        """Count what the core decided."""
        match command:
            case RunSlice(orders=()):
                self.renewals.inc(len(command.renewals))
            case RunSlice():
                self.renewals.inc(len(command.renewals))
                self.dispatched.inc()
                self.orders.inc(len(command.orders))
                self.batch_size.observe(len(command.orders))
                for order in command.orders:
                    self.pool_wait.observe(order.pool_wait_s)
                    if not order.tokens:
                        self.vllm_queue_time.labels(order.spec.model, ENGINE).observe(
                            order.pool_wait_s
                        )
                if command.form == "closed" and len(self._expected) < EXPECTED_MAX:
                    self._expected[command.batch_id] = command.expected_s
            case Rejected():
                self.rejections.labels(command.reason).inc()
            case Park():
                self.parked.inc()
            case Finished():
                self.finished.labels(command.reason).inc()
            case Recall():
                self.recalls.inc()
            case _:
                pass

    def on_slice_done(self, done: SliceDone) -> None:
        """Compare the estimate with what the worker measured."""
        expected_s = self._expected.pop(done.batch_id, None)
        if done.refused:
            self.refused.inc()
            return
        measured_s = done.timings.prefill_s + done.timings.decode_s
        if expected_s is not None and measured_s > 0:
            self.slice_error.observe(abs(expected_s - measured_s) / measured_s)

    def on_misses(self, promises: Promises, seen: int) -> int:
        """What was compared since `seen` comparisons; returns how many there are now."""
        new = min(promises.compared - seen, len(promises.misses))
        for at in range(len(promises.misses) - new, len(promises.misses)):
            miss = promises.misses[at]
            self.prediction_error.labels(miss.kind).observe(miss.error)
        return promises.compared

    def on_books(self, books: Books) -> None:
        """What the core has counted, since the last time."""
        self.evictions.inc(books.evictions - self._evictions)
        self._evictions = books.evictions
        now, told = books.calibration, self._told
        if now.compared == told.compared:
            return
        self.predicted_outputs.inc(now.compared - told.compared)
        for at, level in enumerate(LEVELS):
            label = f"{level:g}"
            self.covered_outputs.labels(label).inc(now.covered[at] - told.covered[at])
            loss = now.pinball_tokens[at] - told.pinball_tokens[at]
            self.pinball.labels(label).inc(max(0.0, loss))
        self._told = Calibration(now.compared, list(now.covered), list(now.pinball_tokens))
        if books.preset.admission == "chance":
            margin, workers = books.margin, books.board.taking
            self.eviction_target.set(margin.target(books.constants, workers))
            self.margin.set(margin.z)

    def elected(self) -> None:
        """A new core counts from 0."""
        self.elections.inc()
        self._told, self._evictions = Calibration(), 0

    def on_beat(self, beat: SchedulerBeat, model: str) -> None:
        """The gauges say what the beat says."""
        self.waiting.set(beat.waiting)
        self.running.set(beat.running)
        self.workers.set(beat.workers)
        self.kv_usage.set(beat.kv_usage)
        self.predicted_wait.set(beat.predicted_wait_s)
        self.epoch.set(beat.epoch)
        # Without a worker the model has no name now; an empty label would be none at all.
        self._model = model or self._model
        if self._model:
            self.vllm_waiting.labels(self._model, ENGINE).set(beat.waiting)
            self.vllm_running.labels(self._model, ENGINE).set(beat.running)
            self.vllm_kv_usage.labels(self._model, ENGINE).set(beat.kv_usage)

    def deposed(self) -> None:
        """No longer the leader: nothing to say, nothing expected."""
        self._expected.clear()
        for one in (self.waiting, self.running, self.workers, self.predicted_wait, self.epoch):
            one.set(0)
