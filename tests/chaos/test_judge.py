"""The judge sees what is lost, doubled, different or late, and nothing else."""

from collections.abc import Sequence
from pathlib import Path

import msgspec
import pytest

from bench.chaos.clients import Outcome, Stream
from bench.chaos.judge import (
    LEADER_KILLED_S,
    LEADER_SILENT_S,
    Done,
    Verdict,
    judge,
    recoveries,
)
from bench.chaos.questions import Answer, Ask, Question
from bench.chaos.report import late
from bench.chaos.run import bad_lines
from bench.chaos.schedule import Fault

IDS = tuple(range(10, 40))
QUESTION = Question(key="q", endpoint="completions", prompt=(1, 2))
ANSWERS = {"q": (Answer(ids=IDS, ended=True),)}


def decode(ids: Sequence[int]) -> str:
    return "".join(f"<{i}>" for i in ids)


def stream(
    ids: Sequence[int] = IDS[:20],
    *,
    text: str | None = None,
    reason: str | None = "length",
    outcome: Outcome = "complete",
    gateway: int = 1,
    ended_at: float = 30.0,
) -> Stream:
    """A stream of 20 tokens, one a second from 1 s on, unless something is said."""
    ask = Ask(number=5, question="q", max_tokens=20, gateway=gateway, style="plain")
    return Stream(
        ask=ask,
        sent_at=0.0,
        outcome=outcome,
        ended_at=ended_at,
        ids=[list(ids)],
        texts=[decode(ids) if text is None else text],
        reasons=[reason],
        arrivals=[(1.0 + place, 1) for place in range(len(ids))],
    )


def done(
    kind: str, role: str, at: float, *, who: str = "someone", number: int = 0, lasts_s: float = 0.0
) -> Done:
    fault = Fault(number=number, at_s=at, kind=kind, role=role, lasts_s=lasts_s)
    return Done(fault=fault, at=at, until=at + lasts_s, who=who)


def judged(one: Stream, *faults: Done) -> Verdict:
    return judge([one], faults, {"q": QUESTION}, ANSWERS, decode)


def test_the_undisturbed_answer_is_right() -> None:
    verdict = judged(stream())
    assert not verdict.findings
    assert not verdict.unlike
    assert verdict.counts == {"complete": 1}
    assert verdict.tokens == 20


def test_the_models_own_end_is_right_where_the_limit_is_beyond() -> None:
    one = stream(IDS, reason="stop")
    one.ask = msgspec.structs.replace(one.ask, max_tokens=35)
    assert not judged(one).findings


@pytest.mark.parametrize(
    ("ids", "why"),
    [
        (IDS[:19], "lost at the end"),
        ((*IDS[:5], *IDS[6:21]), "lost in the middle"),
        ((*IDS[:5], IDS[4], *IDS[5:19]), "doubled"),
        ((*IDS[:5], 99, *IDS[6:20]), "another token"),
        (IDS[:21], "too many"),
    ],
)
def test_other_tokens_are_seen(ids: tuple[int, ...], why: str) -> None:
    assert judged(stream(ids)).unlike, why


@pytest.mark.parametrize(
    "one",
    [
        stream(reason="stop"),
        stream(reason=None),
        stream(text=decode(IDS[:19])),
        stream(text=decode(IDS[:20]) + "!"),
        stream(IDS[:7], outcome="cut"),
        stream(outcome="stalled"),
        stream(IDS[:7], outcome="error"),
        stream(IDS[:7], outcome="open"),
    ],
)
def test_what_is_wrong_beside_the_tokens_is_a_finding(one: Stream) -> None:
    verdict = judged(one, done("kill", "worker", 3.0, number=4))
    assert len(verdict.findings) == 1
    assert verdict.findings[0].stream == 5
    assert verdict.findings[0].near.startswith("#4 kill worker")


def test_an_aborted_stream_has_a_right_beginning() -> None:
    assert not judged(stream(IDS[:7], outcome="aborted", reason=None)).findings
    assert judged(stream((10, 12), outcome="aborted", reason=None)).unlike


def test_streams_end_with_their_own_gateway_only() -> None:
    killed = done("kill", "gateway-2", 10.0, who="gateway-2")
    own = stream(IDS[:7], outcome="cut", gateway=2, ended_at=10.1, reason=None)
    assert judged(own, killed).counts == {"ended with its gateway (kill)": 1}
    assert not judged(own, killed).findings
    other = stream(IDS[:7], outcome="cut", gateway=1, ended_at=10.1, reason=None)
    assert judged(other, killed).findings
    before = stream(IDS[:7], outcome="cut", gateway=2, ended_at=9.0, reason=None)
    assert judged(before, killed).findings


def test_a_recovery_is_the_longest_pause_from_the_fault_on() -> None:
    quick, slow = stream(), stream()
    slow.arrivals = [(1.0, 5), (5.5, 15)]
    (found,) = recoveries([quick, slow], [done("kill", "leader", 2.25)], slice_s=1.0)
    assert (found.pause_s, found.streams, found.alone) == (3.25, 2, True)
    assert found.bound_s == LEADER_KILLED_S


def test_a_recovery_that_the_next_fault_meets_is_not_alone() -> None:
    one = stream()
    one.arrivals = [(1.0, 5), (5.5, 15)]
    faults = [done("kill", "worker", 2.0), done("cut", "worker", 4.0, number=1)]
    first, second = recoveries([one], faults, slice_s=1.5)
    assert not first.alone
    assert second.alone
    assert (first.bound_s, second.bound_s) == (3.5, 0.0)


def test_who_is_not_under_way_does_not_count() -> None:
    late, slow = stream(), stream()
    late.arrivals = [(9.0, 20)]
    slow.ask = msgspec.structs.replace(slow.ask, style="slow")
    (found,) = recoveries([late, slow], [done("freeze", "leader", 2.0, lasts_s=1.0)], slice_s=1.0)
    assert (found.pause_s, found.streams, found.bound_s) == (0.0, 0, LEADER_SILENT_S)


def test_a_fault_that_befell_nobody_has_no_recovery() -> None:
    assert recoveries([stream()], [done("kill", "worker", 2.0, who="")], slice_s=1.0) == ()


def test_a_late_recovery_is_late_although_the_next_fault_met_it() -> None:
    one = stream()
    one.arrivals = [(1.0, 5), (9.5, 15)]
    faults = [done("kill", "worker", 2.0), done("cut", "worker", 6.0, number=1)]
    first, second = recoveries([one], faults, slice_s=1.0)
    assert first.alone
    assert len(late([first, second])) == 1


def test_nobody_can_take_over_from_the_last_one() -> None:
    fault = done("kill", "leader", 2.0)
    fault.spare = False
    (found,) = recoveries([stream()], [fault], slice_s=1.0)
    assert found.bound_s == 0


def test_what_our_code_says_of_its_own_failures_is_found(tmp_path: Path) -> None:
    (tmp_path / "worker-1.1.log").write_text('{"event": "worker.ready"}\n')
    (tmp_path / "scheduler-1.2.log").write_text('{"event": "scheduler.core_failed"}\n')
    (said,) = bad_lines(tmp_path)
    assert "scheduler-1.2.log" in said


def test_a_pause_that_begins_soon_after_the_fault_is_its_doing() -> None:
    """The lease goes on for a while; what comes much later is something else."""
    soon, much_later = stream(), stream()
    soon.arrivals = [(1.0, 5), (2.5, 5), (8.5, 10)]
    much_later.arrivals = [(0.5 * n, 1) for n in range(1, 20)] + [(20.0, 1)]
    fault = done("freeze", "leader", 2.0)
    (found,) = recoveries([soon], [fault], slice_s=1.0)
    assert found.pause_s == 6.0
    (found,) = recoveries([much_later], [fault], slice_s=1.0)
    assert found.pause_s == 0.5
