"""The database as a loop sees it: the store, in the one thread that may touch it."""

import asyncio
import sqlite3
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

from services.estimator.settings import EstimatorSettings
from services.estimator.store import HistoryStore, open_store
from shared.messages import Finished, FinishReason

T = TypeVar("T")

_DAMAGE_CODES = (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)
_PRIMARY_CODE = 0xFF


class Database:
    """An open store. All methods raise sqlite3.Error."""

    def __init__(
        self,
        settings: EstimatorSettings,
        thread: ThreadPoolExecutor,
        store: HistoryStore,
        moved: Path | None,
    ) -> None:
        """Use `open`."""
        self._settings = settings
        self._thread = thread
        self._store = store
        self.moved = (str(moved),) if moved else ()
        """Where a damaged file was moved at the opening."""

    @classmethod
    async def open(cls, settings: EstimatorSettings, thread: ThreadPoolExecutor) -> "Database":
        """`thread` has one worker. Raises SetupError for a file that cannot be used."""
        path, rows_max = settings.database_path(), settings.rows_max
        loop = asyncio.get_running_loop()
        store, moved = await loop.run_in_executor(thread, open_store, path, rows_max, time.time())
        return cls(settings, thread, store, moved)

    async def load(self, window: int) -> tuple[list[Finished], dict[tuple[str, FinishReason], int]]:
        """The latest lengths of each model, oldest first, and the totals."""
        store = self._store
        return await self._run(lambda: (store.recent(window), store.totals()))

    async def add(self, finished: Finished) -> bool:
        """Store durably; False if it was stored before."""
        store, now = self._store, time.time()
        return await self._run(lambda: store.add(finished, now))

    async def reopen(self, rows: Iterable[Finished]) -> str:
        """Open anew after damage, and store these rows in a new file; where the old one went.

        Raises SetupError too.
        """
        self._store, moved = await self._run(lambda: self._replace(tuple(rows)))
        return str(moved or "")

    async def close(self) -> None:
        """Fold the log into the file."""
        await self._run(self._store.close)

    def _replace(self, rows: tuple[Finished, ...]) -> tuple[HistoryStore, Path | None]:
        self._store.close()
        now = time.time()
        store, moved = open_store(self._settings.database_path(), self._settings.rows_max, now)
        for row in rows:
            store.add(row, now)
        return store, moved

    async def _run(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def is_damage(error: sqlite3.Error) -> bool:
    """Trying again will not help: the file is broken, or closed after a failed `reopen`."""
    code = getattr(error, "sqlite_errorcode", 0) & _PRIMARY_CODE
    return code in _DAMAGE_CODES or isinstance(error, sqlite3.ProgrammingError)
