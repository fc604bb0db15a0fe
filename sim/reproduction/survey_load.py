"""The survey's workloads, and the fluid bound that their loads are stated by.

Lengths are those of the Azure 2023 conversations in random order, or `dec`, the note's synthetic
decode-heavy set: lognormal, prompts of 221 and outputs of 477 tokens on average, none above 4000.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from statistics import fmean

from shared.profiles import CostProfile, load_profile
from sim.items import Item, Workload
from sim.workload import make_workload

PROFILE = "opt-13b-a100-swift"
CHUNK = 512
RUNNING_MAX = 256
CONV, DEC = "conv", "dec"
CAPS = {CONV: 1024, DEC: 4096}
"""`max_tokens` of every request."""
SOURCES = {
    CONV: str(Path(__file__).parents[2] / "bench" / "workloads" / "azure2023_conv.csv"),
    DEC: "lognormal:122/1.1x268/1.1",
}
"""Of `dec` the note tells means and the cap. With a sigma of 1.1 these are the means, and the fluid
bound is 2.44 requests/s (the note's: 2.40) [T]."""
LENGTH_MAX = {CONV: None, DEC: 4000}


@dataclass(frozen=True, slots=True)
class Bound:
    """What one worker can do at most, as a fluid."""

    rps: float
    tps: float
    """Output tokens per second."""
    batch: float
    """B*, the batch that fills memory."""


def fluid_bound(items: Sequence[Item], profile: CostProfile) -> Bound:
    """1 / (E[prefill] + E[o] T(B*) / B*): every request pays for its prefill tokens beside a full
    batch and for its share of the decode steps, T(B*) each. The note's formula (section 5.4) with
    our profile's costs in place of its coefficients."""
    outputs = [item.output_tokens for item in items]
    mean = fmean(outputs)
    held = sum(i.output_tokens * (i.prompt_tokens + i.output_tokens / 2) for i in items)
    batch = min(float(RUNNING_MAX), profile.kv_tokens / (held / sum(outputs)))
    size, kv_tokens = round(batch), profile.kv_tokens
    step_s = profile.iteration_s([], size, kv_tokens)
    chunk_s = profile.iteration_s([(CHUNK, 0)], size, kv_tokens) - step_s
    slope_s = (
        profile.iteration_s([(CHUNK, CHUNK)], size, kv_tokens)
        - profile.iteration_s([(CHUNK, 0)], size, kv_tokens)
    ) / CHUNK**2
    token_s = chunk_s / CHUNK - slope_s * CHUNK / 2
    prefill_s = fmean(token_s * i.prompt_tokens + slope_s / 2 * i.prompt_tokens**2 for i in items)
    rps = 1 / (prefill_s + mean * step_s / batch)
    return Bound(rps, rps * mean, batch)


@lru_cache(maxsize=4)
def _lengths(trace: str, requests: int, seed: int) -> tuple[Item, ...]:
    """Any arrivals: only lengths count."""
    return make_workload(
        SOURCES[trace],
        limit=requests,
        max_prompt_tokens=LENGTH_MAX[trace],
        max_output_tokens=LENGTH_MAX[trace],
        shuffle=True,
        rate=1.0,
        seed=seed,
    ).items


@lru_cache(maxsize=4)
def bound_of(trace: str, requests: int, seed: int) -> Bound:
    """Of one worker, on the sample."""
    return fluid_bound(_lengths(trace, requests, seed), load_profile(PROFILE))


@lru_cache(maxsize=4)
def workload_of(
    trace: str, requests: int, seed: int, load: float, workers: int, burst: float | None
) -> Workload:
    """Arrivals at this share of the fluid bound of so many workers."""
    return make_workload(
        SOURCES[trace],
        limit=requests,
        max_prompt_tokens=LENGTH_MAX[trace],
        max_output_tokens=LENGTH_MAX[trace],
        rate=load * workers * bound_of(trace, requests, seed).rps,
        burst=burst,
        shuffle=True,
        seed=seed,
    )
