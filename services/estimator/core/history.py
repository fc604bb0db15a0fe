"""The history: how long the outputs of recently finished requests were, per model.

Theory of operation. A request that ended by itself (`stop`) gives a length. One that was cut by its
token limit (`length`) gives a lower bound: it enters flagged as censored. One that was cancelled or
failed says nothing of lengths and is only counted. Each model keeps a window of its latest
requests, so that drift is forgotten. A request counts once, however often it is reported.
"""

from array import array
from collections import Counter, OrderedDict, deque
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from services.estimator.core.drift import similarity
from shared.messages import Finished, FinishReason, LengthClass, LengthForecast
from shared.tokens import pack

MODELS_MAX = 64
"""Models remembered; beyond it the one that was silent longest goes. A mesh serves a handful."""
RECENT_IDS_MAX = 50_000
"""Request ids remembered to tell repeats: minutes at the highest rates, about 6 MB. The database
remembers more."""
LENGTH_MAX = 2**32 - 1
"""What the packed form holds."""
MODEL_NAME_MAX = 512
"""Characters; hub ids have 96 at most, folders are longer."""

LENGTH_REASONS: tuple[FinishReason, ...] = ("stop", "length")


@dataclass(frozen=True, slots=True)
class Lengths:
    """What a window says, in tokens; quantiles by the nearest rank."""

    requests: int
    mean: float
    p50: int
    p95: int
    censored_share: float


@dataclass(slots=True)
class _Class:
    """One model's window and totals."""

    window: deque[Finished]
    totals: Counter[FinishReason] = field(default_factory=Counter)


class History:
    """Windows of finished requests. `version` rises with every change of a window."""

    def __init__(self, window: int, version: int = 0) -> None:
        """`window`: most requests kept per model. `version`: where to count on from; a start time
        makes it rise over restarts too."""
        assert window > 0
        self._window = window
        self._version = version
        self._classes: OrderedDict[str, _Class] = OrderedDict()
        self._recent_ids: OrderedDict[str, None] = OrderedDict()

    @property
    def version(self) -> int:
        """Higher than any forecast before a change."""
        return self._version

    def knows(self, request_id: str) -> bool:
        """Whether this request was reported lately."""
        return request_id in self._recent_ids

    def add(self, finished: Finished) -> bool:
        """Take a finished request in; False, and nothing happens, if it is known already.

        The caller has asked `fault_of` before.
        """
        assert not fault_of(finished)
        if self.knows(finished.request_id):
            return False
        self._recent_ids[finished.request_id] = None
        if len(self._recent_ids) > RECENT_IDS_MAX:
            self._recent_ids.popitem(last=False)
        known = self._class(finished.model)
        known.totals[finished.reason] += 1
        if finished.reason in LENGTH_REASONS:
            known.window.append(finished)
            self._version += 1
        return True

    def restore(
        self, rows: Iterable[Finished], totals: Mapping[tuple[str, FinishReason], int]
    ) -> None:
        """Begin with what is stored: rows from the oldest to the latest, and how many requests of
        a model ever ended for a reason, these rows counted."""
        for row in rows:
            self.add(row)
        for (model, reason), requests in totals.items():
            if model in self._classes:
                self._classes[model].totals[reason] = requests

    def models(self) -> tuple[str, ...]:
        """The one that was silent longest first."""
        return tuple(self._classes)

    def rows(self) -> tuple[Finished, ...]:
        """All windows, model by model, each oldest first."""
        return tuple(row for known in self._classes.values() for row in known.window)

    def totals(self, model: str) -> dict[FinishReason, int]:
        """How many requests of a model ever ended, by reason."""
        return dict(self._classes[model].totals)

    def lengths(self, model: str) -> Lengths:
        """A model's window in five numbers; all are zero while it is empty."""
        window = self._classes[model].window
        if not window:
            return Lengths(requests=0, mean=0.0, p50=0, p95=0, censored_share=0.0)
        ordered = sorted(row.output_tokens for row in window)
        return Lengths(
            requests=len(ordered),
            mean=sum(ordered) / len(ordered),
            p50=_quantile(ordered, 50),
            p95=_quantile(ordered, 95),
            censored_share=sum(is_censored(row) for row in window) / len(ordered),
        )

    def similarity(self, model: str) -> float | None:
        """How much the newer half of a model's window is like the older, 0 to 1: lower, lengths
        drift. None while the window is short."""
        lengths = [row.output_tokens for row in self._classes[model].window]
        middle = len(lengths) // 2
        return similarity(lengths[:middle], lengths[middle:])

    def forecast(self, *, predicts: bool = False) -> LengthForecast:
        """All that the scheduler wants to know; models without a length are left out."""
        return LengthForecast(
            version=self._version,
            predicts=predicts,
            classes=tuple(
                LengthClass(
                    model=model,
                    lengths=pack(row.output_tokens for row in known.window),
                    censored=array("B", [is_censored(row) for row in known.window]).tobytes(),
                    finished=sum(known.totals[reason] for reason in LENGTH_REASONS),
                    prompts=pack(row.prompt_tokens for row in known.window),
                    predicted=_predicted(known.window),
                )
                for model, known in sorted(self._classes.items())
                if known.window
            ),
        )

    def _class(self, model: str) -> _Class:
        """The model's class, now the latest one."""
        if model not in self._classes:
            self._classes[model] = _Class(deque(maxlen=self._window))
            if len(self._classes) > MODELS_MAX:
                self._classes.popitem(last=False)
                self._version += 1
        self._classes.move_to_end(model)
        return self._classes[model]


def _predicted(window: Iterable[Finished]) -> bytes:
    """Predictions, 0 where there is none; empty if there are none at all."""
    values = [row.predicted_output_tokens or 0 for row in window]
    return pack(values) if any(values) else b""


def is_censored(finished: Finished) -> bool:
    """The token limit cut the output: it would have been longer."""
    return finished.reason == "length"


def fault_of(finished: Finished) -> str:
    """Why a report cannot be true; empty if it can. Nothing on the bus is trusted to be sane."""
    for name in ("prompt_tokens", "output_tokens", "max_tokens", "predicted_output_tokens"):
        value: int = getattr(finished, name) or 0
        if not 0 <= value <= LENGTH_MAX:
            return f"{name} is {value}"
    if not finished.request_id:
        return "no request_id"
    if not finished.model:
        return "no model"
    if len(finished.model) > MODEL_NAME_MAX:
        return f"a model name of {len(finished.model)} characters"
    return ""


def _quantile(ordered: list[int], percent: int) -> int:
    """The smallest value that at least `percent` of the values do not exceed."""
    rank = -(-len(ordered) * percent // 100)
    return ordered[max(0, rank - 1)]
