"""Queues: the orders in which leased requests wait, each a key under priorities.

Tags as in the research notes: [C] read in source code, [M] recollected, [R] our reconstruction,
[T] Tranche's own choice.
"""

from collections.abc import Callable
from functools import partial

from services.scheduler.core.policies.estimates import Estimates
from services.scheduler.core.policies.fair import FairQueue
from services.scheduler.core.policies.lanes import (
    FloatArray,
    Key,
    Keys,
    Scan,
    Sorted,
    waiting_since,
)
from services.scheduler.core.policies.levels import Levels, level
from services.scheduler.core.policies.order import Queue
from services.scheduler.core.policies.ranks import Ranked
from services.scheduler.core.policies.standing import StandingQueue
from services.scheduler.core.settings import Constants
from services.scheduler.core.state import Request

PREFILL_S_MIN = 1e-6
"""Keeps a ratio finite."""


def fcfs(constants: Constants, estimates: Estimates) -> Queue:
    """First come, first served, by arrival in the mesh; after a lease it keeps its place."""
    return Ranked(lambda: Sorted(lambda request: ()), constants)


def sjf(constants: Constants, estimates: Estimates) -> Queue:
    """Shortest job first by predicted output [M: SSJF, LTR]. Not aged: it starves the long."""
    return Ranked(lambda: Sorted(lambda r: (estimates.output_tokens(r),)), constants)


def spf(constants: Constants, estimates: Estimates) -> Queue:
    """Shortest prefill first, by input tokens, as SGLang's `shortest-prefill-first` [C]. Not aged:
    it starves the long."""
    return Ranked(lambda: Sorted(lambda r: (r.input_tokens,)), constants)


def srpt(constants: Constants, estimates: Estimates) -> Queue:
    """Shortest predicted remaining output first, less `srpt_ageing_tokens_per_s` for each second
    of waiting [T]. All age alike, so the order of two that wait stays what it is."""
    ageing = constants.srpt_ageing_tokens_per_s

    def key(request: Request) -> Key:
        return (estimates.remaining_tokens(request) + ageing * waiting_since(request),)

    return Ranked(lambda: Sorted(key), constants)


def edf(constants: Constants, estimates: Estimates) -> Queue:
    """Earliest deadline first: of the first token while there is none, and of the end, both from
    arrival on. One that has neither before it is due `edf_default_s` after its wait began, so that
    it is not starved by those that have [T]. Missed deadlines stay first, as in plain EDF."""

    def key(request: Request) -> Key:
        spec, dues = request.spec, []
        if spec.ttft_deadline_ms is not None and not request.output_tokens:
            dues.append(request.arrived_at + spec.ttft_deadline_ms / 1000)
        if spec.deadline_ms is not None:
            dues.append(request.arrived_at + spec.deadline_ms / 1000)
        return (min(dues, default=waiting_since(request) + constants.edf_default_s),)

    return Ranked(lambda: Sorted(key), constants)


def hrrn(constants: Constants, estimates: Estimates) -> Queue:
    """Highest response ratio next: wait over predicted prefill time. SGLang counts the wait in
    prefilled tokens [C]; the survey note's LARRY-1 is this rule [R]."""

    def values(request: Request) -> Key:
        return waiting_since(request), max(PREFILL_S_MIN, estimates.prefill_s(request))

    def keys(columns: FloatArray, now: float) -> tuple[FloatArray, ...]:
        since, prefill_s = columns
        return ((since - now) / prefill_s,)

    return _scanned(values, keys, constants)


def larry(constants: Constants, estimates: Estimates) -> Queue:
    """Load-adaptive short-first with ageing: the largest wait - beta x work first, the survey
    note's LARRY-2 [R]. Work is the predicted prefill time. beta is `larry_boost` times how many
    wait in this rank, at most `larry_beta_max` [T]: to serve one first makes each of the others
    wait for its work. With few of them that is first come, first served. Nobody starves, because
    waits grow without end and beta does not."""
    boost, most = constants.larry_boost, constants.larry_beta_max

    def values(request: Request) -> Key:
        return waiting_since(request), estimates.prefill_s(request)

    def keys(columns: FloatArray, now: float) -> tuple[FloatArray, ...]:
        since, work_s = columns
        return (since + min(boost * len(since), most) * work_s,)

    return _scanned(values, keys, constants)


def mlfq(constants: Constants, estimates: Estimates) -> Queue:
    """FastServe's skip-join multi-level feedback queue [C], adapted to leases [T]: see `levels`."""
    idle_s = constants.mlfq_idle_s
    return Ranked(lambda: Levels(lambda r: level(r, constants, estimates), idle_s), constants)


def fair(constants: Constants, estimates: Estimates) -> Queue:
    """The tenant that has been given least is next: virtual token counters [C], see `fair`."""
    return FairQueue(constants)


def volume(constants: Constants, estimates: Estimates) -> Queue:
    """Deadlines within reach first, then the tenant that has been given least, then arrival plus at
    most `volume_boost_s` for requests of large expected volume [T]: see `standing`."""
    return StandingQueue(constants, estimates)


def _scanned(values: Callable[[Request], Key], keys: Keys, constants: Constants) -> Queue:
    return Ranked(partial(Scan, values, keys), constants)


QUEUES: dict[str, Callable[[Constants, Estimates], Queue]] = {
    "fcfs": fcfs,
    "sjf": sjf,
    "spf": spf,
    "srpt": srpt,
    "mlfq": mlfq,
    "edf": edf,
    "fair": fair,
    "hrrn": hrrn,
    "larry": larry,
    "volume": volume,
}
