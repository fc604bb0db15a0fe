"""What is foretold when a burst is over: with as many beside it as run now, not as ran then."""

import pytest

from services.scheduler.core.promises import Promises
from services.scheduler.core.rate import FirstTokens
from services.scheduler.core.refusals import UNPROVEN_S
from services.scheduler.core.settings import Constants
from services.scheduler.core.token_times import TokenTimes
from shared import tokens
from shared.messages import (
    Accepted,
    Cancel,
    GatewayBeat,
    Rejected,
    RunSlice,
    SliceDone,
    SliceOrder,
    SliceResult,
    SliceTimings,
    Stopped,
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
        self.report(orders, 0, 1, ended=False)
        self.pass_s(token_s * (output - 1))
        self.report(orders, 1, output - 1, ended=True)
        assert not self.core.books.requests.open
        return self.now - began

    def report(self, orders: list[SliceOrder], at: int, count: int, *, ended: bool) -> None:
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
        answers = self.say(Submit(spec=spec_of(f"asked-{self.sent}", **changes), told=True))
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


def slow_before(mesh: Mesh) -> None:
    """It was slow for a reason of its own, and heard nothing since: a second for each token."""
    mesh.core.books.token_times.saw(1.0, 1, 1.0, mesh.now)
    for _ in range(40):
        mesh.core.books.outputs.saw(10, 200)
    mesh.core.books.promises.heard_at = mesh.now


def test_a_mesh_that_heard_nothing_for_a_while_lets_one_in_to_find_out() -> None:
    """If all name deadlines, nobody else could tell."""
    mesh = Mesh()
    slow_before(mesh)
    assert isinstance(mesh.ask(max_tokens=200, deadline_ms=20_000), Rejected)
    mesh.pass_s(UNPROVEN_S)
    tight = mesh.ask(max_tokens=200, deadline_ms=2_000)
    assert isinstance(tight, Rejected), "a hundredth of what is expected"
    answer = mesh.ask(max_tokens=200, deadline_ms=20_000)
    assert isinstance(answer, Accepted)
    assert answer.finish_s > 100, "it is told what is expected all the same"
    assert isinstance(mesh.ask(max_tokens=200, deadline_ms=20_000), Rejected), "one is enough"


def test_who_is_let_in_to_find_out_is_enough_even_if_nothing_comes_of_it() -> None:
    mesh = Mesh()
    slow_before(mesh)
    accepted = 0
    for _ in range(40):
        mesh.pass_s(0.5)
        answer = mesh.ask(max_tokens=200, deadline_ms=20_000)
        if isinstance(answer, Accepted):
            accepted += 1
            mesh.say(Cancel(gateway="g1", request_id=answer.request_id))
    assert accepted == 20 / UNPROVEN_S


def test_who_allows_little_is_let_in_after_a_longer_silence() -> None:
    mesh = Mesh()
    slow_before(mesh)
    mesh.pass_s(6 * UNPROVEN_S)
    assert isinstance(mesh.ask(max_tokens=200, deadline_ms=2_000), Accepted)


def test_the_first_that_are_let_in_are_enough_to_know_better() -> None:
    mesh = Mesh()
    for _ in range(5):
        slow_before(mesh)
    for _ in range(4):
        mesh.serve(1, 200)
        mesh.pass_s(UNPROVEN_S)
    answer = mesh.ask(max_tokens=200, deadline_ms=1_000)
    assert isinstance(answer, Accepted)
    assert answer.finish_s < 1.0


def test_who_is_refused_for_the_crowd_may_come_again(mesh: Mesh) -> None:
    """Alone it would be in time: so it helps to wait until some of the crowd have ended."""
    for _ in range(60):
        assert isinstance(mesh.ask(max_tokens=200), Accepted)
    answer = mesh.ask(max_tokens=200, deadline_ms=1_000)
    assert isinstance(answer, Rejected)
    assert answer.retry_after_s is not None
    assert 1.0 < answer.retry_after_s < 3.7
    assert "or 4." in answer.detail, "what is refused is what is said"
    never = mesh.ask(max_tokens=200, deadline_ms=100)
    assert isinstance(never, Rejected)
    assert never.retry_after_s is None


def test_an_idle_worker_is_not_told_the_crowd_of_another(mesh: Mesh) -> None:
    for _ in range(60):
        mesh.ask(max_tokens=200)
    mesh.join("w2", forms=("leased",), capacity=50_000, context_tokens_max=4_000)
    answer = mesh.ask(max_tokens=200, deadline_ms=1_000)
    assert isinstance(answer, Accepted)
    assert answer.finish_s < 0.6


def test_nobody_is_let_in_to_find_out_where_there_is_no_worker() -> None:
    bench = Bench("tranche")
    bench.after(10 * UNPROVEN_S)
    bench.say(GatewayBeat(gateway="g1"))
    (answer,) = bench.say(submit("r1", ttft_deadline_ms=5_000))
    assert isinstance(answer, Rejected)
    assert answer.reason == "deadline"


def test_a_crowd_teaches_nothing_of_one_alone() -> None:
    """However steep the line is: 1 ms, and 4 ms for each that runs beside it."""
    times = TokenTimes()
    assert times.expected_s(1) is None
    for number in range(10):
        times.saw(0.001, 1, 0.001, float(number) / 100)
    for number in range(1_000):
        times.saw(60 * 0.24, 1, 0.24, 1.0 + number / 1_000)
    assert times.expected_s(1) == pytest.approx(0.001, rel=0.01)
    assert times.expected_s(60) == pytest.approx(0.24, rel=0.01)
    assert times.expected_s(30) == pytest.approx(0.12, rel=0.05)
    assert times.expected_s(100) == pytest.approx(0.4, rel=0.02)


def test_a_line_through_two_crowds_never_makes_a_token_free() -> None:
    times = TokenTimes()
    for number in range(100):
        running, token_s = ((20, 0.001), (40, 0.04))[number % 2]
        times.saw(running * token_s, 1, token_s, number / 100)
    alone_s = times.expected_s(1)
    assert alone_s is not None
    assert 0 < alone_s <= 0.001


def test_one_stall_is_no_more_than_a_stall() -> None:
    """The first sample of an engine that compiles, and one after a pause."""
    times = TokenTimes()
    times.saw(10.0, 19, 10.0, 0.0)
    for number in range(10):
        times.saw(0.2, 200, 0.2, 10.0 + number)
    warm_s = times.expected_s(1)
    assert warm_s is not None
    assert warm_s < 0.003
    times.saw(20.0, 200, 20.0, 600.0)
    stalled_s = times.expected_s(1)
    assert stalled_s is not None
    assert stalled_s < 0.02
    times.saw(0.2, 200, 0.2, 660.0)
    better_s = times.expected_s(1)
    assert better_s is not None
    assert better_s < 0.005


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
        promises.made(request, 0.1, 1.0, alone_s=0.02)
        promises.began(request, 0.3)
    assert promises.safe_s(0.1, 0.02) >= 0.3
    assert promises.safe_s(0.02, 0.02) == 0.02, "nobody is beside it"
    assert promises.safe_s(2.0) == pytest.approx(2.5), "nobody has waited"
    starts_s = [number / 100 for number in range(1, 100)]
    assert sorted(starts_s, key=promises.safe_s) == starts_s, "a later start is never safer"


def test_tokens_have_a_margin_too() -> None:
    promises = Promises()
    promises.timed(None, 1.0)
    for number in range(400):
        promises.timed(0.010, 0.018 if number % 5 == 0 else 0.010)
    assert 0.017 <= promises.safe_token_s(0.010) <= 0.020
    for _ in range(400):
        promises.timed(0.010, 0.010)
    assert promises.safe_token_s(0.010) == pytest.approx(0.011)


def test_who_stood_still_tells_nothing_of_tokens(mesh: Mesh) -> None:
    """Its lease is used up, and the next comes late: that is not how long its tokens take."""
    before_s = mesh.core.books.token_times.expected_s(1)
    said = mesh.say(submit("long", max_tokens=3_000))
    (order,) = [o for run in said if isinstance(run, RunSlice) for o in run.orders]
    mesh.pass_s(FIRST_S)
    mesh.report([order], 0, 1, ended=False)
    mesh.pass_s(0.001 * (order.lease_tokens - 1))
    mesh.report([order], 1, order.lease_tokens - 1, ended=False)
    assert mesh.core.books.requests.open["long"].stood
    mesh.pass_s(2.0)
    mesh.report([order], order.lease_tokens, 10, ended=False)
    assert mesh.core.books.token_times.expected_s(1) == pytest.approx(before_s, rel=0.05)


def test_who_is_given_up_tells_how_slow_it_was(mesh: Mesh) -> None:
    """A lease is longer than what it made until its time was over: no report had told."""
    for name in ("given-up", "stopped"):
        said = mesh.say(submit(name, max_tokens=500))
        (order,) = [o for run in said if isinstance(run, RunSlice) for o in run.orders]
        mesh.pass_s(FIRST_S)
        mesh.report([order], 0, 1, ended=False)
        mesh.pass_s(1.0)
        before_s = mesh.core.books.token_times.expected_s(1)
        assert before_s is not None
        if name == "stopped":
            mesh.say(Stopped(gateway="g1", request_id=name, output_tokens=101))
        else:
            mesh.say(Cancel(gateway="g1", request_id=name, output_tokens=101))
        after_s = mesh.core.books.token_times.expected_s(1)
        assert after_s is not None
        assert after_s > 1.1 * before_s, "10 ms for each"


def test_an_engine_whose_places_are_taken_has_no_room() -> None:
    """Memory is ample, but it runs four at once: who comes waits until one of them ends."""
    bench = Bench("tranche")
    changes = {"forms": ("leased",), "capacity": 50_000, "context_tokens_max": 4_000}
    bench.say(beat_of("w1", batch_size_max=4, **changes))
    for number in range(5):
        bench.say(submit(f"r{number}", max_tokens=200))
    books = bench.core.books
    assert (books.board.running, len(books.waits)) == (4, 1)
    assert books.board.hindrance(100, 10, float("inf"), float("inf"), bench.now) == "places"
    (told,) = [
        c for c in bench.say(Submit(spec=spec_of("new"), told=True)) if isinstance(c, Accepted)
    ]
    assert told.start_s is not None
    assert told.start_s > 1.0, "not as fast as prefill goes, but as fast as those that run end"
