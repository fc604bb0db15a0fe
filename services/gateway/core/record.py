"""One open request's output: which tokens are there, which are missing, whom to believe.

Theory of operation. The output is one growing array of ids. A run of tokens is believed if its
attempt is not closed; it is cut to what is new. A run that starts beyond the end waits in a small
buffer until the missing part arrives. The finish counts once every token before it is there.
"""

from array import array
from dataclasses import dataclass, field
from typing import Literal

from shared.messages import FinishReason, RequestSpec, TokenLogprobs, TokenRun
from shared.tokens import TOKEN_BYTES, count, pack, unpack

PARKED_RUNS_MAX = 64
"""Runs that wait behind a gap. Beyond that they are dropped and asked for again later."""

Verdict = Literal["new", "repeated", "closed", "parked", "dropped", "conflict", "malformed"]
"""What became of a run. `dropped`: too many wait behind a gap already. `conflict`: it contradicts
a token that is already there; the first word holds."""


@dataclass(frozen=True, slots=True)
class Arrived:
    """Output tokens in order, each seen exactly once."""

    request_id: str
    position: int
    ids: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    ending_token: bool = False


@dataclass(slots=True)
class Record:
    """The book of one open request."""

    spec: RequestSpec
    heard_at: float
    """When it last made progress, or was opened."""
    expires_at: float
    closed_attempt: int = 0
    """Attempts up to this one are not believed any more."""
    seen_attempt: int = 0
    tokens: "array[int]" = field(default_factory=lambda: array("I"))
    parked: list[TokenRun] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    detail: str = ""
    gap_since: float | None = None
    asked: int = 0
    """How often missing tokens were asked for since the last progress."""
    asked_at: float = 0.0
    prompt_scored: bool = False
    paused: bool = False
    """Its client is behind with reading: nothing is missed until it has caught up."""
    turn: int = 0
    """Words about that so far."""
    due_at: float = 0.0
    """When the ledger looks at it again."""

    @property
    def position(self) -> int:
        """Output tokens so far."""
        return len(self.tokens)

    def packed(self) -> bytes:
        """The output so far, as it goes over the wire."""
        return pack(self.tokens)

    def close_attempts(self, attempt: int) -> None:
        """From now on nothing is believed from attempts up to this one."""
        self.closed_attempt = max(self.closed_attempt, attempt)
        self.parked = [run for run in self.parked if run.attempt > self.closed_attempt]
        if not self.parked:
            self.gap_since = None

    def accept(self, run: TokenRun, now: float) -> tuple[Verdict, list[Arrived]]:
        """Takes a run in; returns what became of it and the tokens that are now in order."""
        if len(run.ids) % TOKEN_BYTES or len(run.logprobs) not in (0, count(run.ids)):
            return "malformed", []
        if run.attempt <= self.closed_attempt:
            return "closed", []
        self.seen_attempt = max(self.seen_attempt, run.attempt)
        if run.position > self.position:
            return self._park(run, now), []
        verdict, arrived = self._join(run)
        if verdict == "new":
            self.heard_at, self.asked = now, 0
            if self.parked:
                arrived += self._join_parked()
            self.gap_since = now if self.parked else None
        return verdict, arrived

    def _park(self, run: TokenRun, now: float) -> Verdict:
        if run in self.parked:
            return "repeated"
        if self.gap_since is None:
            self.gap_since = now
        if len(self.parked) >= PARKED_RUNS_MAX:
            return "dropped"
        self.parked.append(run)
        return "parked"

    def _join(self, run: TokenRun) -> tuple[Verdict, list[Arrived]]:
        """Appends the new part of a run that starts at or before the end."""
        ids = unpack(run.ids)
        known = len(self.tokens) - run.position
        if known and array("I", ids[:known]) != self.tokens[run.position : run.position + len(ids)]:
            return "conflict", []
        new = tuple(ids[known:] if known else ids)
        ends = run.finish_reason is not None and len(ids) >= known
        prompt_logprobs = () if self.prompt_scored else run.prompt_logprobs
        if not new and not ends and not prompt_logprobs:
            return "repeated", []
        self.tokens.extend(new)
        if ends:
            self.finish_reason, self.detail = run.finish_reason, run.detail
        if not new and not prompt_logprobs:
            return "new", []
        self.prompt_scored = self.prompt_scored or bool(prompt_logprobs)
        arrived = Arrived(
            request_id=self.spec.request_id,
            position=run.position + known,
            ids=new,
            logprobs=run.logprobs[known:],
            prompt_logprobs=prompt_logprobs,
            ending_token=run.ending_token,
        )
        return "new", [arrived]

    def _join_parked(self) -> list[Arrived]:
        """Appends parked runs as long as one fits."""
        arrived: list[Arrived] = []
        while self.finish_reason is None:
            fitting = [run for run in self.parked if run.position <= self.position]
            if not fitting:
                break
            for run in fitting:
                self.parked.remove(run)
                arrived += self._join(run)[1]
        return arrived
