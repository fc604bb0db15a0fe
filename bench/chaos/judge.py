"""The judge: what clients received against what they should have, and how long faults were felt.

Pure: streams and faults in, verdicts out. A stream is right if ids, text and finish reason of each
choice are the undisturbed ones; one whose client went away has a beginning of them. A stream of a
gateway that was killed or told to end is counted apart, by what ended it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from statistics import median

import msgspec

from bench.chaos.clients import Stream
from bench.chaos.questions import Answer, Question, expected
from bench.chaos.schedule import HEARTBEAT_S, Fault

GATEWAY_END_S = 40.0
"""A stream that is cut so long after its gateway was killed, or told to drain, ended with it."""
GATEWAY_NOTICED_S = 0.5
"""A client may still connect to it for so long."""
WORKER_BOUND_S = 2.0
CAUSED_S = 4.0
"""A pause that begins so soon after a fault, or its end, is held to be its doing."""
LEADER_KILLED_S = 3.0
LEADER_SILENT_S = 2 * HEARTBEAT_S + 3.0


class Done(msgspec.Struct, kw_only=True):
    """A fault that was done, and when (monotonic seconds)."""

    fault: Fault
    at: float
    until: float
    who: str
    """The service that it befell; empty: nobody was there in that role."""
    said: str = ""
    spare: bool = True
    """Somebody was well who could take over: the standby, or another worker."""


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """Something that must not be."""

    what: str
    stream: int = -1
    answer_id: str = ""
    near: str = ""
    """The fault before it."""


class Recovery(msgspec.Struct, frozen=True, kw_only=True):
    """How long one fault was felt."""

    kind: str
    role: str
    number: int
    pause_s: float
    """The longest time without a token, from the fault on, of a stream that was under way."""
    streams: int
    """That were under way."""
    alone: bool
    """Nothing else was wrong then, and no other fault came before the last of them went on, or
    within the bound."""
    bound_s: float
    """0: none is set."""


@dataclass(slots=True)
class Verdict:
    """Of all streams of a run."""

    findings: list[Finding] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    tokens: int = 0
    """That were compared."""
    unlike: list[tuple[Stream, int]] = field(default_factory=list)
    """Streams and choices whose ids differ: near ties, or wrong."""


def judge(
    streams: Sequence[Stream],
    faults: Sequence[Done],
    questions: Mapping[str, Question],
    answers: Mapping[str, tuple[Answer, ...]],
    decode: Callable[[Sequence[int]], str],
) -> Verdict:
    """What is right by itself; `unlike` is left for whoever has the model."""
    verdict = Verdict()
    for stream in streams:
        apart = ended_with_gateway(stream, faults)
        verdict.counts[apart or stream.outcome] += 1
        if not apart and stream.outcome not in ("complete", "aborted"):
            what = f"{stream.outcome}: {stream.detail}"
            verdict.findings.append(finding(stream, what, faults))
        _compare(stream, questions[stream.ask.question], answers, faults, decode, verdict)
    return verdict


def ended_with_gateway(stream: Stream, faults: Sequence[Done]) -> str:
    """What ended its gateway, if that is what ended it; empty otherwise."""
    if stream.outcome not in ("cut", "error") or stream.ask.gateway == 1:
        return ""
    for done in faults:
        ends = done.fault.kind in ("kill", "terminate")
        ends = ends and done.who == f"gateway-{stream.ask.gateway}"
        in_time = done.at <= stream.ended_at < done.at + GATEWAY_END_S
        if ends and in_time and stream.sent_at <= done.at + GATEWAY_NOTICED_S:
            return f"ended with its gateway ({done.fault.kind})"
    return ""


def _compare(
    stream: Stream,
    question: Question,
    answers: Mapping[str, tuple[Answer, ...]],
    faults: Sequence[Done],
    decode: Callable[[Sequence[int]], str],
    verdict: Verdict,
) -> None:
    complete = stream.outcome == "complete"
    for choice, answer in enumerate(answers[question.key]):
        ids, reason = expected(answer, stream.ask.max_tokens)
        got = tuple(stream.ids[choice])
        verdict.tokens += len(got)
        if got != (ids if complete else ids[: len(got)]):
            verdict.unlike.append((stream, choice))
            continue
        if complete and stream.reasons[choice] != reason:
            what = f"choice {choice} finished by {stream.reasons[choice]}, not {reason}"
            verdict.findings.append(finding(stream, what, faults))
        text = decode(ids)
        same = stream.texts[choice] == text if complete else text.startswith(stream.texts[choice])
        if not same:
            what = f"choice {choice}: the ids are right, their text is not"
            verdict.findings.append(finding(stream, what, faults))


def finding(stream: Stream, what: str, faults: Sequence[Done]) -> Finding:
    """With the fault that came last before the stream's end."""
    at = stream.ended_at or float("inf")
    before = [done for done in faults if done.at <= at]
    near = f"#{before[-1].fault.number} {before[-1].fault.text()}" if before else ""
    return Finding(what=what, stream=stream.ask.number, answer_id=stream.answer_id, near=near)


def recoveries(
    streams: Sequence[Stream], faults: Sequence[Done], slice_s: float
) -> tuple[Recovery, ...]:
    """Of every fault that befell somebody."""
    found = []
    for place, done in enumerate(faults):
        if not done.who:
            continue
        later = faults[place + 1].at if place + 1 < len(faults) else float("inf")
        earlier_until = max((d.until for d in faults[:place]), default=float("-inf"))
        felt = [pause for s in streams if (pause := pause_of(s, done, later)) is not None]
        longest, ended_at = max(felt, default=(0.0, done.at))
        bound = bound_s(done.fault, slice_s) if done.spare else 0.0
        began_at = ended_at - longest
        judged_by = began_at + (min(longest, bound) if bound else longest)
        found.append(
            Recovery(
                kind=done.fault.kind,
                role=done.fault.role,
                number=done.fault.number,
                pause_s=longest,
                streams=len(felt),
                alone=judged_by <= later and earlier_until <= done.at,
                bound_s=bound,
            )
        )
    return tuple(found)


def pause_of(stream: Stream, done: Done, later: float) -> tuple[float, float] | None:
    """The longest time without a token that the fault may have caused, and its end: it was under
    way at the fault, or began soon after it, since a lease goes on for a while without a leader.

    None if the stream was not under way, or is read slowly, or ended otherwise than it should.
    """
    if stream.ask.style != "plain" or stream.outcome != "complete":
        return None
    if not stream.arrivals or not stream.arrivals[0][0] < done.at < stream.arrivals[-1][0]:
        return None
    if stream.ask.gateway != 1 and done.who == f"gateway-{stream.ask.gateway}":
        return None
    begins_by = min(later, done.until + CAUSED_S)
    times = [at for at, _ in stream.arrivals]
    gaps = [
        (end - max(begin, done.at), end)
        for begin, end in pairwise(times)
        if end >= done.at and begin < begins_by
    ]
    return max(gaps)


def bound_s(fault: Fault, slice_s: float) -> float:
    """What the recovery may take; 0: no bound is set."""
    lasting = fault.kind in ("freeze", "half-open")
    if fault.role == "worker" and (fault.kind == "kill" or lasting):
        return WORKER_BOUND_S + slice_s
    if fault.role == "leader" and fault.kind == "kill":
        return LEADER_KILLED_S
    if fault.role == "leader" and lasting:
        return LEADER_SILENT_S
    return 0.0


def token_s(streams: Sequence[Stream]) -> float:
    """Median time of a stream between two tokens."""
    paces = [
        (s.arrivals[-1][0] - s.arrivals[0][0]) / tokens
        for s in streams
        if s.outcome == "complete" and (tokens := sum(n for _, n in s.arrivals[1:]))
    ]
    return median(paces) if paces else 0.0
