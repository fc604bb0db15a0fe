"""The text of one choice: from the ledger's token ids to what its client may see.

Theory of operation. `push` runs each id through the detokenizer and the stop finder and keeps what
came out as pending; `take` hands all pending out as one `Delta`, so a slow client gets fewer and
larger pieces. The output ends once: by `push` (a stop string) or by `finish`.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from services.gateway.core.stops import StopFinder
from services.gateway.core.text import Detokenizer
from shared.messages import FinishReason, TokenLogprobs


@dataclass(frozen=True, slots=True)
class ScoredToken:
    """An output token with its logprobs and the place of its text."""

    token_id: int
    scores: TokenLogprobs
    offset: int
    """Characters of output text before this token's own."""


@dataclass(slots=True)
class Delta:
    """What is new for the client since the last one."""

    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    scored: list[ScoredToken] = field(default_factory=list)
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or the ending token, if the output ended by one."""
    detail: str = ""
    """Why, if the reason is `error`."""


class Transcript:
    """One choice's output as text."""

    def __init__(
        self,
        detokenizer: Detokenizer,
        stops: Sequence[str] = (),
        *,
        include_stop: bool = False,
        min_tokens: int = 0,
    ) -> None:
        """Stop strings count only in text of tokens past `min_tokens`."""
        self._detokenizer = detokenizer
        self._finder = StopFinder(stops, include=include_stop)
        self._unstoppable = not any(stops)
        self._min_tokens = min_tokens
        self._texts: list[str] = []
        self._token_ids: list[int] = []
        self._scored: deque[ScoredToken] = deque()
        self._pushed_characters = 0
        self._released_characters = 0
        self._stop_reason: str | int | None = None
        self._detail = ""
        self._finish_told = False
        self.output_tokens = 0
        self.pending_characters = 0
        self.finish_reason: FinishReason | None = None

    def push(
        self,
        ids: Sequence[int],
        logprobs: Sequence[TokenLogprobs] = (),
        *,
        ending_token: bool = False,
    ) -> int | None:
        """Adds output tokens; the last one is no text if it is an `ending_token`.

        The number of output tokens at which a stop string ended the output, or None.
        """
        last = len(ids) - 1
        for index, token_id in enumerate(ids):
            if self.finish_reason is not None:
                return None
            self.output_tokens += 1
            self._token_ids.append(token_id)
            if ending_token and index == last:
                self._stop_reason = token_id
                continue
            if logprobs:
                scored = ScoredToken(token_id, logprobs[index], self._pushed_characters)
                self._scored.append(scored)
            if self._release(self._detokenizer.push(token_id)):
                return self.output_tokens
        return None

    def finish(self, reason: FinishReason, detail: str = "") -> int | None:
        """The ledger says that the output is complete. What is held back becomes text; if that
        completes a stop string, the number of output tokens, else None."""
        if self.finish_reason is not None:
            return None
        if self._release(self._detokenizer.flush()):
            return self.output_tokens
        self._append(self._finder.flush())
        self.finish_reason = reason
        self._detail = detail
        return None

    def take(self) -> Delta | None:
        """All that is new, or None. The delta with the finish reason is the last."""
        ends = self.finish_reason is not None and not self._finish_told
        if not self._texts and not ends:
            return None
        delta = Delta("".join(self._texts), self._token_ids, self._take_scored())
        self._texts, self._token_ids = [], []
        self.pending_characters = 0
        if ends:
            self._finish_told = True
            delta.finish_reason = self.finish_reason
            delta.stop_reason = self._stop_reason if self.finish_reason == "stop" else None
            delta.detail = self._detail
        return delta

    @property
    def done(self) -> bool:
        """The last delta was taken."""
        return self._finish_told

    def _release(self, piece: str) -> bool:
        """Passes text on as far as the stop strings allow; true if one ended the output."""
        if not piece:
            return False
        self._pushed_characters += len(piece)
        if self._unstoppable or self.output_tokens <= self._min_tokens:
            self._append(piece)
            return False
        released = self._finder.push(piece)
        self._append(released.text)
        if released.stopped_by is None:
            return False
        self._stop_reason = released.stopped_by
        self.finish_reason = "stop"
        self._pushed_characters = self._released_characters
        return True

    def _append(self, text: str) -> None:
        if text:
            self._texts.append(text)
            self.pending_characters += len(text)
            self._released_characters += len(text)

    def _take_scored(self) -> list[ScoredToken]:
        """Scores of the tokens whose text is out. Tokens of a cut-off stop string are dropped."""
        taken = []
        all_out = self._released_characters == self._pushed_characters
        stopped = self.finish_reason == "stop" and isinstance(self._stop_reason, str)
        while self._scored:
            inside = self._scored[0].offset < self._released_characters
            if not inside and (stopped or not all_out):
                break
            taken.append(self._scored.popleft())
        return taken
