"""The journal file: every event and decision, as `core.replay` reads them."""

import time
from pathlib import Path
from typing import BinaryIO

from services.scheduler.core.replay import Started, Step, to_bytes

BUFFER_BYTES = 1 << 16
FLUSHED_S = 0.5
"""What was recorded can be read so much later, while the scheduler lives: it beats as often."""


class Journal:
    """Appends to a new file. After `bytes_max`, or after an error of the disk, it records no more:
    scheduling goes on."""

    def __init__(self, path: Path, bytes_max: int) -> None:
        """Raises OSError if the file cannot be made."""
        self._file: BinaryIO | None = path.open("wb", buffering=BUFFER_BYTES)
        self._left = bytes_max
        self._flushed_at = time.monotonic()
        self.error = ""
        """Why it stopped; empty while it records."""

    def record(self, record: Started | Step) -> None:
        if self._file is None:
            return
        body = to_bytes(record)
        self._left -= len(body)
        if self._left < 0:
            self._stop("it reached its greatest size")
            return
        try:
            self._file.write(body)
            now = time.monotonic()
            if now >= self._flushed_at + FLUSHED_S:
                self._flushed_at = now
                self._file.flush()
        except OSError as error:
            self._stop(str(error))

    def close(self) -> None:
        self._stop("closed")

    def _stop(self, why: str) -> None:
        file, self._file = self._file, None
        if file is None:
            return
        self.error = why
        try:
            file.close()
        except OSError as error:
            self.error = f"{why}; {error}"
