"""The gateway's link to the mesh: the ledger's shell.

Theory of operation. Deliveries and the ledger's deadline go into the ledger; its news move the
calls, its messages go to the outbox. Messages are published in their order, many under way at
once; a `Submit` alone is waited for, since its failure is the client's answer.
"""

import asyncio
import logging
from collections.abc import Iterable

from services.gateway.calls import Call, Choice
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
from services.gateway.errors import (
    PROMPT_PARAMS,
    UNAVAILABLE_RETRY_S,
    ApiError,
    busy,
    failed,
    overdue,
    rejected,
    slow_reader,
    too_slow_here,
    unavailable,
)
from services.gateway.metrics import GatewayMetrics
from services.gateway.outbox import Outbox
from services.gateway.settings import GatewaySettings
from shared.bus.api import Bus, BusError, BusFull, Delivery
from shared.bus.topology import SCHEDULER_QUEUE, from_gateway, gateway_queue, said_rightly
from shared.messages import GatewayBeat, Message, TokenBatch
from shared.telemetry.setup import Telemetry
from shared.telemetry.tracing import headers_for, record_span

BEAT_S = 1.0
"""The scheduler cancels a gateway's requests after three missed beats."""
BEAT_DEADLINE_S = 2.0


class Misdirected(Exception):
    """A message that its sender has no right to say; it becomes a dead letter."""


class MeshLink:
    """Submits calls, follows their tokens, cancels them."""

    def __init__(self, settings: GatewaySettings, bus: Bus, telemetry: Telemetry) -> None:
        self._settings = settings
        self._bus = bus
        self._telemetry = telemetry
        self._metrics = GatewayMetrics.of(telemetry.registry)
        self._gateway = telemetry.boot_id
        patience = Patience(settings.gap_wait_s, settings.silence_s, settings.first_silence_s)
        self._ledger = Ledger(self._gateway, patience, told=True)
        self._outbox = Outbox(bus, self._gateway, telemetry)
        self._open: dict[str, tuple[Call, Choice]] = {}
        self._rearm = asyncio.Event()
        self._armed_for = float("inf")

    @staticmethod
    def now() -> float:
        """The event loop's clock, by which its timeouts go."""
        return asyncio.get_running_loop().time()

    # ---------------------------------------------------------------------------- for clients

    @property
    def open_choices(self) -> int:
        """Choices that the mesh works on."""
        return len(self._open)

    @property
    def connected(self) -> bool:
        """A scheduler's beat was heard lately, and the broker is in reach."""
        age_s = self.now() - self._ledger.beat_at
        return self._bus.connected and age_s <= self._settings.beat_timeout_s

    @property
    def workerless_s(self) -> float | None:
        """How long there has been no worker, as the scheduler says; infinite before the first one
        was seen, None while there is one."""
        since = self._ledger.workerless_since
        return None if since is None else self.now() - since

    @property
    def advice(self) -> str:
        """What the scheduler last said of workers that cannot be used; empty if all is well."""
        return self._ledger.beat.advice if self._ledger.beat else ""

    @property
    def predicted_wait_s(self) -> float:
        """What the scheduler last said of the wait for a first slice."""
        return self._ledger.beat.predicted_wait_s if self._ledger.beat else 0.0

    @property
    def context_tokens_max(self) -> int:
        """Longest prompt plus output that every worker can hold; 0: not known."""
        return self._ledger.beat.context_tokens_max if self._ledger.beat else 0

    async def submit(self, call: Call) -> None:
        """Hands all choices to the mesh. Raises ApiError if the broker does not take them; then
        those that it took are cancelled."""
        now = self.now()
        messages = []
        for choice in call.choices:
            messages.append(self._ledger.open(choice.spec, now, call.expires_at))
            self._open[choice.spec.request_id] = (call, choice)
        self._metrics.open_requests.set(len(self._open))
        self._rearm_if_earlier()
        published = await asyncio.gather(
            *(self._publish_submit(message, call.trace) for message in messages),
            return_exceptions=True,
        )
        failures = [result for result in published if result is not None]
        if failures:
            self.cancel(call)
            raise self._submit_error(call, failures[0])

    def cancel(self, call: Call) -> None:
        """Nobody waits for what is still open of this call."""
        for choice in call.choices:
            if choice.finished_at is None:
                self._forget(choice, None)
                self._send(self._ledger.cancel(choice.spec.request_id))

    def caught_up(self, call: Call) -> None:
        """Its client took all that was written: what was paused for it goes on."""
        for choice in call.choices:
            if choice.paused_at_characters and not choice.transcript.pending_characters:
                choice.paused_at_characters = 0
                request_id, now = choice.spec.request_id, self.now()
                self._send(self._ledger.pause(request_id, now, paused=False))
                self._rearm_if_earlier()

    def abandon(self) -> None:
        """The drain is over: what is still open ends with an error."""
        for request_id in tuple(self._open):
            self._fail(request_id, unavailable("This gateway is shutting down. Try again."))
            self._send(self._ledger.cancel(request_id))

    # ---------------------------------------------------------------------------- for the mesh

    async def run(self, stop: asyncio.Event) -> None:
        """Follows the mesh until `stop` is set, then takes leave of it. Raises BusUnavailable if
        the gateway's queue cannot be made."""
        self._bus.on_reconnect(self._on_reconnect)
        await self._bus.declare(SCHEDULER_QUEUE)
        subscription = await self._bus.consume(gateway_queue(self._gateway), self._on_delivery)
        async with asyncio.TaskGroup() as tasks:
            sending = tasks.create_task(self._outbox.run())
            beating = tasks.create_task(self._beat())
            waking = tasks.create_task(self._keep_awake())
            await stop.wait()
            for task in (beating, waking):
                task.cancel()
            await self._outbox.drain()
            sending.cancel()
        await self._publish_beat(leaving=True)
        await subscription.close()

    async def _on_delivery(self, delivery: Delivery) -> None:
        message = delivery.message
        if not said_rightly(delivery):
            self._metrics.errors.labels("misdirected").inc()
            raise Misdirected(f"{type(message).__name__} is not from {delivery.exchange}")
        if isinstance(message, TokenBatch):
            self._metrics.token_batches.inc()
            self._metrics.token_wait.observe(delivery.queue_wait_s)
            self._record_returns(message, delivery)
        now = self.now()
        self._apply(self._ledger.handle(message, now), now)
        self._metrics.follow(self._ledger.counts)
        self._rearm_if_earlier()

    def _on_reconnect(self) -> None:
        self._metrics.errors.labels("reconnect").inc()
        self._telemetry.log.warning("broker is back", open_requests=len(self._ledger))
        now = self.now()
        self._apply(self._ledger.reconnected(now), now)

    def _apply(self, outputs: Iterable[Output], now: float) -> None:
        """Moves the calls, in the order of the outputs."""
        for output in outputs:
            match output:
                case Arrived():
                    self._on_tokens(output, now)
                case Ended():
                    self._on_end(output)
                case Promised():
                    self._on_promise(output, now)
                case Refused():
                    self._on_refusal(output)
                case Expired():
                    self._fail(output.request_id, overdue("The request's time is over."))
                case _:
                    self._outbox.put(output)

    def _on_promise(self, promised: Promised, now: float) -> None:
        """The scheduler counts from when it heard of the request. Where the way to it and back took
        so long that the client's limit will be missed all the same, that is said, not promised."""
        known = self._open.get(promised.request_id)
        if known is None or known[1].promise is not None:
            return  # the first word stands
        call, choice = known
        choice.promise = now + promised.start_s, now + promised.finish_s
        call.changed.set()
        within_ms = choice.spec.ttft_deadline_ms
        if within_ms is None or call.begun or not call.promised:
            return
        assert call.promise is not None
        start_s, passed_s = call.promise[0] - call.received_at, now - call.received_at
        if start_s > within_ms / 1_000:
            self._fail(promised.request_id, too_slow_here(start_s, passed_s, within_ms / 1_000))
            self._send(self._ledger.cancel(promised.request_id))

    def _on_tokens(self, arrived: Arrived, now: float) -> None:
        known = self._open.get(arrived.request_id)
        if known is None:
            return
        call, choice = known
        if arrived.prompt_logprobs:
            choice.prompt_scores = arrived.prompt_logprobs
        if choice.hidden:
            return
        if arrived.ids:
            self._metrics.saw_tokens(call, choice, len(arrived.ids), now)
        stopped_at = choice.transcript.push(
            arrived.ids, arrived.logprobs, ending_token=arrived.ending_token
        )
        if stopped_at is not None:
            self._stop(choice, stopped_at)
        elif self._reads_too_slowly(choice):
            self._metrics.slow_readers.inc()
            self._forget(choice, slow_reader(self._settings.stream_characters_max))
            self._send(self._ledger.cancel(arrived.request_id))
        else:
            self._pause_if_behind(choice, now)
        call.changed.set()

    def _pause_if_behind(self, choice: Choice, now: float) -> None:
        """Said again whenever twice as much waits, should the word have been lost."""
        waiting = choice.transcript.pending_characters
        limit = max(self._settings.reader_behind_characters, 2 * choice.paused_at_characters)
        if choice.spec.stream and waiting > limit:
            if not choice.paused_at_characters:
                self._metrics.paused_readers.inc()
            choice.paused_at_characters = waiting
            self._send(self._ledger.pause(choice.spec.request_id, now, paused=True))

    def _reads_too_slowly(self, choice: Choice) -> bool:
        """A whole answer may wait, and so may the end of an output that is complete."""
        waiting = choice.transcript.pending_characters
        too_much = choice.spec.stream and waiting > self._settings.stream_characters_max
        return too_much and choice.spec.request_id in self._ledger

    def _on_end(self, ended: Ended) -> None:
        known = self._open.get(ended.request_id)
        if known is None:
            return
        call, choice = known
        if ended.reason == "error":
            self._fail(ended.request_id, failed(f"The output failed: {ended.detail or 'unknown'}"))
            return
        stopped_at = choice.transcript.finish(ended.reason, ended.detail)
        if stopped_at is not None:
            self._stop(choice, stopped_at)
        else:
            self._forget(choice, None)
        call.changed.set()

    def _on_refusal(self, refused: Refused) -> None:
        known = self._open.get(refused.request_id)
        if known is not None:
            param = PROMPT_PARAMS[known[0].endpoint]
            self._fail(refused.request_id, rejected(refused.rejection, param))

    def _stop(self, choice: Choice, output_tokens: int) -> None:
        self._forget(choice, None)
        self._send(self._ledger.stop(choice.spec.request_id, output_tokens))

    def _fail(self, request_id: str, error: ApiError) -> None:
        known = self._open.get(request_id)
        if known is None:
            return
        call, choice = known
        self._forget(choice, error)
        level = logging.WARNING if error.status >= 500 else logging.INFO
        self._telemetry.log.log(
            level,
            "request failed",
            request_id=call.call_id,
            http_request_id=call.http_id,
            code=error.code,
            error=error.message,
        )
        call.changed.set()

    def _forget(self, choice: Choice, error: ApiError | None) -> None:
        self._open.pop(choice.spec.request_id, None)
        self._metrics.open_requests.set(len(self._open))
        choice.error = error
        choice.finished_at = self.now()

    # -------------------------------------------------------------------------------- messages

    def _send(self, outputs: Iterable[Output]) -> None:
        for output in outputs:
            if isinstance(output, Message):
                self._outbox.put(output)

    def _submit_error(self, call: Call, failure: BaseException) -> BaseException:
        if not isinstance(failure, BusError):
            return failure
        self._metrics.errors.labels("bus").inc()
        self._telemetry.log.warning(
            "submit failed",
            request_id=call.call_id,
            http_request_id=call.http_id,
            error=str(failure),
        )
        if isinstance(failure, BusFull):
            return busy("The mesh's queue is full. Try again later.", UNAVAILABLE_RETRY_S)
        return unavailable("The mesh cannot be reached now. Try again later.")

    async def _publish_submit(self, message: Message, trace: str) -> None:
        await self._bus.publish(
            from_gateway(self._gateway),
            message,
            headers_for(trace),
            deadline_s=self._settings.submit_timeout_s,
        )

    async def _beat(self) -> None:
        while True:
            await self._publish_beat(leaving=False)
            await asyncio.sleep(BEAT_S)

    async def _publish_beat(self, *, leaving: bool) -> None:
        beat = GatewayBeat(gateway=self._gateway, open_requests=len(self._ledger), leaving=leaving)
        try:
            await self._bus.publish(
                from_gateway(self._gateway),
                beat,
                deadline_s=BEAT_DEADLINE_S,
                persistent=False,
                mandatory=False,
            )
        except BusError as error:
            self._metrics.errors.labels("bus").inc()
            self._telemetry.log.warning("beat not sent", error=str(error))

    def _rearm_if_earlier(self) -> None:
        deadline = self._ledger.deadline()
        if deadline is not None and deadline < self._armed_for:
            self._rearm.set()

    async def _keep_awake(self) -> None:
        """Wakes the ledger at its deadlines."""
        while True:
            self._rearm.clear()
            deadline = self._ledger.deadline()
            self._armed_for = float("inf") if deadline is None else deadline
            try:
                async with asyncio.timeout_at(deadline):
                    await self._rearm.wait()
            except TimeoutError:
                now = self.now()
                self._apply(self._ledger.wake(now), now)
                self._metrics.follow(self._ledger.counts)

    def _record_returns(self, batch: TokenBatch, delivery: Delivery) -> None:
        """A span for the way back of each request's first and last tokens."""
        for run in batch.runs:
            if run.position and run.finish_reason is None:
                continue
            known = self._open.get(run.request_id)
            if known is None or not known[0].trace:
                continue
            record_span(
                self._telemetry.tracer,
                "token return",
                start_s=min(delivery.sent_at, delivery.received_at),
                end_s=delivery.received_at,
                parent=known[0].trace,
                attributes={
                    "tranche.request_id": run.request_id,
                    "tranche.worker": batch.worker,
                    "tranche.attempt": run.attempt,
                    "tranche.position": run.position,
                    "messaging.system": "rabbitmq",
                    "messaging.operation.type": "receive",
                    "messaging.batch.message_count": len(batch.runs),
                },
            )
