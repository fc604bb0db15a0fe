"""`make compose-test`: images built, the mesh up, streams, scaling under load, one trace.

Needs a Docker engine. The tests share one stack and run in this order; what they measured goes to
bench/results/compose-test-<date>.json and is shown as a table at the end.
"""

import asyncio
import datetime
import json
import statistics
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from rich.console import Console
from rich.table import Table

from deploy.compose_test.load import Answer, Ask, SteadyLoad, all_at_once, make_asks
from deploy.compose_test.stack import ROOT, NoEngine, Stack

pytestmark = pytest.mark.timeout(1800)

STREAMS = 200
CLIENTS = 8
ANSWERS_PER_PHASE = 40
PHASE_LIMIT_S = 240.0
SPANS_LIMIT_S = 30.0
TRACE_TOKENS = 64
LOG = ROOT / ".run" / "compose-test.log"
"""What the containers of the last run said."""
Measured = dict[str, Any]
Span = dict[str, Any]


@pytest.fixture(scope="module")
def measured() -> Iterator[Measured]:
    """What the tests find out; written down and shown at the end."""
    found: Measured = {}
    yield found
    path = ROOT / "bench" / "results" / f"compose-test-{datetime.date.today():%Y-%m-%d}.json"  # noqa: DTZ011
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(found, indent=2) + "\n")
    table = Table("measured", "value", title="compose-test")
    for name, value in found.items():
        table.add_row(name, str(value))
    Console().print(table)


@pytest.fixture(scope="module")
def stack(measured: Measured) -> Iterator[Stack]:
    """The images and three workers; everything is removed at the end."""
    stack = Stack()
    try:
        stack.check_engine()
    except NoEngine as error:
        pytest.exit(str(error), returncode=2)
    stack.compose("config", "-q")
    stack.down()
    say("building the images (minutes, the first time)")
    measured["build_s"] = round(stack.build(), 1)
    measured["image_megabytes"] = stack.image_megabytes()
    try:
        say("docker compose up --scale worker=3")
        measured["up_s"] = round(stack.up(workers=3), 1)
        yield stack
    finally:
        LOG.parent.mkdir(exist_ok=True)
        LOG.write_text(stack.compose("logs", "--no-color"))
        say("docker compose down -v")
        measured["down_s"] = round(stack.down(), 1)


@pytest.fixture(scope="module")
def asks() -> list[Ask]:
    return make_asks()


def test_every_service_is_healthy(stack: Stack) -> None:
    containers = [each for each in stack.containers() if each["Service"] != "accounts"]  # it ends
    states = {each["Name"]: (each["State"], each["Health"]) for each in containers}
    assert len([name for name in states if "-worker-" in name]) == 3
    assert set(states.values()) == {("running", "healthy")}, states


async def test_streams_complete(stack: Stack, asks: list[Ask], measured: Measured) -> None:
    """200 streaming requests at once end with [DONE] and the usage they must have."""
    wanted = [asks[n % len(asks)] for n in range(STREAMS)]
    start_s = time.monotonic()
    answers = await all_at_once(stack.url, wanted)
    measured["streams"] = summary(answers, time.monotonic() - start_s)
    assert faults(answers) == {}


async def test_a_trace_shows_slices_and_workers(stack: Stack, measured: Measured) -> None:
    """One request's trace holds its slices, each with its worker's name. A leased request has
    one for each placement, however often it is renewed."""
    trace_id = f"{time.time_ns():032x}"
    body = {"model": "demo", "prompt": "ROMEO:\n", "max_tokens": TRACE_TOKENS, "ignore_eos": True}
    async with httpx.AsyncClient(timeout=60) as client:
        headers = {"traceparent": f"00-{trace_id}-{1:016x}-01"}
        answer = await client.post(f"{stack.url}/v1/completions", json=body, headers=headers)
        answer.raise_for_status()
        spans = await trace(client, stack.collector_url(), trace_id)
    measured["trace"] = [
        f"{span['service']}: {span['name']} {(span['end_s'] - span['start_s']) * 1e3:.1f} ms "
        f"{worker_of(span)}".strip()
        for span in spans
    ]
    assert all(worker_of(span) for span in slices(spans))
    assert {span["service"] for span in spans} >= {
        "tranche-gateway",
        "tranche-scheduler",
        "tranche-worker",
    }


async def test_scaling_under_load_fails_nothing(
    stack: Stack, asks: list[Ask], measured: Measured
) -> None:
    """3 workers to 5 to 2 while clients go on asking: every request completes."""
    load = SteadyLoad(stack.url, asks, CLIENTS)
    async with asyncio.TaskGroup() as tasks:
        tasks.create_task(load.run())
        start_s = time.monotonic()
        for workers in (3, 5, 2):
            say(f"{len(load.answers)} answers; scaling to {workers} workers")
            async with asyncio.timeout(PHASE_LIMIT_S):
                seconds = await asyncio.to_thread(stack.up, workers)
                await load.answered(ANSWERS_PER_PHASE)
            measured[f"scale_to_{workers}_s"] = round(seconds, 1)
        load.stop()
    measured["scaling"] = summary(load.answers, time.monotonic() - start_s)
    assert faults(load.answers) == {}
    async with httpx.AsyncClient(timeout=60) as client:
        spans: list[Span] = (await client.get(f"{stack.collector_url()}/spans")).json()
    names = {worker_of(span) for span in slices(spans)}
    measured["workers_that_ran_slices"] = len(names)
    assert len(names) >= 5
    running = [each for each in stack.containers() if each["Service"] == "worker"]
    assert len(running) == 2


def faults(answers: list[Answer]) -> dict[str, int]:
    """What went wrong, and how often."""
    found: dict[str, int] = {}
    for answer in answers:
        if answer.fault:
            found[answer.fault] = found.get(answer.fault, 0) + 1
    return found


def summary(answers: list[Answer], seconds: float) -> dict[str, float]:
    """Counts and latencies of these answers; seconds."""
    first = sorted(answer.record.ttft_s for answer in answers)
    whole = sorted(answer.record.e2e_s for answer in answers)
    tokens = sum(answer.record.output_tokens for answer in answers)
    return {
        "requests": len(answers),
        "failed": sum(bool(answer.fault) for answer in answers),
        "output_tps": round(tokens / seconds, 1),
        "ttft_p50_s": round(statistics.median(first), 3),
        "ttft_p99_s": round(first[int(0.99 * (len(first) - 1))], 3),
        "e2e_p50_s": round(statistics.median(whole), 3),
        "e2e_p99_s": round(whole[int(0.99 * (len(whole) - 1))], 3),
    }


async def trace(client: httpx.AsyncClient, collector: str, trace_id: str) -> list[Span]:
    """The spans of a trace in order of time, once the whole request and a slice are there."""
    async with asyncio.timeout(SPANS_LIMIT_S):
        while True:
            spans: list[Span] = (await client.get(f"{collector}/spans")).json()
            found = [span for span in spans if span["trace_id"] == trace_id]
            whole = any(span["name"].startswith("POST ") for span in found)
            if whole and slices(found):
                return sorted(found, key=lambda span: float(span["start_s"]))
            await asyncio.sleep(0.5)


def slices(spans: list[Span]) -> list[Span]:
    """Those of the spans that are slices run by a worker."""
    return [span for span in spans if span["name"] == "slice"]


def worker_of(span: Span) -> str:
    """The name of the worker that a slice ran on."""
    return str(span["attributes"].get("tranche.worker", ""))


def say(text: str) -> None:
    """A line for whoever waits."""
    Console().print(f"[compose-test] {text}", markup=False)
