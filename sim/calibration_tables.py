"""Reading calibration tables: measured iterations in CSV or Parquet.

Columns `model,gpu,tp,phase,batch_size,context_len,latency_ms`. Phase `prefill`: `batch_size`
prompts of `context_len` tokens in one iteration; `decode`: one token for each of `batch_size`
sequences with KV of `context_len`; `mixed`: a chunk of `prefill_chunk` tokens over `kv_prefill`
cached ones together with `n_decode` decodes of KV `kv_decode`; where a prefill row has
`prefill_chunk`, it counts. Optional: `kv_capacity_tokens`.
"""

import csv
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sim.calibration_cells import CalibrationError, Cell

REQUIRED = ("model", "gpu", "tp", "phase", "batch_size", "context_len", "latency_ms")
MIXED = ("prefill_chunk", "kv_prefill", "n_decode", "kv_decode")
ROWS_MAX = 1_000_000


@dataclass(slots=True)
class Table:
    """The cells of one model on one kind of worker."""

    model: str
    gpu: str
    tp: int
    cells: list[Cell] = field(default_factory=list)
    kv_tokens: int = 0
    """0: the table does not say."""

    def within(self, kv_tokens: int) -> list[Cell]:
        """The cells that a worker with so much memory can ever see."""
        return [cell for cell in self.cells if cell.memory_tokens <= kv_tokens]


def read_tables(path: Path) -> list[Table]:
    """All tables in a file, in order of appearance. Raises CalibrationError."""
    tables: dict[tuple[str, str, int], Table] = {}
    for number, row in enumerate(_rows(path), start=2):
        if number > ROWS_MAX:
            raise CalibrationError(f"{path}: more than {ROWS_MAX} rows")
        try:
            key = (str(row["model"]), str(row["gpu"]), int(float(row["tp"])))
            table = tables.setdefault(key, Table(*key))
            table.cells.append(cell_of(row))
            table.kv_tokens = table.kv_tokens or int(float(row.get("kv_capacity_tokens") or 0))
        except (ValueError, TypeError) as error:
            raise CalibrationError(f"{path}, row {number}: {error}") from error
    if not tables:
        raise CalibrationError(f"{path} has no rows")
    return list(tables.values())


def cell_of(row: Mapping[str, Any]) -> Cell:
    """One row. Raises ValueError."""
    phase, seconds = str(row["phase"]), float(row["latency_ms"]) / 1e3
    if not 0 < seconds < float("inf"):
        raise ValueError(f"latency_ms is {row['latency_ms']!r}; it must be above 0")
    rows, context = int(float(row["batch_size"])), int(float(row["context_len"]))
    chunk, cached, decodes, kv = (int(float(row.get(name) or 0)) for name in MIXED)
    if phase == "mixed":
        if not chunk or not decodes:
            raise ValueError(f"a mixed row needs {', '.join(MIXED)}")
        return Cell(((chunk, cached),), decodes, decodes * kv, seconds)
    if rows < 1 or context < 1:
        raise ValueError("batch_size and context_len are at least 1")
    if phase == "prefill":
        piece = (chunk, cached) if chunk else (context, 0)
        return Cell((piece,) * rows, 0, 0, seconds)
    if phase == "decode":
        return Cell((), rows, rows * context, seconds)
    raise ValueError(f"phase is prefill, decode or mixed, not {phase!r}")


def _rows(path: Path) -> Iterable[Mapping[str, Any]]:
    if not path.is_file():
        raise CalibrationError(f"{path} is no file")
    if path.suffix == ".parquet":
        return _parquet_rows(path)
    try:
        with path.open(newline="", encoding="utf-8") as file:
            reader = csv.DictReader(file)
            rows, names = list(reader), reader.fieldnames or ()
    except (UnicodeDecodeError, csv.Error) as error:
        raise CalibrationError(f"{path} is neither CSV nor Parquet: {error}") from error
    _need(path, names)
    return rows


def _parquet_rows(path: Path) -> list[dict[str, Any]]:
    try:
        from pyarrow import ArrowException
        from pyarrow.parquet import read_table
    except ModuleNotFoundError as error:
        raise CalibrationError(
            f"{path} is Parquet: .venv/bin/pip install -c constraints.txt -e '.[parquet]'"
        ) from error
    try:
        table = read_table(path)
    except (ArrowException, OSError) as error:
        raise CalibrationError(f"{path}: {error}") from error
    _need(path, table.column_names)
    rows: list[dict[str, Any]] = table.to_pylist()
    return rows


def _need(path: Path, names: Iterable[str]) -> None:
    missing = sorted(set(REQUIRED) - set(names))
    if missing:
        raise CalibrationError(f"{path} lacks the columns {', '.join(missing)}")
