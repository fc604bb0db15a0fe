"""The dashboard as a table of panels; `python deploy/grafana/build_dashboard.py` writes its JSON.

tests/deploy/test_dashboard.py puts every query to a real Prometheus that scrapes a running mesh.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

OUTPUT = Path(__file__).parent / "dashboards" / "tranche.json"
DATASOURCE = {"type": "prometheus", "uid": "prometheus"}
WINDOW = "[$__rate_interval]"
PANEL_COLUMNS, PANEL_LINES, ROW_COLUMNS = 8, 8, 24

Query = tuple[str, str]
"""An expression and its legend."""


@dataclass(frozen=True, slots=True)
class Panel:
    """One panel of curves."""

    title: str
    unit: str
    queries: tuple[Query, ...]
    text: str = ""
    """What one sees there; shown at the title."""
    closed_only: bool = False
    """Empty while the policy is one of leases; the title says so."""


def rate(counter: str, legend: str) -> Query:
    """All series of a counter together, per second; zero while there is none."""
    return f"sum(rate({counter}{WINDOW})) or vector(0)", legend


def rate_by(counter: str, label: str, also: str = "") -> Query:
    """A counter per second for each value of a label; `also` ends the legend."""
    return f"sum by ({label}) (rate({counter}{WINDOW}))", f"{{{{{label}}}}} {also}".strip()


def quantiles(histogram: str) -> tuple[Query, ...]:
    """Median, 95th and 99th percentile over all series of a histogram."""
    buckets = f"sum by (le) (rate({histogram}_bucket{WINDOW}))"
    shares = ((0.5, "p50"), (0.95, "p95"), (0.99, "p99"))
    return tuple((f"histogram_quantile({share}, {buckets})", name) for share, name in shares)


def p95_by(histogram: str, label: str) -> Query:
    """The 95th percentile for each value of a label."""
    buckets = f"sum by (le, {label}) (rate({histogram}_bucket{WINDOW}))"
    return f"histogram_quantile(0.95, {buckets})", f"{{{{{label}}}}}"


def mean_by(histogram: str, label: str) -> Query:
    """The mean for each value of a label."""
    total, count = (f"rate({histogram}_{part}{WINDOW})" for part in ("sum", "count"))
    return f"sum by ({label}) ({total}) / sum by ({label}) ({count})", f"{{{{{label}}}}}"


def by_worker(expression: str) -> Query:
    """A gauge of each worker."""
    return expression, "{{worker}}"


BOARD: dict[str, tuple[Panel, ...]] = {
    "What clients see": (
        Panel(
            "Time to first token",
            "s",
            quantiles("tranche_gateway_time_to_first_token_seconds"),
            "From the receipt of a request to its first token at the gateway.",
        ),
        Panel(
            "Time per output token",
            "s",
            quantiles("tranche_gateway_time_per_output_token_seconds"),
            "Mean of one choice, without its first token.",
        ),
        Panel("End to end", "s", quantiles("tranche_gateway_request_seconds")),
        Panel(
            "Tokens",
            "short",
            (
                rate("tranche_gateway_output_tokens_total", "output tokens/s"),
                rate("tranche_gateway_prompt_tokens_total", "prompt tokens/s"),
            ),
            "Tokens per second through the gateway.",
        ),
        Panel(
            "Finished requests",
            "reqps",
            (rate_by("tranche_gateway_finished_requests_total", "reason"),),
            "Choices by how they ended.",
        ),
        Panel(
            "Answers and errors",
            "reqps",
            (
                rate_by("tranche_gateway_http_requests_total", "status"),
                rate("tranche_gateway_errors_total", "errors"),
                rate("tranche_gateway_disconnected_requests_total", "clients gone"),
            ),
        ),
    ),
    "Waiting": (
        Panel(
            "Requests in the mesh",
            "short",
            (
                ("sum(tranche_waiting_requests)", "waiting"),
                ("sum(tranche_running_requests)", "running"),
                ("sum(tranche_gateway_open_requests)", "open at gateways"),
            ),
        ),
        Panel(
            "Wait in the request queue",
            "s",
            quantiles("tranche_request_queue_seconds"),
            "Of a new request, between gateway and scheduler.",
        ),
        Panel(
            "Wait in the pool",
            "s",
            quantiles("tranche_pool_wait_seconds"),
            "Before each slice, until the scheduler gives it to a worker.",
        ),
        Panel(
            "Wait in the worker",
            "s",
            quantiles("tranche_worker_queue_seconds"),
            "From an order's receipt until the engine takes it in.",
        ),
        Panel("Token return", "s", quantiles("tranche_gateway_token_return_seconds")),
        Panel(
            "Wait in broker queues, p95", "s", (p95_by("tranche_bus_queue_wait_seconds", "queue"),)
        ),
    ),
    "Scheduler": (
        Panel(
            "Decision",
            "s",
            quantiles("tranche_decision_seconds"),
            "The core's own time for one event.",
        ),
        Panel(
            "Error of the estimated slice time (closed batches)",
            "percentunit",
            quantiles("tranche_slice_time_error_ratio"),
            "Distance between estimate and measurement, as a share of the measurement. Nobody "
            "estimates the time of a lease.",
            closed_only=True,
        ),
        Panel(
            "Predicted wait", "s", (("max(tranche_predicted_wait_seconds)", "of a request now"),)
        ),
        Panel(
            "Refused and repeated",
            "ops",
            (
                rate("tranche_rejections_total", "requests refused"),
                rate("tranche_refused_batches_total", "batches refused by workers"),
                rate("tranche_recalls_total", "recalls"),
                rate("tranche_lost_workers_total", "workers lost"),
            ),
        ),
        Panel(
            "Leadership",
            "short",
            (("max(tranche_epoch)", "epoch"), ("sum(tranche_elections_total)", "elections")),
        ),
        Panel(
            "Batches and slices given out",
            "ops",
            (
                rate("tranche_dispatched_batches_total", "batches"),
                rate("tranche_dispatched_orders_total", "slices"),
            ),
        ),
    ),
    "Workers": (
        Panel("Workers that may be given work", "short", (("sum(tranche_workers)", "workers"),)),
        Panel("Batches and leases ended", "ops", (rate_by("tranche_slices_total", "worker"),)),
        Panel(
            "Batch size",
            "short",
            (mean_by("tranche_batch_size_requests", "worker"),),
            "Requests in a closed batch; of leases, the most in one iteration between two reports.",
        ),
        Panel(
            "KV cache in use",
            "percentunit",
            (by_worker("tranche_kv_used_tokens / tranche_kv_capacity_tokens"),),
        ),
        Panel("Output tokens", "short", (rate_by("tranche_output_tokens_total", "worker"),)),
        Panel(
            "Time in the model",
            "percentunit",
            (
                rate_by("tranche_prefill_seconds_sum", "worker", "prefill"),
                rate_by("tranche_decode_seconds_sum", "worker", "decode"),
            ),
            "Share of the time that a worker spends in prefill and in decode.",
        ),
        Panel("Iteration, p95", "s", (p95_by("tranche_iteration_seconds", "worker"),)),
        Panel(
            "Wasted tokens",
            "short",
            (
                rate("tranche_invalid_tokens_total", "after the end/s"),
                rate("tranche_pad_tokens_total", "padding/s"),
            ),
            "Work of padded batches that no request asked for.",
        ),
        Panel("Free device memory", "bytes", (by_worker("tranche_device_free_bytes"),)),
    ),
    "Output lengths": (
        Panel(
            "Finished requests known",
            "short",
            (("tranche_estimator_history_requests", "{{model}}"),),
        ),
        Panel(
            "Output length",
            "short",
            (
                ("tranche_estimator_output_mean_tokens", "{{model}} mean"),
                ("tranche_estimator_output_quantile_tokens", "{{model}} quantile {{quantile}}"),
            ),
        ),
        Panel("Storing a request", "s", quantiles("tranche_estimator_store_seconds")),
    ),
    "Bus": (
        Panel("Published", "ops", (rate_by("tranche_bus_published_messages_total", "message"),)),
        Panel("Publish to confirm, p95", "s", (p95_by("tranche_bus_publish_seconds", "exchange"),)),
        Panel(
            "Dead letters and failures",
            "ops",
            (
                rate("tranche_bus_dead_lettered_messages_total", "dead letters"),
                rate("tranche_bus_handler_errors_total", "handlers failed"),
                rate("tranche_bus_publish_errors_total", "not published"),
                rate("tranche_bus_redelivered_messages_total", "redelivered"),
                rate("tranche_bus_reconnects_total", "reconnects"),
            ),
        ),
        Panel(
            "Depth of durable queues",
            "short",
            (
                (
                    'rabbitmq_queue_messages{queue!~"tranche[.](gateway|worker|estimator)[.].*"}',
                    "{{queue}}",
                ),
            ),
            "tranche.dead holds what nobody could handle.",
        ),
        Panel(
            "Broker's memory",
            "bytes",
            (
                ("rabbitmq_process_resident_memory_bytes", "in use"),
                ("rabbitmq_resident_memory_limit_bytes", "publishers are held back"),
            ),
        ),
        Panel(
            "Process CPU",
            "percentunit",
            (
                (
                    f"sum by (job, instance) (rate(process_cpu_seconds_total{WINDOW}))",
                    "{{job}} {{instance}}",
                ),
            ),
            "Cores in use by each process.",
        ),
    ),
}


def dashboard() -> dict[str, Any]:
    """What Grafana reads."""
    return {
        "uid": "tranche",
        "title": "Tranche",
        "tags": ["tranche"],
        "schemaVersion": 39,
        "editable": True,
        "refresh": "10s",
        "time": {"from": "now-30m", "to": "now"},
        "timezone": "browser",
        "templating": {"list": []},
        "annotations": {"list": []},
        "panels": list(_panels()),
    }


def _panels() -> Iterator[dict[str, Any]]:
    number = line = 0
    for title, panels in BOARD.items():
        number += 1
        place = {"x": 0, "y": line, "w": ROW_COLUMNS, "h": 1}
        yield {"id": number, "type": "row", "title": title, "gridPos": place, "panels": []}
        line += 1
        for index, panel in enumerate(panels):
            number += 1
            column = index * PANEL_COLUMNS % ROW_COLUMNS
            if index and column == 0:
                line += PANEL_LINES
            place = {"x": column, "y": line, "w": PANEL_COLUMNS, "h": PANEL_LINES}
            yield {"id": number, "gridPos": place, **_curves(panel)}
        line += PANEL_LINES


def _curves(panel: Panel) -> dict[str, Any]:
    return {
        "type": "timeseries",
        "title": panel.title,
        "description": panel.text,
        "datasource": DATASOURCE,
        "fieldConfig": {
            "defaults": {
                "unit": panel.unit,
                "min": 0,
                "custom": {"lineWidth": 2, "fillOpacity": 8, "showPoints": "never"},
            },
            "overrides": [],
        },
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
        "targets": [
            {
                "refId": chr(ord("A") + index),
                "datasource": DATASOURCE,
                "expr": expression,
                "legendFormat": legend,
            }
            for index, (expression, legend) in enumerate(panel.queries)
        ],
    }


def text() -> str:
    """The file's content."""
    return json.dumps(dashboard(), indent=2) + "\n"


if __name__ == "__main__":
    OUTPUT.write_text(text())
