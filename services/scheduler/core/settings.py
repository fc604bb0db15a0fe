"""Constants: every number that the scheduler's core and its policies use, with its source.

Tags follow the research notes: [M] recollected from memory of a paper and not confirmed, [R] our
reconstruction, [T] Tranche's own choice. `--set NAME=VALUE` changes any of them.
"""

from collections.abc import Mapping
from dataclasses import dataclass, fields, replace


class UnknownConstant(ValueError):
    """`--set` named a constant that does not exist, or gave a value that does not fit."""


@dataclass(frozen=True, slots=True)
class Constants:
    """Defaults are those of the reproduction; the live mesh changes a few (SchedulerSettings)."""

    # ---- slices and batches
    slice_tokens: int = 64
    """S: most new tokens per placement [T]. SCLS's experiments used 128 [M]."""
    batch_size: int = 12
    """N of `fixed` and `sorted` batching; SLS on DeepSpeed used 12 [M]."""
    memory_share: float = 0.9
    """zeta: the share of a worker's KV slots that a plan may fill [R]."""
    spread_batches: bool = False
    """Split `dp`'s batches until every idle worker has one [T]. The programme's objective, the sum
    of times, ignores how many workers wait; at low load it leaves some idle [R]."""

    # ---- rounds
    interval_share: float = 0.5
    """lambda in max(lambda x least load, floor), of `adaptive` pacing [M]."""
    interval_floor_s: float = 3.0
    """Gamma, of `adaptive` pacing: 3 s with DeepSpeed, 6 s with transformers [M]."""
    interval_s: float = 3.0
    """Between rounds of `ticked` pacing (ablations AB and LB); taken equal to Gamma [R]."""
    gather_s: float = 0.0
    """How long the first arrival waits for others before a round [T]."""
    round_on_idle: bool = False
    """`adaptive` pacing: do not wait for the interval while a worker has nothing to do [T]."""
    empty_round_s: float = 0.25
    """After a round that could place nothing, wait this long [T]."""

    # ---- limits
    waiting_max: int = 4096
    """Requests beyond those in running batches; more are refused with a retry time [T]. At 8 KiB
    of prompt each this is 32 MiB."""
    batches_max: int = 48
    """Batches given to one worker and not answered [T]; below the 64 that a worker takes. More
    would only lengthen a queue that the next round could still rearrange."""
    retry_after_max_s: float = 60.0
    """The longest retry time told to anybody [T]."""
    done_max: int = 4096
    """Finished requests remembered for late questions and repeats [T]."""
    done_ttl_s: float = 120.0
    """How long; above any gateway's patience with a silent stream [T]."""
    misfit_s: float = 30.0
    """A request that fits no present worker is refused after so long [T]: the larger worker that
    it was taken in for may come back meanwhile."""
    refusals_max: int = 8
    """Placements of one request in a row that made no token, before it is refused [T]."""
    asks_max: int = 3
    """TokensWanted for one position that a worker may leave unanswered, before a recall [T]."""
    recalls_max: int = 30
    """Recalls of one request without an answer, before it is given up [T]."""
    lost_workers_max: int = 256
    """Lost workers remembered, to tell them what to drop if they come back [T]."""

    # ---- time
    beat_s: float = 1.0
    """Between SchedulerBeats: the mesh's protocol."""
    worker_timeout_s: float = 2.0
    """Silence after which a worker is lost: four of its beats [T]."""
    gateway_timeout_s: float = 3.0
    """Silence after which a gateway is gone: three of its beats."""
    watch_s: float = 0.25
    """How often silence, recalls and overdue batches are looked for [T]."""
    collect_s: float = 1.0
    """After a takeover: how long gateways and workers have to report [T]."""
    recall_repeat_s: float = 1.0
    """Between repeats of an unanswered Recall [T]."""
    cooldown_s: float = 0.5
    """A worker that refused a batch gets no other for so long [T]."""
    overdue_s: float = 120.0
    """A batch is given up this long after `overdue_factor` times its expected end [T]. Only orders
    lost on the way need it: a dead worker is noticed by its missing beats."""
    overdue_factor: float = 10.0
    lost_order_s: float = 2.0
    """An order older than this that its worker does not list among its residents is lost [T]."""


def known_names() -> list[str]:
    """What `--set` accepts."""
    return [field.name for field in fields(Constants)]


def with_overrides(constants: Constants, overrides: Mapping[str, str]) -> Constants:
    """`constants` with text values put in. Raises UnknownConstant, naming what is known."""
    changes: dict[str, int | float | bool] = {}
    for name, text in overrides.items():
        if name not in known_names():
            known = ", ".join(known_names())
            raise UnknownConstant(f"unknown constant {name!r}; known are: {known}")
        changes[name] = _parse(name, text, type(getattr(constants, name)))
    return replace(constants, **changes)  # type: ignore[arg-type]


def _parse(name: str, text: str, kind: type) -> int | float | bool:
    try:
        if kind is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.strip().lower()]
        number = int(text) if kind is int else float(text)
    except (ValueError, KeyError):
        raise UnknownConstant(f"{name} wants {_wanted(kind)}, not {text!r}") from None
    if not 0 <= number < float("inf"):
        raise UnknownConstant(f"{name} must be finite and not negative, not {text!r}")
    return number


def _wanted(kind: type) -> str:
    return {bool: "true or false", int: "a whole number", float: "a number"}[kind]
