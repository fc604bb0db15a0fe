"""A gateway in virtual time: the real ledger, with clients that see tokens when they are made.

Workers send tokens with their reports, so a batch of tokens carries the times at which a real
stream would have brought them (`sim.worker.Times`). Without times, tokens came when they arrived.
"""

from collections.abc import Callable, Sequence
from typing import Any

from services.gateway.core.ledger import (
    Ended,
    Expired,
    Ledger,
    Output,
    Patience,
    Promised,
    Refused,
)
from services.gateway.core.record import Arrived
from shared.messages import FinishAck, GatewayBeat, RequestSpec, TokenBatch
from sim.clients import Call
from sim.setup import Abort
from sim.text import prompt_of
from sim.worker_books import Times
from sim.world import World

BEAT_S = 1.0
Send = Callable[[Any], None]


class SimGateway:
    """Owns the prefix of every open request."""

    def __init__(
        self,
        boot: str,
        world: World,
        to_leader: Send,
        to_worker: Callable[[str, Any], None],
        *,
        model: str,
        max_tokens: int,
        patience: Patience,
        abort: Abort,
        last_token_at: Callable[[str, str], float | None],
        placed: Callable[[str], bool],
        ended: Callable[[Call], None],
        failed: Callable[..., None],
        told: bool = False,
        streamed: bool = True,
    ) -> None:
        """`last_token_at(worker, request)`: what a client sees of a stream between reports;
        `placed(request)`: whether a worker has it; `told`: predictions are asked for;
        `streamed`: clients read along."""
        self.boot = boot
        self.open: dict[str, Call] = {}
        self._ledger = Ledger(boot, patience, told=told)
        self._world = world
        self._to_leader, self._to_worker = to_leader, to_worker
        self._model, self._max_tokens, self._streamed = model, max_tokens, streamed
        self._abort = abort
        self._last_token_at = last_token_at
        self._placed = placed
        self._ended, self._failed = ended, failed
        self._armed_at = float("inf")

    def start(self) -> None:
        """Beat from now on."""
        self._beat()

    def submit(self, call: Call) -> None:
        """A client sends a request."""
        item = call.item
        spec = RequestSpec(
            request_id=call.request_id,
            parent_id=call.request_id,
            gateway=self.boot,
            model=self._model,
            tenant=item.tenant or "default",
            priority=item.priority,
            prompt=prompt_of(item.prompt_tokens),
            max_tokens=self._max_tokens,
            stream=self._streamed,
            ttft_deadline_ms=item.ttft_deadline_ms,
            deadline_ms=item.deadline_ms,
        )
        self.open[call.request_id] = call
        self._to_leader(self._ledger.open(spec, self._world.now, float("inf")))
        if self._abort.first_token_s is not None:
            self._world.after(self._abort.first_token_s, self._check_first, call)
        if self._abort.waiting_s is not None:
            self._world.after(self._abort.waiting_s, self._check_waiting, call)
        self._arm()

    def receive(self, message: Any, times: Sequence[Times | None] | None = None) -> None:
        """What the mesh says."""
        outputs = self._ledger.handle(message, self._world.now)
        if isinstance(message, TokenBatch):
            self._take_tokens(message, outputs, times)
        else:
            for output in outputs:
                self._take(output)
        self._arm()

    # ---------------------------------------------------------------------------------- tokens

    def _take_tokens(
        self, batch: TokenBatch, outputs: Sequence[Output], times: Sequence[Times | None] | None
    ) -> None:
        known = times or [None] * len(batch.runs)
        seen = {run.request_id: at for run, at in zip(batch.runs, known, strict=True)}
        for output in outputs:
            if isinstance(output, Arrived):
                call = self.open[output.request_id]
                call.worker = batch.worker
                call.output_tokens += len(output.ids)
                self._mark_times(call, seen.get(output.request_id))
            elif isinstance(output, FinishAck):
                self._to_worker(output.worker, output)
            else:
                self._take(output)

    def _mark_times(self, call: Call, times: Times | None) -> None:
        now = self._world.now
        if times is None:
            first = last = now
            gap_s, fresh = 0.0, True
        else:
            delay_s = now - times.at
            first, last = times.first_at + delay_s, times.last_at + delay_s
            gap_s, fresh = times.gap_s, times.first
        if call.first_at is None:
            call.first_at = first if fresh else last
            if self._abort.gap_s is not None:
                self._world.at(last + self._abort.gap_s, self._check_gap, call)
        elif fresh and call.last_at is not None:
            gap_s = max(gap_s, first - call.last_at)
        call.gap_s = max(call.gap_s, gap_s)
        call.last_at = last if call.last_at is None else max(call.last_at, last)

    def _take(self, output: Output) -> None:
        match output:
            case Ended():
                call = self.open.pop(output.request_id)
                call.finish_reason = output.reason
                if output.reason == "error":
                    self._failed(call, "failed", output.detail or "error")
                else:
                    self._ended(call)
            case Promised():
                call = self.open[output.request_id]
                call.promise = (output.start_s, output.finish_s)
            case Refused():
                call, rejection = self.open.pop(output.request_id), output.rejection
                call.retry_after_s = rejection.retry_after_s
                self._failed(call, "rejected", rejection.reason, rejection.retry_after_s)
            case Expired():
                self._failed(self.open.pop(output.request_id), "failed", "expired")
            case Arrived():
                raise AssertionError("tokens that no batch brought")
            case _:
                self._to_leader(output)

    # ------------------------------------------------------------------------------ impatience

    def _check_first(self, call: Call) -> None:
        if call.outcome is None and call.first_at is None:
            self._hang_up(call, f"no first token in {self._abort.first_token_s:g} s")

    def _check_waiting(self, call: Call) -> None:
        if call.outcome is None and call.first_at is None and not self._placed(call.request_id):
            self._hang_up(call, f"waited for {self._abort.waiting_s:g} s")

    def _check_gap(self, call: Call) -> None:
        limit_s = self._abort.gap_s
        if call.outcome is not None or limit_s is None or call.last_at is None:
            return
        made_at = self._last_token_at(call.worker, call.request_id) or 0.0
        last = max(call.last_at, made_at)
        if self._world.now - last >= limit_s - 1e-9:
            call.gap_s = max(call.gap_s, self._world.now - last)
            self._hang_up(call, f"no next token in {limit_s:g} s")
        else:
            self._world.at(last + limit_s, self._check_gap, call)

    def _hang_up(self, call: Call, detail: str) -> None:
        del self.open[call.request_id]
        for output in self._ledger.cancel(call.request_id):
            self._to_leader(output)
        self._failed(call, "failed", detail)

    # ----------------------------------------------------------------------------------- time

    def _beat(self) -> None:
        self._to_leader(GatewayBeat(gateway=self.boot, open_requests=len(self._ledger)))
        self._world.after(BEAT_S, self._beat)

    def _arm(self) -> None:
        deadline = self._ledger.deadline()
        if deadline is not None and deadline < self._armed_at:
            self._armed_at = deadline
            self._world.at(deadline, self._wake, deadline)

    def _wake(self, armed_at: float) -> None:
        if armed_at != self._armed_at:
            return
        self._armed_at = float("inf")
        for output in self._ledger.wake(self._world.now):
            self._take(output)
        self._arm()
