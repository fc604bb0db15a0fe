"""A storm: a whole mesh of real cores in virtual time, in which one seed's faults happen.

First everybody says hello. Then clients call while faults happen, and for a while after. When the
storm is over, everybody who is stopped goes on and whoever is missing is started; then every open
request must end, within a stated time, and nothing may be left anywhere.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from random import Random

from services.estimator.core.history import History
from services.gateway.core.ledger import Ledger
from services.scheduler.core.presets import preset_named
from services.scheduler.core.scheduler import Scheduler
from services.worker.core.worker import Worker
from services.worker.engines.api import EngineInfo
from shared.messages import Finished
from sim.checker import Violation
from sim.storm.asked import MODEL, Asked, Texts, Wish, drawn_wish
from sim.storm.broker import CALM, Broker
from sim.storm.check_end import check_end
from sim.storm.check_waits import Waits
from sim.storm.engine import StormEngine
from sim.storm.estimator import Estimator
from sim.storm.faults import perform
from sim.storm.gateway import Gateway
from sim.storm.judge import Judge
from sim.storm.plan import OUTPUT_MAX, PROMPT_MAX, Plan
from sim.storm.process import Process
from sim.storm.scheduler import SchedulerProcess
from sim.storm.worker import MakeCore, StormWorker
from sim.world import World

HELLO_S = 0.3
EXCUSED_S = 45.0
"""After a word to a worker was lost: until a listing (10 s) or the end of a lease that nobody
renews (30 s) has told its leader what it really holds."""
LOOK_S = 0.5
MENDED_S = 60.0
"""After the storm, beside the work itself: the longest chain of mending. A lease that nobody renews
ends after 30 s; the gateway's question after a silence of 5 s may come the third time, 20 s after
the second; a takeover takes a second, noticing a loss 2 or 3, a listing of what is held 10."""
SETTLE_S = 14.0
"""Until what is left must be gone: a worker lists what it holds every 10 s, a dead gateway is
noticed after 3."""
GONE_S = 5.0
"""Until the requests of dead gateways do not wait any more."""
PROBE_S = 8.0
"""A request that comes when all is over is served within so long, beside its own work."""


@dataclass(frozen=True, slots=True)
class Parts:
    """The cores that the mesh is made of. Tests put in others."""

    scheduler: Callable[..., Scheduler] = Scheduler
    ledger: Callable[..., Ledger] = Ledger
    worker: MakeCore = Worker
    history: Callable[[int, int], History] = History


REAL = Parts()


@dataclass(slots=True)
class Outcome:
    """What became of one world."""

    seed: int
    policy: str
    harsh: bool
    violations: list[Violation]
    faults: Counter[str] = field(default_factory=Counter)
    messages: Counter[str] = field(default_factory=Counter)
    requests: Counter[str] = field(default_factory=Counter)
    """By outcome."""
    calm_s: float = 0.0
    """From the end of the storm to the end of the last request."""
    allowed_s: float = 0.0
    """How long that might have taken."""
    waited_s: float = 0.0
    """The longest that a request made no progress although it could have been served."""
    events: int = 0
    epochs: int = 0
    short: int = 0
    """Evictions and refusals for memory that were excused."""


class Storm:
    """See the module's text."""

    def __init__(self, plan: Plan, parts: Parts = REAL) -> None:
        self.plan, self.parts = plan, parts
        self.world = World()
        self.broker = Broker(self.world, Random(f"broker {plan.seed}"))
        self.texts = Texts()
        self.judge = Judge(self.world, self.texts, plan.constants)
        self.processes: list[Process] = []
        self.estimator: Estimator | None = None
        self.stored: dict[str, Finished] = {}
        """The estimator's database."""
        self.faults: Counter[str] = Counter()
        self.asked: list[Asked] = []
        self.waits = Waits(self, plan.work_s + MENDED_S)
        self._luck = Random(f"luck {plan.seed}")
        self._numbers: Counter[str] = Counter()

    # -------------------------------------------------------------------------------- who is here

    def _living(self) -> list[Process]:
        self.processes = [process for process in self.processes if process.alive]
        return self.processes

    @property
    def workers(self) -> list[StormWorker]:
        return [p for p in self._living() if isinstance(p, StormWorker)]

    @property
    def gateways(self) -> list[Gateway]:
        return [p for p in self._living() if isinstance(p, Gateway)]

    @property
    def schedulers(self) -> list[SchedulerProcess]:
        return [p for p in self._living() if isinstance(p, SchedulerProcess)]

    @property
    def leader(self) -> SchedulerProcess | None:
        """The one with the largest epoch; an older one may believe that it leads."""
        leading = [s for s in self.schedulers if s.core is not None]
        return max(leading, key=lambda s: s.epoch, default=None)

    def _name(self, kind: str) -> str:
        self._numbers[kind] += 1
        return f"{kind}{self._numbers[kind]}"

    def _listeners(self) -> list[str]:
        """Queues that are bound to the leader's beats: those that exist."""
        return [name for name in self.broker.queues if name[0] in "gwe" and name[-1].isdigit()]

    def add_worker(self) -> None:
        plan, name = self.plan, self._name("w")
        form = preset_named(plan.policy).form
        info = EngineInfo(
            engine="storm",
            forms=(form,),
            model=MODEL,
            context_tokens_max=plan.slots,
            vocabulary_size=1 << 32,
            batch_size_max=plan.rows_max,
            kv_block_tokens=plan.block,
        )
        engine = StormEngine(info, plan.slots, self.texts, plan.step_s, plan.tokens_per_step)
        make = self.parts.worker
        self._start(
            StormWorker(self.world, self.broker, name, make, engine, plan.step_s, self.judge)
        )

    def add_gateway(self) -> None:
        name = self._name("g")
        gateway = Gateway(self.world, self.broker, name, self.parts.ledger, self.texts, self.judge)
        self._start(gateway)

    def add_scheduler(self) -> None:
        preset = preset_named(self.plan.policy)

        def make() -> Scheduler:
            return self.parts.scheduler(preset, self.plan.constants)

        name = self._name("s")
        process = SchedulerProcess(self.world, self.broker, name, make, self._listeners, self.judge)
        self.processes.append(process)
        process.connect()

    def add_estimator(self) -> None:
        if self.estimator is None or not self.estimator.alive:
            name = self._name("e")
            self.estimator = Estimator(
                self.world, self.broker, name, self.parts.history, self.stored
            )
            self._start(self.estimator)

    def _start(self, process: StormWorker | Gateway | Estimator) -> None:
        self.processes.append(process)
        if isinstance(process, StormWorker) and self.broker.weather is not CALM:
            self.excuse(process)
        process.start()
        if not self.broker.up:
            self.broker.cut(process)

    def excuse(self, worker: StormWorker) -> None:
        """Words to it may be lost from now on."""
        self.judge.excuse(worker.name, self.world.now + EXCUSED_S)

    def excuse_all(self) -> None:
        for worker in self.workers:
            self.excuse(worker)

    # --------------------------------------------------------------------------------- the course

    def run(self) -> Outcome:
        """From the first hello to the last look."""
        self._hello()
        plan, world = self.plan, self.world
        start = world.now
        self.broker.weather = plan.weather
        if plan.harsh:
            self.excuse_all()  # any word may be lost from now on, with or without a fault
        for wish in plan.wishes:
            world.at(start + wish.at, self._call, wish)
        for fault in plan.faults:
            world.at(start + fault.at, self._strike, fault)
        self.waits.start()
        world.run(start + plan.storm_s)
        self._calm()
        calm_at = world.now
        limit_s = plan.work_s + plan.reading_s + MENDED_S
        while self._open() and world.now < calm_at + limit_s and not self.judge.violations:
            world.run(world.now + LOOK_S)
        ended = [asked.ended_at for asked in self.asked if asked.outcome]
        for asked in self._open():
            told = f"{asked.request_id} is open {world.now - calm_at:.0f} s after the storm"
            self.judge.tell("liveness", f"{told}; it has {asked.got} of {asked.length} tokens")
        if not self.judge.violations:
            self._settle()
            self._probe()
        if not self.judge.violations:
            world.run(world.now + SETTLE_S)
            check_end(self)
        return self._outcome(max(0.0, max(ended, default=0.0) - calm_at), limit_s)

    def _hello(self) -> None:
        for _ in range(self.plan.schedulers):
            self.add_scheduler()
        self.add_estimator()
        for _ in range(self.plan.gateways):
            self.add_gateway()
        for _ in range(self.plan.workers):
            self.add_worker()
        self.world.run(HELLO_S)

    def _call(self, wish: Wish) -> None:
        """A client calls some gateway that takes calls; without one it is sent away."""
        able = [g for g in self.gateways if not (g.leaving or g.frozen)]
        if able:
            self.ask(able[self._luck.randrange(len(able))], wish)

    def ask(self, gateway: Gateway, wish: Wish) -> list[Asked]:
        """It calls this one."""
        before = set(gateway.asked)
        gateway.submit(wish)
        asked = [gateway.asked[name] for name in gateway.asked if name not in before]
        for one in asked:
            self.judge.asked(one)
        self.asked += asked
        return asked

    def _strike(self, fault: object) -> None:
        if perform(self, fault):  # type: ignore[arg-type]
            self.faults[fault.kind] += 1  # type: ignore[attr-defined]
        if self.plan.harsh:
            self.excuse_all()

    def _calm(self) -> None:
        """The storm is over: everybody goes on, and nobody is missing."""
        self.broker.weather = CALM
        if self.plan.harsh:
            self.excuse_all()
        for process in list(self._living()):
            process.thaw()
        if not [w for w in self.workers if not w.draining]:
            self.add_worker()
        if not self.schedulers:
            self.add_scheduler()
        if not [g for g in self.gateways if not g.leaving]:
            self.add_gateway()
        self.add_estimator()

    def _open(self) -> list[Asked]:
        """Requests of gateways that live."""
        return [asked for gateway in self.gateways for asked in gateway.open]

    def _settle(self) -> None:
        """The last fault may outlast the storm and all requests: a leader's line that is half
        open, say. Somebody leads and has collected, and dead gateways' requests wait no more."""
        end = self.world.now + MENDED_S
        while not self._is_led() and self.world.now < end:
            self.world.run(self.world.now + LOOK_S)
        self.world.run(self.world.now + GONE_S)

    def _is_led(self) -> bool:
        leader = self.leader
        if leader is None or leader.core is None:
            return False
        line = leader.line
        hears = line.up and line.hears and not line.mute
        return hears and leader.core.books.collecting_until is None

    def _probe(self) -> None:
        """The mesh serves as if nothing had been."""
        rng = Random(f"probe {self.plan.seed}")
        asked: list[Asked] = []
        for number, gateway in enumerate([g for g in self.gateways if not g.leaving]):
            wish = drawn_wish(rng, 1_000 + number, 0.0, PROMPT_MAX, OUTPUT_MAX)
            plain = Wish(
                wish.number, 0.0, wish.prompt_tokens, (wish.lengths[0],), wish.max_tokens, wish.seed
            )
            asked += self.ask(gateway, plain)
        end = self.world.now + PROBE_S + 0.5 * self.plan.work_s
        while any(not one.outcome for one in asked) and self.world.now < end:
            self.world.run(self.world.now + LOOK_S)
        for one in asked:
            if one.outcome not in ("stop", "length"):
                told = one.outcome or "open"
                self.judge.tell("liveness", f"the probe {one.request_id} is {told} {one.detail}")

    def _outcome(self, calm_s: float, allowed_s: float) -> Outcome:
        return Outcome(
            seed=self.plan.seed,
            policy=self.plan.policy,
            harsh=self.plan.harsh,
            violations=self.judge.violations,
            faults=self.faults,
            messages=self.broker.counts,
            requests=Counter(asked.outcome or "its gateway died" for asked in self.asked),
            calm_s=calm_s,
            allowed_s=allowed_s,
            waited_s=self.waits.longest_s,
            events=self.world.events,
            epochs=self.broker.epoch,
            short=len(self.judge.strange),
        )
