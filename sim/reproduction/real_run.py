"""A recorded run of a real vLLM server: what came when, what became of it, and its limits.

The files are described in sim/data/vllm_runs/README.md.
"""

import csv
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sim.items import Item, Workload, WorkloadError

Floats = NDArray[np.float64]
RUNS = Path(__file__).parents[1] / "data" / "vllm_runs"
SUFFIXES = ("requests.csv", "timeseries.csv", "meta.json")
ASYNCHRONOUS_SINCE = (0, 14)
"""vLLM schedules the next iteration while one runs, by default since 0.14.0 (its release notes)."""
OFFSETS_S = np.arange(-2.0, 5.0, 0.01)
"""Tried, of the logger's clock against that of the requests."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Of the engine, as its record says; None: the record does not say."""

    kv_tokens: int | None
    block_tokens: int
    running_max: int
    iteration_tokens: int
    prefix_cache: bool
    asynchronous: bool
    engines: int
    """Replicas behind one front end."""


@dataclass(frozen=True, slots=True)
class RealRun:
    """Times in seconds; of requests from the first arrival, in its order."""

    name: str
    model: str
    gpu: str
    version: str
    limits: Limits
    arrival_s: Floats
    first_s: Floats
    last_s: Floats
    prompt_tokens: Floats
    output_tokens: Floats
    sampled_s: Floats
    """End of each second of the log, on the clock of the requests."""
    running: Floats
    waiting: Floats
    kv_share: Floats
    """0 to 1; all 0: not recorded."""

    @property
    def ttft_s(self) -> Floats:
        return self.first_s - self.arrival_s

    @property
    def e2e_s(self) -> Floats:
        return self.last_s - self.arrival_s

    @property
    def tpot_s(self) -> Floats:
        """Of requests with one token: 0, as in our reports."""
        return (self.last_s - self.first_s) / np.maximum(1.0, self.output_tokens - 1)

    @property
    def duration_s(self) -> float:
        return float(self.last_s.max())

    @property
    def workload(self) -> Workload:
        rows = zip(self.arrival_s, self.prompt_tokens, self.output_tokens, strict=True)
        items = tuple(
            Item(arrival_s=float(at), prompt_tokens=int(prompt), output_tokens=int(output))
            for at, prompt, output in rows
        )
        return Workload(self.name, items)


def load_run(files: Sequence[str | Path]) -> RealRun:
    """A run from its three files, in any order, or from the beginning that their names share."""
    paths = _three(files)
    meta = json.loads(paths["meta.json"].read_text(encoding="utf-8"))
    requests = sorted(_rows(paths["requests.csv"]), key=lambda row: row["arrival_s"])
    series = _rows(paths["timeseries.csv"])
    if not requests or not series:
        raise WorkloadError(f"{paths['requests.csv']}: no requests, or no time series beside it")
    start = requests[0]["arrival_s"]
    first_s = _column(requests, "first_token_s") - start
    prompts = _column(requests, "prompt_tokens")
    ticks = _column(series, "t")
    offset_s = clock_offset_s(ticks, _column(series, "prompt_throughput"), first_s, prompts)
    return RealRun(
        name=paths["requests.csv"].name.removesuffix("requests.csv").rstrip("_"),
        model=str(meta.get("model", "")),
        gpu=str(meta.get("hardware", {}).get("device_name", "")),
        version=str(meta.get("vllm_version", "")),
        limits=limits_of(meta),
        arrival_s=_column(requests, "arrival_s") - start,
        first_s=first_s,
        last_s=_column(requests, "last_token_s") - start,
        prompt_tokens=prompts,
        output_tokens=_column(requests, "output_tokens"),
        sampled_s=ticks - offset_s,
        running=_column(series, "running"),
        waiting=_column(series, "waiting"),
        kv_share=_column(series, "kv_cache_pct") / 100,
    )


def limits_of(meta: Mapping[str, Any]) -> Limits:
    """What a record says of the engine. One block of the pool is vLLM's null block, which holds
    nothing."""
    given, cache = meta.get("engine_kwargs", {}), meta.get("kv_cache", {})
    scheduler = meta.get("resolved_config", {}).get("scheduler_config", {})
    block = int(cache.get("block_size") or 16)
    blocks = cache.get("num_gpu_blocks")
    version = str(meta.get("vllm_version", "")).split(".")
    since = tuple(int(part) for part in version[:2] if part.isdigit()) >= ASYNCHRONOUS_SINCE
    return Limits(
        kv_tokens=(int(blocks) - 1) * block if blocks else None,
        block_tokens=block,
        running_max=int(given.get("max_num_seqs") or 256),
        iteration_tokens=int(given.get("max_num_batched_tokens") or 2048),
        prefix_cache=bool(cache.get("enable_prefix_caching", True)),
        asynchronous=bool(scheduler.get("async_scheduling", since)),
        engines=int(given.get("data_parallel_size") or 1),
    )


def clock_offset_s(
    ticks: Floats, prompt_rates: Floats, first_s: Floats, prompt_tokens: Floats
) -> float:
    """How far the logger's clock is ahead of the requests'. It counts a prompt in the second of its
    first token: the offset with which its counts are met best, the middle one of those."""
    edges = np.concatenate(([-np.inf], ticks))
    widths = np.diff(np.concatenate(([ticks[0] - np.median(np.diff(ticks))], ticks)))
    misses = []
    for offset_s in OFFSETS_S:
        counted, _ = np.histogram(first_s + offset_s, edges, weights=prompt_tokens)
        misses.append(float(np.abs(counted - prompt_rates * widths).sum()))
    best = OFFSETS_S[np.array(misses) <= min(misses) + 0.5]
    return float(np.median(best))


def _three(files: Sequence[str | Path]) -> dict[str, Path]:
    names = [str(file) for file in files]
    if len(names) == 1 and not names[0].endswith(SUFFIXES):
        names = [f"{names[0]}_{suffix}" for suffix in SUFFIXES]
    found = {s: Path(name) for s in SUFFIXES for name in names if name.endswith(s)}
    missing = [s for s in SUFFIXES if s not in found or not found[s].is_file()]
    if missing:
        raise WorkloadError(f"a run has three files; no …{', …'.join(missing)} in {names}")
    return found


def _rows(path: Path) -> list[dict[str, float]]:
    with path.open(encoding="utf-8", newline="") as file:
        return [
            {name: float(value) for name, value in row.items() if value}
            for row in csv.DictReader(file)
        ]


def _column(rows: Sequence[Mapping[str, float]], name: str) -> Floats:
    return np.array([row.get(name, 0.0) for row in rows])
