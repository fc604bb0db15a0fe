"""What the estimator shows on /metrics: the history's shape, and how its work goes."""

from dataclasses import replace

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from services.estimator.core.history import History
from services.estimator.predictor import Counts
from shared.telemetry.metrics import MESSAGE_SECONDS


class EstimatorMetrics:
    """Model labels come from the history, which is bounded; `show` forgets those that it forgot."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self.finished = Counter(
            "tranche_estimator_finished_requests_total",
            "Requests reported as ended, by reason.",
            ("reason",),
            registry=registry,
        )
        self.repeated = Counter(
            "tranche_estimator_repeated_requests_total",
            "Reports of requests that were known already.",
            registry=registry,
        )
        self.refused = Counter(
            "tranche_estimator_refused_requests_total",
            "Reports that cannot be true, such as a negative length.",
            registry=registry,
        )
        self.store_seconds = Histogram(
            "tranche_estimator_store_seconds",
            "One request into the database, commit included.",
            buckets=MESSAGE_SECONDS,
            registry=registry,
        )
        self.store_errors = Counter(
            "tranche_estimator_store_errors_total",
            "Failed writes to the database; each is tried again.",
            registry=registry,
        )
        self.damaged = Counter(
            "tranche_estimator_damaged_databases_total",
            "Databases that were found damaged and moved aside.",
            registry=registry,
        )
        self.forecasts = Counter(
            "tranche_estimator_forecasts_total",
            "Forecasts sent to the scheduler, by result.",
            ("result",),
            registry=registry,
        )
        self.predictions = Counter(
            "tranche_estimator_predictions_total",
            "Questions to the predictor, by result.",
            ("result",),
            registry=registry,
        )
        self._predicted = Counts()
        self._history = Gauge(
            "tranche_estimator_history_requests",
            "Requests in the window.",
            ("model",),
            registry=registry,
        )
        self._ended = Gauge(
            "tranche_estimator_ended_requests",
            "Requests that ever ended, over restarts, by reason.",
            ("model", "reason"),
            registry=registry,
        )
        self._mean = Gauge(
            "tranche_estimator_output_mean_tokens",
            "Mean output length in the window.",
            ("model",),
            registry=registry,
        )
        self._quantile = Gauge(
            "tranche_estimator_output_quantile_tokens",
            "Quantiles of the output length in the window.",
            ("model", "quantile"),
            registry=registry,
        )
        self._censored = Gauge(
            "tranche_estimator_censored_ratio",
            "Share of the window that the token limit cut, 0 to 1.",
            ("model",),
            registry=registry,
        )
        self._similarity = Gauge(
            "tranche_estimator_window_similarity_ratio",
            "How alike the window's older and newer half are, 0 to 1; low: lengths drift.",
            ("model",),
            registry=registry,
        )

    def show_predictor(self, counts: Counts) -> None:
        """What became of questions since the last time."""
        for name, count in counts.items():
            self.predictions.labels(name).inc(count - getattr(self._predicted, name))
        self._predicted = replace(counts)

    def show(self, history: History) -> None:
        """Set the gauges to the history as it is now."""
        gauges = (self._history, self._ended, self._mean, self._quantile, self._censored)
        for gauge in (*gauges, self._similarity):
            gauge.clear()
        for model in history.models():
            lengths = history.lengths(model)
            self._history.labels(model).set(lengths.requests)
            self._mean.labels(model).set(lengths.mean)
            self._quantile.labels(model, "0.5").set(lengths.p50)
            self._quantile.labels(model, "0.95").set(lengths.p95)
            self._censored.labels(model).set(lengths.censored_share)
            similarity = history.similarity(model)
            if similarity is not None:
                self._similarity.labels(model).set(similarity)
            for reason, requests in history.totals(model).items():
                self._ended.labels(model, reason).set(requests)
