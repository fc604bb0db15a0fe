"""SCLS against SLS, its ablations, ILS and paged engines, on simulated A100 workers."""

from collections.abc import Callable, Sequence

from sim.reproduction.scls_checks import checks
from sim.reproduction.scls_fit import FitFigures, FitTask, fit_tasks, run_fit
from sim.reproduction.scls_pictures import pictures
from sim.reproduction.scls_results import Results
from sim.reproduction.scls_runs import Figures, Task, run as run_one, tasks as run_tasks
from sim.reproduction.scls_tables import tables
from sim.reproduction.section import Section

NAME = "scls"
TITLE = "SCLS: slices, batches and balance"
TEXT = """
Eight workers timed by the profile of Llama-2-13b on an A100 (53,696 KV tokens each, cost noise
on), lengths of ShareGPT capped at 1024 input and 1024 output tokens, 10,000 requests in random
order, Poisson arrivals. The scheduler is the mesh's own core. All policies with one seed see the
same requests at the same times. Throughput is completed requests over the time from first arrival
to last completion, so the drain at the end counts, where imbalance costs.

Of the paper only the abstract was read. *Fact*: throughput is up to 315.8 % above the baselines',
SLS batches a small fixed number, ILS limits parallelism, neither balances load. *Recollected, not
confirmed*: S = 128, the cap of 1024, 8 A100s, a batch of 12 for SLS with DeepSpeed, round-robin,
max(0.5 x least load, 3 s) as interval, and the ladder of ablations. *Reconstruction*: the dynamic
programme, the serving-time model's closed form, and how SO and PM make rounds. Here **SLS** deals
each complete batch to the next worker in turn, and an idle worker takes what waits; **SO**,
**PM**, **AB** and **LB** place the whole pool every 3 s. **ILS** is continuous batching in
iterations of at most 768 tokens, decodes first, KV blocks of 128, a constant cap, requests dealt
in turn. Clients of closed batches get tokens at the end of a slice.
"""


def tasks(*, quick: bool) -> list[Task | FitTask]:
    """The long ones first."""
    return [*fit_tasks(quick=quick), *run_tasks(quick=quick)]


def run(task: Task | FitTask, progress: Callable[[int, int], None]) -> Figures | FitFigures:
    """One simulated run, or one fit."""
    return run_fit(task) if isinstance(task, FitTask) else run_one(task, progress)


def section(results: Sequence[Figures | FitFigures]) -> Section:
    """Tables, statements and pictures."""
    found = Results(
        runs=[result for result in results if isinstance(result, Figures)],
        fits=[result for result in results if isinstance(result, FitFigures)],
    )
    return Section(
        name=NAME,
        title=TITLE,
        text=TEXT,
        tables=tables(found),
        checks=checks(found),
        pictures=pictures(found),
    )
