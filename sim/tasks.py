"""Tasks: one simulation each, as a process can be given it, and the run that comes back."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import msgspec

from shared.profiles import CostProfile
from sim.options import WorkloadChoice
from sim.parallel import RunFailed, run_all
from sim.progress import watched
from sim.run import Keep, run
from sim.runs import Load, Run
from sim.setup import Setup
from sim.slo import Slo


@dataclass(frozen=True, slots=True)
class Fixed:
    """What all runs of a command share but the workload."""

    profile: CostProfile
    slo: Slo
    kv_tokens: int | None = None
    max_tokens: int | None = None
    constants: Mapping[str, int | float | bool | str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Task:
    """A set-up, the load that it stands for, and what to keep of it."""

    setup: Setup
    load: Load
    keep: Keep

    @property
    def label(self) -> str:
        """For the progress display."""
        return f"{self.setup.policy}, {self.load.label}, seed {self.setup.seed}"


@dataclass(frozen=True, slots=True)
class Done:
    """What came back: the run, and the journal if it was wanted."""

    run: Run
    journal: bytes = b""


def tasks_of(
    policies: Sequence[str],
    loads: Sequence[Load],
    seeds: Sequence[int],
    choice: WorkloadChoice,
    fixed: Fixed,
    workers: int,
    keep: Keep,
) -> Iterator[Task]:
    """One for each policy, load and seed; a workload is made once for all policies. Raises
    WorkloadError."""
    for load in loads:
        for seed in seeds:
            workload, offered = choice.made(load, seed)
            for policy in policies:
                setup = Setup(
                    policy=policy,
                    constants=fixed.constants,
                    workers=workers,
                    profile=fixed.profile,
                    workload=workload,
                    seed=seed,
                    kv_tokens=fixed.kv_tokens,
                    max_tokens=fixed.max_tokens,
                    slo=fixed.slo,
                )
                yield Task(setup, offered, keep)


def perform(task: Task, progress: Callable[[int, int], None]) -> Done:
    """Run it. What a report cannot know of its load is put into its notes. Raises RunFailed."""
    try:
        outcome = run(task.setup, progress=progress, keep=task.keep)
    except Exception as error:  # a bug in a policy must not hide which run showed it
        raise RunFailed(f"{task.label}: {type(error).__name__}: {error}") from error
    notes = {
        **outcome.report.notes,
        "load": task.load.label,
        "seed": str(task.setup.seed),
        "profile": task.setup.profile.name,
    }
    if task.load.offered_rps is not None:
        notes["offered_rps"] = f"{task.load.offered_rps:.6g}"
    report = msgspec.structs.replace(outcome.report, notes=notes)
    done = Run(report, outcome.records, task.load, task.setup.seed, outcome.series)
    return Done(done, outcome.transcript if task.keep.journal else b"")


def run_tasks(tasks: Sequence[Task], jobs: int = 0, title: str = "") -> list[Done]:
    """All of them, in parallel processes, with a progress display. Raises RunFailed."""
    with watched([task.label for task in tasks], title) as watch:
        return run_all(perform, tasks, processes=jobs, watch=watch)
