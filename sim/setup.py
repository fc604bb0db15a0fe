"""A set-up: everything that one simulated run depends on. Equal set-ups give equal runs."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from services.estimator.core.history import LENGTH_MAX
from services.gateway.core.ledger import Patience
from services.scheduler.core.presets import preset_named
from services.scheduler.core.settings import Constants
from shared.profiles import CostProfile
from sim.items import Workload
from sim.network import CALM, DELAY_S, Faults
from sim.slo import Slo

WAITING_MAX = 1_000_000
"""Nobody is turned away for a full queue unless the set-up says so: what a policy does with a
load is the question here."""
UNHURRIED = Patience(gap_s=1.0, silence_s=1e6, first_silence_s=1e6)
"""In calm weather nothing is lost, and gateways need not ask. Tokens are only sent with reports,
so a long lease looks like a silence."""
NO_SLO = Slo()
Value = int | float | bool | str


@dataclass(frozen=True, slots=True)
class Abort:
    """When clients hang up, in seconds. The Past-Future authors' clients wait for a first token 8
    to 10 s, for a next one 1.49 s."""

    first_token_s: float | None = None
    gap_s: float | None = None
    waiting_s: float | None = None
    """Turned away by the server while no worker has it, as in the authors' server: 8 s, which
    leaves 2 s of a limit of 10 s to the prefill."""


@dataclass(frozen=True, slots=True)
class Setup:
    """One policy, one load, one seed."""

    policy: str
    workload: Workload
    profile: CostProfile
    workers: int = 1
    constants: Mapping[str, Value] = field(default_factory=dict)
    """Changes to the preset's."""
    seed: int = 0
    slo: Slo = NO_SLO
    kv_tokens: int | None = None
    """Per worker; None: the profile's."""
    block_tokens: int | None = None
    """None: the profile's."""
    max_tokens: int | None = None
    """The limit that every request carries; None: the longest output of the workload, the least
    that cuts none short."""
    prefix_cache: bool = False
    """Leased: a request that comes back to a worker finds what is left of its KV there."""
    composed_ahead: bool = False
    """Leased: an iteration's prefill is composed when the iteration before it starts, as by vLLM's
    asynchronous scheduling; who comes later sits one iteration out."""
    batch_size_max: int = 0
    """Of a worker's engine; 0: only memory limits."""
    noise_cv: float | None = None
    """Of one iteration's time; None: the profile's, 0: none."""
    network_delay_s: float = DELAY_S
    faults: Faults = CALM
    encoded: bool = False
    """Messages pass through their wire format."""
    abort: Abort = Abort()
    resubmit: bool = False
    """Requests that were refused or given up come again: at the end of the closed loop's queue, or
    after the retry time."""
    estimator_window: int = 1_000
    forecast_interval_s: float = 2.0
    history: tuple[int, ...] = ()
    """Output lengths that the estimator knows from before."""
    told: bool = False
    """The gateway asks for predictions (`Accepted`)."""
    streamed: bool = True
    """Closed batches: clients see tokens when they are made. False: at the end of their batch, as
    in SCLS. Leased: the scheduler is told whether clients read along."""
    patience: Patience | None = None
    """Of the gateway; None: the real one's where something may be lost, else `UNHURRIED`."""
    stalled_s: float = 3_600.0
    """The run is over, as failed, when no request has ended for so long."""

    def __post_init__(self) -> None:
        assert self.workers > 0
        assert len(self.workload.items) > 0
        assert all(0 < item.output_tokens <= LENGTH_MAX for item in self.workload.items)

    @property
    def kv_tokens_each(self) -> int:
        """KV slots of one worker."""
        return self.kv_tokens or self.profile.kv_tokens

    @property
    def block_tokens_each(self) -> int:
        """Slots in one block."""
        return self.block_tokens or self.profile.kv_block_tokens

    @property
    def composes_after_s(self) -> float | None:
        """See `LeasedEngine`: the scheduler's answer to an iteration's reports is in time."""
        return 4 * self.network_delay_s if self.composed_ahead else None

    @property
    def cap_tokens(self) -> int:
        """`max_tokens` of every request."""
        return self.max_tokens or max(item.output_tokens for item in self.workload.items)

    @property
    def cv(self) -> float:
        """Noise of one iteration."""
        return self.profile.noise_cv if self.noise_cv is None else self.noise_cv

    @property
    def gateway_patience(self) -> Patience:
        """How long missing tokens are waited for."""
        return self.patience or (UNHURRIED if self.faults == CALM else Patience())

    def all_constants(self) -> Constants:
        """The preset's, then this set-up's."""
        preset = preset_named(self.policy)
        return preset.with_constants(**{"waiting_max": WAITING_MAX, **self.constants})
