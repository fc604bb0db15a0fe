"""Many pretended workers in one process, in a live mesh: to the others they are workers like any.

Texts depend on seeds and positions alone, so a request that went on elsewhere has the same text.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import Thread

import pytest

from tests.e2e.asking import Question, ask_all
from tests.e2e.live_mesh import LiveMesh, live_mesh

Start = Callable[..., AbstractContextManager[LiveMesh]]
MEMBERS = 12
TOKENS = 90
SPEED = 1.5
"""An iteration of the profile takes about 20 ms: a request lives for two seconds and a half."""
QUESTIONS = [
    Question(tuple(range(10, 15 + number)), TOKENS, temperature=1.0, seed=7919 * number)
    for number in range(36)
]


@pytest.fixture(scope="module")
def texts() -> list[list[list[int]]]:
    """Of a plain worker."""
    with live_mesh(
        policy="tgi", engine="simulated", simulated_lengths="mean=100000", simulated_speed=200
    ) as plain:
        return ask_all(plain.url, QUESTIONS)


@pytest.fixture
def many(monkeypatch: pytest.MonkeyPatch) -> Start:
    """Workers that are many."""
    monkeypatch.setenv("TRANCHE_WORKER_PRETEND_WORKERS", str(MEMBERS))

    def start(bus: str, processes: int = 1) -> AbstractContextManager[LiveMesh]:
        return live_mesh(
            bus,
            workers=processes,
            policy="past-future",
            slice_tokens=32,
            engine="simulated",
            simulated_lengths="mean=100000",
            simulated_speed=SPEED,
        )

    return start


def address_of(bus: str, request: pytest.FixtureRequest) -> str:
    return str(request.getfixturevalue("broker_url")) if bus == "rabbit" else ""


def when_running(live: LiveMesh, action: Callable[[], None]) -> Thread:
    """Act once every request has tokens."""

    def act() -> None:
        while live.metric("tranche_output_tokens_total") < 4 * len(QUESTIONS):
            time.sleep(0.02)
        action()

    thread = Thread(target=act, daemon=True)
    thread.start()
    return thread


@pytest.mark.parametrize("bus", ["memory", "rabbit"])
def test_many_in_one_process_make_the_texts_of_one(
    bus: str,
    request: pytest.FixtureRequest,
    many: Start,
    texts: list[list[list[int]]],
) -> None:
    with many(address_of(bus, request)) as live:
        assert ask_all(live.url, QUESTIONS) == texts
        assert live.metric("tranche_workers") == MEMBERS
        assert live.metric("tranche_renewed_leases_total") >= 2 * len(QUESTIONS)
        batches = live.metric("tranche_gateway_token_batches_total")
        assert batches < len(QUESTIONS) * TOKENS / 10, "their tokens travel together"


@pytest.mark.parametrize("bus", ["memory", "rabbit"])
def test_when_a_process_dies_all_its_workers_are_lost_and_nothing_else(
    bus: str,
    request: pytest.FixtureRequest,
    many: Start,
    texts: list[list[list[int]]],
) -> None:
    with many(address_of(bus, request), processes=2) as live:
        killer = when_running(live, live.kill_worker)
        assert ask_all(live.url, QUESTIONS) == texts
        killer.join()
        assert live.metric("tranche_lost_workers_total") == MEMBERS
        assert live.metric("tranche_recalls_total") > 0


def test_a_mesh_that_stops_lets_them_finish(many: Start, texts: list[list[list[int]]]) -> None:
    with many("") as live:
        stopper = when_running(live, live.ask_to_stop)
        assert ask_all(live.url, QUESTIONS) == texts
        stopper.join()
