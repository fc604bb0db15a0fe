"""The ledger: every open request of this gateway, and what must be said about it to whom.

Theory of operation. The tokens in the ledger are the only truth about an output (docs/protocol.md).
Events go in with the time; out come messages for the mesh and news for the streams, in the order
in which they must happen. Nothing here waits: `deadline` says when to call `wake`.

- A `Recall`, or a rise of the epoch, is answered with the output so far (`Resume`).
- Missing tokens (a gap, or silence) are asked for with `TokensWanted`, ever more rarely.
- A finish is acknowledged to the worker each time that it is heard, so a lost word is no harm.
"""

import heapq
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from services.gateway.core.record import Arrived, Record
from shared.messages import (
    Accepted,
    AnyMessage,
    Cancel,
    FinishAck,
    FinishReason,
    Message,
    Reading,
    Recall,
    Rejected,
    RequestSpec,
    Resume,
    SchedulerBeat,
    Stopped,
    Submit,
    TokenBatch,
    TokensWanted,
)

ASK_DOUBLINGS_MAX = 5
"""Questions about one silence come at 1, 2, 4 ... 32 times the first wait."""


@dataclass(frozen=True, slots=True)
class Patience:
    """How long missing tokens are waited for before they are asked for, in seconds."""

    gap_s: float = 1.0
    """Later tokens are here, earlier ones are not."""
    silence_s: float = 5.0
    """The output has begun, and nothing comes. Longer than a usual slice and its queue."""
    first_silence_s: float = 30.0
    """Nothing has come yet: the request waits its turn, most probably."""


@dataclass(frozen=True, slots=True)
class Ended:
    """The output is complete; the ledger has forgotten the request."""

    request_id: str
    reason: FinishReason
    detail: str = ""


@dataclass(frozen=True, slots=True)
class Promised:
    """The scheduler took the request in and says when it will begin and end, in seconds."""

    request_id: str
    start_s: float
    finish_s: float


@dataclass(frozen=True, slots=True)
class Refused:
    """The scheduler will not serve the request; the ledger has forgotten it."""

    request_id: str
    rejection: Rejected


@dataclass(frozen=True, slots=True)
class Expired:
    """The request's time is over; it is cancelled, and the ledger has forgotten it."""

    request_id: str


News = Arrived | Ended | Promised | Refused | Expired
Output = Message | News


class Ledger:
    """All open requests of one gateway."""

    def __init__(
        self, gateway: str, patience: Patience | None = None, *, told: bool = False
    ) -> None:
        """`gateway` is the boot id; `told`: it wants to hear what is predicted for each request."""
        self._told = told
        self._gateway = gateway
        self._patience = patience or Patience()
        self._records: dict[str, Record] = {}
        self._due: list[tuple[float, str]] = []
        self.epoch = 0
        self.beat: SchedulerBeat | None = None
        self.beat_at = float("-inf")
        self.workerless_since: float | None = float("-inf")
        """When a beat first said that there is no worker any more; None while there is one."""
        self.counts: Counter[str] = Counter()
        """What became of runs (see `record.Verdict`, and `unknown`) and how often tokens were
        asked for (`asked`), resumed (`resumed`) and orders of old epochs ignored (`old_epoch`)."""

    def __len__(self) -> int:
        return len(self._records)

    def __contains__(self, request_id: str) -> bool:
        return request_id in self._records

    def open(self, spec: RequestSpec, now: float, expires_at: float) -> Submit:
        """Enters a new request. The caller publishes the answer, or else cancels."""
        assert spec.request_id not in self._records
        record = Record(spec=spec, heard_at=now, expires_at=expires_at)
        self._records[spec.request_id] = record
        self._schedule(record)
        return Submit(spec=spec, told=self._told)

    def cancel(self, request_id: str) -> list[Output]:
        """Nobody waits for this request any more."""
        record = self._records.pop(request_id, None)
        if record is None:
            return []
        came = record.position
        return [Cancel(gateway=self._gateway, request_id=request_id, output_tokens=came)]

    def stop(self, request_id: str, output_tokens: int) -> list[Output]:
        """A stop string ended the output after so many tokens. It may be complete already; its
        true length is told in any case."""
        self._records.pop(request_id, None)
        stopped = Stopped(gateway=self._gateway, request_id=request_id, output_tokens=output_tokens)
        return [stopped]

    def pause(self, request_id: str, now: float, *, paused: bool) -> list[Output]:
        """Its client has fallen behind with reading, or has caught up."""
        record = self._records.get(request_id)
        if record is None or (record.paused == paused and not paused):
            return []
        record.paused, record.turn = paused, record.turn + 1
        record.heard_at, record.asked = now, 0
        self._schedule(record)
        return [
            Reading(gateway=self._gateway, request_id=request_id, turn=record.turn, paused=paused)
        ]

    def handle(self, event: AnyMessage, now: float) -> list[Output]:
        """What the mesh says to gateways; anything else is no news."""
        match event:
            case TokenBatch():
                return self._take_tokens(event, now)
            case SchedulerBeat():
                return self._take_beat(event, now)
            case Recall():
                return self._take_recall(event)
            case Rejected():
                return self._take_rejection(event)
            case Accepted():
                return self._take_promise(event)
            case _:
                return []

    def reconnected(self, now: float) -> list[Output]:
        """The connection was lost, and messages with it perhaps: ask about all open requests; what
        a slow reader misses is asked for when it has caught up. Questions of before may be lost
        too, so patience begins anew."""
        missing = [record for record in self._records.values() if not record.paused]
        for record in missing:
            record.asked = 0
        return [self._ask(record, now) for record in missing]

    def deadline(self) -> float | None:
        """When to call `wake` next."""
        return self._due[0][0] if self._due else None

    def wake(self, now: float) -> list[Output]:
        """Expires requests and asks for missing tokens."""
        outputs: list[Output] = []
        while self._due and self._due[0][0] <= now:
            due_at, request_id = heapq.heappop(self._due)
            record = self._records.get(request_id)
            if record is None or record.due_at != due_at:
                continue
            if self._next_due(record) <= now:
                outputs += self._overdue(record, now)
            if request_id in self._records:
                self._schedule(record)
        return outputs

    # ------------------------------------------------------------------------------- events

    def _take_tokens(self, batch: TokenBatch, now: float) -> list[Output]:
        outputs: list[Output] = []
        acknowledged: list[str] = []
        for run in batch.runs:
            record = self._records.get(run.request_id)
            if record is None:
                self.counts["unknown"] += 1
                if run.finish_reason is not None:
                    acknowledged.append(run.request_id)
                continue
            verdict, arrived = record.accept(run, now)
            self.counts[verdict] += 1
            outputs += arrived
            if self._next_due(record) < record.due_at:
                self._schedule(record)
            if record.finish_reason is not None:
                del self._records[run.request_id]
                outputs.append(Ended(run.request_id, record.finish_reason, record.detail))
                acknowledged.append(run.request_id)
        if acknowledged:
            outputs.append(self._acknowledge(batch.worker, acknowledged))
        return outputs

    def _take_beat(self, beat: SchedulerBeat, now: float) -> list[Output]:
        if beat.epoch < self.epoch:
            self.counts["old_epoch"] += 1
            return []
        self.beat, self.beat_at = beat, now
        if beat.workers:
            self.workerless_since = None
        elif self.workerless_since is None:
            self.workerless_since = now
        return self._follow(beat.epoch)

    def _take_recall(self, recall: Recall) -> list[Output]:
        if recall.epoch < self.epoch:
            self.counts["old_epoch"] += 1
            return []
        record = self._records.get(recall.request_id)
        if record is None:
            unknown = Cancel(gateway=self._gateway, request_id=recall.request_id)
            return [*self._follow(recall.epoch), unknown]
        record.close_attempts(recall.attempt)
        if recall.epoch > self.epoch:
            return self._follow(recall.epoch)
        return [self._resume(record)]

    def _take_rejection(self, rejection: Rejected) -> list[Output]:
        if rejection.epoch < self.epoch:
            self.counts["old_epoch"] += 1
            return []
        outputs = self._follow(rejection.epoch)
        if self._records.pop(rejection.request_id, None) is not None:
            outputs.append(Refused(rejection.request_id, rejection))
        return outputs

    def _take_promise(self, accepted: Accepted) -> list[Output]:
        if accepted.epoch < self.epoch:
            self.counts["old_epoch"] += 1
            return []
        outputs = self._follow(accepted.epoch)
        if accepted.request_id in self._records:
            news = Promised(accepted.request_id, accepted.start_s, accepted.finish_s)
            outputs.append(news)
        return outputs

    # -------------------------------------------------------------------------------- answers

    def _follow(self, epoch: int) -> list[Output]:
        """A new leader must hear of all open requests."""
        if epoch <= self.epoch:
            return []
        self.epoch = epoch
        return [self._resume(record) for record in self._records.values()]

    def _resume(self, record: Record) -> Resume:
        self.counts["resumed"] += 1
        return Resume(
            spec=record.spec,
            attempt=record.closed_attempt,
            tokens=record.packed(),
            paused=record.paused,
            turn=record.turn,
        )

    def _acknowledge(self, worker: str, request_ids: Sequence[str]) -> FinishAck:
        return FinishAck(gateway=self._gateway, worker=worker, request_ids=tuple(request_ids))

    # ----------------------------------------------------------------------------------- time

    def _next_due(self, record: Record) -> float:
        """When this record needs attention if nothing more is heard."""
        if record.paused:
            return record.expires_at
        if record.gap_since is not None:
            since, wait_s = record.gap_since, self._patience.gap_s
        elif record.position:
            since, wait_s = record.heard_at, self._patience.silence_s
        else:
            since, wait_s = record.heard_at, self._patience.first_silence_s
        if record.asked:
            since = record.asked_at
            wait_s *= 2.0 ** min(record.asked, ASK_DOUBLINGS_MAX)
        return min(record.expires_at, since + wait_s)

    def _schedule(self, record: Record) -> None:
        due_at = self._next_due(record)
        if due_at != record.due_at:
            record.due_at = due_at
            heapq.heappush(self._due, (due_at, record.spec.request_id))

    def _overdue(self, record: Record, now: float) -> list[Output]:
        request_id = record.spec.request_id
        if now >= record.expires_at:
            return [*self.cancel(request_id), Expired(request_id)]
        return [self._ask(record, now)]

    def _ask(self, record: Record, now: float) -> TokensWanted:
        record.asked += 1
        record.asked_at = now
        self.counts["asked"] += 1
        return TokensWanted(
            gateway=self._gateway,
            request_id=record.spec.request_id,
            attempt=max(record.seen_attempt, record.closed_attempt),
            position=record.position,
        )
