"""Stop strings: where a growing text must end.

The rule does not depend on how the text was cut into pieces: the output ends at the first
character that completes any stop string; if it completes several, the longest counts. Text that
may still become a stop string is held back.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Released:
    """Text that nothing can take back any more."""

    text: str
    stopped_by: str | None = None


class StopFinder:
    """Watches one text for stop strings."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops = tuple(stop for stop in stops if stop)
        self._include = include
        self._held = ""

    def push(self, piece: str) -> Released:
        """Adds text. After `stopped_by` was set, nothing may be pushed."""
        if not self._stops:
            return Released(piece)
        text = self._held + piece
        found = self._first_stop(text)
        if found is not None:
            start, stop = found
            self._held = ""
            end = start + len(stop) if self._include else start
            return Released(text[:end], stopped_by=stop)
        keep = self._undecided(text)
        self._held = text[len(text) - keep :]
        return Released(text[: len(text) - keep])

    def flush(self) -> str:
        """The held text: no stop string will come."""
        held, self._held = self._held, ""
        return held

    def _first_stop(self, text: str) -> tuple[int, str] | None:
        """(start, stop) of the stop string that is complete first."""
        best: tuple[int, int, str] | None = None
        for stop in self._stops:
            start = text.find(stop)
            if start >= 0 and (best is None or (start + len(stop), start) < best[:2]):
                best = (start + len(stop), start, stop)
        return None if best is None else (best[1], best[2])

    def _undecided(self, text: str) -> int:
        """Length of the longest end of `text` that begins a stop string."""
        longest = 0
        for stop in self._stops:
            for length in range(min(len(stop) - 1, len(text)), longest, -1):
                if text.endswith(stop[:length]):
                    longest = length
                    break
        return longest
