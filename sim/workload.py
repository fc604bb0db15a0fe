"""Workloads: which requests arrive when, from traces, length tables or prompts.

A trace is CSV or Parquet with `arrival_s, prompt_tokens, output_tokens` (and, if known, `tenant,
class, priority, session_id`); a length table lacks `arrival_s` and takes Poisson arrivals or
clients in a closed loop; a JSONL file holds one prompt a line, as `prompt`, `question`, `text` or
the first of `turns`.
"""

import csv
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any

ITEMS_MAX = 10_000_000
"""More rows than this are a mistake in the file, not a workload."""
PROMPT_KEYS = ("prompt", "question", "text")


class WorkloadError(Exception):
    """The file or the options do not make a workload; the message says what to change."""


@dataclass(frozen=True, slots=True)
class Item:
    """One request to come. Lengths are in tokens; `output_tokens` is the recorded truth, which a
    scheduler must never see."""

    arrival_s: float | None
    prompt_tokens: int
    output_tokens: int
    prompt: str | None = None
    tenant: str = ""
    service_class: str = ""
    priority: int = 0
    session_id: str = ""


@dataclass(frozen=True, slots=True)
class Workload:
    """Items in order of arrival. With `clients`, each of so many clients sends its next request
    when its last one has ended, and arrival times do not count."""

    name: str
    items: tuple[Item, ...]
    clients: int | None = None

    @property
    def offered_rps(self) -> float | None:
        """Requests per second over the span of arrivals; None in a closed loop."""
        if self.clients is not None or len(self.items) < 2:
            return None
        first, last = self.items[0].arrival_s or 0.0, self.items[-1].arrival_s or 0.0
        return (len(self.items) - 1) / (last - first) if last > first else None


def load_items(path: Path, limit: int | None = None) -> list[Item]:
    """The rows of a trace, length table or prompt file. Raises WorkloadError."""
    if not path.is_file():
        raise WorkloadError(f"{path}: no such file; give a .csv, .parquet or .jsonl file")
    rows = _rows(path)
    items: list[Item] = []
    for number, row in enumerate(rows, 1):
        if limit is not None and len(items) >= limit:
            break
        if number > ITEMS_MAX:
            raise WorkloadError(f"{path}: over {ITEMS_MAX} rows; cut it with --limit")
        items.append(_item(path, number, row))
    if not items:
        raise WorkloadError(f"{path}: no rows")
    return items


def make_workload(
    path: Path,
    *,
    limit: int | None = None,
    max_prompt_tokens: int | None = None,
    max_output_tokens: int | None = None,
    rate: float | None = None,
    rate_scale: float | None = None,
    clients: int | None = None,
    seed: int = 0,
) -> Workload:
    """The items of `path` with caps and arrivals applied.

    `rate` (requests/s) replaces the arrivals by Poisson ones, `rate_scale` speeds a trace's own
    up, `clients` makes a closed loop. Raises WorkloadError if the options contradict each other,
    or if a table without arrivals gets neither rate nor clients.
    """
    if sum(option is not None for option in (rate, rate_scale, clients)) > 1:
        raise WorkloadError("give one of --rate, --rate-scale and --clients")
    for name, value in (("rate", rate), ("rate-scale", rate_scale), ("clients", clients)):
        if value is not None and value <= 0:
            raise WorkloadError(f"--{name} must be above 0")
    items = [
        replace(
            item,
            prompt_tokens=_capped(item.prompt_tokens, max_prompt_tokens),
            output_tokens=_capped(item.output_tokens, max_output_tokens),
        )
        for item in load_items(path, limit)
    ]
    if clients is not None:
        return Workload(path.name, tuple(items), clients)
    return Workload(path.name, tuple(_with_arrivals(path, items, rate, rate_scale, seed)))


def _with_arrivals(
    path: Path, items: list[Item], rate: float | None, rate_scale: float | None, seed: int
) -> list[Item]:
    if rate is not None:
        rng, now, spread = Random(seed), 0.0, []
        for item in items:
            now += rng.expovariate(rate)
            spread.append(replace(item, arrival_s=now))
        return spread
    if any(item.arrival_s is None for item in items):
        raise WorkloadError(f"{path}: no arrival_s column; give --rate or --clients")
    scale = rate_scale or 1.0
    ordered = sorted(items, key=lambda item: item.arrival_s or 0.0)
    start = ordered[0].arrival_s or 0.0
    return [replace(item, arrival_s=((item.arrival_s or 0.0) - start) / scale) for item in ordered]


def _capped(value: int, cap: int | None) -> int:
    return value if cap is None else min(value, cap)


def _rows(path: Path) -> Iterable[Mapping[str, Any]]:
    match path.suffix.lower():
        case ".csv":
            with path.open(newline="", encoding="utf-8") as file:
                yield from csv.DictReader(file)
        case ".jsonl":
            with path.open(encoding="utf-8") as file:
                for line in filter(str.strip, file):
                    try:
                        yield json.loads(line)
                    except ValueError as error:
                        raise WorkloadError(f"{path}: a line is not JSON: {error}") from error
        case ".parquet":
            # On demand: a large package, and only these files need it.
            try:
                import pyarrow.parquet as parquet
            except ModuleNotFoundError as error:
                raise WorkloadError(
                    f"{path}: Parquet needs pyarrow: "
                    ".venv/bin/pip install -c constraints.txt pyarrow (or give a .csv)"
                ) from error
            for batch in parquet.ParquetFile(path).iter_batches():
                yield from batch.to_pylist()
        case other:
            raise WorkloadError(f"{path}: {other or 'no'} suffix; give .csv, .parquet or .jsonl")


def _item(path: Path, number: int, row: Mapping[str, Any]) -> Item:
    prompt = _prompt(row)
    if prompt is None and (row.get("prompt_tokens") is None or row.get("output_tokens") is None):
        raise WorkloadError(
            f"{path}, row {number}: needs prompt_tokens and output_tokens, or a prompt"
        )
    try:
        arrival = row.get("arrival_s")
        return Item(
            arrival_s=None if arrival in (None, "") else float(str(arrival)),
            prompt_tokens=max(1, int(row.get("prompt_tokens") or 1)),
            output_tokens=max(1, int(row.get("output_tokens") or 1)),
            prompt=prompt,
            tenant=str(row.get("tenant") or ""),
            service_class=str(row.get("class") or ""),
            priority=int(row.get("priority") or 0),
            session_id=str(row.get("session_id") or ""),
        )
    except ValueError as error:
        raise WorkloadError(f"{path}, row {number}: {error}") from error


def _prompt(row: Mapping[str, Any]) -> str | None:
    for key in PROMPT_KEYS:
        if isinstance(row.get(key), str):
            return str(row[key])
    turns = row.get("turns")
    return str(turns[0]) if isinstance(turns, list) and turns else None
