"""`tranche drain` against a mesh over RabbitMQ: requests move, nothing is computed twice, and what
is said to who names a worker that is not there, or has no patience.
"""

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from threading import Thread

import pytest

from services.cli import main
from services.drain_command import STAYS_EXIT_CODE
from tests.e2e.asking import Question, ask_all
from tests.e2e.live_mesh import LiveMesh, live_mesh

TOKENS = 160
SLICE = 16
SLOW, QUICK = 0.5, 200
"""An iteration of the profile takes 40 ms, or nearly nothing."""
QUESTIONS = [
    Question(tuple(range(10, 15 + number)), TOKENS, temperature=1.0, seed=7919 * number)
    for number in range(12)
]
WAIT_S = 30.0
SECRET = "guest:guest"
Drained = tuple[int, str, str]


@pytest.fixture
def drain(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., Drained]:
    """Runs the command in this process; its exit code and what it wrote."""
    monkeypatch.setenv("COLUMNS", "400")

    def run(*arguments: str) -> Drained:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ending:
            main(["drain", *arguments])
        shown = capsys.readouterr()
        assert SECRET not in shown.out + shown.err
        return int(ending.value.code or 0), shown.out, shown.err

    return run


def mesh(bus: str, workers: int, speed: float) -> AbstractContextManager[LiveMesh]:
    """Simulated workers: texts depend on seeds and positions alone."""
    return live_mesh(
        bus,
        workers=workers,
        policy="past-future",
        slice_tokens=SLICE,
        engine="simulated",
        simulated_lengths="mean=100000",
        simulated_speed=speed,
    )


def until(condition: Callable[[], bool]) -> None:
    """Wait until it holds."""
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_background(live: LiveMesh, texts: list[list[list[int]]]) -> Thread:
    """Ask everything, and return once every request has tokens."""
    asking = Thread(target=lambda: texts.extend(ask_all(live.url, QUESTIONS)), daemon=True)
    asking.start()
    until(lambda: live.metric("tranche_output_tokens_total") >= 2 * len(QUESTIONS))
    return asking


def test_requests_move_and_nothing_is_computed_twice(
    broker_url: str, drain: Callable[..., Drained]
) -> None:
    with mesh("", 1, QUICK) as undisturbed:
        whole = ask_all(undisturbed.url, QUESTIONS)
    texts: list[list[list[int]]] = []
    with mesh(broker_url, 2, SLOW) as live:
        asking = in_background(live, texts)
        code, out, err = drain("worker-1", "--bus", broker_url)
        assert code == 0, err
        assert out.startswith("worker-1-")
        assert "has left" in out
        assert "drains" in err
        assert asking.is_alive(), "the other one has still to do what was moved"
        asking.join(WAIT_S)
        assert live.metric("tranche_lost_workers_total") == 0
        assert live.metric("tranche_workers") == 1
        made = live.metric("tranche_output_tokens_total")
    assert texts == whole
    assert made == TOKENS * len(QUESTIONS), "not one token twice"


def test_who_is_named_wrongly_and_who_has_no_patience(
    broker_url: str, drain: Callable[..., Drained], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TRANCHE_DRAIN_BUS", broker_url)
    with mesh(broker_url, 2, QUICK) as live:
        code, out, err = drain("worker-9")
        assert (code, out) == (1, "")
        assert "no worker 'worker-9'" in err.splitlines()[-1]
        assert all(f"worker-{n}-" in err for n in (1, 2)), "who is there"
        code, _, err = drain("worker")
        assert code == 1
        assert "several" in err
        code, out, err = drain("worker-2", "--timeout", "0")
        assert (code, out) == (STAYS_EXIT_CODE, "")
        assert "has not left within 0 s" in err
        until(lambda: live.metric("tranche_workers") == 1)
        code, _, err = drain("worker-2")
        assert code == 1
        assert "no worker 'worker-2'; there are worker-1-" in err
        assert len(ask_all(live.url, QUESTIONS)) == len(QUESTIONS)
