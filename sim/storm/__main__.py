"""`python -m sim.storm --worlds 10000 --seed 1 --jobs 2`: many storms, and what became of them.

The result goes to a JSON file; the exit status is 1 if any promise was broken in any world. One
world again, with every violation: `--seed N --worlds 1`.
"""

import argparse
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

import msgspec
from rich.console import Console

from sim.parallel import RunFailed, run_all
from sim.progress import watched
from sim.storm.runs import Summary, chunks, run_chunk, summed

RESULTS = Path(__file__).parents[2] / "bench" / "results"
SHOWN_MAX = 20
"""Failing worlds; the file has all of them."""


def main(arguments: Sequence[str]) -> int:
    """Run them; 1 if a promise was broken."""
    parser = argparse.ArgumentParser(prog="python -m sim.storm", description=__doc__)
    parser.add_argument("--worlds", type=int, default=1000, help="how many, one seed each")
    parser.add_argument("--seed", type=int, default=1, help="of the first world")
    parser.add_argument("--jobs", type=int, default=0, help="processes; 0: one per core")
    parser.add_argument("--json", type=Path, default=None, help="default: bench/results/storm-DATE")
    options = parser.parse_args(arguments)
    console = Console(soft_wrap=True)
    tasks = chunks(options.seed, options.worlds)
    labels = [f"seeds {task.first} to {task.last}" for task in tasks]
    try:
        with watched(labels, f"{options.worlds} worlds") as watch:
            parts = run_all(run_chunk, tasks, processes=options.jobs, watch=watch)
    except (RunFailed, KeyboardInterrupt) as error:
        console.print(f"not finished: {error or 'interrupted'}")
        return 2
    summary = summed(options.seed, parts)
    path = options.json or RESULTS / f"storm-{datetime.now(UTC):%Y-%m-%d}.json"
    path.write_bytes(msgspec.json.format(msgspec.json.encode(summary), indent=1) + b"\n")
    _show(console, summary, path)
    return 1 if summary.failed else 0


def _show(console: Console, summary: Summary, path: Path) -> None:
    for world in summary.failed[:SHOWN_MAX]:
        console.print(f"seed {world.seed} ({world.policy}): {'; '.join(world.violations[:3])}")
        console.print(f"  again: python -m sim.storm --worlds 1 --seed {world.seed}")
    cpu = summary.cpu_s
    console.print(
        f"{summary.worlds} worlds, {sum(summary.faults.values())} faults, "
        f"{sum(summary.requests.values())} requests: {len(summary.failed)} worlds broke a promise"
    )
    console.print(
        f"CPU per world: mean {cpu['mean']:.3f} s, p99 {cpu['p99']:.3f} s, max {cpu['max']:.3f} s; "
        f"after the storm the last request ended within {summary.calm_s['max']:.1f} s "
        f"(p50 {summary.calm_s['p50']:.1f} s); written to {path}"
    )


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
