"""Outputs: how long the outputs of like prompts lately were, for predictions of a finish.

Requests are alike if their prompts are: on the Azure conversations the median of all outputs misses
a request's own by 66 % (median), the median of outputs after prompts within 9 % of its length by
13 %. Where the prompt says little (ShareGPT) nothing is lost. An output that its limit or its
client cut says only that it would have been longer: its weight goes to the longer ones, and what is
beyond the longest counts as it. This is soft state: a new leader begins with what the estimator
remembers.
"""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from math import ceil, log2

import numpy as np

from services.scheduler.core.policies.lengths import redistributed

PER_OCTAVE = 8
"""Classes of prompt length in a factor of two."""
KEPT = 64
"""Full outputs remembered of each class, and as many that were cut."""
WANTED = 32
"""With fewer outputs in a class its neighbours count too,"""
REACH = 2 * PER_OCTAVE
"""up to a factor of four away."""
ENOUGH = 8
"""With fewer outputs than this nothing is said."""
GUESSED_TOKENS = 200
"""An output of which nothing is known: between the medians of the Azure conversations (129) and of
ShareGPT (283) [T]. Admission by memory, which has to be careful, has stand-ins of its own."""


@dataclass(slots=True)
class Outputs:
    """Lengths are in tokens. Bounded: a class for each 9 % of prompt length."""

    _classes: dict[int, deque[tuple[int, bool]]] = field(default_factory=dict)
    """Each with whether it was cut: the latest full ones, and of those that were cut since the
    first of them the longest, so that none that was cut puts out one that tells more."""
    _sorted: dict[int, tuple[int, ...]] = field(default_factory=dict)
    """What was said of a class since its neighbourhood last changed."""
    _latest: deque[int] = field(default_factory=lambda: deque(maxlen=WANTED))
    """Of all classes, not cut."""

    def saw(self, prompt_tokens: int, output_tokens: int, *, cut: bool = False) -> None:
        """A request ended; `cut`: not by itself."""
        key = self._note(prompt_tokens, output_tokens, cut)
        for near in range(key - REACH, key + REACH + 1):
            self._sorted.pop(near, None)

    def learn(
        self, prompts: Sequence[int], outputs: Sequence[int], cuts: Sequence[int] = b""
    ) -> None:
        """What somebody else remembers, oldest first; `cuts`: 1 for those that were cut."""
        for number, (prompt_tokens, output_tokens) in enumerate(zip(prompts, outputs, strict=True)):
            self._note(prompt_tokens, output_tokens, cut=number < len(cuts) and cuts[number] != 0)
        self._sorted.clear()

    def _note(self, prompt_tokens: int, output_tokens: int, cut: bool) -> int:
        """The class in which it is."""
        key = _class_of(prompt_tokens)
        if output_tokens > 0:
            known = self._classes.setdefault(key, deque())
            known.append((output_tokens, cut))
            if sum(was_cut == cut for _, was_cut in known) > KEPT:
                _drop_first(known, cut)
            if not cut:
                self._latest.append(output_tokens)
        return key

    def guess(self) -> int:
        """A length where nothing is known of like requests: the median of the latest of all, with
        a guess in the place of those that are too few."""
        missing = max(0, ENOUGH - len(self._latest))
        return middle(sorted((*self._latest, *(GUESSED_TOKENS,) * missing)))

    def __bool__(self) -> bool:
        """Something has been seen."""
        return bool(self._classes)

    def like(self, prompt_tokens: int) -> tuple[int, ...]:
        """Recent outputs of like requests, ascending; empty if too few are known."""
        key = _class_of(prompt_tokens)
        known = self._sorted.get(key)
        if known is None:
            known = self._sorted[key] = self._gather(key)
        return known

    def _gather(self, key: int) -> tuple[int, ...]:
        found = list(self._classes.get(key, ()))
        distance = 0
        while len(found) < WANTED and distance < REACH:
            distance += 1
            found += self._classes.get(key - distance, ())
            found += self._classes.get(key + distance, ())
        if len(found) < ENOUGH:
            return ()
        lengths = sorted(length for length, _ in found)
        if not any(cut and length < lengths[-1] for length, cut in found):
            return tuple(lengths)
        each, cuts = (np.array(column) for column in zip(*found, strict=True))
        return tuple(np.minimum(redistributed(each, cuts), lengths[-1]).tolist())


def _drop_first(known: deque[tuple[int, bool]], cut: bool) -> None:
    """The one that was cut soonest, which tells least; or the oldest full one and all before it."""
    if cut:
        known.remove((min(length for length, was_cut in known if was_cut), True))
        return
    while known.popleft()[1]:
        pass


def quantile(outputs: Sequence[int], level: float) -> int:
    """The least of these ascending lengths that at least this share of them does not exceed."""
    return outputs[min(len(outputs) - 1, max(0, ceil(level * len(outputs)) - 1))]


def middle(outputs: Sequence[int]) -> int:
    """The median of ascending lengths."""
    return outputs[len(outputs) // 2]


def _class_of(prompt_tokens: int) -> int:
    return round(PER_OCTAVE * log2(max(1, prompt_tokens)))
