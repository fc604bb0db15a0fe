"""Leases in a live mesh: the scheduler's policies, workers with the simulated engine, both buses.

Whatever the lease, the company, the memory and the losses: every request gets the text that it gets
alone and in one piece.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from threading import Thread

import pytest

from tests.e2e.asking import Question, ask_all
from tests.e2e.live_mesh import LiveMesh, live_mesh

SPEED = 20.0
"""An iteration of the profile takes a millisecond."""
WAIT_S = 30.0
REQUESTS = 24
CHOICES = 30
TOKENS_MAX = 160
BLOCK = 16
"""KV tokens in a block of the profile."""
LENGTHY = {"simulated_lengths": "mean=100000", "simulated_speed": 1}
"""All outputs are cut at their limit, seconds after the begin: there is a middle to do harm in."""


@pytest.fixture(scope="module")
def questions() -> list[Question]:
    """Prompts of 5 to 300 tokens; outputs of about 60 tokens, a few cut at their limit."""
    return [
        Question(
            tuple(range(10, 15 + number * 13 % 295)),
            TOKENS_MAX,
            temperature=1.0,
            seed=number * 7919,
            choices=3 if number % 8 == 7 else 1,
        )
        for number in range(REQUESTS)
    ]


@pytest.fixture(scope="module")
def whole(questions: Sequence[Question]) -> list[list[list[int]]]:
    """The texts that the mesh makes of one request at a time, in one lease."""
    with mesh("tgi", simulated_speed=200) as alone:
        return [ask_all(alone.url, [question])[0] for question in questions]


def mesh(policy: str, bus: str = "", **more: object) -> AbstractContextManager[LiveMesh]:
    """A mesh of simulated workers."""
    options = {"simulated_lengths": "mean=60", "simulated_speed": SPEED, **more}
    return live_mesh(bus, policy=policy, engine="simulated", **options)  # type: ignore[arg-type]


def address_of(bus: str, request: pytest.FixtureRequest) -> str:
    """A fresh virtual host of the real broker, or nothing for the bus in memory."""
    return str(request.getfixturevalue("broker_url")) if bus == "rabbit" else ""


def begins_alike(answers: list[list[list[int]]], whole: list[list[list[int]]]) -> None:
    """The same texts, but that they did not end where those of the table do."""
    for shorter, longer in zip(whole, answers, strict=True):
        for short, long in zip(shorter, longer, strict=True):
            assert len(long) == TOKENS_MAX
            assert long[: len(short) - 1] == short[:-1]


def in_the_middle(live: LiveMesh, action: Callable[[], None]) -> Thread:
    """Act once every choice of every request is on a worker, by the scheduler's latest beat, and
    tokens flow."""

    def act() -> None:
        while (
            live.metric("tranche_running_requests") < CHOICES
            or live.metric("tranche_output_tokens_total") < CHOICES
        ):
            time.sleep(0.02)
        action()

    thread = Thread(target=act, daemon=True)
    thread.start()
    return thread


def test_the_texts_are_worth_comparing(whole: list[list[list[int]]]) -> None:
    lengths = [len(text) for texts in whole for text in texts]
    assert len({tuple(text) for texts in whole for text in texts}) == len(lengths) == CHOICES
    assert max(lengths) == TOKENS_MAX, "some are cut"
    assert min(lengths) < 20


@pytest.mark.parametrize("bus", ["memory", "rabbit"])
@pytest.mark.parametrize("slice_tokens", [8, 32, 128])
def test_same_text_in_leases_of_any_length(
    bus: str,
    slice_tokens: int,
    request: pytest.FixtureRequest,
    questions: list[Question],
    whole: list[list[list[int]]],
) -> None:
    address = address_of(bus, request)
    with mesh("past-future", address, workers=2, slice_tokens=slice_tokens) as live:
        assert ask_all(live.url, questions) == whole
        renewed = live.metric("tranche_renewed_leases_total")
        lease = max(slice_tokens, BLOCK)  # none ends inside a block
        assert renewed >= sum(len(t) // lease - 1 for texts in whole for t in texts)


@pytest.mark.parametrize("policy", ["vllm", "sal+larry", "scls"])
def test_same_text_under_other_policies(
    policy: str, questions: list[Question], whole: list[list[list[int]]]
) -> None:
    with mesh(policy, workers=2) as live:
        assert ask_all(live.url, questions) == whole


@pytest.mark.parametrize("bus", ["memory", "rabbit"])
def test_requests_that_are_parked_for_want_of_memory_go_on(
    bus: str,
    request: pytest.FixtureRequest,
    monkeypatch: pytest.MonkeyPatch,
    questions: list[Question],
    whole: list[list[list[int]]],
) -> None:
    monkeypatch.setenv("TRANCHE_WORKER_KV_TOKENS", "1024")
    with mesh("aggressive", address_of(bus, request), slice_tokens=16) as live:
        assert ask_all(live.url, questions) == whole
        assert live.metric("tranche_parked_requests_total") > 0


@pytest.mark.parametrize("bus", ["memory", "rabbit"])
def test_requests_of_a_lost_worker_go_on_elsewhere(
    bus: str,
    request: pytest.FixtureRequest,
    questions: list[Question],
    whole: list[list[list[int]]],
) -> None:
    with mesh("past-future", address_of(bus, request), workers=2, **LENGTHY) as live:
        killer = in_the_middle(live, live.kill_worker)
        answers = ask_all(live.url, questions)
        killer.join(WAIT_S)
        assert live.metric("tranche_lost_workers_total") == 1
        assert live.metric("tranche_recalls_total") > 0, "nothing was lost with it"
    begins_alike(answers, whole)


@pytest.mark.parametrize("bus", ["memory", "rabbit"])
def test_leases_go_on_under_a_new_leader(
    bus: str,
    request: pytest.FixtureRequest,
    questions: list[Question],
    whole: list[list[list[int]]],
) -> None:
    with mesh("past-future", address_of(bus, request), workers=2, **LENGTHY) as live:
        killer = in_the_middle(live, live.replace_scheduler)
        answers = ask_all(live.url, questions)
        killer.join(WAIT_S)
        counted = live.standby.get_sample_value
        assert counted("tranche_elections_total") == 1
        assert counted("tranche_renewed_leases_total") > 0
        assert counted("tranche_recalls_total") == 0, "they were undisturbed"
    begins_alike(answers, whole)
