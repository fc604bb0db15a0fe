"""Checked: no request is lost or ends twice, and every text is whole and its own."""

from dataclasses import dataclass, field

from shared.messages import Cancel, Finished, Rejected, Resume, Submit, TokenBatch, TokenRun
from shared.tokens import count
from sim.checker import Checker, Facts, Tell
from sim.text import output, output_begins


@dataclass(slots=True)
class _Text:
    """What a gateway has of one request."""

    limit: int
    begins: int
    position: int = 0
    closed: int = 0
    ended: bool = False
    beyond: list[TokenRun] = field(default_factory=list)


class TextChecker(Checker):
    """No request is lost or ends twice; its text is whole, its own, and of the right length."""

    rule = "text"

    def __init__(self, facts: Facts, tell: Tell) -> None:
        super().__init__(facts, tell)
        self._texts: dict[str, _Text] = {}
        self._published: set[tuple[int, str]] = set()

    def see(self, at: float, moment: str, message: object) -> None:
        match message:
            case TokenBatch() if moment == "got":
                for run in message.runs:
                    self._take(at, run)
            case Submit() if moment == "sent":
                spec = message.spec
                begins = output_begins(spec.request_id)
                self._texts.setdefault(spec.request_id, _Text(spec.max_tokens, begins))
            case Resume() if moment == "sent":
                text = self._texts[message.spec.request_id]
                text.closed = max(text.closed, message.attempt)
                if message.tokens != output(text.begins, 0, text.position):
                    self.tell(at, f"{message.spec.request_id} resumes with other tokens")
            case Cancel() if moment == "sent":
                self._over(message.request_id)
            case Rejected() if moment == "got":
                self._over(message.request_id)
            case Finished() if moment == "sent":
                self._finished(at, message)

    def _over(self, request_id: str) -> None:
        if request_id in self._texts:
            self._texts[request_id].ended = True

    def _take(self, at: float, run: TokenRun) -> None:
        text = self._texts.get(run.request_id)
        if text is None:
            self.tell(at, f"tokens of {run.request_id}, which nobody submitted")
            return
        if text.ended or run.attempt <= text.closed:
            return
        if run.ids != output(text.begins, run.position, count(run.ids)):
            self.tell(at, f"{run.request_id} has foreign tokens from {run.position} on")
        if run.position > text.position:
            text.beyond.append(run)
            if self.facts.calm:
                self.tell(at, f"{run.request_id} misses tokens {text.position}-{run.position}")
            return
        if self.facts.calm and run.ids and run.position < text.position:
            self.tell(at, f"{run.request_id} gets tokens from {run.position} on twice")
        self._join(at, text, run)
        while True:
            fitting = [r for r in text.beyond if r.position <= text.position]
            if not fitting or text.ended:
                return
            for later in fitting:
                text.beyond.remove(later)
                if later.attempt > text.closed:
                    self._join(at, text, later)

    def _join(self, at: float, text: _Text, run: TokenRun) -> None:
        end = run.position + count(run.ids)
        text.position = max(text.position, end)
        expected = min(self.facts.lengths[run.request_id], text.limit)
        if text.position > expected:
            self.tell(at, f"{run.request_id} has {text.position} tokens instead of {expected}")
        if run.finish_reason is not None and end >= text.position:
            text.ended = True
            if run.finish_reason != "error" and text.position != expected:
                self.tell(at, f"{run.request_id} ends at {text.position} instead of {expected}")

    def _finished(self, at: float, message: Finished) -> None:
        key = (message.epoch, message.request_id)
        if key in self._published:
            self.tell(at, f"{message.request_id} is published twice")
        self._published.add(key)
        expected = min(self.facts.lengths[message.request_id], message.max_tokens)
        whole = message.reason in ("stop", "length")
        if whole and message.output_tokens != expected:
            self.tell(at, f"{message.request_id} is published with {message.output_tokens} tokens")

    def end(self, at: float) -> None:
        for request_id, text in self._texts.items():
            if not text.ended:
                self.tell(at, f"{request_id} never ended; it has {text.position} tokens")
