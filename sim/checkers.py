"""Checkers: do the messages of a run keep the promises of the mesh?

Each looks at the transcript of messages alone, line by line, and keeps books of its own; none asks
the scheduler's core what it believes. Lines say when a message was sent and when it arrived:
what a worker holds follows from what arrived there, what the scheduler knows from what reached it.
"""

from collections.abc import Sequence

from sim.check_ends import EndChecker, StarvationChecker
from sim.check_memory import MemoryChecker
from sim.check_places import LeaseChecker, PlaceChecker
from sim.check_text import TextChecker
from sim.checker import Checker, Facts, Tell, Violation
from sim.network import Seen

VIOLATIONS_MAX = 1_000
"""More say nothing new."""

CHECKERS: tuple[type[Checker], ...] = (
    TextChecker,
    MemoryChecker,
    PlaceChecker,
    LeaseChecker,
    StarvationChecker,
    EndChecker,
)


def judge(messages: Sequence[Seen], facts: Facts) -> list[Violation]:
    """All that is wrong with this transcript, in order of time; [] if nothing is."""
    found: list[Violation] = []

    def teller(rule: str) -> Tell:
        def tell(at: float, detail: str) -> None:
            if len(found) < VIOLATIONS_MAX:
                found.append(Violation(at, rule, detail))

        return tell

    checkers = [kind(facts, teller(kind.rule)) for kind in CHECKERS]
    for at, moment, message in messages:
        for checker in checkers:
            checker.see(at, moment, message)
    end = messages[-1].at if messages else 0.0
    for checker in checkers:
        checker.end(end)
    return found
