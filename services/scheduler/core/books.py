"""The scheduler's books: all of its soft state in one place, and the commands being written."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field
from functools import partial

from services.scheduler.core.board import Board
from services.scheduler.core.calibration import Calibration
from services.scheduler.core.comers import Comers
from services.scheduler.core.draws import Draws
from services.scheduler.core.exploring import Explorer
from services.scheduler.core.lines import Lines
from services.scheduler.core.outputs import Outputs
from services.scheduler.core.policies.batching import SORTED_BY_LENGTH
from services.scheduler.core.policies.chance import Margin
from services.scheduler.core.policies.estimates import Estimates
from services.scheduler.core.policies.homes import Homes
from services.scheduler.core.policies.lengths import Histories, LengthModel
from services.scheduler.core.policies.queues import QUEUES
from services.scheduler.core.policies.survival import kind_of
from services.scheduler.core.policies.victims import VICTIMS
from services.scheduler.core.presets import Preset
from services.scheduler.core.promises import Promises
from services.scheduler.core.rate import Crowding, FirstTokens, Pace
from services.scheduler.core.requests import Requests
from services.scheduler.core.settings import Constants
from services.scheduler.core.shares import Shares
from services.scheduler.core.shelf import Shelf
from services.scheduler.core.state import Request
from services.scheduler.core.token_times import TokenTimes
from services.scheduler.core.waits import Door, Waits
from services.scheduler.core.workers import Batch, Worker, Workers
from shared.costs import CostFit, load_solver
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
    until: int = 0
    """Leased: where its lease ends."""


@dataclass(slots=True)
class Making:
    """A round of closed batches while it is being made."""

    now: float
    """Of the present call."""
    steps: Generator[int, None, None]
    """Each step yields about how much work it was; see `round_work_max`."""


@dataclass(slots=True)
class RoundBook:
    """When rounds were and may be."""

    last_at: float = float("-inf")
    least_load_s: float = 0.0
    gathered_at: float = float("inf")
    """When the pool has waited long enough for company."""
    not_before: float = float("-inf")
    turn: int = 0
    """Place of the worker that is next: the one after the last that got a batch."""
    idle_turn: int = 0
    """The same for rounds that serve idle workers: they do not move the turn of the others."""
    batches: int = 0
    """Ever dispatched: the next one's number."""
    batch_size_mean: float = 1.0
    """Exponentially weighted; for predictions only."""
    making: Making | None = None
    """The round that is being made; a long one takes several calls."""


@dataclass(slots=True)
class Books:
    """One leader's knowledge; gone with it."""

    preset: Preset
    constants: Constants
    requests: Requests
    workers: Workers
    costs: CostFit
    lines: Lines
    shelf: Shelf
    """The pool of a closed policy, in order."""
    board: Board
    histories: Histories
    """What is known of output lengths, prepared from the latest forecast."""
    estimates: Estimates
    draws: Draws
    truth: Callable[[str], int] | None = None
    """Request id to its true output length: simulation of policy `oracle` only."""
    epoch: int = 0
    rounds: RoundBook = field(default_factory=RoundBook)
    gateways: dict[str, float] = field(default_factory=dict)
    """Boot id to when it was last heard."""
    collecting_until: float | None = None
    asked: dict[str, None] = field(default_factory=dict)
    """Requests about which the predictor was asked and has not answered."""
    claims: dict[str, list[Claim]] = field(default_factory=dict)
    forecast: LengthForecast | None = None
    beat_at: float = float("inf")
    watch_at: float = float("inf")
    leases_watched_at: float = float("-inf")
    leases_unwatched: list[str] = field(default_factory=list)
    """Workers whose leases this round of looks has still to see."""
    round_at: float | None = None
    """When the next round is due, as far as is known."""
    stirred: bool = True
    """Something happened that may change `round_at`. With thousands of workers most events are
    beats, which do not; looking at all workers for each of them would cost more than the rounds."""
    called_at: float | None = None
    workers_lost: int = 0
    """How many fell silent or could not be reached; those that left are not counted."""
    evictions: int = 0
    """Leases that ended early for want of memory."""
    shares: Shares = field(default_factory=Shares)
    """How much each tenant has running."""
    touched: dict[str, None] = field(default_factory=dict)
    """Leased: workers where something changed since their last round."""
    resting: dict[str, Worker] = field(default_factory=dict)
    """Leased: workers that refused an order and get no other for a while."""
    parking: dict[str, Request] = field(default_factory=dict)
    """Told to park and not answered yet."""
    reminded: dict[str, Request] = field(default_factory=dict)
    """Leases that seem not to have reached their worker; said again in the next round."""
    pace: Pace = field(default_factory=Pace)
    """How fast leases go, as the workers' reports tell."""
    crowding: Crowding = field(default_factory=Crowding)
    """How much one request slows the others down."""
    token_times: TokenTimes = field(default_factory=TokenTimes)
    """How long tokens take beside so many."""
    firsts: FirstTokens = field(default_factory=FirstTokens)
    """How long first tokens take, from the placing on."""
    waits: Waits = field(default_factory=Waits)
    """How much work waits, and how fast it goes."""
    comers: Comers = field(default_factory=Comers)
    """Who came lately."""
    outputs: Outputs = field(default_factory=Outputs)
    """How long the outputs of like prompts were."""
    promises: Promises = field(default_factory=Promises)
    """Predictions that were told, and how far they were off."""
    calibration: Calibration = field(default_factory=Calibration)
    """How true predicted quantiles of outputs were."""
    head_waits_for: str = ""
    """Why the head of the line was last refused; see `Request.waits_for`."""
    explorer: Explorer = field(default_factory=Explorer)
    """Lets one in now and then whose output is thought too long."""
    homes: Homes = field(default_factory=Homes)
    """Where the beginnings of prompts were computed lately."""
    door: Door = field(default_factory=Door)
    margin: Margin = field(default_factory=Margin)
    """What `chance` keeps free, and by what it is steered."""
    largest_known: int | None = None
    largest_stale: bool = True
    """Workers came, went or changed since."""
    commands: list[SchedulerCommand] = field(default_factory=list)

    @property
    def leased(self) -> bool:
        return self.preset.form == "leased"

    @property
    def lengths(self) -> LengthModel:
        """The history of the model that this mesh serves."""
        return self.histories.of(self.forecast, self.workers.model)

    def kind_of(self, request: Request) -> int:
        """The class of a request, by which its output is expected."""
        return kind_of(request.prompt_tokens, request.predicted_tokens)

    def holds(self, worker: Worker) -> int:
        """The most tokens, prompt and output, of one request that this worker can serve. A closed
        batch keeps a share free; leases may fill all blocks."""
        capacity = max(0, worker.memory.kv_tokens_capacity)
        block = worker.credit.block_tokens
        if self.leased:
            return min(worker.info.context_tokens_max, capacity // block * block)
        budget = worker.budget_tokens(self.constants.memory_share)
        return min(worker.info.context_tokens_max, budget)

    def largest(self) -> int | None:
        """The most tokens of one request that some worker can serve; None: there is no worker for
        this policy. Remembered, since every new request asks."""
        if self.largest_stale:
            workers = self.workers.active.values()
            able = [w for w in workers if self.preset.form in w.info.forms]
            self.largest_known = max(map(self.holds, able), default=None)
            self.largest_stale = False
        return self.largest_known

    def victim_of(self, running: Sequence[Request]) -> Request:
        """Whom the preset's rule parks first of these, at least one, in order of admission."""
        victim = VICTIMS[self.preset.victim]
        return victim(running, self.lengths, self.constants, self.pace.return_tokens)

    def give(self, worker: Worker, batch: Batch) -> None:
        """One more closed batch."""
        worker.give(batch)
        self.board.update(worker)

    def end(self, worker: Worker, batch_id: str) -> Batch | None:
        """This closed batch is over there; None if it was not there."""
        batch = worker.end(batch_id)
        if batch is not None:
            self.board.update(worker)
        return batch

    def touch(self, worker: Worker) -> None:
        """Leased: something changed there that may open room or close it."""
        if self.leased:
            self.touched[worker.info.worker] = None
            self.board.update(worker)
            self.board.reopen(worker)
            self.stirred = True

    @property
    def attempt_base(self) -> int:
        """No earlier leader's attempt is above this; none of ours is at or below."""
        return max(0, self.epoch - 1) * ATTEMPTS_PER_EPOCH

    @property
    def waiting(self) -> int:
        """Open requests that no worker is running now, wherever they wait."""
        return max(0, len(self.requests.open) - self.board.running)

    def send(self, command: SchedulerCommand) -> None:
        self.commands.append(command)

    def want_round(self, at: float) -> None:
        """Somebody joined the pool and is ready for a round from `at` on."""
        self.rounds.gathered_at = min(self.rounds.gathered_at, at)


def adopted_batch_id(request_id: str) -> str:
    """Closed: a request found on a worker after a takeover has a batch of its own in our books,
    since nobody here knows with whom it runs. It is over when its result comes, wanted or not."""
    return f"adopted-{request_id}"


def new_books(
    preset: Preset, constants: Constants, truth: Callable[[str], int] | None = None
) -> Books:
    """Empty books."""
    if preset.form == "closed":
        load_solver()
    pace, costs = Pace(), CostFit()
    workers = Workers(lost_max=constants.lost_workers_max)
    books: Books

    def output_tokens(request: Request) -> float:
        known = request.output_tokens
        return known + books.lengths.expected_remaining(known, request.spec.max_tokens)

    def left_by_class(request: Request) -> float:
        made, cap = request.output_tokens, request.spec.max_tokens
        return books.lengths.left_tokens(made, cap, books.kind_of(request))

    estimates = Estimates(
        output_tokens=output_tokens,
        prefill_s=lambda request: pace.prefill_s(request.input_tokens),
        token_s=lambda: pace.token_s,
        left_by_class=left_by_class,
        mean_volume=lambda: books.margin.mean_volume,
    )
    books = Books(
        preset=preset,
        constants=constants,
        requests=Requests(done_max=constants.done_max, done_ttl_s=constants.done_ttl_s),
        workers=workers,
        costs=costs,
        lines=_new_lines(preset, constants, estimates),
        shelf=Shelf(preset.order, by_length=preset.batching in SORTED_BY_LENGTH)
        if preset.form == "closed"
        else Shelf("fcfs", by_length=False),
        board=Board(preset.form),
        histories=Histories(constants),
        estimates=estimates,
        draws=Draws(0),
        truth=truth,
        pace=pace,
    )
    return books


def _new_lines(preset: Preset, constants: Constants, estimates: Estimates) -> Lines:
    """The lines of a leased policy; a closed one leaves them empty."""
    order = preset.order if preset.form == "leased" else "fcfs"
    make = partial(QUEUES[order], constants, estimates)
    return Lines(make=make, early=preset.binding == "early", central=make())


def take_forecast(books: Books, forecast: LengthForecast) -> None:
    """What the estimator knows now; a late and older word is ignored."""
    if books.forecast is not None and forecast.version < books.forecast.version:
        return
    books.forecast = forecast
    books.asked.clear()  # the estimator lives: what it has not answered by now was lost
    lengths = books.lengths
    books.board.set_mean_output(lengths.expected_output(max(1, lengths.longest)))
