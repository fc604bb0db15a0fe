"""Balancing: which worker should a leased request go to? One glance at a few gauges of each.

A balancer gets the gauges, the KV tokens that the request needs now (its input), the workers that
may have it (places in the arrays, rising, at least one), the turn, chance, and the constants; it
answers with a place. Ties rotate with the turn, a number that the caller counts up at each call.
With a thousand workers one call costs 5 to 60 microseconds.

Sources are those of the survey note's section 1.1 unless said otherwise; [C] read in source code,
[A] read in a paper's abstract, [M] recollected, [R] our reconstruction, [T] ours.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, fields
from functools import partial

import numpy as np

from services.scheduler.core.draws import Draws
from services.scheduler.core.settings import Constants

FloatArray = np.ndarray[tuple[int], np.dtype[np.float64]]
IntArray = np.ndarray[tuple[int], np.dtype[np.intp]]


def _gauge() -> FloatArray:
    return np.zeros(0, dtype=np.float64)


@dataclass(slots=True)
class Gauges:
    """One entry a worker in each array; whoever owns the workers keeps them true."""

    running: FloatArray = field(default_factory=_gauge)
    """Requests that have a lease there."""
    waiting: FloatArray = field(default_factory=_gauge)
    """Requests bound to it and not placed."""
    kv_used: FloatArray = field(default_factory=_gauge)
    """KV tokens that leases reserve."""
    kv_total: FloatArray = field(default_factory=_gauge)
    """KV tokens it can hold."""
    backlog: FloatArray = field(default_factory=_gauge)
    """Uncached input tokens of placed requests that have made no token there."""
    waiting_tokens: FloatArray = field(default_factory=_gauge)
    """Input tokens of those bound and not placed."""
    cached: FloatArray = field(default_factory=_gauge)
    """Input tokens of the request that is to be placed whose KV the worker is thought to have."""
    mean_output: FloatArray = field(default_factory=_gauge)
    """Expected output tokens of a request; `sal-b`."""
    busy_s: FloatArray = field(default_factory=_gauge)
    """Estimated seconds of work that it has; `max-min`."""
    peak: FloatArray = field(default_factory=_gauge)
    """Predicted most KV tokens that its leases will hold at once; `least-predicted-peak`."""
    prefill_token_s: FloatArray = field(default_factory=_gauge)
    """Seconds per prefilled token; `sal-b`."""
    iteration_s: FloatArray = field(default_factory=_gauge)
    """Seconds per iteration at its present batch; `sal-b`."""

    def append(self) -> None:
        """One more worker, all its gauges at 0."""
        for gauge in fields(self):
            setattr(self, gauge.name, np.append(getattr(self, gauge.name), 0.0))

    def delete(self, place: int) -> None:
        """A worker less; those after it move up."""
        for gauge in fields(self):
            setattr(self, gauge.name, np.delete(getattr(self, gauge.name), place))

    def __len__(self) -> int:
        return len(self.running)


Balancer = Callable[[Gauges, int, IntArray, int, Draws, Constants], int]
Score = Callable[[Gauges, int, IntArray], tuple[FloatArray, ...]]
"""(gauges, need in tokens, places) -> what is to be least there, most significant first."""


def in_turn(places: IntArray, turn: int) -> int:
    """One of these after the other as the turn counts up."""
    return int(places[turn % len(places)])


def least(places: IntArray, scores: tuple[FloatArray, ...], turn: int) -> int:
    """The place with the lexicographically least scores; of equals the next in turn."""
    rest = np.flatnonzero(scores[0] == scores[0].min())
    for score in scores[1:]:
        if len(rest) == 1:
            break
        among = score[rest]
        rest = rest[among == among.min()]
    return in_turn(places[rest], turn)


def random(
    gauges: Gauges, need: int, eligible: IntArray, turn: int, draws: Draws, constants: Constants
) -> int:
    """Any."""
    return int(eligible[draws.below(len(eligible))])


def round_robin(
    gauges: Gauges, need: int, eligible: IntArray, turn: int, draws: Draws, constants: Constants
) -> int:
    """The next in turn."""
    return in_turn(eligible, turn)


def power_of_two(
    gauges: Gauges, need: int, eligible: IntArray, turn: int, draws: Draws, constants: Constants
) -> int:
    """The one with fewer requests of two different random ones; AIBrix [C]."""
    first = draws.below(len(eligible))
    second = (first + 1 + draws.below(len(eligible) - 1)) % len(eligible)
    pair = eligible[[first, second]]
    (requests,) = _requests(gauges, need, pair)
    return int(pair[1] if requests[1] < requests[0] else pair[0])


def _requests(gauges: Gauges, need: int, at: IntArray) -> tuple[FloatArray, ...]:
    """Fewest requests, running or bound [C: all routers]."""
    return (gauges.running[at] + gauges.waiting[at],)


def _kv(gauges: Gauges, need: int, at: IntArray) -> tuple[FloatArray, ...]:
    """Least share of its KV in use; AIBrix, llm-d [C]."""
    return (_share(gauges, gauges.kv_used[at], at),)


def _kv_queued(gauges: Gauges, need: int, at: IntArray) -> tuple[FloatArray, ...]:
    """Least share of its KV in use or demanded by those bound; Llumnix `kv_blocks_ratio` [C]."""
    return (_share(gauges, gauges.kv_used[at] + gauges.waiting_tokens[at], at),)


def _freeness(gauges: Gauges, need: int, at: IntArray) -> tuple[FloatArray, ...]:
    """Most iterations until it is full, if each of its requests takes a token in each; Llumnix
    `remaining_steps` [C]. An idle worker counts as one with a single request."""
    free = gauges.kv_total[at] - gauges.kv_used[at] - gauges.waiting_tokens[at]
    return (-free / np.maximum(gauges.running[at] + gauges.waiting[at], 1.0),)


def _queued_prefill(gauges: Gauges, need: int, at: IntArray) -> tuple[FloatArray, ...]:
    """Fewest uncached input tokens queued or in progress; Llumnix, Dynamo, llm-d [C]."""
    return (gauges.backlog[at] + gauges.waiting_tokens[at],)


def _vllm_dp(gauges: Gauges, need: int, at: IntArray) -> tuple[FloatArray, ...]:
    """vLLM's data-parallel coordinator: 4 x waiting + running [C]. A request without its first
    token counts as running here, since vLLM counts it so from its first chunk on."""
    return (4 * gauges.waiting[at] + gauges.running[at],)


def _lmetric(gauges: Gauges, need: int, at: IntArray) -> tuple[FloatArray, ...]:
    """Prefill tokens times batch size, both as they would be with the request [A]. That the
    tokens include those queued, and the size those bound, is our reading [R]."""
    tokens = need + gauges.backlog[at] + gauges.waiting_tokens[at]
    return (tokens * (gauges.running[at] + gauges.waiting[at] + 1),)


def _sal_a(gauges: Gauges, need: int, at: IntArray) -> tuple[FloatArray, ...]:
    """SAL-A (tokens) [R]: least queued prefill + memory deficit, then least used KV."""
    queued, deficit = _sal(gauges, need, at)
    return queued + deficit, gauges.kv_used[at]


def _sal_b(gauges: Gauges, need: int, at: IntArray) -> tuple[FloatArray, ...]:
    """SAL-B (time) [R]: the longer of the time to prefill what is queued and the time in which
    the deficit comes free. Memory comes free at used KV / (mean output x iteration time)."""
    queued, deficit = _sal(gauges, need, at)
    used = gauges.kv_used[at]
    lives_s = gauges.mean_output[at] * gauges.iteration_s[at]
    release_s = deficit * lives_s / np.maximum(used, 1.0)
    return np.maximum(queued * gauges.prefill_token_s[at], release_s), used


def _sal_c(gauges: Gauges, need: int, at: IntArray) -> tuple[FloatArray, ...]:
    """SAL-C (lexicographic) [R]: of workers without a deficit the least queued prefill; if there
    is none, the least deficit."""
    queued, deficit = _sal(gauges, need, at)
    return deficit, np.where(deficit > 0, 0.0, queued), gauges.kv_used[at]


def _sal(gauges: Gauges, need: int, at: IntArray) -> tuple[FloatArray, FloatArray]:
    """Q and D of the survey note's section 1.3, in tokens: prefill queued or in progress, and KV
    that must come free before the request can start."""
    waiting = gauges.waiting_tokens[at]
    deficit = need + waiting - (gauges.kv_total[at] - gauges.kv_used[at])
    return gauges.backlog[at] + waiting, np.maximum(0.0, deficit)


def _late_binding(gauges: Gauges, need: int, at: IntArray) -> tuple[FloatArray, ...]:
    """Least un-prefilled backlog, the request's own counted as far as the worker has not computed
    its beginning lately (`homes`), then least share of KV: for a request that waited in the centre
    until some worker had little backlog (survey note, section 5.1, point 6) [T]."""
    return gauges.backlog[at] - gauges.cached[at], _share(gauges, gauges.kv_used[at], at)


def _predicted_peak(gauges: Gauges, need: int, at: IntArray) -> tuple[FloatArray, ...]:
    """Least predicted peak as a share of its KV, those bound counted with their input; then least
    KV in use [T]."""
    peak = gauges.peak[at] + gauges.waiting_tokens[at] + need
    return _share(gauges, peak, at), gauges.kv_used[at]


def _busy(gauges: Gauges, need: int, at: IntArray) -> tuple[FloatArray, ...]:
    """Least estimated work in seconds: SCLS's max-min for one request [R]."""
    return (gauges.busy_s[at],)


def _share(gauges: Gauges, tokens: FloatArray, at: IntArray) -> FloatArray:
    return tokens / np.maximum(gauges.kv_total[at], 1.0)


def _by(
    score: Score,
    gauges: Gauges,
    need: int,
    eligible: IntArray,
    turn: int,
    draws: Draws,
    constants: Constants,
) -> int:
    """The least by `score`."""
    return least(eligible, score(gauges, need, eligible), turn)


BALANCERS: dict[str, Balancer] = {
    "random": random,
    "round-robin": round_robin,
    "power-of-two": power_of_two,
    "least-requests": partial(_by, _requests),
    "least-kv": partial(_by, _kv),
    "kv-queued": partial(_by, _kv_queued),
    "freeness": partial(_by, _freeness),
    "least-queued-prefill": partial(_by, _queued_prefill),
    "vllm-dp": partial(_by, _vllm_dp),
    "sal-a": partial(_by, _sal_a),
    "sal-b": partial(_by, _sal_b),
    "sal-c": partial(_by, _sal_c),
    "lmetric": partial(_by, _lmetric),
    "late-binding": partial(_by, _late_binding),
    "least-predicted-peak": partial(_by, _predicted_peak),
    "max-min": partial(_by, _busy),
}
