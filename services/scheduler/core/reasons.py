"""Reasons: why a request waits, and why it was placed, in one word each and a few figures.

For traces, the journal and `tranche replay`. They are noted where decisions are made and read by
nobody who decides, so that they cost next to nothing and change nothing.
"""

from services.scheduler.core.policies.gates import Gate
from services.scheduler.core.state import Cause, Request
from shared.messages import AdmittedBy, WaitsFor, Why


def begins_to_wait(request: Request, cause: Cause, now: float) -> None:
    """It came into the pool."""
    if cause is Cause.ADMIT:
        request.came = "new"
    elif cause is Cause.RESUME:
        request.came = "resumed"
    elif request.evictions and request.evicted_at == now:
        request.came = "evicted"
    else:
        request.came = "refused" if request.refusals else "returned"
    waits(request, "reader" if request.paused else "turn")


def waits(request: Request, waits_for: WaitsFor, gate: Gate | None = None) -> None:
    """This keeps it from being placed, as far as is known now; `gate`: that refused it."""
    request.waits_for = waits_for
    request.needed_tokens = round(gate.needed) if gate is not None else 0
    request.room_tokens = round(gate.room) if gate is not None else 0


def admitted(request: Request, by: AdmittedBy, gate: Gate | None = None) -> None:
    """It may join a worker."""
    request.admitted_by = by
    request.needed_tokens = round(gate.needed) if gate is not None else 0
    request.room_tokens = round(gate.room) if gate is not None else 0


def why(request: Request, worker: str) -> Why:
    """For the order that places it on this worker; to be asked before it is placed."""
    return Why(
        came=request.came,
        waited_for=request.waits_for,
        admitted_by=request.admitted_by,
        overtaken=request.overtaken,
        needed_tokens=request.needed_tokens,
        room_tokens=request.room_tokens,
        start_s=request.predicted_start_s,
        output_tokens=request.predicted_output,
        moved=bool(request.placements) and request.placements[-1].worker != worker,
    )
