"""The scheduler's books: all of its soft state in one place, and the commands being written."""

from dataclasses import dataclass, field

from services.scheduler.core.presets import Preset
from services.scheduler.core.requests import Requests
from services.scheduler.core.settings import Constants
from services.scheduler.core.workers import Workers
from shared.costs import CostFit
from shared.messages import LengthForecast, SchedulerCommand

ATTEMPTS_PER_EPOCH = 1_000_000
"""A leader numbers attempts from (epoch - 1) times this: above every attempt of the leaders before
it, also those it never heard of."""
ATTEMPT_MAX = 1 << 48
"""Far above any leader's; what claims to be beyond is nonsense, and could not be raised much."""


@dataclass(frozen=True, slots=True)
class Claim:
    """A worker says it holds a request; kept while a new leader collects."""

    worker: str
    attempt: int
    position: int


@dataclass(slots=True)
class RoundBook:
    """When rounds were and may be."""

    last_at: float = float("-inf")
    least_load_s: float = 0.0
    gathered_at: float = float("inf")
    """When the pool has waited long enough for company."""
    not_before: float = float("-inf")
    turn: int = 0
    batches: int = 0
    """Ever dispatched: the next one's number."""
    batch_size_mean: float = 1.0
    """Exponentially weighted; for predictions only."""


@dataclass(slots=True)
class Books:
    """One leader's knowledge; gone with it."""

    preset: Preset
    constants: Constants
    requests: Requests
    workers: Workers
    costs: CostFit
    epoch: int = 0
    rounds: RoundBook = field(default_factory=RoundBook)
    gateways: dict[str, float] = field(default_factory=dict)
    """Boot id to when it was last heard."""
    collecting_until: float | None = None
    claims: dict[str, list[Claim]] = field(default_factory=dict)
    forecast: LengthForecast | None = None
    beat_at: float = float("inf")
    watch_at: float = float("inf")
    round_at: float | None = None
    """When the next round is due, as far as is known."""
    stirred: bool = True
    """Something happened that may change `round_at`. With thousands of workers most events are
    beats, which do not; looking at all workers for each of them would cost more than the rounds."""
    called_at: float | None = None
    workers_lost: int = 0
    """How many fell silent or could not be reached; those that left are not counted."""
    commands: list[SchedulerCommand] = field(default_factory=list)

    @property
    def attempt_base(self) -> int:
        """No earlier leader's attempt is above this; none of ours is at or below."""
        return max(0, self.epoch - 1) * ATTEMPTS_PER_EPOCH

    @property
    def waiting(self) -> int:
        """Open requests that no worker is running now, wherever they wait."""
        return max(0, len(self.requests.open) - self.workers.running_requests())

    def send(self, command: SchedulerCommand) -> None:
        self.commands.append(command)

    def want_round(self, at: float) -> None:
        """Somebody joined the pool and is ready for a round from `at` on."""
        self.rounds.gathered_at = min(self.rounds.gathered_at, at)


def new_books(preset: Preset, constants: Constants) -> Books:
    """Empty books."""
    return Books(
        preset=preset,
        constants=constants,
        requests=Requests(done_max=constants.done_max, done_ttl_s=constants.done_ttl_s),
        workers=Workers(lost_max=constants.lost_workers_max, batches_max=constants.batches_max),
        costs=CostFit(),
    )
