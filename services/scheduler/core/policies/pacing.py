"""Pacing: how long is a slice, and when is the next round?"""

from collections.abc import Callable
from dataclasses import dataclass

from services.scheduler.core.settings import Constants


@dataclass(frozen=True, slots=True)
class Clock:
    """What pacing may know of time and load, all in seconds."""

    gathered_at: float
    """When somebody in the pool has waited long enough for company."""
    last_round_at: float
    least_load_s: float
    """Of the workers in use, right after the last round."""
    idle_workers: int
    waiting: int
    """Requests in the pool."""


@dataclass(frozen=True, slots=True)
class Pacing:
    """One answer."""

    lease_tokens: Callable[[int, Constants], int]
    """(tokens that remain) -> most new tokens in the next slice."""
    next_round_at: Callable[[Clock, Constants], float | None]
    """None: not before something happens."""
    deals: bool
    """A worker with nothing to do is served at once, whatever waits; complete batches are also
    dealt out ahead, to queue at the workers. Otherwise a round places everybody."""


def _whole(remaining_tokens: int, constants: Constants) -> int:
    return remaining_tokens


def _slice(remaining_tokens: int, constants: Constants) -> int:
    return min(constants.slice_tokens, remaining_tokens)


def _dealt(clock: Clock, constants: Constants) -> float | None:
    """As soon as a complete batch waits, to be dealt to the next worker in turn, or a worker has
    nothing to do: a static batch server does not wait for company then."""
    complete = constants.deal_ahead and clock.waiting >= constants.batch_size
    return clock.gathered_at if clock.idle_workers or complete else None


def _ticked(clock: Clock, constants: Constants) -> float | None:
    """At a fixed interval, as long as anybody waits."""
    return max(clock.gathered_at, clock.last_round_at + constants.interval_s)


def interval_s(least_load_s: float, constants: Constants) -> float:
    """SCLS's interval, as recollected: max(lambda x least load, Gamma), never below Gamma."""
    return max(constants.interval_share * least_load_s, constants.interval_floor_s)


def _adaptive(clock: Clock, constants: Constants) -> float | None:
    """After the interval; with `round_on_idle` after its floor while a worker has nothing to do."""
    idle = constants.round_on_idle and clock.idle_workers > 0
    wait_s = interval_s(0.0 if idle else clock.least_load_s, constants)
    return max(clock.gathered_at, clock.last_round_at + wait_s)


PACINGS: dict[str, Pacing] = {
    "whole": Pacing(_whole, _dealt, deals=True),
    "ticked": Pacing(_slice, _ticked, deals=False),
    "adaptive": Pacing(_slice, _adaptive, deals=False),
}


LeasePacing = Callable[[int, Constants], int]
"""(output tokens so far) -> most new tokens in the next lease."""

WHOLE_LEASE = 1 << 40
"""Cut to what remains of a request."""


def _lease_whole(output_tokens: int, constants: Constants) -> int:
    """One lease to the end: all that a request may ever make is reserved."""
    return WHOLE_LEASE


def _lease_fixed(output_tokens: int, constants: Constants) -> int:
    """Leases of S tokens, the first of `first_slice_tokens` if that is set."""
    if output_tokens == 0 and constants.first_slice_tokens:
        return constants.first_slice_tokens
    return constants.slice_tokens


def _lease_growing(output_tokens: int, constants: Constants) -> int:
    """As long as what was made so far, within bounds: geometric slices."""
    first = constants.first_slice_tokens or constants.slice_tokens
    return max(first, min(output_tokens, constants.slice_tokens))


LEASE_PACINGS: dict[str, LeasePacing] = {
    "whole": _lease_whole,
    "fixed": _lease_fixed,
    "growing": _lease_growing,
}
