"""Chance: admission by a calibrated chance that memory will not last.

Theory of operation. Each request of a batch, t tokens from now, holds its prompt, its output and t
more with the chance S that it still runs, and nothing otherwise. So the batch's memory at t has a
mean and a variance, and what it needs is the largest mean + z deviations over a grid of instants
ahead. z is no setting: every eviction raises it and every finished request lowers it, in such
proportion that it stands still when the wanted share of requests is evicted. One target serves all
workloads, since z makes up for whatever the survival function or the normal law gets wrong. No
number is drawn. Rules: research notes on `tranche`, section 1 [T].
"""

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from services.scheduler.core.policies.members import Columns, Ints, Member, View, columns
from services.scheduler.core.settings import Constants

Floats = NDArray[np.float64]
Z_START, Z_LEAST, Z_MOST = 1.7, -1.5, 8.0
"""Deviations: before anything is known, and the limits of the calibration."""
LATELY = 0.02
"""Of a new sample in a mean: about the last fifty count."""
TARGET_LEAST = 0.01
"""Down to which the target follows the price of an eviction; `chance_target` is the most."""
PRICED = 0.012
"""Time saved per e-fold of evictions, as a share of the time of a request: 0.008 to 0.03 in the
memory-only experiment, by workload. The target that costs least is this over an eviction's price in
requests."""


@dataclass(slots=True)
class Margin:
    """z: how many deviations are kept free, calibrated by what happens."""

    z: float = Z_START
    finished: int = 0
    evicted: int = 0
    mean_volume: float = 1e5
    """Input x output + output^2 / 2 of the requests that came lately, as expected."""
    seen: int = 0
    finished_at: float | None = None
    finish_gap_s: float = 0.0
    """Between two ends, lately."""
    return_s: float = 0.0
    """Seconds of prefill that an eviction lately cost."""

    def saw_volume(self, volume: float) -> None:
        """One came."""
        self.seen += 1
        self.mean_volume += (volume - self.mean_volume) * max(LATELY, 1 / self.seen)

    def saw_eviction(self, constants: Constants, target: float, return_s: float = 0.0) -> None:
        """Memory did not last for one, which will be back after so many seconds of prefill."""
        self.evicted += 1
        self.return_s += (return_s - self.return_s) * max(LATELY, 1 / self.evicted)
        self._move(constants.chance_rate * (1 - target))

    def saw_finish(self, constants: Constants, target: float, now: float | None = None) -> None:
        """One came to its end."""
        self.finished += 1
        if now is not None:
            gap_s = now - (now if self.finished_at is None else self.finished_at)
            self.finish_gap_s += (gap_s - self.finish_gap_s) * max(LATELY, 1 / self.finished)
            self.finished_at = now
        self._move(-constants.chance_rate * target)

    def target(self, constants: Constants, workers: int) -> float:
        """The wanted share of evictions. Its price in requests is the time that coming back takes a
        worker, over the time that a worker spends on a request."""
        if not (constants.chance_priced and self.finish_gap_s > 0 and self.return_s > 0):
            return constants.chance_target
        price = self.return_s / (max(1, workers) * self.finish_gap_s)
        return min(constants.chance_target, max(TARGET_LEAST, PRICED / price))

    def _move(self, step: float) -> None:
        self.z = min(Z_MOST, max(Z_LEAST, self.z + step))


Moments = tuple[Floats, Floats]
"""Mean and variance of what requests (rows) hold at instants (columns)."""


class ChanceGate:
    """The batch's mean and variance on the grid, to which candidates are added."""

    lasting = False
    """As outputs go on, chances change: what is refused now may fit later."""

    def __init__(self, view: View) -> None:
        self._constants, self._z = view.constants, view.margin_z
        self._survival = view.lengths.survival
        members = columns(view.members)
        self._block = max(1, view.block_tokens)
        self._capacity = max(0, view.capacity_tokens) // self._block * self._block
        self.needed, self.room = 0.0, float(self._capacity)
        self._lag = 0 if view.constants.count_last_token else 1
        self._running = len(members)
        self._members = [members]
        self._look_ahead(members.cap)

    def _look_ahead(self, cap: Ints) -> None:
        """Anew, as far as requests of these limits may go."""
        self._cap = int(cap.max(initial=1))
        self._ahead = self._survival.horizon(self._cap)
        self._mean, self._variance = np.zeros((2, len(self._ahead)))
        for members in self._members:
            mean, variance = self.moments(members)
            self._mean += mean.sum(axis=0)
            self._variance += variance.sum(axis=0)

    def admits(self, candidate: Member) -> bool:
        """May it join? Nothing changes."""
        if self._running == 0 and candidate.held <= self._capacity:
            return True
        self.needed = self.need(candidate)
        return self.needed < self._capacity

    def need(self, candidate: Member) -> float:
        """The tokens that the batch would need with it, at the worst instant."""
        moments = self.moments(columns((candidate,)))
        return float(self.needs(moments, np.array((candidate.returning,)))[0])

    def needs(self, candidates: Moments, returning: NDArray[np.bool_]) -> Floats:
        """The same with each of several candidates alone; `returning` as of a Member."""
        mean, variance = candidates
        z = self._z - self._constants.chance_return_less * returning
        spread = np.sqrt(self._variance + variance)
        needs: Floats = (self._mean + mean + z[:, None] * spread).max(axis=1)
        return needs

    def add(self, candidate: Member) -> None:
        """It joins."""
        joined = columns((candidate,))
        mean, variance = self.moments(joined)
        self._members.append(joined)
        self._mean += mean[0]
        self._variance += variance[0]
        self._running += 1

    def moments(self, members: Columns) -> Moments:
        """Mean and variance of what each one holds (rows) at each instant (columns), in tokens;
        half of the last block of each is empty on average."""
        if members.cap.max(initial=0) > self._cap:
            self._look_ahead(members.cap)
        chance = self._survival.chances(members.reached, members.cap, members.kind, self._ahead)
        held = (members.prompt + members.reached)[:, None] + self._ahead
        if members.leased is not None:
            held = np.maximum(held, (members.prompt + members.made)[:, None])
        mean = chance * (held - self._lag + (self._block - 1) / 2)
        return mean, np.maximum(0.0, mean * held * (1 - chance))


def chance(view: View) -> ChanceGate:
    """A calibrated chance: mean + z deviations of the future memory, by the survival function of
    each class of requests, stay within memory; z follows the evictions, so that one target share
    (`chance_target`) holds on every workload. One that comes back is spared
    `chance_return_less` deviations [T]."""
    return ChanceGate(view)
