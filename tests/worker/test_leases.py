"""The worker's core and leases: credit, reports of progress, parking, takeover, draining."""

import random
from collections.abc import Sequence

import pytest
from msgspec.structs import replace as changed

from services.worker.core import leases
from services.worker.core.events import (
    BatchRefused,
    CancelRequest,
    Command,
    EngineStepped,
    GiveBack,
    Leave,
    ParkLease,
    RenewLease,
    StartBatch,
    StopWanted,
    TokensSent,
)
from services.worker.engines.api import LeaseEnd, StepReport, StepTokens
from shared.messages import (
    DrainWorker,
    Drop,
    FinishAck,
    FinishReason,
    Park,
    Renewal,
    Resident,
    RunSlice,
    SchedulerBeat,
    SendTokens,
    SliceDone,
    SliceOrder,
    SliceResult,
    SliceTimings,
    WorkerBeat,
)
from shared.tokens import unpack
from tests.worker.core_bench import LEASED_ENGINE, MEMORY, Bench, kinds, only, runs_of
from tests.worker.orders import make_order, make_spec

TIMINGS = SliceTimings(prefill_s=0.5, decode_s=0.25, iterations=1, batch_size=2)


@pytest.fixture
def bench() -> Bench:
    """A worker whose engine runs leases."""
    return Bench(LEASED_ENGINE)


def lease(
    *orders: SliceOrder,
    batch_id: str = "b1",
    renewals: Sequence[tuple[str, int, int]] = (),
    margin: int = 2,
    epoch: int = 0,
) -> RunSlice:
    """A scheduler's order: new leases, and renewals as (request, attempt, until)."""
    return RunSlice(
        epoch=epoch,
        worker="worker-1",
        batch_id=batch_id,
        form="leased",
        orders=orders,
        renewals=tuple(Renewal(request_id=r, attempt=a, until=u) for r, a, u in renewals),
        margin_tokens=margin,
    )


def renewing(*renewals: tuple[str, int, int], epoch: int = 0) -> RunSlice:
    """Renewals only."""
    return lease(batch_id="", renewals=renewals, epoch=epoch)


def park(request_id: str, attempt: int = 1) -> Park:
    return Park(epoch=0, worker="worker-1", request_id=request_id, attempt=attempt)


def step(
    *tokens: tuple[str, int, Sequence[int]],
    finish: FinishReason | None = None,
    left: Sequence[LeaseEnd] = (),
    attempt: int = 1,
) -> EngineStepped:
    """One iteration: (request, position, ids) of each; `finish` ends the last one."""
    made = [StepTokens(r, attempt, p, tuple(ids)) for r, p, ids in tokens]
    if finish is not None:
        last = made.pop()
        made.append(StepTokens(last.request_id, attempt, last.position, last.ids, finish))
    report = StepReport(
        tokens=tuple(made), left=tuple(left), prefill_s=0.5, decode_s=0.25, batch_size=2
    )
    return EngineStepped(report, MEMORY)


def reports(commands: Sequence[Command]) -> list[SliceResult]:
    """What the scheduler is told, which must be one message at most."""
    told = only(SliceDone, commands)
    assert len(told) <= 1
    assert all((done.form, done.refused) == ("leased", "") for done in told)
    return [result for done in told for result in done.results]


def brief(commands: Sequence[Command]) -> list[tuple[str, int, list[int], bool]]:
    """The reports in short: request, position, tokens, whether it goes on."""
    return [
        (r.request_id, r.position, list(unpack(r.tokens)), r.resident) for r in reports(commands)
    ]


def given(bench: Bench, request_id: str = "a", lease_tokens: int = 8, made: int = 0) -> SliceOrder:
    """A lease that the worker has taken."""
    order = make_order(make_spec(request_id, max_tokens=40), lease_tokens, [9] * made)
    batch = lease(order, batch_id=f"batch of {request_id}")
    assert bench.do(batch) == [StartBatch(batch)]
    return order


def make(bench: Bench, first: int, last: int, request_id: str = "a") -> list[list[Command]]:
    """One iteration a token; tokens are their own positions."""
    return [bench.do(step((request_id, p, [p]))) for p in range(first, last)]


def test_progress_is_told_with_the_first_token_near_the_end_and_at_the_end(bench: Bench) -> None:
    given(bench, lease_tokens=6)
    told = [brief(commands) for commands in make(bench, 0, 6)]
    assert told == [
        [("a", 0, [0], True)],
        [],
        [],
        [("a", 1, [1, 2, 3], True)],
        [],
        [("a", 4, [4, 5], True)],
    ]


def test_the_timings_are_those_of_all_iterations_since_the_last_word(bench: Bench) -> None:
    given(bench, lease_tokens=6)
    (first,) = only(SliceDone, bench.do(step(("a", 0, [0]))))
    assert (first.batch_id, first.timings, first.memory) == ("", TIMINGS, MEMORY)
    bench.do(step(("a", 1, [1])))
    bench.do(step(("a", 2, [2])))
    (second,) = only(SliceDone, bench.do(step(("a", 3, [3]))))
    assert second.timings == changed(TIMINGS, prefill_s=1.5, decode_s=0.75, iterations=3)


def test_an_engines_own_timings_win(bench: Bench) -> None:
    given(bench)
    own = SliceTimings(prefill_s=3.0, input_tokens_max=3, batch_size=1)
    report = StepReport(tokens=(StepTokens("a", 1, 0, (0,)),), prefill_s=9.0, timings=own)
    assert only(SliceDone, bench.do(EngineStepped(report)))[0].timings == own


def test_a_renewal_goes_to_the_engine_and_begins_a_new_margin(bench: Bench) -> None:
    given(bench, lease_tokens=4)
    make(bench, 0, 2)
    assert bench.do(renewing(("a", 1, 8))) == [RenewLease("a", 1, 8)]
    told = [brief(commands) for commands in make(bench, 2, 8)]
    assert told == [[], [], [], [("a", 2, [2, 3, 4, 5], True)], [], [("a", 6, [6, 7], True)]]


@pytest.mark.parametrize(
    "renewal", [("a", 1, 8), ("a", 1, 3), ("a", 2, 99), ("a", 0, 99), ("unknown", 1, 99)]
)
def test_renewals_are_only_ever_longer_and_of_this_attempt(
    bench: Bench, renewal: tuple[str, int, int]
) -> None:
    given(bench, lease_tokens=8)
    assert bench.do(renewing(renewal)) == []


def test_no_lease_reaches_beyond_the_token_limit(bench: Bench) -> None:
    given(bench, lease_tokens=8)
    assert bench.do(renewing(("a", 1, 1_000))) == [RenewLease("a", 1, 40)]
    assert bench.do(renewing(("a", 1, 2_000))) == []


def test_a_repeated_order_renews_but_does_not_start_again(bench: Bench) -> None:
    given(bench, "a", 4)
    order = lease(make_order(make_spec("b")), batch_id="b2", renewals=[("a", 1, 6)])
    assert bench.do(order) == [
        RenewLease("a", 1, 6),
        StartBatch(changed(order, renewals=())),
    ]
    assert bench.do(order) == []
    assert bench.do(changed(order, renewals=renewing(("a", 1, 9)).renewals)) == [
        RenewLease("a", 1, 9)
    ]


def test_a_placement_under_a_forgotten_batch_id_is_still_the_same(bench: Bench) -> None:
    order = given(bench)
    assert bench.do(lease(order, batch_id="again")) == []


def test_a_refused_order_does_not_spoil_its_renewals(bench: Bench) -> None:
    given(bench, "a", 4)
    order = changed(make_order(changed(make_spec("b"), prompt=b"")), resident=True)
    commands = bench.do(lease(order, batch_id="b2", renewals=[("a", 1, 9)]))
    assert commands[0] == RenewLease("a", 1, 9)
    (done,) = only(SliceDone, commands)
    assert (done.batch_id, done.refused, done.results) == ("b2", "unknown request", ())


def test_a_used_up_lease_waits_and_goes_on(bench: Bench) -> None:
    given(bench, lease_tokens=2)
    make(bench, 0, 2)
    (beat,) = only(WorkerBeat, bench.do(SchedulerBeat(epoch=0), after_s=1.0))
    assert not beat.residents_listed
    assert bench.do(renewing(("a", 1, 4))) == [RenewLease("a", 1, 4)]
    assert brief(make(bench, 2, 3)[0]) == [("a", 2, [2], True)], "within the margin at once"


def test_all_reports_of_an_iteration_travel_in_one_message(bench: Bench) -> None:
    given(bench, "a", 20)
    given(bench, "b", 20)
    given(bench, "c", 20)
    commands = bench.do(step(("a", 0, [1]), ("b", 0, [2]), ("c", 0, [3]), finish="stop"))
    assert brief(commands) == [
        ("a", 0, [1], True),
        ("b", 0, [2], True),
        ("c", 0, [3], False),
    ]
    assert reports(commands)[2].finish_reason == "stop"
    assert brief(bench.do(step(("a", 1, [4]), ("b", 1, [5])))) == []


def test_an_end_is_told_once_and_its_tokens_are_kept(bench: Bench) -> None:
    given(bench, lease_tokens=20)
    make(bench, 0, 3)
    commands = bench.do(step(("a", 3, [3]), finish="stop"))
    (end,) = reports(commands)
    assert (end.position, list(unpack(end.tokens)), end.finish_reason, end.resident) == (
        1,
        [1, 2, 3],
        "stop",
        False,
    )
    bench.do(TokensSent("gateway-1"))
    bench.do(TokensSent("gateway-1"))
    wish = SendTokens(epoch=0, worker="worker-1", request_id="a", attempt=1, position=1)
    assert runs_of(bench.do(wish)) == [("a", 1, [1, 2, 3], "stop")]
    bench.do(FinishAck(gateway="gateway-1", worker="worker-1", request_ids=("a",)))
    assert only(SliceDone, bench.do(wish))[0].refused == "unknown request"


def test_parking_ends_a_lease_and_tells_its_tokens(bench: Bench) -> None:
    given(bench, lease_tokens=20)
    make(bench, 0, 2)
    assert bench.do(park("a")) == [ParkLease("a", 1)]
    assert bench.do(park("a")) == [], "said once"
    assert bench.do(renewing(("a", 1, 30))) == [], "too late"
    commands = bench.do(step(("a", 2, [2]), left=[LeaseEnd("a", 1)]))
    assert brief(commands) == [("a", 1, [1, 2], False)]
    assert (reports(commands)[0].finish_reason, reports(commands)[0].evicted) == (None, False)
    again = lease(make_order(make_spec("a"), 4, [0, 1, 2], attempt=2), batch_id="again")
    assert kinds(bench.do(again)) == ["StartBatch"]


@pytest.mark.parametrize("order", [park("b"), park("a", 2), park("a", 0)])
def test_parking_what_is_not_here_is_nothing(bench: Bench, order: Park) -> None:
    given(bench)
    assert bench.do(order) == []


def test_a_request_that_ends_while_it_is_to_be_parked_ends(bench: Bench) -> None:
    given(bench)
    bench.do(park("a"))
    (end,) = reports(bench.do(step(("a", 0, [7]), finish="length")))
    assert (end.finish_reason, end.resident) == ("length", False)
    assert bench.do(park("a")) == []


def test_what_the_engine_evicts_keeps_its_tokens(bench: Bench) -> None:
    given(bench, "a", 20)
    given(bench, "b", 20)
    bench.do(step(("a", 0, [1]), ("b", 0, [2])))
    failure = [LeaseEnd(name, 1, evicted=True, detail="the model failed") for name in "ab"]
    told = reports(bench.do(step(left=failure)))
    assert [(r.request_id, r.position, r.evicted, r.resident, r.detail) for r in told] == [
        ("a", 1, True, False, "the model failed"),
        ("b", 1, True, False, "the model failed"),
    ]
    assert brief(bench.do(step(("a", 1, [3])))) == [], "it is gone"


def test_a_dropped_lease_says_nothing_more(bench: Bench) -> None:
    given(bench)
    make(bench, 0, 2)
    drop = Drop(epoch=0, worker="worker-1", request_id="a", attempt=1)
    assert bench.do(drop) == [CancelRequest("a", 1)]
    assert bench.do(step(("a", 2, [2]), finish="stop")) == []
    assert bench.do(step(left=[LeaseEnd("a", 1)])) == []


def test_a_newer_attempt_replaces_the_lease(bench: Bench) -> None:
    given(bench)
    order = lease(make_order(make_spec("a"), attempt=2), batch_id="b2")
    assert bench.do(order) == [CancelRequest("a", 1), StartBatch(order)]
    assert bench.do(step(("a", 0, [5]))) == [], "tokens of the older attempt"
    assert brief(bench.do(step(("a", 0, [6]), attempt=2))) == [("a", 0, [6], True)]


def test_impossible_requests_are_told_at_once_and_others_run(bench: Bench) -> None:
    bad, good = make_order(make_spec("bad", prompt=[])), make_order(make_spec("good"))
    order = lease(bad, good)
    commands = bench.do(order)
    assert only(StartBatch, commands) == [StartBatch(changed(order, orders=(good,)))]
    (done,) = only(SliceDone, commands)
    assert (done.batch_id, [r.finish_reason for r in done.results]) == ("b1", ["error"])


def test_a_lease_of_nothing_is_used_up_at_once(bench: Bench) -> None:
    commands = bench.do(lease(make_order(make_spec("a"), 0)))
    assert kinds(commands) == ["StartBatch", "SliceDone"]
    assert [r.resident for r in only(SliceDone, commands)[0].results] == [True]


def test_what_the_engine_refuses_goes_back(bench: Bench) -> None:
    order = lease(make_order(make_spec("a")))
    bench.do(order)
    (done,) = bench.do(BatchRefused(order, "out of memory: too much", MEMORY))
    assert isinstance(done, SliceDone)
    assert (done.batch_id, done.refused, done.form) == ("b1", "out of memory: too much", "leased")
    assert brief(bench.do(step(("a", 0, [1])))) == []


@pytest.mark.parametrize("evicts", [False, True])
def test_who_has_no_memory_for_a_promise_lists_what_is_here(bench: Bench, evicts: bool) -> None:
    """Storm seed 568: a lease whose `Drop` was lost kept its memory until the next listing, ten
    seconds later, while another request was refused nine times and given up."""
    given(bench)
    order = lease(make_order(make_spec("b")), batch_id="b2")
    bench.do(order)
    bench.wake()
    if evicts:
        bench.do(step(left=[LeaseEnd("b", 1, evicted=True)]))
    else:
        bench.do(BatchRefused(order, "out of memory: too much", MEMORY))
    (beat,) = only(WorkerBeat, bench.wake())
    assert beat.residents_listed
    assert [resident.request_id for resident in beat.residents] == ["a"]
    (next_beat,) = only(WorkerBeat, bench.wake())
    assert not next_beat.residents_listed


def test_the_number_of_leases_is_bounded(bench: Bench) -> None:
    orders = [make_order(make_spec(f"r{n}")) for n in range(leases.LEASES_MAX)]
    assert kinds(bench.do(lease(*orders))) == ["StartBatch"]
    (done,) = bench.do(lease(make_order(make_spec("one more")), batch_id="b2"))
    assert isinstance(done, SliceDone)
    assert done.refused == "queue full"


# ------------------------------------------------------------------------------- takeover


def test_a_new_leader_is_told_the_leases_and_goes_on_with_a_renewal(bench: Bench) -> None:
    given(bench, "a", 2, made=3)
    given(bench, "b", 30)
    bench.do(step(("a", 3, [13]), ("b", 0, [20])))
    bench.do(step(("a", 4, [14]), ("b", 1, [21])))
    commands = bench.do(SchedulerBeat(epoch=7))
    (beat,) = only(WorkerBeat, commands)
    assert beat.residents == (
        Resident(request_id="a", attempt=1, position=5, until=5),
        Resident(request_id="b", attempt=1, position=2, until=30),
    )
    assert only(SliceDone, commands) == [], "a used-up lease waits"
    assert bench.do(renewing(("a", 1, 20), epoch=6)) == [], "of the deposed leader"
    assert bench.do(renewing(("a", 1, 20), ("b", 1, 40), epoch=7)) == [
        RenewLease("a", 1, 20),
        RenewLease("b", 1, 40),
    ]
    told = reports(bench.do(step(("a", 5, [15]), ("b", 2, [22]), finish="stop")))
    assert [(r.request_id, r.position, list(unpack(r.tokens))) for r in told] == [
        ("b", 0, [20, 21, 22])
    ], "the new leader has heard nothing before"
    for position in range(6, 18):
        told = reports(bench.do(step(("a", position, [position]))))
    assert (told[0].position, list(unpack(told[0].tokens))[:3]) == (3, [13, 14, 15])


def test_reports_are_whole_until_a_new_leader_has_renewed(bench: Bench) -> None:
    """It does not listen while it collects, and may have missed any of them."""
    given(bench, "a", 4)
    make(bench, 0, 2)
    bench.do(SchedulerBeat(epoch=7))
    make(bench, 2, 3)
    assert brief(make(bench, 3, 4)[0]) == [("a", 0, [0, 1, 2, 3], True)]
    assert bench.do(renewing(("a", 1, 6), epoch=7)) == [RenewLease("a", 1, 6)]
    assert brief(make(bench, 4, 5)[0]) == [("a", 0, [0, 1, 2, 3, 4], True)]
    assert brief(make(bench, 5, 6)[0]) == [("a", 5, [5], True)]


def test_a_renewal_that_is_not_longer_is_a_new_leaders_word_too(bench: Bench) -> None:
    given(bench, "a", 10)
    make(bench, 0, 2)
    bench.do(SchedulerBeat(epoch=7))
    assert bench.do(renewing(("a", 1, 4), epoch=7)) == []
    told = [brief(commands) for commands in make(bench, 2, 10)]
    assert told[5:] == [[("a", 0, [0, 1, 2, 3, 4, 5, 6, 7], True)], [], [("a", 8, [8, 9], True)]]


def test_parking_by_a_new_leader_tells_everything(bench: Bench) -> None:
    given(bench, "a", 30)
    make(bench, 0, 4)
    bench.do(SchedulerBeat(epoch=7))
    bench.do(changed(park("a"), epoch=7))
    assert brief(bench.do(step(left=[LeaseEnd("a", 1)]))) == [("a", 0, [0, 1, 2, 3], False)]


# ------------------------------------------------------------------------------- draining


@pytest.mark.parametrize("trigger", [StopWanted(), DrainWorker(epoch=0, worker="worker-1")])
def test_draining_parks_leases_at_their_ends(bench: Bench, trigger: object) -> None:
    given(bench, "paused", 1)
    given(bench, "runs", 4)
    bench.do(step(("paused", 0, [1]), ("runs", 0, [2])))
    commands = bench.do(trigger)
    assert commands[:2] == [GiveBack("draining"), ParkLease("paused", 1)]
    assert brief(bench.do(step(left=[LeaseEnd("paused", 1)]))) == [("paused", 1, [], False)]
    assert bench.do(renewing(("runs", 1, 30))) == [], "it ends where it would have ended"
    late = bench.do(lease(make_order(make_spec("late")), batch_id="late"))
    assert only(SliceDone, late)[0].refused == "draining"
    assert brief(bench.do(step(("runs", 1, [3])))) == [("runs", 1, [3], True)], "the margin"
    bench.do(step(("runs", 2, [4])))
    commands = bench.do(step(("runs", 3, [5])))
    assert ParkLease("runs", 1) in commands
    assert brief(commands) == [], "its end is told when it is parked"
    (end,) = reports(bench.do(step(left=[LeaseEnd("runs", 1)])))
    assert (end.position, list(unpack(end.tokens)), end.resident) == (2, [4, 5], False)
    assert left_after(bench)


def left_after(bench: Bench) -> bool:
    """The worker leaves once its tokens are sent."""
    for _ in range(100):
        if bench.core.deadline() is None:
            return True
        if any(isinstance(c, Leave) for c in bench.wake()):
            return True
        bench.do(TokensSent("gateway-1"))
    return False


# ----------------------------------------------------------------------------- any order


@pytest.mark.parametrize("seed", range(25))
def test_reports_join_to_the_text_in_any_order_of_events(seed: int) -> None:
    """Whatever comes when: a request's reports follow each other without a gap, end once, and no
    token is made beyond the credit that the engine was told."""
    rng = random.Random(seed)
    bench = Bench(LEASED_ENGINE)
    credit: dict[tuple[str, int], int] = {}
    made: dict[tuple[str, int], int] = {}
    parking: set[tuple[str, int]] = set()
    heard: dict[tuple[str, int], int] = {}
    ended: set[tuple[str, int]] = set()
    attempts = {f"r{n}": 0 for n in range(5)}

    def note(commands: list[Command]) -> None:
        for command in commands:
            match command:
                case StartBatch():
                    for order in command.order.orders:
                        key = (order.spec.request_id, order.attempt)
                        credit[key], made[key], heard[key] = order.lease_tokens, 0, 0
                case RenewLease():
                    key = (command.request_id, command.attempt)
                    if key in made:
                        assert command.until > credit[key]
                        credit[key] = command.until
                case ParkLease():
                    parking.add((command.request_id, command.attempt))
                case CancelRequest():
                    for key in [k for k in made if k[0] == command.request_id]:
                        if key[1] <= command.attempt:
                            made.pop(key)
                            ended.add(key)
                case SliceDone():
                    for told in command.results:
                        key = (told.request_id, told.attempt)
                        assert key not in ended, "a word after the end"
                        assert told.position == heard[key]
                        ids = list(unpack(told.tokens))
                        assert ids == list(range(told.position, told.position + len(ids)))
                        heard[key] += len(ids)
                        if not told.resident:
                            ended.add(key)

    def iterate() -> None:
        tokens, left = [], []
        for key in sorted(made):
            name, attempt = key
            if key in parking:
                left.append(LeaseEnd(name, attempt))
            elif made[key] < credit[key] and rng.random() < 0.8:
                finish: FinishReason | None = "stop" if rng.random() < 0.05 else None
                tokens.append(StepTokens(name, attempt, made[key], (made[key],), finish))
                made[key] += 1
                if finish:
                    made.pop(key)
        for end in left:
            made.pop((end.request_id, end.attempt))
        note(bench.do(EngineStepped(StepReport(tokens=tuple(tokens), left=tuple(left)))))

    for number in range(300):
        bench.now += rng.choice([0.0, 0.001, 0.01])
        name = rng.choice(sorted(attempts))
        action = rng.random()
        if action < 0.1:
            attempts[name] += 1
            order = make_order(
                make_spec(name, max_tokens=60), rng.randrange(1, 6), attempt=attempts[name]
            )
            note(bench.do(lease(order, batch_id=f"b{number}")))
        elif action < 0.25:
            until = rng.randrange(1, 60)
            note(bench.do(renewing((name, attempts[name], until))))
        elif action < 0.3:
            note(bench.do(park(name, attempts[name])))
        elif action < 0.33:
            drop = Drop(epoch=0, worker="worker-1", request_id=name, attempt=attempts[name])
            note(bench.do(drop))
        else:
            iterate()
    assert ended


def test_a_lease_that_nobody_renews_gives_its_memory_back(bench: Bench) -> None:
    given(bench, lease_tokens=2)
    make(bench, 0, 2)
    beats = round(leases.UNRENEWED_S / 0.5)
    assert [c for _ in range(beats) for c in only(ParkLease, bench.wake())] == []
    late = [c for _ in range(3) for c in only(ParkLease, bench.wake())]
    assert late == [ParkLease("a", 1)], "once"
    left = (LeaseEnd("a", 1),)
    assert brief(bench.do(step(left=left))) == [("a", 2, [], False)]


def test_a_renewal_keeps_a_paused_lease_from_being_forgotten(bench: Bench) -> None:
    given(bench, lease_tokens=2)
    make(bench, 0, 2)
    beats = round(leases.UNRENEWED_S / 0.5)
    for _ in range(beats - 2):
        bench.wake()
    bench.do(renewing(("a", 1, 6)))
    make(bench, 2, 3)
    assert [c for _ in range(10) for c in only(ParkLease, bench.wake())] == []


def test_residents_are_listed_every_ten_seconds(bench: Bench) -> None:
    given(bench, lease_tokens=8)
    beats = [beat for _ in range(42) for beat in only(WorkerBeat, bench.wake())]
    listed = [beat.residents for beat in beats if beat.residents_listed]
    resident = Resident(request_id="a", attempt=1, position=0, until=8)
    assert listed == [(resident,)] * 2
