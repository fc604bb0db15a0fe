"""The survey part's results by study and label; means are over seeds."""

from collections.abc import Sequence
from statistics import fmean

from sim.reproduction.survey_runs import Figures


class Results:
    """Figures of all runs."""

    def __init__(self, results: Sequence[Figures]) -> None:
        self._found: dict[tuple[str, str], list[Figures]] = {}
        for figures in results:
            self._found.setdefault((figures.task.study, figures.task.label), []).append(figures)

    def runs(self, study: str, label: str) -> list[Figures]:
        """One for each seed, in their order."""
        return sorted(self._found[study, label], key=lambda figures: figures.task.seed)

    def labels(self, study: str) -> list[str]:
        """In the order in which they were asked for."""
        return [label for name, label in self._found if name == study]

    def mean(self, study: str, label: str, name: str) -> float:
        """Of one field of the figures."""
        return fmean(getattr(figures, name) for figures in self.runs(study, label))

    def of_bound(self, study: str, label: str) -> float:
        """Output tokens per second over the fluid bound's."""
        return fmean(f.tps / f.bound_tps for f in self.runs(study, label))

    def change(self, study: str, label: str, base: str, name: str) -> float:
        """A label's mean over another's, less 1; seed by seed they saw the same requests."""
        return self.mean(study, label, name) / max(self.mean(study, base, name), 1e-9) - 1

    def ratios(self, study: str, label: str, base: str, name: str) -> list[float]:
        """The same for each seed, as a ratio."""
        pairs = zip(self.runs(study, label), self.runs(study, base), strict=True)
        return [getattr(one, name) / getattr(other, name) for one, other in pairs]
