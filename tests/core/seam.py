"""A scheduler core with a clock that only the test moves, and the messages that peers say to it."""

from collections.abc import Sequence

from services.scheduler.core.presets import preset_named
from services.scheduler.core.scheduler import Scheduler
from services.scheduler.core.settings import Constants
from shared import tokens
from shared.messages import (
    Elected,
    Finished,
    FinishReason,
    RequestSpec,
    RunSlice,
    SchedulerBeat,
    SchedulerCommand,
    SchedulerEvent,
    SliceDone,
    SliceOrder,
    SliceResult,
    SliceTimings,
    Submit,
    WorkerBeat,
    WorkerInfo,
    WorkerMemory,
)

LIVE = Constants(
    slice_tokens=16,
    interval_floor_s=0.0,
    gather_s=0.003,
    spread_batches=True,
    round_on_idle=True,
    waiting_max=5,
)
AT_ONCE_MAX = 5
PROMPT = tokens.pack(range(10))


class Bench:
    """A scheduler with a clock that only the test moves. Beats are left out of the answers."""

    def __init__(self, policy: str = "scls", constants: Constants = LIVE, epoch: int = 1) -> None:
        self.core = Scheduler(preset_named(policy), constants)
        self.now = 0.0
        self.say(Elected(epoch=epoch))

    def say(self, event: SchedulerEvent) -> list[SchedulerCommand]:
        return self._shown(self.core.handle(event, self.now))

    def after(self, seconds: float) -> list[SchedulerCommand]:
        """Let time pass, waking the core whenever it wants."""
        end = self.now + seconds
        said: list[SchedulerCommand] = []
        at_once = 0
        while True:
            deadline = self.core.deadline()
            assert deadline is not None
            if deadline > end:
                break
            at_once = at_once + 1 if deadline <= self.now else 0
            assert at_once < AT_ONCE_MAX, "the core wants to be woken again and again"
            self.now = max(self.now, deadline)
            said += self._shown(self.core.wake(self.now))
        self.now = end
        return said

    def _shown(self, commands: Sequence[SchedulerCommand]) -> list[SchedulerCommand]:
        return [command for command in commands if not isinstance(command, SchedulerBeat)]

    def join(self, name: str = "w1", **changes: object) -> list[SchedulerCommand]:
        return self.say(beat_of(name, **changes))

    def run_one(self, request_id: str = "r1", **changes: object) -> RunSlice:
        """Submit and be placed."""
        assert self.say(submit(request_id, **changes)) == []
        (run,) = self.after(0.004)
        assert isinstance(run, RunSlice)
        return run


def beat_of(name: str, **changes: object) -> WorkerBeat:
    info: dict[str, object] = {
        "worker": name,
        "name": name,
        "engine": "padded",
        "forms": ("closed",),
        "model": "m",
        "context_tokens_max": 1000,
        "batch_size_max": changes.pop("batch_size_max", 0),
    }
    capacity = changes.pop("capacity", 2000)
    for field in ("forms", "context_tokens_max", "model", "shares_prefixes"):
        if field in changes:
            info[field] = changes.pop(field)
    memory = WorkerMemory(kv_tokens_capacity=capacity)  # type: ignore[arg-type]
    return WorkerBeat(info=WorkerInfo(**info), memory=memory, **changes)  # type: ignore[arg-type]


def spec_of(request_id: str = "r1", **changes: object) -> RequestSpec:
    values: dict[str, object] = {
        "request_id": request_id,
        "parent_id": "p",
        "gateway": "g1",
        "model": "m",
        "prompt": PROMPT,
        "max_tokens": 40,
    }
    return RequestSpec(**{**values, **changes})  # type: ignore[arg-type]


def submit(request_id: str = "r1", **changes: object) -> Submit:
    return Submit(spec=spec_of(request_id, **changes))


def new(order: SliceOrder, count: int | None = None) -> bytes:
    """Tokens for an order; their values say where they stand."""
    start = tokens.count(order.tokens)
    return tokens.pack(range(start, start + (order.lease_tokens if count is None else count)))


def done(
    run: RunSlice,
    finish: FinishReason | None = None,
    count: int | None = None,
    refused: str = "",
    capacity: int = 2000,
) -> SliceDone:
    results = tuple(
        SliceResult(
            request_id=order.spec.request_id,
            attempt=order.attempt,
            position=tokens.count(order.tokens),
            tokens=new(order, count),
            finish_reason=finish,
        )
        for order in run.orders
    )
    return SliceDone(
        epoch=run.epoch,
        worker=run.worker,
        batch_id=run.batch_id,
        form="closed",
        results=() if refused else results,
        timings=SliceTimings(
            prefill_s=0.01, decode_s=0.2, iterations=16, input_tokens_max=10, batch_size=1
        ),
        memory=WorkerMemory(kv_tokens_capacity=capacity),
        refused=refused,
    )


def finished(reason: FinishReason, output: int, request_id: str = "r1") -> Finished:
    return Finished(
        epoch=1,
        request_id=request_id,
        model="m",
        prompt_tokens=10,
        output_tokens=output,
        max_tokens=40,
        reason=reason,
    )
