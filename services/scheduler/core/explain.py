"""Explain: the story of one request from a journal: what was decided about it, and why.

The events are run through the core again, and after each one the request is looked at: its reasons
(reasons.py) are part of the core's state, so a journal need not hold them.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field

from services.scheduler.core.replay import steps_of
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.core.state import Request, State
from shared.messages import Finished, SchedulerCommand

WAITING_FOR = {
    "turn": "its turn: others are before it",
    "memory": "memory: admission predicts that it would not last",
    "room": "room: no worker has blocks for its first lease",
    "prefill": "prefill: enough is queued on every worker with room",
    "places": "a place: all workers run as many requests as they may",
    "workers": "a worker: none takes orders now",
    "reader": "its client, which is behind with reading",
}
CAME = {
    "new": "taken in",
    "returned": "back at the end of its slice",
    "evicted": "back for want of memory",
    "refused": "back, its worker could not run it",
    "resumed": "back from its gateway, after its worker or its tokens were lost",
}
ADMITTED = {
    "dealt": "in a closed batch",
    "idle": "that had nothing to do",
    "sure": "where memory lasts whatever comes",
    "gate": "where admission predicts that memory lasts",
}
STATES = {
    State.COLLECTING: "a new leader asks who runs it",
    State.RECALLING: "its gateway is asked for its tokens",
}


@dataclass(slots=True)
class _Story:
    """What was told so far."""

    lines: list[str] = field(default_factory=list)
    arrived_at: float | None = None
    told: tuple[object, ...] = ()
    began_at: float | None = None

    def tell(self, now: float, text: str) -> None:
        if self.arrived_at is None:
            self.arrived_at = now
        self.lines.append(f"{now - self.arrived_at:10.3f} s  {text}")


def story(data: bytes, request_id: str) -> list[str]:
    """Lines for people, each with seconds since the request came; empty if the journal does not
    know it. `request_id` may be the beginning of the id. Raises BadJournal."""
    story, full_id = _Story(), ""
    for step, core, commands in steps_of(data):
        full_id = full_id or _full_id(core, request_id)
        if full_id:
            _look(story, core, full_id, step.now, commands)
    return [f"request {full_id}", *story.lines] if story.lines else []


def _full_id(core: Scheduler, beginning: str) -> str:
    requests = core.books.requests
    for known in (requests.open, requests.done, requests.refused):
        for name in known:
            if name.startswith(beginning):
                return name
    return ""


def _look(
    story: _Story, core: Scheduler, request_id: str, now: float, commands: list[SchedulerCommand]
) -> None:
    requests = core.books.requests
    request = requests.open.get(request_id) or requests.done.get(request_id)
    if request is None:
        answer = requests.refused.get(request_id, (0.0, None))[1]
        if answer is not None and not story.told:
            story.told = ("refused",)
            retry = f"; try again in {answer.retry_after_s:.2f} s" if answer.retry_after_s else ""
            story.tell(now, f"refused ({answer.reason}): {answer.detail}{retry}")
        return
    if not story.lines:
        story.tell(now, _introduced(request))
    if request.output_tokens and story.began_at is None:
        story.began_at = now
        story.tell(
            now, f"first token{_beside(now - request.arrived_at, request.predicted_start_s)}"
        )
    key = (request.state, request.attempt, *_reason_key(request))
    if key != story.told:
        story.told = key
        for text in _described(core, request, now, commands):
            story.tell(now, text)


def _introduced(request: Request) -> str:
    spec = request.spec
    told = f"{request.prompt_tokens} prompt tokens, at most {spec.max_tokens} output"
    wishes = [
        f"{name} within {limit_ms / 1000:g} s"
        for name, limit_ms in (("begins", spec.ttft_deadline_ms), ("ends", spec.deadline_ms))
        if limit_ms is not None
    ]
    told = ", ".join((told, f"tenant {spec.tenant!r}", f"priority {spec.priority}", *wishes))
    if request.predicted_finish_s:
        told += (
            f"; predicted: first token after {request.predicted_start_s:.3f} s, about "
            f"{request.predicted_output} tokens, end after {request.predicted_finish_s:.3f} s"
        )
    return f"came with {told}"


def _reason_key(request: Request) -> tuple[object, ...]:
    return (request.came, request.waits_for) if request.state is State.WAITING else ()


def _described(
    core: Scheduler, request: Request, now: float, commands: list[SchedulerCommand]
) -> Iterator[str]:
    if request.state is State.DONE:
        yield from _ended(request, now, commands)
    elif request.state is State.WAITING:
        ahead = core.books.waits.tokens - request.prompt_tokens
        yield (
            f"{CAME[request.came]}, waits for {WAITING_FOR[request.waits_for]}"
            f"{_figures(request)} ({max(0, ahead)} tokens of other input wait)"
        )
    elif request.state is State.PLACED:
        yield _placed(core, request, now)
    elif request.state is State.PARKING:
        cause = "its client is behind" if request.paused else "no blocks are left for all leases"
        if request.makes_way:
            cause = "its tenant runs more than its share"
        yield f"told to park: {cause}; {request.output_tokens} tokens made"
    else:
        yield STATES.get(request.state, request.state.value)


def _placed(core: Scheduler, request: Request, now: float) -> str:
    worker = core.books.workers.active.get(request.worker)
    name = worker.info.name if worker is not None else "a worker"
    if request.batch_id == "adopted":
        return f"goes on on {name}, found there by a new leader"
    moved = len(request.placements) > 1 and request.placements[-2].worker != request.worker
    how = "moved to" if moved else "placed on"
    return (
        f"{how} {name} (attempt {request.attempt}), {ADMITTED[request.admitted_by]}"
        f"{_figures(request)}"
    )


def _figures(request: Request) -> str:
    if not request.room_tokens:
        return ""
    return f"; with it {request.needed_tokens} tokens are needed of {request.room_tokens}"


def _ended(request: Request, now: float, commands: list[SchedulerCommand]) -> Iterator[str]:
    reports = (command for command in commands if isinstance(command, Finished))
    report = next((r for r in reports if r.request_id == request.request_id), None)
    if report is None:
        return  # it is told to the estimator once
    beside = _beside(now - request.arrived_at, request.predicted_finish_s)
    guess = f", predicted {request.predicted_output}" if request.predicted_output else ""
    evicted = f"; evicted {request.evictions} times" if request.evictions else ""
    yield f"ended ({report.reason}){beside}; {report.output_tokens} tokens{guess}{evicted}"


def _beside(actual_s: float, predicted_s: float) -> str:
    told = f", predicted {predicted_s:.3f} s" if predicted_s else ""
    return f" after {actual_s:.3f} s{told}"
