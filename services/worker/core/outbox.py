"""Tokens on their way to gateways: coalesced, one message per gateway under way at a time.

A gateway that nothing was sent to lately gets its tokens at once, and so it does where a request's
first token is among them; else its runs are joined for `COALESCE_S`. While a message is not yet
confirmed, runs go on being joined, so a slow line makes larger messages, not more of them; runs of
one request always join, so what waits is bounded by the tokens of the requests that are here.
"""

from dataclasses import dataclass, field

from services.worker.engines.api import StepTokens
from shared.messages import TokenBatch, TokenRun
from shared.tokens import pack

COALESCE_S = 0.03
"""A token is held back this long at most; a reader does not notice, the broker does."""
RETRY_S = 0.5
"""After a failed sending."""
GATEWAY_GONE_S = 5.0
"""A gateway without a queue for this long is gone; after a broker's restart it needs a moment to
have one again. What is dropped here can still be asked for."""
GATEWAYS_MAX = 1_000
"""Gateways remembered; the ones with nothing to send are forgotten first."""


@dataclass(slots=True)
class _Line:
    """What waits for one gateway."""

    runs: dict[str, list[TokenRun]] = field(default_factory=dict)
    """By request; several runs only where they do not join."""
    under_way: bool = False
    joins_until: float = 0.0
    """Tokens are held back until then, to be joined by others."""
    retry_at: float = 0.0
    unroutable_since: float | None = None

    def due_at(self, *, at_once: bool = False) -> float:
        """When what waits may go. `at_once`: without waiting for more to join."""
        return self.retry_at if at_once else max(self.retry_at, self.joins_until)


class Outbox:
    """See the module's text."""

    def __init__(self, worker: str) -> None:
        self._worker = worker
        self._lines: dict[str, _Line] = {}

    @property
    def empty(self) -> bool:
        """Nothing waits and nothing is under way."""
        return not any(line.runs or line.under_way for line in self._lines.values())

    def add(self, gateway: str, run: TokenRun) -> None:
        """Put a run behind what waits for this gateway."""
        line = self._lines.setdefault(gateway, _Line())
        if run.position == 0 and run.ids:
            line.joins_until = 0.0  # somebody waits for it
        runs = line.runs.setdefault(run.request_id, [])
        joined = join_runs(runs[-1], run) if runs else None
        if joined is None:
            runs.append(run)
        else:
            runs[-1] = joined

    def forget(self, request_id: str, attempt: int) -> None:
        """Take back what waits of attempts up to this one."""
        for line in self._lines.values():
            if request_id in line.runs:
                kept = [run for run in line.runs[request_id] if run.attempt > attempt]
                line.runs[request_id] = kept
                if not kept:
                    del line.runs[request_id]

    def due(self, now: float, epoch: int, *, at_once: bool = False) -> list[TokenBatch]:
        """The messages to be sent now. `at_once`: without waiting for more to join."""
        batches = []
        for gateway, line in self._lines.items():
            if not line.runs or line.under_way or now < line.due_at(at_once=at_once):
                continue
            runs = tuple(run for runs in line.runs.values() for run in runs)
            line.runs = {}
            line.under_way = True
            line.joins_until = now + COALESCE_S
            batches.append(TokenBatch(gateway=gateway, worker=self._worker, epoch=epoch, runs=runs))
        return batches

    def deadline(self) -> float | None:
        """When the next message is due."""
        lines = [line for line in self._lines.values() if line.runs and not line.under_way]
        return min((line.due_at() for line in lines), default=None)

    def sent(self, gateway: str) -> None:
        """The broker has confirmed this gateway's message."""
        line = self._lines.get(gateway)
        if line is None:
            return
        line.under_way = False
        line.unroutable_since = None
        if not line.runs and len(self._lines) > GATEWAYS_MAX:
            del self._lines[gateway]

    def failed(self, batch: TokenBatch, now: float, *, unroutable: bool) -> bool:
        """Put the runs of a failed message in front again; False if they are dropped instead,
        because the gateway has had no queue for too long."""
        line = self._lines.setdefault(batch.gateway, _Line())
        line.under_way = False
        line.retry_at = now + RETRY_S
        if not unroutable:
            line.unroutable_since = None
        elif line.unroutable_since is None:
            line.unroutable_since = now
        elif now - line.unroutable_since >= GATEWAY_GONE_S:
            del self._lines[batch.gateway]
            return False
        newer, line.runs = line.runs, {}
        for run in (*batch.runs, *(run for runs in newer.values() for run in runs)):
            self.add(batch.gateway, run)
        return True


def run_of(tokens: StepTokens) -> TokenRun:
    """The engine's word as the gateway's."""
    return TokenRun(
        request_id=tokens.request_id,
        attempt=tokens.attempt,
        position=tokens.position,
        ids=pack(tokens.ids),
        finish_reason=tokens.finish_reason,
        ending_token=tokens.ending_token,
        logprobs=tokens.logprobs,
        prompt_logprobs=tokens.prompt_logprobs,
    )


def join_runs(earlier: TokenRun, later: TokenRun) -> TokenRun | None:
    """One run of both, if the later one follows the earlier one without a gap."""
    follows = earlier.position + len(earlier.ids) // 4 == later.position
    same = earlier.request_id == later.request_id and earlier.attempt == later.attempt
    # An earlier run's logprobs can be carried on only if the later run has them too.
    whole = bool(earlier.logprobs) == bool(later.logprobs) or not (earlier.ids and later.ids)
    if not (follows and same and whole) or earlier.finish_reason is not None:
        return None
    return TokenRun(
        request_id=later.request_id,
        attempt=later.attempt,
        position=earlier.position,
        ids=earlier.ids + later.ids,
        finish_reason=later.finish_reason,
        ending_token=later.ending_token,
        logprobs=earlier.logprobs + later.logprobs,
        prompt_logprobs=earlier.prompt_logprobs or later.prompt_logprobs,
        detail=later.detail,
    )
