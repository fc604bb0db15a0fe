"""A slow reader's request pauses at its next lease, gives its memory to others, and goes on."""

from shared import tokens
from shared.messages import (
    GatewayBeat,
    Park,
    Reading,
    Renewal,
    Resume,
    RunSlice,
    SchedulerCommand,
    SliceDone,
    SliceResult,
    SliceTimings,
    TokensWanted,
    WorkerMemory,
)
from tests.core.seam import LIVE, Bench, beat_of, done, new, spec_of, submit

CAPACITY = 400


class One:
    """One request with a first lease of 16 on one worker, whose memory is ample."""

    def __init__(self) -> None:
        self.bench = Bench("past-future", LIVE)
        self.beat()
        said = self.bench.say(submit("r1", max_tokens=200)) + self.bench.after(0.01)
        self.order = next(c.orders[0] for c in said if isinstance(c, RunSlice) and c.orders)
        self.made = 0

    def beat(self) -> None:
        self.bench.say(beat_of("w1", forms=("leased",), capacity=CAPACITY))

    def reach(self, position: int, *, resident: bool = True) -> list[SchedulerCommand]:
        """The worker reports that it has come so far; not resident: that it was parked."""
        start, self.made = self.made, position
        result = SliceResult(
            request_id="r1",
            attempt=self.order.attempt,
            position=start,
            tokens=tokens.pack(range(start, position)),
            resident=resident,
        )
        report = SliceDone(
            epoch=1,
            worker="w1",
            batch_id="",
            form="leased",
            results=(result,),
            timings=SliceTimings(),
            memory=WorkerMemory(kv_tokens_capacity=CAPACITY),
        )
        return self.bench.say(report)

    def reading(self, turn: int, *, paused: bool) -> list[SchedulerCommand]:
        word = Reading(gateway="g1", request_id="r1", turn=turn, paused=paused)
        return self.bench.say(word)

    def wait(self, seconds: float) -> list[SchedulerCommand]:
        """The worker and the gateway live meanwhile."""
        said = []
        for _ in range(round(2 * seconds)):
            self.beat()
            self.bench.say(GatewayBeat(gateway="g1"))
            said += self.bench.after(0.5)
        return said


def renewals(said: list[SchedulerCommand]) -> list[Renewal]:
    return [r for command in said if isinstance(command, RunSlice) for r in command.renewals]


def test_no_lease_is_renewed_while_its_client_is_behind() -> None:
    one = One()
    assert one.reading(1, paused=True) == []
    assert renewals(one.reach(16)) == []
    assert renewals(one.wait(1.0)) == []
    assert [r.until for r in renewals(one.reading(2, paused=False))] == [32]


def test_a_reader_that_caught_up_before_the_end_of_its_lease_is_not_stopped() -> None:
    one = One()
    one.reading(1, paused=True)
    assert renewals(one.reach(8)) == []
    assert renewals(one.reading(2, paused=False)) == [], "much is left of its lease"
    assert [r.until for r in renewals(one.reach(12))] == [32]


def test_its_memory_goes_to_others_and_it_goes_on_from_its_tokens() -> None:
    one = One()
    one.reading(1, paused=True)
    one.reach(16)
    books = one.bench.core.books
    said = one.wait(4.0)
    assert said
    assert {type(command) for command in said} == {Park}
    assert one.reach(16, resident=False) == []
    assert books.workers.active["w1"].credit.blocks == 0
    assert (books.evictions, len(books.lines.central), len(books.waits)) == (0, 0, 0)
    assert one.wait(3.0) == [], "it stands in no line"
    (run,) = one.reading(2, paused=False)
    assert isinstance(run, RunSlice)
    assert tokens.count(run.orders[0].tokens) == 16
    assert run.orders[0].attempt > one.order.attempt


def test_a_waiting_request_leaves_its_line_and_comes_back() -> None:
    bench = Bench("past-future", LIVE)
    bench.say(submit("r1"))
    bench.say(Reading(gateway="g1", request_id="r1", turn=1, paused=True))
    assert [c for c in bench.join(forms=("leased",)) if isinstance(c, RunSlice)] == []
    said = bench.say(Reading(gateway="g1", request_id="r1", turn=2, paused=False))
    said += bench.after(0.01)
    assert [type(command) for command in said] == [RunSlice]


def test_closed_batches_leave_a_slow_reader_out() -> None:
    bench = Bench()
    bench.join()
    run = bench.run_one()
    bench.say(Reading(gateway="g1", request_id="r1", turn=1, paused=True))
    assert bench.say(done(run)) == []
    assert [c for c in bench.after(1.0) if isinstance(c, RunSlice)] == []
    said = bench.say(Reading(gateway="g1", request_id="r1", turn=2, paused=False))
    said += bench.after(0.3)
    (again,) = [command for command in said if isinstance(command, RunSlice)]
    assert tokens.count(again.orders[0].tokens) == tokens.count(new(run.orders[0]))


def test_late_and_repeated_words_change_nothing() -> None:
    one = One()
    one.reading(2, paused=False)
    one.reading(1, paused=True)
    assert [r.until for r in renewals(one.reach(12))] == [32]
    assert one.bench.say(Reading(gateway="g2", request_id="r1", turn=9, paused=True)) == []
    assert one.bench.say(Reading(gateway="g1", request_id="r9", turn=9, paused=True)) == []
    assert [r.until for r in renewals(one.reach(28))] == [48]


def test_a_lost_word_is_made_up_for_by_the_next_question() -> None:
    one = One()
    one.reading(1, paused=True)
    one.reach(16)
    wanted = TokensWanted(gateway="g1", request_id="r1", attempt=1, position=16)
    assert [r.until for r in renewals(one.bench.say(wanted))] == [32]


def test_a_new_leader_hears_of_it_with_the_tokens() -> None:
    bench = Bench("past-future", LIVE, epoch=2)
    bench.join(forms=("leased",))
    bench.say(Resume(spec=spec_of(), attempt=1, tokens=tokens.pack([1, 2]), paused=True, turn=3))
    said = bench.after(0.9)
    bench.join(forms=("leased",))
    said += bench.after(0.5)
    said += bench.say(
        Resume(spec=spec_of(), attempt=1_000_001, tokens=tokens.pack([1, 2]), paused=True, turn=3)
    )
    assert [c for c in said if isinstance(c, RunSlice)] == []
    (run,) = bench.say(Reading(gateway="g1", request_id="r1", turn=4, paused=False))
    assert isinstance(run, RunSlice)
