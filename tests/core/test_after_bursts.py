"""What is foretold when a burst is over: with as many beside it as run now, not as ran then."""

import pytest

from services.scheduler.core.promises import Promises
from services.scheduler.core.rate import Crowding, FirstTokens
from services.scheduler.core.refusals import UNPROVEN_S
from services.scheduler.core.settings import Constants
from shared import tokens
from shared.messages import (
    Accepted,
    GatewayBeat,
    Rejected,
    RunSlice,
    SliceDone,
    SliceOrder,
    SliceResult,
    SliceTimings,
    Submit,
    WorkerMemory,
)
from tests.core.seam import Bench, beat_of, spec_of, submit
from tests.core.test_predictions import waiting

FIRST_S = 0.02
BESIDE_S = 0.0003
"""A token takes 1 ms, and so much more for each request that runs beside it."""
MEMORY = WorkerMemory(kv_tokens_capacity=50_000)


class Mesh(Bench):
    """One worker, which answers when the test says so: all requests together."""

    def __init__(self) -> None:
        super().__init__("tranche", Constants(slice_tokens=1_000))
        self.sent = 0
        self.pass_s(0.0)

    def pass_s(self, seconds: float) -> None:
        """Time passes, and its worker and gateway beat."""
        end = self.now + seconds
        while True:
            self.say(GatewayBeat(gateway="g1"))
            self.say(beat_of("w1", forms=("leased",), capacity=50_000, context_tokens_max=4_000))
            if self.now >= end:
                return
            self.after(min(0.5, end - self.now))

    def serve(self, count: int, output: int) -> float:
        """So many at once, with so long an output; how long they took."""
        names = [f"r{self.sent + number}" for number in range(count)]
        self.sent += count
        said = [c for name in names for c in self.say(submit(name, max_tokens=output))]
        orders = [order for run in said if isinstance(run, RunSlice) for order in run.orders]
        assert len(orders) == count
        began, token_s = self.now, 0.001 + BESIDE_S * (count - 1)
        self.pass_s(FIRST_S)
        self._report(orders, 0, 1, ended=False)
        self.pass_s(token_s * (output - 1))
        self._report(orders, 1, output - 1, ended=True)
        assert not self.core.books.requests.open
        return self.now - began

    def _report(self, orders: list[SliceOrder], at: int, count: int, *, ended: bool) -> None:
        results = tuple(
            SliceResult(
                request_id=order.spec.request_id,
                attempt=order.attempt,
                position=at,
                tokens=tokens.pack(range(at, at + count)),
                finish_reason="length" if ended else None,
                resident=not ended,
            )
            for order in orders
        )
        self.say(
            SliceDone(
                epoch=1,
                worker="w1",
                batch_id="",
                form="leased",
                results=results,
                timings=SliceTimings(),
                memory=MEMORY,
            )
        )

    def ask(self, **changes: object) -> Accepted | Rejected:
        self.sent += 1
        answers = self.say(Submit(spec=spec_of(f"r{self.sent}", **changes), told=True))
        return next(c for c in answers if isinstance(c, Accepted | Rejected))


@pytest.fixture
def mesh() -> Mesh:
    """It has served a few alone, and then many at once."""
    mesh = Mesh()
    for _ in range(5):
        mesh.serve(1, 200)
    assert mesh.serve(60, 200) > 3.0
    return mesh


def test_after_a_burst_an_empty_mesh_takes_in_what_it_can_serve_in_time(mesh: Mesh) -> None:
    """Alone it takes 0.2 s; in the burst 3.7."""
    answer = mesh.ask(max_tokens=200, deadline_ms=1_000)
    assert isinstance(answer, Accepted)
    assert answer.finish_s < 0.6


def test_it_still_refuses_what_it_cannot(mesh: Mesh) -> None:
    answer = mesh.ask(max_tokens=200, deadline_ms=100)
    assert isinstance(answer, Rejected)
    assert answer.reason == "deadline"
    assert answer.retry_after_s is None, "there is no queue"


def test_an_output_that_cannot_be_as_long_as_the_others_ends_sooner(mesh: Mesh) -> None:
    assert isinstance(mesh.ask(max_tokens=20, deadline_ms=150), Accepted)


def test_who_comes_beside_many_is_told_of_them(mesh: Mesh) -> None:
    alone_s = mesh.ask(max_tokens=200).finish_s
    for _ in range(59):
        mesh.ask(max_tokens=200)
    told_s = mesh.ask(max_tokens=200).finish_s
    assert told_s is not None
    assert alone_s is not None
    assert told_s == pytest.approx(3.7, rel=0.15)
    assert told_s > 5 * alone_s


def test_a_mesh_that_heard_nothing_for_a_while_lets_one_in_to_find_out() -> None:
    """It was slow for a reason of its own; if all name deadlines, nobody else could tell."""
    mesh = Mesh()
    mesh.core.books.crowding.saw(1.0, 1, 1.0, mesh.now)
    for _ in range(40):
        mesh.core.books.outputs.saw(10, 200)
    mesh.core.books.promises.heard_at = mesh.now
    assert isinstance(mesh.ask(max_tokens=200, deadline_ms=20_000), Rejected)
    mesh.pass_s(UNPROVEN_S)
    tight = mesh.ask(max_tokens=200, deadline_ms=2_000)
    assert isinstance(tight, Rejected), "a hundredth of what is expected"
    answer = mesh.ask(max_tokens=200, deadline_ms=20_000)
    assert isinstance(answer, Accepted)
    assert answer.finish_s > 100, "it is told what is expected all the same"
    assert isinstance(mesh.ask(max_tokens=200, deadline_ms=20_000), Rejected), "one is enough"


def test_nobody_is_let_in_to_find_out_where_there_is_no_worker() -> None:
    bench = Bench("tranche")
    bench.after(10 * UNPROVEN_S)
    bench.say(GatewayBeat(gateway="g1"))
    (answer,) = bench.say(submit("r1", ttft_deadline_ms=5_000))
    assert isinstance(answer, Rejected)
    assert answer.reason == "deadline"


def test_the_latest_reports_count_more_after_a_pause() -> None:
    at_once, later = Crowding(), Crowding()
    for crowding, pause_s in ((at_once, 0.0), (later, 600.0)):
        for number in range(100):
            crowding.saw(1.0, 10, 10.0, float(number))
        crowding.saw(0.01, 10, 0.01, 100.0 + pause_s)
    assert at_once.expected_s(1) == pytest.approx(0.95, rel=0.01)
    assert later.expected_s(1) == pytest.approx(0.001, rel=0.1)


def test_no_company_makes_a_token_free() -> None:
    """A line through two crowds may cross zero; the one through the origin is its bound."""
    crowding = Crowding()
    assert crowding.expected_s(1) is None
    for number in range(1_000):
        running, token_s = ((20, 0.001), (40, 0.04))[number % 2]
        crowding.saw(running * token_s, 1, token_s, float(number))
    expected_s = crowding.expected_s(0)
    assert expected_s is not None
    assert 0 < expected_s < 0.002


def test_first_tokens_are_delayed_by_those_that_came_before() -> None:
    firsts = FirstTokens()
    for number in range(300):
        firsts.saw(10, 10 * (number % 30), number % 30, 0.02 + 0.01 * (number % 30))
    assert firsts.after_s(10, 200, 20) == pytest.approx(0.22, rel=0.1)
    assert firsts.after_s(10, 0, 0) < 0.04


def test_starts_at_once_have_a_margin_of_their_own() -> None:
    promises = Promises()
    for number in range(400):
        request = waiting(number)
        promises.made(request, 0.1, 1.0)
        promises.began(request, 0.3)
    assert promises.safe_s(0.1) >= 0.3
    assert promises.safe_s(2.0) == pytest.approx(2.5), "nobody has waited"
