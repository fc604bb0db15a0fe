"""What the harness can do to a service from outside, through a small shared file.

`python -m bench.chaos.levers FILE SERVICE...` runs `tranche SERVICE...` with two things replaced:
what Python code reads as `time.time()` and `time.time_ns()` is shifted by a number in the file, and
SQLite gets no further page while the file says that the disk is full (`max_page_count`, so it
raises what it raises on a full disk). Monotonic clocks, and clocks that C code reads, stay.
"""

import mmap
import runpy
import sqlite3
import struct
import sys
import time
from pathlib import Path
from typing import Any

_LAYOUT = struct.Struct("dd")
"""Seconds that the wall clock is ahead; 1.0: the disk is full."""
PAGES_MAX = (1 << 32) - 2
PAGE_BYTES = 512
"""Small, so that a few rows need another page."""


class Levers:
    """The file, open on either side."""

    def __init__(self, file: Path) -> None:
        if not file.exists():
            file.write_bytes(bytes(_LAYOUT.size))
        with file.open("r+b") as opened:
            self._map = mmap.mmap(opened.fileno(), _LAYOUT.size)

    @property
    def ahead_s(self) -> float:
        """By how much the wall clock is wrong."""
        ahead: float = _LAYOUT.unpack_from(self._map)[0]
        return ahead

    @property
    def disk_full(self) -> bool:
        """Whether SQLite may take no further page."""
        return bool(_LAYOUT.unpack_from(self._map)[1])

    def set(self, *, ahead_s: float | None = None, disk_full: bool | None = None) -> None:
        """Takes effect at once."""
        ahead = self.ahead_s if ahead_s is None else ahead_s
        full = self.disk_full if disk_full is None else disk_full
        _LAYOUT.pack_into(self._map, 0, ahead, float(full))


def shift_clock(levers: Levers) -> None:
    """From now on this process's wall clock obeys."""
    true_s, true_ns = time.time, time.time_ns

    def shifted() -> float:
        return true_s() + levers.ahead_s

    def shifted_ns() -> int:
        return true_ns() + int(levers.ahead_s * 1e9)

    time.time, time.time_ns = shifted, shifted_ns


def limit_disk(levers: Levers) -> None:
    """From now on this process's databases obey."""
    connect = sqlite3.connect

    class Connection(sqlite3.Connection):
        """Looks at the lever before each statement."""

        _limited = False

        def execute(self, sql: str, *parameters: Any) -> sqlite3.Cursor:
            full = levers.disk_full
            if full != self._limited:
                self._limited = full
                super().execute(f"PRAGMA max_page_count={1 if full else PAGES_MAX}")
            return super().execute(sql, *parameters)

    def connect_limited(database: str, **options: Any) -> sqlite3.Connection:
        connection: sqlite3.Connection = connect(database, factory=Connection, **options)
        connection.execute(f"PRAGMA page_size={PAGE_BYTES}")  # before its first table only
        return connection

    sqlite3.connect = connect_limited  # type: ignore[assignment]


def main() -> None:
    """The command line: the file, then what `tranche` gets."""
    levers = Levers(Path(sys.argv[1]))
    shift_clock(levers)
    limit_disk(levers)
    sys.argv = ["tranche", *sys.argv[2:]]
    runpy.run_module("services", run_name="__main__")


if __name__ == "__main__":
    main()
