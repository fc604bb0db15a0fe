"""Leases when memory runs short: shares of what is free, and nobody parked before his time."""

from shared import tokens
from shared.messages import (
    Cancel,
    Drop,
    Park,
    Renewal,
    RunSlice,
    SchedulerCommand,
    SliceDone,
    SliceResult,
    SliceTimings,
    WorkerMemory,
)
from tests.core.seam import LIVE, Bench, beat_of, submit

CAPACITY = 70
"""Two requests of 10 prompt tokens with first leases of 16 hold 25 each: 20 are left."""


class Pair:
    """Two requests on one worker, each with a first lease."""

    def __init__(self) -> None:
        self.bench = Bench("aggressive", LIVE)
        beat = beat_of("w1", forms=("leased",), capacity=CAPACITY)
        self.bench.say(beat)
        self.attempts: dict[str, int] = {}
        self.made = {"r1": 0, "r2": 0}
        said = self.bench.say(submit("r1")) + self.bench.say(submit("r2"))
        said += self.bench.after(0.01)
        for run in said:
            if isinstance(run, RunSlice):
                self.attempts |= {order.spec.request_id: order.attempt for order in run.orders}
                assert {order.lease_tokens for order in run.orders} == {16}
        assert set(self.attempts) == {"r1", "r2"}

    def reach(self, request_id: str, position: int) -> list[SchedulerCommand]:
        """The worker reports that a request has come so far and goes on, or rests there."""
        start = self.made[request_id]
        self.made[request_id] = position
        result = SliceResult(
            request_id=request_id,
            attempt=self.attempts[request_id],
            position=start,
            tokens=tokens.pack(range(start, position)),
            resident=True,
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


def renewals(said: list[SchedulerCommand]) -> list[Renewal]:
    return [r for command in said if isinstance(command, RunSlice) for r in command.renewals]


def parked(said: list[SchedulerCommand]) -> list[str]:
    return [command.request_id for command in said if isinstance(command, Park)]


def test_a_next_lease_is_at_most_its_share_of_what_is_free() -> None:
    pair = Pair()
    assert [r.until for r in renewals(pair.reach("r1", 12))] == [26]  # half of 20, not 16
    assert [r.until for r in renewals(pair.reach("r2", 12))] == [21]  # half of the 10 left


def test_nobody_is_parked_before_somebody_has_used_up_a_lease() -> None:
    pair = Pair()
    until = {"r1": 16, "r2": 16}
    said: list[SchedulerCommand] = []
    while not parked(said):
        name = min(until, key=lambda request: until[request])
        if pair.made[name] < until[name] - 1:
            said = pair.reach(name, until[name] - 1)
            assert not parked(said)  # it still has a token of its lease
        else:
            said = pair.reach(name, until[name])
        for renewal in renewals(said):
            until[renewal.request_id] = renewal.until
    assert sum(10 + end - 1 for end in until.values()) == CAPACITY  # all of it was given out
    assert parked(said) == ["r2"]  # the last admitted


def test_who_holds_memory_for_a_placement_that_is_over_is_told_again() -> None:
    pair = Pair()
    pair.bench.say(Cancel(gateway="g1", request_id="r1"))
    dropped = Drop(epoch=1, worker="w1", request_id="r1", attempt=pair.attempts["r1"])
    assert [c for c in pair.reach("r1", 5) if isinstance(c, Drop)] == [dropped]
    assert not [c for c in pair.reach("r2", 5) if isinstance(c, Drop)]
