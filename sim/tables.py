"""Tables: the files that workloads are read from.

A trace is CSV or Parquet with `arrival_s, prompt_tokens, output_tokens` (and, if known, `tenant,
class, priority, session_id`); a length table lacks `arrival_s`; a JSONL file holds one prompt a
line, as `prompt`, `question`, `text` or the first of `turns`.

Rows are numbered as an editor numbers lines: in a CSV the header is row 1.
"""

import csv
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sim.items import Item, WorkloadError

ITEMS_MAX = 10_000_000
"""More rows than this are a mistake in the file, not a workload."""
PROMPT_KEYS = ("prompt", "question", "text")
NEEDED = ("prompt_tokens", "output_tokens")
COLUMNS = ("arrival_s", *NEEDED, "tenant", "class", "priority", "session_id")
AZURE = {"timestamp": "arrival_s", "contexttokens": "prompt_tokens", "generatedtokens": NEEDED[1]}
"""Columns of Azure's public traces, in small letters, and what they are called here."""
Rows = Iterator[tuple[int, Mapping[str, Any]]]


def load_items(path: Path, limit: int | None = None) -> list[Item]:
    """The rows of a trace, length table or prompt file. Raises WorkloadError."""
    if not path.is_file():
        raise WorkloadError(f"{path}: no such file; give a .csv, .parquet or .jsonl file")
    items: list[Item] = []
    try:
        for number, row in _rows(path):
            if limit is not None and len(items) >= limit:
                break
            if len(items) >= ITEMS_MAX:
                raise WorkloadError(f"{path}: over {ITEMS_MAX} rows; cut it with --limit")
            items.append(_item(f"{path}, row {number}", row))
    except UnicodeDecodeError as error:
        raise WorkloadError(f"{path} is not text (UTF-8): {error.reason}") from error
    except csv.Error as error:
        raise WorkloadError(f"{path} is no CSV: {error}") from error
    if not items:
        raise WorkloadError(f"{path}: no rows")
    return items


def _rows(path: Path) -> Rows:
    match path.suffix.lower():
        case ".csv":
            yield from _csv_rows(path)
        case ".jsonl":
            yield from _json_rows(path)
        case ".parquet":
            yield from _parquet_rows(path)
        case other:
            raise WorkloadError(f"{path}: {other or 'no'} suffix; give .csv, .parquet or .jsonl")


def _csv_rows(path: Path) -> Rows:
    with path.open(newline="", encoding="utf-8-sig") as file:
        reader = csv.DictReader(file)
        if reader.fieldnames is not None:
            _check_columns(path, reader.fieldnames)
        for row in reader:
            if any(row.get(None) or ()):
                raise WorkloadError(
                    f"{path}, row {reader.line_num}: more values than columns; numbers are "
                    "written without separators of thousands"
                )
            yield reader.line_num, row


def _json_rows(path: Path) -> Rows:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise WorkloadError(f"{path}, row {number} is not JSON: {error}") from error
            if not isinstance(row, dict):
                raise WorkloadError(f"{path}, row {number} is no JSON object")
            if _prompt(row) is None:
                _check_columns(path, list(row))
            yield number, row


def _parquet_rows(path: Path) -> Rows:
    # On demand: a large package, and only these files need it.
    try:
        import pyarrow.parquet as parquet
        from pyarrow import ArrowException
    except ModuleNotFoundError as error:
        raise WorkloadError(
            f"{path}: Parquet needs pyarrow: "
            ".venv/bin/pip install -c constraints.txt pyarrow (or give a .csv)"
        ) from error
    number = 0
    try:
        file = parquet.ParquetFile(path)
        _check_columns(path, file.schema_arrow.names)
        for batch in file.iter_batches():
            for row in batch.to_pylist():
                number += 1
                yield number, row
    except ArrowException as error:
        raise WorkloadError(f"{path} is no Parquet file: {error}") from error


def _check_columns(path: Path, columns: Sequence[str]) -> None:
    """Raises WorkloadError, saying what there is and what to rename."""
    wrong = {c: c.strip() for c in columns if c != c.strip() and c.strip() in COLUMNS}
    prompts = {*PROMPT_KEYS, "turns"} & set(columns)
    missing = [name for name in NEEDED if name not in columns]
    if not wrong and (prompts or not missing):
        return
    azure = {c: AZURE[c.strip().lower()] for c in columns if c.strip().lower() in AZURE}
    renamed = [f"{old!r} to {new}" for old, new in (wrong or azure).items()]
    advice = f"; rename {', '.join(renamed)}" if renamed else ""
    if "arrival_s" in azure.values() and not wrong:
        advice += ", and write arrivals in seconds from the first one"
    for mark, called in ((";", "semicolons"), ("\t", "tabs")):
        if len(columns) == 1 and mark in columns[0]:
            advice = f"; the columns are divided by {called}: save the file with commas"
    found = ", ".join(repr(column) for column in columns)
    raise WorkloadError(
        f"{path}: needs the columns prompt_tokens and output_tokens, or a prompt; found are "
        f"{found}{advice}"
    )


def _item(where: str, row: Mapping[str, Any]) -> Item:
    prompt = _prompt(row)
    least = [_tokens(where, row, name, optional=prompt is not None) for name in NEEDED]
    return Item(
        arrival_s=_arrival(where, row),
        prompt_tokens=least[0],
        output_tokens=least[1],
        prompt=prompt,
        tenant=str(row.get("tenant") or ""),
        service_class=str(row.get("class") or ""),
        priority=0 if _empty(row.get("priority")) else _whole(where, row, "priority"),
        session_id=str(row.get("session_id") or ""),
    )


def _tokens(where: str, row: Mapping[str, Any], name: str, *, optional: bool) -> int:
    if optional and _empty(row.get(name)):
        return 1
    count = _whole(where, row, name)
    if count < 1:
        raise WorkloadError(f"{where}: {name} is {row[name]!r}; it must be at least 1")
    return count


def _whole(where: str, row: Mapping[str, Any], name: str) -> int:
    number = _number(where, row, name)
    if number != int(number):
        raise WorkloadError(f"{where}: {name} is {row[name]!r}, which is no whole number")
    return int(number)


def _arrival(where: str, row: Mapping[str, Any]) -> float | None:
    if _empty(row.get("arrival_s")):
        return None
    arrival_s = _number(where, row, "arrival_s")
    if arrival_s < 0:
        raise WorkloadError(f"{where}: arrival_s is {row['arrival_s']!r}; it must not be negative")
    return arrival_s


def _number(where: str, row: Mapping[str, Any], name: str) -> float:
    value = row.get(name)
    if _empty(value):
        raise WorkloadError(f"{where}: {name} is empty")
    try:
        number = float(str(value))
    except ValueError:
        number = math.nan
    if not math.isfinite(number):
        raise WorkloadError(f"{where}: {name} is {value!r}, which is no number")
    return number


def _empty(value: Any) -> bool:
    return value is None or (isinstance(value, str) and not value.strip())


def _prompt(row: Mapping[str, Any]) -> str | None:
    for key in PROMPT_KEYS:
        if isinstance(row.get(key), str):
            return str(row[key])
    turns = row.get("turns")
    return str(turns[0]) if isinstance(turns, list) and turns else None
