"""The dashboard's queries, put to a real Prometheus that scrapes a running mesh."""

import contextlib
import functools
import http.server
import json
import math
import re
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from deploy.grafana.build_dashboard import BOARD, OUTPUT, text
from tests.deploy.prometheus import Prometheus, tool
from tests.e2e.live_mesh import live_mesh

ROOT = Path(__file__).resolve().parents[2]
RECORDED = Path(__file__).parent / "rabbitmq"
"""`metrics` there is what RabbitMQ's plugin said (/metrics/per-object) beside a mesh in compose."""
SCRAPES = 4
"""Enough for a rate over a window that began before the load."""
VARIABLES = {"$__rate_interval": "15s", "$__interval": "5s"}
METRIC = re.compile(r"\b(?:tranche_|rabbitmq_|process_|vllm:)\w+")
SUFFIX = re.compile(r"_(bucket|sum|count|total)$")
POLICIES = {"closed": "scls", "leased": None}
"""Of a mesh for each form of slices; leases are the default."""
VLLM_NAMES = (
    "vllm:num_requests_running",
    "vllm:num_requests_waiting",
    "vllm:kv_cache_usage_perc",
    "vllm:prompt_tokens_total",
    "vllm:generation_tokens_total",
    "vllm:request_success_total",
    "vllm:time_to_first_token_seconds_bucket",
    "vllm:inter_token_latency_seconds_bucket",
    "vllm:request_time_per_output_token_seconds_bucket",
    "vllm:e2e_request_latency_seconds_bucket",
    "vllm:request_prompt_tokens_bucket",
    "vllm:request_generation_tokens_bucket",
)
"""What dashboards and autoscalers made for vLLM ask for."""


def queries(*, closed_only: bool) -> list[Any]:
    """Those of the panels that only closed batches fill, or the others."""
    return [
        pytest.param(expression, id=f"{panel.title}-{number}")
        for panels in BOARD.values()
        for panel in panels
        for number, (expression, _) in enumerate(panel.queries)
        if panel.closed_only == closed_only
    ]


@contextlib.contextmanager
def busy_mesh(policy: str | None) -> Iterator[str]:
    """The URL of a mesh with two workers, under a light load."""
    stop = threading.Event()
    with live_mesh(workers=2, policy=policy) as mesh:
        load = threading.Thread(target=keep_asking, args=(mesh.url, stop))
        load.start()
        try:
            yield mesh.url
        finally:
            stop.set()
            load.join()


@pytest.fixture(scope="module", params=POLICIES)
def prometheus(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Prometheus]:
    """Has scraped a mesh of this form, and the broker's recorded metrics, a few times."""
    with busy_mesh(POLICIES[request.param]) as url, recorded_broker() as broker:
        jobs = {
            "gateway": (url.removeprefix("http://"), "/metrics"),
            "rabbitmq": (broker, "/metrics"),
        }
        with Prometheus(tmp_path_factory.mktemp("prometheus"), jobs) as server:
            server.wait_for('up{job="gateway"} == 1')
            server.wait_for('up{job="rabbitmq"} == 1')
            server.wait_for("sum(tranche_gateway_finished_requests_total) > 2")
            server.wait_for(
                f"sum(count_over_time(tranche_estimator_output_mean_tokens[1m])) > {SCRAPES}"
            )
            yield server


@pytest.mark.parametrize("expression", queries(closed_only=False))
def test_every_query_has_data(prometheus: Prometheus, expression: str) -> None:
    has_data(prometheus, expression)


@pytest.mark.parametrize("prometheus", ["closed"], indirect=True, scope="module")
@pytest.mark.parametrize("expression", queries(closed_only=True))
def test_every_query_about_closed_batches_has_data(prometheus: Prometheus, expression: str) -> None:
    has_data(prometheus, expression)


def has_data(prometheus: Prometheus, expression: str) -> None:
    """At least one series with a number."""
    for name, value in VARIABLES.items():
        expression = expression.replace(name, value)
    values = [float(series["value"][1]) for series in prometheus.query(expression)]
    assert any(math.isfinite(value) for value in values), values


def test_every_metric_of_the_dashboard_exists(prometheus: Prometheus) -> None:
    """`or vector(0)` gives data for a misspelt counter too."""
    families = prometheus.families().keys()
    for query in queries(closed_only=False) + queries(closed_only=True):
        for name in METRIC.findall(str(query.values[0])):
            assert name in families or SUFFIX.sub("", name) in families, name


@pytest.mark.parametrize("name", VLLM_NAMES)
def test_names_of_vllm_are_there(prometheus: Prometheus, name: str) -> None:
    series = prometheus.query(name)
    assert series
    assert all({"model_name", "engine"} <= each["metric"].keys() for each in series)


def test_a_wrong_query_is_an_error(prometheus: Prometheus) -> None:
    with pytest.raises(AssertionError, match="parse error"):
        prometheus.query("rate(tranche_slices_total)[")


def test_the_dashboard_is_as_its_table_says() -> None:
    assert OUTPUT.read_text() == text(), "run: python deploy/grafana/build_dashboard.py"


def test_panels_have_their_own_ids_and_places() -> None:
    panels: list[dict[str, Any]] = json.loads(OUTPUT.read_text())["panels"]
    assert len({panel["id"] for panel in panels}) == len(panels)
    taken = set()
    for place in (panel["gridPos"] for panel in panels):
        for x in range(place["x"], place["x"] + place["w"]):
            for y in range(place["y"], place["y"] + place["h"]):
                assert (x, y) not in taken
                taken.add((x, y))
    assert max(x for x, _ in taken) < 24


def test_the_datasource_of_the_panels_is_provisioned() -> None:
    provisioned = (ROOT / "deploy/grafana/provisioning/datasources/prometheus.yml").read_text()
    for panel in json.loads(OUTPUT.read_text())["panels"]:
        for target in panel.get("targets", []):
            assert f"uid: {target['datasource']['uid']}\n" in provisioned


def test_prometheus_accepts_its_configuration() -> None:
    file = str(ROOT / "deploy/prometheus/prometheus.yml")
    done = subprocess.run(
        [tool("promtool"), "check", "config", file], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def keep_asking(url: str, stop: threading.Event) -> None:
    """A few short requests every half second; the cores are for whoever answers queries."""
    prompts = ("ROMEO:\n", "Now is the winter of our discontent")
    with httpx.Client(base_url=url, timeout=60) as client:
        while not stop.wait(0.5):
            for prompt in prompts:
                body = {"model": "demo_model", "prompt": prompt, "max_tokens": 12}
                client.post("/v1/completions", json=body | {"stream": True}).raise_for_status()
            chat = {"model": "demo_model", "messages": [{"role": "user", "content": "Speak."}]}
            client.post("/v1/chat/completions", json=chat | {"max_tokens": 8}).raise_for_status()
            client.post("/v1/completions", json={"prompt": 1})


@contextlib.contextmanager
def recorded_broker() -> Iterator[str]:
    """Serves the recorded metrics; the address."""

    class Quiet(http.server.SimpleHTTPRequestHandler):
        extensions_map = {"": "text/plain; version=0.0.4"}

        def log_message(self, format: str, *args: object) -> None:  # noqa: A002
            """Nothing."""

    handler = functools.partial(Quiet, directory=str(RECORDED))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
