"""A predictor of output lengths, if one was set: found by its import path, asked with a bound.

Theory of operation. A predictor is a Python object that the operator installed and named; nothing
is unpickled and no code comes from a model's repository. It lives in one daemon thread, so that one
that hangs or fails costs nobody anything: questions wait in a short line, each for `timeout_s` at
most, answers that come later are not sent, and without an answer the scheduler goes by the history,
as it does meanwhile in any case. One that hangs for `HUNG_S` is given up.
"""

import queue
import threading
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import entry_points
from typing import Protocol

from shared.config import SetupError
from shared.messages import Finished, PredictionWanted
from shared.tokens import unpack

GROUP = "tranche.predictors"
"""Entry points of this group may be named instead of an import path."""
BUILT_IN = {"tenant-classes": "services.estimator.core.tenant_classes:TenantClasses"}
WAITING_MAX = 1_024
"""Questions and endings that wait for the predictor; more are not asked or told."""
HUNG_S = 10.0
TOKENS_MAX = 1 << 20


@dataclass(frozen=True, slots=True)
class Asked:
    """A request whose output is to be predicted."""

    model: str
    endpoint: str
    tenant: str
    prompt: Sequence[int]
    """Token ids."""
    max_tokens: int


class Predictor(Protocol):
    """What a predictor has to offer. Both are called in one thread, never at once."""

    def predict(self, asked: Asked) -> int | None:
        """Output tokens to expect; None: no idea."""
        ...

    def learn(self, finished: Finished) -> None:
        """A request ended; `reason` says how."""
        ...


Answer = Callable[[PredictionWanted, int], None]
Factory = Callable[[], Predictor]


def load(path: str) -> Predictor:
    """The predictor of an import path `module:name` or an entry point of GROUP: `name` is called
    without arguments. Raises SetupError."""
    known = {**BUILT_IN, **{entry.name: entry.value for entry in entry_points(group=GROUP)}}
    module, _, name = known.get(path, path).partition(":")
    try:
        made: Predictor = getattr(import_module(module), name)()
    except Exception as error:
        raise SetupError(
            f"predictor {path!r}: {type(error).__name__}: {error}; give module:name of a class or "
            f"function that makes one, or one of: {', '.join(sorted(known))}"
        ) from error
    if not (callable(getattr(made, "predict", None)) and callable(getattr(made, "learn", None))):
        raise SetupError(f"predictor {path!r} has no predict and learn")
    return made


@dataclass(slots=True)
class Counts:
    """What became of questions."""

    answered: int = 0
    unknown: int = 0
    """It had no idea."""
    late: int = 0
    failed: int = 0
    refused: int = 0
    """The line was full, or it hangs."""

    def items(self) -> list[tuple[str, int]]:
        names = ("answered", "unknown", "late", "failed", "refused")
        return [(name, getattr(self, name)) for name in names]


@dataclass(slots=True)
class _Question:
    asked: PredictionWanted
    until: float


@dataclass(slots=True)
class PredictorThread:
    """Asks one predictor. `answer` is called in its thread."""

    predictor: Predictor
    timeout_s: float
    answer: Answer
    clock: Callable[[], float] = time.monotonic
    counts: Counts = field(default_factory=Counts)
    error: str = ""
    """Of the latest failure."""
    _line: "queue.Queue[_Question | Finished | None]" = field(
        default_factory=lambda: queue.Queue(WAITING_MAX)
    )
    _busy_since: float | None = None

    def start(self) -> None:
        threading.Thread(target=self._run, name="predictor", daemon=True).start()

    def stop(self) -> None:
        """It ends after what it does now."""
        while True:
            try:
                self._line.put_nowait(None)
                return
            except queue.Full:
                with suppress(queue.Empty):
                    self._line.get_nowait()

    @property
    def hangs(self) -> bool:
        since = self._busy_since
        return since is not None and self.clock() - since > HUNG_S

    def ask(self, wanted: PredictionWanted, waited_s: float) -> None:
        """`waited_s`: how long the question has been on its way."""
        left_s = self.timeout_s - waited_s
        if left_s <= 0:
            self.counts.late += 1
        elif not self._put(_Question(wanted, self.clock() + left_s)):
            self.counts.refused += 1

    def learn(self, finished: Finished) -> None:
        self._put(finished)

    def _put(self, item: _Question | Finished) -> bool:
        if self.hangs:
            return False
        try:
            self._line.put_nowait(item)
        except queue.Full:
            return False
        return True

    def _run(self) -> None:
        while (item := self._line.get()) is not None:
            self._busy_since = self.clock()
            try:
                if isinstance(item, Finished):
                    self.predictor.learn(item)
                else:
                    self._predict(item)
            except Exception as error:  # whatever somebody else's code does
                self.counts.failed += 1
                self.error = f"{type(error).__name__}: {error}"
            finally:
                self._busy_since = None

    def _predict(self, question: _Question) -> None:
        if self.clock() > question.until:
            self.counts.late += 1
            return
        wanted = question.asked
        told = self.predictor.predict(
            Asked(
                model=wanted.model,
                endpoint=wanted.endpoint,
                tenant=wanted.tenant,
                prompt=unpack(wanted.prompt),
                max_tokens=wanted.max_tokens,
            )
        )
        if told is None:
            self.counts.unknown += 1
        elif self.clock() > question.until:
            self.counts.late += 1
        else:
            self.counts.answered += 1
            self.answer(wanted, min(TOKENS_MAX, max(1, int(told))))
