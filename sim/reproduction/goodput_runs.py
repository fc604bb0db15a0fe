"""One closed-loop run of the goodput part: a policy, a length set, N clients; what passed the SLA.

All clients begin at once, so the first requests end in a wave, and the length history is empty:
until the first `warm` requests have ended nothing counts, for all policies alike. Then so many more
have to end that every client still has work; the drain is not simulated.

Counting 60 to 160 ended requests is a noisy measure: which of them end within the time, the long
or the short ones, moves it by 3 to 9 %. So requests are taken and ordered evenly by their output
length (`evenly`), and goodput is measured by work. What bounds an iteration is reading the KV
cache, so a request's work is the sum of its contexts over its output tokens, p L + L^2 / 2. Goodput
is (tokens made per second x mean context) / (mean work of a request) x (share of the output that
belongs to requests within the SLA). In the long run that is the number of such requests per second,
without the luck of what a short run holds. The plain count is kept beside it.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from statistics import fmean

from shared.profiles import load_profile
from sim.items import Item, Workload
from sim.mesh import SimMesh
from sim.report import Record
from sim.setup import Abort, Setup, Value
from sim.slo import Slo
from sim.synthetic import is_synthetic
from sim.workload import make_workload

O1 = Path(__file__).parents[1] / "data" / "sharegpt_o1.csv"
SETS = {"Dist-1": "dist-1", "Dist-2": "dist-2", "Dist-3": "dist-3", "ShareGPT-o1": str(O1)}
LIMITS = {"Dist-1": 4096, "Dist-2": 5000, "Dist-3": 4096, "ShareGPT-o1": 10_935}
"""`max_tokens` of every request: the longest output of its set."""
DRAWN = 4_000
"""Of the synthetic sets, from which requests are taken evenly."""
STRATA = 20
SLO = Slo(ttft=10.0, gap=1.5)
"""Of the source, per request, for models of 7B and 13B."""
WAITING_S = 8.0
"""Who has waited so long for a place is turned away, and its client sends its next request: the
source's server, which leaves 2 s of the 10 to the prefill."""
GAP_S = 1.49
"""The source's server ends who has waited so long for a next token (not under `aggressive`)."""
PROFILE = "llama-2-7b-a100"
KV_TOKENS = 120_000
"""Of the source's 7B server on one A100-80GB; a block is a token there."""

PARTS = 5
"""Of a run's time, by whose differences its noise is judged: on Dist-2, where they are shortest
for their requests, a part is about as long as a request takes."""

PAST_FUTURE = "Past-Future"
SOURCE_CONSERVATIVE = "conservative 12,000"


@dataclass(frozen=True, slots=True)
class Task:
    """One run."""

    lengths: str
    clients: int
    policy: str
    """A label of the section; `preset` and `constants` say what it is."""
    preset: str
    constants: Mapping[str, Value] = field(default_factory=dict)
    warm: int = 40
    """Requests that end before anything counts."""
    counted: int = 120
    """Requests that end while it does."""
    group: str = "main"
    gap_abort: bool = False
    kv_tokens: int = KV_TOKENS
    profile: str = PROFILE
    seed: int = 1


@dataclass(frozen=True, slots=True)
class Result:
    """What came out."""

    task: Task
    goodput_rps: float
    """Requests within the SLA per second, by work: see the module's text."""
    counted_rps: float
    """The same as a plain count."""
    good_tps: float
    """Their prompt and output tokens per second: the source's measure."""
    ended: int
    good: int
    late: int
    """Ended with too long a wait for the first token, or with too long a gap."""
    turned_away: int
    evictions: int
    kv_util: float
    batch: float
    duration_s: float
    parts_rps: tuple[float, ...] = ()
    """The plain count in each of `PARTS` equal parts of the time, per second."""


def setup_of(task: Task) -> Setup:
    """The run's set-up. Every request carries the same limit, the longest output of its set, and
    the true length stays with the worker."""
    source = SETS[task.lengths]
    drawn = DRAWN if is_synthetic(source) else None
    whole = make_workload(source, limit=drawn, clients=task.clients, seed=task.seed)
    count = task.warm + task.counted + task.clients
    items = evenly(whole.items, count, Random(f"order {task.seed}"))
    workload = Workload(task.lengths, items, task.clients)
    return Setup(
        policy=task.preset,
        workload=workload,
        profile=load_profile(task.profile),
        constants=task.constants,
        seed=task.seed,
        slo=SLO,
        kv_tokens=task.kv_tokens,
        block_tokens=1,
        max_tokens=LIMITS[task.lengths],
        abort=Abort(waiting_s=WAITING_S, gap_s=GAP_S if task.gap_abort else None),
        resubmit=True,
    )


def evenly(items: Sequence[Item], count: int, rng: Random) -> tuple[Item, ...]:
    """So many of the items, spread evenly over their output lengths, in an order of which every
    STRATA in a row have short and long ones alike: else which ones a run's time happens to hold
    would weigh more than the policy."""
    ranked = sorted(items, key=lambda item: item.output_tokens)
    chosen = [ranked[(2 * i + 1) * len(ranked) // (2 * count)] for i in range(count)]
    size = -(-count // STRATA)
    strata = [chosen[at : at + size] for at in range(0, count, size)]
    for stratum in strata:
        rng.shuffle(stratum)
    ordered: list[Item] = []
    for place in range(size):
        block = [stratum[place] for stratum in strata if place < len(stratum)]
        rng.shuffle(block)
        ordered += block
    return tuple(ordered)


def run(task: Task, progress: Callable[[int, int], None]) -> Result:
    """Simulate the warm-up and what counts."""
    most = task.warm + task.counted
    target = task.warm

    def watch(done: int, total: int) -> None:
        progress(done, most)
        # Several may end at once: also the last of them has to stop the world.
        mesh.world.stopped = done >= target

    mesh = SimMesh(setup_of(task), progress=watch)
    mesh.start()
    _until(mesh, target)
    before, target = _Before(mesh), most
    _until(mesh, target)
    return _result(task, mesh, before)


def _until(mesh: SimMesh, ended: int) -> None:
    mesh.world.stopped = False
    so_far = mesh.clients.ended
    while mesh.clients.ended < ended:
        mesh.world.run(mesh.world.now + mesh.setup.stalled_s)
        assert mesh.clients.ended > so_far, "nobody has ended for an hour"
        so_far = mesh.clients.ended


class _Before:
    """What was before anything counts."""

    def __init__(self, mesh: SimMesh) -> None:
        tally, worker = mesh.all_workers[0].tally, mesh.all_workers[0]
        self.at = mesh.world.now
        self.closed = {call.number for call in mesh.clients.calls if call.outcome is not None}
        self.evictions = worker.counts.evictions
        self.decode_tokens = tally.decode_tokens
        self.kv_seconds = tally.kv_block_seconds
        self.rows, self.iterations = tally.sequence_iterations, tally.iterations


def _result(task: Task, mesh: SimMesh, before: _Before) -> Result:
    calls = [c for c in mesh.clients.calls if c.outcome is not None]
    records = [call.record(0.0) for call in calls if call.number not in before.closed]
    done = [record for record in records if record.outcome == "completed"]
    good = [record for record in done if passes(record)]
    tally, counts = mesh.all_workers[0].tally, mesh.all_workers[0].counts
    duration_s = mesh.world.now - before.at
    made = tally.decode_tokens - before.decode_tokens
    kv_util = (tally.kv_block_seconds - before.kv_seconds) / task.kv_tokens / duration_s
    batch = (tally.sequence_iterations - before.rows) / (tally.iterations - before.iterations)
    work = made * kv_util * task.kv_tokens / batch
    mean_work = fmean(work_of(item) for item in mesh.setup.workload.items)
    of_good = sum(r.output_tokens for r in good) / max(1, sum(r.output_tokens for r in records))
    return Result(
        task=task,
        goodput_rps=work / mean_work * of_good / duration_s,
        counted_rps=len(good) / duration_s,
        good_tps=sum(r.prompt_tokens + r.output_tokens for r in good) / duration_s,
        ended=len(done),
        good=len(good),
        late=len(done) - len(good),
        turned_away=len(records) - len(done),
        evictions=counts.evictions - before.evictions,
        kv_util=kv_util,
        batch=batch,
        duration_s=duration_s,
        parts_rps=in_parts([r.last_token_s or 0.0 for r in good], before.at, mesh.world.now),
    )


def in_parts(ends: Sequence[float], since: float, until: float) -> tuple[float, ...]:
    """How many of these times are in each of `PARTS` equal parts, per second."""
    part_s = (until - since) / PARTS
    counts = Counter(min(PARTS - 1, int((end - since) / part_s)) for end in ends)
    return tuple(counts[part] / part_s for part in range(PARTS))


def work_of(item: Item) -> float:
    """The sum of its contexts over its output tokens."""
    return item.output_tokens * (item.prompt_tokens + item.output_tokens / 2)


def passes(record: Record) -> bool:
    """Whether it met the SLA."""
    return SLO.met(record.ttft_s, record.tpot_s, record.gap_max_s, record.e2e_s)
