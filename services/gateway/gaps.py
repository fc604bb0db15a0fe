"""The time between two arrivals of tokens, counted once and reported under three names.

It is observed for every token of every stream; three of Prometheus's own histograms would cost a
tenth of all that a token costs here.
"""

from bisect import bisect_left
from collections.abc import Iterable, Iterator

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from shared.telemetry.metrics import TOKEN_SECONDS


class GapTally:
    """Gaps in buckets, one set for each model. Only the event loop writes; a scrape may read what
    is one gap old."""

    def __init__(self) -> None:
        self._counts: dict[str, list[int]] = {}
        self._sums: dict[str, float] = {}

    def observe(self, model: str, gap_s: float) -> None:
        """One more gap."""
        counts = self._counts.get(model)
        if counts is None:
            counts = self._counts[model] = [0] * (len(TOKEN_SECONDS) + 1)
            self._sums[model] = 0.0
        counts[bisect_left(TOKEN_SECONDS, gap_s)] += 1
        self._sums[model] += gap_s

    @property
    def models(self) -> tuple[str, ...]:
        """Those that had any."""
        return tuple(self._counts)

    def buckets(self, models: Iterable[str]) -> list[tuple[str, float]]:
        """(upper bound, gaps up to it) of these models together."""
        rows, seen, out = [self._counts[model] for model in models], 0, []
        bounds = (*map(floatToGoString, TOKEN_SECONDS), "+Inf")
        for place, bound in enumerate(bounds):
            seen += sum(row[place] for row in rows)
            out.append((bound, float(seen)))
        return out

    def total_s(self, models: Iterable[str]) -> float:
        """Of all their gaps."""
        return sum((self._sums[model] for model in models), start=0.0)


class GapHistogram(Collector):
    """A tally under one of its names: by model, with labels, or of all models together."""

    def __init__(
        self,
        name: str,
        text: str,
        tally: GapTally,
        registry: CollectorRegistry,
        labels: tuple[str, ...] = (),
        more: tuple[str, ...] = (),
    ) -> None:
        """The first of the labels is the model; `more` are the values of the others."""
        self._name, self._text, self._tally = name, text, tally
        self._labelnames, self._more = labels, more
        registry.register(self)

    def describe(self) -> Iterator[HistogramMetricFamily]:
        """The name, without figures."""
        yield HistogramMetricFamily(self._name, self._text, labels=self._labelnames)

    def collect(self) -> Iterator[HistogramMetricFamily]:
        """As Prometheus wants it."""
        family = HistogramMetricFamily(self._name, self._text, labels=self._labelnames)
        models = self._tally.models
        groups = [((model, *self._more), (model,)) for model in models]
        for values, group in groups if self._labelnames else [((), models)]:
            family.add_metric(values, self._tally.buckets(group), self._tally.total_s(group))
        yield family
