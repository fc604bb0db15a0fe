"""A plan: everything that one world of a storm depends on, drawn from its seed."""

from dataclasses import dataclass, field
from random import Random

from services.scheduler.core.presets import preset_named
from services.scheduler.core.settings import Constants
from sim.storm.asked import Wish, drawn_wish
from sim.storm.broker import CALM, Weather

LEASED = (
    "tranche",
    "tranche",
    "tranche",
    "past-future",
    "past-future",
    "vllm",
    "vllm",
    "sal+larry",
    "aggressive",
    "conservative",
    "tgi",
    "sarathi",
    "ils",
    "trtllm-no-evict",
    "trtllm-max-utilization",
)
CLOSED = ("scls", "scls", "sls", "so", "pm", "ab", "lb")
"""Named here, not taken from the table of presets, so that a new one does not change all worlds."""
LEASED_SHARE = 0.7
SCARCE_SHARE = 0.55
"""Of the worlds: a few requests fill a worker's memory."""
HARSH_SHARE = 0.3
"""Of the worlds: the broker breaks more than it promises to keep."""
HARSH = Weather(repeat=0.1, late=0.06, lose=0.04)
PROMPT_MAX, OUTPUT_MAX = 120, 90
LIVE_CLOSED = {"interval_floor_s": 0.003, "interval_s": 0.25, "interval_share": 0.9}
"""Rounds as a live mesh has them (SchedulerSettings)."""

KINDS: dict[str, float] = {
    "worker killed": 3,
    "worker's host lost": 1,
    "worker stopped": 2,
    "worker slow": 2,
    "worker's line cut": 2,
    "worker's line half open": 2,
    "worker's line slow": 1,
    "worker drained": 2,
    "worker joins": 1,
    "leader killed": 2,
    "leader stopped": 1.5,
    "leader is a zombie": 1.5,
    "leader's line cut": 1,
    "leader's line half open": 1,
    "standby killed": 0.5,
    "estimator killed": 1,
    "gateway killed": 1.5,
    "gateway stopped": 1,
    "gateway's line cut": 1.5,
    "gateway's line half open": 1,
    "gateway leaves": 0.7,
    "gateway joins": 0.7,
    "broker restarts": 1,
    "clock jumps": 1,
}
"""Kind of fault to its weight."""


@dataclass(frozen=True, slots=True)
class Fault:
    """One misfortune; whom it meets is decided by `luck` when it comes."""

    at: float
    kind: str
    lasts_s: float
    luck: int


@dataclass(frozen=True, slots=True)
class Plan:
    """See the module's text. Times are seconds from the first call of a client on."""

    seed: int
    policy: str
    constants: Constants
    workers: int
    gateways: int
    schedulers: int
    slots: int
    """KV slots of a worker."""
    block: int
    rows_max: int
    step_s: float
    tokens_per_step: int
    storm_s: float
    weather: Weather
    wishes: tuple[Wish, ...]
    faults: tuple[Fault, ...] = field(default=())

    @property
    def harsh(self) -> bool:
        return self.weather is not CALM

    @property
    def reading_s(self) -> float:
        """How long the slowest reader takes for its output, pauses at leases included."""
        slow = [wish for wish in self.wishes if wish.reads_tps is not None]
        return max((2 * wish.max_tokens / (wish.reads_tps or 1) for wish in slow), default=0.0)

    @property
    def work_s(self) -> float:
        """Time of everything that is asked for, one request at a time, in the shortest slices of
        this plan, on one worker."""
        steps = 0.0
        for wish in self.wishes:
            for length in wish.lengths:
                made = min(length, wish.max_tokens)
                slices = 1 + made / max(1, self.constants.slice_tokens)
                prefill = 1 + (wish.prompt_tokens + made) / 64
                steps += slices * prefill + made / self.tokens_per_step + slices
        return steps * self.step_s


def plan_of(seed: int) -> Plan:
    """The world of this seed."""
    rng = Random(f"storm {seed}")
    leased = rng.random() < LEASED_SHARE
    policy = rng.choice(LEASED if leased else CLOSED)
    storm_s = rng.uniform(6.0, 13.0)
    calls = rng.randint(10, 32)
    scarce = rng.random() < SCARCE_SHARE
    one = PROMPT_MAX + OUTPUT_MAX
    slots = rng.randint(int(1.15 * one), 3 * one) if scarce else rng.choice((2_000, 6_000))
    block = rng.choice((1, 4, 16)) if leased else 1
    harsh = rng.random() < HARSH_SHARE
    slice_tokens = rng.choice((3, 6, 12, 24))
    changes: dict[str, int | float | bool] = {
        "slice_tokens": slice_tokens,
        "batch_size": rng.choice((2, 4)),
        "iteration_tokens": 64,
        "spread_batches": True,
        "round_on_idle": True,
        "gather_s": 0.0 if leased else 0.003,
        "waiting_max": rng.choice((4, 4096, 4096, 4096)),
    }
    if leased:
        changes["ample_slice_tokens"] = rng.choice((0, 0, 4 * slice_tokens))
    else:
        changes |= LIVE_CLOSED
    return Plan(
        seed=seed,
        policy=policy,
        constants=preset_named(policy).with_constants(**changes),
        workers=rng.choice((1, 2, 2, 3, 3, 4)),
        gateways=rng.choice((1, 2, 2, 3)),
        schedulers=rng.choice((1, 2, 2, 2)),
        slots=max(slots, one + 2 * block),
        block=block,
        rows_max=rng.choice((0, 0, 3, 8)),
        step_s=rng.choice((0.02, 0.04, 0.08)),
        tokens_per_step=rng.choice((1, 2, 4)),
        storm_s=storm_s,
        weather=HARSH if harsh else CALM,
        wishes=tuple(
            drawn_wish(rng, number, rng.uniform(0.0, storm_s), PROMPT_MAX, OUTPUT_MAX)
            for number in range(calls)
        ),
        faults=_faults(rng, storm_s),
    )


def _faults(rng: Random, storm_s: float) -> tuple[Fault, ...]:
    """Two to twelve, now and then several at one moment."""
    kinds, weights = list(KINDS), list(KINDS.values())
    faults: list[Fault] = []
    for _ in range(rng.randint(2, 12)):
        at = rng.uniform(0.0, storm_s)
        if faults and rng.random() < 0.25:
            at = faults[-1].at + rng.choice((0.0, 0.001, 0.05, 0.5))
        kind = rng.choices(kinds, weights)[0]
        faults.append(Fault(at, kind, rng.uniform(0.3, 6.0), rng.getrandbits(16)))
    return tuple(sorted(faults, key=lambda fault: fault.at))
