"""Tables: the files that workloads are read from.

A trace is CSV or Parquet with `arrival_s, prompt_tokens, output_tokens` (and, if known, `tenant,
class, priority, session_id`); a length table lacks `arrival_s`; a JSONL file holds one prompt a
line, as `prompt`, `question`, `text` or the first of `turns`.
"""

import csv
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from sim.items import Item, WorkloadError

ITEMS_MAX = 10_000_000
"""More rows than this are a mistake in the file, not a workload."""
PROMPT_KEYS = ("prompt", "question", "text")


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
            yield from _parquet_rows(path)
        case other:
            raise WorkloadError(f"{path}: {other or 'no'} suffix; give .csv, .parquet or .jsonl")


def _parquet_rows(path: Path) -> Iterable[Mapping[str, Any]]:
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


def _item(path: Path, number: int, row: Mapping[str, Any]) -> Item:
    prompt = _prompt(row)
    missing = [name for name in ("prompt_tokens", "output_tokens") if row.get(name) is None]
    if prompt is None and missing:
        raise WorkloadError(
            f"{path}, row {number}: needs prompt_tokens and output_tokens, or a prompt; "
            f"{' and '.join(missing)} missing"
        )
    try:
        return Item(
            arrival_s=_arrival(row.get("arrival_s")),
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


def _arrival(value: Any) -> float | None:
    if value in (None, ""):
        return None
    arrival_s = float(str(value))
    if not math.isfinite(arrival_s):
        raise ValueError(f"arrival_s is {value!r}, which is no time")
    return arrival_s


def _prompt(row: Mapping[str, Any]) -> str | None:
    for key in PROMPT_KEYS:
        if isinstance(row.get(key), str):
            return str(row[key])
    turns = row.get("turns")
    return str(turns[0]) if isinstance(turns, list) and turns else None
