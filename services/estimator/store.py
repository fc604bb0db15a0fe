"""The store: finished requests in SQLite, so that a restart forgets nothing.

One table with a unique request id, pruned to the latest rows; totals per model and reason beside
it. Each `add` is one transaction: what it returns from is on the disk as far as this process is
concerned. WAL with synchronous=NORMAL: a killed process loses nothing, a power cut at most the
last moments, which for a history of lengths is nothing either.

Not thread-safe: one thread opens it and uses it.
"""

import sqlite3
import time
from contextlib import suppress
from pathlib import Path

from services.estimator.core.history import LENGTH_REASONS, MODELS_MAX
from shared.config import SetupError
from shared.messages import Finished, FinishReason

IN_MEMORY = ":memory:"
APPLICATION_ID = 0x54524E43
"""`TRNC` in the file's head: ours, and nobody else's database, may be called damaged."""
SCHEMA_VERSION = 1
PRUNE_EVERY = 1_000
"""Rows beyond the limit at which the oldest are deleted; seldom, since it costs milliseconds."""
BUSY_S = 0.5
"""How long to wait for another process (a backup, a curious person) to let go of the file."""

_SCHEMA = """
CREATE TABLE finished (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    request_id TEXT NOT NULL UNIQUE,
    model TEXT NOT NULL,
    endpoint TEXT NOT NULL,
    tenant TEXT NOT NULL,
    prompt_tokens INTEGER NOT NULL,
    output_tokens INTEGER NOT NULL,
    max_tokens INTEGER NOT NULL,
    reason TEXT NOT NULL,
    epoch INTEGER NOT NULL,
    stored_at REAL NOT NULL
);
CREATE INDEX finished_by_model ON finished (model, id);
CREATE TABLE totals (
    model TEXT NOT NULL,
    reason TEXT NOT NULL,
    requests INTEGER NOT NULL,
    PRIMARY KEY (model, reason)
) WITHOUT ROWID;
"""
_COLUMNS = (
    "request_id, model, endpoint, tenant, prompt_tokens, output_tokens, max_tokens, reason, epoch"
)


class CorruptDatabase(Exception):
    """The file is damaged, or no SQLite database at all."""


class HistoryStore:
    """An open database. All methods raise sqlite3.Error if the disk or the file fails."""

    def __init__(self, database: str, rows_max: int) -> None:
        """Open or create. `rows_max`: rows kept, of all models together.

        Raises SetupError for a path that cannot be used or a newer schema, CorruptDatabase.
        """
        self._rows_max = rows_max
        if database != IN_MEMORY:
            _make_folder(Path(database))
        try:
            self._connection = sqlite3.connect(database, timeout=BUSY_S, isolation_level=None)
        except sqlite3.OperationalError as error:
            raise _unusable(database, error) from error
        try:
            self._prepare(database)
        except BaseException:
            self._connection.close()
            raise

    def add(self, finished: Finished, stored_at: float) -> bool:
        """Store one request durably; False if it is there already. `stored_at`: wall-clock s."""
        with self._transaction() as connection:
            row = (
                *(finished.request_id, finished.model, finished.endpoint, finished.tenant),
                *(finished.prompt_tokens, finished.output_tokens, finished.max_tokens),
                *(finished.reason, finished.epoch, stored_at),
            )
            stored = connection.execute(
                f"INSERT OR IGNORE INTO finished ({_COLUMNS}, stored_at) "  # noqa: S608 - constant
                "VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)",
                row,
            )
            if stored.rowcount == 0:
                return False
            connection.execute(
                "INSERT INTO totals VALUES (?, ?, 1) "
                "ON CONFLICT (model, reason) DO UPDATE SET requests = requests + 1",
                (finished.model, finished.reason),
            )
            last_id = stored.lastrowid or 0
            if last_id % PRUNE_EVERY == 0:
                self._prune(last_id - self._rows_max)
        return True

    def recent(self, window: int) -> list[Finished]:
        """The last `window` lengths of each of the latest MODELS_MAX models, oldest first."""
        reasons = ", ".join(f"'{reason}'" for reason in LENGTH_REASONS)
        rows = self._connection.execute(
            f"WITH ranked AS (SELECT *, row_number() OVER (PARTITION BY model ORDER BY id DESC) "  # noqa: S608 - constants
            f"AS age FROM finished WHERE reason IN ({reasons}) AND model IN "
            f"(SELECT model FROM finished GROUP BY model ORDER BY max(id) DESC LIMIT ?)) "
            f"SELECT {_COLUMNS} FROM ranked WHERE age <= ? ORDER BY id",
            (MODELS_MAX, window),
        )
        return [_finished(row) for row in rows]

    def totals(self) -> dict[tuple[str, FinishReason], int]:
        """Requests ever stored, by model and reason; pruned ones count too."""
        rows = self._connection.execute("SELECT model, reason, requests FROM totals")
        return {(model, reason): requests for model, reason, requests in rows}

    def count(self) -> int:
        """Rows now in the table."""
        (rows,) = self._connection.execute("SELECT count(*) FROM finished").fetchone()
        return int(rows)

    def close(self) -> None:
        """Fold the write-ahead log into the file."""
        self._connection.close()

    def _transaction(self) -> "_Transaction":
        return _Transaction(self._connection)

    def _prepare(self, database: str) -> None:
        try:
            self._connection.execute("PRAGMA journal_mode = WAL")
            self._connection.execute("PRAGMA synchronous = NORMAL")
            (verdict,) = self._connection.execute("PRAGMA quick_check(1)").fetchone()
            if verdict != "ok":
                raise CorruptDatabase(f"{database}: {verdict}")
            self._check_schema(database)
            self.totals()
        except sqlite3.OperationalError as error:
            if _is_missing_table(error):
                raise CorruptDatabase(f"{database}: {error}") from error
            raise _unusable(database, error) from error
        except sqlite3.DatabaseError as error:
            raise CorruptDatabase(f"{database}: {error}") from error

    def _check_schema(self, database: str) -> None:
        (application,) = self._connection.execute("PRAGMA application_id").fetchone()
        (schema,) = self._connection.execute("PRAGMA user_version").fetchone()
        (tables,) = self._connection.execute("SELECT count(*) FROM sqlite_schema").fetchone()
        if application != APPLICATION_ID and tables:
            raise SetupError(
                f"{database} is a database of something else; choose another --database"
            )
        if schema > SCHEMA_VERSION:
            raise SetupError(
                f"the history in {database} has schema {schema}; this version knows "
                f"{SCHEMA_VERSION}: upgrade, or choose another --database"
            )
        if not tables:
            self._create()

    def _create(self) -> None:
        with self._transaction() as connection:
            for statement in _SCHEMA.split(";"):
                connection.execute(statement)
            connection.execute(f"PRAGMA application_id = {APPLICATION_ID}")
            connection.execute(f"PRAGMA user_version = {SCHEMA_VERSION}")

    def _prune(self, last_id: int) -> None:
        """Delete rows up to this id, and totals of models that have no row any more."""
        self._connection.execute("DELETE FROM finished WHERE id <= ?", (last_id,))
        self._connection.execute(
            "DELETE FROM totals WHERE model NOT IN (SELECT DISTINCT model FROM finished)"
        )


class _Transaction:
    """BEGIN IMMEDIATE … COMMIT, or ROLLBACK after an error."""

    def __init__(self, connection: sqlite3.Connection) -> None:
        self._connection = connection

    def __enter__(self) -> sqlite3.Connection:
        self._connection.execute("BEGIN IMMEDIATE")
        return self._connection

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            try:
                self._connection.execute("COMMIT")
            except sqlite3.Error:
                self._roll_back()
                raise
        else:
            self._roll_back()

    def _roll_back(self) -> None:
        # After some errors SQLite has rolled back by itself, and says so.
        with suppress(sqlite3.Error):
            self._connection.execute("ROLLBACK")


def open_store(database: str, rows_max: int, now: float) -> tuple[HistoryStore, Path | None]:
    """The store, and where a damaged file was moved, if there was one. `now`: wall-clock seconds.

    Raises SetupError.
    """
    try:
        return HistoryStore(database, rows_max), None
    except CorruptDatabase:
        moved = _move_aside(Path(database), now)
        return HistoryStore(database, rows_max), moved


def _move_aside(path: Path, now: float) -> Path:
    """Rename a damaged database and what belongs to it. Raises SetupError."""
    stamp = time.strftime("%Y%m%dT%H%M%SZ", time.gmtime(now))
    target = path.with_name(f"{path.name}.corrupt-{stamp}")
    try:
        for suffix in ("-wal", "-shm", ""):
            source = path.with_name(path.name + suffix)
            if source.exists():
                source.replace(target.with_name(target.name + suffix))
    except OSError as error:
        raise SetupError(
            f"the history in {path} is damaged and cannot be moved aside: {error}; "
            "remove it, or choose another --database"
        ) from error
    return target


def _make_folder(path: Path) -> None:
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise _unusable(str(path), error) from error


def _unusable(database: str, error: Exception) -> SetupError:
    return SetupError(
        f"cannot keep the history in {database}: {error}; choose a file in a folder that can be "
        f"written with --database, or {IN_MEMORY} to keep none"
    )


def _is_missing_table(error: sqlite3.OperationalError) -> bool:
    return "no such table" in str(error) or "no such column" in str(error)


def _finished(row: tuple[str, str, str, str, int, int, int, FinishReason, int]) -> Finished:
    request_id, model, endpoint, tenant, prompt, output, most, reason, epoch = row
    return Finished(
        epoch=epoch,
        request_id=request_id,
        model=model,
        endpoint=endpoint,
        tenant=tenant,
        prompt_tokens=prompt,
        output_tokens=output,
        max_tokens=most,
        reason=reason,
    )
