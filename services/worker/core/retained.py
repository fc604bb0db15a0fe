"""Tokens kept after they were sent, until the gateway confirms a request's end.

Should a message to a gateway be lost, the scheduler asks for the tokens again (`SendTokens`).
"""

from collections import OrderedDict
from dataclasses import dataclass

from services.worker.core.outbox import join_runs
from shared.messages import TokenRun
from shared.tokens import TOKEN_BYTES, count

REQUESTS_MAX = 10_000
"""Requests kept; at 1,000 tokens each that is 40 MB without logprobs."""
KEPT_S = 120.0
"""After the last token. A gateway asks within seconds; a request that went on elsewhere is never
confirmed here."""


@dataclass(slots=True)
class _Kept:
    """All tokens that this worker made for a request's latest attempt."""

    run: TokenRun
    gateway: str
    at: float


class Retained:
    """What was sent to gateways, by request; the least recently changed first."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, _Kept] = OrderedDict()

    def add(self, run: TokenRun, gateway: str, now: float) -> None:
        """Keep a run; one that does not follow the kept one replaces it."""
        kept = self._kept.pop(run.request_id, None)
        joined = join_runs(kept.run, run) if kept is not None else None
        self._kept[run.request_id] = _Kept(joined or run, gateway, now)
        self._clean(now)

    def run_from(self, request_id: str, attempt: int, position: int) -> tuple[str, TokenRun] | None:
        """Gateway and kept tokens of this attempt from `position` on; None if they are not all
        here."""
        kept = self._kept.get(request_id)
        if kept is None or kept.run.attempt != attempt:
            return None
        run = kept.run
        skipped = position - run.position
        if not 0 <= skipped <= count(run.ids):
            return None
        return kept.gateway, TokenRun(
            request_id=request_id,
            attempt=attempt,
            position=position,
            ids=run.ids[skipped * TOKEN_BYTES :],
            finish_reason=run.finish_reason,
            ending_token=run.ending_token,
            logprobs=run.logprobs[skipped:],
            prompt_logprobs=run.prompt_logprobs if skipped == 0 else (),
            detail=run.detail,
        )

    def forget(self, request_id: str, attempt: int | None = None) -> None:
        """Forget a request; with `attempt`, only if the kept one is not newer."""
        kept = self._kept.get(request_id)
        if kept is not None and (attempt is None or kept.run.attempt <= attempt):
            del self._kept[request_id]

    def _clean(self, now: float) -> None:
        while self._kept:
            request_id, oldest = next(iter(self._kept.items()))
            if len(self._kept) <= REQUESTS_MAX and now - oldest.at < KEPT_S:
                return
            del self._kept[request_id]
