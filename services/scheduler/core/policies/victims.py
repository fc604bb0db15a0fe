"""Victims: which running request is parked when a worker's memory does not last?

A rule gets the requests on one worker in order of admission, at least one, and answers with the
one to park. To park several, it is asked again without those it has named. Ties go to the last
admitted, whose loss is most likely the least. Only `lowest-priority` and `farthest-end` look at
priorities, because the engines that the others follow do not either. `return_tokens` is what coming
back costs for each token held: the output tokens that a request makes while one is prefilled.
"""

from collections.abc import Callable, Sequence

import numpy as np

from services.scheduler.core.policies.lengths import LengthModel
from services.scheduler.core.policies.survival import Floats, Ints, kinds_of
from services.scheduler.core.settings import Constants
from services.scheduler.core.state import Request

Victim = Callable[[Sequence[Request], LengthModel, Constants, float], Request]


def computed_tokens(request: Request) -> int:
    """KV that parking throws away and a later prefill makes again; nothing yet while the prefill
    runs, of which no progress is told."""
    return request.input_tokens if request.first_token else 0


def last_admitted(
    running: Sequence[Request], lengths: LengthModel, constants: Constants, return_tokens: float
) -> Request:
    """vLLM under FCFS, and what TensorRT-LLM pauses [C]."""
    return running[-1]


def latest_arrival(
    running: Sequence[Request], lengths: LengthModel, constants: Constants, return_tokens: float
) -> Request:
    """Who came to the mesh last: order of service is kept over re-admissions [T]."""
    return max(running[::-1], key=lambda r: r.number)


def least_computed(
    running: Sequence[Request], lengths: LengthModel, constants: Constants, return_tokens: float
) -> Request:
    """Fewest computed tokens, so the cheapest to make again (vLLM pull request 53723, "lcf" [A]);
    with `victim_spared_tokens`, LARRY's third ingredient [R]."""
    spared = constants.victim_spared_tokens
    young = [r for r in running if r.output_tokens <= spared] if spared else running
    return min((young or running)[::-1], key=computed_tokens)


def largest_kv(
    running: Sequence[Request], lengths: LengthModel, constants: Constants, return_tokens: float
) -> Request:
    """Frees the most at once (survey note, victim choice)."""
    return max(running[::-1], key=lambda r: r.input_tokens)


def most_remaining(
    running: Sequence[Request], lengths: LengthModel, constants: Constants, return_tokens: float
) -> Request:
    """Whose end is farthest, by prediction: as SRPT preempts [M]."""

    def remaining(request: Request) -> float:
        return lengths.expected_remaining(request.output_tokens, request.spec.max_tokens)

    return max(running[::-1], key=remaining)


def gains(left: Floats, held: Ints, return_tokens: float) -> Floats:
    """What parking each would gain: the memory it holds times what is left of its output, in
    tokens, over what coming back costs: one, and the output tokens that could be made while all of
    it is computed anew. Squared, since that is work for the worker as well as a standstill for the
    victim [T]."""
    found: Floats = left * held / (1 + return_tokens * held) ** 2
    return found


def farthest_end(
    running: Sequence[Request], lengths: LengthModel, constants: Constants, return_tokens: float
) -> Request:
    """Of the least urgent priority, who would hold the most memory for the longest by the survival
    function of its class, over what coming back costs (`gains`) [T]."""
    made = np.array([r.output_tokens for r in running], dtype=np.int64)
    prompt = np.array([r.prompt_tokens for r in running], dtype=np.int64)
    cap = np.array([r.spec.max_tokens for r in running], dtype=np.int64)
    told = np.array([r.predicted_tokens for r in running], dtype=np.int64)
    left = lengths.survival.expected(made, cap, kinds_of(prompt, told))
    scores = gains(left, prompt + made, return_tokens)
    urgency = np.array([r.spec.priority for r in running])
    scores[urgency < urgency.max()] = -1.0
    return running[len(running) - 1 - int(scores[::-1].argmax())]


def lowest_priority(
    running: Sequence[Request], lengths: LengthModel, constants: Constants, return_tokens: float
) -> Request:
    """vLLM V1 under PRIORITY: the largest (priority, arrival) [C]."""
    return max(running, key=lambda r: (r.spec.priority, r.number))


VICTIMS: dict[str, Victim] = {
    "last-admitted": last_admitted,
    "latest-arrival": latest_arrival,
    "least-computed": least_computed,
    "largest-kv": largest_kv,
    "most-remaining": most_remaining,
    "farthest-end": farthest_end,
    "lowest-priority": lowest_priority,
}
